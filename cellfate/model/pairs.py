r"""Fates without an order by the differences of any two of them: sites that hold a whole block of a cell.

The negative Hessian of a softmax is a sum over pairs of fates, :math:`\mathrm{diag}(p) - pp' = \sum_{k<l} p_k p_l (e_k - e_l)(e_k - e_l)'`, with
no negative weight. A site for each normalized difference :math:`w_{kl} = (\eta_l - \eta_k)/\sqrt 2` is therefore as good as a K x K block
of sites: the posterior is the variational one without further approximation. Differences are stacked as copies of the cells, of which the
first is the first contrast. A difference has the variance of a contrast, and the mean square of all of them is that of the contrasts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from cellfate.model.categorical import Categorical, Nodes, apart, contrasts, stacked
from cellfate.model.families import Expectation, Outcome, Remainder

# as for contrasts, and more of them: steps are judged by the bound, which has to be the one that they raise
NODES = ((0.5, {1: 28, 2: 12, 3: 8}), (3.0, {1: 40, 2: 18, 3: 12}), (math.inf, {1: 200, 2: 28, 3: 14}))


@lru_cache
def pairs(levels: int) -> tuple[np.ndarray, np.ndarray]:
    """First and second fate (R,) of each pair."""
    second, first = np.tril_indices(levels, -1)
    return first, second


@lru_cache
def differences(levels: int) -> np.ndarray:
    """Normalized differences (R, K) of fates, the second of a pair less the first."""
    first, second = pairs(levels)
    eye = np.eye(levels)
    return (eye[second] - eye[first]) / math.sqrt(2)


@lru_cache
def loadings(levels: int) -> np.ndarray:
    """The same (R, J) of contrasts: L'L = K/2 times the identity."""
    return differences(levels) @ contrasts(levels)


@lru_cache
def variances_of_fates(levels: int) -> np.ndarray:
    """From variances of normalized differences to those of fates that sum to zero, (R, K): double centering."""
    first, second = pairs(levels)
    centre = np.eye(levels) - 1 / levels
    return -2 * centre[first] * centre[second]


