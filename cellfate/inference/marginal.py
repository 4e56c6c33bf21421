"""Population effects: what a population of cells would show under a scenario, whatever its ancestry and place.

A coefficient of a nonlinear mixed model speaks of one cell, with its effects held. A population mixes cells whose effects differ,
and the mean of a curve is not the curve at the mean: on the scale of the fate the difference is smaller than the coefficient says.
So each cell is predicted under each scenario with its random effects integrated out under their prior, and the predictions are
averaged (marginal standardization; Muller & MacLehose 2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cellfate._runtime import progress
from cellfate.engines.base import Engine, Sites
from cellfate.errors import DataError
from cellfate.inference.mode import MEMORY
from cellfate.inference.predict import Draws, focused, spread
from cellfate.kernels.base import Term
from cellfate.model.families import quadrature
from cellfate.model.glmm import FIXED, Model, Theta

NODES = 40
CHUNK = 2**20  # cells x nodes at once


def prior_variance(engine: Engine, terms: Sequence[Term], n: int, like: Tensor) -> Tensor:
    """Variance (points, n) that the random effects give each cell before any data."""
    random = [term for term in terms if term.name != FIXED]
    points = max([term.variance.shape[0] for term in random], default=1)
    nothing = like.new_zeros(points, n)
    return engine.condition(random, Sites(nothing, nothing)).variance if random else nothing


@torch.no_grad()
def standardized(
    model: Model,
    engine: Engine,
    draws: Draws,
    beta: np.ndarray,
    designs: Sequence[np.ndarray],
    *,
    count: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Mean response (draws, scenarios) over the cells, for `count` of the draws.

    beta: fixed effects (all draws, p) of the columns of each of the `designs` (n, p). Gaussian, bernoulli, beta and count fates: the
    expected response; binomial: the probability.
    """
    values = model.from_draws(draws)
    if not isinstance(count, int | np.integer) or count < 2:
        raise DataError(f"draws is {count!r}, wanted how many posterior draws to average over, such as 200.")
    joint = {**values, **{f"beta{j}": column for j, column in enumerate(beta.T)}}
    chosen = spread(joint, int(count), rng)
    theta, points = model.from_natural({name: x[chosen] for name, x in values.items()})
    engine = focused(engine, theta)
    like = model.data.offset
    b = torch.as_tensor(beta[chosen]).to(like)
    x = [torch.as_tensor(design).to(like) for design in designs]
    out = like.new_empty(points, len(x))
    with progress(total=points, desc="scenarios", unit="draw") as bar:
        for rows in torch.arange(points).split(engine.points_at_once(MEMORY)):
            at = Theta({name: value[rows.to(like.device)] for name, value in theta.values.items()}, None)
            variance = prior_variance(engine, model.terms(at), model.data.n, like)
            for k, design in enumerate(x):
                eta = model.data.offset + b[rows] @ design.mT
                out[rows, k] = mean_response(model, eta, variance.expand_as(eta)).mean(-1)
            bar.update(len(rows))
    return out.cpu().numpy()


def mean_response(model: Model, eta: Tensor, variance: Tensor) -> Tensor:
    """E g^-1(eta + N(0, variance)) for each cell (points, n)."""
    z, w = quadrature(eta, NODES)
    out = torch.empty_like(eta)
    for cells in torch.arange(eta.shape[-1], device=eta.device).split(max(1, CHUNK // (len(z) * len(eta)))):
        spread_ = variance[:, cells].sqrt()[..., None] * z
        out[:, cells] = model.family.inverse_link(eta[:, cells, None] + spread_) @ w
    return out
