"""What the sweeps need of a topology, worked out once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Schedule:
    """The order of all merges, and where each sweep finds what it needs; `int64` and contiguous, as the compiled twin wants it.

    A **segment** is what moves up the tree: a node's message through its own branch (numbered as the node) or what a merge keeps
    (`nodes` + number of the merge). A node with many children merges them as a balanced tournament, each merge as early as it
    can come, so that a star is as deep as a balanced tree and rows are still warm when they are met again. A root ends with a
    merge of its own, with nothing: so n cells make n merges, each of which finishes one row.
    """

    parent: np.ndarray  # (nodes,), -1 at a root
    depth: np.ndarray  # (nodes,), branches from the root
    cell: np.ndarray  # (nodes,), the cell on a node, -1 where there is none
    source: (
        np.ndarray
    )  # (nodes,), the segment in which all that a node's children say ends; -1 at leaves, -2 over no cell
    eldest: np.ndarray  # (nodes,), 1 where a node is the first child of its parent
    inner: np.ndarray  # (nodes,), numbers the nodes with children, -1 at leaves
    end: np.ndarray  # (nodes + 1,), merges that come right after node v are end[v]..end[v + 1]
    pair: np.ndarray  # (n, 2), the segments that a merge joins, the second -1 at a root
    rows: (
        np.ndarray
    )  # (n, 2), the cells whose rows hold them: what is kept goes to the first, the contrast to the second
    fresh: np.ndarray  # (n,), +1 if the first row has not been met before, +2 if the second
    pieces: np.ndarray  # (pieces, 2), runs of merges that share no row
    rest: np.ndarray  # (runs, 2), what is left of the merges and comes after the pieces


class TreePlan:
    """Topology of a forest in post-order with cells on some of its leaves.

    `parent` (nodes,) is -1 at a root, and a subtree is a contiguous run of nodes that ends at its top, as in
    :class:`cellfate.trees.forest.Forest`; `leaf` (n,) is the node of each cell.
    """

    def __init__(self, parent: Any, leaf: Any, device: torch.device | str = "cpu") -> None:
        from cellfate.trees import sweeps_compiled

        above = torch.as_tensor(parent).cpu().numpy().astype(np.int64)
        at = torch.as_tensor(leaf).cpu().numpy().astype(np.int64)
        self.n_nodes, self.n_cells = above.size, at.size
        self.device = torch.device(device)
        if self.n_cells == 0:
            raise ValueError("The tree holds no cell. Give the leaf of at least one.")
        if at.min() < 0 or at.max() >= self.n_nodes:
            raise ValueError(f"Leaves have to be nodes of the tree, 0..{self.n_nodes - 1}; got {at.min()}..{at.max()}.")
        below = above[above >= 0]
        if ((above >= 0) & (above <= np.arange(self.n_nodes))).any() or above.max() >= self.n_nodes:
            raise ValueError("The nodes are not in post-order: a parent has to come after its children.")
        if (np.bincount(below, minlength=self.n_nodes)[at] > 0).any():
            raise ValueError("Some cells sit on nodes that have children. Give every cell a leaf of its own.")
        if np.bincount(at, minlength=self.n_nodes).max() > 1:
            raise ValueError("Some leaves hold several cells. Give every cell a leaf of its own.")
        self.parent = torch.as_tensor(above, device=self.device)
        self.leaf = torch.as_tensor(at, device=self.device)
        self.schedule = Schedule(above, *sweeps_compiled.schedule(above, at))

    @cached_property
    def height(self) -> int:
        """Branches from a root to the deepest leaf."""
        return int(self.schedule.depth.max())
