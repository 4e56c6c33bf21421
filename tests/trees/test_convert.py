"""Newick, graphs and edge tables to forests and back; what cannot be read is said in plain words."""

import networkx as nx
import numpy as np
import pandas as pd
import pytest

from cellfate.errors import DataError
from cellfate.trees.convert import to_edges, to_forest, to_graph, to_newick, to_newick_dict
from cellfate.trees.forest import Forest

TREES = {
    "star": "(a:1,b:2,c:0.5,d:1)root;",
    "one cell": "a;",
    "one cell with a length": "a:0.5;",
    "one cell below a root": "(a:2)root;",
    "zero-length branches": "((a:0,b:0):0,(c:1,d:0):0);",
    "forest": "(a:1,b:1);c:3;((d:1,e:1):1,f:2):0.5;",
    "unary nodes": "(((a:1):2)x:0,((b:1,c:2):1):3);",
    "polytomies": "((a:1,b:1,c:1,d:1,e:1)u:1,(f:1,g:1,h:1)v:1,i:2)w;",
    "long digits": "((a:0.1,b:1e-300):12345.678901234567,c:0.30000000000000004);",
    "awkward names": "(('it''s':1,'a b':1)'(x;y)':1,'[c]:,':2,_d_:1,'é\n':1,none:2,7:1);",
}


def same(one: Forest, other: Forest, *, names: bool = True) -> None:
    np.testing.assert_array_equal(one.parent, other.parent)
    np.testing.assert_array_equal(one.branch_length, other.branch_length)
    which = slice(None) if names else one.leaves
    np.testing.assert_array_equal(one.names[which], other.names[which])


@pytest.fixture(params=TREES, ids=lambda name: name.replace(" ", "-"))
def forest(request):
    return to_forest(TREES[request.param])


def test_newick_and_back(forest):
    again = to_forest(to_newick(forest))
    same(forest, again)
    assert again.tree_names == forest.tree_names
    assert to_newick(again) == to_newick(forest)
    assert to_newick(forest).count("\n") == forest.n_trees - 1 + any("\n" in name for name in forest.names)


def test_graph_and_back(forest):
    graph = to_graph(forest)
    assert (graph.number_of_nodes(), graph.number_of_edges()) == (forest.n_nodes, forest.n_nodes - forest.n_trees)
    same(forest, to_forest(graph), names=False)


def test_edge_table_and_back(forest):
    table = pd.DataFrame(to_edges(forest))
    same(forest, to_forest(table), names=False)
    same(forest, to_forest(to_edges(forest)), names=False)
    same(to_forest(to_graph(forest)), to_forest(table))  # the three roads give the same names too


def test_forest_and_list_and_dict():
    parts = {name: TREES[name] for name in ("star", "forest")}
    parts["forest"] = parts["forest"].translate(str.maketrans("abcdef", "pqrstu"))
    joined = to_forest(parts)
    assert joined.tree_names == ("star", "forest", "forest", "forest")
    assert to_forest(joined) is joined
    same(joined, to_forest(list(parts.values())))
    assert to_forest(list(parts.values())).tree_names == ("0", "1", "2", "3")
    texts = to_newick_dict(joined)
    assert list(texts) == ["star", "forest"]
    same(joined, to_forest(texts))
    assert to_forest(texts).tree_names == joined.tree_names
    same(joined, to_forest({"star": to_graph(to_forest(parts["star"])), "forest": parts["forest"]}))


def test_newick_by_hand():
    forest = to_forest("((a:1,b:2)x:3,c:4)y:0.5;")
    assert list(forest.names) == ["a", "b", "x", "c", "y"]
    np.testing.assert_array_equal(forest.parent, [2, 2, 4, 4, -1])
    np.testing.assert_array_equal(forest.branch_length, [1, 2, 3, 4, 0.5])
    assert to_newick(forest) == "((a:1.0,b:2.0)x:3.0,c:4.0)y:0.5;"


