"""The door for trees: validated, matched with the cells, stored where everything else finds it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate import _keys
from cellfate._runtime import logger
from cellfate.errors import DataError
from cellfate.io.columns import among, check_adata
from cellfate.io.lineage import AGREE, POLICIES, looks_like_newick, no_leaf
from cellfate.io.store import own
from cellfate.trees.convert import LENGTHS, TIMES, to_forest, to_graph, to_newick, to_newick_dict
from cellfate.trees.forest import Forest, examples

if TYPE_CHECKING:
    from anndata import AnnData


def set_tree(adata: AnnData, tree: Any, key_added: str = _keys.TREE, missing: str = "error") -> None:
    """Check a tree and store it with the cells.

    Parameters
    ----------
    adata
        Cells; their `obs_names` are the names of the leaves.
    tree
        A networkx `DiGraph` (edges have `length`, or nodes have `time` or `depth`), Newick text (several trees are a
        forest) or the path of a file of it, an edge table with columns `parent`, `child` and perhaps `length`, or a
        dict of those by specimen. Without lengths and times every branch counts 1.
    key_added
        Where to store it. A tree that is there already is replaced, anything else is an error.
    missing
        What to do with leaves that are not cells and cells that are not leaves. `"error"`: refuse. `"drop"`: prune such
        leaves, leave such cells out of later fits. `"isolate"`: prune such leaves, take such cells as unrelated to all
        others, at the mean depth of the leaves.

    Returns
    -------
    `None`. Writes `adata.uns[key_added]` (Newick text, or a dict of it by specimen where a dict came in); in a
    `TreeData`, a single tree goes to `adata.obst[key_added]` instead (`DiGraph` with `length` on its edges, and with whatever
    else the nodes and edges of a given graph carry). Cells
    without a leaf are noted in `adata.uns[f"{key_added}_missing"]`.
    """
    check_adata(adata)
    if missing not in POLICIES:
        raise DataError(f"missing is {missing!r}, wanted one of {examples(POLICIES)}.")
    # text that is no Newick is the name of a file, if there is one
    named = isinstance(tree, str) and "(" not in tree and ";" not in tree and os.path.isfile(tree)
    tree = _read_file(Path(tree)) if named or isinstance(tree, os.PathLike) else tree
    by_specimen = isinstance(tree, Mapping) and not {"parent", "child"} <= set(tree)
    forest = to_forest(tree)
    in_obst = hasattr(adata, "obst") and not by_specimen and forest.n_trees == 1
    _check_slots(adata, key_added, in_obst, forest)
    names = adata.obs_names.to_numpy().astype(object)
    if not has_lengths(tree, forest):
        logger.info("no branch lengths found: every branch counts 1")
    forest, without = _align(forest, names, missing)
    own(adata)
    if in_obst:
        _store_graph(adata, key_added, forest, tree)
    else:
        adata.uns[key_added] = to_newick_dict(forest) if by_specimen else to_newick(forest)
    note = _keys.missing(key_added)
    if len(without):
        adata.uns[note] = {
            "policy": missing,
            "cells": np.array(without, dtype=object),
            "depth": float(forest.depth[forest.leaves].mean()),
        }
    elif note in adata.uns:
        del adata.uns[note]


def _align(forest: Forest, names: np.ndarray, missing: str) -> tuple[Forest, np.ndarray]:
    """The forest on the cells, and the cells without a leaf."""
    leaves = forest.names[forest.leaves]
    observed, has_leaf = among(leaves, names), among(names, leaves)
    if not observed.any():
        raise DataError(f"{no_leaf(forest, names, ~has_leaf, 'tree')} {AGREE}")
    found = []
    if not has_leaf.all():
        found.append(no_leaf(forest, names, ~has_leaf, "tree"))
    if not observed.all():
        found.append(f"{int((~observed).sum())} of {len(leaves)} leaves are not cells: {examples(leaves[~observed])}.")
    if found and missing == "error":
        raise DataError(
            f"{' '.join(found)} Use missing='drop' to prune such leaves and leave such cells out of fits, or "
            "missing='isolate' to prune such leaves and take such cells as unrelated to the others."
        )
    for text in found:
        logger.info("%s", text)
    return (forest if observed.all() else forest.prune(leaves[observed])), names[~has_leaf]


def _check_slots(adata: AnnData, key: Any, in_obst: bool, forest: Forest) -> None:
    """Only what `set_tree` itself would write may be replaced."""
    if not isinstance(key, str) or not key or "/" in key:
        raise DataError(f"key_added is {key!r}, wanted a name without '/'.")
    if not in_obst:
        slashed = [name for name in dict.fromkeys(forest.tree_names) if "/" in name or not name]
        if slashed:
            raise DataError(
                f"{len(slashed)} specimens have a name that cannot be a key in a file: {examples(slashed)}. Rename "
                "them without '/', in the trees and in obs."
            )
    if key in adata.uns and not _is_tree(adata, adata.uns[key]):
        raise DataError(
            f"uns[{key!r}] is taken by something that is no tree (a {type(adata.uns[key]).__name__}). "
            "Choose another key_added."
        )
    note = _keys.missing(key)
    if note in adata.uns and not (isinstance(adata.uns[note], Mapping) and "policy" in adata.uns[note]):
        raise DataError(
            f"uns[{note!r}] is taken by something else (a {type(adata.uns[note]).__name__}), but is where cells "
            "without a leaf are noted. Choose another key_added."
        )
    if not hasattr(adata, "obst"):
        return
    if in_obst and key in adata.uns:
        raise DataError(
            f"uns[{key!r}] holds a tree, and this one would go to obst[{key!r}]: two trees of one name. "
            f"Choose another key_added, or `del adata.uns[{key!r}]` first."
        )
    if not in_obst and key in adata.obst:
        raise DataError(
            f"obst[{key!r}] holds a tree, and a forest would go to uns[{key!r}]: two trees of one name. "
            f"Choose another key_added, or `del adata.obst[{key!r}]` first."
        )


def _read_file(path: os.PathLike[str]) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"The tree cannot be read from {os.fspath(path)!r}: {e}. Give the path of a Newick file."
        ) from e


def _is_tree(adata: AnnData, value: Any) -> bool:
    """Is this a tree, and not text that happens to end like one? A single word is a tree only of a cell of that name."""
    if not looks_like_newick(value):
        return False
    try:
        forest = to_forest(value)
    except DataError:
        return False
    return forest.n_nodes > forest.n_trees or bool(among(forest.names, adata.obs_names).any())


def has_lengths(tree: Any, forest: Forest) -> bool:
    """Whether lengths were read, or times, instead of set to 1."""
    if (forest.branch_length[~forest.is_root] != 1.0).any() or isinstance(tree, Forest):
        return True
    if isinstance(tree, str):
        return ":" in re.sub(r"'[^']*'|\[[^\]]*\]", "", tree)
    if hasattr(tree, "is_directed"):
        return any(k in data for _, _, data in tree.edges(data=True) for k in LENGTHS) or any(
            k in data for _, data in tree.nodes(data=True) for k in TIMES
        )
    if isinstance(tree, np.ndarray):
        return tree.shape[1] > 2
    columns = set(tree.columns) if hasattr(tree, "columns") else set(tree) if isinstance(tree, Mapping) else set()
    if {"parent", "child"} <= columns:
        return bool(columns & set(LENGTHS))
    return any(has_lengths(one, forest) for one in (tree.values() if isinstance(tree, Mapping) else tree))


def _with_attributes(graph: Any, source: Any) -> Any:
    """The graph with what the nodes and edges of the user's graph carry, lengths apart."""
    original = {str(node): node for node in source.nodes}
    graph.graph.update(source.graph)
    for node, data in graph.nodes(data=True):
        if node in original:
            data.update({k: v for k, v in source.nodes[original[node]].items() if k not in data})
    for above, below, data in graph.edges(data=True):
        if above in original and source.has_edge(original[above], original.get(below)):
            found = source.edges[original[above], original[below]]
            data.update({k: v for k, v in found.items() if k not in data})
    return graph


def _store_graph(adata: Any, key: str, forest: Forest, source: Any) -> None:
    """Into `.obst`, which labels the cells of its trees in an obs column of its own."""
    graph = to_graph(forest)
    if hasattr(source, "is_directed"):
        graph = _with_attributes(graph, source)
    label = adata.label
    if label in adata.obs.columns and not len(adata.obst) and adata.obs[label].notna().any():
        raise DataError(
            f"obs[{label!r}] is taken, but is where TreeData writes the tree of each cell. Rename the column, or "
            "set `adata.label = None`."
        )
    try:
        adata.obst[key] = graph
    except ValueError as e:
        raise DataError(f"TreeData does not take the tree (alignment {adata.alignment!r}): {e}.") from e
