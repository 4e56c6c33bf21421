"""Groups of cells under one model: each level with hyperparameters of its own, or all of them alike.

Every level has its own fields and its own fixed effects in either case, so that the two ways differ in the hyperparameters and in
nothing else: alike, the evidence is the integral over one set of them of the product of the levels' likelihoods; apart, the product
of the integrals. Components are scaled to the cells of their level, as a fit of these cells alone scales them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Tensor

from cellfate._runtime import one_of_many
from cellfate.engines.base import Engine, Sites
from cellfate.inference.free_energy import evaluate, evaluate_with_gradient, log_evidence
from cellfate.inference.hyperposterior import INFLATE, LARGEST_K, ROUNDS, integrate
from cellfate.inference.importance import FoldedT, pareto_smooth, uniforms
from cellfate.inference.locate import locate
from cellfate.inference.mode import MEMORY, TIGHT, Mode, at_once, repeat
from cellfate.inference.points import LOOSE
from cellfate.inference.report import doubts_of, mode_values
from cellfate.inference.sites import Rule
from cellfate.kernels.base import Component
from cellfate.model.checks import DEPENDENT
from cellfate.model.glmm import Model
from cellfate.model.partition import LATENT, divided, partition, rows
from cellfate.model.priors import Flat, Parameter

POINTS, FEWER = 256, 64  # at which all levels are evaluated alike, for each proposal; where a point is dear
ENOUGH = {"gtol": 0.05, "ftol": 1e-6, "maxiter": 50}  # of the search for a common mode, in nats and units
STEP = 0.02  # of differences of gradients, in units
WIDEST = 3.0  # units that a posterior sd of a proposal is taken to be at most


@dataclass(frozen=True, eq=False)
class LevelFit:
    """The fit of one level: model and engine as they were focused on its mode, draws (s,) and rows of both tables by component."""

    model: Model
    engine: Engine
    mode: Mode
    at_mode: dict[str, float]  # hyperparameters by natural name
    variances: dict[str, np.ndarray]
    shares: dict[str, np.ndarray]
    table: dict[str, list]
    log_evidence: float
    status: str


@dataclass(frozen=True)
class Alike:
    """Log evidence of one set of hyperparameters for all levels, its standard error, and k-hat of the weights behind it."""

    log_evidence: float
    error: float
    pareto_k: float


def component_at(whole: Component, cells: np.ndarray) -> Component:
    """A component of some cells, under the priors and within the bounds of that of all of them.

    What a kernel lets a length-scale or a rate be, and with it the prior, comes from its cells.
    """
    kernel = whole.kernel.at(cells)
    if whole.kernel.hyperparameters:
        kernel.__dict__["hyperparameters"] = whole.kernel.hyperparameters
    return Component(whole.name, kernel)


def independent_columns(design: np.ndarray) -> np.ndarray:
    """Which columns (p,) are no combination of those before them: what is left out then changes nothing but the coefficients."""
    kept = np.zeros(design.shape[1], dtype=bool)
    basis = np.zeros((len(design), 0))
    for j, x in enumerate(design.T):
        rest = x - basis @ (basis.T @ x)
        rest -= basis @ (basis.T @ rest)  # once more: the first leaves rounding
        size = float(np.linalg.norm(rest))
        if size > np.sqrt(DEPENDENT) * np.linalg.norm(x):
            kept[j], basis = True, np.column_stack([basis, rest / size])
    return kept


def model_of_level(
    model: Model, cells: np.ndarray, components: Sequence[Component], priors: Mapping[str, object]
) -> tuple[Model, tuple[str, ...]]:
    """The model of some cells with `components` over them, in the units of all, and the fixed effects that say nothing there.

    The priors of fixed effects are wide on the scale of the covariates in these cells.
    """
    data = model.data.at(cells)
    kept = independent_columns(data.design.cpu().numpy())
    gone = tuple(term for term, here in zip(data.terms, kept, strict=True) if not here)
    terms = tuple(term for term in data.terms if term not in gone)
    data = replace(data, design=data.design[:, torch.as_tensor(kept, device=data.design.device)], terms=terms)
    level = replace(model, components=tuple(components), data=data, priors=dict(priors))
    level.__dict__.update(response_scale=model.response_scale, own=model.own)
    return level, gone


def fit_level(model: Model, engine: Engine, rule: Rule, rng: np.random.Generator) -> LevelFit:
    """Fit one level; its doubts are in `status`, and are not warned of."""
    with one_of_many():
        model, engine, mode = locate(model, engine, rule)
        posterior = integrate(model, engine, rule, mode, rng)
        scales = partition(model, posterior.values, posterior.beta, posterior.realized)
        variances, shares = rows(model, "", {LATENT: scales[LATENT]}, posterior.values)
        _, doubts = engine.report({name: float(x.mean()) for name, x in posterior.values.items()})
        parts = scales[LATENT]
        found = doubts_of(mode, posterior, parts, doubts)
    # of a grouping factor the variance is that of its intercepts, and the share what these contribute
    sds = {name: posterior.values.get(f"sd_{name}") for name in parts}
    return LevelFit(
        model,
        engine,
        mode,
        mode_values(model, mode),
        {name: x if (sd := sds[name]) is None else sd**2 for name, x in parts.items()},
        divided(parts),
        {name: column for name, column in (variances | shares).items() if name not in ("scale", "response")},
        posterior.log_evidence,
        "; ".join(found) or "converged",
    )


class _Together:
    """Levels under one vector of hyperparameters u (d,), that of all parameters which any of them has."""

    def __init__(self, levels: Sequence[LevelFit], rule: Rule) -> None:
        self._rule, limits = rule, _limits(levels)
        self._models = [level.model for level in levels]
        self._engines = [_focused(level.engine, limits) for level in levels]
        self._sites = [level.mode.sites for level in levels]
        found: dict[str, Parameter] = {}
        for model in self._models:
            for p in model.parameters:
                low, high = limits.get(p.name, (p.lower, p.upper))
                found.setdefault(p.name, replace(p, lower=low, upper=high))
        self.parameters = list(found.values())
        names = list(found)
        self._places = [[names.index(p.name) for p in model.parameters] for model in self._models]
        self.folded = np.array([p.scale == "sd" for p in self.parameters], dtype=bool)
        self.unit = np.array([p.start if p.scale == "sd" else 1.0 for p in self.parameters])
        self.low, self.high = (np.array([p.bounds[side] for p in self.parameters]) for side in (0, 1))
        self.cheap = all(engine.points_at_once(MEMORY) >= POINTS for engine in self._engines)
        self.start = self._start(levels)

    def _start(self, levels: Sequence[LevelFit]) -> np.ndarray:
        """Between the modes of the levels, each as near as it knows better; none absent, so that it can come back."""
        weight, mean = np.full(len(self.parameters), 1e-6), np.zeros(len(self.parameters))
        mean += weight * [p.coordinate(p.start) for p in self.parameters]
        for level, places in zip(levels, self._places, strict=True):
            precision = np.clip(level.mode.curvature.diagonal().cpu().numpy(), 1e-3, None)
            weight[places] += precision
            mean[places] += precision * level.mode.u.cpu().numpy()
        floor = np.where(self.folded, 0.3 * self.unit, -np.inf)
        return np.clip(np.maximum(mean / weight, floor), self.low, self.high)

    def log_density(self, u: np.ndarray) -> np.ndarray:
        """Log of prior times likelihoods (points,) at u (points, d); nothing is beyond the bounds."""
        value = np.full(len(u), -np.inf)
        inside = ((u >= self.low) & (u <= self.high)).all(1)
        if not inside.any():
            return value
        value[inside] = self._prior(torch.as_tensor(u[inside])).numpy()
        for model, engine, places, sites in zip(self._models, self._engines, self._places, self._sites, strict=True):
            value[inside] += _log_likelihood(model, engine, self._rule, u[inside][:, places], sites)
        return np.nan_to_num(value, nan=-np.inf, posinf=-np.inf)

    def slope(self, u: np.ndarray) -> tuple[float, np.ndarray]:
        """The same at one point, by the free energy, with its gradient (d,)."""
        at = torch.as_tensor(u, dtype=torch.float64)[None].requires_grad_(True)
        prior = self._prior(at).sum()
        gradient = torch.autograd.grad(prior, at, allow_unused=True)[0]
        value, slope = prior.item(), np.zeros(len(u)) if gradient is None else gradient[0].numpy().copy()
        for i, (model, engine, places) in enumerate(zip(self._models, self._engines, self._places, strict=True)):
            point = torch.as_tensor(u[None, places]).to(model.data.offset)
            here = evaluate_with_gradient(model, engine, point, self._rule, start=self._sites[i], tolerance=TIGHT)
            self._sites[i] = here.fit.sites
            assert here.gradient is not None
            value += float(here.free_energy)
            slope[places] += here.gradient[0].double().cpu().numpy()
        return value, slope

    def _prior(self, u: Tensor) -> Tensor:
        return torch.stack([p.log_density(u[:, i]) for i, p in enumerate(self.parameters)]).sum(0)


def alike(levels: Sequence[LevelFit], rule: Rule, rng: np.random.Generator) -> Alike:
    """Integrate over one set of hyperparameters for all levels, by importance draws about their common mode."""
    together = _Together(levels, rule)
    d = len(together.parameters)
    if not d:  # all are held: alike and apart are one
        return Alike(sum(level.log_evidence for level in levels), 0.0, -np.inf)
    if any(isinstance(p.prior, Flat) for p in together.parameters):
        return Alike(np.nan, np.nan, np.nan)
    location, scale = _proposal(together)
    count = POINTS if together.cheap else FEWER
    proposals: list[FoldedT] = []
    points: list[np.ndarray] = []
    values: list[np.ndarray] = []
    while True:
        proposals.append(FoldedT(location, INFLATE * scale, together.folded))
        points.append(proposals[-1].draw(uniforms(count, d + 1, rng)))
        values.append(together.log_density(points[-1]))
        u, target = np.concatenate(points), np.concatenate(values)
        mixture = logsumexp([p.log_density(u) for p in proposals], axis=0) - np.log(len(proposals))
        if not np.isfinite(target).any():
            return Alike(np.nan, np.nan, np.nan)
        smoothed, k = pareto_smooth(target - mixture)
        if not k > LARGEST_K or len(proposals) == ROUNDS:
            break
        weight = np.exp(smoothed)  # the proposal was off: move it to where the weight is
        location = weight @ u
        centered = (u - location) * np.sqrt(weight)[:, None]
        scale = np.linalg.cholesky(centered.T @ centered + 1e-2 * scale @ scale.T)
    ratio = target - mixture
    value = float(logsumexp(ratio) - np.log(len(ratio)))
    error = float(np.exp(ratio - value).std() / np.sqrt(len(ratio)))
    return Alike(value, error, k)


def _proposal(together: _Together) -> tuple[np.ndarray, np.ndarray]:
    """The common mode (d,) and a lower factor (d, d) of the inverse curvature there, by units of the coordinates."""
    unit, d = together.unit, len(together.parameters)

    def downhill(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = together.slope(x * unit)
        return (-value, -slope * unit) if np.isfinite(value) and np.isfinite(slope).all() else (1e300, np.zeros(d))

    bounds = list(zip(together.low / unit, together.high / unit, strict=True))
    # a proposal has to be near the mode, and no nearer
    found = minimize(downhill, together.start / unit, jac=True, bounds=bounds, method="L-BFGS-B", options=ENOUGH)
    x = np.where(together.folded, np.abs(found.x), found.x)
    here, curvature = downhill(x)[1], np.zeros((d, d))
    for i in range(d):
        step = np.zeros(d)
        step[i] = STEP if (x[i] + STEP) * unit[i] <= together.high[i] else -STEP
        curvature[i] = (downhill(x + step)[1] - here) / step[i]
    values, vectors = np.linalg.eigh((curvature + curvature.T) / 2)
    covariance = (vectors / np.clip(values, WIDEST**-2, None)) @ vectors.T
    return x * unit, np.linalg.cholesky(covariance * unit[:, None] * unit)


@torch.no_grad()
def _log_likelihood(model: Model, engine: Engine, rule: Rule, u: np.ndarray, sites: Sites) -> np.ndarray:
    """Log evidence (points,) of a level at its own coordinates u (points, d), the hyperparameters given."""
    found = []
    for part in torch.as_tensor(u).to(model.data.offset).split(at_once(model, engine)):
        start = repeat(sites, len(part))
        here = evaluate(model, engine, model.theta(part), rule, start=start, tolerance=LOOSE)
        found.append(log_evidence(model, here, rule).double().cpu().numpy())
    return np.concatenate(found)


def _limits(levels: Sequence[LevelFit]) -> dict[str, tuple[float, float]]:
    """Within which each parameter matters to any level, where a fit has narrowed it down."""
    out: dict[str, tuple[float, float]] = {}
    for level in levels:
        for name, (low, high) in level.model.limits.items():
            lowest, highest = out.get(name, (low, high))
            out[name] = min(low, lowest), max(high, highest)
    return out


def _focused(engine: Engine, limits: Mapping[str, tuple[float, float]]) -> Engine:
    """The engine with its approximations made for all that matters to any level."""
    ranges = {field: limits[name] for field in engine.fields() if (name := f"lengthscale_{field}") in limits}
    return engine.focus(ranges) if ranges else engine