@pytest.mark.parametrize(
    "text",
    [
        "((a:1,b:2):3,c:4)",
        "  ( ( a : 1 , b : 2 ) : 3 , c : 4 ) ;\n",
        "((a:1,\n b:2):3,\n\n c:4);",
        "((\r\n\ta:1,b:2):3,c:4);\r\n",
        "[&R] ((a:1[x],b:2):3[a (comment), with; all],c:4);",
        "(('a':1,'b':2)'':3,c:4);",
        "((a:1e0,b:+2.0):.3e1,c:4.);",
    ],
)
def test_newick_in_many_hands(text):
    same(to_forest("((a:1,b:2):3,c:4);"), to_forest(text))


def test_names_are_kept_to_the_letter():
    forest = to_forest(TREES["awkward names"])
    assert list(forest.names[forest.leaves]) == ["it's", "a b", "[c]:,", "_d_", "é\n", "none", "7"]
    assert "(x;y)" in forest.names


def test_repeated_internal_names_are_support_values():
    forest = to_forest("((a:1,b:1)100:1,((c:1,d:1)100:1,e:1)b:1);")
    assert list(forest.names).count("100") == 2
    same(forest, to_forest(to_newick(forest)))
    graph = to_graph(forest)
    assert len(graph) == forest.n_nodes
    assert graph.out_degree("b") == 0  # the leaf keeps its name
    same(forest, to_forest(graph), names=False)


def test_text_is_never_taken_for_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "(a,b);").write_text("(x,y);")
    assert list(to_forest("(a,b);").names) == ["a", "b", ""]


def test_no_lengths_are_unit_lengths():
    for tree in ("((a,b),c);", nx.DiGraph([("r", "x"), ("r", "c"), ("x", "a"), ("x", "b")])):
        forest = to_forest(tree)
        assert dict(zip(forest.names, forest.depth, strict=True)).items() >= {"a": 2, "b": 2, "c": 1}.items()


def edges(**lengths: float) -> nx.DiGraph:
    graph = nx.DiGraph([("r", "x"), ("r", "c"), ("x", "a"), ("x", "b")])
    nx.set_node_attributes(graph, {"r": 10, "x": 11, "a": 13, "b": 12.5, "c": 14}, "time")
    for key, factor in lengths.items():
        for above, below in graph.edges:
            gap = graph.nodes[below]["time"] - graph.nodes[above]["time"]
            graph.edges[above, below][key] = factor * gap
    return graph


@pytest.mark.parametrize(
    ("graph", "branch_length", "factor"),
    [
        (edges(), None, 1),  # node times; that of the root is where the clock starts, no length
        (edges(length=2, weight=3), None, 2),
        (edges(branch_length=2), None, 2),
        (edges(weight=3), None, 3),
        (edges(length=2, mutations=5), "mutations", 5),
    ],
)
def test_lengths_of_a_graph(graph, branch_length, factor):
    forest = to_forest(graph, branch_length=branch_length)
    depth = dict(zip(forest.names, forest.depth, strict=True))
    assert depth == {"r": 0, "x": factor, "a": 3 * factor, "b": 2.5 * factor, "c": 4 * factor}


def test_node_depth_gives_lengths_too():
    graph = edges()
    for _, data in graph.nodes(data=True):
        data["depth"] = data.pop("time")
    same(to_forest(edges()), to_forest(graph))


def test_order_of_nodes_and_edges_does_not_matter():
    graph = nx.DiGraph()
    graph.add_edges_from([(2, 1, {"length": 1.5}), (3, 2, {"length": 1}), (2, 0, {"length": 2}), (3, 4, {"length": 5})])
    forest = to_forest(graph)
    assert dict(zip(forest.names, forest.depth, strict=True)) == {"3": 0, "2": 1, "1": 2.5, "0": 3, "4": 5}


@pytest.mark.parametrize(
    "table",
    [
        pd.DataFrame({"parent": ["x", "x", "r", "r"], "child": ["a", "b", "x", "c"], "length": [1, 2, 3, 4]}),
        pd.DataFrame({"branch_length": [1, 2, 3, 4], "child": ["a", "b", "x", "c"], "parent": ["x", "x", "r", "r"]}),
        pd.DataFrame(
            {"parent": [None, "x", "x", "r", "r"], "child": ["r", "a", "b", "x", "c"], "length": [None, 1, 2, 3, 4]}
        ),
        np.array([["x", "a", 1], ["x", "b", 2], ["r", "x", 3], ["r", "c", 4]], dtype=object),
        np.array([["x", "a", "1"], ["x", "b", "2"], ["r", "x", "3"], ["r", "c", "4"]]),
        {"parent": ["x", "x", "r", "r"], "child": ["a", "b", "x", "c"], "length": [1, 2, 3, 4]},
    ],
    ids=["length", "branch_length", "root row", "objects", "text", "dict"],
)
def test_edge_tables(table):
    same(to_forest("((a:1,b:2)x:3,c:4)r;"), to_forest(table))


