"""A fit under each of several trees, pooled: how unsure the tree is enters what is reported."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd

from cellfate._runtime import SeedLike, logger, one_of_many, progress
from cellfate.cells import Cells
from cellfate.errors import DataError, unknown
from cellfate.inference.fit import GLMM, GLMMFit
from cellfate.inference.pooled import (
    FEW_TREES,
    Told,
    between_and_within,
    effective_trees,
    evidence_weights,
    pool,
    told_by,
)
from cellfate.inference.report import Integrated, report
from cellfate.io.lineage import Ancestry
from cellfate.io.trees import Trees
from cellfate.kernels.base import Component
from cellfate.tl.components import under_tree
from cellfate.tl.jobs import Run
from cellfate.tl.posteriors import arguments_of, posteriors, stream_of
from cellfate.trees.forest import examples

EVIDENCE, EQUAL = "evidence", "equal"


def check_weights(tree_weights: Any, trees: Trees | None) -> None:
    """Are these weights of these trees?"""
    if isinstance(tree_weights, str):
        if tree_weights not in (EVIDENCE, EQUAL):
            raise unknown("tree_weights", tree_weights, (EVIDENCE, EQUAL))
        if trees is None and tree_weights != EVIDENCE:
            raise DataError(
                f"tree_weights is {tree_weights!r}, but lineage is one tree. Give a list of trees, or leave it out."
            )
        return
    if trees is None:
        raise DataError("tree_weights is given, but lineage is one tree. Give a list of trees, or leave it out.")
    try:
        given = np.asarray(tree_weights, dtype=float)
    except (TypeError, ValueError):
        given = np.array(np.nan)
    count = len(trees.names)
    if given.shape != (count,) or not np.isfinite(given).all() or (given < 0).any() or not given.sum() > 0:
        raise DataError(
            f"tree_weights is {tree_weights!r}, wanted 'evidence', 'equal' or {count} numbers of 0 or more, one for each tree."
        )


def fit_trees(
    glmm: GLMM,
    cells: Sequence[Cells],
    trees: Trees,
    tree_weights: Any,
    lineage_kernel: str,
    rng: SeedLike | None,
    run: Run | None = None,
) -> tuple[GLMMFit, pd.DataFrame]:
    """The pooled fit, and a row for each tree; `glmm` is the model under the first, `cells` are those under each.

    With a `run` the fit under each tree is a task.
    """
    began, names = time.perf_counter(), trees.names
    stream, given = stream_of(rng, run)
    seed = int(deepcopy(stream).integers(2**62))  # of the pooling, whichever tree comes first
    # the same numbers for every tree: errors of the integration are then alike, and cancel where trees are compared
    streams = [stream, *(deepcopy(stream) for _ in names[1:])]
    components = [
        glmm.components,
        *(
            under_tree(glmm.components, own, lineage_kernel, one.label)
            for own, one in zip(cells[1:], trees.ancestries[1:], strict=True)
        ),
    ]
    tasks = list(zip(components, cells, trees.ancestries, streams, strict=True))
    by_evidence = isinstance(tree_weights, str) and tree_weights == EVIDENCE
    found: list[Integrated] = []
    if run is not None:
        labels = [f"the fit under {ancestry.label}" for ancestry in trees.ancestries]
        found = posteriors(glmm, cells[0], components, streams, labels, names, run, given)
    else:
        found = [_posterior(glmm, *tasks[0])]  # says what is not about the tree
    if by_evidence and np.isnan(found[0].posterior.log_evidence):
        raise DataError(
            "tree_weights='evidence' needs evidence, which a model with a flat prior, or with reml=False, does not have. Give "
            "another prior, or tree_weights='equal'."
        )
    with progress(total=len(tasks), desc="trees", unit="tree") as bar, one_of_many():
        bar.update(len(found))
        for task in tasks[len(found) :]:
            found.append(_posterior(glmm, *task))
            bar.update()
    told = [told_by(one) for one in found]
    weight, prior = _weights(tree_weights, told, trees)
    pooled = pool(found, weight, prior, np.random.default_rng(seed))
    facts = {"n_trees": len(names), "effective_trees": effective_trees(weight)}
    for component in told[0].shares:
        between, within = between_and_within(told, weight, component)
        facts |= {
            f"share_{component}_variance_between_trees": between,
            f"share_{component}_variance_within_trees": within,
        }
    pooled.facts.update(facts)
    fit = report(pooled, cells[0].response_name, _doubts(names, weight, told))
    fit.diagnostics["seconds"] = time.perf_counter() - began
    _say(names, weight, facts, by_evidence=by_evidence)
    return fit, _table(names, weight, told)


def _posterior(
    glmm: GLMM, components: Sequence[Component], cells: Cells, ancestry: Ancestry, rng: np.random.Generator
) -> Integrated:
    try:
        return glmm.with_components(components).posterior(**arguments_of(cells), rng=rng)
    except DataError as e:
        raise DataError(f"{ancestry.label}: {e}") from e
    except Exception as e:
        e.add_note(f"This happened in the fit under {ancestry.label}.")
        raise


def _weights(tree_weights: Any, told: Sequence[Told], trees: Trees) -> tuple[np.ndarray, np.ndarray]:
    """Of each tree in the mixture, and before."""
    same = np.full(len(told), 1 / len(told))
    if not isinstance(tree_weights, str):
        given = np.asarray(tree_weights, dtype=float)
        return given / given.sum(), given / given.sum()
    if tree_weights == EQUAL:
        return same, same
    log_evidence = np.array([one.log_evidence for one in told])
    without = [ancestry.label for ancestry, x in zip(trees.ancestries, log_evidence, strict=True) if not np.isfinite(x)]
    if without:
        raise DataError(f"the fit under {without[0]} has no evidence that is a number. Leave that tree out.")
    return evidence_weights(log_evidence), same


def _doubts(names: Sequence[str], weight: np.ndarray, told: Sequence[Told]) -> list[str]:
    found = [
        (name, w, one.status) for name, w, one in zip(names, weight, told, strict=True) if one.status != "converged"
    ]
    if len(found) == 1:
        name, w, status = found[0]
        return [f"in the fit under tree {name!r}, of weight {w:.3f}, {status}"]
    if found:
        which, whole = examples(name for name, _, _ in found), sum(w for _, w, _ in found)
        text = f"the fits under {len(found)} of {len(names)} trees, with {whole:.3f} of the weight, are in doubt"
        return [f"{text}, see `cf.get.trees`: {which}"]
    return []


def _say(names: Sequence[str], weight: np.ndarray, facts: dict[str, Any], *, by_evidence: bool) -> None:
    most, count = int(weight.argmax()), len(names)
    if by_evidence and count > 2 and facts["effective_trees"] < FEW_TREES:
        logger.info(
            "the evidence is for one of %d trees, %r, with a weight of %.3f: the intervals are its own, and how unsure the tree is "
            "hardly enters them; tree_weights='equal' takes all trees alike",
            count,
            names[most],
            weight[most],
        )
    for component in ("lineage", "spatial"):
        if f"share_{component}_variance_between_trees" in facts:
            between, within = (facts[f"share_{component}_variance_{where}_trees"] for where in ("between", "within"))
            logger.info(
                "%s share: sd %.3f between trees, %.3f within them", component, np.sqrt(between), np.sqrt(within)
            )


def _table(names: Sequence[str], weight: np.ndarray, told: Sequence[Told]) -> pd.DataFrame:
    """A row per tree, as they came."""
    table = pd.DataFrame({"tree": list(names), "weight": weight, "log_evidence": [one.log_evidence for one in told]})
    for component in told[0].shares:
        mean, sd = np.array([one.shares[component] for one in told]).T
        table[f"share_{component}"], table[f"share_{component}_sd"] = mean, sd
    return table.assign(status=[one.status for one in told])
