"""Every flat array against a climb along parents, on awkward trees on purpose."""

import numpy as np
import pytest

from cellfate.errors import DataError
from cellfate.trees.convert import to_forest
from cellfate.trees.forest import Forest

AWKWARD = {
    "star": "(a:1,b:2,c:0.5,d:1)root;",
    "caterpillar": "((((a:1,b:1):1,c:2):1,d:3):1,e:4);",
    "one cell": "a;",
    "one cell with a length": "a:0.5;",
    "one cell below a root": "(a:2)root;",
    "zero-length branches": "((a:0,b:0):0,(c:1,d:0):0);",
    "forest": "(a:1,b:1);c:3;((d:1,e:1):1,f:2):0.5;",
    "unary nodes": "(((a:1):2)x:0,((b:1,c:2):1):3);",
    "polytomies": "((a:1,b:1,c:1,d:1,e:1):1,(f:1,g:1,h:1):1,i:2);",
    "no lengths": "((a,b),(c,(d,e)));",
}


def random_forest(n: int, seed: int) -> Forest:
    """Leaves c0.. under random merges of one to four nodes: binary, polytomies, unary nodes, several roots."""
    rng = np.random.default_rng(seed)
    parent: dict[str, str] = {}
    open_nodes = [f"c{i}" for i in range(n)]
    for k in range(3 * n):
        if len(open_nodes) <= 2:
            break
        rng.shuffle(open_nodes)
        size = rng.integers(1, 5)
        taken, open_nodes = open_nodes[:size], [*open_nodes[size:], f"i{k}"]
        parent |= dict.fromkeys(taken, f"i{k}")
    rows = [(above, below, rng.choice([0.0, rng.exponential()])) for below, above in parent.items()]
    rows += [("", node, rng.choice([0.0, 1.5])) for node in open_nodes]
    rng.shuffle(rows)
    return to_forest(dict(zip(("parent", "child", "length"), map(list, zip(*rows, strict=True)), strict=True)))


FORESTS = {name: to_forest(text) for name, text in AWKWARD.items()}
FORESTS |= {f"random {seed}": random_forest(17, seed) for seed in range(6)}


@pytest.fixture(params=FORESTS, ids=lambda name: name.replace(" ", "-"))
def forest(request):
    return FORESTS[request.param]


def path(forest: Forest, node: int) -> list[int]:
    """The node and its ancestors, by climbing."""
    nodes = [node]
    while forest.parent[nodes[-1]] >= 0:
        nodes.append(int(forest.parent[nodes[-1]]))
    return nodes


def test_arrays_agree_with_climbing(forest):
    climbed = [path(forest, node) for node in range(forest.n_nodes)]
    roots = [nodes[-1] for nodes in climbed]
    below = [[i for i in range(forest.n_nodes) if node in climbed[i]] for node in range(forest.n_nodes)]
    np.testing.assert_array_equal(forest.start, [nodes[0] for nodes in below])
    for node, nodes in enumerate(below):
        assert nodes == list(range(forest.start[node], node + 1))  # contiguous, the node last
    np.testing.assert_allclose(forest.depth, [forest.branch_length[nodes].sum() for nodes in climbed], rtol=1e-14)
    np.testing.assert_array_equal(forest.tree, [sorted(set(roots)).index(root) for root in roots])
    np.testing.assert_array_equal(forest.is_leaf, [len(nodes) == 1 for nodes in below])
    np.testing.assert_array_equal(forest.is_root, [len(nodes) == 1 for nodes in climbed])
    np.testing.assert_array_equal(forest.leaves, [node for node, nodes in enumerate(below) if len(nodes) == 1])
    np.testing.assert_array_equal(forest.n_children, [list(forest.parent).count(i) for i in range(forest.n_nodes)])
    assert (forest.n_trees, forest.n_leaves) == (len(set(roots)), len(forest.leaves))
    assert forest.height == max(forest.depth[forest.leaves])


def naive_mrca(forest: Forest, nodes: np.ndarray) -> list[list[int]]:
    climbed = [path(forest, int(node)) for node in nodes]
    return [[next((node for node in one if node in other), -1) for other in climbed] for one in climbed]


@pytest.mark.parametrize("choice", ["all", "some", "shuffled", "repeated"])
def test_mrca_agrees_with_climbing(forest, choice):
    rng = np.random.default_rng(0)
    leaves = forest.leaves
    nodes = {
        "all": leaves,
        "some": leaves[::2],
        "shuffled": rng.permutation(leaves),
        "repeated": np.concatenate([leaves[-1:], rng.choice(leaves, 2 * len(leaves))]),
    }[choice]
    np.testing.assert_array_equal(forest.mrca(nodes), naive_mrca(forest, nodes))


