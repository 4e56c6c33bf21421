"""Tree kernels against their formulas, with every path climbed one branch at a time."""

import numpy as np
import pytest
import torch

from cellfate.errors import DataError
from cellfate.kernels.lineage import (
    LINEAGE_KERNELS,
    Brownian,
    Clone,
    EarlyBurst,
    LineageKernel,
    OrnsteinUhlenbeck,
    Pagel,
)
from cellfate.trees.convert import to_forest
from cellfate.trees.forest import Forest
from tests.problem import double, entries, random_newick

AWKWARD = {
    "star": "(a:1,b:2,c:0.5,d:1)root;",
    "caterpillar": "((((a:1,b:1):1,c:2):1,d:3):1,e:4);",
    "one cell": "a:0.7;",
    "one cell below a root": "(a:2)root;",
    "zero-length branches": "((a:0,b:0):0,(c:1,d:0):0);",
    "zero-length above a clade": "((a:1,b:2):0,(c:1,d:0):3);",
    "forest": "(a:1,b:1);c:3;((d:1,e:1):1,f:2):0.5;",
    "unary nodes": "(((a:1):2)x:0,((b:1,c:2):1):3);",
    "polytomies": "((a:1,b:1,c:1,d:1,e:1):1,(f:1,g:1,h:1):1,i:2);",
    "length above the root": "((a:1,b:2):1,c:0.5):2;",
}
FORESTS = {name: to_forest(text) for name, text in AWKWARD.items()}
for seed in range(3):
    names = [f"c{i}" for i in range(17)]
    FORESTS[f"random {seed}"] = to_forest(random_newick(names, np.random.default_rng(seed)))


@pytest.fixture(params=FORESTS, ids=lambda name: name.replace(" ", "-"))
def forest(request):
    return FORESTS[request.param]


