"""The exact engine: a Cholesky factor per block of cells that can depend on each other.

Prior covariance K = A + Z S Z': A is block-diagonal, Z holds the columns that every block shares (fixed effects, grouping
factors that cross blocks), see :mod:`cellfate.engines.lowrank`. B = I + W A W is factored per block, W^2 the site precisions.
Blocks cost O(s^3), the shared columns O(n m).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cellfate.engines import elsewhere
from cellfate.engines.base import Engine, Sites
from cellfate.engines.blocks import Blocks, connect
from cellfate.engines.columns import Layout
from cellfate.engines.lowrank import LowRankPosterior
from cellfate.errors import DataError
from cellfate.kernels.base import Basis, Component, Dense, Term, sample_variance

WEAK = 1e-4  # below this share of information from its own site, a cell's variance is computed without a difference
JITTER = 1e-9  # added, relative to the mean variance, to factor a singular prior when drawing from it; more where rounding asks for it,
MOST_JITTER = 1e-2  # at most


def invert_lower(lower: Tensor, leaf: int = 128) -> Tensor:
    """Inverse of a lower triangular matrix (..., n, n) by halves: a third of the work of a solve, and all of it products."""
    n = lower.shape[-1]
    if n <= leaf:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device).expand_as(lower)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = n // 2
    out = torch.zeros_like(lower)
    out[..., :half, :half] = invert_lower(lower[..., :half, :half], leaf)
    out[..., half:, half:] = invert_lower(lower[..., half:, half:], leaf)
    out[..., half:, :half] = -out[..., half:, half:] @ (lower[..., half:, :half] @ out[..., :half, :half])
    return out


@dataclass
class DensePrior:
    """`blocks`: A per stack (..., blocks, s, s); `columns`: Z (n, m); `factor`: F (..., m, m), F F' = S; `slots`: whose they are.

    `terms` and `units`: the components it was made of, with their covariances at variance 1 per stack.
    """

    blocks: list[Tensor]
    columns: Tensor
    factor: Tensor
    slots: dict[str, slice]
    terms: tuple[Term, ...]
    units: dict[str, list[Tensor]]


class DenseEngine(Engine):
    """Exact for every kernel; memory is the sum of the squared block sizes."""

    name = "dense"

    def __init__(
        self, components: Sequence[Component], n: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.n, self.like = n, torch.empty(0, device=device, dtype=dtype)
        kernels = {component.name: component.kernel for component in components}
        labels = [labels for kernel in kernels.values() if (labels := kernel.independent()) is not None]
        self.blocks = Blocks(connect(labels, n), device)
        self._kernels = kernels
        self._geometry: dict[str, list] = {}
        self._constant: dict[str, list[Tensor]] = {}
        self._basis_inside: dict[str, bool] = {}
        self._factors: dict[str, list[Tensor]] = {}

    # -- the prior -----------------------------------------------------------------------------------------------------

    def _inside(self, term: Term) -> bool:
        """Whether a component lives inside the blocks; a basis does when each of its columns does."""
        if not isinstance(term.structure, Basis):
            return True
        if term.name not in self._kernels:
            return False
        if term.name not in self._basis_inside:
            touched = sum((part != 0).any(-2).sum(-2) for part in self.blocks.gather(term.structure.phi))
            self._basis_inside[term.name] = bool((torch.as_tensor(touched) <= 1).all())
        return self._basis_inside[term.name]

    def _unit(self, term: Term) -> list[Tensor]:
        """The component's covariance at variance 1, per stack."""
        if term.name in self._constant:
            return self._constant[term.name]
        if isinstance(term.structure, Basis):
            unit = [term.structure.among(part) for part in self.blocks.gather(term.structure.phi)]
        else:
            assert isinstance(term.structure, Dense)
            if term.name not in self._geometry:
                kernel = self._kernels[term.name]
                self._geometry[term.name] = [kernel.geometry(stack) for stack in self.blocks.stacks]
            unit = [term.structure.dense(geometry).to(self.like) for geometry in self._geometry[term.name]]
        if term.normalized:
            unit = self._normalize(term, unit)
        if self._kernels[term.name].constant:
            unit = [k[0] if k.ndim > 3 else k for k in unit]  # the same at every point
            self._constant[term.name] = unit
        return unit

    def _normalize(self, term: Term, unit: list[Tensor]) -> list[Tensor]:
        trace = sum(k.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) for k in unit)
        copies, total = self._kernels[term.name].copies, self.like.new_zeros(())
        for k, cells in zip(unit, self.blocks.stacks, strict=True):
            copy = cells // (self.n // copies)
            total = total + (k if copies == 1 else k * (copy[:, :, None] == copy[:, None, :])).sum((-3, -2, -1))
        scale = sample_variance(torch.as_tensor(trace), total, self.n, copies)
        if not bool((scale > 1e-12 * torch.as_tensor(trace) / self.n).all()):
            raise DataError(
                f"component {term.name!r} is constant over the cells: it cannot explain any variation. Leave it out, or, for a "
                "spatial field, give a `lengthscale` well below the extent of the tissue."
            )
        return [k / scale[..., None, None, None] for k in unit]

    def covariance(self, term: Term) -> list[Tensor]:
        """Covariance of a component inside the blocks, per stack (..., blocks, s, s)."""
        return [term.variance[..., None, None, None] * k for k in self._unit(term)]

    def _shared(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor, dict[str, slice]]:
        """Columns Z (n, m) of the components that cross blocks, the factor F (..., m, m), and where those of each stand."""
        phi, roots, slots, width = [self.like.new_zeros(self.n, 0)], [], {}, 0
        for term in terms:
            if not self._inside(term):
                assert isinstance(term.structure, Basis)
                slots[term.name] = slice(width, width := width + term.structure.phi.shape[1])
                phi.append(term.structure.phi)
                roots.append(term.variance.sqrt()[..., None, None] * term.structure.factor())
        batch = torch.broadcast_shapes(*(root.shape[:-2] for root in roots)) if roots else ()
        factor = self.like.new_zeros(*batch, width, width)
        for slot, root in zip(slots.values(), roots, strict=True):
            factor[..., slot, slot] = root
        return torch.cat(phi, -1), factor, slots

    def prepare(self, terms: Sequence[Term]) -> DensePrior:
        units = {term.name: self._unit(term) for term in terms if self._inside(term)}
        blocks = [self.like.new_zeros(*stack.shape, stack.shape[1]) for stack in self.blocks.stacks]
        for term in terms:
            if term.name in units:
                scale = term.variance[..., None, None, None]
                blocks = [total + scale * k for total, k in zip(blocks, units[term.name], strict=True)]
        return DensePrior(blocks, *self._shared(terms), tuple(terms), units)

    def select(self, prior: object, index: Tensor) -> DensePrior:
        assert isinstance(prior, DensePrior)
        blocks = [k[index] if k.ndim > 3 else k for k in prior.blocks]
        factor = prior.factor[index] if prior.factor.ndim > 2 else prior.factor
        return DensePrior(blocks, prior.columns, factor, prior.slots, (), {})

    def condition(self, terms: Sequence[Term], sites: Sites, prior: object | None = None) -> DensePosterior:
        prepared = self.prepare(terms) if prior is None else prior
        assert isinstance(prepared, DensePrior)
        return DensePosterior(self, prepared, sites)

    def at(self, components: Sequence[Component], cells: np.ndarray) -> DenseEngine:
        return DenseEngine(components, len(cells), device=self.like.device, dtype=self.like.dtype)

    def points_at_once(self, memory: float) -> int:
        return max(1, int(memory / self.bytes_per_point()))

    def bytes_per_point(self) -> float:
        """Memory that one hyperparameter point needs."""
        matrices = 6 + 2 * len(self._kernels)  # alive at the widest moment, the gradient's temporaries included
        return float(self.blocks.entries * self.like.element_size() * matrices)

    def factor(self, name: str, unit: list[Tensor]) -> list[Tensor]:
        """Lower factors of a unit covariance, per stack, with :data:`JITTER` on the diagonal, or ten times that until they are there."""
        if name in self._factors:
            return self._factors[name]
        out = []
        for k in unit:
            diagonal = k.diagonal(dim1=-2, dim2=-1)
            mean = diagonal.mean(-1, keepdim=True).clamp(min=torch.finfo(k.dtype).tiny)
            raised, jitter, added = k + torch.diag_embed((diagonal == 0).to(k)), JITTER, 0.0
            while True:
                raised.diagonal(dim1=-2, dim2=-1).add_((jitter - added) * mean)
                lower, info = torch.linalg.cholesky_ex(raised)
                if not bool(info.any()) or jitter > MOST_JITTER:
                    break
                jitter, added = 10 * jitter, jitter
            if bool(info.any()):
                lower = torch.linalg.cholesky(raised)  # which says so
            # a cell without prior variance has none in a draw either
            out.append(lower * (diagonal != 0)[..., None])
        if name in self._constant:
            self._factors[name] = out
        return out