@pytest.mark.parametrize("some", [1, 3])
def test_ancestors_of_any_nodes_with_leaves_agree_with_climbing(forest, some):
    rng = np.random.default_rng(some)
    nodes = rng.permutation(forest.n_nodes)[::some]
    leaves = rng.permutation(forest.leaves)[::some]
    above = [path(forest, node) for node in range(forest.n_nodes)]
    expected = [[next((a for a in above[i] if a in above[j]), -1) for j in leaves] for i in nodes]
    np.testing.assert_array_equal(forest.ancestors(nodes, leaves), expected)
    assert forest.ancestors(nodes, leaves[:0]).shape == (len(nodes), 0)
    assert forest.ancestors(nodes[:0], leaves).shape == (0, len(leaves))


def test_mrca_of_no_leaf_is_empty():
    assert FORESTS["star"].mrca(np.array([], dtype=int)).shape == (0, 0)


def test_mrca_is_for_leaves():
    with pytest.raises(ValueError, match="for leaves only"):
        FORESTS["caterpillar"].mrca(np.array([2]))


def test_leaves_are_found_by_name():
    forest = FORESTS["forest"]
    assert list(forest.names[forest.nodes_of(["f", "a", "c"])]) == ["f", "a", "c"]
    assert forest.nodes_of([]).shape == (0,)
    with pytest.raises(
        DataError, match=r"2 of 3 names are no leaf of the tree: 'z', 'y'\. .* named like 'a', 'b', 'c'"
    ):
        forest.nodes_of(["a", "z", "y"])


def test_internal_names_are_no_leaves():
    with pytest.raises(DataError, match="1 of 1 names are no leaf of the tree: 'root'"):
        FORESTS["star"].nodes_of(["root"])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_prune_keeps_paths(forest, step):
    keep = list(forest.names[forest.leaves[::step]])
    pruned = forest.prune(keep)
    assert list(pruned.names[pruned.leaves]) == keep
    before, after = forest.nodes_of(keep), pruned.nodes_of(keep)
    np.testing.assert_allclose(pruned.depth[after], forest.depth[before], rtol=1e-12)
    shared, shared_after = forest.mrca(before), pruned.mrca(after)
    np.testing.assert_array_equal(shared_after < 0, shared < 0)
    related = shared >= 0
    np.testing.assert_allclose(pruned.depth[shared_after[related]], forest.depth[shared[related]], rtol=1e-12)
    kept_trees = np.unique(forest.tree[before])
    assert pruned.tree_names == tuple(forest.tree_names[tree] for tree in kept_trees)


def test_prune_merges_what_it_leaves_unary_and_nothing_else():
    forest = to_forest("(((a:1,b:2)x:3,c:1)y:4,((d:1)z:2,e:3)w:5)root;")
    pruned = forest.prune(["a", "c", "d", "e"])  # x keeps one child of two
    assert set(pruned.names) == {"a", "c", "d", "e", "y", "z", "w", "root"}
    assert pruned.branch_length[pruned.nodes_of(["a"])[0]] == 4
    pruned = forest.prune(["a"])  # x and y in a row; the root stays, z was unary before and goes with its leaf
    assert list(pruned.names) == ["a", "root"]
    assert list(pruned.branch_length) == [8, 0]
    assert set(forest.prune(["d"]).names) == {"d", "z", "root"}


def test_prune_drops_empty_trees():
    pruned = Forest.join([FORESTS["star"], to_forest("(x,y);")], ["one", "two"]).prune(["y"])
    assert (pruned.n_trees, pruned.tree_names, list(pruned.names)) == (1, ("two",), ["y", ""])


def test_prune_to_nothing_is_an_error():
    with pytest.raises(DataError, match="leave none of the 4 leaves"):
        FORESTS["star"].prune([])
    with pytest.raises(DataError, match="1 of 2 names are no leaf of the tree: 'z'"):
        FORESTS["star"].prune(["a", "z"])


def test_join_keeps_every_tree():
    parts = [to_forest("(a:1,b:2);"), to_forest("c:1;(d:1,e:1);")]
    joined = Forest.join(parts, ["one", "two"])
    assert joined.tree_names == ("one", "two", "two")
    assert Forest.join(parts).tree_names == ("0", "1", "2")
    np.testing.assert_array_equal(joined.parent, [2, 2, -1, -1, 6, 6, -1])
    np.testing.assert_array_equal(joined.branch_length, [1, 2, 0, 1, 1, 1, 0])
    with pytest.raises(DataError, match="No tree was given"):
        Forest.join([])