def shuffled_leaves(forest: Forest, seed: int = 0) -> np.ndarray:
    """Cells do not come in the order of the tree, and not every leaf is observed."""
    leaf = np.random.default_rng(seed).permutation(forest.leaves)
    return leaf[: max(1, len(leaf) - len(leaf) // 4)]


def climb(forest: Forest, node: int) -> list[int]:
    nodes = [int(node)]
    while forest.parent[nodes[-1]] >= 0:
        nodes.append(int(forest.parent[nodes[-1]]))
    return nodes


def pairs(forest: Forest, leaf: np.ndarray, value) -> np.ndarray:
    """`value(path of i, path of j)` for every two cells, 0 across trees; a path begins at the leaf and ends at the root."""
    paths = [climb(forest, node) for node in leaf]
    return np.array([[value(p, q) if p[-1] == q[-1] else 0.0 for q in paths] for p in paths])


def shared(forest: Forest, p: list[int], q: list[int]) -> float:
    return float(sum(forest.branch_length[node] for node in p if node in q))


def apart(forest: Forest, p: list[int], q: list[int]) -> float:
    return float(sum(forest.branch_length[node] for node in set(p) ^ set(q)))


def same(covariance: torch.Tensor, formula: np.ndarray, tolerance: float = 1e-13) -> None:
    np.testing.assert_allclose(covariance.numpy(), formula, rtol=tolerance, atol=tolerance)


def test_brownian_is_the_shared_path(forest):
    leaf = shuffled_leaves(forest)
    same(entries(Brownian(forest, leaf)), pairs(forest, leaf, lambda p, q: shared(forest, p, q)))


@pytest.mark.parametrize("alpha", [1e-3, 0.4, 3.0, 60.0])
def test_ou_forgets_with_the_distance(forest, alpha):
    leaf = shuffled_leaves(forest)
    formula = pairs(forest, leaf, lambda p, q: np.exp(-alpha * apart(forest, p, q)))
    same(entries(OrnsteinUhlenbeck(forest, leaf), alpha=alpha), formula)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_pagel_scales_what_is_shared_and_keeps_what_is_a_cells_own(forest, lam):
    leaf = shuffled_leaves(forest)
    formula = pairs(forest, leaf, lambda p, q: (1.0 if p == q else lam) * shared(forest, p, q))
    same(entries(Pagel(forest, leaf), **{"lambda": lam}), formula)


@pytest.mark.parametrize("rate", [1e-3, 0.5, 30.0])
def test_early_burst_is_the_drift_until_the_ancestor(forest, rate):
    """Drift at path t from the root is exp(-rate t): its integral over the shared path."""
    leaf = shuffled_leaves(forest)
    formula = pairs(forest, leaf, lambda p, q: -np.expm1(-rate * shared(forest, p, q)) / rate)
    same(entries(EarlyBurst(forest, leaf), rate=rate), formula)


def test_clone_is_membership(forest):
    """A clone is a tree, or where there is one tree a child of its root."""
    leaf = shuffled_leaves(forest)
    if forest.n_trees > 1:
        formula = pairs(forest, leaf, lambda _p, _q: 1.0)
    else:
        founder = [climb(forest, node)[-2] if forest.n_nodes > 1 else node for node in leaf]
        formula = np.equal.outer(founder, founder).astype(float)
    kernel = Clone(forest, leaf)
    same(entries(kernel), formula)
    labels = kernel.independent()
    np.testing.assert_array_equal(np.equal.outer(labels, labels), formula == 1)


def test_a_batch_of_hyperparameters_is_one_by_one(forest):
    leaf = shuffled_leaves(forest)
    for kernel, name, values in (
        (OrnsteinUhlenbeck(forest, leaf), "alpha", [0.1, 0.7, 5.0]),
        (Pagel(forest, leaf), "lambda", [0.0, 0.4, 1.0]),
        (EarlyBurst(forest, leaf), "rate", [0.1, 0.7, 5.0]),
    ):
        together = entries(kernel, **{name: values})
        assert together.shape == (3, len(leaf), len(leaf))
        for one, value in zip(together, values, strict=True):
            torch.testing.assert_close(one, entries(kernel, **{name: value}), rtol=1e-15, atol=1e-15)


def test_entries_are_differentiable_in_their_hyperparameters(forest):
    """Zero-length branches and roots included, where a root of infinite age would give the right value and a NaN slope."""
    leaf = shuffled_leaves(forest)
    cells = torch.arange(len(leaf))[None]
    for kernel, name in (
        (OrnsteinUhlenbeck(forest, leaf), "alpha"),
        (Pagel(forest, leaf), "lambda"),
        (EarlyBurst(forest, leaf), "rate"),
    ):
        geometry = kernel.geometry(cells)

        def covariance(x, kernel=kernel, name=name, geometry=geometry):
            return kernel.structure({name: x}, x).dense(geometry)

        at = double([0.3, 0.8]).requires_grad_(True)
        assert torch.autograd.gradcheck(covariance, at)


def test_blocks_are_cut_out_and_padding_is_zero():
    forest = FORESTS["forest"]
    leaf = forest.nodes_of(["e", "a", "c", "f", "b", "d"])
    n = len(leaf)
    blocks = torch.tensor([[1, 4, n], [0, 3, 5], [2, n, n]])
    for kernel, values in (
        (Brownian(forest, leaf), {}),
        (OrnsteinUhlenbeck(forest, leaf), {"alpha": 0.5}),
        (Pagel(forest, leaf), {"lambda": 0.5}),
        (EarlyBurst(forest, leaf), {"rate": 0.5}),
        (Clone(forest, leaf), {}),
    ):
        whole = torch.nn.functional.pad(entries(kernel, **values), (0, 1, 0, 1))
        structure = kernel.structure({name: double(x) for name, x in values.items()}, double(0.0))
        cut = structure.dense(kernel.geometry(blocks))
        torch.testing.assert_close(cut, whole[blocks[:, :, None], blocks[:, None, :]], rtol=0, atol=0)


def test_cells_of_different_trees_are_independent():
    forest = FORESTS["forest"]
    labels = Brownian(forest, forest.nodes_of(["e", "a", "c", "f", "b", "d"])).independent()
    assert [list(np.flatnonzero(labels == label)) for label in sorted(set(labels))] == [[1, 4], [2], [0, 3, 5]]


# --- depth ---


def caterpillar(depth: int) -> tuple[Forest, np.ndarray]:
    """Internal nodes in a chain from the root, a leaf at each and one at its end, all branches of length 1/depth."""
    parent = np.empty(2 * depth + 1, dtype=np.int64)
    # post-order: the deepest leaf, then at each level the other leaf and the internal node above both
    parent[0] = 2
    parent[1::2] = np.arange(2, 2 * depth + 1, 2)
    parent[2::2] = np.append(np.arange(4, 2 * depth + 1, 2), -1)
    length = np.full(2 * depth + 1, 1 / depth)
    length[-1] = 0
    names = np.array([f"c{i}" for i in range(2 * depth + 1)], dtype=object)
    level = depth - np.arange(depth)  # of the leaves 1, 3, 5, ..., from the deepest
    return Forest(parent, length, names, ("0",)), level


def test_a_chain_of_50_000_ancestors():
    depth = 50_000
    forest, level = caterpillar(depth)
    chosen = np.array([0, 1, 7, 400, 20_000, 49_990, 49_999])
    leaf, level = forest.leaves[1:][chosen], level[chosen]
    deep = (
        np.minimum.outer(level, level) - 1 + np.eye(len(level))
    )  # branches shared; a leaf shares its last with itself
    distance = np.diag(deep)[:, None] + np.diag(deep) - 2 * deep
    same(entries(Brownian(forest, leaf)), deep / depth, 1e-11)
    same(entries(Pagel(forest, leaf), **{"lambda": 0.5}), (deep + np.diag(np.diag(deep))) / depth / 2, 1e-11)
    for alpha in (0.5, 40.0):
        formula = np.exp(-alpha * distance / depth)
        same(entries(OrnsteinUhlenbeck(forest, leaf), alpha=alpha), formula, 1e-11)
    same(entries(Clone(forest, leaf)), np.where(np.equal.outer(level, level), 1.0, np.minimum.outer(level, level) > 1))


def test_a_memory_that_is_gone_stays_finite():
    """exp(-alpha b) underflows on a long branch; neither the entries nor their slopes may become NaN."""
    forest = to_forest("((a:1000,b:1000):1000,c:1e5);")
    kernel = OrnsteinUhlenbeck(forest, forest.leaves)
    alpha = double(50.0).requires_grad_(True)
    covariance = kernel.structure({"alpha": alpha}, alpha).dense(kernel.geometry(torch.arange(3)[None]))[0]
    same(covariance.detach(), np.eye(3), 1e-15)
    (slope,) = torch.autograd.grad(covariance.sum(), alpha)
    assert slope.isfinite()


def test_short_branches_keep_their_digits():
    """1 - exp(-2 alpha b) from a difference would lose half of them at b = 1e-9: the contrast of sisters is 2 alpha b."""
    forest = to_forest("(a:1e-9,b:1e-9);")
    k = OrnsteinUhlenbeck(forest, forest.leaves).structure({"alpha": double(1.5)}, double(0.0))
    np.testing.assert_allclose(k.noise[:2], 2 * 1.5e-9 * (1 - 1.5e-9), rtol=1e-12)


# --- what is estimated ---


def test_what_each_kernel_estimates():
    forest = to_forest("((a:1,b:1):1,c:4);")
    leaf = forest.nodes_of(["a", "b", "c"])
    found = {name: kernel(forest, leaf).hyperparameters for name, kernel in LINEAGE_KERNELS.items()}
    assert [h.name for h in found["ou"]] == ["alpha"]
    assert [h.name for h in found["pagel"]] == ["lambda"]
    assert [(h.name, h.lower, h.upper) for h in found["early_burst"]] == [("rate", 0.1 / 4, 20.0 / 4)]
    assert found["brownian"] == found["clone"] == ()
    (alpha,) = found["ou"]
    # half-lives between a fourteenth of the height and seven heights, the height being that of the deepest cell
    np.testing.assert_allclose([np.log(2) / alpha.upper, np.log(2) / alpha.lower], [4 / 14.4, 4 * 6.93], rtol=2e-3)
    assert (found["pagel"][0].lower, found["pagel"][0].upper, found["pagel"][0].scale) == (0.0, 1.0, "logit")
    assert OrnsteinUhlenbeck(forest, leaf, alpha=0.3).hyperparameters[0].fixed == 0.3
    assert Pagel(forest, leaf, lam=0.9).hyperparameters[0].fixed == 0.9


def test_a_tree_without_lengths_above_the_cells_says_nothing():
    forest = to_forest("((a:0,b:0):0,c:0);")
    with pytest.raises(DataError, match="all branches above the cells have length 0"):
        _ = OrnsteinUhlenbeck(forest, forest.leaves).hyperparameters


def test_every_lineage_kernel_is_named():
    assert set(LINEAGE_KERNELS.values()) == set(LineageKernel.__subclasses__())


def test_clones_stay_what_they_were_where_cells_are_left_out():
    """Of ((a, b), (c, d)) without c and d one branch is left below the root: a and b are one clone still, and two copies are two."""
    forest = to_forest("((a:1,b:1)x:1,(c:1,d:1)y:1);")
    kernel = Clone(forest, forest.nodes_of(np.array(["a", "b", "c", "d"])))
    some = kernel.at(np.array([0, 1, 2]))
    assert len(np.unique(some.independent())) == 2
    np.testing.assert_array_equal(
        kernel.at(np.array([0, 1])).independent()[0], kernel.at(np.array([0, 1])).independent()[1]
    )
    copied = kernel.copied(2).at(np.array([0, 1, 2, 4, 5, 6]))
    assert len(np.unique(copied.independent())) == 4
