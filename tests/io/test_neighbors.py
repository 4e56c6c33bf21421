"""Graphs, niches and slopes as they are read: who counts as a neighbor, which covariate is centered."""

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cellfate import CellfateWarning
from cellfate.io.anndata import read_cells
from cellfate.pp import set_tree
from tests.embryo import N, embryo, half_tree, unchanged

FATE = {"fate": "fate", "family": "bernoulli"}
GRAPH = {"spatial_kernel": "graph"}


@pytest.fixture
def adata():
    out = embryo()
    w = np.triu(np.random.default_rng(0).random((N, N)) < 0.2, 1)
    out.obsp["spatial_connectivities"] = sparse.csr_array((w | w.T).astype(float))
    out.obsp["mine"] = sparse.csr_array(np.eye(N, k=1) + np.eye(N, k=-1))
    out.obsm["types"] = np.eye(4)[np.random.default_rng(1).integers(4, size=N)]
    return out


def mean_of_neighbors(w, features):
    rows = [features[np.flatnonzero(row)].mean(0) if row.any() else np.full(features.shape[1], np.nan) for row in w]
    rows = np.array(rows)
    return np.where(np.isnan(rows), np.nanmean(rows, 0), rows)


def test_the_graph_of_a_field(adata):
    squidpys, mine = (adata.obsp[key].toarray() for key in ("spatial_connectivities", "mine"))
    for arguments, wanted in (
        ({}, squidpys),
        ({"spatial": "mine"}, mine),
        ({"graph": "mine"}, mine),
        ({"spatial": adata.obsp["mine"]}, mine),
        ({"spatial": sparse.coo_matrix(mine)}, mine),
    ):
        with unchanged(adata):
            cells = read_cells(adata, **FATE, **GRAPH, **arguments)
        np.testing.assert_array_equal(cells.graph.toarray(), wanted)
        assert cells.coordinates is None
        assert "a neighbor graph" in repr(cells)
    assert read_cells(adata, **FATE).graph is None
    assert read_cells(adata, **FATE, **GRAPH, spatial=None).graph is None


def test_cells_that_are_left_out_are_still_neighbors(adata):
    del adata.uns["tree"]
    set_tree(adata, half_tree(0, 20) + ";", missing="drop")
    with pytest.warns(CellfateWarning, match="have no leaf"):
        cells = read_cells(adata, **FATE, **GRAPH, niche="types")
    assert cells.n == 20
    assert cells.graph.shape == (N, N)
    np.testing.assert_allclose(
        cells.niche, mean_of_neighbors(adata.obsp["spatial_connectivities"].toarray(), adata.obsm["types"])[:20]
    )


def test_the_neighbors_of_a_niche(adata):
    """Those that were named, else those of the field, else squidpy's, else the nearest."""
    types = adata.obsm["types"]
    squidpys, mine = (mean_of_neighbors(adata.obsp[k].toarray(), types) for k in ("spatial_connectivities", "mine"))
    for arguments, wanted in (
        ({}, squidpys),
        ({"graph": "mine"}, mine),
        ({"spatial": None}, squidpys),
        (GRAPH | {"spatial": "mine"}, mine),
        (GRAPH | {"spatial": "mine", "graph": "spatial_connectivities"}, squidpys),
    ):
        np.testing.assert_allclose(read_cells(adata, **FATE, niche="types", **arguments).niche, wanted)
    del adata.obsp["spatial_connectivities"]
    xy, half = adata.obsm["spatial"], adata.obs["half"].to_numpy()
    nearest = np.zeros((N, N))
    for i in range(N):
        others = [j for j in range(N) if j != i and half[j] == half[i]]
        nearest[i, sorted(others, key=lambda j: np.linalg.norm(xy[i] - xy[j]))[:10]] = 1
    for spatial in ("spatial", None):
        cells = read_cells(adata, **FATE, niche="types", library_key="half", spatial=spatial)
        np.testing.assert_allclose(cells.niche, mean_of_neighbors(nearest, types))
    assert "a niche of 4 features" in repr(cells)


def test_features_in_any_form(adata):
    wanted = read_cells(adata, **FATE, niche="types").niche
    types = adata.obsm["types"]
    frame = pd.DataFrame(types, index=adata.obs_names, columns=list("abcd"))
    for form in (sparse.csr_matrix(types), sparse.csc_array(types), frame, types.astype(bool), types.astype("float32")):
        adata.obsm["types"] = form
        np.testing.assert_allclose(read_cells(adata, **FATE, niche="types").niche, wanted)
    np.testing.assert_allclose(read_cells(adata, **FATE, niche=frame.iloc[::-1]).niche, wanted)


def test_slopes_are_centered_beside_an_intercept(adata):
    time = adata.obs["time"].to_numpy()
    groups = {"batch": "~ 1 + time", "clone": "~ 0 + time + stage"}
    with unchanged(adata):
        cells = read_cells(adata, **FATE, groups=groups)
    assert list(cells.groups) == ["batch"]
    assert list(cells.slopes) == [
        "batch:time",
        "clone:time",
        "clone:stage[early]",
        "clone:stage[late]",
        "clone:stage[mid]",
    ]
    codes, x = cells.slopes["batch:time"]
    np.testing.assert_allclose(x, time - time.mean())
    np.testing.assert_array_equal(codes, cells.groups["batch"])
    np.testing.assert_array_equal(cells.slopes["clone:time"][1], time)  # "~ 0": levels are alike where it is zero
    np.testing.assert_array_equal(cells.slopes["clone:stage[mid]"][1], adata.obs["stage"] == "mid")
    assert "slopes 'clone:time'" in repr(cells)


def test_a_dict_of_intercepts_is_a_list_of_groups(adata):
    one, other = (
        read_cells(adata, **FATE, groups=groups) for groups in (["batch", "half"], {"batch": "~ 1", "half": "~ 1"})
    )
    assert one.group_levels == other.group_levels
    assert not other.slopes


def test_a_covariate_of_whole_levels_is_a_warning(adata):
    adata.obs["age"] = adata.obs["batch"] * 2.0
    with pytest.warns(CellfateWarning, match="column 'age' has one value in each level of 'batch'"):
        read_cells(adata, **FATE, groups={"batch": "~ 1 + age"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_cells(adata, **FATE, groups={"half": "~ 1 + age"})
