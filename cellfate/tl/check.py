"""Does the model describe these cells?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import kstest

from cellfate import _keys, get
from cellfate._runtime import SeedLike, generator
from cellfate.cells import Cells
from cellfate.errors import DataError
from cellfate.inference import checks
from cellfate.inference.bootstrap import DRAWABLE
from cellfate.inference.moran import Near, Related, Vicinity, permuted
from cellfate.inference.predict import focused, spread
from cellfate.io.again import OBJECTS
from cellfate.io.columns import check_adata
from cellfate.io.store import write_table
from cellfate.tl.fitted import fitted
from cellfate.tl.sets import clades, regions

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

EACH = 4  # fates drawn again at each draw of the hyperparameters
BINS = 10  # of predicted probabilities
PROBABILITIES = ("binary", "successes")  # kinds of fates that have one


def check(
    adata: AnnData,
    *,
    key: str = _keys.KEY,
    draws: int = 32,
    folds: int = 10,
    n_perm: int = 199,
    lineage: Any = None,
    spatial: Any = None,
    graph: Any = None,
    niche: Any = None,
    offset: Any = None,
    trials: Any = None,
    device: str | torch.device = "auto",
    rng: SeedLike | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Check a fit: residuals, their pattern over tree and tissue, fates drawn again, and predictions of cells left out.

    Residuals are randomized quantile residuals (Dunn & Smyth 1996) of each cell as it is predicted from all others: standard normal
    where the model is right, whatever the family. Moran's I of them, over the six nearest cells and over the closest relatives, is held
    against random orders of the cells: what is left of a pattern there, the model has missed. A fit without neighborhood is checked for one
    too, where there are coordinates in `adata.obsm["spatial"]`. Posterior predictive checks compare the
    fates with fates drawn again from the fit. Whole clades and whole regions are predicted from the rest of the cells, which is harder
    than a single cell among its kin, and what a fate of a new clone or a new section would be like.

    Nothing is fitted again. Without a cell, or a set, the posterior is taken to be the one without its sites, at the hyperparameters of
    the fit.

    Parameters
    ----------
    key
        The `key_added` of the fit.
    draws
        How many posterior draws of the hyperparameters are averaged over.
    folds
        How many clades, and how many regions, the cells are divided into.
    n_perm
        Random orders of the cells.
    lineage, spatial, graph, niche, offset, trials
        What was handed to the fit itself, and not the name of something in `adata`, has to be handed over again.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    rng
        Seed of all that is drawn.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes tables to `adata.uns[key]`: `checks`, `predictions` and `calibration`, see :func:`cellfate.get.checks`,
    :func:`cellfate.get.predictions` and :func:`cellfate.get.calibration`; and residuals to `adata.obs[f"{key}_residual"]`, NaN for
    cells that were not in the fit.

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(80, family="poisson", rng=0)
    >>> cf.tl.decompose(adata, "fate", family="poisson", rng=0)
    >>> cf.tl.check(adata, rng=0)
    >>> cf.get.predictions(adata)["left_out"].tolist()
    ['cell', 'clade', 'region']
    """
    check_adata(adata)
    counts = {"draws": (draws, 2), "folds": (folds, 2), "n_perm": (n_perm, 19)}
    for name, (value, least) in counts.items():
        if not isinstance(value, int | np.integer) or value < least:
            raise DataError(f"{name} is {value!r}, wanted a whole number from {least} on.")
    handed = dict(zip(OBJECTS, (lineage, spatial, graph, niche, offset, trials), strict=True))
    fit = fitted(adata, key, handed, device)
    family = fit.glmm.family
    if family.kind not in DRAWABLE:
        raise NotImplementedError(
            f"checks are not there yet for family={family.name!r}. Ask about one fate at a time with family='bernoulli'."
        )
    stream, (model, engine, _) = generator(rng), fit.glmm.problem
    values = model.from_draws(fit.draws)
    chosen = spread(values, int(draws), stream) if values else np.zeros(1, dtype=np.int64)
    theta, points = model.from_natural({name: x[chosen] for name, x in values.items()})
    cells = _with_places(adata, fit.cells)
    sets = _sets(cells, int(folds))
    found = checks.check(model, focused(engine, theta), fit.glmm.rule, theta, points, sets, EACH, stream)
    residuals = checks.quantile_residuals(found.predicted[checks.CELL], stream)
    y, count = fit.cells.response, fit.cells.trials
    tables = {
        _keys.CHECKS: _checks(residuals, y, found.replicates, _vicinities(cells), int(n_perm), stream),
        _keys.PREDICTIONS: _predictions(found.predicted, sets, y, count, family.kind),
    }
    if family.kind in PROBABILITIES:
        tables[_keys.CALIBRATION] = _calibration(found.predicted, y, count)
    k_hat = float(get.diagnostics(adata, key)["pareto_k"])
    row = {"check": "k-hat", "over": "draws", "observed": k_hat, "expected": np.nan, "lower": -np.inf, "upper": 0.7}
    tables[_keys.CHECKS].loc[len(tables[_keys.CHECKS])] = row | {"p": np.nan}
    adata = adata.copy() if copy else adata
    for name, table in tables.items():
        write_table(adata, key, name, table)
    column = np.full(adata.n_obs, np.nan)
    column[fit.cells.kept] = residuals
    adata.obs[_keys.residual(key)] = column
    return adata if copy else None


