"""The mode of the hyperposterior, and its curvature there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cellfate.engines.base import Engine, Sites
from cellfate.errors import DataError
from cellfate.inference.free_energy import Evaluation, evaluate, evaluate_with_gradient, log_evidence
from cellfate.inference.sites import Rule
from cellfate.model.glmm import Model

MEMORY = 6e8  # bytes for the matrices of a batch of hyperparameter points
TIGHT = 1e-4  # of site updates where derivatives are taken
COARSE = 1e-3  # the same, far from the mode
LARGE_COARSE = 0.03  # the same, with many cells: what the free energy gains by an update, where they settle slowly far more is left
CONVERGED_GAIN = 1e-5  # nats that another step would bring
LONGEST_STEP = 1.0  # in units: of the response's scale for an sd, e-folds for a length-scale
MAX_STEPS, MAX_HALVINGS = 100, 12
LARGE = 6_000  # cells from which on a gradient is dear, and the posterior so narrow that less of it will do
LARGE_GAIN = (
    0.2  # nats that the last step, which is not looked back on, may bring there: by a curvature that is a guess
)
AGAIN = 0.3  # nats that a step by the curvature itself may still bring: above, the search goes on with that,
LOOKS = 2  # so often at most
PILOT_GAIN = 0.05  # nats that the last step may bring, where a mode is only where to begin from
FEW, THIN = 8, 4  # where fewer points than FEW fit in memory, a start is sought on one of THIN cells
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


def at_once(model: Model, engine: Engine) -> int:
    """Points evaluated as one batch: what memory allows, and one where a point is work enough, so that none waits for others."""
    return 1 if model.data.n > LARGE and model.data.offset.device.type == "cpu" else engine.points_at_once(MEMORY)


def repeat(sites: Sites, points: int) -> Sites:
    """The same sites at each of several points."""
    return Sites(sites.precision.expand(points, -1), sites.shift.expand(points, -1))


def _best_start(model: Model, engine: Engine, rule: Rule, first: Tensor) -> tuple[Tensor, Sites]:
    """The best of a few values of each kernel hyperparameter: the likelihood can have a mode in each of several length-scales."""
    points = [first]
    for i, parameter in enumerate(model.parameters):
        if (
            parameter.scale in ("log", "logit") and parameter.name not in model.own
        ):  # a kernel's: a length-scale, a rate, a weight
            low, high = parameter.bounds
            for share in SHAPES:
                points.append(first.clone())
                points[-1][i] = low + share * (high - low)
    best: tuple[float, Tensor, Sites] | None = None
    for part in torch.stack(points).split(engine.points_at_once(MEMORY)):
        here = evaluate(model, engine, model.theta(part), rule, tolerance=0.1)
        value = (here.free_energy + model.log_prior(part)).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        i = int(value.argmax())
        if best is None or float(value[i]) > best[0]:
            best = (float(value[i]), part[i], here.fit.sites[torch.tensor([i], device=part.device)])
    assert best is not None
    return best[1], best[2]


def _start(model: Model, engine: Engine, rule: Rule) -> tuple[Tensor, Sites]:
    """Where to begin. Where a point is dear, the mode for some of the cells is found first."""
    integrated = model.reml or not model.data.terms  # a flat slope may run away on a few cells
    if engine.points_at_once(MEMORY) >= FEW or not len(model.parameters) or not integrated:
        return _best_start(model, engine, rule, model.start())
    some = model.data.some(model.data.n // model.data.copies // THIN)
    thin = model.at(some)
    small = engine.at(thin.components, some)
    u = _ascend(thin, small, rule, *_start(thin, small, rule), PILOT_GAIN).u
    low, high = _bounds(model, u)
    u = torch.minimum(torch.maximum(u, low), high)
    u = not_absent(model, u)
    return u, evaluate(model, engine, model.theta(u[None]), rule, tolerance=0.1).fit.sites


def not_absent(model: Model, u: Tensor) -> Tensor:
    """A component that few of the cells do not show must be able to come back: at zero its gradient is zero."""
    floor = u.new_tensor([0.3 * p.start if p.scale == "sd" else -torch.inf for p in model.parameters])
    return torch.maximum(u, floor)


def _bounds(model: Model, u: Tensor) -> tuple[Tensor, Tensor]:
    low, high = ([p.bounds[side] for p in model.parameters] for side in (0, 1))  # empty where all are held
    return u.new_tensor(low), u.new_tensor(high)


def _unit(model: Model, u: Tensor) -> Tensor:
    """The natural step of each coordinate (d,)."""
    return u.new_tensor([p.start if p.scale == "sd" else 1.0 for p in model.parameters])


@dataclass(frozen=True)
class _Ascent:
    u: Tensor
    sites: Sites
    gradient: Tensor
    curvature: Tensor  # an approximation
    evaluations: int
    converged: bool
    message: str


@dataclass(frozen=True)
class _Point:
    """What is kept of an evaluation at one point."""

    log_evidence: float
    sites: Sites
    mean: Tensor  # (n,)
    log_variance: Tensor  # (n,)

    @staticmethod
    def of(model: Model, here: Evaluation, rule: Rule) -> _Point:
        posterior, value = here.posterior, float(log_evidence(model, here, rule))
        return _Point(value, here.fit.sites, posterior.mean[0], _log(posterior.variance[0]))


def _ascend(
    model: Model, engine: Engine, rule: Rule, u: Tensor, sites: Sites, enough: float, known: Tensor | None = None
) -> _Ascent:
    """BFGS from a curvature that is `known`, or an average-information matrix; each point is warm-started from the last."""
    unit, count, tolerance = _unit(model, u), 1, max(COARSE, LARGE_COARSE * (model.data.n > LARGE))
    low, high = _bounds(model, u)
    converged, message, idle = False, "too many steps", 0
    here, value, gradient = log_posterior(model, engine, u[None], rule, start=sites, tolerance=tolerance)
    curvature = _average_information(model, here, u) if known is None else known
    curvature = curvature * unit * unit[:, None]  # from here on in units
    sites = here.fit.sites
    del here  # its matrices are as large as those of the next point
    for _ in range(MAX_STEPS):
        slope = gradient[0] * unit
        free = _free(model, u, slope)
        step = torch.zeros_like(u)
        step[free] = torch.linalg.solve(curvature[free][:, free], slope[free])
        gain = 0.5 * float(slope @ step)
        if gain < enough and (tolerance <= TIGHT or enough > TIGHT):
            if enough > TIGHT:
                u = torch.minimum(torch.maximum(u + unit * step, low), high)
            converged, message = True, "converged"
            break
        if enough < LARGE_GAIN:
            tolerance = min(tolerance, max(TIGHT, COARSE * gain))
        step = step * min(1.0, LONGEST_STEP / max(float(step.abs().max()), 1e-300))
        for _ in range(MAX_HALVINGS):
            point = torch.minimum(torch.maximum(u + unit * step, low), high)
            there, its_value, its_gradient = log_posterior(
                model, engine, point[None], rule, start=sites, tolerance=tolerance
            )
            its_sites = there.fit.sites
            del there
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
        # two steps that change the value by less than its own accuracy: what is left is noise
        idle = idle + 1 if abs(float(its_value - value)) < tolerance <= TIGHT else 0
        if idle == 2:
            u, sites, gradient = point, its_sites, its_gradient
            converged, message = True, "converged"
            break
        curvature = _bfgs(curvature, (point - u) / unit, slope - its_gradient[0] * unit)
        u, sites, value, gradient = point, its_sites, its_value, its_gradient
    folded = torch.tensor([p.scale == "sd" for p in model.parameters], dtype=torch.bool, device=u.device) & (u < 0)
    sign = torch.where(folded, -1.0, 1.0).to(u)
    curvature = curvature * sign * sign[:, None] / (unit * unit[:, None])
    return _Ascent(sign * u, sites, sign * gradient[0], curvature, count, converged, message)


def find_mode(
    model: Model,
    engine: Engine,
    rule: Rule,
    *,
    start: Tensor | None = None,
    curvature: Tensor | None = None,
    gain: float | None = None,
) -> Mode:
    """Maximize free energy plus log prior, and differentiate twice there.

    `start` (d,) is where to begin; where another step would bring less than `gain` nats is near enough.
    """
    if start is None:
        u, sites = _start(model, engine, rule)
    else:
        low, high = _bounds(model, start)
        u = torch.minimum(torch.maximum(start, low), high)
        sites = evaluate(model, engine, model.theta(u[None]), rule, tolerance=0.1).fit.sites
    at_bound: tuple[str, ...] = ()
    count, converged, message = 1, True, "no hyperparameter to estimate"
    gradient, large = u, model.data.n > LARGE
    looks, known = 0, None if curvature is None else _steep(curvature)
    guess: Tensor | None = None
    while True:
        if len(u):
            enough = (LARGE_GAIN if large else CONVERGED_GAIN) if gain is None else gain
            found = _ascend(model, engine, rule, u, sites, enough, known)
            u, gradient, sites = found.u, found.gradient, found.sites
            curvature, guess = (found.curvature, None) if large and gain is not None else (None, found.curvature)
            count, converged, message = count + found.evaluations, found.converged, found.message
        if large and len(u) and gain is None:  # the last step was not looked back on
            there, _, slope = log_posterior(model, engine, u[None], rule, start=sites, tolerance=COARSE)
            here, gradient = _Point.of(model, there, rule), slope[0]
            del there  # its matrices are as large as those of the next points
        else:
            tolerance = LARGE_COARSE if large else TIGHT / 10
            there = evaluate(model, engine, model.theta(u[None]), rule, start=sites, tolerance=tolerance)
            here = _Point.of(model, there, rule)
        hessian, mean_slope, log_variance_slope = _derivatives(
            model, engine, rule, u, here, gradient, curvature, guess if large else None
        )
        if guess is not None and not bool(hessian.isfinite().all()):
            # next to the mode a gradient overflowed: the search knows the curvature roughly
            hessian, converged, message = guess, False, "next to the mode a number overflowed"
        if not bool(hessian.isfinite().all()):
            raise DataError(
                "the search for the mode met no finite number: the response or its offset is extreme, such as a probability of 1e-20. "
                "Move such values inwards, or leave those cells out."
            )
        # along a ridge the search's guess of the curvature can be several times what it is, and have ended it early
        looks += 1
        enough_looks = not large or gain is not None or not len(u) or looks > LOOKS
        if enough_looks or _promised(hessian, gradient, _free(model, u, gradient)) < AGAIN:
            break
        known, sites = _steep(hessian), here.sites
    bounds = zip(model.parameters, u, *_bounds(model, u), strict=True)
    at_bound = tuple(
        p.name for p, x, a, b in bounds if p.scale != "sd" and (float(x - a) < 1e-3 or float(b - x) < 1e-3)
    )
    return Mode(
        u=u,
        free_energy=here.log_evidence,
        log_posterior=here.log_evidence + float(model.log_prior(u[None])),
        curvature=hessian,
        sites=here.sites,
        mean=here.mean,
        log_variance=here.log_variance,
        mean_slope=mean_slope,
        log_variance_slope=log_variance_slope,
        at_bound=at_bound,
        evaluations=count,
        converged=converged,
        message=message,
    )


def _steep(curvature: Tensor) -> Tensor:
    """The same with every direction curved downward, as much as it is curved at all."""
    values, vectors = torch.linalg.eigh(curvature)
    return (vectors * values.abs().clamp(min=1e-3 * float(values.abs().max()))) @ vectors.mT


def _free(model: Model, u: Tensor, slope: Tensor) -> Tensor:
    """Which coordinates (d,) may follow their slope: at a bound there is no way further out."""
    low, high = _bounds(model, u)
    return ~((u <= low) & (slope < 0) | (u >= high) & (slope > 0))


def _promised(curvature: Tensor, slope: Tensor, free: Tensor) -> float:
    """Nats that a Newton step would bring along the coordinates that are free; infinite where there is no maximum near."""
    if not bool(free.any()):
        return 0.0
    values, vectors = torch.linalg.eigh(curvature[free][:, free])
    if float(values[0]) <= 0:
        return float("inf")
    return 0.5 * float(((vectors.mT @ slope[free]).square() / values).sum())


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
    floor = u.new_tensor([0.5 if p.scale == "sd" else 1.0 for p in model.parameters])
    unit = _unit(model, u)
    columns = u.new_zeros(here.posterior.mean.shape[-1], d)
    half = u.new_full((d,), 0.5)
    offsets, (low, high) = 1e-4 * torch.diag(unit), _bounds(model, u)

    def prior_times_b(at: Tensor) -> Tensor:
        terms = model.terms(model.theta(at[None]))
        return sum((here.posterior.component_mean(term)[0] for term in terms), start=u.new_zeros(()))

    with torch.no_grad():
        for i, parameter in enumerate(model.parameters):
            if parameter.scale == "real":
                columns[:, i], half[i] = model.data.design[:, model.data.terms.index(parameter.name[5:-1])], 1.0
            elif parameter.name == "sd_residual":
                columns[:, i] = 2 * torch.exp(2 * u[i]) * b[0]
            elif parameter.name not in model.own:
                up, down = torch.minimum(u + offsets[i], high), torch.maximum(u - offsets[i], low)
                columns[:, i] = (prior_times_b(up) - prior_times_b(down)) / (up - down)[i]
        information = (columns.mT @ here.posterior.residual(columns[None])[0]) * torch.sqrt(half[:, None] * half)
    return information + torch.diag(floor / unit.square())


def _log(variance: Tensor) -> Tensor:
    """Of a cell without prior variance, too: it does not move."""
    return variance.clamp(min=torch.finfo(variance.dtype).tiny).log()


def _derivatives(
    model: Model,
    engine: Engine,
    rule: Rule,
    u: Tensor,
    here: _Point,
    gradient: Tensor,
    curvature: Tensor | None = None,
    guess: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Negative Hessian of the log posterior and slopes of the posterior moments, by one-sided differences as one batch.

    A `curvature` that is good enough is taken as it is; steps are no longer than a `guess` of it says that a posterior sd is.
    """
    d, n = len(u), model.data.n
    step = 0.02 * _unit(model, u)
    if guess is not None:
        step = torch.minimum(step, guess.diagonal().clamp(min=1e-12).rsqrt())
    step = torch.where(u + step > _bounds(model, u)[1], -step, step)  # beyond a bound there may be nothing
    gradients, means, variances = [u.new_zeros(0, d)], [u.new_zeros(0, n)], [u.new_zeros(0, n)]
    for part in (u + torch.diag(step)).split(at_once(model, engine)) if d else ():
        start = repeat(here.sites, len(part))
        if curvature is None:
            there, _, slope = log_posterior(model, engine, part, rule, start=start, tolerance=3 * COARSE)
            gradients.append(slope)
        else:
            there = evaluate(model, engine, model.theta(part), rule, start=start, tolerance=LARGE_COARSE)
        means.append(there.posterior.mean)
        variances.append(_log(there.posterior.variance))
        del there
    m = (torch.cat(means) - here.mean) / step[:, None]
    v = (torch.cat(variances) - here.log_variance) / step[:, None]
    if curvature is None:
        g = (torch.cat(gradients) - gradient) / step[:, None]
        curvature = -(g + g.mT) / 2
    return curvature, m, v
