"""Do ancestry and neighborhood matter as much in one condition as in another?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from cellfate import _keys, get
from cellfate._runtime import SeedLike, generator, logger, named_generator, progress
from cellfate.engines.choose import choose
from cellfate.errors import CellfateWarning, DataError
from cellfate.inference.arrays import check_single_cells
from cellfate.inference.hyperposterior import LARGEST_K, too_large
from cellfate.inference.levels import Alike, LevelFit, alike, component_at, fit_level, model_of_level
from cellfate.io.again import OBJECTS
from cellfate.io.columns import check_adata, check_present, column, factorize
from cellfate.io.store import write_table
from cellfate.kernels.base import Component
from cellfate.kernels.graph import Composition, Graph
from cellfate.kernels.groups import CorrelatedSlopes, Intercepts, Slopes
from cellfate.kernels.lineage import Clone, LineageKernel
from cellfate.model.checks import check_levels, check_response
from cellfate.model.partition import summary
from cellfate.tl.components import COARSE
from cellfate.tl.fitted import Fitted, check_there, fitted
from cellfate.trees.forest import examples

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

FEWEST = 20  # cells of a level
EVIDENCE = (
    (5.0, "very strong"),
    (3.0, "strong"),
    (1.0, "positive"),
)  # log Bayes factors, Kass & Raftery (1995, p. 777)
SHARE, VARIANCE = "share", "log_variance"  # what is compared
TINY = np.finfo(float).tiny


def by_condition(
    adata: AnnData,
    condition: str,
    *,
    key: str = _keys.KEY,
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
    """Compare shares and variances between conditions: wild type and mutant, stages, treatments.

    The model of the fit under `key` is fitted to the cells of each level of `condition` apart, with its components, family and priors;
    default priors stay those of all cells, in their units. A variance is the one expected among the cells of its level. Fixed effects
    that are constant in a level or follow from others there, such as `condition` itself, are left out of it, and so is a grouping
    factor of which it has one level only; the log says so.

    Differences are those of posterior draws, independent between levels; `p` is twice the probability of the smaller side of zero, and
    no smaller than 0.0005, which 4,000 draws can show. One statement over all: the log Bayes factor of hyperparameters that differ (a
    set for each level) against alike ones (one set for all), with fields and fixed effects of each level's own in either case, so that
    a difference of means is none (Kass & Raftery 1995, whose words the verdict takes). Like all evidence it depends on the priors, by
    which two levels would differ widely: it takes more to say that they differ under wider ones, and what speaks for one set does not say
    that a difference is small. The intervals do.

    Levels are independent where none shares a tree, a field or a level of a grouping factor with another, and there is no niche, whose
    coefficients are those of all cells: whole specimens, in most designs. Where they do share, a :class:`~cellfate.CellfateWarning` says what: there is no Bayes factor then, and intervals of
    differences are only rough; each level's own are as good as ever.

    Parameters
    ----------
    condition
        Column of `adata.obs` whose levels are groups of cells, each of at least 20.
    key
        The `key_added` of the fit, of one fate.
    lineage, spatial, graph, niche, offset, trials
        What was handed to the fit itself, and not the name of something in `adata`, has to be handed over again.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    rng
        Seed of the integrations. The fit of a level does not depend on what other levels there are.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes tables to `adata.uns[key]`: `conditions`, a row per level and component;
    `condition_differences`, a row per pair of levels, component and quantity; `condition_evidence`, one row; see
    :func:`cellfate.get.conditions`, :func:`cellfate.get.condition_differences` and :func:`cellfate.get.condition_evidence`. All are on
    the latent scale.

    Raises
    ------
    DataError
        Where `condition` is no column, has missing values in cells of the fit, one level, or a level of fewer than 20 cells; where a
        level cannot be fitted by itself, such as one in which the fate does not vary.
    NotImplementedError
        For family ``"categorical"`` and for fits with `reml=False`.

    Examples
    --------
    >>> import numpy as np
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(160, family="gaussian", n_specimens=4, rng=0)
    >>> adata.obs["genotype"] = np.where(adata.obs["specimen"].isin(["specimen0", "specimen1"]), "wild type", "mutant")
    >>> cf.tl.decompose(adata, "fate", family="gaussian", library_key="specimen", groups=[], rng=0)
    >>> cf.tl.by_condition(adata, "genotype", rng=0)
    >>> sorted(set(cf.get.conditions(adata)["condition"]))
    ['mutant', 'wild type']
    >>> cf.get.condition_evidence(adata)["condition"].tolist()
    ['genotype']
    """
    check_adata(adata)
    handed = dict(zip(OBJECTS, (lineage, spatial, graph, niche, offset, trials), strict=True))
    fit = fitted(adata, key, handed, device)
    check_there(fit, "comparisons of conditions")
    codes, names = _levels(adata, condition, fit)
    shared = _shared(fit, codes)
    if shared:
        warnings.warn(
            f"the levels of obs[{condition!r}] are not independent: they share {', '.join(shared)}. There is no Bayes factor, and "
            "intervals of differences take them as independent. Compare levels of whole specimens, and name these in library_key.",
            CellfateWarning,
            stacklevel=2,
        )
    elif fit.cells.n_specimens == len(names) and all(
        np.ptp(fit.cells.specimen[codes == k]) == 0 for k in range(len(names))
    ):
        logger.info(
            "each level of obs[%r] is one specimen: what differs between specimens and what %r does are then one, and cannot be told apart",
            condition,
            condition,
        )
    _say_replaced(adata, key)
    stream = generator(rng)
    seed, found = int(stream.integers(2**62)), {}
    for code, name in enumerate(progress(names, desc="conditions", unit="level")):
        cells = np.flatnonzero(codes == code)
        try:
            found[name] = _fit(fit, cells, f"level {name!r}", named_generator(seed, name))
        except DataError as e:
            raise DataError(
                f"level {name!r} of obs[{condition!r}], {len(cells)} cells, cannot be fitted by itself: {e} Or leave this level out: "
                "fit the other cells, and compare those."
            ) from e
        logger.info("%s: %d cells, log evidence %.2f", name, len(cells), found[name].log_evidence)
    doubt = f"levels share {', '.join(shared)}" if shared else ""
    for name, level in found.items():
        if level.status != "converged":
            warnings.warn(f"level {name!r}: {level.status}.", CellfateWarning, stacklevel=2)
    together = Alike(np.nan, np.nan, np.nan) if shared else alike(list(found.values()), fit.glmm.rule, stream)
    tables = {
        _keys.CONDITIONS: _conditions(found, np.bincount(codes), doubt),
        _keys.CONDITION_DIFFERENCES: _differences(found, doubt),
        _keys.CONDITION_EVIDENCE: _evidence(condition, found, together, doubt),
    }
    adata = adata.copy() if copy else adata
    for name, table in tables.items():
        write_table(adata, key, name, table)
    return adata if copy else None


def _say_replaced(adata: AnnData, key: str) -> None:
    """An earlier comparison under this fit goes, and the log says which."""
    if _keys.CONDITION_EVIDENCE in adata.uns[key]:
        (before,) = get.condition_evidence(adata, key)["condition"]
        logger.info("the comparison by %r under %r is replaced; a fit under another key_added keeps both", before, key)


# --- the levels -----------------------------------------------------------------------------------------------------------


def _levels(adata: AnnData, condition: str, fit: Fitted) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes (n,) of the cells of the fit and the names of the levels."""
    values = column(adata, condition, "condition")[fit.cells.kept]
    label = f"condition obs[{condition!r}]"
    if condition == fit.params["fate"]:
        raise DataError(f"{label} is the fate itself, and would not vary within a level. Name another column.")
    check_present(values, label, "Give those cells a level, or leave them out and fit the rest.")
    codes, names = factorize(values, label)
    if len(names) == 1:
        raise DataError(
            f"{label} has one level: all {len(codes)} cells of the fit are {names[0]!r}. There is nothing to compare: name a column "
            "that divides them."
        )
    count = np.bincount(codes)
    few = np.flatnonzero(count < FEWEST)
    if few.size:
        shown = examples(f"{names[k]}: {count[k]}" for k in few)
        raise DataError(
            f"{label} has {few.size} of {len(names)} levels with fewer than {FEWEST} cells of the fit: {shown}. Merge levels (a "
            "measurement by `pd.cut`), or fit without those cells."
        )
    return codes, names


