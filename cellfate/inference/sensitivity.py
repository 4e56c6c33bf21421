"""How far an answer leans on its priors: what it would be under a prior, or a likelihood, raised to a power a little off 1.

Power-scaling (Kallioinen et al. 2024): draws are reweighted by density^(power - 1), and the distance between the distribution of a
quantity before and after, per doubling of the power, says how sensitive it is. The distance is that of Nguyen & Vreeken (2015), from
cumulative distributions, between 0 and 1. Hyperparameters only: fields and fixed effects are integrated out.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from cellfate._runtime import progress
from cellfate.engines.base import Engine
from cellfate.inference.free_energy import evaluate, log_evidence
from cellfate.inference.mode import MEMORY
from cellfate.inference.sites import Rule
from cellfate.model.glmm import Model, Theta

POWER = 1.01
SETTLED = 1e-3  # of site updates, in posterior sds
THRESHOLD = 0.05  # from which on a quantity is said to be sensitive


@torch.no_grad()
def log_densities(model: Model, engine: Engine, rule: Rule, theta: Theta, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Log prior density and log marginal likelihood (points,) at hyperparameters, each up to a constant."""
    prior = np.zeros(points)
    for p in model.parameters:
        if p.name in theta.values:
            prior += p.prior.log_density(theta.values[p.name]).cpu().numpy()
    likelihood = []
    for rows in progress(torch.arange(points).split(engine.points_at_once(MEMORY)), desc="likelihood", unit="batch"):
        beta = None if theta.beta is None else theta.beta[rows]
        some = Theta({name: x[rows] for name, x in theta.values.items()}, beta)
        here = evaluate(model, engine, some, rule, tolerance=SETTLED)
        likelihood.append(log_evidence(model, here, rule).cpu().numpy())
    return prior, np.concatenate(likelihood)


def sensitivity(x: np.ndarray, log_density: np.ndarray) -> float:
    """Distance (Jensen-Shannon, cumulative) that draws x (s,) move by, per doubling of the power of a density."""
    moved = 0.0
    for power in (POWER, 1 / POWER):
        log_weight = (power - 1) * (log_density - log_density.max())
        weight = np.exp(log_weight)
        weight /= weight.sum()
        moved += max(_distance(x, weight), _distance(-x, weight))
    return moved / (2 * math.log2(POWER))


def _distance(x: np.ndarray, weight: np.ndarray) -> float:
    """Between the distribution of draws and of the same draws weighted."""
    order = np.argsort(x)
    width, p = np.diff(x[order]), (np.arange(len(x)) + 1.0)[:-1] / len(x)
    q = np.cumsum(weight[order])[:-1]
    middle = (p + q) / 2
    above = width @ (p * np.log2(p / middle)) + (width @ (q - p)) / (2 * math.log(2))
    below = width @ (q * np.log2(q / middle)) + (width @ (p - q)) / (2 * math.log(2))
    bound = width @ (p + q)
    return math.sqrt(max((above + below) / bound, 0.0)) if bound > 0 else 0.0


def diagnosis(prior: float, likelihood: float) -> str:
    """What the two sensitivities say together."""
    if prior < THRESHOLD:
        return "the prior hardly matters"
    return "the prior decides with the data" if likelihood >= THRESHOLD else "the prior decides, the data say little"
