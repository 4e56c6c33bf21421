"""Fates drawn from a null fit: what a test gives where there is nothing to find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from cellfate._runtime import progress
from cellfate.engines.base import Engine, Sites
from cellfate.inference.mode import Mode, find_mode
from cellfate.inference.score import Null, score_test
from cellfate.inference.sites import Rule
from cellfate.kernels.base import Component
from cellfate.model.glmm import FIXED, RESIDUAL, Model

DRAWABLE = ("real", "binary", "successes", "count", "proportion")  # kinds of responses that a draw can be made of


@torch.no_grad()
def draw_fate(null: Null, rng: np.random.Generator) -> np.ndarray:
    """A response (n,) of the null model: fields drawn from their prior at its mode, fixed effects as they were estimated."""
    model, like = null.model, null.b
    random = [term for term in null.terms if term.name != FIXED]
    nothing = like.new_zeros(1, model.data.n)
    eta = model.data.offset.clone()
    if random:
        prior = null.engine.condition(random, Sites(nothing, nothing))
        seed = torch.Generator().manual_seed(int(rng.integers(2**62)))
        eta += sum(field[0, :, 0] for field in prior.sample(random, 1, [seed]).values())
    for term in null.terms:
        if term.name == FIXED:
            eta += model.data.design @ null.posterior.coefficients(term)[0][0]
    own = dict(null.own)
    residual = own.pop(f"variance_{RESIDUAL}", None)
    trials = model.data.outcome.trials
    return model.family.simulate(
        eta.cpu().numpy(),
        rng=rng,
        trials=None if trials is None else trials.cpu().numpy(),
        variance_residual=residual,
        **own,
    )


def null_p_values(
    null: Null, mode: Mode, rule: Rule, engine: Engine, component: Component, seeds: Sequence[int]
) -> list[float]:
    """The p-value of a fate of the null model, fitted by itself, for each seed: none depends on the others."""
    like, found = null.b, []
    for seed in progress(seeds, desc=f"bootstrap of {component.name}", unit="fate"):
        y = torch.as_tensor(draw_fate(null, np.random.default_rng(seed))).to(like)
        data = replace(null.model.data, outcome=replace(null.model.data.outcome, y=y))
        model = Model(
            null.model.family, null.model.components, data, null.model.priors, null.model.reml, null.model.limits
        )
        there = find_mode(model, null.engine, rule, start=mode.u)
        found.append(score_test(Null(model, null.engine, rule, there), engine, component).p)
    return found


def draw_seeds(rng: np.random.Generator, count: int) -> list[int]:
    """One for each fate that is drawn, so that it does not matter where it is."""
    return [int(seed) for seed in rng.integers(2**62, size=count)]


def bootstrapped(p: float, drawn: Sequence[float]) -> float:
    """How often a fate of the null model has a p-value as small as `p`, its own included."""
    return (1 + sum(one <= p for one in drawn)) / (len(drawn) + 1)
