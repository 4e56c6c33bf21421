"""Where the posterior is: the mode, by way of a pilot fit that tells an engine which length-scales its approximation has to serve.

A low-rank basis that has to describe fields of every length-scale at once describes each of them less well. A fit of some of the
cells says which length-scales matter; the basis is then made for those, and made again should the mode turn out to lie elsewhere.
"""

from __future__ import annotations

import numpy as np
import torch

from cellfate._runtime import logger
from cellfate.engines.base import Engine
from cellfate.inference.mode import PILOT_GAIN, Mode, find_mode, not_absent
from cellfate.inference.sites import Rule
from cellfate.model.glmm import Model

PILOT = 2000  # cells of the pilot fit
STAGE, GROWTH = 8_000, 8  # cells of a second fit where there are many more, and how many times more the next one has
WITHIN = (5.0, 10.0)  # sds of the pilot's log length-scale below and above its mode: a posterior reaches further up
NARROWEST = 0.1  # of that sd, at least
GRID = 0.25  # of the log length-scales between which a basis is made
ATTEMPTS = 3
GROWING = (
    0.6  # power of the number of cells by which a curvature grows: from one towards none, of fields that do not extend
)
FINE = 4_000  # cells up to which columns are also taken for the last tenth of a nat; with more, that is far below what they tell

Ranges = dict[str, tuple[float, float]]


def locate(model: Model, engine: Engine, rule: Rule) -> tuple[Model, Engine, Mode]:
    """The mode, with the model and the engine focused on it."""
    names = [p.name for p in model.parameters]
    held = {field: (value, value) for field in engine.fields() if (value := model.held(f"lengthscale_{field}"))}
    if held:
        engine = engine.focus(held)
    fields = {f"lengthscale_{field}": field for field in engine.fields() if f"lengthscale_{field}" in names}
    if not fields:
        return model, engine, find_mode(model, engine, rule)
    some = model.data.some(PILOT)
    thin = model.at(some)
    pilot = find_mode(thin, engine.pilot(thin.components, some), rule, gain=PILOT_GAIN)
    spread = 1 / np.sqrt(np.clip(pilot.curvature.diagonal().cpu().numpy(), 1e-3, None))
    sd = {name: max(NARROWEST, float(spread[names.index(name)])) for name in fields}
    u, information = pilot.u, {}
    if model.data.n <= FINE:
        precision = float(pilot.sites.precision.mean())
        sds = {p.name.removeprefix("sd_"): float(x) for p, x in zip(model.parameters, pilot.u, strict=True)}
        information = {field: sds[field] ** 2 * precision for field in fields.values() if field in sds}
    known: torch.Tensor | None = pilot.curvature * (model.data.n / len(some)) ** GROWING
    cells = STAGE
    while model.data.n // model.data.copies > 4 * cells:
        u = _stage(model, engine, rule, u, sd, fields, cells)
        cells *= GROWTH
        known = None  # so many more cells know more than a power law of the pilot's says
    for _ in range(ATTEMPTS - 1):
        focused, sharp, mode = _focused(model, engine, rule, u, sd, fields, information, known)
        cut = _cut(model, focused, mode.u, fields)
        if not cut:
            return focused, sharp, mode
        u = mode.u
        sd |= {name: 1.5 * sd[name] for name in cut}
    return _focused(model, engine, rule, u, sd, fields, information, known)


def _focused(
    model: Model,
    engine: Engine,
    rule: Rule,
    u: torch.Tensor,
    sd: dict[str, float],
    fields: dict[str, str],
    information: dict[str, float],
    known: torch.Tensor | None,
) -> tuple[Model, Engine, Mode]:
    limits = _limits(model, u, sd)
    logger.debug("length-scales within %s", limits)
    focused = model.within(limits)
    sharp = engine.focus({field: limits[name] for name, field in fields.items()}, information)
    return focused, sharp, find_mode(focused, sharp, rule, start=not_absent(model, u), curvature=known)


def _stage(
    model: Model,
    engine: Engine,
    rule: Rule,
    u: torch.Tensor,
    sd: dict[str, float],
    fields: dict[str, str],
    cells: int,
) -> torch.Tensor:
    """A better start, from a larger part of the cells; narrows `sd` to what it leaves open."""
    some, limits = model.data.some(cells), _limits(model, u, sd)
    thin = model.at(some).within(limits)
    sharp = engine.at(thin.components, some).focus({field: limits[name] for name, field in fields.items()})
    mode = find_mode(thin, sharp, rule, start=not_absent(model, u), gain=PILOT_GAIN)
    spread = 1 / np.sqrt(np.clip(mode.curvature.diagonal().cpu().numpy(), 1e-3, None))
    for i, parameter in enumerate(model.parameters):
        if parameter.name in sd and not _cut(model, thin, mode.u, {parameter.name: fields[parameter.name]}):
            sd[parameter.name] = max(NARROWEST, float(spread[i]))
    return mode.u


def _limits(model: Model, u: torch.Tensor, sd: dict[str, float]) -> Ranges:
    out = {}
    for i, parameter in enumerate(model.parameters):
        if parameter.name in sd:
            low, high = np.log(parameter.lower), np.log(parameter.upper)
            centre, (down, up) = float(np.clip(float(u[i]), low, high)), WITHIN
            lower, upper = centre - down * sd[parameter.name], centre + up * sd[parameter.name]
            # on a grid, so that responses alike can share what is made for them
            lower, upper = GRID * np.floor(lower / GRID), GRID * np.ceil(upper / GRID)
            out[parameter.name] = float(np.exp(max(low, lower))), float(np.exp(min(high, upper)))
    return out


def _cut(model: Model, focused: Model, u: torch.Tensor, fields: dict[str, str]) -> list[str]:
    """Length-scales whose mode lies at a limit that is not the model's own."""
    out = []
    for i, (own, limited) in enumerate(zip(model.parameters, focused.parameters, strict=True)):
        if own.name not in fields:
            continue
        x = float(u[i])
        below = limited.lower > 1.001 * own.lower and x < np.log(limited.lower) + 0.05
        above = limited.upper < 0.999 * own.upper and x > np.log(limited.upper) - 0.05
        if below or above:
            out.append(own.name)
    return out
