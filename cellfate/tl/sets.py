"""Sets of cells that belong together, by descent or by place: left out at once, or swapped among themselves."""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from scipy.cluster.vq import kmeans2

from cellfate.trees.forest import Forest


def clades(forest: Forest, leaf: np.ndarray, count: int) -> np.ndarray:
    """Cells in about `count` clades (n,): the largest is divided at its top until there are so many. Sisters that all are leaves, as the
    cells of a clone, stay together.
    """
    below = np.zeros(forest.n_nodes, dtype=np.int64)
    below[leaf] = 1
    for node in range(forest.n_nodes):  # children come before their parents
        if forest.parent[node] >= 0:
            below[forest.parent[node]] += below[node]
    children: dict[int, list[int]] = {}
    for child in np.flatnonzero((forest.parent >= 0) & (below > 0)):
        children.setdefault(int(forest.parent[child]), []).append(int(child))
    tops: list[int] = []  # in the order in which they were met, which settles ties
    divisible: list[tuple[int, int, int]] = []

    def meet(node: int) -> None:
        tops.append(node)
        if any(child in children for child in children.get(node, [])):
            heappush(divisible, (-int(below[node]), len(tops), node))

    for root in np.flatnonzero(forest.is_root & (below > 0)):
        meet(int(root))
    parts, divided = len(tops), set[int]()
    while parts < count and divisible:
        largest = heappop(divisible)[-1]
        divided.add(largest)
        parts += len(children[largest]) - 1
        for part in children[largest]:
            meet(part)
    label = np.full(forest.n_nodes, -1)
    for k, top in enumerate(top for top in tops if top not in divided):
        label[forest.start[top] : top + 1] = k  # a subtree is a run of nodes
    return label[leaf]


def merged(label: np.ndarray, leaf: np.ndarray, count: int) -> np.ndarray:
    """Clades (n,), where there are more than `count`, joined with those beside them in the forest to about `count` sets of like size."""
    _, part, size = np.unique(label, return_inverse=True, return_counts=True)
    if len(size) <= count:
        return label
    first = np.full(len(size), leaf.max())
    np.minimum.at(first, part, leaf)
    order = np.argsort(first)  # a clade is a run of leaves
    middle = size[order].cumsum() - size[order] / 2
    joined = np.empty_like(size)
    joined[order] = (middle * count / size.sum()).astype(np.int64)
    return joined[part]


def regions(coordinates: np.ndarray, specimen: np.ndarray, count: int) -> np.ndarray:
    """Cells in about `count` regions (n,), each within a specimen, by k-means with a seed of its own."""
    label, used = np.zeros(len(coordinates), dtype=np.int64), 0
    for code in np.unique(specimen):
        cells = np.flatnonzero(specimen == code)
        share = max(1, round(count * len(cells) / len(coordinates)))
        xyz = coordinates[cells]
        distinct = len(np.unique(xyz, axis=0))
        if min(share, distinct) > 1:
            label[cells] = kmeans2(xyz, min(share, distinct), minit="++", seed=np.random.default_rng(0))[1]
        label[cells] += used
        used = int(label[cells].max()) + 1
    return label


def neighborhoods(coordinates: np.ndarray, specimen: np.ndarray, size: int) -> np.ndarray:
    """Cells in neighborhoods of at most `size` (n,), each within a specimen, halved along their longest side until they are so small."""
    label, used = np.empty(len(coordinates), dtype=np.int64), 0
    parts = [np.flatnonzero(specimen == code) for code in np.unique(specimen)]
    while parts:
        cells = parts.pop()
        if len(cells) <= size:
            label[cells], used = used, used + 1
            continue
        sides = np.ptp(coordinates[cells], axis=0)
        order = np.argsort(coordinates[cells, int(sides.argmax())], kind="stable")
        half = len(cells) // 2
        parts += [cells[order[half:]], cells[order[:half]]]
    return label