def _shared(fit: Fitted, codes: np.ndarray) -> list[str]:
    """What makes cells of different levels dependent, in words, such as `3 of 4 trees (lineage)`."""
    out = []
    for component in fit.glmm.components:
        if isinstance(component.kernel, Composition):
            out.append("the coefficients of the niche")
            continue
        labels = _dependent(component)
        if labels is None:
            continue
        sets, index = np.unique(labels, return_inverse=True)
        pairs = np.unique(np.column_stack([index.reshape(-1), codes]), axis=0)
        across = int((np.bincount(pairs[:, 0]) > 1).sum())
        if across:
            whole = (
                f"{across} of {len(sets)} {_called(component)}" if len(sets) > 1 else f"one {_called(component)[:-1]}"
            )
            out.append(f"{whole} ({component.name})")
    return out


def _dependent(component: Component) -> np.ndarray | None:
    """Label (n,) of the set of cells that a component makes dependent; None where each cell has an effect for itself."""
    kernel = component.kernel
    if isinstance(kernel, Intercepts | Slopes | CorrelatedSlopes):
        return None if isinstance(kernel, Intercepts) and kernel.one_each else kernel.codes
    labels = kernel.independent()  # where it does not say, any two may be
    return np.zeros(kernel.n, dtype=np.int64) if labels is None else labels


