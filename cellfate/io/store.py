"""Results into AnnData: only after a fit is complete, only under its own names, in types that h5ad and zarr can hold."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate import _keys
from cellfate._runtime import logger
from cellfate.cells import Cells
from cellfate.errors import DataError, Failure

if TYPE_CHECKING:
    from anndata import AnnData

    from cellfate.inference.fit import GLMMFit

FEW_DRAWS = 200  # kept of each response, where there are many


def check_name(key: Any) -> None:
    """Is this a name that a file can hold?"""
    if not isinstance(key, str) or not key or "/" in key:
        raise DataError(f"key_added is {key!r}, wanted a name without '/'.")


LATER = (  # tables that tools add to a fit
    _keys.ANCESTORS, _keys.MARGINAL_EFFECTS, _keys.ASSOCIATIONS, _keys.COMPARISON, _keys.TESTS, _keys.CHECKS, _keys.PREDICTIONS,
    _keys.CALIBRATION, _keys.PRIOR_SENSITIVITY, _keys.CONDITIONS, _keys.CONDITION_DIFFERENCES, _keys.CONDITION_EVIDENCE,
)  # fmt: skip


def check_free(adata: AnnData, key: str) -> None:
    """Refuse a `key_added` whose slots hold something that is not an earlier fit."""
    check_name(key)
    held = adata.uns.get(key)
    ours = isinstance(held, Mapping) and _keys.PARAMS in held and _keys.COMPONENTS in held
    if held is not None and not ours:
        raise DataError(
            f"adata.uns[{key!r}] holds a {type(held).__name__} that is no decomposition and would be overwritten. "
            "Choose another key_added, or remove it."
        )
    for slot, name, where in ((_keys.effects(key), "obsm", adata.obsm), (_keys.shares(key), "varm", adata.varm)):
        if slot in where and not ours:
            raise DataError(
                f"adata.{name}[{slot!r}] is there already, without a decomposition in adata.uns[{key!r}], and would be "
                "overwritten. Choose another key_added, or remove it."
            )


def write_results(adata: AnnData, key: str, cells: Cells, fit: GLMMFit, params: Mapping[str, Any]) -> None:
    """Write a fit to `uns[key]` and `obsm[f"{key}_effects"]`; cells that were left out get NaN."""
    fit = _without_slashes(fit)
    effects = pd.DataFrame(index=adata.obs_names)
    for name, (mean, sd) in fit.effects.items():
        for column, values in ((f"{name}_mean", mean), (f"{name}_sd", sd)):
            full = np.full(adata.n_obs, np.nan)
            full[cells.kept] = values
            effects[column] = full
    tables = {
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
    own(adata)
    _clear(adata, key)
    adata.uns[key] = tables
    adata.obsm[_keys.effects(key)] = effects


def write_many(
    adata: AnnData, key: str, found: Sequence[GLMMFit | Failure], genes: Sequence[str] | None, params: Mapping[str, Any]
) -> None:
    """Write the fits of many responses to `uns[key]`, and where they are `genes` their shares to `varm[f"{key}_shares"]`."""
    fits = [_without_slashes(f) for f in found if not isinstance(f, Failure)]
    names = [str(f.components["response"][0]) for f in fits]

    def stacked(tables: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
        frames = [pd.DataFrame(table) for table in tables]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def named(tables: Iterable[Mapping[str, Any] | pd.DataFrame]) -> pd.DataFrame:
        whole = stacked({"response": name, **dict(table)} for name, table in zip(names, tables, strict=True))
        return whole.astype({"response": str}) if len(whole) else whole

    shares = stacked(f.shares for f in fits)
    tables = {
        _keys.PARAMS: _plain(params),
        _keys.COMPONENTS: stacked(f.components for f in fits),
        _keys.SHARES: shares,
        _keys.FIXED_EFFECTS: named(_fixed_effects(f) for f in fits),
        _keys.DRAWS: named({name: x[:FEW_DRAWS] for name, x in f.draws.items()} for f in fits),
        _keys.RESPONSES: _responses(found),
    }
    of_genes = None
    if genes is not None and fits:
        latent = shares[shares["scale"] == "latent"]
        table = latent.pivot_table(index="response", columns="component", values="share", observed=True)
        order = [name for name in fits[0].shares["component"] if name in table]
        table = table[list(dict.fromkeys(order))].reindex(adata.var_names)
        table.columns = table.columns.astype(str)
        table.columns.name = table.index.name = None
        of_genes = table
    own(adata)
    _clear(adata, key)
    adata.uns[key] = tables
    if of_genes is not None:
        adata.varm[_keys.shares(key)] = of_genes


def _responses(found: Sequence[GLMMFit | Failure]) -> pd.DataFrame:
    """A row per response: how its fit went, its evidence and its mode."""
    rows: list[dict[str, Any]] = []
    for one in found:
        if isinstance(one, Failure):
            rows.append({"response": one.response, "status": f"failed: {one.reason}"})
            continue
        rows.append(
            {
                "response": str(one.components["response"][0]),
                "status": one.diagnostics["status"],
                _keys.FREE_ENERGY: one.free_energy,
                _keys.LOG_EVIDENCE: one.log_evidence,
                **{f"mode_{name.replace('/', '_')}": value for name, value in one.mode.items()},
                **{name: value for name, value in one.diagnostics.items() if name != "status"},
            }
        )
    table = pd.DataFrame(rows)
    for column in table.select_dtypes(exclude="number"):
        if all(isinstance(value, str) for value in table[column].dropna()):
            table[column] = table[column].fillna("")
    return table


def _clear(adata: AnnData, key: str) -> None:
    """Take away what an earlier fit of this name wrote beside `uns`, which the new one may not write, and say what goes."""
    later = [name for name in LATER if name in adata.uns.get(key, {})]
    if later:
        logger.info(
            "the fit under %r is replaced, and with it its %s; another key_added keeps both", key, ", ".join(later)
        )
    for held in (adata.obs, adata.obsm):
        if _keys.residual(key) in held and _keys.CHECKS in later:
            del held[_keys.residual(key)]
    for slot, where in ((_keys.effects(key), adata.obsm), (_keys.shares(key), adata.varm)):
        if slot in where:
            del where[slot]
    for graph in getattr(adata, "obst", {}).values():  # of ancestors that were predicted from the earlier fit
        for _, data in graph.nodes(data=True):
            for name in _keys.node_attributes(key):
                data.pop(name, None)


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
        effects={names.get(name, key(name)): x for name, x in fit.effects.items()},
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