@dataclass(frozen=True)
class Paired(Remainder):
    """What a quadratic does not hold of a cell whose fields are differences of fates.

    third: derivative of the expected slopes in the variances (..., n, R, R); fourth: that of minus the precisions; bend: the latter's
    derivative in the means.
    """

    bend: Tensor

    def pull(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        several = self.third.shape[-1]
        a, b = apart(mean, several), apart(variance, several)
        x = torch.einsum("...rs,...r->...s", self.bend, b)
        y = torch.einsum("...rs,...r->...s", self.third, a) + torch.einsum("...rs,...r->...s", self.fourth, b)
        return stacked(x), stacked(y)


class Pairs(Categorical):
    """:class:`Categorical` over differences of fates; outcome: `y` (R n,) are those of the one-hot fate, counts or probabilities."""

    _orders: ClassVar = NODES

    @staticmethod
    def outcome(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        levels = weights.shape[1]
        return (weights @ differences(levels).T).T.ravel(), np.tile(weights.sum(1), len(pairs(levels)[0]))

    def log_prob(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> Tensor:
        y, t, h = self._data(outcome, eta)
        u = self._means(eta, h)
        return self._shared_out((y * u).sum(-1) - t * torch.logsumexp(u @ h.mT, -1), _several(h))

    def derivatives(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, t, h = self._data(outcome, eta)
        p = torch.softmax(self._means(eta, h) @ h.mT, -1)
        first, second = (torch.as_tensor(x, device=p.device) for x in pairs(len(h)))
        return stacked(_slope(y, t, h, p)), stacked(-2 * t[..., None] * p[..., first] * p[..., second])

    def integrals(
        self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None = None, higher: bool = True
    ) -> tuple[Expectation, Remainder]:
        def reduce(at: Nodes) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                m, v = at.mean.detach().requires_grad_(True), at.variance.detach().requires_grad_(True)
                live = PairNodes(at.y, at.t, m, v, at.h, at.per_axis)
                rest, slope, precision = live.log_rest(), live.slope, live.precision
                in_mean, in_variance = torch.autograd.grad(rest.sum(), (m, v), retain_graph=higher)
                third, fourth, bend = [], [], []
                for r in range(slope.shape[-1] if higher else 0):
                    third.append(torch.autograd.grad(slope[:, r].sum(), v, retain_graph=True)[0])
                    of_mean, of_variance = torch.autograd.grad(-precision[:, r].sum(), (m, v), retain_graph=True)
                    fourth.append(of_variance)
                    bend.append(of_mean)
            # a cotangent of contrasts as one of differences that acts on them alike
            back = torch.as_tensor(loadings(len(at.h))).to(m).mT * (2 / len(at.h))
            moments = tuple(x.detach() for x in (live.value, slope, precision, rest))
            moments = *moments, in_mean @ back, in_variance
            if not higher:
                return moments
            return *moments, torch.stack(third, -2), torch.stack(fourth, -2), torch.stack(bend, -2) @ back

        found = self._integrate_cells(reduce, outcome, mean, variance)
        value, slope, precision, rest, in_mean, in_variance, *more = found
        third, fourth, bend = more or [mean.new_zeros(())] * 3
        several = slope.shape[-1]
        e = Expectation(self._shared_out(value, several), stacked(slope), stacked(precision))
        slopes = stacked(in_mean), stacked(in_variance)
        return e, Paired(self._shared_out(rest, several), *slopes, third, fourth, bend)

    @staticmethod
    def _data(outcome: Outcome, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert outcome.levels is not None
        assert outcome.trials is not None
        h = torch.as_tensor(contrasts(outcome.levels)).to(like)
        return Pairs._means(outcome.y, h), apart(outcome.trials, _several(h))[..., 0], h

    @staticmethod
    def _means(x: Tensor, h: Tensor) -> Tensor:
        """Contrasts (..., n, J) from differences."""
        return apart(x, _several(h)) @ torch.as_tensor(loadings(len(h))).to(x) * (2 / len(h))

    @staticmethod
    def _variances(x: Tensor, h: Tensor) -> Tensor:
        return apart(x, _several(h))

    @staticmethod
    def _nodes(y: Tensor, t: Tensor, mean: Tensor, variance: Tensor, h: Tensor, per_axis: int) -> Nodes:
        return PairNodes(y, t, mean, variance, h, per_axis)


def _several(h: Tensor) -> int:
    """Pairs of fates."""
    return len(h) * (len(h) - 1) // 2


def _slope(y: Tensor, t: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """Derivatives (..., R) in the differences: y_l p_k - y_k p_l of a pair, which sum to y - t p over the pairs of a fate."""
    first, second = (torch.as_tensor(x, device=p.device) for x in pairs(len(h)))
    weights = y @ h.mT + t[..., None] / len(h)
    return math.sqrt(2) * (weights[..., second] * p[..., first] - weights[..., first] * p[..., second])


class PairNodes(Nodes):
    """What is known at the nodes of some cells under N(mean, V): mean (c, J), and V by the variances (c, R) of all differences."""

    def _away(self, h: Tensor) -> Tensor:
        self.covariance = covariance_of(self.variance, self.h)
        self.factor = lower_factor(self.covariance)
        return h @ self.factor @ self.z.mT

    @property
    def factor_of_covariance(self) -> Tensor:
        return self.factor

    @property
    def slope(self) -> Tensor:
        return _slope(self.y, self.t, self.h, self.mean_p)

    @property
    def precision(self) -> Tensor:
        first, second = (torch.as_tensor(x, device=self.h.device) for x in pairs(len(self.h)))
        return 2 * self.t[:, None] * self.products[:, first, second]

    def log_rest(self) -> Tensor:
        """Log E exp r (c,), r what f is less its projection on all quadratics."""
        slope = self.mean_p @ self.h
        curvature = self.h.mT @ (torch.diag_embed(self.mean_p) - self.products) @ self.h
        # of the nodes' places, in standard normals: as many quadratic forms as nodes
        form = self.factor.mT @ curvature @ self.factor
        quadratic = ((form @ self.z.mT) * self.z.mT).sum(1) - (curvature * self.covariance).sum((-2, -1))[:, None]
        linear = (slope[:, None] @ self.factor)[:, 0] @ self.z.mT
        rest = self.lse - (self.lse @ self.w)[:, None] - linear - quadratic / 2
        return torch.logsumexp(torch.log(self.w) - self.t[:, None] * rest, -1)


def covariance_of(variance: Tensor, h: Tensor) -> Tensor:
    """Covariance (c, J, J) of the contrasts, by which differences have these variances."""
    first, second = (torch.as_tensor(x, device=h.device) for x in pairs(len(h)))
    squared = variance.new_zeros(*variance.shape[:-1], len(h), len(h))
    squared[..., first, second] = variance
    return -h.mT @ (squared + squared.mT) @ h


def lower_factor(covariance: Tensor) -> Tensor:
    """Lower factor (c, J, J); variances that no covariance has, as an extrapolation may give, are cut to one that is near."""
    tiny = 1e-14 + 1e-12 * covariance.detach().diagonal(dim1=-2, dim2=-1).mean(-1)
    raised = covariance + tiny[..., None, None] * torch.eye(covariance.shape[-1]).to(covariance)
    lower, info = torch.linalg.cholesky_ex(raised)
    bad = (info != 0) & raised.detach().isfinite().all(-1).all(-1)
    if bool(bad.any()):
        values, vectors = torch.linalg.eigh(raised.detach()[bad])
        floor = tiny[bad][..., None] + 1e-6 * values.abs().amax(-1, keepdim=True)
        near = (
            vectors * torch.maximum(values, floor)[..., None, :]
        ) @ vectors.mT  # no derivative: such a point is a start only
        lower = lower.clone()
        lower[bad] = torch.linalg.cholesky(near)
    return lower
