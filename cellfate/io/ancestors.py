"""Ancestors: every node of the tree that a fit was made on, as a table and on the tree itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate import _keys
from cellfate.cells import Cells
from cellfate.errors import DataError
from cellfate.io.lineage import find_ancestry, match
from cellfate.trees.convert import graph_names
from cellfate.trees.forest import examples

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData


def with_all_nodes(adata: AnnData, cells: Cells, lineage: Any, lineage_kernel: str) -> Cells:
    """The cells with the tree as it is, leaves without a cell included.

    Which clones there are depends on what is pruned: these keep the tree of the fit.
    """
    if lineage_kernel == "clone":
        return cells
    forest, leaf, _ = match(find_ancestry(adata, lineage, lineage_kernel), adata.obs_names.to_numpy(), prune=False)
    return replace(cells, forest=forest, leaf=leaf)


def ancestors_table(cells: Cells, mean: np.ndarray, sd: np.ndarray) -> pd.DataFrame:
    """A row per node, in post-order: who it is, where it stands, what is known of it."""
    forest = cells.forest
    assert forest is not None
    assert cells.leaf is not None
    names = np.array(graph_names(forest), dtype=object)
    below = np.append(0, np.cumsum(np.bincount(cells.leaf, minlength=forest.n_nodes)))
    return pd.DataFrame(
        {
            "node": names,
            "tree": np.array(forest.tree_names, dtype=object)[forest.tree],
            "parent": np.where(forest.is_root, "", names[forest.parent]),
            "depth": forest.depth,
            "mean": mean,
            "sd": sd,
            "is_leaf": forest.is_leaf,
            "n_cells": below[1:] - below[forest.start],
        }
    )


def graphs_of(adata: AnnData, lineage: Any) -> dict[str, Any]:
    """Tree objects that the input holds, by the name of their trees in the forest; "" where there is one for all."""
    obst = getattr(adata, "obst", {})
    if not isinstance(lineage, str):
        return {}
    if lineage in obst:
        return {"": obst[lineage]}
    if lineage not in adata.uns and obst and lineage == getattr(adata, "label", None):
        return {name: obst[name] for name in obst}
    return {}


def check_attributes(graphs: Mapping[str, Any], key: str) -> None:
    """Refuse to overwrite attributes of nodes that are not those of an earlier prediction."""
    ours = _keys.node_attributes(key)
    for graph in graphs.values():
        for node, data in graph.nodes(data=True):
            held = [data.get(name) for name in ours]
            if any(x is not None for x in held) and not all(isinstance(x, float) for x in held):
                raise DataError(
                    f"node {node!r} of the tree has {examples(name for name in ours if name in data)} already, and not from a "
                    "prediction. Rename the attribute, or fit under another key_added."
                )


def write_attributes(graphs: Mapping[str, Any], key: str, cells: Cells, table: pd.DataFrame) -> None:
    """Posterior mean and sd on the nodes of the trees themselves."""
    assert cells.forest is not None
    rows = zip(table["tree"], cells.forest.names, table["mean"], table["sd"], strict=True)
    found = {("" if "" in graphs else tree, name): (mean, sd) for tree, name, mean, sd in rows}
    for tree, graph in graphs.items():
        for node in graph.nodes:
            for name, x in zip(_keys.node_attributes(key), found.get((tree, str(node)), ()), strict=False):
                graph.nodes[node][name] = float(x)
