"""The mode of the hyperposterior, and its curvature there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cellfate.engines.base import Engine, Sites
from cellfate.inference.free_energy import Evaluation, evaluate, evaluate_with_gradient
from cellfate.inference.sites import Rule
from cellfate.model.glmm import Model

MEMORY = 6e8  # bytes for the matrices of a batch of hyperparameter points
TIGHT = 1e-5  # of site updates where derivatives are taken
COARSE = 1e-3  # the same, far from the mode
CONVERGED_GAIN = 1e-7  # nats that another step would bring
LONGEST_STEP = 1.0  # in units: of the response's scale for an sd, e-folds for a length-scale
MAX_STEPS, MAX_HALVINGS = 100, 12
SHAPES = (0.25, 0.75)  # where between its bounds a kernel's hyperparameter is tried too


@dataclass(frozen=True)
class Mode:
    """Maximum of free energy plus log prior: coordinates u (d,), curvature (d, d), the sites there."""

    u: Tensor
    free_energy: float
    log_posterior: float
    curvature: Tensor  # negative second derivative of the log posterior
    sites: Sites
    mean: Tensor  # (n,) of the latent field
    log_variance: Tensor  # (n,)
    mean_slope: Tensor  # (d, n), derivative of `mean` in u
    log_variance_slope: Tensor  # (d, n)
    at_bound: tuple[str, ...]
    evaluations: int
    converged: bool
    message: str


def log_posterior(
    model: Model, engine: Engine, u: Tensor, rule: Rule, *, start: Sites | None, tolerance: float
) -> tuple[Evaluation, Tensor, Tensor]:
    """Evaluation, log posterior (points,) and its gradient (points, d) at u (points, d)."""
    here = evaluate_with_gradient(model, engine, u, rule, start=start, tolerance=tolerance)
    leaf = u.detach().requires_grad_(True)
    with torch.enable_grad():
        prior = model.log_prior(leaf)
        (slope,) = torch.autograd.grad(prior.sum(), leaf)
    assert here.gradient is not None
    return here, here.free_energy + prior.detach(), here.gradient + slope


def repeat(sites: Sites, points: int) -> Sites:
    return Sites(sites.precision.expand(points, -1), sites.shift.expand(points, -1))


def _starts(model: Model, engine: Engine, rule: Rule) -> tuple[Tensor, Sites]:
    """The best of a few values of each kernel hyperparameter: the likelihood can have a mode in each of several length-scales."""
    start = model.start()
    points = [start]
    for i, parameter in enumerate(model.parameters):
        if parameter.shapes_kernel:
            low, high = parameter.bounds
            for share in SHAPES:
                points.append(start.clone())
                points[-1][i] = low + share * (high - low)
    best: tuple[float, Tensor, Sites] | None = None
    for part in torch.stack(points).split(engine.points_at_once(MEMORY)):
        here = evaluate(model, engine, model.theta(part), rule, tolerance=1e-2)
        value = (here.free_energy + model.log_prior(part)).nan_to_num(nan=-torch.inf)
        i = int(value.argmax())
        if best is None or float(value[i]) > best[0]:
            best = (float(value[i]), part[i], here.fit.sites[torch.tensor([i])])
    assert best is not None
    return best[1], best[2]


def find_mode(model: Model, engine: Engine, rule: Rule) -> Mode:
    """Ascend free energy plus log prior: BFGS from an average-information matrix, each point warm-started from the last."""
    u, sites = _starts(model, engine, rule)
    d, count = len(u), 1
    unit = torch.tensor([p.start if p.scale == "sd" else 1.0 for p in model.parameters]).to(u)
    low, high = (torch.tensor(b).to(u) for b in zip(*(p.bounds for p in model.parameters), strict=True)) if d else (u, u)
    converged, message, tolerance = not d, "no hyperparameter to estimate" if not d else "too many steps", COARSE
    here, value, gradient = log_posterior(model, engine, u[None], rule, start=sites, tolerance=tolerance)
    curvature = _average_information(model, here, u) * unit * unit[:, None]  # from here on in units
    for _ in range(MAX_STEPS if d else 0):
        slope = gradient[0] * unit
        free = ~((u <= low) & (slope < 0) | (u >= high) & (slope > 0))
        step = torch.zeros_like(u)
        step[free] = torch.linalg.solve(curvature[free][:, free], slope[free])
        gain = 0.5 * float(slope @ step)
        if gain < CONVERGED_GAIN and tolerance <= TIGHT:
            converged, message = True, "converged"
            break
        tolerance = min(tolerance, max(TIGHT, COARSE * gain))
        step = step * min(1.0, LONGEST_STEP / max(float(step.abs().max()), 1e-300))
        for _ in range(MAX_HALVINGS):
            point = torch.minimum(torch.maximum(u + unit * step, low), high)
            there, its_value, its_gradient = log_posterior(
                model, engine, point[None], rule, start=here.fit.sites, tolerance=tolerance
            )
            count += 1
            expected = float(slope @ ((point - u) / unit))
            finite = bool(its_value.isfinite()) and bool(its_gradient.isfinite().all())
            # a value is known no better than the tolerance of its site updates
            if finite and float(its_value - value) >= 1e-4 * expected - tolerance - 1e-9 * abs(float(value)):
                break
            step = step / 3
        else:
            converged, message = gain < 1e-3, "no step raises the free energy any further"
            break
        curvature = _bfgs(curvature, (point - u) / unit, slope - its_gradient[0] * unit)
        u, here, value, gradient = point, there, its_value, its_gradient
    u = torch.where(torch.tensor([p.scale == "sd" for p in model.parameters], device=u.device, dtype=torch.bool), u.abs(), u)
    final = evaluate(model, engine, model.theta(u[None]), rule, start=here.fit.sites, tolerance=TIGHT / 10)
    at_bound = tuple(
        p.name
        for p, x, a, b in zip(model.parameters, u, low, high, strict=True)
        if p.scale != "sd" and (float(x - a) < 1e-3 or float(b - x) < 1e-3)
    )
    hessian, mean_slope, log_variance_slope = _derivatives(model, engine, rule, u, final.fit.sites, unit)
    return Mode(
        u=u,
        free_energy=float(final.free_energy),
        log_posterior=float(final.free_energy + model.log_prior(u[None])),
        curvature=hessian,
        sites=final.fit.sites,
        mean=final.posterior.mean[0],
        log_variance=final.posterior.variance[0].log(),
        mean_slope=mean_slope,
        log_variance_slope=log_variance_slope,
        at_bound=at_bound,
        evaluations=count,
        converged=converged,
        message=message,
    )


def _bfgs(curvature: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """Update of the curvature that keeps it positive definite (Powell's damping)."""
    along = curvature @ step
    norm, agreed = float(step @ along), float(step @ change)
    if norm <= 0:
        return curvature
    if agreed < 0.2 * norm:
        change = torch.lerp(along, change, 0.8 * norm / (norm - agreed))
        agreed = float(step @ change)
    return curvature - torch.outer(along, along) / norm + torch.outer(change, change) / agreed


def _average_information(model: Model, here: Evaluation, u: Tensor) -> Tensor:
    """Average of observed and expected information (d, d) at fixed sites, `b' dK R dK b / 2`, as in AI-REML (Gilmour et al. 1995).

    Only a first guess of the curvature: a floor stands in for the prior and for what the sites hide.
    """
    d, b = len(u), here.posterior.weights
    floor = torch.tensor([0.5 if p.scale == "sd" else 1.0 for p in model.parameters]).to(u)
    unit = torch.tensor([p.start if p.scale == "sd" else 1.0 for p in model.parameters]).to(u)
    columns = u.new_zeros(here.posterior.mean.shape[-1], d)
    half = u.new_full((d,), 0.5)
    offsets = 1e-4 * torch.diag(unit)

    def prior_times_b(at: Tensor) -> Tensor:
        terms = model.terms(model.theta(at[None]))
        return sum((here.posterior.component_mean(term)[0] for term in terms), start=u.new_zeros(()))

    with torch.no_grad():
        for i, parameter in enumerate(model.parameters):
            if parameter.scale == "real":
                columns[:, i], half[i] = model.data.design[:, model.data.terms.index(parameter.name[5:-1])], 1.0
            elif parameter.name == "sd_residual":
                columns[:, i] = 2 * torch.exp(2 * u[i]) * b[0]
            elif parameter.name != model.family.parameter:
                columns[:, i] = (prior_times_b(u + offsets[i]) - prior_times_b(u - offsets[i])) / (2 * offsets[i, i])
        information = (columns.mT @ here.posterior.residual(columns[None])[0]) * torch.sqrt(half[:, None] * half)
    return information + torch.diag(floor / unit.square())


def _derivatives(
    model: Model, engine: Engine, rule: Rule, u: Tensor, sites: Sites, unit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Negative Hessian of the log posterior and slopes of the posterior moments, by central differences as one batch."""
    d, n = len(u), model.data.n
    step = 0.02 * unit
    offsets = torch.diag(step)
    points = torch.cat([u + offsets, u - offsets])
    gradients, means, variances = [u.new_zeros(0, d)], [u.new_zeros(0, n)], [u.new_zeros(0, n)]
    for part in points.split(engine.points_at_once(MEMORY)) if d else ():
        start = repeat(sites, len(part))
        here, _, gradient = log_posterior(model, engine, part, rule, start=start, tolerance=TIGHT)
        gradients.append(gradient)
        means.append(here.posterior.mean)
        variances.append(here.posterior.variance.log())
    g, m, v = (torch.cat(x) for x in (gradients, means, variances))
    g, m, v = ((x[:d] - x[d:]) / (2 * step[:, None]) for x in (g, m, v))
    return -(g + g.mT) / 2, m, v
