"""The tree on its way in: what is stored, where, and what is left alone."""

import logging

import anndata
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from treedata import TreeData

import cellfate as cf
from cellfate import DataError
from cellfate.io.anndata import read_cells
from cellfate.trees.convert import to_forest, to_graph
from tests.embryo import N, contents, embryo, half_tree, one_tree, trees, unchanged


def paths(tree, names):
    """Depth of the most recent common ancestor of every two leaves."""
    forest = to_forest(tree)
    mrca = forest.mrca(forest.nodes_of(names))
    return np.where(mrca >= 0, forest.depth[mrca], 0.0)


def treedata(**settings):
    plain = embryo(tree=False)
    return TreeData(plain.X, obs=plain.obs, var=plain.var, obsm={"spatial": plain.obsm["spatial"]}, **settings)


def test_text_is_stored_and_nothing_else_changes():
    adata = embryo(tree=False)
    before = contents(adata)
    assert cf.pp.set_tree(adata, one_tree()) is None
    stored = adata.uns.pop("tree")
    assert isinstance(stored, str)
    np.testing.assert_array_equal(paths(stored, adata.obs_names), paths(one_tree(), adata.obs_names))
    assert contents(adata) == before


def test_a_dict_stays_a_dict():
    adata = embryo(tree=False)
    cf.pp.set_tree(adata, {name: to_graph(to_forest(text)) for name, text in trees().items()}, key_added="halves")
    assert {name: type(text) for name, text in adata.uns["halves"].items()} == {"left": str, "right": str}
    for name, text in trees().items():
        leaves = adata.obs_names[adata.obs["half"] == name]
        np.testing.assert_array_equal(paths(adata.uns["halves"][name], leaves), paths(text, leaves))


def test_a_forest_is_text_of_several_trees():
    adata = embryo(tree=False)
    cf.pp.set_tree(adata, list(trees().values()))
    assert to_forest(adata.uns["tree"]).n_trees == 2


def test_lengths_keep_every_digit():
    adata = embryo(tree=False)
    graph = nx.DiGraph()
    lengths = np.random.default_rng(0).exponential(size=N)
    graph.add_weighted_edges_from([("root", f"c{i}", lengths[i]) for i in range(N)], weight="length")
    cf.pp.set_tree(adata, graph)
    np.testing.assert_array_equal(np.diag(paths(adata.uns["tree"], adata.obs_names)), lengths)


def test_a_tree_may_be_replaced():
    adata = embryo(tree=False)
    cf.pp.set_tree(adata, half_tree(0, N - 1) + ";", missing="drop")
    assert adata.uns["tree_missing"]["cells"].tolist() == ["c23"]
    cf.pp.set_tree(adata, trees())
    assert set(adata.uns["tree"]) == {"left", "right"}
    assert "tree_missing" not in adata.uns
    cf.pp.set_tree(adata, one_tree())
    assert isinstance(adata.uns["tree"], str)


@pytest.mark.parametrize("missing", ["drop", "isolate"])
def test_what_does_not_match_is_noted(missing):
    adata = embryo(tree=False)[2:].copy()
    cf.pp.set_tree(adata, half_tree(0, N - 3) + ";", missing=missing)
    kept = adata.obs_names[:-3]
    assert sorted(to_forest(adata.uns["tree"]).names[to_forest(adata.uns["tree"]).leaves]) == sorted(kept)
    np.testing.assert_array_equal(paths(adata.uns["tree"], kept), paths(half_tree(0, N - 3) + ";", kept))
    note = adata.uns["tree_missing"]
    assert note["policy"] == missing
    assert note["cells"].tolist() == ["c21", "c22", "c23"]
    assert note["depth"] == pytest.approx(np.diag(paths(adata.uns["tree"], kept)).mean())


