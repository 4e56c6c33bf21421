"""Fixed effects: a formula over obs columns becomes a design matrix of full rank."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate.errors import DataError
from cellfate.io.columns import check_present, instead
from cellfate.model.checks import check_design, check_finite

if TYPE_CHECKING:
    from formulaic import SimpleFormula

MANY_LEVELS, MOST_LEVELS = (
    20,
    1000,
)  # of a categorical covariate: suspicious where half the cells have their own; too many

# Text in quotes | `a column` | a name, with what follows it: "(" calls it, "=" names an argument.
NAME = re.compile(r"""("[^"]*"|'[^']*')|`([^`]+)`|(?<![\w.])([^\W\d]\w*)(?!\w)\s*(\(|=(?!=))?""")
RANDOM = re.compile(r"\(([^()|]+)(\|\|?)([^()|]+)\)")  # (1 | batch)
CONSTANTS = {"True", "False", "None", "np", "contr"}


def columns_of(formula: str) -> list[str]:
    """The obs columns that a formula speaks of, in order."""
    names = [
        quoted or (name if not follows and name not in CONSTANTS else "")
        for text, quoted, name, follows in NAME.findall(formula)
    ]
    return list(dict.fromkeys(name for name in names if name))


def design_matrix(formula: str, obs: pd.DataFrame) -> tuple[np.ndarray, tuple[str, ...]]:
    """Design matrix (n, p) of full rank and the names of its columns."""
    design, terms = model_columns(formula, obs, f"formula {formula!r}")
    check_design(design, terms, obs.index.to_numpy(), f"formula {formula!r}")
    return design, terms