def _called(component: Component) -> str:
    """What it is that cells share, in the plural."""
    kernel = component.kernel
    if isinstance(kernel, LineageKernel):
        return "clones" if isinstance(kernel, Clone) else "trees"
    return "levels" if isinstance(kernel, Intercepts | Slopes | CorrelatedSlopes) else "fields"


def _fit(fit: Fitted, cells: np.ndarray, label: str, rng: np.random.Generator) -> LevelFit:
    """The model of the fit on some of its cells."""
    glmm, n = fit.glmm, len(cells)
    whole, _, _ = glmm.problem
    _check_response(fit, cells, label)
    components, priors = [], dict(glmm.priors)
    for component in glmm.components:
        why = _says_nothing(component, cells, glmm.components)
        if why:
            logger.info("%s: component %r is left out, %s", label, component.name, why)
            for parameter in (
                f"sd_{component.name}",
                *(h.parameter(component.name) for h in component.kernel.hyperparameters),
            ):
                priors.pop(parameter, None)
        else:
            components.append(component_at(component, cells))
    if not components:
        raise DataError("none of the components of the fit says anything among these cells.")
    check_single_cells(components, glmm.family, _some(fit.cells.trials, cells))
    model, gone = model_of_level(whole, cells, components, priors)
    if gone:
        logger.info("%s: fixed effects that say nothing there are left out: %s", label, ", ".join(gone))
    engine, _ = choose(glmm.engine_name, components, n, device=glmm.device, dtype=glmm.dtype, rank=glmm.rank)
    return _with_truncation(fit_level(model, engine, glmm.rule, rng), components)


def _says_nothing(component: Component, cells: np.ndarray, others: Sequence[Component]) -> str:
    """Why a grouping factor has nothing to say among some cells; empty where it has."""
    kernel = component.kernel
    if not isinstance(kernel, Intercepts | Slopes | CorrelatedSlopes):
        return ""
    if len(np.unique(kernel.codes[cells])) == 1:
        return "it has one level there"
    if isinstance(kernel, Intercepts):
        return ""
    x = kernel.covariate[cells]
    if np.ptp(x) > 1e-10 * np.abs(kernel.covariate).max():
        return ""
    if isinstance(kernel, CorrelatedSlopes):
        raise DataError(
            f"the covariate of the slopes of {component.name!r} is one number there, and how they covary with the intercepts cannot "
            "be known. Fit without these slopes."
        )
    beside = any(isinstance(c.kernel, Intercepts) and np.array_equal(c.kernel.codes, kernel.codes) for c in others)
    return "its covariate is one number there" if beside or not x.any() else ""


def _check_response(fit: Fitted, cells: np.ndarray, label: str) -> None:
    """Can a fate be fitted from what it is in a level?"""
    y, names, kind = fit.cells.response[cells], fit.cells.names[cells], fit.glmm.family.kind
    called = f"fate {fit.cells.response_name!r}"
    if kind == "levels":  # each level of an ordinal fate, or its cut points would be the prior's alone
        assert fit.cells.levels is not None
        check_levels(y.astype(np.int64), names, called, fit.cells.levels)
    else:
        check_response(y, names, called, kind=kind, trials=_some(fit.cells.trials, cells))


