"""The fate: an obs column or a gene, checked against what its family can have produced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate.errors import DataError
from cellfate.io.columns import check_finite, check_present, column, factorize, instead, numbers, per_cell
from cellfate.trees.forest import examples

if TYPE_CHECKING:
    from anndata import AnnData

FEWEST = 2  # cells that have to show each side of a fate


@dataclass(frozen=True, eq=False)
class Response:
    """One fate as numbers."""

    y: np.ndarray  # (n,) float64
    trials: np.ndarray | None  # (n,) float64, successes only
    levels: tuple[str, str] | None  # binary only: what 0 and 1 stand for


def find_fate(adata: AnnData, fate: Any) -> tuple[pd.Series, str]:
    """The fate of every cell, and how to call it in a message."""
    if isinstance(fate, (list, tuple, np.ndarray, pd.Index)):
        raise NotImplementedError(
            f"fate is a list of {len(fate)}: several fates at once are not there yet. Loop over them: "
            "`for name in fates: cf.tl.decompose(adata, name, ..., key_added=f'cellfate_{name}')`."
        )
    if not isinstance(fate, str):
        raise DataError(f"fate is of type {type(fate).__name__}, wanted the name of an obs column or of a gene.")
    in_obs, genes = fate in adata.obs.columns, np.flatnonzero(adata.var_names == fate)
    if in_obs and genes.size:
        raise DataError(f"fate {fate!r} is both an obs column and a gene. Rename one of them.")
    if in_obs:
        return column(adata, fate, "fate"), f"fate obs[{fate!r}]"
    if genes.size == 0:
        if fate in adata.obsm:
            raise NotImplementedError(
                f"fate {fate!r} is a matrix in obsm: several fates at once are not there yet. "
                "Put one column of it into obs."
            )
        raise DataError(
            f"fate {fate!r} is neither an obs column ({instead(fate, adata.obs.columns)}) nor a gene "
            f"({instead(fate, adata.var_names)}). Name a column of adata.obs or one of adata.var_names."
        )
    if genes.size > 1:
        raise DataError(
            f"fate {fate!r} names {genes.size} genes of adata.var_names. Run `adata.var_names_make_unique()`."
        )
    if adata.X is None:
        raise DataError(f"fate {fate!r} is a gene, but adata.X is empty. Put the counts into adata.X.")
    return pd.Series(adata.obs_vector(fate), index=adata.obs_names), f"fate {fate!r} (gene in X)"


def read_response(adata: AnnData, fate: Any, *, kind: str, trials: Any, kept: np.ndarray) -> Response:
    """The fate of the kept cells, as a family of this kind (real, binary, successes, count) takes it."""
    column_, label = find_fate(adata, fate)
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
    response = numbers(values, label, _not_numbers(values, kind))
    check_finite(response, names, label, remedy)
    if kind == "real":
        _check_varies(response, label)
        return Response(response, None, None)
    if kind == "successes":
        return _successes(adata, response, label, trials, kept)
    if kind == "count":
        check_counts(response, names, label, "Give raw counts; for normalized or log values use family='gaussian'.")
        _check_varies(response, label)
        if (response > 0).sum() < FEWEST:
            raise DataError(
                f"{label} is above zero in only 1 of {len(response)} cells: {examples(names[response > 0])}. "
                f"At least {FEWEST} are needed to say anything about relatives or neighbors."
            )
        return Response(response, None, None)
    raise NotImplementedError(f"Reading a response of kind {kind!r} is not there yet.")


def check_counts(values: np.ndarray, names: np.ndarray, label: str, remedy: str) -> None:
    """Whole numbers, zero or more."""
    for kind, bad in (("negative", values < 0), ("not a whole number", values != np.round(values))):
        if bad.any():
            shown = examples(f"{name}: {value:g}" for name, value in zip(names[bad][:6], values[bad][:6], strict=True))
            raise DataError(f"{label} is {kind} in {int(bad.sum())} of {len(values)} cells: {shown}. {remedy}")


def _not_numbers(values: pd.Series, kind: str) -> str:
    levels = values.dropna().unique()
    if len(levels) == 2:
        return f"It has two levels ({examples(levels)}): use family='bernoulli'."
    what = {"real": "measurements", "count": "counts", "successes": "numbers of successes"}[kind]
    return (
        f"Give {what} as numbers (`.astype(float)`), or ask about one level at a time: "
        "`adata.obs['is_it'] = adata.obs[fate] == level` with family='bernoulli'."
    )


def _check_varies(values: np.ndarray, label: str) -> None:
    if np.ptp(values) == 0:
        raise DataError(
            f"{label} has one level: it is {values[0]:g} in all {len(values)} cells. "
            "There is no variation to partition: choose another fate or other cells."
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
    if len(levels) < 2:
        raise DataError(
            f"{label} has one level: it is {levels[0]!r} in all {len(values)} cells. "
            "There is no variation to partition: choose another fate or other cells."
        )
    rare = int(counts.argmin())
    if counts[rare] < FEWEST:
        raise DataError(
            f"{label} has {counts[rare]} cell of level {levels[rare]!r} ({examples(values.index[codes == rare])}) "
            f"against {counts[1 - rare]} of {levels[1 - rare]!r}. At least {FEWEST} of each are needed: "
            "merge levels or choose another fate."
        )
    return Response(codes.astype(np.float64), None, (levels[0], levels[1]))


def _successes(adata: AnnData, successes: np.ndarray, label: str, trials: Any, kept: np.ndarray) -> Response:
    names = adata.obs_names[kept].to_numpy()
    check_counts(
        successes,
        names,
        label,
        "For binomial the fate is the number of successes; a proportion has to be multiplied by its trials.",
    )
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
    n = n[kept]
    check_finite(n, names, source, "Give a whole number for every cell, or leave those cells out.")
    check_counts(n, names, source, "Trials are counted: give whole numbers.")
    for kind, bad, remedy in (
        ("below 1", n < 1, "A cell without a trial says nothing: leave those cells out."),
        (
            "fewer than the successes",
            n < successes,
            "Successes are part of the trials: check that the two are not swapped.",
        ),
    ):
        if bad.any():
            shown = examples(
                f"{name}: {int(y)} of {int(t)}"
                for name, y, t in zip(names[bad][:6], successes[bad][:6], n[bad][:6], strict=True)
            )
            raise DataError(f"{source} is {kind} in {int(bad.sum())} of {len(n)} cells: {shown}. {remedy}")
    if np.ptp(successes / n) == 0:
        raise DataError(
            f"{label} has one level: it is {successes[0] / n[0]:g} of the trials in all {len(n)} cells. "
            "There is no variation to partition: choose another fate or other cells."
        )
    return Response(successes, n, None)
