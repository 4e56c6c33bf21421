"""Fates drawn from a null fit: what a test gives where there is nothing to find."""

from __future__ import annotations

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


def bootstrap(
    null: Null,
    mode: Mode,
    rule: Rule,
    engine: Engine,
    component: Component,
    p: float,
    *,
    count: int,
    rng: np.random.Generator,
) -> float:
    """How often a fate of the null model, fitted by itself, has a p-value as small as `p`."""
    below, like = 1, null.b
    for _ in progress(range(count), desc=f"bootstrap of {component.name}", unit="fate"):
        y = torch.as_tensor(draw_fate(null, rng)).to(like)
        data = replace(null.model.data, outcome=replace(null.model.data.outcome, y=y))
        model = Model(
            null.model.family, null.model.components, data, null.model.priors, null.model.reml, null.model.limits
        )
        there = find_mode(model, null.engine, rule, start=mode.u)
        below += score_test(Null(model, null.engine, rule, there), engine, component).p <= p
    return below / (count + 1)