def test_numbers_as_names():
    table = np.array([[8, 1, 0.5], [8, 2, 1.5]])  # an array of floats: node 8 is "8"
    forest = to_forest(table)
    assert list(forest.names) == ["1", "2", "8"]
    frame = pd.DataFrame({"parent": [np.nan, 8, 8], "child": [8, 1, 2]})  # a missing root turns the column to floats
    assert list(to_forest(frame).names) == ["1", "2", "8"]


def test_column_by_name():
    table = pd.DataFrame({"parent": ["r", "r"], "child": ["a", "b"], "length": [1, 2], "edits": [5, 6]})
    assert list(to_forest(table, branch_length="edits").branch_length) == [5, 6, 0]


def test_deep_caterpillar():
    n = 50_000
    text = "(" * (n - 1) + "c0:1" + "".join(f",c{i}:1):0.5" for i in range(1, n)) + ";"
    forest = to_forest(text)
    assert forest.n_leaves == n
    assert forest.branch_length[-1] == 0.5  # the root's own
    assert forest.depth[forest.nodes_of(["c0", f"c{n - 1}"])].tolist() == [1 + 0.5 * (n - 1), 1.5]
    same(forest, to_forest(to_newick(forest)))
    same(forest, to_forest(to_graph(forest)), names=False)
    same(forest, to_forest(to_edges(forest)), names=False)


def cycle() -> nx.DiGraph:
    return nx.DiGraph([("r", "a"), ("x", "y"), ("y", "z"), ("z", "x"), ("z", "leaf")])


def partly(where: str) -> nx.DiGraph:
    graph = edges(length=1)
    if where == "length":
        del graph.edges["x", "b"]["length"]
    else:
        for above, below in graph.edges:
            del graph.edges[above, below]["length"]
        del graph.nodes["c"]["time"]
    return graph


