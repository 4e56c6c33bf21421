"""Several trees of the same cells, as bootstrap replicates or draws of a tree's posterior come."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate.cells import Cells
from cellfate.errors import CellfateWarning, DataError
from cellfate.io.anndata import read_cells
from cellfate.io.lineage import Ancestry, find_ancestry, looks_like_newick, match
from cellfate.trees.forest import examples

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True, eq=False)
class Trees:
    """Trees over the same cells: what each is called in tables, and its forest on the cells that all of them hold."""

    names: tuple[str, ...]
    ancestries: tuple[Ancestry, ...]
    keys: list[str] | None  # of the trees, where all of them are in adata


def one_of_one(lineage: Any) -> Any:
    """A list with one key is that key."""
    single = isinstance(lineage, list | tuple) and len(lineage) == 1 and isinstance(lineage[0], str)
    return lineage[0] if single and not looks_like_newick(lineage[0]) else lineage


def find_trees(adata: AnnData, lineage: Any, lineage_kernel: str) -> Trees | None:
    """The trees that a list means; None where `lineage` is one tree, or a list of trees without a cell in common: a forest."""
    if not isinstance(lineage, list | tuple) or len(lineage) < 2:
        return None
    keys = [isinstance(one, str) and not ("(" in one or looks_like_newick(one)) for one in lineage]
    found, names = [], []
    for i, (one, key) in enumerate(zip(lineage, keys, strict=True), start=1):
        label = f"tree {i} of the list"
        try:
            ancestry = find_ancestry(adata, one, lineage_kernel)
        except DataError as e:
            raise DataError(f"{label}: {e}") from e
        found.append(ancestry if key else replace(ancestry, label=label))
        names.append(one if key else f"tree {i}")
    if not any(keys) and not _overlap(found):
        return None
    return Trees(_distinct(names), _on_common_cells(adata, found), list(lineage) if all(keys) else None)


def under_each(
    adata: AnnData,
    cells: Cells,
    trees: Trees,
    *,
    layer: str | None,
    family: str,
    lineage_kernel: str,
    library_key: str | None,
    trials: Any,
) -> list[Cells]:
    """The cells under each tree; `cells` are those under the first. What is wrong with a tree is said before any is fitted."""
    out = [cells]
    for ancestry in trees.ancestries[1:]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CellfateWarning)  # they were said of the first
            own = read_cells(
                adata,
                cells.response_name,
                layer=layer,
                family=family,
                lineage=ancestry,
                lineage_kernel=lineage_kernel,
                spatial=None,
                library_key=library_key,
                trials=trials,
            )
        out.append(replace(cells, forest=own.forest, leaf=own.leaf))
    return out


def _overlap(ancestries: list[Ancestry]) -> bool:
    count = Counter(name for one in ancestries for name in one.forest.names[one.forest.leaves])
    return max(count.values()) > 1


def _distinct(names: list[str]) -> tuple[str, ...]:
    """A tree that is there again, as in a posterior sample, is called so."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(out)


def _on_common_cells(adata: AnnData, ancestries: list[Ancestry]) -> tuple[Ancestry, ...]:
    """Each on the cells that all of them hold; the others are to be dropped."""
    names = adata.obs_names.to_numpy().astype(object)
    matched = []
    for one in ancestries:
        try:
            matched.append(match(one, names))
        except DataError as e:
            raise DataError(
                f"{e} (A list of trees that share cells, or of keys, means as many trees of the same cells; one tree per clone is "
                "a list of trees without a cell in common.)"
            ) from e
    kept = np.logical_and.reduce([held for _, _, held in matched])
    if not kept.any():
        raise DataError(
            f"no cell is in all {len(ancestries)} trees, {examples(one.label for one in ancestries)}. They have to be of the same "
            "cells; one tree per clone is a list of trees without a cell in common."
        )
    out = []
    for one, (forest, _, held) in zip(ancestries, matched, strict=True):
        on_these = forest if (held == kept).all() else forest.prune(names[kept])
        missing = one.missing | frozenset(names[~kept])
        out.append(replace(one, forest=on_these, policy="drop", missing=missing, one_of=len(ancestries)))
    return tuple(out)
