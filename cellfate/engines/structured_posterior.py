"""What the structured engine answers given sites; the algebra of the columns is in :mod:`cellfate.engines.lowrank`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cellfate.engines import elsewhere
from cellfate.engines.base import Sites
from cellfate.engines.columns import Columns
from cellfate.engines.lowrank import ROWS, LowRankPosterior
from cellfate.kernels.base import Term
from cellfate.trees.plan import TreePlan
from cellfate.trees.sweeps import (
    TreeFactor,
    TreeMarginals,
    TreeSlopes,
    draw,
    paired_up_sums,
    path_sums,
    tree_times,
    up_sums,
)

if TYPE_CHECKING:
    from cellfate.engines.structured import StructuredEngine


@dataclass(frozen=True)
class Walk:
    """Steps along the tree at a batch of points, the component's variance and normalization in the noise; see `trees.sweeps`."""

    plan: TreePlan
    gain: Tensor | None  # (..., nodes)
    noise: Tensor  # (..., nodes)

    def __getitem__(self, index: Tensor) -> Walk:
        return Walk(self.plan, _pick(self.gain, 2, index), self.noise[index])

    def times(self, x: Tensor) -> Tensor:
        """K x at the cells (..., n, k)."""
        return tree_times(self.plan, self.gain, self.noise, x)

    def field(self, x: Tensor) -> Tensor:
        """The same at all nodes (..., nodes, k)."""
        return path_sums(self.plan, self.gain, self.noise, x)

    def above(self, x: Tensor) -> Tensor:
        """The same at the parent of each node, zero at roots."""
        parent = self.plan.parent
        return torch.where((parent < 0)[:, None], 0.0, self.field(x)[..., parent.clamp(min=0), :])

    def below(self, x: Tensor) -> Tensor:
        """Sums (..., nodes, k) of x over the cells below each node, weighted by gains."""
        return up_sums(self.plan, self.gain, x)

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum (..., nodes) over the columns of `below(x) * below(y)`."""
        return paired_up_sums(self.plan, self.gain, x, y)


@dataclass(frozen=True)
class Part:
    """A component at a batch of points: steps along the tree, a spectrum over its columns, variances of single cells.

    spectrum: (..., m) where it is `diagonal`, else (..., m, m), with a `root` where one is known, of `blocks` that do not meet where
    they are given; own: (..., n). All hold the component's variance and its normalization.
    """

    walk: Walk | None = None
    spectrum: Tensor | None = None
    own: Tensor | None = None
    diagonal: bool = True
    root: Tensor | None = None
    blocks: tuple[slice, ...] | None = None

    def __getitem__(self, index: Tensor) -> Part:
        walk = None if self.walk is None else self.walk[index]
        spectrum = _pick(self.spectrum, 2 if self.diagonal else 3, index)
        return Part(walk, spectrum, _pick(self.own, 2, index), self.diagonal, _pick(self.root, 3, index), self.blocks)


def _pick(x: Tensor | None, ndim: int, index: Tensor) -> Tensor | None:
    """Some points of a batch; what has none is the same at all."""
    return x if x is None or x.ndim < ndim else x[index]


@dataclass(frozen=True)
class StructuredPrior:
    """Parts by component, and their sum: steps along the tree, own variances (..., n), the factor F (..., m, m) of all columns."""

    terms: tuple[Term, ...]  # none after a selection
    parts: Mapping[str, Part]
    walk: Walk | None
    own: Tensor
    factor: Tensor


class Independent:
    """The factor of a prior without a tree: B is diagonal. Answers what a :class:`TreeFactor` does."""

    def __init__(self, own: Tensor, precision: Tensor) -> None:
        self._own, self._precision = own, precision
        self._scale = torch.sqrt(1 + precision * own)[..., None]
        self.log_det = torch.log1p(precision * own).sum(-1)

    def whiten(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return x / self._scale if out is None else out.div_(self._scale)

    def whiten_t(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self.whiten(x, out)


class StructuredPosterior(LowRankPosterior):
    """Sites joined to a :class:`StructuredPrior`."""

    def __init__(
        self,
        engine: StructuredEngine,
        prior: StructuredPrior,
        columns: Columns,
        sites: Sites,
    ) -> None:
        self.engine, self.prior = engine, prior
        self._columns, self._slots = columns, columns.slots
        walk, precision = prior.walk, sites.precision
        self._factor: TreeFactor | Independent = Independent(prior.own, precision)
        self._marginals: TreeMarginals | None = None
        if walk is not None:
            self._factor = TreeFactor(walk.plan, walk.gain, walk.noise, prior.own, precision)
            self._marginals = self._factor.marginals()
        self._join(columns.x, columns.layout, prior.factor, sites)

    # -- the cheap part ------------------------------------------------------------------------------------------------

    def _part_log_det(self) -> Tensor:
        return self._factor.log_det

    def _part_whiten(self, x: Tensor) -> Tensor:
        return self._factor.whiten(x, out=self._room(x))

    def _part_whiten_t(self, x: Tensor) -> Tensor:
        return self._factor.whiten_t(x, out=self._room(x))

    def _room(self, x: Tensor) -> Tensor | None:
        """`x` itself, where the result fits into it."""
        fits = x.shape[:-1] == self.sites.precision.shape and x.is_contiguous() and x.dtype == self._z.dtype
        return x if fits else None

    def _part_prior(self, x: Tensor) -> Tensor:
        own = self.prior.own[..., None] * x
        return own if self.prior.walk is None else own + self.prior.walk.times(x)

    @property
    def _without_itself(self) -> Tensor:
        """Variance (..., n) of each cell given the data of all others, without the columns."""
        return self.prior.own if self._marginals is None else self._marginals.prior_cavity

    def _part_variance(self) -> Tensor:
        cavity = self._without_itself
        return cavity / (1 + self.sites.precision * cavity)

    def _part_information(self) -> Tensor:
        """Diagonal (..., n) of R_A."""
        tau = self.sites.precision
        return tau / (1 + tau * self._without_itself)

    def _part_squared(self, x: Tensor) -> Tensor:
        # minus the derivative of the variances as precisions move along x
        tau, cavity = self.sites.precision, self._without_itself
        out = []
        for along in x.unbind(-1):
            slope = torch.zeros_like(cavity) if self._marginals is None else self._slopes(along).prior_cavity
            out.append((cavity.square() * along - slope) / (1 + tau * cavity).square())
        return torch.stack(out, -1)

    def _slopes(self, along: Tensor) -> TreeSlopes:
        assert isinstance(self._factor, TreeFactor)
        return self._factor.marginals_slope(along)

    # -- derivatives ---------------------------------------------------------------------------------------------------

    def surrogate(self, terms: Sequence[Term], pair: Tensor | None = None, omega: Tensor | None = None) -> Tensor:
        """See :meth:`Posterior.surrogate`: the derivatives in steps, own variances and spectra, times what is live of them."""
        live = {term.name: self.engine.part(term) for term in terms}
        columns = any(part.spectrum is not None and part.spectrum.requires_grad for part in live.values())
        weighted = None if omega is None else self._weighted_gram(self.sites.precision.square() * omega)
        node_bar, gain_bar, own_bar = self._bars(pair, omega, weighted)
        total = self.mean.new_zeros(self.mean.shape[:-1])
        spectrum_bar = self._spectrum_bar(pair, weighted) if columns else None
        for name, part in live.items():
            if part.walk is not None:
                total = total + (node_bar * part.walk.noise).sum(-1)
                if part.walk.gain is not None:
                    total = total + (gain_bar * part.walk.gain).sum(-1)
            if part.own is not None:
                total = total + (own_bar * part.own).sum(-1)
            if part.spectrum is not None and spectrum_bar is not None:
                bar = spectrum_bar[..., self._slots[name], self._slots[name]]
                if part.diagonal:
                    total = total + (bar.diagonal(dim1=-2, dim2=-1) * part.spectrum).sum(-1)
                else:
                    total = total + (bar * part.spectrum).sum((-2, -1))
        return total

    def _bars(
        self, pair: Tensor | None, omega: Tensor | None, weighted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives in noise and gain of every branch (..., nodes), and in own variances (..., n).

        A branch e with the cells below it, g_e weighted by gains, enters A as noise_e g_e g_e', and its gain as g_e k_p' + k_p g_e'
        with the covariance k_p of the cells and the parent. R = R_A - V V' with V = T E, and R Omega R = R_A Omega R_A - J V' - V J'
        with J = R_A Omega V - V (V' Omega V) / 2.
        """
        tau, b = self.sites.precision, self.weights
        walk, marginals, along = self.prior.walk, self._marginals, None if omega is None else tau.square() * omega
        slopes = None if along is None or marginals is None else self._slopes(along)

        own = 0.5 * b.square() - 0.5 * self._part_information()
        if along is not None:
            cavity_slope = 0.0 if slopes is None else slopes.prior_cavity
            own = own + (along - tau.square() * cavity_slope) / (1 + tau * self._without_itself).square()
        if pair is not None:
            own = own + pair * b

        node = gain = own.new_zeros(())
        if walk is not None and marginals is not None:
            once = walk.below(b[..., None])[..., 0]
            node = 0.5 * once.square() - 0.5 * marginals.rho
            if slopes is not None:
                node = node + slopes.rho
            if pair is not None:
                node = node + walk.below(pair[..., None])[..., 0] * once
            if walk.gain is not None:
                gain = self._gain_bar(walk, marginals, slopes, pair)
        for v, x in self._low_rank_pairs(omega, weighted):
            own = own + (v * x).sum(-1)
            if walk is not None:
                node = node + walk.paired(v, x)
                if walk.gain is not None:
                    gain = gain + (walk.below(v) * walk.above(x) + walk.below(x) * walk.above(v)).sum(-1)
        return node, gain, own

    def _gain_bar(self, walk: Walk, marginals: TreeMarginals, slopes: TreeSlopes | None, pair: Tensor | None) -> Tensor:
        """What the tree alone, without the columns, gives for the derivative in the gains; of no meaning at roots."""
        b, gain = self.weights[..., None], walk.gain
        assert gain is not None
        cavity, rho = marginals.parent_cavity, marginals.rho
        bar = walk.below(b)[..., 0] * walk.above(b)[..., 0] - gain * cavity * rho
        if slopes is not None:
            bar = bar + 2 * gain * (slopes.parent_cavity * rho + cavity * slopes.rho)
        if pair is not None:
            p = pair[..., None]
            bar = bar + (walk.below(p) * walk.above(b) + walk.below(b) * walk.above(p))[..., 0]
        return torch.where(walk.plan.parent < 0, 0.0, bar)

    def _low_rank_pairs(self, omega: Tensor | None, weighted: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of columns (V, X) with -tr(R dA)/2 + tr(R Omega R dA) = (what R_A gives) + sum of v_k' dA x_k."""
        tau = self._tau
        turn = None if weighted is None else self._p @ (self._p.mT @ weighted @ self._p)
        for block, e in self._e():
            v = tau * e
            if turn is None:
                yield v, 0.5 * v
                continue
            assert omega is not None
            # in place: each of these is as long as the cells, and is met once a block
            x = self._part_residual(omega[..., None] * v).mul_(-2)
            x += self._layout.turned(self._y, turn, block).mul_(tau)
            yield v, x.add_(v, alpha=0.5)

    def _spectrum_bar(self, pair: Tensor | None, weighted: Tensor | None) -> Tensor:
        """Derivative (..., m, m) in the spectrum of the columns."""
        zb = self._layout.inner(self._z, self.weights[..., None])
        back = torch.eye(self._layout.total, dtype=zb.dtype, device=zb.device) - self._p @ (self._p.mT @ self._gram)
        bar = 0.5 * zb @ zb.mT - 0.5 * self._gram @ back
        if pair is not None:
            bar = bar + self._layout.inner(self._z, pair[..., None]) @ zb.mT
        if weighted is not None:
            bar = bar + back.mT @ weighted @ back
        return bar

    # -- components ----------------------------------------------------------------------------------------------------

    def _part(self, term: Term) -> Part:
        """A component's part; kept from the prior where the component is one of its own."""
        if any(term is own for own in self.prior.terms):
            return self.prior.parts[term.name]
        return self.engine.part(term)

    def component_times(self, term: Term, x: Tensor) -> Tensor:
        part, out = self._part(term), torch.zeros_like(x)
        if part.walk is not None:
            out = out + part.walk.times(x)
        if part.spectrum is not None:
            layout, phi = self._columns.of(term.name)
            along = layout.inner(phi, x)
            along = part.spectrum[..., None] * along if part.diagonal else part.spectrum @ along
            out = out + layout.times(phi, along)
        return out if part.own is None else out + part.own[..., None] * x

    def component_mean(self, term: Term) -> Tensor:
        if not any(term is own for own in self.prior.terms) or self._part(term).spectrum is None:
            return self.component_times(term, self.weights[..., None])[..., 0]
        # by the coefficients: K b has fewer digits where a prior is wide
        layout, phi = self._columns.of(term.name)
        mean = layout.times(phi, self._coefficients[..., self._slots[term.name], :])[..., 0]
        own = self._part(term).own
        return mean if own is None else mean + own * self.weights

    def coefficients(self, term: Term) -> tuple[Tensor, Tensor]:
        return self._coefficients_at(self._slots[term.name])

    def component_variance(self, term: Term) -> Tensor:
        part, tau = self._part(term), self._tau
        if part.walk is not None:
            assert self._marginals is not None
            within = self._marginals.node_variance[..., part.walk.plan.leaf]
            for _, e in self._e():
                within = within + part.walk.times(tau * e).square().sum(-1)
            return within
        variance = torch.zeros_like(self.mean)
        if part.spectrum is not None:
            layout, phi = self._columns.of(term.name)
            variance = layout.bilinear(phi, self.coefficients(term)[1], layout, phi, ROWS)
        if part.own is not None:
            information = self._part_information()
            for _, e in self._e():
                information = information - (tau * e).square().sum(-1)
            variance = variance + part.own - part.own.square() * information
            if part.spectrum is not None:
                (layout, phi), slot = self._columns.of(term.name), self._slots[term.name]
                back = torch.eye(self._p.shape[-2]).to(phi) - self._p @ (self._p.mT @ self._gram)
                spectrum = torch.diag_embed(part.spectrum) if part.diagonal else part.spectrum
                # of R Z S with a cell's own columns
                cross = self._layout.bilinear(self._y, back[..., :, slot] @ spectrum, layout, phi, ROWS)
                variance = variance - 2 * part.own * self.sites.precision * cross
        return variance

    def sample(self, terms: Sequence[Term], count: int, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """By Matheron's rule: draw from the prior and from the noise, then correct both by the data."""

        def normal(rows: int) -> Tensor:
            # one generator a point, and on the CPU, so that draws depend neither on chunks nor on the device
            draws = [torch.randn(rows, count, generator=g, dtype=torch.float64) for g in generators]
            return torch.stack(draws).to(self.mean)

        drawn: dict[str, Tensor] = {}
        for term in terms:
            part, field = self._part(term), self.mean.new_zeros(*self.mean.shape, count)
            if part.walk is not None:
                walk = part.walk
                field = field + draw(walk.plan, walk.gain, walk.noise, normal(walk.plan.n_nodes))
            if part.spectrum is not None:
                slot = self._slots[term.name]
                (layout, phi), root = self._columns.of(term.name), self.prior.factor[..., slot, slot]
                field = field + layout.times(phi, root @ normal(slot.stop - slot.start))
            if part.own is not None:
                field = field + part.own.sqrt()[..., None] * normal(self.engine.n)
            drawn[term.name] = field
        u = torch.as_tensor(sum(drawn.values(), start=self.mean.new_zeros(())))
        correction = self.weights[..., None] - self._residual_of(u, normal(self.engine.n))
        return {term.name: drawn[term.name] + self.component_times(term, correction) for term in terms}

    def ancestors(self, term: Term) -> tuple[Tensor, Tensor]:
        return elsewhere.structured_ancestors(self, term)

    def elsewhere(
        self, term: Term, coordinates: np.ndarray, specimen: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        return elsewhere.structured_elsewhere(self, term, coordinates, specimen)
