"""The mode of the hyperposterior, and its curvature there."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from cellfate.engines.base import Engine, Sites
from cellfate.inference.free_energy import Evaluation, evaluate, evaluate_with_gradient
from cellfate.inference.sites import Rule
from cellfate.model.glmm import Model
from cellfate.model.priors import Parameter

MEMORY = 6e8  # bytes for the matrices of a batch of hyperparameter points
TIGHT = 1e-6  # of site updates where derivatives are taken
SHAPES = (0.25, 0.5, 0.75)  # where between its bounds a kernel's hyperparameter is tried first


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
    """The best of a few values of each kernel hyperparameter; the likelihood can have a mode in each of several length-scales."""
    start = model.start()
    shapes = [i for i, p in enumerate(model.parameters) if p.scale in ("log", "logit") and "_" in p.name and _is_shape(p)]
    if not shapes:
        points = start[None]
    else:
        grids = []
        for i in shapes:
            low, high = model.parameters[i].bounds
            grids.append([low + share * (high - low) for share in SHAPES])
        points = start.repeat(len(SHAPES) ** len(shapes), 1)
        for row, values in enumerate(itertools.product(*grids)):
            points[row, shapes] = torch.tensor(values, dtype=start.dtype)
    best: tuple[float, Tensor, Sites] | None = None
    for part in points.split(engine.points_at_once(MEMORY)):
        here = evaluate(model, engine, model.theta(part), rule, tolerance=1e-2)
        value = (here.free_energy + model.log_prior(part)).nan_to_num(nan=-torch.inf)
        i = int(value.argmax())
        if best is None or float(value[i]) > best[0]:
            best = (float(value[i]), part[i], here.fit.sites[torch.tensor([i])])
    assert best is not None
    return best[1], best[2]


def _is_shape(parameter: Parameter) -> bool:
    return not parameter.name.startswith("sd_")


def find_mode(model: Model, engine: Engine, rule: Rule) -> Mode:
    """Quasi-Newton ascent of free energy plus log prior, each evaluation warm-started from the last."""
    u, sites = _starts(model, engine, rule)
    d, count = len(u), 0
    scale = np.array([p.start if p.scale == "sd" else 1.0 for p in model.parameters])
    best: dict[str, object] = {"value": -np.inf, "u": u, "sites": sites}

    def negative(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal sites, count
        count += 1
        point = torch.as_tensor(x * scale, dtype=u.dtype, device=u.device)[None]
        here, value, gradient = log_posterior(model, engine, point, rule, start=sites, tolerance=TIGHT)
        if not bool(value.isfinite()) or not bool(gradient.isfinite().all()):
            return 1e10, np.zeros_like(x)
        sites = here.fit.sites
        if float(value) > best["value"]:  # type: ignore[operator]
            best.update(value=float(value), u=point[0], sites=sites)
        return -float(value), -gradient[0].cpu().numpy() * scale

    converged, message = True, "no hyperparameter to estimate"
    if d:
        bounds = [(low / s, high / s) for (low, high), s in zip((p.bounds for p in model.parameters), scale, strict=True)]
        found = minimize(
            negative, u.cpu().numpy() / scale, jac=True, method="L-BFGS-B", bounds=bounds,
            options={"maxiter": 200, "ftol": 1e-10, "gtol": 1e-4, "maxls": 30},
        )  # fmt: skip
        converged, message = bool(found.success), str(found.message)
        u, sites = best["u"], best["sites"]  # type: ignore[assignment]
    u = torch.where(torch.tensor([p.scale == "sd" for p in model.parameters], device=u.device), u.abs(), u)
    here = evaluate(model, engine, model.theta(u[None]), rule, start=sites, tolerance=TIGHT / 10)
    value = float(here.free_energy + model.log_prior(u[None]))
    curvature, mean_slope, log_variance_slope = _derivatives(model, engine, rule, u, here.fit.sites, scale)
    at_bound = tuple(
        p.name
        for p, x in zip(model.parameters, u.tolist(), strict=True)
        if p.scale != "sd" and any(abs(x - b) < 1e-3 for b in p.bounds)
    )
    mean, log_variance = here.posterior.mean[0], here.posterior.variance[0].log()
    return Mode(
        u, float(here.free_energy), value, curvature, here.fit.sites, mean, log_variance, mean_slope, log_variance_slope,
        at_bound, count, converged, message,
    )  # fmt: skip


def _derivatives(
    model: Model, engine: Engine, rule: Rule, u: Tensor, sites: Sites, scale: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Negative Hessian of the log posterior and slopes of the posterior moments, by central differences as one batch."""
    d, n = len(u), model.data.n
    step = 0.02 * torch.as_tensor(scale, dtype=u.dtype, device=u.device)
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
