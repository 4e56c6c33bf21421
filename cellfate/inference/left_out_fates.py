"""Fates without an order, in cells that are left out: what is expected of them, all copies of a cell at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cellfate.engines.base import Posterior
from cellfate.inference.fates import Form
from cellfate.inference.sites import cavity
from cellfate.model.categorical import Categorical, apart, contrasts, stacked
from cellfate.model.glmm import Model
from cellfate.model.pairs import Pairs, covariance_of, loadings, lower_factor

LEAST = 1e-10  # of the posterior precision, that others are taken to say of a cell at least


def cavity_of_cells(model: Model, posterior: Posterior) -> tuple[Tensor, Tensor]:
    """Mean and variance (points, copies * n) of what each cell's copies are, given the sites of all other cells.

    Contrasts are independent a posteriori, and lose the sites of their own. Sites of pairs go together, see
    :func:`cavity_of_pairs`.
    """
    form = Form.of(model)
    return cavity_of_pairs(posterior, form.levels) if form.paired else cavity(posterior)


def cavity_of_pairs(posterior: Posterior, levels: int) -> tuple[Tensor, Tensor]:
    """The same where copies are the differences of all pairs of fates.

    Of a cell's contrasts with covariance V, and with the precisions T of its sites by their loadings L, what the others say has the
    covariance (V^-1 - L'TL)^-1. It is taken as F (I - F'L'TLF)^-1 F' with V = FF', for where V is next to zero.
    """
    load = torch.as_tensor(loadings(levels)).to(posterior.mean)  # (R, J)
    several, h = len(load), torch.as_tensor(contrasts(levels)).to(load)
    precision, shift = (apart(x, several) for x in (posterior.sites.precision, posterior.sites.shift))
    factor = lower_factor(covariance_of(apart(posterior.variance, several), h))  # (..., n, J, J)
    mean = Pairs._means(posterior.mean, h)
    site = load.mT @ (precision[..., None] * load)
    left, turn = torch.linalg.eigh(torch.eye(load.shape[1]).to(load) - factor.mT @ site @ factor)
    turn = turn / left.clamp(min=LEAST).sqrt()[..., None, :]
    root = factor @ turn  # of the covariance without the cell
    whole = torch.linalg.solve_triangular(factor, mean[..., None], upper=False)
    along = whole - factor.mT @ (shift @ load)[..., None]
    mean = (root @ turn.mT @ along)[..., 0]
    return stacked(mean @ load.mT), stacked((load @ root).square().sum(-1))


def predictive_fates(model: Model, mean: Tensor, variance: Tensor, cells: np.ndarray) -> tuple[np.ndarray, ...]:
    """Log-density (k,), P(Y < y), P(Y <= y) and probabilities, each (k, K), of some cells (k,) whose copies are N(mean, variance)."""
    family = model.family
    assert isinstance(family, Categorical)
    outcome = model.data.outcome.at(copies_of(model, cells))
    log_p, p, below, upto = family.predictive(outcome, mean, variance)
    return tuple(x.cpu().numpy() for x in (log_p, below, upto, p))


def copies_of(model: Model, cells: np.ndarray) -> Tensor:
    """Places of some cells in every copy of the cells."""
    n = model.data.n // model.data.copies
    places = np.concatenate([cells + copy * n for copy in range(model.data.copies)])
    return torch.as_tensor(places, device=model.data.offset.device)


def fates_again(model: Model, eta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Counts (n, draws, K) of fates drawn at latent values eta (copies * n, draws)."""
    p = Form.of(model).by_fate(eta.T)  # (draws, n, K)
    p = np.exp(p - p.max(-1, keepdims=True))
    return rng.multinomial(totals(model), p / p.sum(-1, keepdims=True)).swapaxes(0, 1).astype(float)


def totals(model: Model) -> np.ndarray:
    """Trials (n,) of each cell."""
    trials = model.data.outcome.trials
    assert trials is not None
    return np.rint(trials[: model.data.n // model.data.copies].cpu().numpy()).astype(np.int64)
