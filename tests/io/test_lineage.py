"""Ancestry in every form and place, matched with the cells."""

import networkx as nx
import numpy as np
import pandas as pd
import pytest

from cellfate import CellfateWarning
from cellfate.io.anndata import read_cells
from cellfate.pp import set_tree
from cellfate.trees.convert import to_forest, to_graph
from tests.embryo import N, embryo, half_tree, one_tree, same, shared_path, trees, unchanged

FATE = {"fate": "fate", "family": "bernoulli"}


def table(forest):
    return pd.DataFrame(
        [(a, b, d["length"]) for a, b, d in to_graph(forest).edges(data=True)], columns=["parent", "child", "length"]
    )


TREE_FORMS = {
    "text": lambda: one_tree(),
    "graph": lambda: to_graph(to_forest(one_tree())),
    "table": lambda: table(to_forest(one_tree())),
    "forest": lambda: to_forest(one_tree()),
}


@pytest.mark.parametrize("form", TREE_FORMS)
def test_a_tree_in_any_form_and_place_is_the_same(form):
    wanted = read_cells(embryo(), **FATE)
    adata = embryo(tree=False)
    with unchanged(adata):
        same(read_cells(adata, **FATE, lineage=TREE_FORMS[form]()), wanted)
    adata.uns["tree"] = TREE_FORMS[form]()
    same(read_cells(adata, **FATE), wanted)
    adata = embryo(tree=False)
    set_tree(adata, TREE_FORMS[form]())
    same(read_cells(adata, **FATE), wanted)


def test_shared_paths_are_those_of_the_tree():
    cells = read_cells(embryo(), **FATE)
    graph = to_graph(to_forest(one_tree()))
    lengths = nx.single_source_dijkstra_path_length(graph, "zygote", weight="length")
    paths = shared_path(cells)
    for i, j in [(0, 1), (0, 3), (5, 9), (2, 20), (23, 23)]:
        ancestor = nx.lowest_common_ancestor(graph, f"c{i}", f"c{j}")
        assert paths[i, j] == pytest.approx(lengths[ancestor])


@pytest.mark.parametrize("direct", [True, False])
def test_trees_by_specimen(direct):
    adata = embryo()
    adata.uns["halves"] = trees()
    cells = read_cells(adata, **FATE, lineage=trees() if direct else "halves", library_key="half")
    assert [cells.forest.tree_names[tree] for tree in cells.forest.tree[cells.leaf]] == adata.obs["half"].tolist()
    across = adata.obs["half"].to_numpy()[:, None] != adata.obs["half"].to_numpy()
    assert (shared_path(cells)[across] == 0).all()


def test_a_tree_may_span_specimens():
    cells = read_cells(embryo(), **FATE, library_key="half")
    assert cells.forest.n_trees == 1
    assert cells.n_specimens == 2


def test_trees_by_specimen_without_library_key_ask_for_it():
    adata = embryo()
    with pytest.warns(CellfateWarning, match="obs\\['half'\\] holds the same 2 names.*library_key='half'"):
        read_cells(adata, **FATE, lineage=trees())
    read_cells(adata, **FATE, lineage=list(trees().values()))  # clones: silent


def test_clone_labels_are_stars():
    adata = embryo(tree=False)[::-1].copy()
    cells = read_cells(adata, **FATE, lineage="clone", lineage_kernel="clone")
    labels = adata.obs["clone"].to_numpy()
    mrca = cells.forest.mrca(cells.leaf)
    np.testing.assert_array_equal(mrca >= 0, labels[:, None] == labels)
    np.testing.assert_array_equal(cells.forest.depth[cells.leaf], 1.0)
    assert [cells.forest.tree_names[tree] for tree in cells.forest.tree[cells.leaf]] == labels.tolist()


def test_a_tree_goes_before_clone_labels_of_the_same_name():
    adata = embryo()
    adata.obs["tree"] = adata.obs["clone"]
    assert read_cells(adata, **FATE, lineage_kernel="clone").forest.n_trees == 1


def test_unobserved_leaves_are_pruned_and_change_nothing():
    adata = embryo()
    every = read_cells(adata, **FATE)
    some = np.arange(0, N, 2)
    few = read_cells(adata[some].copy(), **FATE)
    assert few.forest.n_leaves == few.n == len(some)
    np.testing.assert_allclose(shared_path(few), shared_path(every)[np.ix_(some, some)])


def test_dropped_cells_stay_out():
    adata = embryo(tree=False)
    set_tree(adata, half_tree(0, N - 4) + ";", missing="drop")
    adata.obs.loc["c22", "size"] = np.nan  # of no concern: it is not in the fit
    with pytest.warns(
        CellfateWarning, match="4 of 24 cells have no leaf .* left out of the fit.*'c20', 'c21', 'c22', 'c23'"
    ):
        cells = read_cells(adata, "size", family="gaussian", formula="~ 1 + stage", library_key="half", groups="batch")
    assert cells.n == N - 4
    np.testing.assert_array_equal(cells.kept, np.arange(N) < N - 4)
    np.testing.assert_array_equal(cells.coordinates, adata.obsm["spatial"][: N - 4])
    np.testing.assert_array_equal(cells.response, adata.obs["size"][: N - 4])
    assert len(cells.design) == len(cells.offset) == len(cells.specimen) == len(cells.groups["batch"]) == N - 4
    assert read_cells(adata, **FATE, lineage=None).n == N  # without the tree they are as good as others


def test_isolated_cells_have_ancestors_of_their_own():
    adata = embryo(tree=False)
    set_tree(adata, half_tree(0, N - 2) + ";", missing="isolate")
    cells = read_cells(adata, **FATE)
    assert cells.kept.all()
    paths = shared_path(cells)
    assert (paths[-2:, :-2] == 0).all()
    assert paths[-1, -2] == 0
    np.testing.assert_allclose(np.diag(paths)[-2:], np.diag(paths)[:-2].mean())


def test_isolated_cells_among_trees_by_specimen():
    adata = embryo(tree=False)
    set_tree(adata, trees() | {"right": half_tree(N // 2, N - 1) + ";"}, missing="isolate")
    cells = read_cells(adata, **FATE, library_key="half")
    assert cells.n == N
    assert (shared_path(cells)[-1, :-1] == 0).all()
