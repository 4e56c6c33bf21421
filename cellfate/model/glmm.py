"""The model: a family, components, fixed effects and priors, and how a parameter vector becomes a prior over cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cellfate.errors import DataError
from cellfate.kernels.base import Basis, Component, Hyperparameter, Term, with_copies
from cellfate.model.families import Family, Outcome
from cellfate.model.priors import Flat, HalfNormal, Lkj, LogNormal, Normal, Parameter, Prior, Uniform, parse_prior

FIXED = "fixed"  # name of the fixed effects where they are a component
RESIDUAL = "residual"
STRONGEST = 0.9999  # correlation that is looked at
WIDE = 10.0  # prior sd of a fixed effect, in standard deviations of response per standard deviation of covariate


@dataclass(frozen=True)
class Data:
    """What is observed of `n` cells: outcome, design (n, p) with the names of its columns, and known offset (n,)."""

    outcome: Outcome
    design: Tensor
    terms: tuple[str, ...]
    offset: Tensor
    copies: int = 1  # of the cells, one after the other: fields of a fate that has several
    sets: int = 1  # of fixed effects; each copy has its own, or combines them, the first has the first

    @property
    def own_design(self) -> Tensor:
        """Design of one copy."""
        n, p = self.n // self.copies, self.design.shape[1] // self.sets
        return self.design[:n, :p]

    def some(self, count: int) -> np.ndarray:
        """Places of some of the cells in every copy, at random: those that come in turns would be thinned to one of them.

        The seed only makes a fit repeatable.
        """
        n = self.n // self.copies
        cells = np.arange(n) if n <= count else np.sort(np.random.default_rng(0).permutation(n)[:count])
        return np.concatenate([cells + copy * n for copy in range(self.copies)])

    @property
    def n(self) -> int:
        return self.offset.shape[0]

    def at(self, cells: np.ndarray) -> Data:
        """The same for some of the cells."""
        index = torch.as_tensor(cells, device=self.offset.device)
        return Data(self.outcome.at(index), self.design[index], self.terms, self.offset[index], self.copies, self.sets)


@dataclass(frozen=True)
class Theta:
    """Parameters at a batch of points: natural values by name (points,), fixed effects (points, p) where maximized."""

    values: dict[str, Tensor]
    beta: Tensor | None


@dataclass(frozen=True)
class Model:
    """Components and fixed effects over the cells of `data`.

    With `reml` the fixed effects are integrated out under their prior; otherwise they are parameters beside the variances.
    `limits` narrow the bounds of parameters, by name and on their natural scale; the priors stay.
    """

    family: Family
    components: Sequence[Component]
    data: Data
    priors: Mapping[str, object] = field(default_factory=dict)
    reml: bool = True
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [*self._known(), "beta"]
        unknown = sorted(set(self.priors) - set(known))
        if unknown:
            raise DataError(f"priors name {unknown}, which this model does not have; it has {known}.")
        for component in self.components:
            if component.kernel.n != self.data.n:
                raise DataError(f"component {component.name!r} is over {component.kernel.n} cells, not {self.data.n}.")
            borrowed = sorted(set(component.kernel.borrowed) - set(known))
            if borrowed:
                raise DataError(f"component {component.name!r} goes by {borrowed}, which no other component has.")
        if len(set(known)) < len(known):
            raise DataError(f"two parameters of the model would have one name: {known}. Rename a component.")

    def at(self, cells: np.ndarray, components: Sequence[Component] | None = None) -> Model:
        """The same model of some of the cells, in the units and under the priors of all of them.

        `components` are those over these cells, where they were made already.
        """
        if components is None:
            components = [Component(c.name, with_copies(c.kernel.at(cells), c.kernel.copies)) for c in self.components]
        return self._in_units(replace(self, components=components, data=self.data.at(cells)))

    def within(self, limits: Mapping[str, tuple[float, float]]) -> Model:
        """The same model with narrower bounds for some parameters."""
        return self._in_units(replace(self, limits={**self.limits, **limits}))

    def _in_units(self, other: Model) -> Model:
        """`other` in the units and under the priors of this model."""
        other.__dict__.update(response_scale=self.response_scale, beta_sd=self.beta_sd, own=self.own)
        return other

    def _known(self) -> list[str]:
        names = [f"sd_{c.name}" for c in self.components]
        names += [h.parameter(c.name) for c in self.components for h in c.kernel.hyperparameters]
        return names + list(self.own)

    @cached_property
    def own(self) -> tuple[str, ...]:
        """Names of the family's own hyperparameters."""
        if self.family.parameter == "variance_residual":
            return ("sd_residual",)
        return tuple(one.name for one in self.family.own(self.data.outcome))

    @cached_property
    def response_scale(self) -> float:
        """Unit of the latent scale: the spread of a gaussian response, 1 for every other family."""
        if self.family.name != "gaussian":
            return 1.0
        centered = self.data.outcome.y - self.data.outcome.y.mean()
        return float(centered.square().mean().sqrt()) or 1.0

    @cached_property
    def beta_sd(self) -> Tensor:
        """Prior sd (p,) of the fixed effects, wide on the scale of the data."""
        return self._beta_sd(self.data.own_design).repeat(self.data.sets)

    def _beta_sd(self, x: Tensor) -> Tensor:
        spec = parse_prior("beta", self.priors["beta"]) if "beta" in self.priors else None
        if isinstance(spec, Normal):
            return torch.full_like(x[0], spec.sd)
        if spec is not None and not (isinstance(spec, Flat) and not self.reml):
            raise DataError("the prior of 'beta' is ('normal', sd); 'flat' goes with reml=False.")
        constant = x.std(0, correction=0) <= 1e-8 * x.abs().amax(0)
        spread = torch.where(constant, x.abs().amax(0), x.std(0, correction=0)).clamp(min=torch.finfo(x.dtype).tiny)
        # a constant column also has to carry the mean of the response and those of the covariates
        level = abs(float(self.data.outcome.y.mean())) if self.family.name == "gaussian" else 0.0
        level += self.response_scale * float(
            torch.where(constant, torch.zeros_like(spread), x.mean(0).abs() / spread).sum()
        )
        return WIDE * (self.response_scale + torch.where(constant, level, 0.0)) / spread

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The entries of the vector that is estimated, in order; fixed hyperparameters are not among them."""
        unit = self.response_scale
        out = []
        for component in self.components:
            name = f"sd_{component.name}"
            own = unit * component.kernel.unit
            out += self._parameter(name, "sd", HalfNormal(2.0 * own), 0.7 * own, 0.0, 50 * own)
        if self.family.parameter == "variance_residual":
            out += self._parameter("sd_residual", "log", HalfNormal(2.0 * unit), 0.5 * unit, 1e-3 * unit, 10 * unit)
        for one in self.family.own(self.data.outcome):
            out += self._parameter(one.name, "log", LogNormal(one.median, one.sd), one.start, one.lower, one.upper)
        for component in self.components:
            for hyper in component.kernel.hyperparameters:
                if hyper.fixed is None:
                    out += self._hyperparameter(hyper.parameter(component.name), hyper)
        if not self.reml:
            out += [
                Parameter(f"beta[{term}]", "real", self._beta_prior(i), 0.0) for i, term in enumerate(self.data.terms)
            ]
        return tuple(self._limited(parameter) for parameter in out)

    def _limited(self, parameter: Parameter) -> Parameter:
        if parameter.name not in self.limits:
            return parameter
        low, high = self.limits[parameter.name]
        low, high = max(low, parameter.lower), min(high, parameter.upper)
        return replace(parameter, lower=low, upper=high, start=min(max(parameter.start, low), high))

    def _beta_prior(self, i: int) -> Prior:
        spec = parse_prior("beta", self.priors["beta"]) if "beta" in self.priors else Flat()
        assert isinstance(spec, Prior)
        return spec

    def _parameter(
        self, name: str, scale: str, default: Prior, start: float, lower: float, upper: float
    ) -> list[Parameter]:
        prior = parse_prior(name, self.priors[name]) if name in self.priors else default
        if not isinstance(prior, Prior):
            return []  # held at a value, see `_fixed`
        return [Parameter(name, scale, prior, start, lower, upper)]

    def _hyperparameter(self, name: str, hyper: Hyperparameter) -> list[Parameter]:
        if hyper.scale == "sd":
            own = self.response_scale * hyper.unit
            return self._parameter(name, "sd", HalfNormal(2.0 * own), 0.7 * own, 0.0, 50 * own)
        if hyper.scale == "atanh":
            return self._parameter(name, "atanh", Lkj(1.0), 0.0, -STRONGEST, STRONGEST)
        if hyper.scale == "logit":
            return self._parameter(name, "logit", Uniform(), 0.7, 1e-4, 1 - 1e-4)
        middle = float(np.sqrt(hyper.lower * hyper.upper))
        # the bounds are two standard deviations away, and the search may go a little beyond them
        default = LogNormal(middle, max(np.log(hyper.upper / hyper.lower) / 4, 0.1))
        return self._parameter(name, "log", default, middle, hyper.lower / 2, hyper.upper * 2)

    @cached_property
    def _fixed(self) -> dict[str, float]:
        """Hyperparameters that are held, by name."""
        held = {
            h.parameter(c.name): h.fixed
            for c in self.components
            for h in c.kernel.hyperparameters
            if h.fixed is not None
        }
        for name, spec in self.priors.items():
            prior = parse_prior(name, spec)
            if isinstance(prior, float):
                held[name] = prior
        return held

    def theta(self, u: Tensor) -> Theta:
        """Natural parameters at points u (points, d), differentiable in u."""
        names = [p.name for p in self.parameters]
        values = {p.name: p.natural(u[:, i]) for i, p in enumerate(self.parameters) if p.scale != "real"}
        values |= {name: u.new_full((u.shape[0],), value) for name, value in self._fixed.items()}
        beta = None
        if not self.reml:
            start = names.index(f"beta[{self.data.terms[0]}]") if self.data.terms else len(names)
            beta = u[:, start:]
        return Theta(values, beta)

    def from_natural(self, values: Mapping[str, object]) -> tuple[Theta, int]:
        """Parameters by natural name at one or several points, as :meth:`cellfate.GLMM.evaluate` takes them."""
        like = self.data.offset
        given = {
            k: torch.atleast_1d(torch.as_tensor(np.asarray(v, dtype=np.float64))).to(like) for k, v in values.items()
        }
        beta = given.pop("beta", None)
        for name in list(given):
            if name.startswith("variance_"):
                given["sd_" + name.removeprefix("variance_")] = given.pop(name).sqrt()
        needed = [name for name in self._known() if name not in self._fixed]
        missing, unknown = sorted(set(needed) - set(given)), sorted(set(given) - set(self._known()))
        if missing or unknown:
            raise DataError(
                f"theta lacks {missing} and has unknown {unknown}; variances may be given as 'variance_<name>'."
            )
        held = sorted(set(given) & set(self._fixed))
        if held:
            raise DataError(f"theta gives {held}, which this model holds at {[self._fixed[name] for name in held]}.")
        points = max((v.shape[0] for v in given.values()), default=1)
        full = {name: like.new_full((points,), value) for name, value in self._fixed.items()}
        full |= {name: v.expand(points) for name, v in given.items()}
        if self.reml and beta is not None:
            raise DataError("theta gives 'beta', but reml=True integrates the fixed effects out; use reml=False.")
        if not self.reml:
            if beta is None and self.data.terms:
                raise DataError(f"theta lacks 'beta', the fixed effects of {list(self.data.terms)} (reml=False).")
            beta = like.new_zeros(points, 0) if beta is None else beta.reshape(-1, self.data.design.shape[1])
            beta = beta.expand(points, -1)
        return Theta(full, beta), points

    def from_draws(self, draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Of the draws of a fit those that :meth:`from_natural` takes; in files, names have "_" for "/"."""

        def find(name: str) -> np.ndarray:
            for key in (name, name.replace("/", "_")):
                if key in draws:
                    return np.asarray(draws[key], dtype=np.float64)
            raise DataError(f"the draws have no {name!r}, they are of another model: {', '.join(draws)}.")

        names = [name for name in self._known() if name not in self._fixed]
        names = [f"variance_{name.removeprefix('sd_')}" if name.startswith("sd_") else name for name in names]
        found = {name: find(name) for name in names}
        if not self.reml and self.data.terms:
            found["beta"] = np.column_stack([find(f"beta[{term}]") for term in self.data.terms])
        return found

    def terms(self, theta: Theta) -> list[Term]:
        """The components at `theta`; integrated fixed effects are one of them."""
        like = self.data.offset
        out = []
        for component in self.components:
            kernel, sd = component.kernel, theta.values[f"sd_{component.name}"]
            values = {h.name: theta.values[h.parameter(component.name)] for h in kernel.hyperparameters}
            values |= {name: theta.values[name] for name in kernel.borrowed}
            if kernel.holds_variance:
                values["sd"] = sd
            variance = torch.ones_like(sd) if kernel.holds_variance else sd.square()
            out.append(Term(component.name, kernel.structure(values, like), variance, kernel.normalized))
        if self.reml and self.data.design.shape[1]:
            points = next(iter(theta.values.values())).shape[0] if theta.values else 1
            basis = Basis(self.data.design, self.beta_sd.square().expand(points, -1))
            out.append(Term(FIXED, basis, like.new_ones(points), False))
        return out

    def phi(self, theta: Theta) -> Tensor | None:
        """The family's own hyperparameter (points, 1), or where it may have several (points, 1, q)."""
        if not self.own:
            return None
        if self.family.several:
            return torch.stack([theta.values[name] for name in self.own], -1)[:, None]
        value = theta.values[self.own[0]]
        return (value.square() if self.own[0] == "sd_residual" else value)[:, None]

    def shift(self, theta: Theta) -> Tensor:
        """What is added to the latent field (points or 1, n): the offset, and fixed effects that are parameters."""
        if theta.beta is None or not theta.beta.shape[1]:
            return self.data.offset[None]
        return self.data.offset + theta.beta @ self.data.design.mT

    def log_prior(self, u: Tensor) -> Tensor:
        """Log prior density (points,) of points u (points, d)."""
        total = 0.0 * u.sum(-1)  # a flat prior, too, is differentiable
        for i, parameter in enumerate(self.parameters):
            total = total + parameter.log_density(u[:, i])
        return total

    def held(self, name: str) -> float | None:
        """The value at which a hyperparameter is held; None of one that is estimated."""
        return self._fixed.get(name)

    def start(self) -> Tensor:
        """Where the search for the mode begins (d,)."""
        return self.data.offset.new_tensor([p.coordinate(p.start) for p in self.parameters])
