"""Families: the distribution of a fate given the latent value of its cell.

A new family is one class: its log-density, two derivatives, a start, a simulator. Gaussian expectations come by quadrature
unless the class knows them in closed form.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cellfate.errors import DataError
from cellfate.model.links import BINARY_LINKS, BinaryLink, SymmetricLink

QUADRATURE_NODES = 40
# posterior variance up to which a number of nodes is enough: a logistic step is the narrower between them the wider they spread
NODES = ((0.1, 20), (0.5, 28), (9.0, QUADRATURE_NODES), (math.inf, 200))
CHUNK = 2**13  # cells at once, so that what is known at their nodes stays in the cache
SMALLEST_DIVISOR = 1e-4  # of a standard deviation
SMALLEST_VARIANCE = 1e-14  # below this a Gaussian is a point; keeps the derivative of sqrt(variance) finite


@dataclass(frozen=True)
class Outcome:
    """What was observed: `y` (n,), for a binomial fate the number of trials (n,), for an ordinal one how many levels there are."""

    y: Tensor
    trials: Tensor | None = None
    levels: int | None = None

    def at(self, index: Tensor) -> Outcome:
        """The same for some of the cells."""
        return Outcome(self.y[index], None if self.trials is None else self.trials[index], self.levels)

    @property
    def beside_nodes(self) -> Outcome:
        """The same with an axis for the nodes of a quadrature."""
        return Outcome(self.y[..., None], None if self.trials is None else self.trials[..., None], self.levels)


@dataclass(frozen=True)
class Own:
    """A positive hyperparameter of a family: its log-normal prior (median, sd in e-folds), start and bounds."""

    name: str
    median: float
    sd: float
    start: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Expectation:
    """Expectations of `f = log p(y | eta)` under `eta ~ N(mean, variance)`, cell by cell, each (..., n)."""

    value: Tensor  # E f
    slope: Tensor  # E f'
    precision: Tensor  # -E f''


@dataclass(frozen=True)
class Remainder:
    """What of `f = log p(y | eta)` a quadratic does not hold, cell by cell, each (..., n)."""

    correction: Tensor  # see `Family.correction`
    slope_mean: Tensor  # its derivative in the mean
    slope_variance: Tensor  # and in the variance
    third: Tensor  # expectation of the third derivative of f
    fourth: Tensor  # and of the fourth

    def pull(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangents of the expected slope, less the site itself, and of minus the precision, back to mean and variance."""
        return self.third * variance, 0.5 * (self.third * mean + self.fourth * variance)

    def between(self, variance: Tensor, smooth: Callable[[Tensor], Tensor]) -> Tensor:
        """What of the log evidence (...,) is between cells, which no expectation of single cells holds; nothing, where sites are whole.

        variance: (..., n) of the posterior, with covariance Sigma; smooth: Sigma x for columns x (..., n, k).
        """
        return variance.new_zeros(variance.shape[:-1])


