"""Ancestry as flat arrays: a forest of rooted trees, in post-order, checked when it is built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cellfate.errors import DataError


def examples(names: Iterable[object], most: int = 5) -> str:
    """Up to five names for an error message: `'a', 'b', ...`."""
    shown = [repr(str(name)) for name in names]
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


@dataclass(frozen=True, eq=False, repr=False)
class Forest:
    """Rooted trees whose leaves are cells.

    Post-order: a parent has a larger index than its children and every subtree is the contiguous run of nodes
    `start[i]..i`, so "is j below i" is a comparison of integers and no algorithm has to recurse. Polytomies, unary nodes,
    zero-length branches and trees of one cell are legal.
    """

    parent: np.ndarray  # (nodes,) int64, -1 at a root
    branch_length: np.ndarray  # (nodes,) float64 >= 0; at a root the length above it, usually 0
    names: np.ndarray  # (nodes,) str as objects, "" where unnamed; leaf names are unique
    tree_names: tuple[str, ...]  # one per tree; trees of one specimen share a name

    def __post_init__(self) -> None:
        parent = np.array(self.parent, dtype=np.int64)
        length = np.array(self.branch_length, dtype=np.float64)
        names = np.empty(len(self.names), dtype=object)
        names[:] = [str(name) for name in self.names]
        for field, value in (("parent", parent), ("branch_length", length), ("names", names)):
            object.__setattr__(self, field, value)
        object.__setattr__(self, "tree_names", tuple(str(name) for name in self.tree_names))
        self._check()

    def _check(self) -> None:
        n = self.n_nodes
        if n == 0:
            raise DataError("The tree is empty: it has no node. Give a tree with at least one leaf.")
        for what, found in (("branch lengths", self.branch_length.size), ("names", self.names.size)):
            if found != n:
                raise DataError(f"The tree has {n} nodes but {found} {what}. Give one per node.")
        below = self.parent[~self.is_root]
        if (below <= np.flatnonzero(~self.is_root)).any() or (below >= n).any() or (self.parent < -1).any():
            raise DataError(
                "The nodes of the tree are not in post-order: a parent has to come after its children. "
                "Build the forest with `to_forest`."
            )
        if (self.start != np.arange(n) - self._size + 1).any():
            raise DataError(
                "The nodes of the tree are not in post-order: a subtree is not one contiguous run of nodes. "
                "Build the forest with `to_forest`."
            )
        bad = np.flatnonzero(~np.isfinite(self.branch_length))
        if bad.size:
            raise DataError(
                f"{bad.size} of {n} branch lengths are NaN or infinite, above {self._label(bad)}. "
                "Give every branch a finite length, or none for unit lengths."
            )
        bad = np.flatnonzero(self.branch_length < 0)
        if bad.size:
            raise DataError(
                f"{bad.size} of {n} branch lengths are negative, above {self._label(bad)}. "
                "Set them to zero or re-estimate the tree; where lengths come from node times, a child may "
                "not be earlier than its parent."
            )
        leaf_names = self.names[self.leaves]
        nameless = int((leaf_names == "").sum())
        if nameless:
            raise DataError(f"{nameless} of {self.n_leaves} leaves have no name. Name every leaf after its cell.")
        if len(self._leaf_index) < self.n_leaves:
            unique, counts = np.unique(leaf_names.astype(str), return_counts=True)
            twice = unique[counts > 1]
            raise DataError(
                f"{twice.size} leaf names occur more than once in the tree: {examples(twice)}. "
                "Leaf names have to be unique, over all trees together."
            )
        if len(self.tree_names) != self.n_trees:
            raise DataError(
                f"The forest has {self.n_trees} trees but {len(self.tree_names)} tree names. Give one per tree."
            )

    def _label(self, nodes: np.ndarray) -> str:
        return examples(self.names[node] or f"unnamed node {node}" for node in nodes)

    def __repr__(self) -> str:
        return f"Forest({self.n_trees} trees, {self.n_leaves} leaves, {self.n_nodes} nodes, height {self.height:g})"

    def copies(self, count: int) -> Forest:
        """The same trees `count` times, independent of each other."""
        shift = np.repeat(np.arange(count) * self.n_nodes, self.n_nodes)
        parent = np.tile(self.parent, count)
        marks = [f"{copy}:" for copy in range(count)]
        names = np.concatenate([np.array([f"{mark}{name}" for name in self.names], dtype=object) for mark in marks])
        trees = tuple(f"{mark}{name}" for mark in marks for name in self.tree_names)
        return Forest(np.where(parent < 0, -1, parent + shift), np.tile(self.branch_length, count), names, trees)

    @property
    def n_nodes(self) -> int:
        """Nodes of all trees, leaves included."""
        return int(self.parent.size)

    @property
    def n_leaves(self) -> int:
        """Leaves of all trees."""
        return int(self.leaves.size)

    @property
    def n_trees(self) -> int:
        """Trees, one per root."""
        return int(self.is_root.sum())

    @cached_property
    def is_root(self) -> np.ndarray:  # (nodes,) bool
        """Whether a node has no parent."""
        return np.asarray(self.parent == -1)

    @cached_property
    def is_leaf(self) -> np.ndarray:  # (nodes,) bool
        """Whether a node has no child."""
        return self.n_children == 0

    @cached_property
    def n_children(self) -> np.ndarray:  # (nodes,) int64
        """Children of every node."""
        return np.bincount(self.parent[~self.is_root], minlength=self.n_nodes)

    @cached_property
    def leaves(self) -> np.ndarray:  # (n_leaves,) int64
        """Indices of the leaves, increasing."""
        return np.flatnonzero(self.is_leaf)

    @cached_property
    def tree(self) -> np.ndarray:  # (nodes,) int64
        """Number of the tree that a node belongs to."""
        return np.cumsum(self.is_root) - self.is_root

    @cached_property
    def start(self) -> np.ndarray:  # (nodes,) int64
        """First node of the subtree that ends at a node."""
        first = list(range(self.n_nodes))
        for node, above in enumerate(self.parent.tolist()):
            if above >= 0 and first[node] < first[above]:
                first[above] = first[node]
        return np.array(first, dtype=np.int64)

    @cached_property
    def _size(self) -> np.ndarray:  # (nodes,) int64, nodes in the subtree; checks `start`, which then gives it
        size = [1] * self.n_nodes
        for node, above in enumerate(self.parent.tolist()):
            if above >= 0:
                size[above] += size[node]
        return np.array(size, dtype=np.int64)

    @cached_property
    def depth(self) -> np.ndarray:  # (nodes,) float64
        """Path length from the top of the root, whose own length counts."""
        depth = self.branch_length.tolist()
        parent = self.parent.tolist()
        for node in range(self.n_nodes - 1, -1, -1):
            if parent[node] >= 0:
                depth[node] += depth[parent[node]]
        return np.array(depth, dtype=np.float64)

    @cached_property
    def height(self) -> float:
        """Depth of the deepest leaf."""
        return float(self.depth[self.leaves].max())

    @cached_property
    def _leaf_index(self) -> dict[str, int]:
        return dict(zip(self.names[self.leaves].tolist(), self.leaves.tolist(), strict=True))

    def nodes_of(self, names: Iterable[str]) -> np.ndarray:  # int64, one per name
        """Nodes of leaves by name."""
        wanted = [str(name) for name in names]
        missing = [name for name in wanted if name not in self._leaf_index]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(wanted)} names are no leaf of the tree: {examples(missing)}. "
                f"Its leaves are named like {examples(self.names[self.leaves[:3]])}."
            )
        return np.array([self._leaf_index[name] for name in wanted], dtype=np.int64)

    @cached_property
    def _mrca_adjacent(self) -> np.ndarray:
        """Most recent common ancestor of each leaf and the next; `n_nodes` where they are in different trees.

        The highest node whose subtree begins at the next leaf is no first child, so the subtree of its elder sibling ends
        just before that leaf: its parent is the answer. Nothing is climbed.
        """
        highest = np.zeros(self.n_nodes, dtype=np.int64)
        np.maximum.at(highest, self.start, np.arange(self.n_nodes))
        above = self.parent[highest[self.leaves[1:]]]
        return np.where(above == -1, self.n_nodes, above)

    def mrca(self, nodes: np.ndarray) -> np.ndarray:  # (k,) leaves -> (k, k) int64
        """Most recent common ancestor of every pair of leaves, -1 across trees; a leaf's own on the diagonal.

        In post-order an ancestor has the larger index, so that of two leaves is the running maximum over the adjacent
        pairs between them: O(k^2) for all pairs.
        """
        nodes = np.asarray(nodes, dtype=np.int64)
        if nodes.size == 0:
            return np.empty((0, 0), dtype=np.int64)
        if not self.is_leaf[nodes].all():
            raise ValueError("mrca is defined here for leaves only; got an internal node.")
        unique, inverse = np.unique(nodes, return_inverse=True)
        k = unique.size
        rank = np.searchsorted(self.leaves, unique)
        adjacent = self._mrca_adjacent[: rank[-1]]
        steps = np.maximum.reduceat(adjacent, rank[:-1]) if k > 1 else adjacent[:0]
        answer = np.empty((k, k), dtype=np.int64)
        answer[np.arange(k), np.arange(k)] = unique
        for i in range(k - 1):
            answer[i, i + 1 :] = answer[i + 1 :, i] = np.maximum.accumulate(steps[i:])
        answer[answer == self.n_nodes] = -1
        if k == nodes.size and (inverse == np.arange(k)).all():
            return answer
        return answer[np.ix_(inverse, inverse)]

    def ancestors(self, nodes: np.ndarray, leaves: np.ndarray) -> np.ndarray:  # (k,), (s,) -> (k, s) int64
        """Most recent common ancestor of any nodes with leaves, -1 across trees; see :meth:`mrca` for all pairs of leaves.

        The first node below a node is a leaf. The answer for that leaf is the answer for the node too, unless it is further
        below.
        """
        nodes, leaves = np.asarray(nodes, dtype=np.int64), np.asarray(leaves, dtype=np.int64)
        first, rank = (np.searchsorted(self.leaves, x) for x in (self.start[nodes], leaves))
        both = np.concatenate([first, rank])
        low, high = (int(both.min()), int(both.max())) if both.size else (0, 0)
        adjacent, rank = self._mrca_adjacent[low:high], rank - low
        answer = np.empty((len(nodes), len(leaves)), dtype=np.int64)
        # of one leaf with all others, as a running maximum to both sides
        line = np.empty(high - low + 1, dtype=np.int64)
        for row, node, i in zip(answer, nodes, first - low, strict=True):
            line[i] = node
            np.maximum.accumulate(adjacent[i:], out=line[i + 1 :])
            np.maximum.accumulate(adjacent[:i][::-1], out=line[:i][::-1])
            np.maximum(line[rank], node, out=row)
        answer[answer == self.n_nodes] = -1
        return answer

    def prune(self, keep: Iterable[str]) -> Forest:
        """The forest on these leaves only.

        Branches and trees that lose all their leaves go. A node that pruning leaves with a single child is merged with it and
        the lengths are summed, so paths between the kept leaves stay as they were; nodes that were unary before stay, and
        so do roots.
        """
        kept = np.zeros(self.n_nodes, dtype=bool)
        kept[self.nodes_of(keep)] = True
        if not kept.any():
            raise DataError(
                f"Pruning would leave none of the {self.n_leaves} leaves of the tree. "
                "Check that leaf names and cell names are the same."
            )
        alive, parent = self._with_ancestors(kept), self.parent.tolist()
        left = np.bincount(self.parent[alive & ~self.is_root], minlength=self.n_nodes)
        lost = (left == 1) & (self.n_children > 1) & ~self.is_root
        merged, length = lost.tolist(), self.branch_length.tolist()
        for node in range(self.n_nodes - 1, -1, -1):  # from the root down: a merged parent has already found its own
            above = parent[node]
            if above >= 0 and merged[above]:
                parent[node] = parent[above]
                length[node] += length[above]
        return self._of(alive & ~lost, np.array(parent), np.array(length))[0]

    def above(self, nodes: np.ndarray) -> tuple[Forest, np.ndarray]:  # (k,) -> (k,)
        """The forest of some nodes and all their ancestors, as they are, and where in it the nodes are."""
        forest, index = self._of(self.is_above(nodes), self.parent, self.branch_length)
        return forest, index[nodes]

    def is_above(self, nodes: np.ndarray) -> np.ndarray:  # (k,) -> (nodes,) bool
        """Which nodes are some of these or their ancestors."""
        kept = np.zeros(self.n_nodes, dtype=bool)
        kept[nodes] = True
        return self._with_ancestors(kept)

    def _with_ancestors(self, kept: np.ndarray) -> np.ndarray:  # (nodes,) bool -> (nodes,) bool
        alive = kept.tolist()
        for node, above in enumerate(self.parent.tolist()):
            if alive[node] and above >= 0:
                alive[above] = True
        return np.array(alive)

    def _of(self, stay: np.ndarray, parent: np.ndarray, length: np.ndarray) -> tuple[Forest, np.ndarray]:
        """The forest of the nodes that stay, whose parents do, and the new index of each node."""
        index = np.append(np.cumsum(stay) - 1, -1)  # the last entry answers for parent -1
        names = tuple(self.tree_names[tree] for tree in np.unique(self.tree[stay]))
        return Forest(index[parent[stay]], length[stay], self.names[stay], names), index

    @classmethod
    def join(cls, forests: Sequence[Forest], names: Sequence[str] | None = None) -> Forest:
        """One forest of all the trees, in order.

        `names` has one entry per forest and names all of its trees; without it trees are numbered.
        """
        if not forests:
            raise DataError("No tree was given. Give at least one.")
        offsets = np.cumsum([0, *(forest.n_nodes for forest in forests)])
        parents = [
            np.where(forest.is_root, -1, forest.parent + offset)
            for forest, offset in zip(forests, offsets, strict=False)
        ]
        if names is None:
            tree_names = tuple(str(i) for i in range(sum(forest.n_trees for forest in forests)))
        else:
            tree_names = tuple(name for name, forest in zip(names, forests, strict=True) for _ in range(forest.n_trees))
        return cls(
            np.concatenate(parents),
            np.concatenate([forest.branch_length for forest in forests]),
            np.concatenate([forest.names for forest in forests]),
            tree_names,
        )
