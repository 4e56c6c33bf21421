"""Readers of what `cf.tl.decompose` wrote. They only read: every table is a copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from cellfate import _keys
from cellfate.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

VARIANCE = ["variance", "variance_sd", "variance_lower", "variance_upper"]
SHARE = ["share", "share_sd", "share_lower", "share_upper"]
ROW = ["response", "component"]


def components(adata: AnnData, key: str = _keys.KEY, *, scale: str = "latent") -> pd.DataFrame:
    """Variance and share of every component, one row per response and component.

    Needs :func:`cellfate.tl.decompose`.

    Parameters
    ----------
    key
        The `key_added` of the fit.
    scale
        ``"latent"``: the linear predictor. ``"link"``: with the variance of the family's own distribution.
        ``"realized"``: of the variance in these very cells what is each component's own, with what two of them explain alike, and
        no data can divide, as the row `shared`: twice the covariance of what they are expected to hold of the whole field.
        ``"observation"``: first-order shares of the variance of the fate itself, with the `interaction` that a link makes.
        ``"additive"``: the same as far as a line follows the link, the additive variance of quantitative genetics; the rest of
        the mean is `nonlinear`. Of categorical fates the variance is the sum of those of all fates (Gini's index, what the Brier
        score measures; Light & Margolin 1971), of ordinal ones the sum over their cut points (what the ranked probability score
        measures; Epstein 1969), whatever numbers the levels have. Not for gaussian fates, whose latent scale it is.

    Returns
    -------
    Columns `response`, `component`, then `variance` and `share` (posterior means), each with `_sd`, `_lower` and
    `_upper` (95% interval).
    """
    variances = _table(adata, key, _keys.COMPONENTS)
    scales = list(dict.fromkeys(variances["scale"]))
    if scale not in scales:
        raise DataError(
            f"scale {scale!r} is not in adata.uns[{key!r}][{_keys.COMPONENTS!r}]: this family has none of that kind. Use one of {scales}."
        )
    shares = _table(adata, key, _keys.SHARES)
    here = variances.loc[variances["scale"] == scale, [*ROW, *VARIANCE]]
    there = shares.loc[shares["scale"] == scale, [*ROW, *SHARE]]
    return here.merge(there, on=ROW, how="left", validate="one_to_one")


def draws(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Equally weighted posterior draws of the hyperparameters, one row each.

    Needs :func:`cellfate.tl.decompose`. Columns `variance_<component>`, `lengthscale_spatial`, `share_<component>`
    (latent scale), `beta[<term>]` and whatever else the model has. Of many responses, 200 draws of each, with a column `response`.
    """
    return _table(adata, key, _keys.DRAWS).reset_index(drop=True)


def hyperparameters(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """What shapes the components, besides their variances, one row each.

    Needs :func:`cellfate.tl.decompose`. Rows are those of `lengthscale_spatial` (units of the coordinates; hops on a graph), `alpha_lineage`
    (ou, with `half_life_lineage` = ln 2 / alpha, in units of branch length), `lambda_lineage` (pagel), `rate_lineage`
    (early_burst), `dispersion` (negative_binomial), `precision` (beta) and `gap_<k>` (ordinal) that the model has; none for some. Intercepts and slopes that covary have
    `sd_<group>`, `sd_<group>:<column>` and `correlation_<group>`. One that was held has an interval of no width.

    Returns
    -------
    Columns `term`, `median`, `mean`, `sd`, `lower` and `upper` (95% interval), from the posterior draws; of many responses with a
    column `response` before them.
    """
    table = draws(adata, key)
    if "response" not in table:
        return _hyperparameters(table)
    parts = [
        _hyperparameters(own.drop(columns="response")).assign(response=name)
        for name, own in table.groupby("response", sort=False)
    ]
    whole = pd.concat(parts, ignore_index=True)
    return whole[["response", *(c for c in whole.columns if c != "response")]]


def _hyperparameters(table: pd.DataFrame) -> pd.DataFrame:
    found: dict[str, pd.Series] = {}
    for name in table.columns:
        if name.startswith("correlation_"):
            group = name.removeprefix("correlation_")
            sds = [v for v in table.columns if v == f"variance_{group}" or _is_slope(v, group, table)]
            found |= {f"sd_{v.removeprefix('variance_')}": table[v] ** 0.5 for v in sds}
        if name.startswith(("variance_", "share_", "beta[")):
            continue
        found[name] = table[name]
        if name.startswith("alpha_"):
            found[f"half_life_{name.removeprefix('alpha_')}"] = math.log(2) / table[name]
    rows = [
        (name, x.median(), x.mean(), x.std(ddof=0), x.quantile(0.025), x.quantile(0.975)) for name, x in found.items()
    ]
    columns = ["term", "median", "mean", "sd", "lower", "upper"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[1:], float))


