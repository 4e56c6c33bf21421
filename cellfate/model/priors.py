"""Priors on hyperparameters, and the coordinates in which these are estimated.

A standard deviation lives on the whole real line as `|u|`: its posterior is then smooth and even at zero, so that a component that
is absent is an ordinary point and not the edge of a logarithm. Length-scales, dispersions and rates live on the log scale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.special import kve
from torch import Tensor

from cellfate.errors import DataError


class Prior(ABC):
    """Log-density of a positive (or, for `Normal`, real) number."""

    @abstractmethod
    def log_density(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class HalfNormal(Prior):
    """Normal about zero, folded to the positive half."""

    scale: float

    def log_density(self, x: Tensor) -> Tensor:
        return 0.5 * math.log(2 / math.pi) - math.log(self.scale) - 0.5 * (x / self.scale).square()


@dataclass(frozen=True)
class HalfT(Prior):
    """Student's t about zero, folded: with few `degrees` of freedom it lets a variance be large (Gelman 2006)."""

    degrees: float
    scale: float

    def log_density(self, x: Tensor) -> Tensor:
        half = (self.degrees + 1) / 2
        whole = math.log(2) + math.lgamma(half) - math.lgamma(self.degrees / 2) - 0.5 * math.log(self.degrees * math.pi)
        return whole - math.log(self.scale) - half * torch.log1p((x / self.scale).square() / self.degrees)


@dataclass(frozen=True)
class Penalised(Prior):
    r"""Penalised complexity: an sd is above `upper` with probability `tail`, and zero is most likely (Simpson et al. 2017).

    Exponential, rounded off below a hundredth of `upper`, :math:`\exp(-\lambda \sqrt{x^2 + \epsilon^2})`, so that it is smooth at zero
    as the coordinate is.
    """

    upper: float
    tail: float

    def log_density(self, x: Tensor) -> Tensor:
        rate, round_ = -math.log(self.tail) / self.upper, 0.01 * self.upper
        # the integral of exp(-rate sqrt(x^2 + round^2)) over x > 0 is round K_1(rate round), and kve is K_1 times exp of its argument
        whole = math.log(round_ * float(kve(1, rate * round_)))
        return -rate * (torch.sqrt(x.square() + round_**2) - round_) - whole


@dataclass(frozen=True)
class LogNormal(Prior):
    """Normal on the log scale, `sd` in e-folds."""

    median: float
    sd: float

    def log_density(self, x: Tensor) -> Tensor:
        z = (torch.log(x) - math.log(self.median)) / self.sd
        return -0.5 * z.square() - torch.log(x) - math.log(self.sd) - 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Normal(Prior):
    """Normal about zero, for fixed effects."""

    sd: float

    def log_density(self, x: Tensor) -> Tensor:
        return -0.5 * (x / self.sd).square() - math.log(self.sd) - 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Uniform(Prior):
    """Between 0 and 1."""

    def log_density(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True)
class Lkj(Prior):
    """Of a correlation of two, density as (1 - x^2)^(eta - 1); eta = 1 is uniform. After Lewandowski, Kurowicka & Joe (2009)."""

    eta: float

    def log_density(self, x: Tensor) -> Tensor:
        whole = (2 * self.eta - 1) * math.log(2) + 2 * math.lgamma(self.eta) - math.lgamma(2 * self.eta)
        # uniform, at -1 and 1 too, where the logarithm is infinite
        return (self.eta - 1) * torch.log1p(-x.square()) - whole if self.eta != 1 else torch.full_like(x, -whole)


