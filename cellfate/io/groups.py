"""Grouping factors: random intercepts by the levels of an obs column."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate.errors import CellfateWarning, DataError
from cellfate.io.columns import check_present, column, factorize
from cellfate.io.responses import Response
from cellfate.model.checks import RESERVED

if TYPE_CHECKING:
    from anndata import AnnData

TAKEN = ("lineage", "spatial", *RESERVED)  # names of other components and rows


def read_groups(
    adata: AnnData, groups: Any, fate: str, kind: str, family: str, response: Response, kept: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    """Codes (n,) and level names of every grouping factor."""
    if isinstance(groups, Mapping):
        raise NotImplementedError(
            "groups is a dict: random slopes are not there yet. Give the names of obs columns for random intercepts."
        )
    keys = [] if groups is None else [groups] if isinstance(groups, str) else groups
    if not isinstance(keys, (list, tuple)):
        raise DataError(f"groups is of type {type(groups).__name__}, wanted the name of an obs column or a list.")
    codes: dict[str, np.ndarray] = {}
    levels: dict[str, tuple[str, ...]] = {}
    for key in keys:
        values = column(adata, key, "groups")[kept]
        label = f"group obs[{key!r}]"
        if key in TAKEN:
            raise DataError(
                f"{label} has the name of another component. Rename the column: {', '.join(TAKEN)} are taken."
            )
        if key == fate:
            raise DataError(f"{label} is the fate itself. Leave it out of `groups`.")
        if key in codes:
            raise DataError(f"{label} is given twice. Name every group once.")
        check_present(values, label, "Give those cells a level of their own, or leave them out.")
        if pd.api.types.is_float_dtype(values.dtype) and (values % 1 != 0).any():
            raise DataError(
                f"{label} holds fractions such as {values[values % 1 != 0].iloc[0]:g}, which are measurements, not "
                f"levels. Put it into the formula: '~ 1 + {key}'."
            )
        codes[key], levels[key] = factorize(values, label)
        if len(levels[key]) == 1:
            raise DataError(
                f"{label} has one level: all {len(values)} cells are {levels[key][0]!r}. It explains nothing here: "
                "leave it out of `groups`."
            )
        check_not_one_each(codes[key], label, kind, family, response)
        same = pd.factorize(codes[key])[0]
        for other in list(codes)[:-1]:
            if np.array_equal(same, pd.factorize(codes[other])[0]):
                raise DataError(
                    f"{label} and obs[{other!r}] split the cells in the same way. Their effects cannot be told apart: "
                    "leave one out."
                )
    return codes, levels


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
