"""Grouping factors: random intercepts and slopes by the levels of an obs column."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate.errors import CellfateWarning, DataError
from cellfate.io.columns import check_present, column, factorize
from cellfate.io.design import columns_of, model_columns
from cellfate.io.responses import Response
from cellfate.model.checks import RESERVED, check_finite, check_one_each

if TYPE_CHECKING:
    from anndata import AnnData

TAKEN = ("lineage", "spatial", "niche", *RESERVED)  # names of other components and rows
INTERCEPT = "Intercept"

Codes = dict[str, np.ndarray]
Levels = dict[str, tuple[str, ...]]
SlopesOf = dict[str, tuple[np.ndarray, np.ndarray]]
# (1 + time | batch), as lme4 writes what covaries, and with || what does not
COVARYING = re.compile(r"\s*\(([^|]*[^|\s])\s*(\|\|?)\s*([^|]*[^|\s])\s*\)\s*")


def read_groups(
    adata: AnnData, groups: Any, fate: str | None, kind: str, response: Response, kept: np.ndarray
) -> tuple[Codes, Levels, SlopesOf, dict[str, str]]:
    """Codes (n,) and level names of every random intercept, codes and covariate (n,) of every random slope, and which covary.

    Beside an intercept, a covariate is centered over the cells. Where the two are independent, the model depends on where zero is;
    where they covary it does not, but what the variance of intercepts is does.
    """
    formulas = _formulas(groups)
    codes: Codes = {}
    levels: Levels = {}
    slopes: SlopesOf = {}
    correlated: dict[str, str] = {}
    seen: list[tuple[str, np.ndarray, np.ndarray]] = []
    for key, formula in formulas:
        own, names, label = _read_group(adata, key, fate, kind, response, kept)
        columns = {INTERCEPT: np.ones(len(own))}
        if formula is not None:
            label_ = f"groups[{key!r}] = {formula!r}"
            formula, covary = _bar(formula, key, label_)
            columns = _columns(adata, key, formula, label_, fate, own, kept)
            if covary and len(columns) > 1:
                correlated[key] = _one_slope(columns, key, label_)
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
    return codes, levels, slopes, correlated


def _bar(formula: Any, key: str, label: str) -> tuple[Any, bool]:
    """A formula without its bar, and whether what was before the bar covaries."""
    if not isinstance(formula, str) or "|" not in formula:
        return formula, False
    found = COVARYING.fullmatch(formula)
    if found is None:
        raise DataError(
            f"{label} has a '|'. Write '~ 1 + time' for intercepts and slopes that are independent, or '(1 + time | {key})', in "
            "brackets, for those that covary."
        )
    left, bar, right = found.groups()
    if right.strip("`") != key:
        raise DataError(
            f"{label} speaks of {right!r} behind its bar, but its key is {key!r}. Write '({left} {bar} {key})'."
        )
    return f"~ {left.lstrip('~ ')}", bar == "|"


def _one_slope(columns: dict[str, np.ndarray], key: str, label: str) -> str:
    """The name of the slopes that covary with the intercepts, which have to be of one covariate."""
    terms = [term for term in columns if term != INTERCEPT]
    if INTERCEPT not in columns or len(terms) > 1:
        raise DataError(
            f"{label} makes {len(columns)} columns, {', '.join(columns)}. Only an intercept and the slopes of one column can covary: "
            f"give one covariate, or independent ones with '||'."
        )
    return f"{key}:{terms[0]}"


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
    adata: AnnData, key: Any, fate: str | None, kind: str, response: Response, kept: np.ndarray
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
    check_not_one_each(codes, label, kind, response)  # with the negative binomial, the model warns of it
    return codes, levels, label


def _columns(
    adata: AnnData, key: str, formula: Any, label: str, fate: str | None, codes: np.ndarray, kept: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns (n,) of a group's formula by term, each varying over the cells; centered where there is an intercept."""
    obs = adata.obs[kept]
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


def check_not_one_each(codes: np.ndarray, label: str, kind: str, response: Response) -> bool:
    """Whether there is a level per cell: it takes up the overdispersion of counts, and is refused where it would be hidden."""
    n = len(codes)
    if len(np.unique(codes)) < n:
        return False
    remedy = "Leave it out, or name a coarser column."
    check_one_each(f"{label} has as many levels as cells ({n}):", kind, response.trials, remedy)
    return True
