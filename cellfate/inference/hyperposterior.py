"""The hyperposterior: quasi-random points about the mode, evaluated as one batch and reweighted to the truth.

The weights are importance ratios, Pareto-smoothed. Between the evaluated points the log posterior is smooth (in coordinates in
which an absent component is an ordinary point), so that many more draws than evaluations can be taken from an interpolant; its
error at points left out is reported, and where it is not small the evaluated points are used alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from cellfate.engines.base import Engine, Sites
from cellfate.inference.free_energy import Evaluation, evaluate, likelihood_at
from cellfate.inference.importance import FoldedT, Surface, pareto_smooth, systematic, uniforms
from cellfate.inference.mode import MEMORY, Mode
from cellfate.inference.sites import Laplace, Likelihood, Rule
from cellfate.model.glmm import FIXED, Model

LOOSE = 0.03  # of site updates where only the free energy counts: it is off by about the square
INFLATE = 1.1  # of the proposal's scale
DENSE_DRAWS = 8192  # from the interpolant
DRAWS = 2000  # equally weighted, kept
FIELDS = 8  # draws of the fields at each point, for realized variances
VARIANCE_POINTS = 8  # at which the posterior variances of components are computed
LARGEST_K = 0.7
LARGEST_ERROR = 0.25  # of the interpolant, in log density
ROUNDS = 3


@dataclass(frozen=True)
class Hyperposterior:
    """Draws of hyperparameters and fixed effects, and what was integrated over them.

    values: natural value (DRAWS,) by name; beta: (DRAWS, p); effects: component -> mean and sd (n,); realized: component ->
    (DRAWS,) sample variance of the field over the cells, "shared" for twice the covariances.
    """

    values: dict[str, np.ndarray]
    beta: np.ndarray
    effects: dict[str, tuple[np.ndarray, np.ndarray]]
    realized: dict[str, np.ndarray]
    log_evidence: float
    pareto_k: float
    interpolation_error: float
    evaluations: int
    unsettled: int  # points whose site updates did not converge


@dataclass
class _Points:
    """What is kept of each evaluated point."""

    u: np.ndarray
    log_posterior: np.ndarray
    means: dict[str, np.ndarray]
    beta: np.ndarray
    beta_factor: np.ndarray
    realized: dict[str, np.ndarray]  # (points, FIELDS)
    sites: Sites
    unsettled: int

    @staticmethod
    def join(parts: list[_Points]) -> _Points:
        first = parts[0]
        return _Points(
            np.concatenate([p.u for p in parts]),
            np.concatenate([p.log_posterior for p in parts]),
            {k: np.concatenate([p.means[k] for p in parts]) for k in first.means},
            np.concatenate([p.beta for p in parts]),
            np.concatenate([p.beta_factor for p in parts]),
            {k: np.concatenate([p.realized[k] for p in parts]) for k in first.realized},
            Sites(torch.cat([p.sites.precision for p in parts]), torch.cat([p.sites.shift for p in parts])),
            sum(p.unsettled for p in parts),
        )


def predicted_sites(mode: Mode, likelihood: Likelihood, u: Tensor, rule: Rule) -> Sites:
    """Sites at points u (points, d), from the posterior moments extrapolated linearly from the mode."""
    step = u - mode.u
    mean = mode.mean + step @ mode.mean_slope
    log_variance = mode.log_variance + (step @ mode.log_variance_slope).clamp(-3.0, 3.0)
    e = likelihood.at(mean) if isinstance(rule, Laplace) else likelihood.expect(mean, log_variance.exp())
    precision = e.precision.clamp(min=0.0)
    return Sites(precision, precision * mean + e.slope)


def integrate(model: Model, engine: Engine, rule: Rule, mode: Mode, rng: np.random.Generator) -> Hyperposterior:
    """Integrate over the hyperparameters."""
    d = len(mode.u)
    if d == 0:
        points = _evaluate(model, engine, rule, mode, np.zeros((1, 0)), rng)
        draws = _with_beta(np.zeros((DRAWS, 0)), points.beta.repeat(DRAWS, 0), points.beta_factor.repeat(DRAWS, 0), rng)
        return _summarize(model, engine, points, np.zeros(1), draws, (mode.free_energy, -np.inf, 0.0), rng)
    count = 64 if d <= 3 else 128 if d <= 5 else 256
    location, scale, folded = mode.u.cpu().numpy(), _factor(model, mode), _folded(model)
    proposals: list[FoldedT] = []
    parts: list[_Points] = []
    counts: list[int] = []
    for _ in range(ROUNDS):
        proposals.append(FoldedT(location, INFLATE * scale, folded))
        u = _inside(model, proposals[-1].draw(uniforms(4 * count, d + 1, rng)))[:count]
        counts.append(len(u))
        parts.append(_evaluate(model, engine, rule, mode, u, rng))
        points = _Points.join(parts)
        log_ratio = np.nan_to_num(points.log_posterior - _mixture(proposals, counts, points.u), nan=-np.inf)
        log_weight, k = pareto_smooth(log_ratio)
        if k <= LARGEST_K:
            break
        # the proposal was off: move it to where the weight is
        weight = np.exp(log_weight)
        location = weight @ points.u
        centered = points.u - location
        scale = np.linalg.cholesky((centered * weight[:, None]).T @ centered + 1e-2 * scale @ scale.T)

    draws, log_evidence, error = _dense_draws(model, mode, points, proposals, counts, rng)
    if draws is None:
        chosen = systematic(np.exp(log_weight), DRAWS, rng)[rng.permutation(DRAWS)]
        draws = _with_beta(points.u[chosen], points.beta[chosen], points.beta_factor[chosen], rng)
        log_evidence = float(logsumexp(log_ratio) - np.log(len(log_ratio)))
    return _summarize(model, engine, points, log_weight, draws, (log_evidence, k, error), rng)


def _folded(model: Model) -> np.ndarray:
    return np.array([p.scale == "sd" for p in model.parameters])


def _inside(model: Model, u: np.ndarray) -> np.ndarray:
    low, high = (np.array(b) for b in zip(*(p.bounds for p in model.parameters), strict=True))
    return u[((u >= low) & (u <= high)).all(1)]


def _mixture(proposals: list[FoldedT], counts: list[int], u: np.ndarray) -> np.ndarray:
    share = np.log(np.array(counts) / sum(counts))
    return logsumexp([s + p.log_density(u) for s, p in zip(share, proposals, strict=True)], axis=0)


def _factor(model: Model, mode: Mode) -> np.ndarray:
    """Lower factor of the inverse curvature, no wider than three units in any direction."""
    unit = np.array([p.start if p.scale == "sd" else 1.0 for p in model.parameters])
    values, vectors = np.linalg.eigh(mode.curvature.cpu().numpy() * unit[:, None] * unit)
    values = np.clip(values, 1 / 9, None)
    return np.linalg.cholesky((vectors / values) @ vectors.T * unit[:, None] * unit)


@torch.no_grad()
def _evaluate(
    model: Model, engine: Engine, rule: Rule, mode: Mode, u: np.ndarray, rng: np.random.Generator
) -> _Points:
    """Free energy and summaries at points u (points, d), as many at once as memory allows."""
    at = torch.as_tensor(u, dtype=mode.u.dtype, device=mode.u.device)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in rng.integers(2**62, size=len(u))]
    parts, size = [], engine.points_at_once(MEMORY)
    for first in range(0, len(u), size):
        part = at[first : first + size]
        theta = model.theta(part)
        likelihood = likelihood_at(model, theta)
        start = predicted_sites(mode, likelihood, part, rule)
        here = evaluate(model, engine, theta, rule, start=start, tolerance=LOOSE)
        value = here.free_energy + model.log_prior(part)
        parts.append(_keep(model, part, here, value, generators[first : first + size]))
    return _Points.join(parts)


def _keep(model: Model, u: Tensor, here: Evaluation, value: Tensor, generators: list[torch.Generator]) -> _Points:
    posterior, terms = here.posterior, here.terms
    means = {term.name: posterior.component_mean(term).cpu().numpy() for term in terms}
    fields = posterior.sample(terms, FIELDS, generators)
    beta, factor = _beta(model, here)
    if here.theta.beta is not None and here.theta.beta.shape[1]:
        fields[FIXED] = (here.theta.beta @ model.data.design.mT)[..., None].expand(-1, -1, FIELDS)
    realized = {name: field.var(-2).cpu().numpy() for name, field in fields.items()}
    whole = torch.as_tensor(sum(fields.values())).var(-2).cpu().numpy()
    realized["shared"] = whole - sum(realized.values())
    return _Points(
        u.cpu().numpy(), value.cpu().numpy(), means, beta, factor, realized, here.fit.sites, int((here.fit.status != 0).sum())
    )


def _beta(model: Model, here: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Mean (points, p) and lower factor (points, p, p) of the fixed effects at each point; no spread where they are parameters."""
    points, p = here.free_energy.shape[0], model.data.design.shape[1]
    for term in here.terms:
        if term.name == FIXED:
            mean, covariance = here.posterior.coefficients(term)
            return mean.cpu().numpy(), torch.linalg.cholesky(covariance).cpu().numpy()
    beta = np.zeros((points, p)) if here.theta.beta is None else here.theta.beta.cpu().numpy()
    return beta, np.zeros((points, p, p))


