r"""Fates without an order: K of them, by softmax of K latent values that sum to zero.

The values of a cell are :math:`\eta = H u` with K - 1 orthonormal contrasts u, each a field of its own with the same variances, so
that no fate is a reference. Contrasts are stacked as copies of the cells: arrays over them are (..., (K - 1) n), contrast by
contrast. The posterior is a product over the contrasts of a cell; what that leaves out of each cell, the couplings among its
contrasts with it, is in the correction, an expectation over all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np
import torch
from scipy.stats import norm, qmc
from torch import Tensor

from cellfate.model.cumulative import cumulative
from cellfate.model.families import Expectation, Family, Outcome, Remainder, quadrature

# posterior variance up to which so many nodes an axis are enough, of a product of Gauss-Hermite rules for so many contrasts
NODES = ((0.5, {1: 28, 2: 10, 3: 7}), (3.0, {1: 40, 2: 14, 3: 9}), (math.inf, {1: 200, 2: 24, 3: 12}))
POINTS = 256  # with more contrasts, quasi-random points, and as many mirrored
PROBES = 32  # of a trace over the couplings among contrasts of different cells
ROUNDING = 1e-4  # of a whole number, what contrasts in single precision may lose
NEWTON = 30  # steps to the mode of a cell alone
NUMBERS = 2**18  # made at once: what is known at the nodes stays in the cache


@lru_cache
def contrasts(levels: int) -> np.ndarray:
    """Orthonormal contrasts (K, K - 1) of K fates: each against those before it (Helmert's)."""
    h = np.zeros((levels, levels - 1))
    for j in range(levels - 1):
        h[: j + 1, j], h[j + 1, j] = -1, j + 1
    return h / np.linalg.norm(h, axis=0)


@lru_cache
def _rule(axes: int, per_axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (q, axes) and weights (q,) for a standard normal; of first and second moments exact."""
    if per_axis:
        x, w = (t.numpy() for t in quadrature(torch.zeros((), dtype=torch.float64), per_axis))
        grid = np.stack(np.meshgrid(*([x] * axes), indexing="ij"), -1).reshape(-1, axes)
        weight = np.prod(np.stack(np.meshgrid(*([w] * axes), indexing="ij"), -1).reshape(-1, axes), -1)
        return grid, weight
    z = norm.ppf(qmc.Sobol(axes, seed=0).random(POINTS))
    z = np.concatenate([z, -z])
    z = z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / len(z))).T
    return z, np.full(len(z), 1 / len(z))


@dataclass(frozen=True)
class Coupled(Remainder):
    """The same where a cell has several contrasts; third and fourth are (..., n, J, J) of f_iij and f_iijj, cross of f_ij."""

    cross: Tensor  # (..., n, J, J), zero on the diagonal

    def pull(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        axes = self.cross.shape[-1]
        a, b = apart(mean, axes), apart(variance, axes)
        x = torch.einsum("...ij,...i->...j", self.cross, a) + torch.einsum("...ij,...i->...j", self.third, b)
        y = torch.einsum("...ji,...i->...j", self.third, a) + torch.einsum("...ij,...i->...j", self.fourth, b)
        return stacked(x), stacked(y / 2)

    def between(self, variance: Tensor, smooth: Callable[[Tensor], Tensor]) -> Tensor:
        """Sites of single contrasts leave out a quadratic form C of each cell, f_ij off the diagonal. Of its expectation
        |I - Sigma C|^-1/2 to second order, tr(Sigma C Sigma C) / 4, the correction holds what is within a cell, and this the rest
        (`benchmarks/site_blocks.py`: what is still missing). The trace is estimated by :data:`PROBES` vectors of random signs, the same
        ones at all hyperparameters, so that its error moves no maximum.
        """
        axes = self.cross.shape[-1]
        if axes == 1:
            return variance.new_zeros(variance.shape[:-1])
        signs = torch.randint(2, (variance.shape[-1], PROBES), generator=torch.Generator().manual_seed(0))
        z = (2.0 * signs - 1.0).to(variance).expand(*variance.shape, -1)
        sides, drawn = smooth(z).unflatten(-2, (axes, -1)), z.unflatten(-2, (axes, -1))
        couplings = self.cross.movedim(-3, -1)[..., None]  # (..., J, J, n, 1)
        total = variance.new_zeros(variance.shape[:-1])
        for j in range(axes):
            along = couplings[..., j, :, :] * sides[..., [j], :, :]
            back = smooth(along.flatten(-3, -2)).unflatten(-2, (axes, -1))
            total = total + (drawn[..., [j], :, :] * couplings[..., j, :, :] * back).sum((-3, -2)).mean(-1)
        own = apart(variance, axes)
        within = (self.cross.square() * own[..., :, None] * own[..., None, :]).sum((-3, -2, -1))
        return (total - within) / 4


def apart(x: Tensor, axes: int) -> Tensor:  # (..., J n) -> (..., n, J)
    """Contrasts of a cell beside each other."""
    return x.unflatten(-1, (axes, -1)).mT


def stacked(x: Tensor) -> Tensor:  # (..., n, J) -> (..., J n)
    """Contrast by contrast, as engines take them."""
    return x.mT.flatten(-2)


def _weights(y: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """From contrasts (n, J) and totals (n,) back to what was observed of each fate (n, K); whole numbers come back whole."""
    found = y @ h.mT + t[:, None] / len(h)
    return torch.where((found - found.round()).abs() < ROUNDING, found.round(), found)


class Categorical(Family):
    """One of K fates, counts of them (multinomial), or their probabilities (soft labels).

    Outcome: `y` ((K - 1) n,) are H' of the one-hot fate, counts or probabilities of each cell, `trials` their sum, `levels` K. A
    log-density is shared out evenly over the contrasts of a cell; multinomial coefficients are left out of it.
    """

    name, links, kind, dear, flat = "categorical", ("softmax",), "fates", True, 0.1
    _orders: ClassVar = NODES

    @staticmethod
    def outcome(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`y` and `trials` from weights (n, K)."""
        levels = weights.shape[1]
        return (weights @ contrasts(levels)).T.ravel(), np.tile(weights.sum(1), levels - 1)

    def log_prob(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> Tensor:
        y, t, h = self._data(outcome, eta)
        u = apart(eta, h.shape[1])
        value = (y * u).sum(-1) - t * torch.logsumexp(u @ h.mT, -1)
        return self._shared_out(value, h.shape[1])

    def derivatives(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, t, h = self._data(outcome, eta)
        p = torch.softmax(apart(eta, h.shape[1]) @ h.mT, -1)
        expected = p @ h
        return stacked(y - t[..., None] * expected), stacked(-t[..., None] * (p @ h.square() - expected.square()))

    def start(self, outcome: Outcome) -> Tensor:
        assert outcome.trials is not None
        return outcome.y / outcome.trials

    def inverse_link(self, eta: Tensor) -> Tensor:
        """Probabilities (..., n, K)."""
        raise NotImplementedError("probabilities of fates come from `torch.softmax` of the K latent values of a cell.")

    def simulate(self, eta, *, rng, trials=None, variance_residual=None, **own):  # type: ignore[no-untyped-def]
        """Fates (n,) for latent values eta (n, K)."""
        return np.argmax(np.asarray(eta) + rng.gumbel(size=np.shape(eta)), axis=-1).astype(float)

    def distribution_variance(self, eta: Tensor, total: Tensor, phi: Tensor | None = None) -> Tensor:
        """Of a contrast of Gumbel variables, whose largest sum with the latent values is the fate."""
        return torch.full_like(total, math.pi**2 / 6)

    def expect(self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None = None) -> Expectation:
        def moments(at: Nodes) -> tuple[Tensor, ...]:
            return at.value, at.slope, at.precision

        value, slope, precision = self._integrate_cells(moments, outcome, mean, variance)
        return Expectation(self._shared_out(value, slope.shape[-1]), stacked(slope), stacked(precision))

    def correction(self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None = None) -> Tensor:
        (value,) = self._integrate_cells(lambda at: (at.log_rest(),), outcome, mean, variance)
        return self._shared_out(value, mean.shape[-1] // value.shape[-1])

    def integrals(
        self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None = None, higher: bool = True
    ) -> tuple[Expectation, Remainder]:
        def reduce(at: Nodes) -> tuple[Tensor, ...]:
            moments = at.value, at.slope, at.precision, *at.log_rest_and_slopes(), at.cross()
            return *moments, *(at.higher() if higher else ())

        found = self._integrate_cells(reduce, outcome, mean, variance)
        value, slope, precision, rest, in_mean, in_variance, cross, *more = found
        third, fourth = more or [mean.new_zeros(())] * 2
        axes = slope.shape[-1]
        e = Expectation(self._shared_out(value, axes), stacked(slope), stacked(precision))
        return e, Coupled(self._shared_out(rest, axes), stacked(in_mean), stacked(in_variance), third, fourth, cross)

    @classmethod
    def weights(cls, outcome: Outcome) -> Tensor:
        """One-hot fates, counts or probabilities (n, K): what :meth:`outcome` was made of."""
        return _weights(*cls._data(outcome, outcome.y))

    def predictive(self, outcome: Outcome, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What cells are expected to become whose latent values are N(mean, variance).

        Log-probability (n,) of what was observed; the probability (n, K) of each fate, in one trial; and of how often it was observed
        P(Y < y) and P(Y <= y) (n, K), each fate against the rest.
        """

        def of_one(at: Nodes) -> tuple[Tensor, ...]:
            seen, p = _weights(at.y, at.t, at.h), at.mean_p
            return (
                torch.log((seen * p).sum(-1)),
                p,
                torch.where(seen > 0, 1 - p, 0.0),
                torch.where(seen > 0, 1.0, 1 - p),
            )

        def of_many(at: Nodes) -> tuple[Tensor, ...]:
            seen, p = _weights(at.y, at.t, at.h), at.p.cpu().numpy()
            below, upto = cumulative(
                "binomial", p, seen[..., None].cpu().numpy(), at.t[:, None, None].cpu().numpy(), {}
            )
            of_counts = (torch.as_tensor(x).to(at.w) @ at.w for x in (below, upto))
            ways = torch.lgamma(at.t + 1) - torch.lgamma(seen + 1).sum(-1)
            return at.log_density() + ways, at.mean_p, *of_counts

        assert outcome.trials is not None
        one = bool((outcome.trials <= 1).all())
        # distribution functions of counts are steps, which quadrature of high order goes wrong about
        orders = None if one else ((math.inf, dict[int, int]()),)
        log_p, p, below, upto = self._integrate_cells(of_one if one else of_many, outcome, mean, variance, orders)
        return log_p, p, below, upto

    @staticmethod
    def _data(outcome: Outcome, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Data (n, J) and their sum (n,) of each cell, and the contrasts (K, J)."""
        assert outcome.levels is not None
        assert outcome.trials is not None
        axes = outcome.levels - 1
        h = torch.as_tensor(contrasts(outcome.levels)).to(like)
        return apart(outcome.y, axes), apart(outcome.trials, axes)[..., 0], h

    @staticmethod
    def _means(x: Tensor, h: Tensor) -> Tensor:
        """Contrasts (..., n, J) of cells."""
        return apart(x, h.shape[1])

    @staticmethod
    def _variances(x: Tensor, h: Tensor) -> Tensor:
        """Variances (..., n, number) that the nodes of a cell go by."""
        return apart(x, h.shape[1])

    @staticmethod
    def _nodes(y: Tensor, t: Tensor, mean: Tensor, variance: Tensor, h: Tensor, per_axis: int) -> Nodes:
        return Nodes(y, t, mean, variance, h, per_axis)

    @staticmethod
    def _shared_out(value: Tensor, axes: int) -> Tensor:  # (..., n) -> (..., J n)
        return (value / axes)[..., None, :].expand(*value.shape[:-1], axes, -1).flatten(-2)

    def _integrate_cells(
        self,
        reduce: Callable[[Nodes], tuple[Tensor, ...]],
        outcome: Outcome,
        mean: Tensor,
        variance: Tensor,
        orders: tuple[tuple[float, dict[int, int]], ...] | None = None,
    ) -> tuple[Tensor, ...]:
        """What `reduce` makes of the nodes of some cells, for all of them: (..., n, what it gives of a cell)."""
        y, t, h = self._data(outcome, mean)
        axes = h.shape[1]
        m, v = self._means(mean, h), self._variances(variance.expand_as(mean), h)
        shape = m.shape[:-1]
        flat = [
            x.expand(*shape, *x.shape[x.ndim - k :]).reshape(-1, *x.shape[x.ndim - k :])
            for x, k in ((y, 1), (t, 0), (m, 1), (v, 1))
        ]
        orders = self._orders if orders is None else orders
        order = torch.bucketize(flat[3].detach().amax(-1), m.new_tensor([upper for upper, _ in orders]))
        cells, parts = [], []
        for which, (_, nodes) in enumerate(orders):
            per_axis = nodes.get(axes, 0)
            size = max(1, NUMBERS // (len(_rule(axes, per_axis)[1]) * len(h)))
            last = which == len(orders) - 1  # what is not a number is there too
            for i in torch.nonzero((order == which) | (last & (order > which)))[:, 0].split(size):
                of_y, of_t, of_m, of_v = (x[i] for x in flat)
                parts.append(reduce(self._nodes(of_y, of_t, of_m, of_v, h, per_axis)))
                cells.append(i)
        back = torch.argsort(torch.cat(cells))
        return tuple(torch.cat(of)[back].reshape(*shape, *of[0].shape[1:]) for of in zip(*parts, strict=True))


class Nodes:
    """What is known at the nodes of some cells under N(mean, variance), each (c, J)."""

    def __init__(self, y: Tensor, t: Tensor, mean: Tensor, variance: Tensor, h: Tensor, per_axis: int) -> None:
        self.y, self.t, self.mean, self.variance, self.h, self.per_axis = y, t, mean, variance, h, per_axis
        z, w = _rule(h.shape[1], per_axis)
        self.z, self.w = torch.as_tensor(z).to(h), torch.as_tensor(w).to(h)
        logits = (mean @ h.mT)[..., None] + self._away(h)  # (c, K, q): the many nodes last
        highest = logits.detach().amax(1)
        odds = torch.exp(logits - highest[:, None])  # once, and both from it
        total = odds.sum(1)
        self.lse, self.p = highest + torch.log(total), odds / total[:, None]

    def _away(self, h: Tensor) -> Tensor:
        """Of combinations h (k, J) of the contrasts how far (c, k, q) the nodes are from the mean."""
        self.sd = self.variance.clamp(min=1e-14).sqrt()
        return (h * self.sd[:, None]) @ self.z.mT

    @cached_property
    def mean_p(self) -> Tensor:
        return self.p @ self.w

    @cached_property
    def expected(self) -> Tensor:
        """Contrasts (c, J, q) that are expected at the nodes."""
        return self.h.mT @ self.p

    @property
    def value(self) -> Tensor:
        return (self.y * self.mean).sum(-1) - self.t * (self.lse @ self.w)

    @property
    def slope(self) -> Tensor:
        return self.y - self.t[:, None] * (self.mean_p @ self.h)

    @property
    def precision(self) -> Tensor:
        """Minus the second derivative, on average: by Stein's identity from the first, so that it is what quadrature makes of the slope
        of the bound in the variance, and sites at which they agree are where that bound, too, is highest.
        """
        return self.t[:, None] * self.away_slope / self.sd

    @cached_property
    def away_slope(self) -> Tensor:
        """Expected product (c, J) of the place of a node, in sds, and the slope of the normalizer there."""
        return (self.p @ (self.w[:, None] * self.z) * self.h).sum(1)

    @cached_property
    def products(self) -> Tensor:
        """E p_k p_l (c, K, K)."""
        return (self.p * self.w) @ self.p.mT

    @property
    def factor_of_covariance(self) -> Tensor:  # (c, J, J)
        return torch.diag_embed(self.sd)

    def log_density(self) -> Tensor:
        """Log E exp f (c,), without multinomial coefficients: by nodes about the mode of f and the density of the cell together, because many
        trials know more than any node near the mean.
        """
        factor, x = self.factor_of_covariance, torch.zeros_like(self.mean)
        seen, slopes = self.y @ self.h.mT + self.t[:, None] / len(self.h), self.h @ factor  # (c, K, J), of x ~ N(0, 1)
        precision = eye = torch.eye(x.shape[-1]).to(x)
        for _ in range(NEWTON):  # of a concave function, with steps held short where a curve is far from its parabola
            p = torch.softmax(self.mean @ self.h.mT + (slopes @ x[..., None])[..., 0], -1)
            curved = slopes.mT @ (torch.diag_embed(p) - p[..., None] * p[:, None]) @ slopes
            precision = eye + self.t[:, None, None] * curved
            pull = ((seen - self.t[:, None] * p)[:, None] @ slopes)[:, 0] - x
            step = torch.linalg.solve(precision, pull[..., None])[..., 0]
            x = x + step / step.norm(dim=-1, keepdim=True).clamp(min=1)
        root = torch.linalg.inv(torch.linalg.cholesky(precision)).mT
        at = x[..., None] + root @ self.z.mT  # (c, J, q)
        log_p = torch.log_softmax((self.mean @ self.h.mT)[..., None] + slopes @ at, 1)
        ratio = (self.z.square().sum(-1) - at.square().sum(1)) / 2 + torch.logdet(root)[:, None]
        return torch.logsumexp(torch.log(self.w) + (seen[..., None] * log_p).sum(1) + ratio, -1)

    def log_rest(self) -> Tensor:
        """Log E exp r (c,), r what f is less its projection on quadratics without products."""
        return torch.logsumexp(self._log_tilted(), -1)

    def _log_tilted(self) -> Tensor:
        # what is linear in the contrasts is in the projection: r is that of the normalizer alone
        slope = (self.mean_p @ self.h) * self.sd
        bend = -self.away_slope * self.sd / 2
        rest = self.lse - (self.lse @ self.w)[:, None] - slope @ self.z.mT + bend @ (self.z.square() - 1).mT
        return torch.log(self.w) - self.t[:, None] * rest

    def log_rest_and_slopes(self) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`log_rest` with its derivatives (c, J) in the means and variances."""
        log_tilted = self._log_tilted()
        rest = torch.logsumexp(log_tilted, -1)
        tilted = torch.exp(log_tilted - rest[:, None])
        first, second = tilted @ self.z, tilted @ (self.z.square() - 1)
        # of the slope at a node the tilted expectation less the one that the projection takes; the latter itself moves by the covariance
        # of contrasts at the nodes, along `pulled`
        pulled = (self.h * (self.sd * second / 2)[:, None]) @ self.z.mT + (first * self.sd @ self.h.mT)[..., None]
        covered = self.p * pulled
        covered = covered - self.p * covered.sum(1, keepdim=True)
        per_node = (tilted - self.w)[:, None] * self.p - self.w * covered
        in_mean = per_node.sum(-1) @ self.h
        in_sd = (per_node @ self.z * self.h).sum(1) - first * (self.mean_p @ self.h) - second * self.away_slope / 2
        t = self.t[:, None]
        return rest, -t * in_mean, -t * in_sd / (2 * self.sd)

    def cross(self) -> Tensor:
        """E f_ij (c, J, J) off the diagonal."""
        found = -self.t[:, None, None] * (self.h.mT @ (torch.diag_embed(self.mean_p) - self.products) @ self.h)
        return found - torch.diag_embed(found.diagonal(dim1=-2, dim2=-1))

    def higher(self) -> tuple[Tensor, Tensor]:
        """E f_iij and E f_iijj (c, J, J), which are joint cumulants of the contrasts of a fate drawn from p.

        In closed form at the nodes: by Stein's identity their noise grows with the number of contrasts.
        """
        h, w, mu, t = self.h, self.w, self.expected, self.t[:, None, None]
        axes, square = h.shape[1], h.square()
        both = h[:, :, None] * h[:, None, :]  # (K, J, J)
        spread = square.mT @ self.p  # second moments, (c, J, q)
        with_p, with_square = (mu * w) @ self.p.mT, mu.square() * w  # E mu_i p_k (c, J, K)

        third = torch.tensordot(self.mean_p, square[:, :, None] * h[:, None], dims=1)
        third = third - (spread * w) @ mu.mT + 2 * with_square @ mu.mT
        third = third - 2 * torch.einsum("cik,kij->cij", with_p, both)

        variance = spread - mu.square()
        one = torch.einsum("cik,kij->cij", with_p, h[:, :, None] * square[:, None])  # mu_i times h_i h_j^2
        two = with_square @ spread.mT  # mu_i^2 h_j^2
        fourth = torch.tensordot(self.mean_p, square[:, :, None] * square[:, None], dims=1)
        fourth = fourth - 2 * (one + one.mT) + two + two.mT + with_square @ mu.square().mT
        fourth = fourth - (variance * w) @ variance.mT
        # of a covariance c_ij at a node 4 mu_i mu_j c_ij - 2 c_ij^2: as large as the nodes times all pairs, so once a pair and in place
        i, j = torch.tril_indices(axes, axes, device=h.device)
        across = mu[:, i] * mu[:, j]
        covariance = ((h[:, i] * h[:, j]).mT @ self.p).sub_(across)
        pairs = (across.mul_(2).sub_(covariance).mul_(covariance) @ w).mul_(2)
        shares = torch.zeros_like(fourth)
        shares[:, i, j] = pairs
        shares[:, j, i] = pairs
        fourth = fourth + shares
        return -t * third, -t * fourth
