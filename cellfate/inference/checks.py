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
from scipy.special import logsumexp, ndtri
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
    parts: dict[str, list[Predicted]] = {name: [] for name in (CELL, *sets)}
    replicates = []
    for i in progress(range(draws), desc="checks", unit="draw"):
        point = _point(model, engine, rule, theta, i)
        parts[CELL].append(_each(point))
        for name, label in sets.items():
            parts[name].append(_without(point, label))
        replicates.append(_again(point, each, rng))
    predicted = {name: _averaged(found, reweighted=name == CELL) for name, found in parts.items()}
    return Checked(predicted, np.concatenate(replicates, axis=1))


def _point(model: Model, engine: Engine, rule: Rule, theta: Theta, i: int) -> _Point:
    row = torch.tensor([i])
    beta = None if theta.beta is None else theta.beta[row]
    at = Theta({name: x[row] for name, x in theta.values.items()}, beta)
    here = evaluate(model, engine, at, rule, tolerance=SETTLED)
    own: Own = {name: np.asarray(float(at.values[name])) for name in model.own}
    if f"sd_{RESIDUAL}" in own:
        own[f"variance_{RESIDUAL}"] = own.pop(f"sd_{RESIDUAL}") ** 2
    if isinstance(model.family, Ordinal):
        own = {"gaps": np.array([float(gap) for gap in own.values()])}
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
    names = [field.name for field in fields(Predicted)]
    return Predicted(*(np.concatenate([getattr(part, name) for part in parts])[back] for name in names))


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
            model.family.simulate(column, rng=rng, trials=trials, variance_residual=residual, **own)
            for column in eta.T.cpu().numpy()
        ]
    )


def _predictive(point: _Point, mean: Tensor, variance: Tensor, cells: np.ndarray) -> Predicted:
    """Of some cells (k,), whose latent value is N(mean, variance), (k,) for each of their copies, without the offset."""
    if point.model.family.kind == KIND:
        return Predicted(*predictive_fates(point.model, mean, variance, cells))
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


def _averaged(parts: Sequence[Predicted], *, reweighted: bool) -> Predicted:
    """Over the draws; where each cell was left out, reweighted to what they would be without it.

    p(theta | others) is p(theta | all) / p(y_i | others, theta).
    """
    log_p = np.stack([p.log_p for p in parts])  # (draws, n)
    log_weight = -log_p if reweighted else np.zeros_like(log_p)
    log_weight = log_weight - logsumexp(log_weight, axis=0)
    weight = np.exp(log_weight)
    return Predicted(
        logsumexp(log_weight + log_p, axis=0),
        *(
            np.einsum("sn,sn...->n...", weight, np.stack([getattr(p, name) for p in parts]))
            for name in ("below", "upto", "mean")
        ),
    )


def quantile_residuals(predicted: Predicted, rng: np.random.Generator) -> np.ndarray:
    """Randomized quantile residuals (n,), or of fates without an order each against the rest (n, K), standard normal where the model is
    right (Dunn & Smyth 1996).
    """
    u = predicted.below + rng.random(predicted.below.shape) * (predicted.upto - predicted.below)
    return ndtri(np.clip(u, 1e-9, 1 - 1e-9))