class DensePosterior(LowRankPosterior):
    """Blocks by one inverse Cholesky factor each; the columns that they share by :class:`LowRankPosterior`."""

    def __init__(self, engine: DenseEngine, prior: DensePrior, sites: Sites) -> None:
        self.engine, self.prior = engine, prior
        self._weight = [w.sqrt() for w in engine.blocks.gather(sites.precision[..., None])]  # W, (..., blocks, s, 1)
        self._lower: list[Tensor] = []  # inverse Cholesky factors, B^-1 = lower' lower
        self._log_det: Tensor = sites.precision.new_zeros(())
        for k, w in zip(prior.blocks, self._weight, strict=True):
            b = w * k * w.mT
            b.diagonal(dim1=-2, dim2=-1).add_(1.0)
            lower, info = torch.linalg.cholesky_ex(b)
            if bool(info.any()):  # B is at least I: only an overflow gets here, and it must not pass for a number
                lower = torch.where((info != 0)[..., None, None], torch.full_like(lower, torch.nan), lower)
            self._log_det = self._log_det + 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
            self._lower.append(invert_lower(lower))
        self._join(prior.columns, Layout.whole(prior.columns.shape[1]), prior.factor, sites)

    # -- blocks --------------------------------------------------------------------------------------------------------

    def _blockwise(self, do, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        parts = self.engine.blocks.gather(x)
        pieces = zip(self._lower, self.prior.blocks, parts, strict=True)
        return self.engine.blocks.scatter([do(lower, k, part) for lower, k, part in pieces])

    @cached_property
    def _inverse(self) -> list[Tensor]:
        """B^-1 per stack; only derivatives need it whole."""
        return [lower.mT @ lower for lower in self._lower]

    @cached_property
    def _squares(self) -> list[Tensor]:
        return [inverse.square() for inverse in self._inverse]

    @cached_property
    def _v(self) -> Tensor:
        """R = R_A - V V'."""
        return self._tau * (self._y @ self._p)

    def _part_log_det(self) -> Tensor:
        return self._log_det

    def _part_whiten(self, x: Tensor) -> Tensor:
        return self._blockwise(lambda low, _k, part: low @ part, x)

    def _part_whiten_t(self, x: Tensor) -> Tensor:
        return self._blockwise(lambda low, _k, part: low.mT @ part, x)

    def _part_prior(self, x: Tensor) -> Tensor:
        return self._blockwise(lambda _low, k, part: k @ part, x)

    def _part_variance(self) -> Tensor:
        return self._diagonal

    @cached_property
    def _diagonal(self) -> Tensor:
        """Variance within blocks, from (1 - B^-1_ii) / tau_i = Sigma_ii, or directly where that difference is small."""
        out = []
        for k, w, lower in zip(self.prior.blocks, self._weight, self._lower, strict=True):
            tau, prior = w.squeeze(-1).square(), k.diagonal(dim1=-2, dim2=-1)
            information = tau * prior
            weak = information < WEAK
            by_difference = (1 - lower.square().sum(-2)) / torch.where(weak, torch.ones_like(tau), tau)
            variance = torch.where(weak, prior, by_difference)
            rows = torch.nonzero((weak & (prior > 0)).flatten(0, -2).any(0)).squeeze(-1)
            if len(rows):
                cross = (k[..., rows, :] * w.mT) @ lower.mT
                direct = prior[..., rows] - cross.square().sum(-1)
                variance = variance.index_copy(-1, rows, torch.where(weak[..., rows], direct, variance[..., rows]))
            out.append(variance[..., None])
        return self.engine.blocks.scatter(out)[..., 0]

    def _part_squared(self, x: Tensor) -> Tensor:
        v = self.engine.blocks.gather(self._diagonal[..., None])
        parts, out = self.engine.blocks.gather(x), []
        for w, square, variance, part in zip(self._weight, self._squares, v, parts, strict=True):
            tau = w.square()
            # off the diagonal Sigma_ij = -B^-1_ij / (w_i w_j); a cell without a site takes no part but its own variance
            scale = torch.where(tau > 1e-12, 1 / tau.clamp(min=1e-12), torch.zeros_like(tau))
            scaled = scale * part
            off = square @ scaled - square.diagonal(dim1=-2, dim2=-1)[..., None] * scaled
            out.append(scale * off + variance.square() * part)
        return self.engine.blocks.scatter(out)

    # -- derivatives ---------------------------------------------------------------------------------------------------

    def surrogate(self, terms: Sequence[Term], pair: Tensor | None = None, omega: Tensor | None = None) -> Tensor:
        engine, blocks = self.engine, self.engine.blocks
        b = self.weights[..., None].detach()
        bs, vs = blocks.gather(b), blocks.gather(self._v)
        pairs = None if pair is None else blocks.gather(pair[..., None])
        weights = None if omega is None else blocks.gather(omega[..., None])
        inner = None if omega is None else (self._v * omega[..., None]).mT @ self._v

        def cotangent(i: int) -> Tensor:
            w, v = self._weight[i], vs[i]
            r = w * self._inverse[i] * w.mT
            # low-rank parts as one product: each term of rank k would pass over the whole matrix
            left, right = [bs[i], v], [0.5 * bs[i], 0.5 * v]
            if pairs is not None:
                left += [pairs[i], bs[i]]
                right += [0.5 * bs[i], 0.5 * pairs[i]]
            if weights is None or inner is None:
                return torch.cat(left, -1) @ torch.cat(right, -1).mT - 0.5 * r
            scaled = r * weights[i].mT
            mixed = scaled @ v
            left += [mixed, v, v @ inner[..., None, :, :]]
            right += [-v, -mixed, v]
            bar = scaled @ r
            del scaled
            return bar.add_(torch.cat(left, -1) @ torch.cat(right, -1).mT).sub_(r, alpha=0.5)

        total: Tensor = b.new_zeros(())
        inside = [(term, engine._unit(term)) for term in terms if engine._inside(term)]
        for i in range(len(blocks.stacks)):
            bar = cotangent(i)
            for term, unit in inside:
                total = total + term.variance * (bar * unit[i]).sum((-3, -2, -1))
        columns, slots = self.prior.columns, self.prior.slots
        if not slots:
            return total
        rz, zb = self.residual(columns), columns.mT @ b
        for term in terms:
            if term.name in slots:
                slot = slots[term.name]
                total = total + self._moved(term, columns[:, slot], rz[..., slot], zb[..., slot, :], pair, omega)
        return total

    def _moved(
        self, term: Term, z: Tensor, rz: Tensor, zb: Tensor, pair: Tensor | None, omega: Tensor | None
    ) -> Tensor:
        """What :meth:`surrogate` is for a component of shared columns `z`: the derivative in its spectrum, times that."""
        assert isinstance(term.structure, Basis)
        variance, spectrum = term.variance[..., None], term.structure.spectrum
        if not term.structure.diagonal:
            whole = 0.5 * zb @ zb.mT - 0.5 * z.mT @ rz
            if pair is not None:
                whole = whole + (z.mT @ pair[..., None]) @ zb.mT
            if omega is not None:
                whole = whole + rz.mT @ (omega[..., None] * rz)
            return (whole * variance[..., None] * spectrum).sum((-2, -1))
        bar = 0.5 * zb.square() - 0.5 * (z * rz).sum(-2)[..., None]
        if pair is not None:
            bar = bar + (z.mT @ pair[..., None]) * zb
        if omega is not None:
            bar = bar + (rz.square() * omega[..., None]).sum(-2)[..., None]
        return (bar[..., 0] * variance * spectrum).sum(-1)

    # -- components ----------------------------------------------------------------------------------------------------

    def _unit(self, term: Term) -> list[Tensor]:
        """A component's covariance at variance 1; kept from the prior where the component is one of its own."""
        if any(term is own for own in self.prior.terms):
            return self.prior.units[term.name]
        return self.engine._unit(term)

    def component_times(self, term: Term, x: Tensor) -> Tensor:
        if self.engine._inside(term):
            parts = zip(self._unit(term), self.engine.blocks.gather(x), strict=True)
            return term.variance[..., None, None] * self.engine.blocks.scatter([k @ part for k, part in parts])
        assert isinstance(term.structure, Basis)
        phi = term.structure.phi
        return phi @ (term.variance[..., None, None] * term.structure.times(phi.mT @ x))

    def component_mean(self, term: Term) -> Tensor:
        return self.component_times(term, self.weights[..., None])[..., 0]

    def component_variance(self, term: Term) -> Tensor:
        if not self.engine._inside(term):
            assert isinstance(term.structure, Basis)
            phi, (_, covariance) = term.structure.phi, self.coefficients(term)
            return ((phi @ covariance) * phi).sum(-1)
        out = []
        vs = self.engine.blocks.gather(self._v)
        for unit, w, lower, v in zip(self._unit(term), self._weight, self._lower, vs, strict=True):
            k = term.variance[..., None, None, None] * unit
            within = k.diagonal(dim1=-2, dim2=-1) - ((k * w.mT) @ lower.mT).square().sum(-1)
            out.append((within + (k @ v).square().sum(-1))[..., None])
        return self.engine.blocks.scatter(out)[..., 0]

    def coefficients(self, term: Term) -> tuple[Tensor, Tensor]:
        assert isinstance(term.structure, Basis)
        phi = term.structure.phi
        if not self.engine._inside(term):
            # by the capacity matrix: the difference below has no digits left where a prior is wide
            return self._coefficients_at(self.prior.slots[term.name])
        prior = term.variance[..., None, None] * term.structure.matrix()
        mean = (prior @ (phi.mT @ self.weights[..., None]))[..., 0]
        inner = phi.mT @ self.residual(phi.expand(*self.mean.shape[:-1], *phi.shape))
        covariance = prior - prior @ inner @ prior
        return mean, (covariance + covariance.mT) / 2

    def sample(self, terms: Sequence[Term], count: int, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """By Matheron's rule: draw from the prior and from the noise, then correct both by the data."""
        blocks = self.engine.blocks

        def normal(rows: int) -> Tensor:
            # one generator a point, and on the CPU, so that draws depend neither on chunks nor on the device
            draws = [torch.randn(rows, count, generator=g, dtype=torch.float64) for g in generators]
            return torch.stack(draws).to(self.mean)

        drawn: dict[str, Tensor] = {}
        for term in terms:
            if self.engine._inside(term) and not isinstance(term.structure, Basis):
                parts = blocks.gather(normal(self.engine.n))
                factors = self.engine.factor(term.name, self._unit(term))
                unit = blocks.scatter([lower @ part for lower, part in zip(factors, parts, strict=True)])
                drawn[term.name] = term.variance.sqrt()[..., None, None] * unit
            else:
                assert isinstance(term.structure, Basis)
                z = term.structure.spread(normal(term.structure.phi.shape[1]))
                drawn[term.name] = term.variance.sqrt()[..., None, None] * (term.structure.phi @ z)
        u = sum(drawn.values(), start=self.mean.new_zeros(()))
        xi = normal(self.engine.n)
        correction = self.weights[..., None] - self._residual_of(torch.as_tensor(u), xi)
        return {term.name: drawn[term.name] + self.component_times(term, correction) for term in terms}

    def ancestors(self, term: Term) -> tuple[Tensor, Tensor]:
        return elsewhere.dense_ancestors(self, term, self.engine._kernels[term.name])

    def elsewhere(
        self, term: Term, coordinates: np.ndarray, specimen: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        return elsewhere.dense_elsewhere(self, term, coordinates, specimen)