def model_columns(formula: str, obs: pd.DataFrame, label: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Columns (n, p) of a formula, with their names; `label` is what to call it in a message."""
    parsed = _parse(formula, label)
    covariates = columns_of(formula)
    for name in covariates:
        if name not in obs.columns:
            raise DataError(
                f"{label} names {name!r}, which is no obs column; {instead(name, obs.columns)}. "
                f"Add adata.obs[{name!r}] or leave it out."
            )
    frame = pd.DataFrame({name: _covariate(obs[name], name) for name in covariates}, index=obs.index)
    try:
        with np.errstate(all="ignore"):  # log(0) is found below, and named
            matrix = parsed.get_model_matrix(frame, context={}, na_action="ignore")
    except Exception as e:  # formulas evaluate Python, which may raise anything
        raise DataError(
            f"{label} cannot be evaluated: {_plain(e)}. Check its functions and their arguments, or "
            "make the covariate an obs column first."
        ) from e
    terms = tuple(str(term) for term in matrix.columns)
    return np.asarray(matrix, dtype=np.float64).reshape(len(obs), len(terms)), terms


def scenario_columns(formula: str, obs: pd.DataFrame, setting: Mapping[str, Any]) -> np.ndarray:
    """Columns (n, p) of a formula with some covariates set to one value in all cells, coded as they are in `obs`.

    What a formula takes from a whole column, such as its mean in `center`, stays that of the cells.
    """
    label = f"formula {formula!r}"
    parsed = _parse(formula, label)
    frame = pd.DataFrame({name: _covariate(obs[name], name) for name in columns_of(formula)}, index=obs.index)
    spec = parsed.get_model_matrix(frame, context={}, na_action="ignore").model_spec
    other = frame.copy()
    for name, value in setting.items():
        dtype = frame[name].dtype
        if isinstance(dtype, pd.CategoricalDtype):
            level = value if value in dtype.categories else str(value)
            other[name] = pd.Categorical([level] * len(frame), dtype=dtype)
        else:
            other[name] = float(value)
    return np.asarray(spec.get_model_matrix(other, context={}, na_action="ignore"), dtype=np.float64)


def separating(
    formula: str, obs: pd.DataFrame, design: np.ndarray, terms: tuple[str, ...], *, zero: np.ndarray, one: np.ndarray
) -> list[str]:
    """Columns on which a fate is perfectly predictable: cells that show 0 all lie below those that show 1, or above.

    Looks at the columns of the design and at every level of a categorical covariate, the reference level included.
    """
    columns = dict(zip(terms, design.T, strict=True))
    for name in columns_of(formula):
        values = _covariate(obs[name], name)
        if not pd.api.types.is_numeric_dtype(values.dtype):
            columns.update(
                {
                    f"{name}[{level}]": (values == level).to_numpy(np.float64)
                    for level in values.unique()
                    if f"{name}[T.{level}]" not in columns
                }
            )
    found = []
    for name, x in columns.items():
        if np.ptp(x) > 0 and (x[zero].max() <= x[one].min() or x[one].max() <= x[zero].min()):
            found.append(name)
    return found


def _parse(formula: Any, label: str) -> SimpleFormula:
    from formulaic import Formula, SimpleFormula

    if not isinstance(formula, str) or not formula.strip():
        what = label.removesuffix(repr(formula)).rstrip(" =")
        raise DataError(f"{what} is {formula!r}, wanted text such as '~ 1' or '~ 1 + stage'.")
    _refuse_random_effects(formula, label)
    left, tilde, _ = formula.partition("~")
    if tilde and left.strip():
        raise DataError(
            f"{label} has a left side; the fate is an argument of its own. Write {formula[len(left) :].strip()!r}."
        )
    try:
        parsed = Formula(formula)
    except Exception as e:
        raise DataError(
            f"{label} cannot be read: {_plain(e)}. Write it like '~ 1 + stage + np.log(size)'; names "
            "with blanks or signs go in `backticks`."
        ) from e
    if not isinstance(parsed, SimpleFormula):
        raise DataError(f"{label} has several parts. Grouping factors (random intercepts) go to `groups`.")
    return parsed


def _refuse_random_effects(formula: str, label: str) -> None:
    """`(1 | batch)` and `(1 + time | batch)` are how other packages write what is `groups` here."""
    found = [(left.strip(), bar, right.strip(" `")) for left, bar, right in RANDOM.findall(formula)]
    if not found:
        return
    if any(left not in ("1", "1 + 0") for left, _, _ in found):
        groups: Any = {right: "~ 1" if left == "1" else f"({left} {bar} {right})" for left, bar, right in found}
        what = "random slopes"
    else:
        groups, what = [right for _, _, right in found], "random intercepts"
    shown = ", ".join(f"({left} {bar} {right})" for left, bar, right in found)
    raise DataError(
        f"{label} has {what}, which are an argument of their own: leave {shown} out and give groups={groups!r}."
    )


def _plain(e: Exception) -> str:
    """The message of a formula error on one line, without its terminal colors."""
    text = re.sub(r"\x1b?\[[\d;]*m|[⧛⧚]", "", str(e)).split("\n\n")[0]  # what follows is the formula again
    return " ".join(text.split())[:200].rstrip(".")


def _covariate(values: pd.Series, name: str) -> pd.Series:
    """A column as formulas understand it: numbers, or text levels that occur."""
    label = f"covariate obs[{name!r}]"
    if isinstance(values, pd.DataFrame):
        raise DataError(f"{label}: adata.obs has {values.shape[1]} columns of this name. Rename all but one.")
    check_present(values, label, f"Fill it in, or leave those cells out: `adata[adata.obs[{name!r}].notna()]`.")
    values = values.infer_objects()
    if pd.api.types.is_bool_dtype(values.dtype) and not isinstance(values.dtype, pd.CategoricalDtype):
        return values.astype(np.float64)
    if pd.api.types.is_complex_dtype(values.dtype) or pd.api.types.is_datetime64_any_dtype(values.dtype):
        raise DataError(f"{label} holds {values.dtype}. Turn it into numbers first, such as hours since the start.")
    if pd.api.types.is_numeric_dtype(values.dtype):
        whole = pd.api.types.is_integer_dtype(values.dtype)  # so that C(batch) has levels 1, 2, not 1.0, 2.0
        numeric = values.astype(np.int64 if whole else np.float64)
        check_finite(numeric.to_numpy(), values.index.to_numpy(), label, "Correct it, or leave those cells out.")
        return numeric
    if not isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(str).astype("category")
    values = values.cat.remove_unused_categories()
    levels = len(values.cat.categories)
    if levels == 1:
        raise DataError(
            f"{label} has one level: it is {str(values.iloc[0])!r} in all {len(values)} cells. "
            "It explains nothing here: leave it out of the formula."
        )
    if levels > MOST_LEVELS or (levels > MANY_LEVELS and 2 * levels > len(values)):
        raise DataError(
            f"{label} has {levels} levels in {len(values)} cells, too many for fixed effects. Numbers kept as text "
            f"need `.astype(float)`; a grouping factor goes to `groups={name!r}`."
        )
    return values