@lru_cache
def _hermite(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return x, w / math.sqrt(2 * math.pi)


def quadrature(like: Tensor, nodes: int = QUADRATURE_NODES) -> tuple[Tensor, Tensor]:
    """Nodes and weights (nodes,) of the standard normal in the dtype and on the device of `like`."""
    x, w = _hermite(nodes)
    return torch.as_tensor(x, dtype=like.dtype, device=like.device), torch.as_tensor(
        w, dtype=like.dtype, device=like.device
    )


class Family(ABC):
    """Distribution of a response given `eta` (..., n).

    `phi` is the family's own hyperparameter where it has one, of shape (..., 1) so that it goes with `eta`; where there may be
    `several`, (..., 1, q).
    """

    name: ClassVar[str]
    links: ClassVar[tuple[str, ...]]
    parameter: ClassVar[str | None] = None  # the natural name of `phi`
    several: ClassVar[bool] = False  # whether `phi` has an axis of its own
    kind: ClassVar[str]  # what a response has to be: real, binary, successes, count, levels, proportion, fates
    quadratic: ClassVar[bool] = False  # whether the log-density is, so that a Gaussian absorbs it all
    # posterior sds: a step so short is taken whatever the bound, which quadrature knows no better, says of it
    flat: ClassVar[float] = 1e-6
    dear: ClassVar[bool] = False  # whether what `integrals` adds to `expect` costs several times that

    def __init__(self, link: str | None = None) -> None:
        link = self.links[0] if link is None else link
        if link not in self.links:
            raise DataError(f"family {self.name!r} has no link {link!r}; choose from {', '.join(self.links)}.")
        self.link = link

    def own(self, outcome: Outcome) -> tuple[Own, ...]:
        """Hyperparameters of its own, for data such as these; the residual variance of a gaussian is a component, and is not here."""
        return ()

    @abstractmethod
    def log_prob(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> Tensor: ...

    @abstractmethod
    def derivatives(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """First and second derivative of :meth:`log_prob` in `eta`."""

    @abstractmethod
    def start(self, outcome: Outcome) -> Tensor:
        """A rough `eta` (n,) for each cell on its own, where iterations begin."""

    @abstractmethod
    def inverse_link(self, eta: Tensor) -> Tensor: ...

    @abstractmethod
    def simulate(
        self,
        eta: np.ndarray,
        *,
        rng: np.random.Generator,
        trials: np.ndarray | float | None = None,
        variance_residual: float | None = None,
        **own: Any,
    ) -> np.ndarray:
        """Draw one response per cell given `eta` (n,); `own` are hyperparameters of the family by name."""

    @abstractmethod
    def distribution_variance(self, eta: Tensor, total: Tensor, phi: Tensor | None = None) -> Tensor:
        """Variance that the distribution itself adds on the link scale.

        `eta` (..., n) is the fixed part of the linear predictor, `total` (..., 1) the variance of the random components;
        the answer is (..., 1).
        After Nakagawa, Johnson & Schielzeth (2017), with the trigamma form for log links.
        """

    def noise(self, mean: Tensor, phi: Tensor | None = None) -> Tensor | None:
        """Variance of a response given its `mean`, of one trial; None where responses have no scale of their own."""
        return None

    def expect(self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None = None) -> Expectation:
        """Expectations under `N(mean, variance)`, by Gauss-Hermite quadrature."""

        def moments(x: Tensor, w: Tensor, sd: Tensor, f: Tensor, d1: Tensor, d2: Tensor) -> tuple[Tensor, ...]:
            return (f * w).sum(-1), (d1 * w).sum(-1), -(d2 * w).sum(-1)

        return Expectation(*self._integrate(moments, outcome, mean, variance, phi))

    def correction(self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None = None) -> Tensor:
        r"""What a Gaussian could not absorb of each cell, (..., n): :math:`\log E_q[e^r]`.

        `r` is `f` less its projection on quadratics, by Stein's identity :math:`r = f - E f - sd\,E f'\,z - v\,E f''(z^2-1)/2`.
        Its leading term is half the variance of `r`; the whole expression is exact for cells that are independent, and stays
        bounded where that term alone explodes (counts under a wide prior).
        """

        def log_mean_exp(x: Tensor, w: Tensor, sd: Tensor, f: Tensor, d1: Tensor, d2: Tensor) -> tuple[Tensor]:
            value, slope, curvature = ((g * w).sum(-1, keepdim=True) for g in (f, d1, d2))
            r = f - value - sd * slope * x - 0.5 * sd.square() * curvature * (x.square() - 1)
            return (torch.logsumexp(torch.log(w) + r, -1),)

        return self._integrate(log_mean_exp, outcome, mean, variance, phi)[0]

    def integrals(
        self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None = None, higher: bool = True
    ) -> tuple[Expectation, Remainder]:
        """:meth:`expect`, and :meth:`correction` with its derivatives and the higher derivatives of the expectation of `f`.

        Those follow from the second by Stein's identity, E f(3) = E[f(2) z] / sd and E f(4) = E[f(2) (z^2 - 1)] / v. In one pass,
        because what `f` is at the nodes is most of the work. Without `higher`, those of third and fourth order may be missing: only the
        gradient of a free energy asks for them.
        """

        def reduce(x: Tensor, w: Tensor, sd: Tensor, f: Tensor, d1: Tensor, d2: Tensor) -> tuple[Tensor, ...]:
            bend = x.square() - 1
            shapes = torch.stack([x, bend], -1)
            sd, divisor = sd[..., 0], sd[..., 0].clamp(min=SMALLEST_DIVISOR)
            v = sd.square()
            f0, f1, f2 = f @ w, d1 @ w, d2 @ w
            f3, f4 = ((d2 * w) @ shapes).unbind(-1)
            f3, f4 = f3 / divisor, f4 / divisor.square()
            r = f - f0[..., None] - (sd * f1)[..., None] * x - (0.5 * v * f2)[..., None] * bend
            correction = torch.logsumexp(torch.log(w) + r, -1)
            p = torch.exp(torch.log(w) + r - correction[..., None])
            first, second = (p @ shapes).unbind(-1)
            tilted = p * d1
            in_mean = tilted.sum(-1) - f1 - sd * f2 * first - 0.5 * v * f3 * second
            in_variance = 0.5 * (tilted @ x - f1 * first) / divisor - 0.5 * f2 * (1 + second)
            in_variance = in_variance - 0.5 * sd * f3 * first - 0.25 * v * f4 * second
            return f0, f1, -f2, correction, in_mean, in_variance, f3, f4

        found = self._integrate(reduce, outcome, mean, variance, phi)
        return Expectation(*found[:3]), Remainder(*found[3:])

    def _integrate(
        self,
        reduce: Callable[..., tuple[Tensor, ...]],
        outcome: Outcome,
        mean: Tensor,
        variance: Tensor,
        phi: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """`reduce` over quadrature nodes of each cell, with more nodes for the cells whose posterior is wide."""

        def flat(x: Tensor) -> Tensor:
            return x.expand_as(mean).reshape(-1)

        y, m, v = flat(outcome.y), mean.reshape(-1), flat(variance)
        trials = None if outcome.trials is None else flat(outcome.trials)
        own = None if phi is None else flat(phi) if not self.several else phi.expand(*mean.shape, -1).flatten(0, -2)
        order = torch.bucketize(v.detach(), torch.tensor([upper for upper, _ in NODES], dtype=v.dtype, device=v.device))
        cells, parts = [], []
        for which, (_, nodes) in enumerate(NODES):
            last = which == len(NODES) - 1  # what is not a number is there too
            for i in torch.nonzero((order == which) | (last & (order > which)))[:, 0].split(CHUNK):
                seen = Outcome(y[i], None if trials is None else trials[i], outcome.levels)
                parts.append(reduce(*self._at_nodes(seen, m[i], v[i], None if own is None else own[i], nodes)))
                cells.append(i)
        back = torch.argsort(torch.cat(cells))
        return tuple(torch.cat(of)[back].reshape(mean.shape) for of in zip(*parts, strict=True))

    def _at_nodes(
        self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None, nodes: int
    ) -> tuple[Tensor, ...]:
        """Nodes, weights, sd, and f, f', f'' at the nodes (..., n, nodes)."""
        x, w = quadrature(mean, nodes)
        sd = variance.clamp(min=SMALLEST_VARIANCE).sqrt()[..., None]
        apart, phi = outcome.beside_nodes, self.beside_nodes(phi)
        eta = mean[..., None] + sd * x
        return x, w, sd, self.log_prob(apart, eta, phi), *self.derivatives(apart, eta, phi)

    def beside_nodes(self, phi: Tensor | None) -> Tensor | None:
        """`phi` with an axis for the nodes of a quadrature."""
        return None if phi is None else phi[..., None, :] if self.several else phi[..., None]

    def at(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> Expectation:
        """The same quantities at a point, as Laplace's method takes them."""
        d1, d2 = self.derivatives(outcome, eta, phi)
        return Expectation(self.log_prob(outcome, eta, phi), d1, -d2)


class Gaussian(Family):
    """`y ~ N(eta, phi)`; `phi` is the residual variance."""

    name, links, kind, parameter, quadratic = "gaussian", ("identity",), "real", "variance_residual", True

    def log_prob(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> Tensor:
        assert phi is not None
        return -0.5 * (outcome.y - eta).square() / phi - 0.5 * torch.log(2 * math.pi * phi)

    def derivatives(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert phi is not None
        return (outcome.y - eta) / phi, (-1 / phi).expand_as(eta)

    def expect(self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None = None) -> Expectation:
        point = self.at(outcome, mean, phi)
        return Expectation(point.value - 0.5 * variance * point.precision, point.slope, point.precision)

    def correction(self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None = None) -> Tensor:
        return torch.zeros_like(mean)

    def integrals(
        self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None = None, higher: bool = True
    ) -> tuple[Expectation, Remainder]:
        return self.expect(outcome, mean, variance, phi), Remainder(*(torch.zeros_like(mean) for _ in range(5)))

    def start(self, outcome: Outcome) -> Tensor:
        return outcome.y

    def inverse_link(self, eta: Tensor) -> Tensor:
        return eta

    def simulate(self, eta, *, rng, trials=None, variance_residual=None, **own):  # type: ignore[no-untyped-def]
        return eta + math.sqrt(1.0 if variance_residual is None else variance_residual) * rng.standard_normal(eta.shape)

    def distribution_variance(self, eta: Tensor, total: Tensor, phi: Tensor | None = None) -> Tensor:
        return torch.zeros_like(total)  # the residual variance is a component of its own


class Binomial(Family):
    """`y` successes out of `trials`."""

    name, links, kind = "binomial", tuple(BINARY_LINKS), "successes"

    def __init__(self, link: str | None = None) -> None:
        super().__init__(link)
        self._link: BinaryLink = BINARY_LINKS[self.link]()

    def _trials(self, outcome: Outcome) -> Tensor:
        assert outcome.trials is not None
        return outcome.trials

    def log_prob(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> Tensor:
        y, n = outcome.y, self._trials(outcome)
        success, failure = self._link.log_probabilities(eta)
        ways = torch.lgamma(n + 1) - torch.lgamma(y + 1) - torch.lgamma(n - y + 1)
        return y * success + (n - y) * failure + ways

    def derivatives(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, n = outcome.y, self._trials(outcome)
        (s1, f1), (s2, f2) = self._link.first(eta), self._link.second(eta)
        return y * s1 + (n - y) * f1, y * s2 + (n - y) * f2

    def start(self, outcome: Outcome) -> Tensor:
        n = self._trials(outcome)
        return self._link.forward((outcome.y + 0.5) / (n + 1))

    def inverse_link(self, eta: Tensor) -> Tensor:
        return self._link.inverse(eta)

    def simulate(self, eta, *, rng, trials=None, variance_residual=None, **own):  # type: ignore[no-untyped-def]
        p = self._link.inverse(torch.as_tensor(np.asarray(eta, dtype=float))).numpy()
        return rng.binomial(np.asarray(1 if trials is None else trials, dtype=np.int64), p).astype(float)

    def noise(self, mean: Tensor, phi: Tensor | None = None) -> Tensor:
        return mean * (1 - mean)

    def distribution_variance(self, eta: Tensor, total: Tensor, phi: Tensor | None = None) -> Tensor:
        return torch.full_like(total, self._link.distribution_variance)


class Bernoulli(Binomial):
    """A fate that is there (1) or not (0)."""

    name, kind = "bernoulli", "binary"

    def _trials(self, outcome: Outcome) -> Tensor:
        return torch.ones_like(outcome.y)

    def log_prob(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> Tensor:
        if not isinstance(self._link, SymmetricLink):
            return super().log_prob(outcome, eta, phi)
        return self._link.log_success((2 * outcome.y - 1) * eta)

    def derivatives(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not isinstance(self._link, SymmetricLink):
            return super().derivatives(outcome, eta, phi)
        sign = 2 * outcome.y - 1
        first, second = self._link.derivatives(sign * eta)
        return sign * first, second


class _LogCount(Family):
    links, kind = ("log",), "count"

    def start(self, outcome: Outcome) -> Tensor:
        return torch.log(outcome.y + 0.5)

    def inverse_link(self, eta: Tensor) -> Tensor:
        return torch.exp(eta)


class Poisson(_LogCount):
    """Counts with variance equal to the mean."""

    name = "poisson"

    def log_prob(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> Tensor:
        return outcome.y * eta - torch.exp(eta) - torch.lgamma(outcome.y + 1)

    def derivatives(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rate = torch.exp(eta)
        return outcome.y - rate, -rate

    def expect(self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None = None) -> Expectation:
        rate = torch.exp(mean + variance / 2)
        return Expectation(outcome.y * mean - rate - torch.lgamma(outcome.y + 1), outcome.y - rate, rate)

    def integrals(
        self, outcome: Outcome, mean: Tensor, variance: Tensor, phi: Tensor | None = None, higher: bool = True
    ) -> tuple[Expectation, Remainder]:
        return self.expect(outcome, mean, variance, phi), super().integrals(outcome, mean, variance, phi, higher)[1]

    def simulate(self, eta, *, rng, trials=None, variance_residual=None, **own):  # type: ignore[no-untyped-def]
        return rng.poisson(np.exp(eta)).astype(float)

    def noise(self, mean: Tensor, phi: Tensor | None = None) -> Tensor:
        return mean

    def distribution_variance(self, eta: Tensor, total: Tensor, phi: Tensor | None = None) -> Tensor:
        return torch.special.polygamma(1, torch.exp(eta + total / 2).mean(-1, keepdim=True))


class NegativeBinomial(_LogCount):
    """Counts with variance `mu + phi mu^2` (NB2); `phi` is the dispersion."""

    name, parameter = "negative_binomial", "dispersion"

    def own(self, outcome: Outcome) -> tuple[Own, ...]:
        return (Own("dispersion", 0.5, 1.5, 0.5, 1e-4, 1e3),)

    def log_prob(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> Tensor:
        assert phi is not None
        y, size = outcome.y, 1 / phi
        shifted = eta + torch.log(phi)  # log(mu / size)
        ways = torch.lgamma(y + size) - torch.lgamma(size) - torch.lgamma(y + 1)
        return ways + y * shifted - (y + size) * torch.nn.functional.softplus(shifted)

    def derivatives(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert phi is not None
        y, size = outcome.y, 1 / phi
        shifted = eta + torch.log(phi)
        p = torch.sigmoid(shifted)
        slope = (y + size) * p
        return y - slope, slope * (p - 1)

    def simulate(self, eta, *, rng, trials=None, variance_residual=None, **own):  # type: ignore[no-untyped-def]
        phi = own.get("dispersion", 0.5)
        return rng.poisson(np.exp(eta) * rng.gamma(1 / phi, phi, size=np.shape(eta))).astype(float)

    def noise(self, mean: Tensor, phi: Tensor | None = None) -> Tensor:
        assert phi is not None
        return mean + phi * mean.square()

    def distribution_variance(self, eta: Tensor, total: Tensor, phi: Tensor | None = None) -> Tensor:
        assert phi is not None
        rate = torch.exp(eta + total / 2).mean(-1, keepdim=True)
        return torch.special.polygamma(1, 1 / (1 / rate + phi))
