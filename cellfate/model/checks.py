"""What a model can take: checks on plain arrays, the same for the door of AnnData and for that of arrays.

`label` is what the user calls the array, `names` are those of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellfate._runtime import warn
from cellfate.errors import DataError, unknown
from cellfate.model.catalog import concrete, get_family
from cellfate.model.families import Family
from cellfate.model.glmm import FIXED, RESIDUAL
from cellfate.model.observation import INTERACTION, NONLINEAR
from cellfate.model.partition import DISTRIBUTION, SHARED
from cellfate.trees.forest import examples

RESERVED = (
    FIXED,
    RESIDUAL,
    DISTRIBUTION,
    SHARED,
    INTERACTION,
    NONLINEAR,
)  # rows of the tables that no component may be called
FEWEST = 2  # cells that have to show each side of a fate
LARGEST_LOG_OFFSET = 50.0  # exp(50) cells, molecules or seconds: the logarithm was forgotten
DEPENDENT = 1e-10  # singular value, relative to the largest, below which scaled columns count as collinear
INDEFINITE = 1e-8  # of the largest eigenvalue, that a covariance may have below zero
LARGEST_CHECKED = 2000  # cells up to which eigenvalues are looked at


def find_family(name: str, link: str | None = None) -> Family:
    """The family called `name`; a misspelled name or link is answered with the similar one."""
    if not isinstance(name, str):
        raise DataError(f"family is of type {type(name).__name__}, wanted a name such as 'bernoulli'.")
    families = {family.name: family for family in concrete()}
    if name not in families:
        raise unknown("family", name, sorted(families))
    if link is not None and link not in families[name].links:
        raise unknown(f"link of family {name!r}", link, families[name].links)
    return get_family(name, link)


def check_finite(values: np.ndarray, names: np.ndarray, label: str, remedy: str) -> None:
    """NaN and infinity, each an error of its own."""
    for kind, bad in (("NaN", np.isnan(values)), ("infinite", np.isinf(values))):
        cells = bad if bad.ndim == 1 else bad.any(axis=1)
        if cells.any():
            raise DataError(
                f"{label} is {kind} in {int(cells.sum())} of {len(cells)} cells: {examples(names[cells])}. {remedy}"
            )


def check_response(
    y: np.ndarray, names: np.ndarray, label: str, *, kind: str, trials: np.ndarray | None, trials_label: str = "trials"
) -> None:
    """Can a family of this kind (real, binary, successes, count, levels, proportion) have produced these finite values?"""
    if kind == "binary":
        _check_binary(y, names, label)
    elif kind == "successes":
        assert trials is not None
        _check_successes(y, names, label, trials, trials_label)
    elif kind == "count":
        check_counts(y, names, label, "Give raw counts; for normalized or log values use family='gaussian'.")
        _check_varies(y, label)
        if (y > 0).sum() < FEWEST:
            raise DataError(
                f"{label} is above zero in only 1 of {len(y)} cells: {examples(names[y > 0])}. "
                f"At least {FEWEST} are needed to say anything about relatives or neighbors."
            )
    elif kind == "levels":
        check_counts(y, names, label, "Number the levels 0, 1, 2, ... in their order.")
        check_levels(y.astype(np.int64), names, label, [str(k) for k in range(int(y.max()) + 1)])
    elif kind == "proportion":
        _check_proportions(y, names, label)
    else:
        _check_varies(y, label)


def check_levels(codes: np.ndarray, names: np.ndarray, label: str, levels: Sequence[str]) -> None:
    """Codes 0 to K - 1, at least two levels and at least two cells of each."""
    counts = np.bincount(codes, minlength=len(levels))
    if len(levels) < 2:
        raise DataError(
            f"{label} has one level in all {len(codes)} cells. There is no variation to partition: choose another fate or other "
            "cells."
        )
    rare = np.flatnonzero(counts < FEWEST)
    if rare.size:
        shown = examples(f"{levels[int(k)]}: {counts[k]}" for k in rare)
        cells = f" ({examples(names[np.isin(codes, rare)])})" if counts[rare].any() else ""
        raise DataError(
            f"{label} has {rare.size} of {len(levels)} levels with fewer than {FEWEST} cells, {shown}{cells}. Merge neighboring "
            "levels, or leave those cells out."
        )


def _check_proportions(y: np.ndarray, names: np.ndarray, label: str) -> None:
    outside = (y < 0) | (y > 1)
    if outside.any():
        shown = examples(f"{name}: {value:g}" for name, value in zip(names[outside][:6], y[outside][:6], strict=True))
        raise DataError(
            f"{label} is outside of 0 to 1 in {int(outside.sum())} of {len(y)} cells: {shown}. family='beta' wants probabilities: "
            "divide percentages by 100."
        )
    ends = (y == 0) | (y == 1)
    if ends.any():
        raise DataError(
            f"{label} is exactly 0 or 1 in {int(ends.sum())} of {len(y)} cells: {examples(names[ends])}. A beta density is not finite "
            "there: pull the values in, `(y * (n - 1) + 0.5) / n` (Smithson & Verkuilen 2006); for yes or no use "
            "family='bernoulli', for parts of a whole number family='binomial' with trials."
        )
    _check_varies(y, label)


def check_counts(values: np.ndarray, names: np.ndarray, label: str, remedy: str) -> None:
    """Whole numbers, zero or more."""
    for kind, bad in (("negative", values < 0), ("not a whole number", values != np.round(values))):
        if bad.any():
            shown = examples(f"{name}: {value:g}" for name, value in zip(names[bad][:6], values[bad][:6], strict=True))
            raise DataError(f"{label} is {kind} in {int(bad.sum())} of {len(values)} cells: {shown}. {remedy}")


def check_both_sides(
    codes: np.ndarray, names: np.ndarray, label: str, levels: Sequence[str], shown: Sequence[str]
) -> None:
    """Codes 0 and 1, each of at least two cells."""
    counts = np.bincount(codes, minlength=2)
    if counts.min() == 0:
        raise DataError(
            f"{label} has one level: it is {shown[int(counts.argmax())]} in all {len(codes)} cells. "
            "There is no variation to partition: choose another fate or other cells."
        )
    rare = int(counts.argmin())
    if counts[rare] < FEWEST:
        raise DataError(
            f"{label} has {counts[rare]} cell of level {levels[rare]!r} ({examples(names[codes == rare])}) "
            f"against {counts[1 - rare]} of {levels[1 - rare]!r}. At least {FEWEST} of each are needed: "
            "merge levels or choose another fate."
        )


def warn_of_two_values(y: np.ndarray, label: str, family: str) -> None:
    """Zeros and ones are counts too, but hardly ever meant as such."""
    if not (y > 1).any():
        warn(
            f"{label} holds only 0 and 1, fitted as counts by family={family!r}. For a yes or no use "
            "family='bernoulli'.",
            stacklevel=6,
        )


def check_one_each(label: str, kind: str, trials: np.ndarray | None, remedy: str = "Leave it out.") -> None:
    """Can responses of this kind show an effect that every cell has for itself? `label` ends in a verb, such as "x is"."""
    single = trials is None or trials.max() <= 1
    if kind == "binary" or (kind == "successes" and single):
        raise DataError(
            f"{label} an effect of its own for every cell, and one yes or no per cell cannot show one. {remedy}"
        )
    if kind == "real":
        raise DataError(
            f"{label} an effect of its own for every cell, which is what the residual of a gaussian fate already is. {remedy}"
        )
    if kind not in ("successes", "count"):
        raise DataError(
            f"{label} an effect of its own for every cell, which takes up the overdispersion of counts and of binomial fates. "
            f"A fate of this family has none. {remedy}"
        )


def warn_of_two_dispersions(label: str, family: str, *, stacklevel: int = 5) -> None:
    """An effect of each cell and the dispersion of the negative binomial are two names of one thing."""
    if family == "negative_binomial":
        warn(
            f"{label} an effect of its own for every cell, which takes up the same variation as the dispersion of the negative "
            "binomial: the two cannot be told apart, and the priors decide between them. Use family='poisson' with it, or leave it "
            "out.",
            stacklevel=stacklevel,
        )


def check_log_offset(values: np.ndarray, label: str) -> None:
    """An offset of counts is a logarithm."""
    if values.size and values.max() > LARGEST_LOG_OFFSET:
        raise DataError(
            f"{label} goes up to {values.max():g}, but is on the log scale: expected counts would be multiplied by "
            "its exponential. Give the logarithm of size factors or exposures."
        )


def check_design(design: np.ndarray, terms: Sequence[str], names: np.ndarray, label: str) -> None:
    """A design (n, p) of finite columns and full rank."""
    n, p = design.shape
    for j, term in enumerate(terms):
        check_finite(design[:, j], names, f"{label}: column {term!r}", "Change the transformation or the cells.")
    if p >= n:
        raise DataError(
            f"{label} makes {p} columns for {n} cells. Fixed effects need more cells than columns: "
            "leave terms out, or make them `groups`."
        )
    zero = [term for term, x in zip(terms, design.T, strict=True) if not x.any()]
    if zero:
        raise DataError(
            f"{label}: {len(zero)} of {p} columns are zero in all {n} cells: {examples(zero)}. "
            "That combination does not occur: leave it out."
        )
    dependent = _collinear(design, terms)
    if dependent:
        raise DataError(
            f"{label}: {len(dependent)} of {p} columns are collinear, each is a combination of the "
            f"others: {examples(dependent, 10)}. Their effects cannot be told apart: leave one out."
        )


def check_covariance(matrix: np.ndarray, label: str) -> None:
    """Square, finite, symmetric and, up to rounding, nowhere negative."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise DataError(
            f"{label} has shape {matrix.shape}. Give a square covariance matrix, a row and a column per cell."
        )
    bad = int((~np.isfinite(matrix)).sum())
    if bad:
        raise DataError(
            f"{label} has {bad} entries that are NaN or infinite. A covariance is known for every two cells."
        )
    size = float(np.abs(matrix).max())
    apart = float(np.abs(matrix - matrix.T).max())
    if apart > INDEFINITE * size:
        raise DataError(
            f"{label} is not symmetric: entries differ from their mirror images by up to {apart:.3g}. Give "
            "(K + K.T) / 2 if the difference is rounding, else check how K was made."
        )
    if not np.trace(matrix) > 0:
        raise DataError(f"{label} has a trace of {np.trace(matrix):.3g}. Give a covariance with variances above zero.")
    if len(matrix) <= LARGEST_CHECKED:
        spectrum = np.linalg.eigvalsh(matrix)
        if spectrum[0] < -INDEFINITE * spectrum[-1]:
            raise DataError(
                f"{label} is not a covariance: its eigenvalues go from {spectrum[0]:.3g} to {spectrum[-1]:.3g}, and none "
                "may be negative. If K holds distances, turn them into covariances first, such as exp(-distance)."
            )


