"""The fate: an obs column or a gene, checked against what its family can have produced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate._runtime import logger
from cellfate.errors import DataError
from cellfate.io.columns import check_present, column, factorize, instead, numbers, per_cell
from cellfate.model.checks import check_both_sides, check_counts, check_finite, check_levels, check_response
from cellfate.trees.forest import examples

if TYPE_CHECKING:
    from anndata import AnnData


MOST_LEVELS = 30  # of an ordered fate


@dataclass(frozen=True, eq=False)
class Response:
    """One fate as numbers."""

    y: np.ndarray  # (n,) float64, or (n, K) of counts or probabilities
    trials: np.ndarray | None  # (n,) float64, successes only
    levels: tuple[str, ...] | None  # binary and ordered: what 0, 1, ... stand for


def find_fate(adata: AnnData, fate: Any, layer: str | None = None) -> tuple[pd.Series, str]:
    """The fate of every cell, and how to call it in a message."""
    if not isinstance(fate, str):
        raise DataError(f"fate is of type {type(fate).__name__}, wanted the name of an obs column or of a gene.")
    in_obs, genes = fate in adata.obs.columns, np.flatnonzero(adata.var_names == fate)
    if in_obs and genes.size:
        raise DataError(f"fate {fate!r} is both an obs column and a gene. Rename one of them.")
    if in_obs and layer is not None:
        raise DataError(f"layer {layer!r} was given, but fate {fate!r} is an obs column. Leave it out.")
    if in_obs:
        return column(adata, fate, "fate"), f"fate obs[{fate!r}]"
    if genes.size == 0:
        if fate in adata.obsm:
            raise DataError(
                f"fate {fate!r} is a matrix in obsm. Put its columns into obs and give their names as a list."
            )
        raise DataError(
            f"fate {fate!r} is neither an obs column ({instead(fate, adata.obs.columns)}) nor a gene "
            f"({instead(fate, adata.var_names)}). Name a column of adata.obs or one of adata.var_names."
        )
    if genes.size > 1:
        raise DataError(
            f"fate {fate!r} names {genes.size} genes of adata.var_names. Run `adata.var_names_make_unique()`."
        )
    if layer is not None and layer not in adata.layers:
        raise DataError(
            f"there is no layer {layer!r}; {instead(layer, adata.layers)}. Name one, or leave it out for X."
        )
    if layer is None and adata.X is None:
        raise DataError(f"fate {fate!r} is a gene, but adata.X is empty. Put the counts into adata.X, or name a layer.")
    values = adata.obs_vector(fate, layer=layer)
    where = "X" if layer is None else f"layers[{layer!r}]"
    return pd.Series(values, index=adata.obs_names), f"fate {fate!r} (gene in {where})"


def read_response(
    adata: AnnData, fate: Any, *, kind: str, trials: Any, kept: np.ndarray, layer: str | None = None
) -> Response:
    """The fate of the kept cells, as a family of this kind takes it."""
    if kind == "fates" and isinstance(fate, str) and fate in adata.obsm:
        if trials is not None or layer is not None:
            raise DataError(
                f"fate {fate!r} is a matrix in obsm: it has no trials of its own and no layer. Leave them out."
            )
        return _weights(adata, fate, kept)
    column_, label = find_fate(adata, fate, layer)
    values, names = column_[kept], adata.obs_names[kept].to_numpy()
    remedy = f"Leave those cells out: `adata[adata.obs[{fate!r}].notna()]`." if fate in adata.obs else "Leave them out."
    if trials is not None and kind != "successes":
        raise DataError(
            f"trials was given, but only family='binomial' has trials; {label} is fitted without. "
            "Leave `trials` out or use family='binomial'."
        )
    if kind == "binary":
        check_present(values, label, remedy)
        return _binary(values, label)
    if kind in ("levels", "fates"):
        check_present(values, label, remedy)
        return ordered(values, label) if kind == "levels" else _unordered(values, label)
    response = numbers(values, label, _not_numbers(values, kind))
    check_finite(response, names, label, remedy)
    if kind not in ("real", "successes", "count", "proportion"):
        raise NotImplementedError(f"Reading a response of kind {kind!r} is not there yet.")
    total, source = None, "trials"
    if kind == "successes":
        total, source = _trials(adata, response, label, trials, kept)
    check_response(response, names, label, kind=kind, trials=total, trials_label=source)
    return Response(response, total, None)


def _not_numbers(values: pd.Series, kind: str) -> str:
    levels = values.dropna().unique()
    if len(levels) == 2:
        return f"It has two levels ({examples(levels)}): use family='bernoulli'."
    what = {
        "real": "measurements",
        "count": "counts",
        "successes": "numbers of successes",
        "proportion": "probabilities",
    }[kind]
    return (
        f"Give {what} as numbers (`.astype(float)`), or ask about one level at a time: "
        "`adata.obs['is_it'] = adata.obs[fate] == level` with family='bernoulli'."
    )


def _binary(values: pd.Series, label: str) -> Response:
    if pd.api.types.is_float_dtype(values.dtype):
        check_finite(values.to_numpy(np.float64), values.index.to_numpy(), label, "Leave those cells out.")
    codes, levels = factorize(values, label)
    counts = np.bincount(codes, minlength=len(levels))
    if len(levels) > 2:
        shown = ", ".join(f"{level!r} in {count}" for level, count in list(zip(levels, counts, strict=True))[:5])
        more = ", ..." if len(levels) > 5 else ""
        raise DataError(
            f"{label} has {len(levels)} levels, but family='bernoulli' wants two: {shown}{more} cells. Ask about one: "
            "`adata.obs['is_it'] = adata.obs[fate] == level`; for counts or measurements choose another family."
        )
    check_both_sides(codes, values.index.to_numpy(), label, levels, [repr(level) for level in levels])
    if list(levels) not in (["0", "1"], ["False", "True"]):
        logger.info("%s: %r is 1, %r is 0", label, levels[1], levels[0])
    return Response(codes.astype(np.float64), None, (levels[0], levels[1]))


def _unordered(values: pd.Series, label: str) -> Response:
    """Fates in the order of a categorical, or of their names."""
    if pd.api.types.is_float_dtype(values.dtype):
        check_finite(values.to_numpy(np.float64), values.index.to_numpy(), label, "Leave those cells out.")
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.cat.remove_unused_categories()
    codes, levels = factorize(values, label)
    if len(levels) > MOST_LEVELS:
        raise DataError(
            f"{label} has {len(levels)} fates, wanted up to {MOST_LEVELS}: {examples(levels)}. Merge rare ones, or choose another "
            "column; for measurements use family='gaussian'."
        )
    check_levels(codes, values.index.to_numpy(), label, levels)
    return Response(codes.astype(np.float64), None, tuple(levels))


def _weights(adata: AnnData, fate: str, kept: np.ndarray) -> Response:
    """Counts or probabilities of fates, a column each; they are checked where they are fitted."""
    value = adata.obsm[fate]
    names = [str(name) for name in value.columns] if isinstance(value, pd.DataFrame) else None
    matrix = value.toarray() if hasattr(value, "toarray") else np.asarray(value)
    if matrix.ndim != 2 or matrix.shape[1] < 2 or not np.issubdtype(matrix.dtype, np.number):
        raise DataError(
            f"fate obsm[{fate!r}] has shape {matrix.shape} of {matrix.dtype}, wanted numbers, a column for each of two or more fates."
        )
    y = matrix[kept].astype(np.float64)
    check_finite(y, adata.obs_names[kept].to_numpy(), f"fate obsm[{fate!r}]", "Leave those cells out.")
    return Response(y, None, tuple(names or map(str, range(y.shape[1]))))


def ordered(values: pd.Series, label: str) -> Response:
    """Levels in the order of a categorical, or of whole numbers."""
    names = values.index.to_numpy()
    if isinstance(values.dtype, pd.CategoricalDtype):
        if not values.cat.ordered:
            raise DataError(
                f"{label} is a categorical without an order ({examples(values.cat.categories)}). Give it one: "
                "`adata.obs[fate] = adata.obs[fate].cat.set_categories([...], ordered=True)`."
            )
        empty = values.cat.categories.difference(values.unique())
        if len(empty):
            logger.info("%s: %d levels have no cell and are left out: %s", label, len(empty), examples(empty))
        values = values.cat.remove_unused_categories()
        levels = tuple(str(level) for level in values.cat.categories)
        codes = values.cat.codes.to_numpy()
    else:
        if not pd.api.types.is_numeric_dtype(values.dtype):
            raise DataError(
                f"{label} is text ({examples(values.unique())}), whose order is not known. Make it an ordered categorical: "
                "`adata.obs[fate] = pd.Categorical(adata.obs[fate], categories=[...], ordered=True)`."
            )
        numbers_ = values.to_numpy(np.float64)
        check_finite(numbers_, names, label, "Leave those cells out.")
        found, codes = np.unique(numbers_, return_inverse=True)
        if (found != np.round(found)).any() or len(found) > MOST_LEVELS:
            raise DataError(
                f"{label} has {len(found)} different values ({examples(f'{x:g}' for x in found)}), wanted up to {MOST_LEVELS} whole "
                "numbers as levels. For measurements use family='gaussian', or cut them into stages with `pd.cut`."
            )
        levels = tuple(f"{x:g}" for x in found)
    check_levels(codes, names, label, levels)
    return Response(codes.astype(np.float64), None, levels)


def _trials(adata: AnnData, successes: np.ndarray, label: str, trials: Any, kept: np.ndarray) -> tuple[np.ndarray, str]:
    """Trials of the kept cells, and what to call them."""
    check_counts(
        successes,
        adata.obs_names[kept].to_numpy(),
        label,
        "For binomial the fate is the number of successes; a proportion has to be multiplied by its trials.",
    )
    return read_trials(adata, trials, kept, label)


def read_trials(adata: AnnData, trials: Any, kept: np.ndarray, label: str) -> tuple[np.ndarray, str]:
    """Trials of the kept cells, which any fate of them has, and what to call them."""
    if trials is None:
        raise DataError(
            f"{label}: family='binomial' needs `trials`, the number of tries of each cell. Give an obs column, "
            "an array, or one whole number for all; for yes/no fates use family='bernoulli'."
        )
    if isinstance(trials, str):
        source, total = f"trials obs[{trials!r}]", column(adata, trials, "trials")
    else:
        source = "trials"
        total = np.full(adata.n_obs, trials) if np.ndim(trials) == 0 else per_cell(adata, trials, "trials")
    n = numbers(total, source, "Give whole numbers.")
    if n.ndim != 1:
        raise DataError(f"{source} has shape {n.shape}. Give one number per cell.")
    return n[kept], source