@dataclass(frozen=True)
class Flat(Prior):
    """No prior: flat in the coordinate of estimation, so that the mode is the maximum of the likelihood."""

    def log_density(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


FORMS: dict[type[Prior], str] = {
    HalfNormal: "('half_normal', scale)",
    HalfT: "('half_t', degrees, scale)",
    Penalised: "('pc', upper, tail)",
    LogNormal: "('lognormal', median, sd)",
    Normal: "('normal', sd)",
    Uniform: "('uniform',)",
    Lkj: "('lkj', eta)",
}
SUITS: dict[str, tuple[str, tuple[type[Prior], ...]]] = {  # by scale: the range in words, and what lives on it
    "sd": ("a positive standard deviation", (HalfNormal, HalfT, Penalised, LogNormal)),
    "log": ("a positive number", (HalfNormal, HalfT, Penalised, LogNormal)),
    "logit": ("between 0 and 1", (Uniform,)),
    "atanh": ("a correlation", (Lkj,)),
    "real": ("any real number", (Normal,)),
}


def parse_prior(name: str, spec: object) -> Prior | float:
    """A prior from what the user writes; a number for ("fixed", value)."""
    if isinstance(spec, Prior):
        return spec
    kind, *arguments = (spec,) if isinstance(spec, str) or not isinstance(spec, Sequence) or not spec else spec
    known = {
        "half_normal": (HalfNormal, 1),
        "half_t": (HalfT, 2),
        "pc": (Penalised, 2),
        "lognormal": (LogNormal, 2),
        "normal": (Normal, 1),
        "uniform": (Uniform, 0),
        "lkj": (Lkj, 1),
    }
    try:
        values = [float(a) for a in arguments]
    except (TypeError, ValueError):
        values = [math.nan]
    if kind == "flat" and not values:
        return Flat()
    least = -1 if name.startswith("correlation_") else 0
    if kind == "fixed" and len(values) == 1 and math.isfinite(values[0]) and values[0] > least:
        return values[0]
    if (
        isinstance(kind, str)
        and kind in known
        and len(values) == known[kind][1]
        and all(math.isfinite(v) and v > 0 for v in values)
        and not (kind == "pc" and values[1] >= 1)
    ):
        return known[kind][0](*values)
    raise DataError(
        f"prior {spec!r} of {name!r} is not understood; write 'flat', {', '.join(FORMS.values())} or ('fixed', value), with positive "
        "finite numbers, and a `tail` below 1."
    )


def check_prior(name: str, spec: object, scale: str) -> None:
    """Refuse a prior that is none on the range of a hyperparameter: `scale` is "sd", "log", "logit", "atanh" or "real".

    A density that does not live on that range would bound the search in silence, or not be a density at all.
    """
    prior = parse_prior(name, spec)
    range_, suits = SUITS[scale]
    if isinstance(prior, float):
        if scale == "real":
            raise DataError(
                f"prior {spec!r} of {name!r}: fixed effects are not held at a value. Put what is known of them into the "
                "offset, or leave the column out."
            )
        if scale == "logit" and prior > 1:
            raise DataError(f"prior {spec!r} of {name!r} holds it at {prior:g}, outside 0 to 1.")
        if scale == "atanh" and prior >= 1:
            raise DataError(f"prior {spec!r} of {name!r} holds it at {prior:g}, and a correlation is below 1.")
    elif type(prior).__module__ == __name__ and not isinstance(prior, (*suits, Flat)):
        forms = ", ".join(FORMS[kind] for kind in suits)
        fixed = "" if scale == "real" else " or ('fixed', value)"
        raise DataError(f"prior {spec!r} does not suit {name!r}, which is {range_}; write 'flat', {forms}{fixed}.")


@dataclass(frozen=True)
class Parameter:
    """One entry of the vector that is estimated.

    `scale`: "sd" for `x = |u|`, "log" for `x = exp(u)`, "logit" for `x = sigmoid(u)`, "atanh" for `x = tanh(u)`,
    "real" for `x = u`.
    """

    name: str
    scale: str
    prior: Prior
    start: float  # of x
    lower: float = 0.0  # bounds of x within which the mode is sought
    upper: float = math.inf

    def natural(self, u: Tensor) -> Tensor:
        if self.scale == "sd":
            return u.abs()
        if self.scale == "log":
            return torch.exp(u)
        if self.scale == "atanh":
            return torch.tanh(u)
        return torch.sigmoid(u) if self.scale == "logit" else u

    def coordinate(self, x: float) -> float:
        if self.scale == "log":
            return math.log(x) if x > 0 else -math.inf
        if self.scale == "atanh":
            return math.atanh(x)
        if self.scale == "logit":
            return math.log(x) - math.log1p(-x) if 0 < x < 1 else math.copysign(12.0, x - 0.5)
        return x

    @property
    def bounds(self) -> tuple[float, float]:
        """Bounds of `u`; an sd passes zero freely, where it is even."""
        if self.scale == "sd":
            # open below: the search passes zero, so that an absent component is found from either side
            return -math.inf, self.upper
        if self.scale == "real":
            return -math.inf, math.inf
        return self.coordinate(self.lower), self.coordinate(self.upper)

    def log_density(self, u: Tensor) -> Tensor:
        """Log prior density of the coordinate, the Jacobian included."""
        density = self.prior.log_density(self.natural(u))
        if isinstance(self.prior, Flat) or self.scale in ("sd", "real"):
            return density
        if self.scale == "log":
            return density + u
        if self.scale == "atanh":  # log(1 - tanh(u)^2), which is even
            return density + 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
        return density + torch.nn.functional.logsigmoid(u) + torch.nn.functional.logsigmoid(-u)
