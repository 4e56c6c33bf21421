"""Keys, columns and arrays as the user gives them: looked up, aligned with the cells, checked, made plain."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate.errors import DataError
from cellfate.trees.forest import examples

if TYPE_CHECKING:
    from anndata import AnnData


def check_adata(adata: Any) -> None:
    """Is this an AnnData with cells, each with a name of its own?"""
    if not all(hasattr(adata, slot) for slot in ("obs", "obsm", "uns", "obs_names", "n_obs")):
        raise DataError(f"adata is a {type(adata).__name__}, wanted an AnnData or a TreeData.")
    if adata.n_obs == 0:
        raise DataError("adata has no cells (n_obs = 0). Check the filter that it went through.")
    names = adata.obs_names
    if not names.is_unique:
        twice = names[names.duplicated()].unique()
        raise DataError(
            f"adata.obs_names: {len(twice)} names are shared by {int(names.isin(twice).sum())} of {adata.n_obs} "
            f"cells: {examples(twice)}. Leaves and cells are matched by name: rename the cells, for instance "
            "with `adata.obs_names_make_unique()`, and the leaves with them."
        )


def among(names: Iterable[str], members: Iterable[str]) -> np.ndarray:
    """Which names are members; `np.isin` compares every pair where names are objects."""
    known = frozenset(members)
    return np.array([name in known for name in names], dtype=bool)


def instead(key: object, keys: Iterable[object]) -> str:
    """What there is in place of a missing key: the similar ones, or a few of all."""
    names = [str(other) for other in keys]
    lower = {name.lower(): name for name in reversed(names)}
    close = [lower[name] for name in difflib.get_close_matches(str(key).lower(), list(lower), n=3, cutoff=0.6)]
    if close:
        return f"similar: {examples(close)}"
    return f"there is {examples(names)}" if names else "it is empty"


def column(adata: AnnData, key: str, role: str) -> pd.Series:
    """The column `obs[key]`."""
    if not isinstance(key, str):
        raise DataError(f"{role} is of type {type(key).__name__}, wanted the name of an obs column.")
    if key not in adata.obs.columns:
        raise DataError(
            f"{role}: there is no obs column {key!r}; {instead(key, adata.obs.columns)}. "
            f"Add adata.obs[{key!r}] or name another column."
        )
    found = adata.obs[key]
    if isinstance(found, pd.DataFrame):
        raise DataError(f"{role}: adata.obs has {found.shape[1]} columns called {key!r}. Rename all but one.")
    return found


def per_cell(adata: AnnData, value: Any, label: str) -> Any:
    """An array, series or frame of the user's with one row per cell, in the order of the cells."""
    n = adata.n_obs
    if isinstance(value, (pd.Series, pd.DataFrame)):
        strangers = adata.obs_names.difference(value.index)
        if len(value) == n and len(strangers) == 0:
            return value.reindex(adata.obs_names)
        if not isinstance(value.index, pd.RangeIndex):
            raise DataError(
                f"{label} has an index that is not the names of the cells: {len(strangers)} of {n} cells are not in "
                f"it: {examples(strangers)}. Index it by adata.obs_names, or give a plain array."
            )
    try:
        rows = np.shape(value)[0] if np.ndim(value) else None
    except ValueError as e:
        raise DataError(f"{label} has rows of different lengths. Give one row per cell, all of the same length.") from e
    if rows != n:
        found = "a single value" if rows is None else f"{rows} rows"
        raise DataError(f"{label} has {found} for {n} cells. Give one row per cell, in the order of adata.obs_names.")
    return value


def numbers(values: Any, label: str, remedy: str) -> np.ndarray:
    """As float64 with NaN where missing; anything but real numbers is an error."""
    if isinstance(values, (pd.Series, pd.DataFrame)):
        values = values.infer_objects()
        dtypes = {values.dtype} if isinstance(values, pd.Series) else set(values.dtypes)
    else:
        values = np.asarray(values)
        if values.dtype == object:
            return numbers(pd.DataFrame(values) if values.ndim == 2 else pd.Series(values.ravel()), label, remedy)
        dtypes = {values.dtype}
    for dtype in dtypes:
        numeric = pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_complex_dtype(dtype)
        if not numeric:
            words = isinstance(dtype, pd.StringDtype) or getattr(dtype, "kind", "") in "OUS"
            kind = "text" if words and not isinstance(dtype, pd.CategoricalDtype) else str(dtype)
            raise DataError(f"{label} holds no numbers but {kind}. {remedy}")
    if isinstance(values, (pd.Series, pd.DataFrame)):
        return values.to_numpy(dtype=np.float64, na_value=np.nan)
    return values.astype(np.float64)


def check_present(values: pd.Series, label: str, remedy: str) -> None:
    """No missing values in a column of labels."""
    missing = values.isna().to_numpy()
    if missing.any():
        raise DataError(
            f"{label} is NaN in {int(missing.sum())} of {len(values)} cells: {examples(values.index[missing])}. "
            f"{remedy}"
        )


def factorize(values: pd.Series, label: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes (n,) int64 and the names of the levels that occur, in the order of the categories, else sorted."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        kept = values.cat.remove_unused_categories()
        codes, levels = kept.cat.codes.to_numpy(), list(kept.cat.categories)
    else:
        try:
            codes, index = pd.factorize(values, sort=True)
        except TypeError:  # numbers and text in one column do not sort
            codes, index = pd.factorize(values.astype(str), sort=True)
        levels = list(index)
    texts = [_text(level) for level in levels]
    if len(set(texts)) < len(texts):
        twice = sorted({text for text in texts if texts.count(text) > 1})
        raise DataError(
            f"{label} has different levels that read the same: {examples(twice)}. "
            "Make the column text, or numbers, throughout."
        )
    return codes.astype(np.int64), tuple(texts)


def _text(level: object) -> str:
    """A level as text; 1.0 reads 1, since integers with a gap become floats in pandas."""
    if isinstance(level, (float, np.floating)) and float(level).is_integer():
        return str(int(level))
    return str(level)
