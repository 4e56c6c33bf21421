"""Does the model describe these cells? Each cell, clade and region is predicted from all others, and fates are drawn again.

Without a set of cells the posterior is taken to be the posterior without their sites: exact for gaussian fates, and what expectation
propagation calls a cavity for others. Hyperparameters are those of all cells; a set of cells says little about them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from cellfate._runtime import progress
from cellfate.engines.base import Engine, Sites
from cellfate.inference.fates import KIND
from cellfate.inference.free_energy import Evaluation, evaluate, likelihood_at
from cellfate.inference.left_out_fates import cavity_of_cells, copies_of, fates_again, predictive_fates
from cellfate.inference.sites import Likelihood, Rule, cavity
from cellfate.model.cumulative import Own, cumulative
from cellfate.model.families import quadrature
from cellfate.model.glmm import RESIDUAL, Model, Theta
from cellfate.model.ordinal import Ordinal

NODES = 60
NUMBERS = 2**22  # at the nodes of some cells, at once
SETTLED = 1e-4  # of site updates, in posterior sds
CELL = "cell"


@dataclass(frozen=True)
class Predicted:
    """Of cells that were predicted from others, each (n,): log-density, P(Y < y), P(Y <= y) and the expected fate of one trial.

    Of ordinal fates the last are the probabilities (n, K) of the levels; of categorical ones those of the fates, each of which, against
    the rest, also has its own P(Y < y) and P(Y <= y), (n, K).
    """

    log_p: np.ndarray
    below: np.ndarray
    upto: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True)
class Checked:
    """`predicted` by what was left out (`cell`, and the names of the sets), and fates drawn again (n, replicates), or where they have no
    order, how often each was drawn (n, replicates, K).
    """

    predicted: dict[str, Predicted]
    replicates: np.ndarray


@dataclass(frozen=True)
class _Point:
    """The model at one draw of the hyperparameters."""

    model: Model
    engine: Engine
    here: Evaluation
    likelihood: Likelihood
    own: Own


@torch.no_grad()
def check(
    model: Model,
    engine: Engine,
    rule: Rule,
    theta: Theta,
    draws: int,
    sets: Mapping[str, np.ndarray],
    each: int,
    rng: np.random.Generator,
) -> Checked:
    """At `draws` of the hyperparameters; `sets` are labels (n,) of cells that are left out together, `each` the fates per draw."""
    averages = {name: _Average(reweighted=name == CELL) for name in (CELL, *sets)}
    replicates = []
    for i in progress(range(draws), desc="checks", unit="draw"):
        point = _point(model, engine, rule, theta, i)
        averages[CELL].add(_each(point))
        for name, label in sets.items():
            averages[name].add(_without(point, label))
        replicates.append(_again(point, each, rng))
    return Checked({name: average.found for name, average in averages.items()}, np.concatenate(replicates, axis=1))


def _point(model: Model, engine: Engine, rule: Rule, theta: Theta, i: int) -> _Point:
    row = torch.tensor([i])
    beta = None if theta.beta is None else theta.beta[row]
    at = Theta({name: x[row] for name, x in theta.values.items()}, beta)
    here = evaluate(model, engine, at, rule, tolerance=SETTLED)
    own: Own = {name: np.asarray(float(at.values[name])) for name in model.own}
    if f"sd_{RESIDUAL}" in own:
        own[f"variance_{RESIDUAL}"] = own.pop(f"sd_{RESIDUAL}") ** 2
    if isinstance(model.family, Ordinal):
        own = {"gaps": np.array([float(own[gap]) for gap in model.own])}
    return _Point(model, engine, here, likelihood_at(model, at), own)


def _each(point: _Point) -> Predicted:
    """Each cell from all others."""
    if point.model.family.kind == KIND:
        mean, variance = cavity_of_cells(point.model, point.here.posterior)
    else:
        mean, variance = cavity(point.here.posterior)
    return _predictive(point, mean[0], variance[0], np.arange(point.model.data.n // point.model.data.copies))


def _without(point: _Point, label: np.ndarray) -> Predicted:
    """Each set of cells, those of one label, from all other cells."""
    sites, terms = point.here.fit.sites, point.here.terms
    prior, parts, order = point.engine.prepare(terms), [], []
    for code in np.unique(label):
        cells = np.flatnonzero(label == code)
        out = copies_of(point.model, cells)
        kept = torch.ones_like(sites.precision)
        kept[:, out] = 0
        rest = point.engine.condition(terms, Sites(sites.precision * kept, sites.shift * kept), prior)
        parts.append(_predictive(point, rest.mean[0, out], rest.variance[0, out], cells))
        order.append(cells)
    back = np.argsort(np.concatenate(order))
    return Predicted(*(x[back] for x in _joined(parts)))


def _again(point: _Point, each: int, rng: np.random.Generator) -> np.ndarray:
    """Fates (n, each) of these very cells drawn again, their fields from the posterior."""
    model, seed = point.model, torch.Generator().manual_seed(int(rng.integers(2**62)))
    drawn = point.here.posterior.sample(point.here.terms, each, [seed])
    eta = sum((field[0] for field in drawn.values()), start=model.shift(point.here.theta)[0][:, None])
    if model.family.kind == KIND:
        return fates_again(model, eta.cpu().numpy(), rng)
    own: dict[str, Any] = {name: value if value.ndim else float(value) for name, value in point.own.items()}
    residual, outcome = own.pop(f"variance_{RESIDUAL}", None), model.data.outcome
    trials = None if outcome.trials is None else outcome.trials.cpu().numpy()
    return np.column_stack(
        [
            _small(model.family.simulate(column, rng=rng, trials=trials, variance_residual=residual, **own))
            for column in eta.T.cpu().numpy()
        ]
    )


def _predictive(point: _Point, mean: Tensor, variance: Tensor, cells: np.ndarray) -> Predicted:
    """Of some cells (k,), whose latent value is N(mean, variance), (k,) for each of their copies, without the offset."""
    if point.model.family.kind == KIND:
        return Predicted(*predictive_fates(point.model, mean, variance, cells))
    size = max(1, NUMBERS // (NODES * (point.model.data.outcome.levels or 1)))
    some = [slice(i, i + size) for i in range(0, len(cells), size)]
    return Predicted(*_joined([_at_nodes(point, mean[i], variance[i], cells[i]) for i in some]))


def _at_nodes(point: _Point, mean: Tensor, variance: Tensor, cells: np.ndarray) -> Predicted:
    """The same by quadrature, of a fate with a single latent value."""
    family, which = point.model.family, torch.as_tensor(cells)
    outcome = point.model.data.outcome.at(which)
    z, w = quadrature(mean, NODES)
    eta = (mean + point.likelihood.shift[0, which])[:, None] + variance.clamp(min=0).sqrt()[:, None] * z
    phi = None if point.likelihood.phi is None else family.beside_nodes(point.likelihood.phi[0])
    log_p = torch.logsumexp(torch.log(w) + family.log_prob(outcome.beside_nodes, eta, phi), -1)
    expected = family.probabilities(eta, phi) if isinstance(family, Ordinal) else family.inverse_link(eta)
    trials = None if outcome.trials is None else outcome.trials.cpu().numpy()[:, None]
    below, upto = cumulative(family.name, expected.cpu().numpy(), outcome.y.cpu().numpy()[:, None], trials, point.own)
    weight, average = w.cpu().numpy(), torch.einsum("kn...,n->k...", expected, w)
    return Predicted(log_p.cpu().numpy(), below @ weight, upto @ weight, average.cpu().numpy())


def _joined(parts: Sequence[Predicted]) -> tuple[np.ndarray, ...]:
    """Of all cells what is predicted, from some after others."""
    return tuple(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Predicted))


def _small(x: np.ndarray) -> np.ndarray:
    """Whole numbers in no more bytes than they need: there are many of them."""
    if (x != np.floor(x)).any() or x.min() < 0 or x.max() >= 2**32:
        return x
    return x.astype(np.min_scalar_type(int(x.max())))


class _Average:
    """What is predicted over the draws, one after the other; where each cell was left out, reweighted to what they would be without it.

    p(theta | others) is p(theta | all) / p(y_i | others, theta).
    """

    def __init__(self, *, reweighted: bool) -> None:
        self._reweighted = reweighted
        self._log_weight: np.ndarray | float = -np.inf  # of all draws together
        self._log_p: np.ndarray | float = -np.inf
        self._rest: list[np.ndarray] = []

    def add(self, p: Predicted) -> None:
        log_weight = -p.log_p if self._reweighted else np.zeros_like(p.log_p)
        self._log_weight = np.logaddexp(self._log_weight, log_weight)
        self._log_p = np.logaddexp(self._log_p, log_weight + p.log_p)
        share = np.exp(log_weight - self._log_weight)
        new = [p.below, p.upto, p.mean]
        old = self._rest or [np.zeros_like(x) for x in new]
        self._rest = [a + share.reshape(-1, *[1] * (x.ndim - 1)) * (x - a) for a, x in zip(old, new, strict=True)]

    @property
    def found(self) -> Predicted:
        return Predicted(np.asarray(self._log_p - self._log_weight), *self._rest)


def quantile_residuals(predicted: Predicted, rng: np.random.Generator) -> np.ndarray:
    """Randomized quantile residuals (n,), or of fates without an order each against the rest (n, K), standard normal where the model is
    right (Dunn & Smyth 1996).
    """
    u = predicted.below + rng.random(predicted.below.shape) * (predicted.upto - predicted.below)
    return ndtri(np.clip(u, 1e-9, 1 - 1e-9))
