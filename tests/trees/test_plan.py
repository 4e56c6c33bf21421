import time

import numpy as np
import pytest
import torch

from cellfate.trees.plan import TreePlan


def caterpillar(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A spine that sheds one leaf at a time: parent, leaves."""
    parent = np.empty(2 * n - 1, dtype=np.int64)
    parent[0] = 2
    parent[1::2] = np.arange(2, 2 * n, 2)[: n - 1]  # the leaf that is shed
    parent[2::2] = np.append(np.arange(4, 2 * n, 2), -1)
    return parent, np.append(0, np.arange(1, 2 * n - 1, 2))


def star(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.append(np.full(n, n), -1), np.arange(n)


def random_forest(
    rng: np.random.Generator, n: int, *, trees: int = 1, unary: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Trees of n leaves in all, with polytomies and unary nodes, in post-order: parent, leaves."""
    parent: list[int] = []
    leaves: list[int] = []

    def grow(size: int) -> int:
        if size == 1:
            tops = []
        else:
            parts = min(size, int(rng.choice([2, 2, 2, 3, 5])))
            cuts = np.sort(rng.choice(np.arange(1, size), parts - 1, replace=False))
            tops = [grow(int(part)) for part in np.diff([0, *cuts, size])]
        node = len(parent)
        parent.append(-1)
        if not tops:
            leaves.append(node)
        for top in tops:
            parent[top] = node
        while rng.random() < unary:
            parent[-1] = len(parent)
            parent.append(-1)
        return len(parent) - 1

    sizes = np.diff([0, *np.sort(rng.choice(np.arange(1, n), trees - 1, replace=False)), n]) if trees > 1 else [n]
    for size in sizes:
        grow(int(size))
    return np.array(parent), np.array(leaves)


@pytest.mark.parametrize("seed", range(5))
def test_every_merge_finishes_one_row(seed):
    rng = np.random.default_rng(seed)
    parent, leaves = random_forest(rng, 40, trees=3)
    cells = rng.permutation(leaves)[:30]
    at = TreePlan(parent, cells).schedule
    finished = np.where(at.rows[:, 1] >= 0, at.rows[:, 1], at.rows[:, 0])
    assert sorted(finished) == list(range(30))
    assert at.end[-1] == 30
    # a row is met for the first time once
    assert (at.fresh & 1).sum() + ((at.fresh & 2) > 0).sum() == 30


def rounds(plan: TreePlan) -> int:
    """How many merges come one after the other at most."""
    level: dict[int, int] = {}
    at, deepest = plan.schedule, 0
    for t, (i, j) in enumerate(at.pair.tolist()):
        height = []
        for segment in (i, j):
            while 0 <= segment < plan.n_nodes:
                segment = at.source[segment]
            height.append(level.get(segment, 0))
        level[plan.n_nodes + t] = deepest = max(height) + (j >= 0)
    return deepest


def test_a_star_is_shallow_and_a_caterpillar_is_not():
    assert rounds(TreePlan(*star(1000))) <= 11
    assert rounds(TreePlan(*star(1024))) == 10
    assert rounds(TreePlan(*caterpillar(50))) == 49


@pytest.mark.parametrize(("make", "n"), [(caterpillar, 50_000), (star, 100_000)], ids=["caterpillar", "star"])
def test_extreme_trees_are_planned_at_once(make, n):
    TreePlan(*make(10))  # compiles
    began = time.perf_counter()
    plan = TreePlan(*make(n))
    assert time.perf_counter() - began < 5  # milliseconds; a loop over nodes in Python would take longer
    assert plan.n_cells == n
    assert plan.height == (n - 1 if make is caterpillar else 1)


@pytest.mark.parametrize(
    ("parent", "leaf", "message"),
    [
        ([2, 2, -1], [], "holds no cell"),
        ([2, 2, -1], [0, 3], "nodes of the tree"),
        ([-1, 0, 0], [1], "post-order"),
        ([2, 2, -1], [0, 2], "have children"),
        ([2, 2, -1], [0, 0], "several cells"),
    ],
)
def test_what_is_no_plan_is_refused(parent, leaf, message):
    with pytest.raises(ValueError, match=message):
        TreePlan(np.array(parent), np.array(leaf, dtype=np.int64))


def test_the_plan_takes_tensors():
    parent, leaf = caterpillar(5)
    plan = TreePlan(torch.as_tensor(parent), torch.as_tensor(leaf))
    np.testing.assert_array_equal(plan.parent.numpy(), parent)
    np.testing.assert_array_equal(plan.leaf.numpy(), leaf)