def _is_slope(name: str, group: str, table: pd.DataFrame) -> bool:
    """Whether a variance is that of slopes which are no component of their own, and so have no share."""
    return name.startswith(f"variance_{group}:") and name.replace("variance_", "share_", 1) not in table


def fixed_effects(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Coefficients of the formula on link scale: `term`, `estimate`, `sd`, `lower`, `upper` (95% interval).

    Needs :func:`cellfate.tl.decompose`. Of many responses with a column `response`.
    """
    return _table(adata, key, _keys.FIXED_EFFECTS).reset_index(drop=True)


def effects(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Posterior mean and sd of each component in each cell, on link scale: `<component>_mean`, `<component>_sd`.

    Needs :func:`cellfate.tl.decompose`. Rows are `adata.obs_names`; cells that were left out of the fit are NaN.
    """
    _single(adata, key, "effects in every cell")
    slot = _keys.effects(key)
    if slot not in adata.obsm:
        raise DataError(
            f"adata.obsm has no {slot!r}, though adata.uns[{key!r}] holds a fit; found {sorted(adata.obsm)}. "
            f"Was it removed? Run `cf.tl.decompose(adata, ..., key_added={key!r})` again."
        )
    return pd.DataFrame(adata.obsm[slot]).copy()


def ancestors(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Effect of ancestry at every node of the tree, on link scale.

    Needs :func:`cellfate.tl.predict` with ``"ancestors"``. A row per node, children before their parents; leaves without a cell are
    there too.

    Returns
    -------
    Columns `node` (its name), `tree`, `parent` (empty at a root), `depth`, posterior `mean` and `sd`, `is_leaf`, and `n_cells`, how
    many cells of the fit are below it.
    """
    return _later(adata, key, _keys.ANCESTORS, "predict", repr(_keys.ANCESTORS))


def marginal_effects(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Population effects of a covariate, on the scale of the fate: probabilities, counts, or what was measured.

    Needs :func:`cellfate.tl.marginal_effects`.

    Returns
    -------
    Columns `covariate`; `quantity`, the ``"mean"`` over the cells under a `scenario`, or its ``"difference"`` or ``"ratio"`` `against`
    the first; `estimate`, `sd`, `lower`, `upper` (95% interval).
    """
    return _later(adata, key, _keys.MARGINAL_EFFECTS, "marginal_effects", "<covariate>")


def associations(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Covariates that were tested one at a time, given ancestry and neighborhood.

    Needs :func:`cellfate.tl.associate`.

    Returns
    -------
    Columns `covariate`; `estimate` and its standard `error`, on link scale for one unit of the covariate; `z`; `p`, two-sided; `q`, by
    Benjamini and Hochberg over all that were tested; `status`, ``"tested"``, or why not.
    """
    return _later(adata, key, _keys.ASSOCIATIONS, "associate", "<covariates>")


def comparison(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Models with and without ancestry and neighborhood, the one with the most evidence first.

    Needs :func:`cellfate.tl.compare`.

    Returns
    -------
    Columns `model`; `log_evidence`, and `weight`, the posterior probability among models that are equally likely before; `elpd_loo`,
    the expected log predictive density of cells left out, its `elpd_difference` from the best and the standard error `elpd_error`
    of that; `aic`, `bic`; how many `hyperparameters`; `pareto_k`, above 0.7 where leaving out is not to be trusted; `status` of the
    fit.
    """
    return _later(adata, key, _keys.COMPARISON, "compare", "")


def tests(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Return whether each component is there at all, given the others.

    Needs :func:`cellfate.tl.test_components`.

    Returns
    -------
    Columns `component`; `given`, the components of the null model; `method`; `p`; with ``"bootstrap"`` the `p_score` that was
    calibrated, and with ``"likelihood_ratio"`` the `statistic`. Of many fates also `response`; `q`, adjusted over the fates of a component;
    and `status`, ``"tested"`` or ``"failed: <reason>"``.
    """
    return _later(adata, key, _keys.TESTS, "test_components", "")


def trees(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """What each of several trees of the same cells says, a row per tree.

    Needs :func:`cellfate.tl.decompose` with a list of trees. How much the tree matters is in :func:`diagnostics`: the variance of a
    share between trees, and within them.

    Returns
    -------
    Columns `tree`, its key or its place in the list; `weight` in the pooled fit; `log_evidence`; `share_lineage` and `share_spatial`
    (posterior means, latent scale), each with `_sd`; `status` of the fit under that tree.
    """
    if _keys.TREES not in _results(adata, key):
        raise DataError(
            f"adata.uns[{key!r}] has no {_keys.TREES!r}: the fit is not one under several trees. Run "
            "`cf.tl.decompose(adata, ..., lineage=[<tree>, <tree>, ...])` for one."
        )
    return _table(adata, key, _keys.TREES).reset_index(drop=True)


def checks(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Return what the checks of a fit found.

    Needs :func:`cellfate.tl.check`. The residuals themselves are in `adata.obs[f"{key}_residual"]`, of categorical fates in `adata.obsm`.

    Returns
    -------
    Columns `check`; `over`, ``"cells"``, ``"space"``, ``"tree"`` or ``"draws"``; `observed`; `expected` where the model is right, with
    `lower` and `upper`, the 95% range of that; `p`, one-sided for Moran's I of residuals (random orders of the cells; below is no pattern
    that was missed), two-sided for what
    is of the fates (fates drawn again), of a Kolmogorov-Smirnov test for the residuals as a whole. The residuals of a yes or no, or of one
    fate out of several, are normal as soon as its probabilities are right on average: look at their Moran's I, and at
    :func:`calibration`. Of categorical and ordinal fates also `fate`, the one a row is about, empty where it is about all.
    """
    return _later(adata, key, _keys.CHECKS, "check", "")


def predictions(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Return how well cells are predicted that were left out.

    Needs :func:`cellfate.tl.check`.

    Returns
    -------
    Columns `left_out`, ``"cell"``, ``"clade"`` or ``"region"``; `sets`, how many of them; `log_score`, the mean log predictive density of
    a cell; and where each trial is a yes or no (bernoulli, binomial) `brier`, the mean squared error of the predicted probability, beside `brier_reference`, that
    of the share over all cells. Of categorical fates the squared errors are summed over the fates. Of ordinal ones there is the ranked
    probability score in its place, `rps` (Epstein 1969): squared errors of the probabilities of being at most at each level, summed
    over the levels, and `rps_reference`.
    """
    return _later(adata, key, _keys.PREDICTIONS, "check", "")


def calibration(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Return how often what was predicted with some probability was so; of fates that are yes or no, or one of several.

    Needs :func:`cellfate.tl.check`.

    Returns
    -------
    Columns `left_out`, `predicted` (mean probability in a tenth of the range), `observed` (share), `cells` and `trials`. Of categorical
    and ordinal fates also `fate`: each against the rest.
    """
    return _later(adata, key, _keys.CALIBRATION, "check", "")


def prior_sensitivity(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Return how far each share and variance leans on the priors of the hyperparameters.

    Needs :func:`cellfate.tl.prior_sensitivity`.

    Returns
    -------
    Columns `quantity`; `prior` and `likelihood`, the distance that its distribution moves per doubling of the power of the one and the
    other, sensitive from 0.05 on; `diagnosis` in words.
    """
    return _later(adata, key, _keys.PRIOR_SENSITIVITY, "prior_sensitivity", "")


def conditions(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Variance and share of every component in every level of a condition, latent scale.

    Needs :func:`cellfate.tl.by_condition`.

    Returns
    -------
    Columns `condition` (the level) and `component`; `variance`, among the cells of the level, and `share` (posterior means), each with
    `_sd`, `_lower` and `_upper` (95% interval); `n_cells` of the level; `status` of its fit, with what it shares with other levels.
    """
    return _later(adata, key, _keys.CONDITIONS, "by_condition", "<column>")


def condition_differences(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """How far shares and variances differ between every two levels of a condition.

    Needs :func:`cellfate.tl.by_condition`.

    Returns
    -------
    Columns `condition` and `other` (levels), `component`; `quantity`, ``"share"`` or ``"log_variance"``; `difference`, that of
    `condition` less that of `other` (of log variances: the log of their ratio), with `sd`, `lower` and `upper` (95% interval); `p`, twice
    the posterior probability of the smaller side of zero; `q`, by Benjamini and Hochberg over pairs and components; `status`.
    """
    return _later(adata, key, _keys.CONDITION_DIFFERENCES, "by_condition", "<column>")


def condition_evidence(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """Whether the hyperparameters of the levels of a condition differ at all, in one row.

    Needs :func:`cellfate.tl.by_condition`.

    Returns
    -------
    Columns `condition` (the column of `adata.obs`), `levels` (how many); `log_evidence_apart`, with hyperparameters for each level, and
    `log_evidence_alike`, with one set for all; `log_bayes_factor`, the first less the second, above zero where levels differ, NaN where
    they are not independent; `error`, the standard error of the integral over one set; `verdict` in words, from 1 on positive, from 3
    strong, from 5 very strong evidence (Kass & Raftery 1995); `status`.
    """
    return _later(adata, key, _keys.CONDITION_EVIDENCE, "by_condition", "<column>")


def _later(adata: AnnData, key: str, name: str, tool: str, argument: str) -> pd.DataFrame:
    """A table that a tool adds to a fit."""
    if name not in _results(adata, key):
        more = "" if key == _keys.KEY else f", key={key!r}"
        given = f", {argument}" if argument else ""
        raise DataError(f"adata.uns[{key!r}] has no {name!r}. Run `cf.tl.{tool}(adata{given}{more})` first.")
    return _table(adata, key, name).reset_index(drop=True)


def params(adata: AnnData, key: str = _keys.KEY) -> dict[str, Any]:
    """Return the settings of the fit, by name."""
    return dict(_results(adata, key)[_keys.PARAMS])


def diagnostics(adata: AnnData, key: str = _keys.KEY) -> dict[str, Any]:
    """Return how the fit went, by name.

    Needs :func:`cellfate.tl.decompose`.

    Returns
    -------
    `verdict`
        In words, whether these data tell ancestry and neighborhood apart: clear, partial, weak or confounded.
    `correlation_variances`
        Rank correlation of the two variances over the posterior draws. Near -1, the data know their sum better than either.
    `status`
        ``"converged"``, or every doubt about the fit; each was a warning, too.
    `pareto_k`
        k-hat of the importance weights behind the draws: below 0.7 the intervals are to be trusted.
    `effective_draws`
        How many independent draws the intervals are worth.
    `interpolation_error`
        Of the log posterior between the points at which it was evaluated, in nats; large means rough intervals.
    `evaluations`
        Points at which the free energy was computed.
    `rank_spatial`, `truncated_share_spatial`, `covariance_error_spatial`
        Where columns make the field: how many, what share of its variance they leave to the cells themselves (on a graph: leave
        out), and, in the structured engine, the relative error of covariances between cells (Frobenius norm).
    `engine`, `engine_reason`, `seconds`
        What solved the Gaussian problems, why it was chosen, and the time of the whole fit.
    `n_trees`, `effective_trees`, `share_<component>_variance_between_trees`, `share_<component>_variance_within_trees`
        Of a fit under several trees: how many, how many of equal weight would be as good, and the two parts of the variance of the
        share of `lineage` and of `spatial`: from one tree to another, and under each. k-hat and the interpolation error are the
        largest of all, what is told of the engine is of the tree with the most evidence.
    """
    _single(adata, key, "diagnostics, see `cf.get.responses`")
    return dict(_results(adata, key).get(_keys.DIAGNOSTICS, {}))


def responses(adata: AnnData, key: str = _keys.KEY) -> pd.DataFrame:
    """How the fit of each response went, a row each.

    Needs :func:`cellfate.tl.decompose`.

    Returns
    -------
    Columns `response`, `status` (``"converged"``, the doubts about the fit, or ``"failed: <reason>"``, and the rest is NaN),
    `free_energy` (at the mode), `log_evidence`, `mode_<hyperparameter>`, and the diagnostics, see :func:`diagnostics`. Many
    negative binomial responses also have `dispersion_trend`, the dispersion that is expected of a response of that mean.
    """
    results = _results(adata, key)
    if _keys.RESPONSES in results:
        return _table(adata, key, _keys.RESPONSES)
    found = dict(results.get(_keys.DIAGNOSTICS, {}))
    row = {"response": results[_keys.PARAMS]["fate"], "status": found.pop("status", "")}
    row |= {name: results[name] for name in (_keys.FREE_ENERGY, _keys.LOG_EVIDENCE)}
    return pd.DataFrame([row | {f"mode_{name}": value for name, value in results[_keys.MODE].items()} | found])


def correlations(adata: AnnData, key: str = _keys.CORRELATIONS) -> pd.DataFrame:
    """Correlations of every two fates, a row per pair and component.

    Needs :func:`cellfate.tl.correlate`. For a matrix: `.pivot_table(index="response", columns="other", values="correlation")` of
    the rows of one component.

    Returns
    -------
    Columns `response`, `other`, `component` (``"lineage"``, ``"spatial"``, and ``"residual"`` of gaussian fates), `correlation` and
    its standard error `se`, NaN where one of the two has none of that component or the search found no maximum; `status` says so.
    """
    if key not in adata.uns or "correlation" not in adata.uns[key]:
        raise DataError(
            f"there are no correlations in adata.uns[{key!r}]. Run `cf.tl.correlate(adata, fates, ...)` first."
        )
    table = pd.DataFrame(adata.uns[key]).copy()
    for column in ("response", "other", "component", "status"):
        table[column] = table[column].astype(object)
    return table


def identifiability(adata: AnnData, key: str = _keys.IDENTIFIABILITY) -> pd.DataFrame:
    """Return what a fate in these cells could tell of ancestry and neighborhood, a row per length-scale.

    Needs :func:`cellfate.pp.identifiability`, which says what its columns are.
    """
    held = adata.uns.get(key)
    if not isinstance(held, pd.DataFrame) or not {"lengthscale", "variance_lineage", "verdict"} <= set(held.columns):
        more = "" if key == _keys.IDENTIFIABILITY else f", key_added={key!r}"
        finding = f"adata.uns[{key!r}] holds something else" if key in adata.uns else f"adata.uns has no {key!r}"
        raise DataError(f"{finding}, wanted a row per length-scale. Run `cf.pp.identifiability(adata{more})` first.")
    return held.astype({"verdict": object}).reset_index(drop=True)  # from disk it comes as categories


def _single(adata: AnnData, key: str, what: str) -> None:
    """Refuse what there is only of one response."""
    if _keys.RESPONSES in _results(adata, key):
        raise DataError(
            f"adata.uns[{key!r}] holds the fits of many responses, which have no {what}. For one of them run "
            "`cf.tl.decompose(adata, '<its name>', ..., key_added='<another key>')`."
        )


def _results(adata: AnnData, key: str) -> Mapping[str, Any]:
    if _is_fit(adata.uns.get(key)):
        return adata.uns[key]
    fits = [name for name, value in adata.uns.items() if _is_fit(value)]
    finding = "adata.uns holds something else" if key in adata.uns else "there is nothing in adata.uns"
    remedy = f"use key={fits[0]!r}" if len(fits) == 1 else f"use one of the keys {fits}"
    run = "cf.tl.decompose(adata, ...)" if key == _keys.KEY else f"cf.tl.decompose(adata, ..., key_added={key!r})"
    raise DataError(
        f"No decomposition under {key!r}: {finding} by that name. "
        + (f"Either {remedy}, or run `{run}` first." if fits else f"Run `{run}` first.")
    )


def _is_fit(value: object) -> bool:
    return isinstance(value, Mapping) and _keys.PARAMS in value and _keys.COMPONENTS in value


def _table(adata: AnnData, key: str, name: str) -> pd.DataFrame:
    results = _results(adata, key)
    if name not in results:
        raise DataError(
            f"adata.uns[{key!r}] has no {name!r}, found {sorted(results)}. Run `cf.tl.decompose` again to restore it."
        )
    table = pd.DataFrame(results[name]).copy()
    for column in table.columns:
        # Text comes back from disk as categories or as the newer string type; a table reads the same either way.
        if not pd.api.types.is_numeric_dtype(table[column]):
            table[column] = table[column].astype(object)
    return table