def _with_places(adata: AnnData, cells: Cells) -> Cells:
    """A model without neighborhood is checked for one, too, where the cells have coordinates."""
    if cells.coordinates is not None or _keys.SPATIAL not in adata.obsm:
        return cells
    found = np.asarray(adata.obsm[_keys.SPATIAL], dtype=np.float64)[cells.kept]
    return replace(cells, coordinates=found) if np.isfinite(found).all() else cells


def _sets(cells: Cells, folds: int) -> dict[str, np.ndarray]:
    """Labels (n,) of cells that are left out together."""
    out = {}
    if cells.forest is not None and cells.leaf is not None:
        out["clade"] = clades(cells.forest, cells.leaf, folds)
    if cells.coordinates is not None:
        out["region"] = regions(cells.coordinates, cells.specimen, folds)
    return {name: label for name, label in out.items() if len(np.unique(label)) > 1}


def _vicinities(cells: Cells) -> dict[str, Vicinity]:
    out: dict[str, Vicinity] = {}
    if cells.coordinates is not None:
        out["space"] = Near.of(cells.coordinates, cells.specimen)
    if cells.forest is not None and cells.leaf is not None:
        out["tree"] = Related.of(cells.forest, cells.leaf)
    return {name: vicinity for name, vicinity in out.items() if not vicinity.alone.all()}


def _checks(
    residuals: np.ndarray,
    y: np.ndarray,
    replicates: np.ndarray,
    vicinities: Mapping[str, Vicinity],
    n_perm: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    columns = ("check", "over", "observed", "expected", "lower", "upper", "p")
    distance, p = kstest(residuals, "norm")
    rows: list[tuple[object, ...]] = [("residuals are normal", "cells", distance, 0.0, 0.0, np.nan, p)]
    for name, vicinity in vicinities.items():
        found, drawn, p = permuted(vicinity, residuals, n_perm, rng)
        # below is no pattern: cells that are predicted from each other have residuals that are a little opposed
        rows.append(("Moran's I of residuals", name, found, drawn.mean(), -np.inf, np.quantile(drawn, 0.95), p))
    again = {"mean": (y.mean(), replicates.mean(0)), "standard deviation": (y.std(), replicates.std(0))}
    if (y == 0).any() or (replicates == 0).any():
        again["share of zeros"] = (y == 0).mean(), (replicates == 0).mean(0)
    over = dict.fromkeys(again, "cells")
    for name, vicinity in vicinities.items():
        again[f"Moran's I ({name})"] = vicinity.moran(y[:, None])[0], vicinity.moran(replicates)
        over[f"Moran's I ({name})"] = name
    for name, (found, drawn) in again.items():
        lower, upper = np.quantile(drawn, [0.025, 0.975])
        tail = min((1 + (drawn >= found).sum()), (1 + (drawn <= found).sum())) / (len(drawn) + 1)
        label = name.split(" (")[0]
        rows.append((f"{label} of fates", over[name], found, drawn.mean(), lower, upper, min(1.0, 2 * tail)))
    return pd.DataFrame(rows, columns=list(columns))


def _predictions(
    predicted: Mapping[str, checks.Predicted],
    sets: Mapping[str, np.ndarray],
    y: np.ndarray,
    trials: np.ndarray | None,
    kind: str,
) -> pd.DataFrame:
    rows = []
    for name, found in predicted.items():
        row: dict[str, object] = {
            "left_out": name,
            "sets": len(y) if name == checks.CELL else len(np.unique(sets[name])),
        }
        row["log_score"] = found.log_p.mean()
        if kind in PROBABILITIES:
            weight = np.ones(len(y)) if trials is None else trials
            share, whole = y / weight, y.sum() / weight.sum()
            row["brier"] = np.average((share - found.mean) ** 2, weights=weight)
            row["brier_reference"] = np.average((share - whole) ** 2, weights=weight)
        rows.append(row)
    return pd.DataFrame(rows)


def _calibration(predicted: Mapping[str, checks.Predicted], y: np.ndarray, trials: np.ndarray | None) -> pd.DataFrame:
    rows = []
    weight = np.ones(len(y)) if trials is None else trials
    for name, found in predicted.items():
        bins = np.minimum((found.mean * BINS).astype(int), BINS - 1)
        for k in np.unique(bins):
            here = bins == k
            total = weight[here].sum()
            rows.append(
                {
                    "left_out": name,
                    "predicted": np.average(found.mean[here], weights=weight[here]),
                    "observed": y[here].sum() / total,
                    "cells": int(here.sum()),
                    "trials": float(total),
                }
            )
    return pd.DataFrame(rows)
