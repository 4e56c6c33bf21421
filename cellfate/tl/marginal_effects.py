"""Population effects of a covariate: averaged predictions, their differences and ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate import _keys
from cellfate._runtime import SeedLike, generator
from cellfate.errors import DataError
from cellfate.inference.marginal import standardized
from cellfate.io.again import OBJECTS
from cellfate.io.columns import check_adata
from cellfate.io.design import columns_of, scenario_columns
from cellfate.io.store import write_table
from cellfate.model.partition import summary
from cellfate.tl.fitted import Fitted, fitted

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

WITHOUT = ("ordinal", "categorical")  # a level has no mean
QUANTILES = (0.25, 0.75)  # of a number, that are compared by default


def marginal_effects(
    adata: AnnData,
    covariate: str,
    values: Sequence[Any] | None = None,
    *,
    key: str = _keys.KEY,
    draws: int = 200,
    lineage: Any = None,
    spatial: Any = None,
    graph: Any = None,
    niche: Any = None,
    offset: Any = None,
    trials: Any = None,
    device: str | torch.device = "auto",
    rng: SeedLike | None = None,
    copy: bool = False,
) -> AnnData | None:
    """What the population would show if the covariate were the same in all cells: means, differences and ratios.

    Needs :func:`cellfate.tl.decompose` with the covariate in its `formula`. Under each scenario the fate of every cell is predicted,
    its other covariates and its offset as they are, with ancestry, neighborhood and groups integrated out, and averaged over the
    cells (marginal standardization; Muller & MacLehose 2014). A coefficient of :func:`cellfate.get.fixed_effects` is another thing:
    the effect on a cell whose random effects are held, on link scale. With a nonlinear link, averages over cells that differ move
    less than each cell does.

    Parameters
    ----------
    covariate
        A column of `adata.obs` that the formula names.
    values
        The scenarios, values that the column is set to; the first is what others are compared with. By default all levels of a
        categorical column, and the quartiles of a number.
    key
        The `key_added` of the fit.
    draws
        Posterior draws to average over.
    lineage, spatial, graph, niche, offset, trials
        What was handed to the fit itself, and not the name of something in `adata`, has to be handed over again.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    rng
        Seed of the choice of draws.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes a table to `adata.uns[key]["marginal_effects"]`, see :func:`cellfate.get.marginal_effects`.

    Examples
    --------
    >>> import numpy as np
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(80, family="bernoulli", rng=0)
    >>> adata.obs["dose"] = np.random.default_rng(0).choice(["low", "high"], 80)
    >>> cf.tl.decompose(adata, "fate", family="bernoulli", formula="~ 1 + dose", rng=0)
    >>> cf.tl.marginal_effects(adata, "dose", ["low", "high"], rng=0)
    >>> cf.get.marginal_effects(adata)["quantity"].tolist()
    ['mean', 'mean', 'difference', 'ratio']
    """
    check_adata(adata)
    handed = dict(zip(OBJECTS, (lineage, spatial, graph, niche, offset, trials), strict=True))
    fit = fitted(adata, key, handed, device)
    formula, family = str(fit.params["formula"]), str(fit.params["family"])
    if family in WITHOUT:
        raise NotImplementedError(
            f"population effects are not there yet for family={family!r}, whose levels have no mean. Ask about one fate at a time "
            "with family='bernoulli'."
        )
    if covariate not in columns_of(formula):
        known = columns_of(formula)
        instead = f"Choose one of {known}, or fit" if known else "It has no covariates: fit"
        raise DataError(
            f"the fit has formula {formula!r}, which does not name {covariate!r}. {instead} with it in the formula, such as "
            f"formula={f'{formula} + {covariate}'!r}."
        )
    obs = adata.obs[fit.cells.kept]
    scenarios = _scenarios(obs[covariate], covariate, values)
    designs = [scenario_columns(formula, obs, {covariate: value}) for value in scenarios]
    model, engine, _ = fit.glmm.problem
    means = standardized(model, engine, fit.draws, _coefficients(fit), designs, count=draws, rng=generator(rng))
    table = _table(covariate, scenarios, means, ratios=family != "gaussian")  # a measurement may have no zero
    adata = adata.copy() if copy else adata
    write_table(adata, key, _keys.MARGINAL_EFFECTS, table)
    return adata if copy else None


def _scenarios(column: pd.Series, covariate: str, values: Sequence[Any] | None) -> list[Any]:
    numeric = pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype)
    if isinstance(values, str) or (values is not None and len(list(values)) == 0):
        raise DataError(f"values is {values!r}, wanted a list of what obs[{covariate!r}] is to be set to.")
    if values is None:
        return [float(q) for q in column.quantile(QUANTILES)] if numeric else list(pd.unique(column.sort_values()))
    scenarios = list(values)
    if numeric:
        wrong = [v for v in scenarios if not isinstance(v, int | float | np.number) or not np.isfinite(v)]
    else:
        known = set(column.unique())
        wrong = [v for v in scenarios if v not in known]
    if wrong:
        raise DataError(
            f"values has {wrong}, wanted "
            + (
                "finite numbers."
                if numeric
                else f"levels of obs[{covariate!r}]: {sorted(map(str, set(column.unique())))}."
            )
        )
    return scenarios


def _coefficients(fit: Fitted) -> np.ndarray:
    """Draws (all, p) of the fixed effects, a column per column of the design."""
    names = [f"beta[{term.replace('/', '_')}]" for term in fit.cells.terms]
    missing = [name for name in names if name not in fit.draws]
    if missing:
        raise DataError(
            f"formula {fit.params['formula']!r} makes columns now that it did not make in the fit: there are no draws of {missing}. "
            "Has adata.obs changed? Fit anew."
        )
    return np.column_stack([fit.draws[name] for name in names])


def _table(covariate: str, scenarios: Sequence[Any], means: np.ndarray, *, ratios: bool) -> pd.DataFrame:
    rows: list[Mapping[str, Any]] = []

    def add(quantity: str, scenario: Any, against: Any, x: np.ndarray) -> None:
        mean, sd, lower, upper = summary(x)
        names = {"covariate": covariate, "quantity": quantity, "scenario": str(scenario), "against": str(against)}
        rows.append({**names, "estimate": mean, "sd": sd, "lower": lower, "upper": upper})

    for scenario, x in zip(scenarios, means.T, strict=True):
        add("mean", scenario, "", x)
    first, base = scenarios[0], means[:, 0]
    for scenario, x in list(zip(scenarios, means.T, strict=True))[1:]:
        add("difference", scenario, first, x - base)
        if ratios:
            add("ratio", scenario, first, x / base)
    return pd.DataFrame(rows)