def _some(values: np.ndarray | None, cells: np.ndarray) -> np.ndarray | None:
    return None if values is None else values[cells]


def _with_truncation(level: LevelFit, components: Sequence[Component]) -> LevelFit:
    """Say where the modes of a graph leave out much of a field as short as it is in this level."""
    for name, kernel in ((c.name, c.kernel) for c in components):
        if isinstance(kernel, Graph) and (share := kernel.truncated(level.at_mode[f"lengthscale_{name}"])) > COARSE:
            doubt = f"component {name!r}: modes of the graph leave out {share:.0%} of its variance"
            level = replace(level, status=_joined(level.status, doubt))
    return level


def _joined(*said: str) -> str:
    return "; ".join(one for one in said if one and one != "converged") or "converged"


# --- the tables -----------------------------------------------------------------------------------------------------------


def _conditions(found: Mapping[str, LevelFit], count: np.ndarray, doubt: str) -> pd.DataFrame:
    tables = [
        pd.DataFrame({"condition": name, **level.table, "n_cells": int(n), "status": _joined(level.status, doubt)})
        for (name, level), n in zip(found.items(), count, strict=True)
    ]
    return pd.concat(tables, ignore_index=True)


def _differences(found: Mapping[str, LevelFit], doubt: str) -> pd.DataFrame:
    """Of every two levels, with p-values adjusted over pairs and components, for shares and for variances apart."""
    rows = []
    for (one, a), (other, b) in combinations(found.items(), 2):
        said = [f"{n}: {f.status}" for n, f in ((one, a), (other, b)) if f.status != "converged"]
        for component in (c for c in a.shares if c in b.shares):
            logs = (np.log(np.maximum(level.variances[component], TINY)) for level in (a, b))
            drawn = {SHARE: a.shares[component] - b.shares[component], VARIANCE: np.subtract(*logs)}
            for quantity, x in drawn.items():
                row: dict[str, object] = {
                    "condition": one,
                    "other": other,
                    "component": component,
                    "quantity": quantity,
                }
                row |= dict(zip(("difference", "sd", "lower", "upper"), summary(x), strict=True))
                rows.append(row | {"p": tail(x), "q": np.nan, "status": _joined(*said, doubt)})
    table = pd.DataFrame(rows)
    for quantity in (SHARE, VARIANCE):
        here = table["quantity"] == quantity
        table.loc[here, "q"] = false_discovery_control(table.loc[here, "p"])
    return table


def tail(x: np.ndarray) -> float:
    """Twice the probability of the smaller side of zero, by draws x (s,) of a difference."""
    smaller = min((x >= 0).sum(), (x <= 0).sum())
    return float(min(1.0, 2 * (1 + smaller) / (len(x) + 1)))


def _evidence(condition: str, found: Mapping[str, LevelFit], together: Alike, doubt: str) -> pd.DataFrame:
    apart = sum(level.log_evidence for level in found.values())
    factor = apart - together.log_evidence
    said = [doubt, *(f"{name}: {level.status}" for name, level in found.items() if level.status != "converged")]
    if together.pareto_k > LARGEST_K:
        said.append(f"k-hat of the integral over one set of hyperparameters is {too_large(together.pareto_k)}")
    if not doubt and not np.isfinite(factor):
        said.append("a flat prior has no evidence, or a number overflowed")
    row = {
        "condition": condition,
        "levels": len(found),
        "log_evidence_apart": apart,
        "log_evidence_alike": together.log_evidence,
        "log_bayes_factor": factor,
        "error": together.error,
        "verdict": verdict(factor),
        "status": _joined(*said),
    }
    logger.info("%s: log Bayes factor %.2f, %s", condition, factor, row["verdict"])
    return pd.DataFrame([row])


def verdict(log_bayes_factor: float) -> str:
    """A log Bayes factor, positive where hyperparameters differ, in words (Kass & Raftery 1995)."""
    if not np.isfinite(log_bayes_factor):
        return "not known"
    which = "that the levels differ" if log_bayes_factor > 0 else "for one set of hyperparameters in all levels"
    for least, strength in EVIDENCE:
        if abs(log_bayes_factor) >= least:
            return f"{strength} evidence {which}"
    return "undecided: these cells hardly tell whether the levels differ"
