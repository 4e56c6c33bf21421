"""The posterior of a sum of two parts: one whose inverse is cheap, and columns.

Prior covariance K = A + Z S Z'. For A a factor M is at hand with M'M = B^-1, B = I + W A W, where W^2 = T are the site precisions;
the columns Z (n, m) with S = F F' come in by the matrix inversion lemma,

    Sigma = Sigma_A + Y P P' Y',    R = R_A - T Y P P' Y' T,    Y = (I + A T)^-1 Z,    P P' = (S^-1 + Z' R_A Z)^-1,

so that beside the factor everything is a ridge regression on m columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from cellfate.engines.base import Posterior, Sites

UNSEEN = 1e-8  # of the most informed cell: a cell that knows less is treated as unobserved
COLUMNS = 64  # taken at a time where a matrix as tall as the cells would be made


class LowRankPosterior(Posterior):
    """What follows from a factor of the cheap part, given by the methods that begin with `_part`."""

    def _join(self, columns: Tensor, factor: Tensor, sites: Sites) -> None:
        """Condition on `sites`; columns Z (n, m), factor F (..., m, m)."""
        self.sites, self._z, self._f = sites, columns, factor
        tau = sites.precision[..., None]
        self._tau = tau
        self._seen = (tau > 0) & (tau >= UNSEEN * tau.amax(-2, keepdim=True))
        self._all_seen = bool(self._seen.all())
        self._root = torch.where(self._seen, tau, torch.ones_like(tau)).sqrt()
        self._respond()
        shift = sites.shift[..., None]
        resolved = self._part_resolve(shift)
        self._coefficients = self._p @ (self._p.mT @ (self._y.mT @ shift))  # (..., m, 1), posterior mean
        pulled = self._y @ self._coefficients
        self.mean = (self._part_prior(resolved) + pulled)[..., 0]
        self.weights = (resolved - tau * pulled)[..., 0]
        variance = self._part_variance()
        for _, e in self._e():
            variance = variance + e.square().sum(-1)
        self.variance = variance

    def _respond(self) -> None:
        """Y, the Gram matrix Z' R_A Z, and P."""
        z, f, m = self._z, self._f, self._z.shape[-1]
        whitened = self._part_whiten(self._tau.sqrt() * z)
        self._gram = whitened.mT @ whitened
        capacity = f.mT @ self._gram @ f
        capacity = capacity + torch.eye(m, dtype=z.dtype, device=z.device)
        lower, info = torch.linalg.cholesky_ex(capacity)
        if bool(info.any()):  # at least I: only an overflow gets here, and it must not pass for a number
            lower = torch.where((info != 0)[..., None, None], torch.full_like(lower, torch.nan), lower)
        self._p = torch.linalg.solve_triangular(lower, f.mT, upper=False).mT
        self.log_det = self._part_log_det() + 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        back = self._part_whiten_t(whitened)  # B^-1 W Z
        if self._all_seen or not m:
            self._y = back.div_(self._root)
        else:
            self._y = torch.where(self._seen, back / self._root, z - self._part_prior(self._tau.sqrt() * back))

    def _blocks(self) -> Iterator[slice]:
        for first in range(0, self._p.shape[-1], COLUMNS):
            yield slice(first, first + COLUMNS)

    def _e(self) -> Iterator[tuple[slice, Tensor]]:
        """E = Y P, a block of columns at a time: Sigma = Sigma_A + E E'."""
        for block in self._blocks():
            yield block, self._y @ self._p[..., block]

    # -- the cheap part ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _part_log_det(self) -> Tensor:
        """log|B| (...,)."""

    @abstractmethod
    def _part_whiten(self, x: Tensor) -> Tensor:
        """M x."""

    @abstractmethod
    def _part_whiten_t(self, x: Tensor) -> Tensor:
        """M' x, a new tensor."""

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
        return self._p @ (self._p.mT @ (self._y.mT @ x))

    def prior_times(self, x: Tensor) -> Tensor:
        return self._part_prior(x) + self._z @ (self._f @ (self._f.mT @ (self._z.mT @ x)))

    def residual(self, x: Tensor) -> Tensor:
        return self._part_residual(x) - self._tau * (self._y @ self._columns_times(self._tau * x))

    def smooth(self, x: Tensor) -> Tensor:
        return self._part_smooth(x) + self._y @ self._columns_times(x)

    def smooth_squared(self, x: Tensor) -> Tensor:
        result = self._part_squared(x)
        for _, e in self._e():
            columns = [2 * (e * self._part_smooth(e * x_k[..., None])).sum(-1) for x_k in x.unbind(-1)]
            result = result + torch.stack(columns, -1)
        squares = []
        for x_k in x.unbind(-1):
            inner = self._p @ (self._p.mT @ self._weighted_gram(x_k) @ self._p) @ self._p.mT
            squares.append(sum((((self._y @ inner[..., b]) * self._y[..., b]).sum(-1) for b in self._blocks()), 0.0))
        return result + torch.stack([torch.as_tensor(s) for s in squares], -1) if self._p.shape[-1] else result

    def _weighted_gram(self, weight: Tensor) -> Tensor:
        """Y' diag(weight) Y."""
        blocks = [self._y.mT @ (weight[..., None] * self._y[..., b]) for b in self._blocks()]
        return torch.cat(blocks, -1) if blocks else self._gram

    def _noise(self, xi: Tensor) -> Tensor:
        """R T^-1/2 xi, without the division."""
        whitened = self._part_whiten_t(self._part_whiten(xi))
        return self._tau.sqrt() * whitened - self._tau * (self._y @ self._columns_times(self._tau.sqrt() * xi))

    def _coefficients_at(self, slot: slice) -> tuple[Tensor, Tensor]:
        """Posterior mean and covariance of the coefficients of some of the columns."""
        root = self._p[..., slot, :]
        return self._coefficients[..., slot, 0], root @ root.mT
