"""Grouping factors: random intercepts and slopes by the levels of an obs column."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate.errors import CellfateWarning, DataError
from cellfate.io.columns import check_present, column, factorize
from cellfate.io.design import columns_of, model_columns
from cellfate.io.responses import Response
from cellfate.model.checks import RESERVED, check_finite

if TYPE_CHECKING:
    from anndata import AnnData

TAKEN = ("lineage", "spatial", "niche", *RESERVED)  # names of other components and rows
INTERCEPT = "Intercept"

Codes = dict[str, np.ndarray]
Levels = dict[str, tuple[str, ...]]
SlopesOf = dict[str, tuple[np.ndarray, np.ndarray]]


def read_groups(
    adata: AnnData, groups: Any, fate: str, kind: str, family: str, response: Response, kept: np.ndarray
) -> tuple[Codes, Levels, SlopesOf]:
    """Codes (n,) and level names of every random intercept, and codes and covariate (n,) of every random slope.

    Beside an intercept, a covariate is centered over the cells: the two are independent, and that depends on where zero is.
    """
    formulas = _formulas(groups)
    codes: Codes = {}
    levels: Levels = {}
    slopes: SlopesOf = {}
    seen: list[tuple[str, np.ndarray, np.ndarray]] = []
    for key, formula in formulas:
        own, names, label = _read_group(adata, key, fate, kind, family, response, kept)
        columns = {INTERCEPT: np.ones(len(own))}
        if formula is not None:
            columns = _columns(adata, key, formula, fate, own, kept)
        if key in codes or any(name.startswith(f"{key}:") for name in slopes):
            raise DataError(f"{label} is given twice. Name every group once.")
        for term, x in columns.items():
            name = key if term == INTERCEPT else f"{key}:{term}"
            if name in codes or name in slopes or (term != INTERCEPT and name in dict(formulas)):
                raise DataError(
                    f"groups: two components would be called {name!r}, the slopes of {key!r} and a group of that name. Rename one "
                    "of the columns."
                )
            _check_apart(seen, label if term == INTERCEPT else f"slopes {name!r}", own, x)
            if term == INTERCEPT:
                codes[key], levels[key] = own, names
            else:
                slopes[name] = own, x
    return codes, levels, slopes


def _formulas(groups: Any) -> list[tuple[Any, Any]]:
    """Groups with their formulas; None for an intercept alone."""
    if isinstance(groups, Mapping):
        return list(groups.items())
    keys = [] if groups is None else [groups] if isinstance(groups, str) else groups
    if not isinstance(keys, (list, tuple)):
        raise DataError(
            f"groups is of type {type(groups).__name__}, wanted the name of an obs column or a list, or a dict of formulas "
            "such as {'batch': '~ 1 + time'}."
        )
    return [(key, None) for key in keys]


def _read_group(
    adata: AnnData, key: Any, fate: str, kind: str, family: str, response: Response, kept: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...], str]:
    values = column(adata, key, "groups")[kept]
    label = f"group obs[{key!r}]"
    if key in TAKEN:
        raise DataError(f"{label} has the name of another component. Rename the column: {', '.join(TAKEN)} are taken.")
    if key == fate:
        raise DataError(f"{label} is the fate itself. Leave it out of `groups`.")
    check_present(values, label, "Give those cells a level of their own, or leave them out.")
    if pd.api.types.is_float_dtype(values.dtype) and (values % 1 != 0).any():
        raise DataError(
            f"{label} holds fractions such as {values[values % 1 != 0].iloc[0]:g}, which are measurements, not "
            f"levels. Put it into the formula: '~ 1 + {key}'."
        )
    codes, levels = factorize(values, label)
    if len(levels) == 1:
        raise DataError(
            f"{label} has one level: all {len(values)} cells are {levels[0]!r}. It explains nothing here: "
            "leave it out of `groups`."
        )
    check_not_one_each(codes, label, kind, family, response)
    return codes, levels, label


def _columns(
    adata: AnnData, key: str, formula: Any, fate: str, codes: np.ndarray, kept: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns (n,) of a group's formula by term, each varying over the cells; centered where there is an intercept."""
    label = f"groups[{key!r}] = {formula!r}"
    obs = adata.obs[kept]
    if isinstance(formula, str) and "|" in formula and "(" not in formula:
        raise DataError(
            f"{label} has a '|': the group is the key, and its intercept and slopes are independent. Write such as '~ 1 + time'."
        )
    design, terms = model_columns(formula, obs, label)
    if fate in columns_of(formula):
        raise DataError(f"{label} has the fate {fate!r} among its covariates. Leave it out.")
    if not terms:
        raise DataError(f"{label} has no term. Write '~ 1' for intercepts, '~ 1 + time' for slopes beside them.")
    columns = dict(zip(terms, design.T, strict=True))
    for term, x in columns.items():
        if term == INTERCEPT:
            continue
        check_finite(x, obs.index.to_numpy(), f"{label}: column {term!r}", "Change the transformation or the cells.")
        if np.ptp(x) <= 1e-10 * np.abs(x).max():
            raise DataError(
                f"{label}: column {term!r} is {x[0]:g} in all {len(x)} cells. A slope needs a covariate that varies: leave it "
                "out."
            )
        if INTERCEPT in columns:
            columns[term] = x - x.mean()
        if not _varies_within(columns[term], codes):
            warnings.warn(
                f"{label}: column {term!r} has one value in each level of {key!r}. How a level answers to it is then hardly told "
                "from how the level differs: a slope belongs to what varies within levels.",
                CellfateWarning,
                stacklevel=6,
            )
    return columns


