"""Trees that grow and die, and where their cells come to lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellfate.trees.forest import Forest

LAYOUTS = DRIFT, TERRITORIES = "drift", "territories"


@dataclass(frozen=True, eq=False)
class Grown:
    """The trees of one specimen, in post-order with no names yet; its cells are the leaves, shuffled."""

    parent: np.ndarray  # (nodes,)
    length: np.ndarray  # (nodes,)
    leaf: np.ndarray  # (cells,) the node of each cell
    positions: np.ndarray  # (cells, d)


def grow(
    n: int,
    death: float,
    founders: int,
    inheritance: float,
    dimensions: int,
    rng: np.random.Generator,
    layout: str = DRIFT,
) -> Grown:
    """Grow the trees of a specimen, and place its cells."""
    parent, age = birth_death(n, death, rng)
    length = np.where(parent >= 0, age[parent] - age, 1.0 - age)  # a tree of one cell: its own life
    if layout == DRIFT:
        motion = walk(parent, None, length, rng.standard_normal((len(parent), dimensions)))
    else:
        motion = territories(parent, age == 0, dimensions)
    # Rows in an order of their own, so that nothing downstream can rely on cells standing in the order of the leaves.
    leaf = rng.permutation(np.flatnonzero(age == 0))
    noise = rng.standard_normal((n, dimensions))
    positions = np.sqrt(inheritance) * _unit(motion[leaf]) + np.sqrt(1 - inheritance) * _unit(noise)
    if min(founders, n) > 1:
        parent, length, leaf = _cut(parent, age, leaf, min(founders, n))
    return Grown(parent, length, leaf, positions)


def territories(parent: np.ndarray, cells: np.ndarray, dimensions: int) -> np.ndarray:
    """Centres (nodes, d) of the part of a unit square or cube that each clade has: children divide their parent's part by their numbers
    of `cells` (nodes,), across its longest side.
    """
    size = cells.astype(np.float64)
    for node, above in enumerate(parent):  # children come before their parents
        if above >= 0:
            size[above] += size[node]
    low, high = np.zeros((len(parent), dimensions)), np.ones((len(parent), dimensions))
    taken = np.zeros(len(parent))
    for node in range(len(parent) - 1, -1, -1):
        above = parent[node]
        if above >= 0:
            low[node], high[node] = low[above], high[above]
            sides = high[above] - low[above]
            axis = int(sides.argmax())
            first, taken[above] = taken[above], taken[above] + size[node] / size[above]
            low[node, axis] = low[above, axis] + first * sides[axis]
            high[node, axis] = low[above, axis] + taken[above] * sides[axis]
    return (low + high) / 2


def birth_death(n: int, death: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Parents, in post-order, and ages (nodes,) of the living part of a birth-death tree with `n` leaves and root age 1.

    Between one leaf and the next lies one branching, and their ages are independent draws of
    F(t) = (e^rt - 1) / (e^rt - death), with birth rate 1 and r = 1 - death, up to the age at which n leaves are expected. The
    tree is the one in which a branching is above all younger ones that no older one separates from it.
    """
    if n == 1:
        return np.array([-1]), np.zeros(1)
    r = 1.0 - death
    u = (n - 1) / n * rng.random(n - 1)  # 1/n of all branchings is older than the age at which n leaves are expected
    split = np.log((1 - death * u) / (1 - u)) / r
    split = np.maximum(split / split.max(), np.finfo(float).tiny)
    older = split.tolist()
    left, right = [-1] * (n - 1), [n - 1] * (n - 1)  # the nearest older branching on either side
    stack: list[int] = []
    for j, height in enumerate(older):
        while stack and older[stack[-1]] < height:
            right[stack.pop()] = j
        left[j] = stack[-1] if stack else -1
        stack.append(j)
    # Leaves are 0..n-1 and branching j, between leaves j and j+1, is n+j; it covers leaves left+1..right.
    first = np.concatenate([np.arange(n), np.array(left) + 1])
    last = np.concatenate([np.arange(n), np.array(right)])
    age = np.concatenate([np.zeros(n), split])
    height = np.concatenate([[np.inf], split, [np.inf]])  # of the branching before each leaf, and of the last
    before, after = height[first], height[last + 1]
    above = np.where(before < after, first - 1, last)  # the younger of the two branchings that end the node's range
    above = np.where(np.isinf(np.minimum(before, after)), -1, above + n)
    order = np.lexsort((-first, last))  # post-order: by the last leaf covered, smaller subtrees first
    index = np.empty(2 * n, dtype=np.int64)
    index[order] = np.arange(2 * n - 1)
    index[-1] = -1
    return index[above[order]], age[order]


def _cut(parent: np.ndarray, age: np.ndarray, leaf: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep what comes after the (k-1)-th branching, with the time since it scaled to 1: k trees."""
    oldest = np.argsort(-age, kind="stable")[: k - 1]
    since = age[oldest[-1]]
    stay = np.ones(len(parent), dtype=bool)
    stay[oldest] = False
    index = np.append(np.cumsum(stay) - 1, -1)
    founder = (parent < 0) | ~stay[parent]
    length = np.where(founder, since, age[parent]) - age
    return np.where(founder, -1, index[parent])[stay], length[stay] / since, index[leaf]


def plant(grown: Sequence[Grown], names: np.ndarray, specimens: Sequence[str]) -> tuple[Forest, np.ndarray]:
    """One forest of all specimens, and the leaf of every cell in it."""
    offsets = np.cumsum([0, *(len(one.parent) for one in grown)])
    parent = [np.where(one.parent < 0, -1, one.parent + offset) for one, offset in zip(grown, offsets, strict=False)]
    leaf = np.concatenate([one.leaf + offset for one, offset in zip(grown, offsets, strict=False)])
    labels = np.full(offsets[-1], "", dtype=object)
    labels[leaf] = names
    trees = tuple(name for name, one in zip(specimens, grown, strict=True) for _ in range(int((one.parent < 0).sum())))
    return Forest(np.concatenate(parent), np.concatenate([one.length for one in grown]), labels, trees), leaf


def _unit(columns: np.ndarray) -> np.ndarray:
    centered = columns - columns.mean(axis=0)
    spread = centered.std(axis=0, ddof=1) if len(columns) > 1 else np.ones(columns.shape[1])
    return centered / np.where(spread > 0, spread, 1.0)  # an axis that few cells do not divide


def walk(parent: np.ndarray, gain: np.ndarray | None, noise: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Values (nodes, k) of Gaussian processes along the trees, from standard normal `z` (nodes, k).

    By pointer jumping: a node adds the sum of the stretch above it and then points past that stretch, so that a path of any
    depth takes log2(depth) rounds.
    """
    value = np.sqrt(noise)[:, None] * z
    factor = np.ones(len(parent)) if gain is None else gain.copy()
    jump = parent.copy()
    on = np.flatnonzero(jump >= 0)
    while on.size:
        to = jump[on]
        value[on] += factor[on, None] * value[to]
        factor[on] *= factor[to]
        jump[on] = jump[to]
        on = on[jump[on] >= 0]
    return value
