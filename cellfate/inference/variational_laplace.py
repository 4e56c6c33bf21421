"""The only loop: sites and Gaussian posterior in turn, until they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from cellfate.engines.base import Engine, Posterior, Sites
from cellfate.inference.anderson import Anderson
from cellfate.inference.sites import Likelihood, Rule, Update
from cellfate.kernels.base import Term

SMALLEST_STEP = 1e-4


class Status(IntEnum):
    """How the updates of one point ended."""

    CONVERGED = 0
    MAX_UPDATES = 1
    STALLED = 2
    FAILED = 3

    @property
    def sentence(self) -> str:
        return {
            Status.CONVERGED: "converged",
            Status.MAX_UPDATES: "the site updates were stopped before they settled",
            Status.STALLED: "no step raised the free energy any further",
            Status.FAILED: "a number overflowed; the response or its offset may be extreme",
        }[self]


@dataclass(frozen=True)
class Fit:
    """Sites and posterior at a batch of points, with the number of updates and a status for each (points,).

    `drift` is the change that further updates are expected to make to the free energy.
    """

    sites: Sites
    posterior: Posterior
    status: Tensor
    updates: Tensor
    drift: Tensor


def fit_sites(
    engine: Engine,
    terms: Sequence[Term],
    likelihood: Likelihood,
    rule: Rule,
    start: Sites,
    *,
    tolerance: float = 1e-7,
    max_updates: int = 200,
) -> Fit:
    """Update sites until what is left to do is less than `tolerance`: of means in posterior sds, of variances in themselves,
    of the free energy in nats.

    A step must raise the rule's objective; where it does not it is halved. Points leave the batch as they converge, so that the
    answer at a point does not depend on its company.
    """
    tolerance = max(tolerance, 1e3 * torch.finfo(start.precision.dtype).eps)  # beyond it a float32 posterior is noise
    smallest = torch.finfo(start.precision.dtype).tiny
    prior = engine.prepare(terms)
    points = start.precision.shape[0]
    device = start.precision.device
    active = torch.arange(points, device=device)
    sites, status = start, torch.full((points,), int(Status.MAX_UPDATES), device=device)
    updates = torch.zeros(points, dtype=torch.long, device=device)

    def condition(index: Tensor, at: Sites) -> Posterior:
        whole = len(index) == points
        return engine.condition(terms, at, prior if whole else engine.select(prior, index))

    posterior = condition(active, start)
    state = rule.update(likelihood, posterior)
    left, drift = _left_to_do(rule, likelihood, posterior, state.target, tolerance)
    settled = left < tolerance
    status[settled] = int(Status.CONVERGED)
    if bool(settled.all()):
        return Fit(start, posterior, status, updates, drift)
    active = active[~settled]
    now, mean, variance = start[active], posterior.mean[active], posterior.variance[active]
    state = Update(state.target[active], state.objective[active])
    step = torch.full_like(state.objective, rule.first_step)
    last = torch.full_like(step, torch.inf)
    past = Anderson()
    for _ in range(max_updates):
        proposal = _accelerated(past, now, state.target, step)
        posterior = condition(active, proposal)
        candidate = rule.update(likelihood[active], posterior)
        scale = posterior.variance.clamp(min=smallest)  # a cell without prior variance does not move
        moved = ((posterior.mean - mean).abs() / scale.sqrt()).amax(-1)
        moved = torch.maximum(moved, ((posterior.variance - variance).abs() / scale).amax(-1)) / step
        finite = candidate.objective.isfinite() & moved.isfinite()
        if rule.monotone:
            slack = 1e-9 * (1 + state.objective.abs())
            # for the last digits the objective is flat, and rounding would refuse good steps
            accepted = finite & ((candidate.objective >= state.objective - slack) | (moved < likelihood.family.flat))
            accepted |= finite & ~state.objective.isfinite()
            step_next = torch.where(accepted, (2 * step).clamp(max=1.0), step / 2)
        else:
            accepted = finite
            step_next = torch.where(finite & (moved < 2 * last), step, step / 2)
        past.forget(~accepted)
        updates[active] += 1
        now = proposal.where(accepted, now)
        target = candidate.target.where(accepted, state.target)
        objective = torch.where(accepted, candidate.objective, state.objective)
        mean = torch.where(accepted[:, None], posterior.mean, mean)
        variance = torch.where(accepted[:, None], posterior.variance, variance)
        last = torch.where(accepted, moved, last)
        left, its_drift = _left_to_do(rule, likelihood[active], posterior, candidate.target, tolerance)
        done = accepted & (left < tolerance)
        drift = drift.index_copy(0, active, torch.where(done, its_drift, 0.0))
        stalled = ~done & (step_next < SMALLEST_STEP)
        status[active[done]] = int(Status.CONVERGED)
        lost = stalled & ~objective.isfinite()
        status[active[stalled]] = int(Status.STALLED)
        status[active[lost]] = int(Status.FAILED)
        sites = _put(sites, active, now)
        going = ~(done | stalled)
        state = Update(target[going], objective[going])
        if not bool(going.any()):
            whole = len(active) == points and bool(accepted.all())
            posterior = posterior if whole else condition(torch.arange(points, device=device), sites)
            return Fit(sites, posterior, status, updates, drift)
        past.select(going)
        active, now, step, last = active[going], now[going], step_next[going], last[going]
        mean, variance = mean[going], variance[going]
    return Fit(sites, condition(torch.arange(points, device=device), sites), status, updates, drift)


def _accelerated(past: Anderson, now: Sites, target: Sites, step: Tensor) -> Sites:
    """A fraction `step` (points,) of the accelerated way from `now` to `target`; precisions stay positive."""
    n = now.shift.shape[-1]
    x = torch.cat([now.precision, now.shift], -1)
    change = past.propose(x, torch.cat([target.precision, target.shift], -1) - x)
    x = x + step[:, None] * change
    # no precision falls by more than ten times at once: an extrapolation may overshoot zero
    return Sites(torch.maximum(x[:, :n], 0.1 * torch.minimum(now.precision, target.precision)), x[:, n:])


def _left_to_do(
    rule: Rule, likelihood: Likelihood, posterior: Posterior, target: Sites, tolerance: float
) -> tuple[Tensor, Tensor]:
    """About how much (points,) the next update will change, without doing it, and what of it the free energy feels.

    Means and variances count by their root mean square over cells: a single cell that is far off is felt by the free energy. What it
    feels is only asked for where they are within `tolerance` at one point at least.
    """
    pull = target.shift - target.precision * posterior.mean - posterior.weights
    mean_step = posterior.smooth(pull[..., None])[..., 0]
    shrinkage = (target.precision - posterior.sites.precision) * posterior.variance
    smallest = torch.finfo(mean_step.dtype).tiny
    of_means = (mean_step.square() / posterior.variance.clamp(min=smallest)).mean(-1).sqrt()
    left = torch.maximum(of_means, shrinkage.square().mean(-1).sqrt())
    if not bool((left < tolerance).any()):
        return left, torch.zeros_like(left)
    drift = rule.drift(likelihood, posterior, mean_step, -shrinkage * posterior.variance)
    if rule.monotone:
        drift = drift + 0.5 * (pull * mean_step).sum(-1)
    return torch.maximum(left, drift.abs()), drift


def _put(sites: Sites, index: Tensor, values: Sites) -> Sites:
    return Sites(sites.precision.index_copy(0, index, values.precision), sites.shift.index_copy(0, index, values.shift))