def _check_varies(values: np.ndarray, label: str) -> None:
    if np.ptp(values) == 0:
        raise DataError(
            f"{label} has one level: it is {values[0]:g} in all {len(values)} cells. "
            "There is no variation to partition: choose another fate or other cells."
        )


def _check_binary(y: np.ndarray, names: np.ndarray, label: str) -> None:
    bad = (y != 0) & (y != 1)
    if bad.any():
        shown = examples(f"{name}: {value:g}" for name, value in zip(names[bad][:6], y[bad][:6], strict=True))
        raise DataError(
            f"{label} is neither 0 nor 1 in {int(bad.sum())} of {len(y)} cells: {shown}. family='bernoulli' wants 0 and "
            "1; for counts or measurements choose another family."
        )
    check_both_sides(y.astype(np.int64), names, label, ("0", "1"), ("0", "1"))


def _check_successes(successes: np.ndarray, names: np.ndarray, label: str, n: np.ndarray, source: str) -> None:
    check_counts(
        successes,
        names,
        label,
        "For binomial the fate is the number of successes; a proportion has to be multiplied by its trials.",
    )
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


def _collinear(design: np.ndarray, terms: Sequence[str]) -> list[str]:
    """Columns that take part in a linear dependency: those that the null space of the design touches."""
    if design.shape[1] < 2:
        return []
    r = np.linalg.qr(design / np.linalg.norm(design, axis=0), mode="r")
    _, singular, rows = np.linalg.svd(r)
    null = rows[singular < DEPENDENT * singular[0]]  # (dependencies, p)
    touched = np.linalg.norm(null, axis=0) > 1e-6
    return [term for term, hit in zip(terms, touched, strict=True) if hit]