BAD = {
    "empty text": (" \n", "The tree is empty: Newick text without a character"),
    "only a semicolon": (";", "The tree is empty: ';' holds no node"),
    "empty graph": (nx.DiGraph(), "The tree is empty: it has no node"),
    "empty dict": ({}, "The tree is empty: a dict without specimens"),
    "empty list": ([], "No tree was given"),
    "empty table": (pd.DataFrame({"parent": [], "child": []}), "The tree is empty: an edge table without rows"),
    "file name": ("data/tree.nwk", "no Newick text: 'data/tree.nwk' has neither parentheses nor a semicolon"),
    "unbalanced, open": ("((a,b),c;", "not readable as Newick: 2 opening and 1 closing parentheses"),
    "unbalanced, closed": ("(a,b));", "not readable as Newick: 1 opening and 2 closing parentheses"),
    "closed before open": (")a,b(;", r"not readable as Newick: '\)a,b\('"),
    "comma outside": ("(a,b),c;", "not readable as Newick"),
    "length no number": ("(a:x,b:1);", "not readable as Newick: .* every length after a colon is a number"),
    "text beside quotes": ("('a'b:1,c:1);", "text beside a quoted name in \"'a'b\""),
    "two names for a node": ("(a 'b':1,c:1);", "text beside a quoted name in \"a'b'\""),
    "lengths for Newick": (("(a,b);", "length"), "Newick text, which carries its own lengths; branch_length='length'"),
    "nameless leaf": ("(a:1,:1);", "1 of 2 leaves have no name"),
    "leaf twice": ("(a:1,(b:1,a:1):1);", "1 leaf names occur more than once in the tree: 'a'"),
    "leaf twice over trees": ({"e1": "(a,b);", "e2": "(a,c);"}, "1 leaf names occur more than once in the tree: 'a'"),
    "leaf twice in one of many": (
        {"e1": "(a,b);", "e2": "(c,c);"},
        "The tree of 'e2': 1 leaf names occur more than once in the tree: 'c'",
    ),
    "negative": ("(a:-1,b:1);", "1 of 3 branch lengths are negative, above 'a'"),
    "nan": ("(a:nan,b:1);", "1 of 3 branch lengths are NaN or infinite, above 'a'"),
    "infinite": ("(a:1,b:inf);", "1 of 3 branch lengths are NaN or infinite, above 'b'"),
    "negative in a dict": ({"e7": "(a:-1,b:1);"}, "The tree of 'e7': 1 of 3 branch lengths are negative, above 'a'"),
    "some lengths": ("((a:1,b):1,(c,d):1);", "no length on 3 of 6 branches, above 'b', 'c', 'd'"),
    "some lengths in a graph": (partly("length"), "no length on 1 of 4 branches, above 'b'"),
    "some node times": (partly("time"), "no 'time' on 1 of 5 nodes: 'c'"),
    "some lengths in a table": (
        pd.DataFrame({"parent": ["r", "r"], "child": ["a", "b"], "length": [1, np.nan]}),
        "1 of 3 branch lengths are NaN or infinite, above 'b'",
    ),
    "child before parent": (nx.DiGraph([("r", "a"), ("r", "b")]), "1 of 3 branch lengths are negative, above 'b'"),
    "cycle": (cycle(), "a cycle of 3 nodes: '[xyz]', '[xyz]', '[xyz]'"),
    "own parent": (nx.DiGraph([("r", "a"), ("b", "b")]), "a cycle of 1 nodes: 'b'"),
    "cycle in a table": ({"parent": ["a", "b"], "child": ["b", "a"]}, "a cycle of 2 nodes: '[ab]', '[ab]'"),
    "two parents": (
        nx.DiGraph([("r", "a"), ("r", "b"), ("a", "c"), ("b", "c")]),
        "1 nodes with more than one parent: 'c'; 'c' has 'a', 'b'",
    ),
    "two parents in a table": (
        {"parent": ["r", "s", "r"], "child": ["a", "a", "b"]},
        "1 nodes with more than one parent: 'a'; 'a' has 'r', 's'",
    ),
    "same text": (nx.DiGraph([("r", 1), ("r", "1")]), "3 nodes but 2 different names once written as text"),
    "undirected": (nx.Graph([("r", "a")]), "an undirected graph of 2 nodes"),
    "no such attribute": ((edges(length=1), "edits"), "no edge attribute 'edits' on any of its 4 edges"),
    "attribute no number": (
        nx.DiGraph([("r", "a", {"length": "long"})]),
        "edge attribute 'length' 'long' at 'a', which is no number",
    ),
    "column no number": (
        {"parent": ["r"], "child": ["a"], "length": ["long"]},
        "column 'length' 'long' at 'a', which is no number",
    ),
    "no such column": (
        (pd.DataFrame({"parent": ["r"], "child": ["a"]}), "edits"),
        "without column 'edits'; it has 'parent', 'child'",
    ),
    "other columns": (
        pd.DataFrame({"from": ["r"], "to": ["a"]}),
        "without column 'parent', 'child'; it has 'from', 'to'",
    ),
    "no child": ({"parent": ["r", "r"], "child": ["a", None]}, "1 of 2 rows without a child"),
    "array shape": (np.zeros((3, 4)), r"an array of shape \(3, 4\)"),
    "other type": (3.14, "cannot be read from float"),
    "other type in a list": (["(a,b);", None], "The tree 1 cannot be read from NoneType"),
}
nx.set_node_attributes(BAD["child before parent"][0], {"r": 1.0, "a": 2.0, "b": 0.5}, "time")


@pytest.mark.parametrize("name", BAD, ids=lambda name: name.replace(" ", "-"))
def test_what_cannot_be_read_says_why(name):
    given, message = BAD[name]
    tree, branch_length = given if isinstance(given, tuple) else (given, None)
    with pytest.raises(DataError, match=message):
        to_forest(tree, branch_length=branch_length)