def test_a_note_survives_files(tmp_path):
    adata = embryo(tree=False)
    cf.pp.set_tree(adata, trees() | {"right": half_tree(N // 2, N - 2) + ";"}, missing="drop")
    adata.write_h5ad(tmp_path / "embryo.h5ad")
    back = anndata.read_h5ad(tmp_path / "embryo.h5ad")
    assert back.uns["tree"] == adata.uns["tree"]
    assert list(back.uns["tree_missing"]["cells"]) == ["c22", "c23"]
    cf.pp.set_tree(back, one_tree())  # it knows its own note again
    assert "tree_missing" not in back.uns


def test_a_view_becomes_a_copy_and_its_parent_is_left_alone(caplog):
    adata = embryo(tree=False)
    view = adata[: N // 2]
    with unchanged(adata), caplog.at_level(logging.INFO, logger="cellfate"):
        cf.pp.set_tree(view, trees()["left"])
    assert "adata was a view and is now a copy of its own" in caplog.text
    assert to_forest(view.uns["tree"]).n_leaves == N // 2


def test_treedata_gets_a_graph():
    tdata = treedata()
    cf.pp.set_tree(tdata, one_tree())
    assert list(tdata.obst) == ["tree"]
    assert "tree" not in tdata.uns
    assert {data["length"] for _, _, data in tdata.obst["tree"].edges(data=True)} == {1.0}
    np.testing.assert_array_equal(paths(tdata.obst["tree"], tdata.obs_names), paths(one_tree(), tdata.obs_names))
    cf.pp.set_tree(tdata, half_tree(0, N) + ";")  # again
    np.testing.assert_array_equal(
        paths(tdata.obst["tree"], tdata.obs_names), paths(half_tree(0, N) + ";", tdata.obs_names)
    )


def test_treedata_forests_stand_in_uns():
    tdata = treedata()
    cf.pp.set_tree(tdata, trees())
    assert set(tdata.uns["tree"]) == {"left", "right"}
    assert not len(tdata.obst)


def test_treedata_missing():
    tdata = treedata()
    cf.pp.set_tree(tdata, half_tree(0, N - 1) + ";", missing="isolate")
    assert tdata.uns["tree_missing"]["cells"].tolist() == ["c23"]
    assert tdata.obst["tree"].number_of_nodes() == to_forest(half_tree(0, N - 1) + ";").n_nodes


def test_treedata_views_become_copies():
    tdata = treedata()
    view = tdata[: N // 2]
    with unchanged(tdata):
        cf.pp.set_tree(view, trees()["left"])
    assert not view.is_view
    assert read_cells(view, "fate", family="bernoulli").n == N // 2


def mine(tdata):
    tdata.obs["tree"] = "oak"


def forest_first(tdata):
    cf.pp.set_tree(tdata, trees())


def tree_first(tdata):
    cf.pp.set_tree(tdata, one_tree())


@pytest.mark.parametrize(
    ("settings", "change", "tree", "text"),
    [
        ({}, mine, one_tree(), r"obs\['tree'\] is taken.*`adata.label = None`"),
        ({}, forest_first, one_tree(), r"uns\['tree'\] holds a tree.*two trees of one name"),
        ({}, tree_first, trees(), r"obst\['tree'\] holds a tree.*two trees of one name"),
        ({"alignment": "nodes"}, lambda tdata: None, one_tree(), "TreeData does not take the tree .alignment 'nodes'"),
    ],
)
def test_treedata_refusals(settings, change, tree, text):
    tdata = treedata(**settings)
    change(tdata)
    with unchanged(tdata), pytest.raises(DataError, match=text):
        cf.pp.set_tree(tdata, tree)


def test_treedata_without_label_leaves_the_column_alone():
    tdata = treedata(label=None)
    mine(tdata)
    cf.pp.set_tree(tdata, one_tree())
    assert (tdata.obs["tree"] == "oak").all()


def test_fifty_thousand_generations():
    adata = anndata.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(50_000)]))
    graph = nx.DiGraph()
    for i in range(49_999):
        graph.add_edge(f"n{i}", f"n{i + 1}" if i < 49_998 else "c49999", length=1.0)
        graph.add_edge(f"n{i}", f"c{i}", length=1.0)
    cf.pp.set_tree(adata, graph)
    assert to_forest(adata.uns["tree"]).height == 49_999


def test_what_the_users_graph_carries_is_kept():
    tdata = treedata()
    cf.pp.set_tree(tdata, one_tree())
    graph = tdata.obst["tree"].copy()
    graph.nodes["c3"]["edits"] = "ACGT"
    graph.edges["zygote", "g4_0"]["support"] = 0.9
    graph.graph["source"] = "cassiopeia"
    tdata.obst["tree"] = graph
    cf.pp.set_tree(tdata, tdata.obst["tree"])
    assert tdata.obst["tree"].nodes["c3"]["edits"] == "ACGT"
    assert tdata.obst["tree"].edges["zygote", "g4_0"] == {"support": 0.9, "length": 1.0}
    assert tdata.obst["tree"].graph["source"] == "cassiopeia"


def test_pruned_graphs_keep_what_is_left():
    tdata = treedata()
    graph = to_graph(to_forest(one_tree()))
    graph.add_edge("zygote", "stranger", length=1.0)
    nx.set_node_attributes(graph, {node: len(node) for node in graph}, "size")
    cf.pp.set_tree(tdata, graph, missing="drop")
    assert "stranger" not in tdata.obst["tree"]
    assert all(data["size"] == len(node) for node, data in tdata.obst["tree"].nodes(data=True))


@pytest.mark.parametrize("text", ["to do: look again;", "draft;", "(see notes;", "nothing"])
def test_text_that_is_no_tree_is_not_replaced(text):
    adata = embryo(tree=False)
    adata.uns["tree"] = text
    with unchanged(adata), pytest.raises(DataError, match=r"uns\['tree'\] is taken by something that is no tree"):
        cf.pp.set_tree(adata, one_tree())


def test_a_file_is_read(tmp_path):
    (tmp_path / "tree.nwk").write_text(one_tree() + "\n")
    adata = embryo(tree=False)
    cf.pp.set_tree(adata, tmp_path / "tree.nwk")
    np.testing.assert_array_equal(paths(adata.uns["tree"], adata.obs_names), paths(one_tree(), adata.obs_names))
    with pytest.raises(DataError, match=r"cannot be read from .*other\.nwk"):
        cf.pp.set_tree(adata, tmp_path / "other.nwk")


EDGES = [("root", f"c{i}") for i in range(N)]
TABLE = pd.DataFrame(EDGES, columns=["parent", "child"])


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (nx.DiGraph(EDGES), True),
        (one_tree().replace(":1.0", ""), True),
        (TABLE, True),
        ({name: text.replace(":1.0", "") for name, text in trees().items()}, True),
        (one_tree(), False),
        (to_graph(to_forest(one_tree())), False),
        (TABLE.assign(length=1.0), False),
        (trees(), False),
    ],
    ids=["graph", "newick", "table", "dict", "newick 1", "graph 1", "table 1", "dict 1"],
)
def test_unit_lengths_are_said(tree, said, caplog):
    with caplog.at_level(logging.INFO, logger="cellfate"):
        cf.pp.set_tree(embryo(tree=False), tree)
    assert ("no branch lengths found: every branch counts 1" in caplog.text) == said