def test_deep_caterpillar():
    """Leaf k hangs at depth k of a spine; nothing may recurse or take quadratic time."""
    n = 50_000
    parent = np.empty(2 * n - 1, dtype=np.int64)  # leaf, then (leaf, spine) pairs
    parent[0], parent[1::2], parent[2::2] = 2, np.arange(2, 2 * n, 2), np.arange(4, 2 * n + 2, 2)
    parent[-1] = -1
    length = np.ones(2 * n - 1)
    length[-1] = 0
    names = np.array([f"c{i // 2 + i % 2}" if i % 2 or i == 0 else "" for i in range(2 * n - 1)])
    forest = Forest(parent, length, names, ("0",))
    assert (forest.n_leaves, forest.height) == (n, n - 1)
    assert forest.start[-1] == 0
    i, j, k = forest.nodes_of(["c0", "c1000", f"c{n - 1}"])
    shared = forest.mrca(np.array([i, j, k]))
    np.testing.assert_array_equal(forest.depth[shared[[0, 0, 1], [1, 2, 2]]], [n - 1 - 1000, 0, 0])
    pruned = forest.prune([f"c{i}" for i in range(0, n, 10)])
    assert (pruned.n_leaves, pruned.n_nodes, pruned.height) == (n // 10, 2 * (n // 10), n - 1)  # the root stays


def forest_of(parent=(2, 2, -1), branch_length=(1.0, 1.0, 0.0), names=("a", "b", ""), tree_names=("0",)):
    return Forest(np.array(parent), np.array(branch_length), np.array(names, dtype=object), tree_names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parent": (), "branch_length": (), "names": (), "tree_names": ()}, "The tree is empty: it has no node"),
        ({"branch_length": (1.0, 1.0)}, "has 3 nodes but 2 branch lengths"),
        ({"names": ("a", "b")}, "has 3 nodes but 2 names"),
        ({"parent": (-1, 0, 0)}, "not in post-order: a parent has to come after"),
        ({"parent": (2, 3, -1)}, "not in post-order: a parent has to come after"),
        ({"parent": (2, -2, -1)}, "not in post-order: a parent has to come after"),
        (
            {"parent": (3, 4, 3, 4, -1), "branch_length": np.ones(5), "names": ("a", "b", "c", "", "")},
            "not one contiguous run of nodes",
        ),
        ({"branch_length": (1.0, np.nan, 0.0)}, "1 of 3 branch lengths are NaN or infinite, above 'b'"),
        ({"branch_length": (np.inf, np.nan, 0.0)}, "2 of 3 branch lengths are NaN or infinite, above 'a', 'b'"),
        ({"branch_length": (-1.0, 1.0, 0.0)}, "1 of 3 branch lengths are negative, above 'a'"),
        ({"branch_length": (1.0, 1.0, -2.0)}, "1 of 3 branch lengths are negative, above 'unnamed node 2'"),
        ({"names": ("a", "", "")}, "1 of 2 leaves have no name"),
        ({"names": ("a", "a", "")}, "1 leaf names occur more than once in the tree: 'a'"),
        ({"tree_names": ("x", "y")}, "has 1 trees but 2 tree names"),
    ],
)
def test_a_broken_forest_cannot_be_built(change, message):
    assert forest_of().n_leaves == 2  # what the change breaks
    with pytest.raises(DataError, match=message):
        forest_of(**change)


def test_messages_show_at_most_five_names():
    names = [f"x{i}" for i in range(9)]
    with pytest.raises(DataError, match=r"9 of 9 names .*: 'x0', 'x1', 'x2', 'x3', 'x4', \.\.\.\."):
        forest_of().nodes_of(names)


def test_a_forest_does_not_share_memory_with_its_input():
    length = np.array([1.0, 1.0, 0.0])
    forest = forest_of(branch_length=length)
    built = Forest(forest.parent, length, forest.names, ("0",))
    length[0] = 9
    assert built.branch_length[0] == 1


def test_repr_is_one_line():
    assert repr(FORESTS["forest"]) == "Forest(3 trees, 6 leaves, 9 nodes, height 3)"


def test_above_keeps_paths_of_the_nodes_and_nothing_else():
    forest = to_forest("((a:1,b:2)ab:3,((c:1,d:1)cd:2)u:1,e:4)r;")
    nodes = forest.nodes_of(["b", "c"])
    part, index = forest.above(nodes)
    assert part.names.tolist() == ["b", "ab", "c", "cd", "u", "r"]  # unary nodes stay: kernels go by the branches
    assert part.names[index].tolist() == ["b", "c"]
    np.testing.assert_array_equal(part.depth[index], forest.depth[nodes])
    assert part.depth[part.mrca(index)[0, 1]] == forest.depth[forest.mrca(nodes)[0, 1]]
