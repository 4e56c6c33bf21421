"""Effects where there is no cell, after a fit: what an engine says at some draws of the hyperparameters, put together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from cellfate._runtime import progress
from cellfate.engines.base import Engine, Posterior, Sites
from cellfate.errors import CellfateWarning, DataError
from cellfate.inference.free_energy import evaluate
from cellfate.inference.mode import MEMORY
from cellfate.inference.sites import Rule
from cellfate.inference.variational_laplace import Status
from cellfate.kernels.base import Term
from cellfate.model.glmm import Model, Theta

SETTLED = 1e-4  # of site updates, in posterior sds of the cells

Draws = Mapping[str, np.ndarray]
Ask = Callable[[Posterior, Term], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Predicted:
    """Posterior mean and sd (k,) of a component, on link scale, with the hyperparameters integrated out."""

    mean: np.ndarray
    sd: np.ndarray


def mixed(means: np.ndarray, variances: np.ndarray) -> Predicted:
    """Moments of an even mixture (points, k) by the law of total variance: mean of variances plus variance of means."""
    return Predicted(means.mean(0), np.sqrt(variances.mean(0) + means.var(0)))


def spread(draws: Draws, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `count` draws that stand for all of them; those that follow each other are alike.

    Strata of neighbors, equally many in each, and one draw at random from each stratum.
    """
    # variances may be zero, and hardly differ in their logarithms where they are not
    rows = [np.sqrt(x) if name.startswith("variance_") else x for name, x in draws.items() if name != "beta"]
    rows += list(draws["beta"].T) if "beta" in draws else []
    z = np.column_stack([x / x.std() for x in rows if x.std() > 0] or [np.zeros(len(rows[0]) if rows else 1)])
    order, count = KDTree(z, leafsize=1).indices, min(count, len(z))  # neighbors in space are neighbors in order
    return order[((np.arange(count) + rng.random(count)) * len(z) / count).astype(np.int64)]


def focused(engine: Engine, theta: Theta) -> Engine:
    """The engine with its approximations made for these hyperparameters, where no fit has focused it on them."""
    ranges, found = getattr(engine, "ranges", {}), {}
    for field in engine.fields():
        x = theta.values[f"lengthscale_{field}"]
        low, high = float(x.min()), float(x.max())
        if field not in ranges or low < ranges[field][0] or high > ranges[field][1]:
            found[field] = low, high
    return engine.focus(found) if found else engine


@torch.no_grad()
def predict(
    model: Model,
    engine: Engine,
    rule: Rule,
    draws: Draws,
    component: str,
    ask: Ask,
    *,
    count: int,
    rng: np.random.Generator,
) -> Predicted:
    """A component's moments where `ask` asks for them, over `count` of the draws of the hyperparameters.

    Sites are fitted anew at each, from where the last ones were.
    """
    if not isinstance(count, int | np.integer) or count < 1:
        raise DataError(
            f"draws is {count!r}, wanted how many draws of the hyperparameters to average over, such as 16."
        )
    names = [c.name for c in model.components]
    if component not in names:
        raise DataError(f"the fit has no component {component!r}; it has {', '.join(names)}.")
    values = model.from_draws(draws)
    chosen = spread(values, int(count), rng) if values else np.zeros(1, dtype=np.int64)
    theta, points = model.from_natural({name: x[chosen] for name, x in values.items()})
    engine = focused(engine, theta)
    size, start, unsettled = engine.points_at_once(MEMORY), None, 0
    means, variances = [], []
    with progress(total=points, desc="prediction", unit="draw") as bar:
        for first in range(0, points, size):
            here = evaluate(model, engine, _at(theta, slice(first, first + size)), rule, start=start, tolerance=SETTLED)
            (term,) = (t for t in here.terms if t.name == component)
            mean, variance = ask(here.posterior, term)
            means.append(mean.cpu().numpy())
            variances.append(variance.cpu().numpy())
            unsettled += int((here.fit.status != Status.CONVERGED).sum())
            start = Sites(here.fit.sites.precision[-1:], here.fit.sites.shift[-1:])
            bar.update(len(mean))
    if unsettled:
        warnings.warn(
            f"site updates did not settle at {unsettled} of {points} draws of the hyperparameters: predictions are rough.",
            CellfateWarning,
            stacklevel=4,
        )
    return mixed(np.concatenate(means), np.concatenate(variances))


def _at(theta: Theta, rows: slice) -> Theta:
    beta = None if theta.beta is None else theta.beta[rows]
    return Theta({name: x[rows] for name, x in theta.values.items()}, beta)
