"""Leave one cell out: how well each cell is predicted by all others, without fitting anything again.

At given hyperparameters the posterior without a cell is the posterior without its site, the cavity of expectation propagation, exact for
gaussian fates (Vehtari et al. 2016). Draws of the hyperparameters are reweighted, cell by cell, to what they would be without it,
with Pareto-smoothed importance weights (Vehtari, Gelman & Gabry 2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import logsumexp

from cellfate._runtime import progress
from cellfate.engines.base import Engine
from cellfate.inference.free_energy import evaluate, likelihood_at
from cellfate.inference.importance import pareto_smooth
from cellfate.inference.mode import MEMORY
from cellfate.inference.predict import Draws, spread
from cellfate.inference.sites import Rule, cavity
from cellfate.model.families import quadrature
from cellfate.model.glmm import Model, Theta

NODES = 120
SETTLED = 1e-4  # of site updates, in posterior sds
CHUNK = 2**20  # cells x nodes at once


@dataclass(frozen=True)
class Loo:
    """Expected log predictive density of each cell given the others (n,), and the largest k-hat of the weights."""

    each: np.ndarray
    pareto_k: float

    @property
    def total(self) -> float:
        return float(self.each.sum())


def error_of(difference: np.ndarray) -> float:
    """Standard error of a sum over cells (n,). Cells are not independent: it is somewhat too small."""
    return float(np.sqrt(len(difference)) * difference.std(ddof=1))


@torch.no_grad()
def leave_one_out(
    model: Model, engine: Engine, rule: Rule, draws: Draws, *, count: int, rng: np.random.Generator
) -> Loo:
    """For `count` of the draws of the hyperparameters."""
    values = model.from_draws(draws)
    chosen = spread(values, int(count), rng) if values else np.zeros(1, dtype=np.int64)
    theta, points = model.from_natural({name: x[chosen] for name, x in values.items()})
    found = []
    for rows in progress(
        torch.arange(points).split(engine.points_at_once(MEMORY)), desc="leaving cells out", unit="batch"
    ):
        beta = None if theta.beta is None else theta.beta[rows]
        at = Theta({name: x[rows] for name, x in theta.values.items()}, beta)
        here = evaluate(model, engine, at, rule, tolerance=SETTLED)
        likelihood = likelihood_at(model, at)
        mean, variance = cavity(here.posterior)
        mean = mean + likelihood.shift
        z, w = quadrature(mean, NODES)
        phi = None if likelihood.phi is None else model.family.beside_nodes(likelihood.phi)
        out = torch.empty_like(mean)
        for cells in torch.arange(model.data.n).split(max(1, CHUNK // (len(z) * len(mean)))):
            eta = mean[:, cells, None] + variance[:, cells].sqrt()[..., None] * z
            f = model.family.log_prob(likelihood.outcome.at(cells).beside_nodes, eta, phi)
            out[:, cells] = torch.logsumexp(torch.log(w) + f, -1)
        found.append(out.cpu().numpy())
    log_p = np.concatenate(found)  # (draws, n)
    if len(log_p) == 1:
        return Loo(log_p[0], float("nan"))
    each, worst = np.empty(log_p.shape[1]), -np.inf
    for i, column in enumerate(log_p.T):
        weight, k = pareto_smooth(-column)  # p(theta | others) is p(theta | all) / p(y_i | others, theta)
        each[i] = logsumexp(weight + column)
        worst = max(worst, k) if np.isfinite(k) else worst
    return Loo(each, float(worst))