def _varies_within(x: np.ndarray, codes: np.ndarray) -> bool:
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    spread = np.maximum.reduceat(x[order], starts) - np.minimum.reduceat(x[order], starts)
    return bool((spread > 1e-10 * np.ptp(x)).any())


def _check_apart(
    seen: list[tuple[str, np.ndarray, np.ndarray]], label: str, codes: np.ndarray, column: np.ndarray
) -> None:
    """No two components with the same levels and the same column, up to its unit."""
    same = pd.factorize(codes)[0]
    for other, others_codes, others in seen:
        parallel = abs(column @ others) > (1 - 1e-12) * np.linalg.norm(column) * np.linalg.norm(others)
        if parallel and np.array_equal(same, others_codes):
            how = (
                "split the cells"
                if label.startswith("group")
                else "follow one covariate, up to its unit, and split the cells"
            )
            raise DataError(
                f"{label} and {other.removeprefix('group ')} {how} in the same way. Their effects cannot be told apart: leave one "
                "out."
            )
    seen.append((label, same, column))


def check_not_one_each(codes: np.ndarray, label: str, kind: str, family: str, response: Response) -> None:
    """A level per cell is an observation-level effect: it takes up the overdispersion of counts, else it is hidden."""
    n = len(codes)
    if len(np.unique(codes)) < n:
        return
    single = response.trials is None or response.trials.max() <= 1
    if kind == "binary" or (kind == "successes" and single):
        raise DataError(
            f"{label} has as many levels as cells ({n}). One yes or no per cell cannot show an effect of its own for "
            "every cell: leave it out, or name a coarser column."
        )
    if kind == "real":
        raise DataError(
            f"{label} has as many levels as cells ({n}), which is what the residual of a gaussian fate already is. "
            "Leave it out, or name a coarser column."
        )
    if family == "negative_binomial":
        warnings.warn(
            f"{label} has as many levels as cells ({n}): an observation-level effect and the dispersion of the "
            "negative binomial absorb the same variation and cannot be told apart. Use family='poisson' with it, or "
            "leave it out.",
            CellfateWarning,
            stacklevel=5,
        )