def _with_beta(
    u: np.ndarray, mean: np.ndarray, factor: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    return u, mean + (factor @ rng.standard_normal((*mean.shape, 1)))[..., 0]


def _dense_draws(
    model: Model, mode: Mode, points: _Points, proposals: list[FoldedT], counts: list[int], rng: np.random.Generator
) -> tuple[tuple[np.ndarray, np.ndarray] | None, float, float]:
    """Equally weighted draws (u, beta) and log evidence by way of an interpolant; None where it is not good enough."""
    d, p = points.u.shape[1], points.beta.shape[1]
    scale = _factor(model, mode)
    centre = mode.u.cpu().numpy()

    def whiten(u: np.ndarray) -> np.ndarray:
        return np.linalg.solve(scale, (u - centre).T).T

    good = np.isfinite(points.log_posterior)
    good &= points.log_posterior > points.log_posterior[good].max() - 50  # the far tail weighs nothing and bends the surface
    z = whiten(points.u[good])
    if good.sum() < 3 * (d + 1):
        return None, np.nan, np.nan
    rows, columns = np.tril_indices(p)
    rest = points.log_posterior[good] - mode.log_posterior + 0.5 * (z * z).sum(1)
    surface = Surface(z, np.column_stack([rest, points.beta[good], points.beta_factor[good][:, rows, columns]]))
    error = surface.error()
    if error > LARGEST_ERROR:
        return None, np.nan, error
    dense = np.concatenate(
        [
            q.draw(uniforms(max(16, DENSE_DRAWS * c // sum(counts)), d + 1, rng))
            for q, c in zip(proposals, counts, strict=True)
        ]
    )
    total = len(dense)
    dense = _inside(model, dense)
    z = whiten(dense)
    found = surface(z)
    # no further from what was seen than the surface can be trusted
    value = np.minimum(found[:, 0], rest.max() + 1.0) - 0.5 * (z * z).sum(1) + mode.log_posterior
    log_ratio = value - _mixture(proposals, counts, dense)
    chosen = systematic(np.exp(log_ratio - log_ratio.max()), DRAWS, rng)
    chosen = chosen[rng.permutation(DRAWS)]
    factor = np.zeros((DRAWS, p, p))
    factor[:, rows, columns] = found[chosen, 1 + p :]
    draws = _with_beta(dense[chosen], found[chosen, 1 : 1 + p], factor, rng)
    return draws, float(logsumexp(log_ratio) - np.log(total)), error


def _summarize(
    model: Model,
    engine: Engine,
    points: _Points,
    log_weight: np.ndarray,
    draws: tuple[np.ndarray, np.ndarray],
    diagnostics: tuple[float, float, float],
    rng: np.random.Generator,
) -> Hyperposterior:
    weight = np.exp(log_weight)
    index, counts = np.unique(systematic(weight, VARIANCE_POINTS, rng), return_counts=True)
    within = _component_variances(model, engine, points, index, counts / VARIANCE_POINTS)
    effects = {}
    for name, mean in points.means.items():
        average = weight @ mean
        effects[name] = (average, np.sqrt(within[name] + weight @ (mean - average) ** 2))

    pick = systematic(np.repeat(weight, FIELDS), DRAWS, rng)
    u, beta = draws
    theta = model.theta(torch.as_tensor(u).to(points.sites.shift))
    log_evidence, k, error = diagnostics
    return Hyperposterior(
        values={name: value.cpu().numpy() for name, value in theta.values.items()},
        beta=beta,
        effects=effects,
        realized={name: x.reshape(-1)[pick] for name, x in points.realized.items()},
        log_evidence=log_evidence,
        pareto_k=float(k),
        interpolation_error=error,
        evaluations=len(points.u),
        unsettled=points.unsettled,
    )


def _component_variances(
    model: Model, engine: Engine, points: _Points, index: np.ndarray, share: np.ndarray
) -> dict[str, np.ndarray]:
    """Posterior variance (n,) of each component, averaged over the evaluated points `index` with weights `share`."""
    total = {name: np.zeros(mean.shape[1]) for name, mean in points.means.items()}
    for i, w in zip(index, share, strict=True):
        sites = points.sites[torch.tensor([i], device=points.sites.shift.device)]
        with torch.no_grad():
            terms = model.terms(model.theta(torch.as_tensor(points.u[[i]]).to(sites.shift)))
            posterior = engine.condition(terms, sites)
            for term in terms:
                total[term.name] += w * posterior.component_variance(term)[0].cpu().numpy()
    return {name: np.maximum(x, 0.0) for name, x in total.items()}
