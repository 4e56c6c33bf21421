"""Results into AnnData: only after a fit is complete, only under its own names, in types that h5ad and zarr can hold."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate import _keys
from cellfate._runtime import logger
from cellfate.cells import Cells
from cellfate.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

    from cellfate.inference.fit import GLMMFit


def check_free(adata: AnnData, key: str) -> None:
    """Refuse a `key_added` whose slots hold something that is not an earlier fit."""
    if not isinstance(key, str) or not key or "/" in key:
        raise DataError(f"key_added is {key!r}, wanted a name without '/'.")
    held = adata.uns.get(key)
    ours = isinstance(held, Mapping) and _keys.PARAMS in held and _keys.COMPONENTS in held
    if held is not None and not ours:
        raise DataError(
            f"adata.uns[{key!r}] holds a {type(held).__name__} that is no decomposition and would be overwritten. "
            "Choose another key_added, or remove it."
        )
    slot = _keys.effects(key)
    if slot in adata.obsm and not ours:
        raise DataError(
            f"adata.obsm[{slot!r}] is there already, without a decomposition in adata.uns[{key!r}], and would be "
            "overwritten. Choose another key_added, or remove it."
        )


def write_results(adata: AnnData, key: str, cells: Cells, fit: GLMMFit, params: Mapping[str, Any]) -> None:
    """Write a fit to `uns[key]` and `obsm[f"{key}_effects"]`; cells that were left out get NaN."""
    fit = _without_slashes(fit)
    own(adata)
    effects = pd.DataFrame(index=adata.obs_names)
    for name, (mean, sd) in fit.effects.items():
        for column, values in ((f"{name}_mean", mean), (f"{name}_sd", sd)):
            full = np.full(adata.n_obs, np.nan)
            full[cells.kept] = values
            effects[column] = full
    adata.uns[key] = {
        _keys.PARAMS: _plain(params),
        _keys.COMPONENTS: pd.DataFrame(fit.components),
        _keys.SHARES: pd.DataFrame(fit.shares),
        _keys.FIXED_EFFECTS: _fixed_effects(fit),
        _keys.DRAWS: pd.DataFrame(fit.draws),
        _keys.MODE: dict(fit.mode),
        _keys.FREE_ENERGY: float(fit.free_energy),
        _keys.LOG_EVIDENCE: float(fit.log_evidence),
        _keys.DIAGNOSTICS: _plain(fit.diagnostics),
    }
    adata.obsm[_keys.effects(key)] = effects


def write_table(adata: AnnData, key: str, name: str, table: pd.DataFrame) -> None:
    """Add a table to the fit under `uns[key]`."""
    own(adata)
    adata.uns[key][name] = table


def own(adata: AnnData) -> None:
    """Make a view a copy of its own, which writing to it would do with a warning."""
    if adata.is_view:
        logger.info("adata was a view and is now a copy of its own: results are not in the object it came from")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ImplicitModificationWarning, and treedata's own
            adata.uns["_cellfate"] = 0  # any write makes it actual
        del adata.uns["_cellfate"]


def _without_slashes(fit: GLMMFit) -> GLMMFit:
    """The fit with "_" for "/" in the names of components and terms: a file takes "/" for a folder."""
    names: dict[str, str] = {}
    for name in dict.fromkeys([*fit.components["component"], *fit.fixed_effects["term"]]):
        plain = name.replace("/", "_")
        while plain in names.values():
            plain += "_"
        names[name] = plain
    if all("/" not in name for name in names):
        return fit
    longest = sorted((name for name in names if "/" in name), key=len, reverse=True)

    def key(text: str) -> str:
        """`variance_<component>`, `beta[<term>]` and the like."""
        for name in longest:
            if name in text:
                return text.replace(name, names[name])
        return text

    return replace(
        fit,
        components=fit.components | {"component": [names[name] for name in fit.components["component"]]},
        shares=fit.shares | {"component": [names[name] for name in fit.shares["component"]]},
        fixed_effects=fit.fixed_effects | {"term": [names[name] for name in fit.fixed_effects["term"]]},
        draws={key(name): x for name, x in fit.draws.items()},
        mode={key(name): x for name, x in fit.mode.items()},
        effects={names[name]: x for name, x in fit.effects.items()},
    )


def _fixed_effects(fit: GLMMFit) -> pd.DataFrame:
    table = pd.DataFrame(fit.fixed_effects)
    return table.astype({"term": str, **{c: float for c in table.columns if c != "term"}})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as text, numbers and lists of text; what is None is left out, since files cannot hold it."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            if value:
                out[name] = _plain({str(key).replace("/", "_"): one for key, one in value.items()})
        elif isinstance(value, bool | int | float | str | np.number):
            out[name] = value
        elif isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            if value:
                out[name] = np.array(value, dtype=object)
        else:
            out[name] = str(value)
    return out
