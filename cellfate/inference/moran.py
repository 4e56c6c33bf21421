"""Moran's I of a value over cells: are neighbors, or relatives, alike?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.spatial import KDTree

from cellfate.trees.forest import Forest

NEIGHBORS = 6


class Vicinity(ABC):
    """Who is beside whom; every cell weighs its own neighbors equally."""

    alone: np.ndarray  # (n,) bool: cells without a neighbor, which take no part

    @abstractmethod
    def around(self, x: np.ndarray) -> np.ndarray:
        """Mean (n, k) of x (n, k) over the neighbors of each cell."""

    def moran(self, x: np.ndarray) -> np.ndarray:
        """Moran's I (k,) of columns x (n, k)."""
        x = x - x[~self.alone].mean(0)
        own, around = x[~self.alone], self.around(x)[~self.alone]
        total = (own**2).sum(0)
        return np.divide((own * around).sum(0), total, out=np.zeros_like(total), where=total > 0)


@dataclass(frozen=True)
class Near(Vicinity):
    """The nearest cells in space, within a specimen."""

    weights: csr_array
    alone: np.ndarray

    @classmethod
    def of(cls, coordinates: np.ndarray, specimen: np.ndarray) -> Near:
        n, rows, columns = len(coordinates), [], []
        alone = np.zeros(n, dtype=bool)
        for code in np.unique(specimen):
            cells = np.flatnonzero(specimen == code)
            count = min(NEIGHBORS, len(cells) - 1)
            if count < 1:
                alone[cells] = True
                continue
            found = KDTree(coordinates[cells]).query(coordinates[cells], k=count + 1)[1]
            own = np.arange(len(cells))[:, None]
            # of cells at one point any may come first: the cell itself goes, or, where it is not there, the furthest
            place = np.where((found == own).any(1), (found == own).argmax(1), count)
            others = found[np.arange(count + 1) != place[:, None]].reshape(len(cells), count)
            rows.append(np.repeat(cells, count))
            columns.append(cells[others].ravel())
        pairs = (np.concatenate(rows), np.concatenate(columns)) if rows else (np.zeros(0, int), np.zeros(0, int))
        weight = 1 / np.bincount(pairs[0], minlength=n).clip(min=1)[pairs[0]]
        return cls(csr_array((weight, pairs), shape=(n, n)), alone)

    def around(self, x: np.ndarray) -> np.ndarray:
        return self.weights @ x


@dataclass(frozen=True)
class Related(Vicinity):
    """The closest relatives: all other cells below the lowest ancestor that has any."""

    order: np.ndarray  # cells in the order of the leaves
    first: np.ndarray  # (n,), where in that order the relatives of each cell begin
    last: np.ndarray  # (n,), and where they have ended
    alone: np.ndarray

    @classmethod
    def of(cls, forest: Forest, leaf: np.ndarray) -> Related:
        below = np.zeros(forest.n_nodes, dtype=np.int64)
        below[leaf] = 1
        for node in range(forest.n_nodes):  # children come before their parents
            above = forest.parent[node]
            if above >= 0:
                below[above] += below[node]
        close = np.arange(forest.n_nodes)
        for node in range(forest.n_nodes - 1, -1, -1):  # and parents before their children
            above = forest.parent[node]
            if below[node] < 2 and above >= 0:
                close[node] = close[above]
        order = np.argsort(leaf, kind="stable")
        ancestor = close[leaf]
        # the leaves below a node are a run of nodes, from its first one to itself
        first = np.searchsorted(leaf[order], forest.start[ancestor])
        last = np.searchsorted(leaf[order], ancestor, side="right")
        return cls(order, first, last, last - first < 2)

    def around(self, x: np.ndarray) -> np.ndarray:
        total = np.concatenate([np.zeros((1, x.shape[1])), np.cumsum(x[self.order], axis=0)])
        others = np.maximum(self.last - self.first - 1, 1)
        return (total[self.last] - total[self.first] - x) / others[:, None]


def permuted(
    vicinity: Vicinity, x: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[float, np.ndarray, float]:
    """Moran's I of x (n,), that of random orders of the cells (count,), and how often these are as large (one-sided p)."""
    found = float(vicinity.moran(x[:, None])[0])
    cells = np.flatnonzero(~vicinity.alone)
    others = np.repeat(x[:, None], count, axis=1)
    others[cells] = np.column_stack([x[rng.permutation(cells)] for _ in range(count)])
    drawn = vicinity.moran(others)
    return found, drawn, float((1 + (drawn >= found).sum()) / (count + 1))
