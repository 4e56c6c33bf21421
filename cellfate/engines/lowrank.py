"""The posterior of a sum of two parts: one whose inverse is cheap, and columns.

Prior covariance K = A + Z S Z'. For A a factor M is at hand with M'M = B^-1, B = I + W A W, where W^2 = T are the site precisions;
the columns Z (n, m) with S = F F' come in by the matrix inversion lemma,

    Sigma = Sigma_A + Y P P' Y',    R = R_A - T Y P P' Y' T,    Y = (I + A T)^-1 Z,    P P' = (S^-1 + Z' R_A Z)^-1,

so that beside the factor everything is a ridge regression on m columns. Z, Y and what is as long are stored as
:mod:`cellfate.engines.columns` says: where independent sets of cells have columns of their own, side by side.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from cellfate.engines.base import Posterior, Sites
from cellfate.engines.columns import Layout

UNSEEN = 1e-8  # of the most informed cell: a cell that knows less is treated as unobserved
COLUMNS, ROWS = 64, 4096  # taken at a time where a matrix as large as the columns would be made
ESTIMATE, PROBES = 1_500, 8  # cells from which on products with squares are estimated, and by how many random vectors


class LowRankPosterior(Posterior):
    """What follows from a factor of the cheap part, given by the methods that begin with `_part`."""

    def _join(self, columns: Tensor, layout: Layout, factor: Tensor, sites: Sites) -> None:
        """Condition on `sites`; columns Z (n, width) and their layout, factor F (..., m, m)."""
        self.sites, self._z, self._layout, self._f = sites, columns, layout, factor
        tau = sites.precision[..., None]
        self._tau = tau
        self._seen = (tau > 0) & (tau >= UNSEEN * tau.amax(-2, keepdim=True))
        self._all_seen = bool(self._seen.all())
        self._root = torch.where(self._seen, tau, torch.ones_like(tau)).sqrt()
        shift = sites.shift[..., None]
        resolved = self._part_resolve(shift)
        # what the data say of the coefficients (..., m, 1), and what these add to the field
        self._factorize()
        self._coefficients = self._p @ (self._p.mT @ layout.inner(columns, resolved))
        pulled = self._part_respond(layout.times(columns, self._coefficients))
        self.mean = (self._part_prior(resolved) + pulled)[..., 0]
        self.weights = (resolved - tau * pulled)[..., 0]

    def _factorize(self) -> None:
        """The Gram matrix Z' R_A Z, P and log|B|."""
        z, f, m = self._z, self._f, self._layout.total
        self._whitened: Tensor | None = self._part_whiten(self._tau.sqrt() * z)
        self._gram = self._layout.gram(self._whitened)
        capacity = f.mT @ self._gram @ f
        capacity = capacity + torch.eye(m, dtype=z.dtype, device=z.device)
        lower, info = torch.linalg.cholesky_ex(capacity)
        if bool(info.any()):  # at least I: only an overflow gets here, and it must not pass for a number
            lower = torch.where((info != 0)[..., None, None], torch.full_like(lower, torch.nan), lower)
        self._p = torch.linalg.solve_triangular(lower, f.mT, upper=False).mT
        self.log_det = self._part_log_det() + 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @cached_property
    def _y(self) -> Tensor:
        whitened, self._whitened = self._whitened, None  # as large as the columns: not both of them are held
        return self._respond(whitened, self._z)

    @cached_property
    def variance(self) -> Tensor:  # type: ignore[override]
        """Diagonal of Sigma; a mode can be sought without it."""
        out = self._part_variance()
        if not self._p.shape[-1]:
            return out
        return out + self._layout.squares(self._y, self._p, ROWS)

    def _e(self) -> Iterator[tuple[slice, Tensor]]:
        """E = Y P, a block of columns at a time: Sigma = Sigma_A + E E'. As long as the cells, and stored as the columns are."""
        for block in self._layout.blocks(COLUMNS):
            yield block, self._layout.turned(self._y, self._p, block)

    # -- the cheap part ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _part_log_det(self) -> Tensor:
        """log|B| (...,)."""

    @abstractmethod
    def _part_whiten(self, x: Tensor) -> Tensor:
        """M x; overwrites x where the result fits into it, which callers count on nowhere."""

    @abstractmethod
    def _part_whiten_t(self, x: Tensor) -> Tensor:
        """M' x; the same."""

    @abstractmethod
    def _part_prior(self, x: Tensor) -> Tensor:
        """A x."""

    @abstractmethod
    def _part_variance(self) -> Tensor:
        """Diagonal (..., n) of Sigma_A."""

    @abstractmethod
    def _part_squared(self, x: Tensor) -> Tensor:
        """(Sigma_A o Sigma_A) x."""

    def _part_residual(self, x: Tensor) -> Tensor:
        """R_A x = W B^-1 W x."""
        w = self._tau.sqrt()
        return w * self._part_whiten_t(self._part_whiten(w * x))

    def _part_respond(self, x: Tensor) -> Tensor:
        """(I + A T)^-1 x = W^-1 B^-1 W x, and x - A R_A x for cells without a site, where W^-1 is not."""
        return self._respond(self._part_whiten(self._tau.sqrt() * x), x)

    def _respond(self, whitened: Tensor | None, x: Tensor) -> Tensor:
        assert whitened is not None
        back = self._part_whiten_t(whitened)
        if self._all_seen:
            return back.div_(self._root)
        return torch.where(self._seen, back / self._root, x - self._part_prior(self._tau.sqrt() * back))

    def _part_resolve(self, x: Tensor) -> Tensor:
        """(I + T A)^-1 x = W B^-1 W^-1 x, and x - R_A A x for cells without a site, where W^-1 is not."""
        seen = x / self._root if self._all_seen else torch.where(self._seen, x / self._root, 0.0)
        out = self._tau.sqrt() * self._part_whiten_t(self._part_whiten(seen))
        if not self._all_seen:
            unseen = torch.where(self._seen, 0.0, x)
            out = out + unseen - self._part_residual(self._part_prior(unseen))
        return out

    def _part_smooth(self, x: Tensor) -> Tensor:
        return self._part_prior(self._part_resolve(x))

    # -- products ------------------------------------------------------------------------------------------------------

    def _columns_times(self, x: Tensor) -> Tensor:
        """P P' Y' x, what the data say of the coefficients."""
        return self._p @ (self._p.mT @ self._layout.inner(self._y, x))

    def prior_times(self, x: Tensor) -> Tensor:
        along = self._f @ (self._f.mT @ self._layout.inner(self._z, x))
        return self._part_prior(x) + self._layout.times(self._z, along)

    def residual(self, x: Tensor) -> Tensor:
        return self._part_residual(x) - self._tau * self._respond_to(self._tau * x)

    def smooth(self, x: Tensor) -> Tensor:
        return self._part_smooth(x) + self._respond_to(x)

    def _respond_to(self, x: Tensor) -> Tensor:
        """Y P P' Y' x."""
        return self._layout.times(self._y, self._columns_times(x))

    def smooth_squared(self, x: Tensor) -> Tensor:
        if not self._p.shape[-1]:
            return self._part_squared(x)
        if x.shape[-2] > ESTIMATE and self._p.shape[-1] > PROBES:
            return self._part_squared(x) + self._estimated_squares(x)
        result = self._part_squared(x)
        for _, e in self._e():
            columns = [2 * (e * self._part_smooth(e * x_k[..., None])).sum(-1) for x_k in x.unbind(-1)]
            result = result + torch.stack(columns, -1)
        squares = []
        for x_k in x.unbind(-1):
            middle = self._p @ (self._p.mT @ self._weighted_gram(x_k) @ self._p) @ self._p.mT
            squares.append(self._layout.bilinear(self._y, middle, self._layout, self._y, ROWS))
        return result + torch.stack(squares, -1)

    @cached_property
    def _probes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random signs z (n, PROBES), Sigma z and Sigma_A z; the seed only makes a gradient repeatable."""
        signs = torch.randint(2, (self._z.shape[-2], PROBES), generator=torch.Generator().manual_seed(0))
        z = (2.0 * signs - 1.0).to(self.mean)
        part = self._part_smooth(z)
        return z, part + self._respond_to(z), part

    def _estimated_squares(self, x: Tensor) -> Tensor:
        """(Sigma o Sigma - Sigma_A o Sigma_A) x = diag(Sigma diag(x) Sigma) - ..., by probes and linear in x.

        Without bias (Bekas, Kokiopoulou & Saad 2007), and for sums over many cells the noise is small.
        """
        z, whole, part = self._probes
        out = []
        for x_k in x.unbind(-1):
            along = x_k[..., None] * z
            of_part = self._part_smooth(along)
            of_whole = of_part + self._respond_to(along)
            out.append((of_whole * whole - of_part * part).mean(-1))
        return torch.stack(out, -1)

    def _weighted_gram(self, weight: Tensor) -> Tensor:
        """Y' diag(weight) Y."""
        return self._layout.gram(self._y, weight, ROWS)

    def _residual_of(self, u: Tensor, xi: Tensor) -> Tensor:
        """R (u + T^-1/2 xi), without the division: of draws of the field and of its noise."""
        root = self._tau.sqrt()
        whitened = self._part_whiten_t(self._part_whiten(root * u + xi))
        return root * whitened - self._tau * self._respond_to(self._tau * u + root * xi)

    def _coefficients_at(self, slot: slice) -> tuple[Tensor, Tensor]:
        """Posterior mean and covariance of the coefficients of some of the columns."""
        root = self._p[..., slot, :]
        return self._coefficients[..., slot, 0], root @ root.mT
