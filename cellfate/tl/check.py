"""Does the model describe these cells?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate import _keys, get
from cellfate._runtime import SeedLike, generator
from cellfate.cells import Cells
from cellfate.errors import DataError
from cellfate.inference import checks
from cellfate.inference.fates import KIND, fate_names
from cellfate.inference.left_out_fates import totals
from cellfate.inference.moran import Near, Related, Vicinity
from cellfate.inference.predict import focused, spread
from cellfate.io.again import OBJECTS
from cellfate.io.columns import check_adata
from cellfate.io.store import write_table
from cellfate.model.categorical import Categorical
from cellfate.model.glmm import Model
from cellfate.tl.check_tables import (
    LEVELS,
    PROBABILITIES,
    Observed,
    calibration_table,
    checks_table,
    predictions_table,
)
from cellfate.tl.fitted import fitted
from cellfate.tl.sets import clades, regions

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

EACH = 4  # fates drawn again at each draw of the hyperparameters


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
    where the model is right, whatever the family. Fates without an order (categorical) have one for each fate against the rest; those of a
    cell depend on each other, and so do their rows. Moran's I of them, over the six nearest cells and over the closest relatives, is held
    against random orders of the cells: what is left of a pattern there, the model has missed. A fit without neighborhood is checked for one
    too, where there are coordinates in `adata.obsm["spatial"]`. Posterior predictive checks compare the fates with fates drawn again from
    the fit: their mean and spread, or how many cells have each of several fates, and Moran's I. Whole clades and whole regions are predicted
    from the rest of the cells, which is harder than a single cell among its kin, and what a fate of a new clone or a new section would be
    like.

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
    :func:`cellfate.get.predictions` and :func:`cellfate.get.calibration`; and residuals to `adata.obs[f"{key}_residual"]`, of categorical
    fates to `adata.obsm[f"{key}_residual"]` (n x fates), NaN for cells that were not in the fit.

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
    stream, (model, engine, _) = generator(rng), fit.glmm.problem
    seen = _observed(model, fit.cells)
    values = model.from_draws(fit.draws)
    chosen = spread(values, int(draws), stream) if values else np.zeros(1, dtype=np.int64)
    theta, points = model.from_natural({name: x[chosen] for name, x in values.items()})
    cells = _with_places(adata, fit.cells)
    sets = _sets(cells, int(folds))
    each = EACH * max(1, int(draws) // points)  # where all is held there is a single draw
    found = checks.check(model, focused(engine, theta), fit.glmm.rule, theta, points, sets, each, stream)
    residuals = checks.quantile_residuals(found.predicted[checks.CELL], stream)
    tables = {
        _keys.CHECKS: checks_table(residuals, seen, found.replicates, _vicinities(cells), int(n_perm), stream),
        _keys.PREDICTIONS: predictions_table(found.predicted, sets, seen),
    }
    if seen.kind in PROBABILITIES or seen.several:
        tables[_keys.CALIBRATION] = calibration_table(found.predicted, seen)
    k_hat = float(get.diagnostics(adata, key)["pareto_k"])
    row = {"check": "k-hat", "over": "draws", "observed": k_hat, "expected": np.nan, "lower": -np.inf, "upper": 0.7}
    row |= {"p": np.nan} | ({"fate": ""} if seen.several else {})
    tables[_keys.CHECKS].loc[len(tables[_keys.CHECKS])] = row
    adata = adata.copy() if copy else adata
    for name, table in tables.items():
        write_table(adata, key, name, table)
    full = np.full((adata.n_obs, *residuals.shape[1:]), np.nan)
    full[fit.cells.kept] = residuals
    if seen.kind == KIND:
        adata.obsm[_keys.residual(key)] = pd.DataFrame(full, index=adata.obs_names, columns=list(seen.names))
    else:
        adata.obs[_keys.residual(key)] = full
    return adata if copy else None


def _observed(model: Model, cells: Cells) -> Observed:
    kind = model.family.kind
    if kind not in (KIND, LEVELS):
        return Observed(kind, cells.response, cells.trials)
    assert model.data.outcome.levels is not None
    names = fate_names(cells.levels, model.data.outcome.levels)
    if not isinstance(model.family, Categorical):
        return Observed(kind, cells.response, None, names)
    weights = model.family.weights(model.data.outcome).cpu().numpy()
    if (weights != np.round(weights)).any():
        raise NotImplementedError(
            "checks of probabilities of fates are not there: the model does not say how probabilities scatter, only how fates do. Check a "
            "fit of the most probable fate of each cell, `adata.obs['fate'] = adata.obsm[fate].idxmax(axis=1)`."
        )
    return Observed(kind, weights, totals(model).astype(float), names)


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
