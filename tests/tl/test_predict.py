"""From a stored fit back to effects where there is no cell: every way of fitting can be read again, also from a file."""

import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from scipy.spatial import KDTree
from treedata import TreeData

import cellfate as cf
from cellfate import CellfateWarning, DataError
from cellfate.inference.predict import spread
from cellfate.kernels import Matern32
from cellfate.model.priors import Normal
from cellfate.tl.components import components_of
from cellfate.trees.convert import to_forest, to_graph
from tests.embryo import HALVES, N, embryo, half_tree, one_tree, same, trees, unchanged
from tests.problem import entries

COLUMNS = ["node", "tree", "parent", "depth", "mean", "sd", "is_leaf", "n_cells"]
FAR = 1e6
pytestmark = pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")


def fitted(adata=None, fate="size", family="gaussian", **arguments):
    adata = embryo() if adata is None else adata
    cf.tl.decompose(adata, fate, family=family, rng=0, **arguments)
    return adata


def from_file(adata, tmp_path):
    adata.write_h5ad(tmp_path / "fit.h5ad")
    return anndata.read_h5ad(tmp_path / "fit.h5ad")


def agree(found, effects, component, rtol=0.1):
    """With the effects that the fit itself found in the cells, as far as draws of hyperparameters do."""
    mean, sd = effects[f"{component}_mean"], effects[f"{component}_sd"]
    np.testing.assert_allclose(found["mean"], mean, atol=0.25 * float(sd.max()))
    np.testing.assert_allclose(np.mean(found["sd"]), np.mean(sd), rtol=rtol)


def at_cells(adata, key="cellfate", **handed):
    """Predictions at the cells, by their leaves and by their positions."""
    cf.tl.predict(adata, "ancestors", key=key, draws=256, rng=1, **handed)
    return cf.get.ancestors(adata, key).set_index("node").loc[adata.obs_names]


@pytest.fixture(scope="module")
def one():
    return fitted()


@pytest.fixture(scope="module")
def two():
    """Two halves as specimens, each with a tree."""
    adata = embryo(tree=False)
    cf.pp.set_tree(adata, trees())
    return fitted(adata, library_key="half")


def test_ancestors_of_one_embryo(one):
    adata = one.copy()
    assert cf.tl.predict(adata, "ancestors", rng=0) is None
    table = cf.get.ancestors(adata)
    assert list(table.columns) == COLUMNS
    assert table["node"].is_unique
    assert table["n_cells"].tolist().count(1) == N == table["is_leaf"].sum()
    (root,) = table.index[table["parent"] == ""]
    assert table.loc[root, ["node", "depth", "mean", "sd", "n_cells"]].tolist() == ["zygote", 0.0, 0.0, 0.0, N]
    assert set(table["parent"]) - {""} == set(table.loc[~table["is_leaf"], "node"])
    assert np.isfinite(table[["mean", "sd"]]).all(axis=None)
    agree(at_cells(adata), cf.get.effects(adata), "lineage")
    # brownian, and no cell but the leaves: an ancestor of two is where its neighbors in the tree pull it
    parent = table.set_index("node").loc["g1_0"]
    assert parent["sd"] < table.set_index("node").loc["c0", "sd"]


def test_a_file_holds_the_table_and_all_it_takes_to_predict(one, tmp_path):
    adata = one.copy()
    cf.tl.predict(adata, "ancestors", rng=0)
    back = from_file(adata, tmp_path)
    pd.testing.assert_frame_equal(cf.get.ancestors(back), cf.get.ancestors(adata))
    del back.uns["cellfate"]["ancestors"]
    cf.tl.predict(back, "ancestors", rng=0)
    pd.testing.assert_frame_equal(cf.get.ancestors(back), cf.get.ancestors(adata))
    xyz = adata.obsm["spatial"][:4]
    pd.testing.assert_frame_equal(cf.tl.predict(back, xyz, rng=0), cf.tl.predict(adata, xyz, rng=0))


def test_a_copy_and_a_view_leave_the_object_alone(one):
    with unchanged(one):
        out = cf.tl.predict(one, "ancestors", rng=0, copy=True)
        cf.tl.predict(one, "grid", size=4, rng=0)
        view = one[:]
        cf.tl.predict(view, "ancestors", rng=0)
    pd.testing.assert_frame_equal(cf.get.ancestors(out), cf.get.ancestors(view))


def test_a_new_fit_drops_the_ancestors_of_the_old(one):
    adata = one.copy()
    cf.tl.predict(adata, "ancestors", rng=0)
    fitted(adata)
    with pytest.raises(DataError, match=r"no 'ancestors'. Run `cf.tl.predict\(adata, 'ancestors'\)` first"):
        cf.get.ancestors(adata)
    adata.uns["other"] = adata.uns["cellfate"]
    with pytest.raises(DataError, match=r"cf.tl.predict\(adata, 'ancestors', key='other'\)"):
        cf.get.ancestors(adata, "other")


def test_positions_of_one_embryo(one):
    xyz = one.obsm["spatial"]
    found = cf.tl.predict(one, xyz, draws=64, rng=0)
    assert list(found.columns) == ["x", "y", "mean", "sd"]
    np.testing.assert_array_equal(found[["x", "y"]], xyz)
    agree(found, cf.get.effects(one), "spatial")


def test_far_away_the_field_is_as_before_the_data(one):
    """Mean over the draws of the variance, divided by what the kernel's own is among the cells."""
    (away,) = cf.tl.predict(one, [[FAR, FAR]], rng=0).itertuples()
    draws = cf.get.draws(one).filter(regex="^(variance|lengthscale)")
    # in the order of the model's parameters
    names = ["variance_lineage", "variance_spatial", "variance_residual", "lengthscale_spatial"]
    chosen = draws.iloc[spread({n: draws[n].to_numpy() for n in names}, 16, np.random.default_rng(0))]
    expected = []
    for variance, lengthscale in zip(chosen["variance_spatial"], chosen["lengthscale_spatial"], strict=True):
        k = entries(Matern32(one.obsm["spatial"]), lengthscale=lengthscale).numpy()
        expected.append(variance * (N - 1) / (N - k.sum() / N))
    assert away.mean == pytest.approx(0.0, abs=1e-9)
    assert away.sd**2 == pytest.approx(np.mean(expected))


def test_positions_in_a_frame_keep_its_index_and_names(one):
    frame = pd.DataFrame({"row": [1.0, 50.0], "column": [3.0, 40.0]}, index=["a", "b"])
    found = cf.tl.predict(one, frame, rng=0)
    assert list(found.columns) == ["row", "column", "mean", "sd"]
    assert list(found.index) == ["a", "b"]
    again = cf.tl.predict(one, found.rename(columns={"row": "x", "column": "y"}), rng=0)
    np.testing.assert_array_equal(again["mean"], found["mean"])


def test_several_embryos(two):
    effects = cf.get.effects(two)
    at = at_cells(two)
    agree(at, effects, "lineage")
    assert list(at["tree"]) == list(two.obs["half"])
    xyz = two.obsm["spatial"]
    found = cf.tl.predict(two, xyz, library=two.obs["half"], draws=64, rng=0)
    agree(found, effects, "spatial")
    assert list(found["specimen"]) == list(two.obs["half"])
    other = cf.tl.predict(two, xyz, library="left", draws=64, rng=0)
    left = (two.obs["half"] == "left").to_numpy()
    np.testing.assert_allclose(other["mean"][left], found["mean"][left])
    assert not np.allclose(other["mean"][~left], found["mean"][~left])
    frame = pd.DataFrame(xyz, columns=["x", "y"], index=two.obs_names).assign(half=two.obs["half"])
    by_column = cf.tl.predict(two, frame, draws=64, rng=0)
    np.testing.assert_array_equal(by_column["mean"], found["mean"])
    by_specimen = cf.tl.predict(two, by_column, draws=64, rng=0)
    pd.testing.assert_frame_equal(by_specimen, by_column)


def test_a_grid_covers_the_cells_of_each_specimen(two):
    found = cf.tl.predict(two, "grid", size=9, rng=0)
    assert list(found.columns) == ["x", "y", "specimen", "mean", "sd"]
    for half in HALVES:
        grid = found.loc[found["specimen"] == half, ["x", "y"]].to_numpy()
        cells = two.obsm["spatial"][two.obs["half"] == half]
        extent = np.ptp(cells, axis=0)
        spacing = extent.max() / 8
        nearest = np.median(KDTree(cells).query(cells, k=2)[0][:, 1])
        assert ((grid >= cells.min(0) - 1e-9) & (grid <= cells.max(0) + 1e-9)).all()
        assert KDTree(cells).query(grid)[0].max() <= max(spacing, 3 * nearest)
        assert KDTree(grid).query(cells)[0].max() < 1.5 * spacing
        assert len(grid) <= 81
        np.testing.assert_allclose(KDTree(grid).query(grid, k=2)[0][:, 1], spacing)


def test_a_grid_in_three_dimensions():
    adata = embryo()
    adata.obsm["spatial"] = np.random.default_rng(0).normal(size=(N, 3))
    found = cf.tl.predict(fitted(adata, lineage=None), "grid", size=5, rng=0)
    assert list(found.columns) == ["x", "y", "z", "mean", "sd"]
    assert 20 < len(found) <= 125


# --- trees that are objects ---


def tree_data(graph, **settings):
    plain = embryo(tree=False)
    adata = TreeData(plain.X, obs=plain.obs, var=plain.var, obsm={"spatial": plain.obsm["spatial"]}, **settings)
    adata.obst["tree"] = graph
    return adata


def test_the_nodes_of_a_tree_object_carry_the_effects():
    graph = to_graph(to_forest(one_tree()))
    graph.nodes["zygote"]["note"] = "kept"
    adata = fitted(tree_data(graph, alignment="leaves"))
    for _ in range(2):  # its own it may replace
        cf.tl.predict(adata, "ancestors", rng=0)
    table = cf.get.ancestors(adata).set_index("node")
    nodes = adata.obst["tree"].nodes
    assert set(nodes) == set(table.index)
    for node, data in nodes(data=True):
        assert (data["cellfate_lineage_mean"], data["cellfate_lineage_sd"]) == tuple(table.loc[node, ["mean", "sd"]])
        assert type(data["cellfate_lineage_sd"]) is float
    assert nodes["zygote"]["note"] == "kept"
    out = cf.tl.predict(adata, "ancestors", rng=5, copy=True)
    assert out.obst["tree"].nodes["g1_0"] != nodes["g1_0"]


def test_attributes_of_others_stay(tmp_path):
    adata = fitted(tree_data(to_graph(to_forest(one_tree())), alignment="leaves"))
    adata.obst["tree"].nodes["g1_0"]["cellfate_lineage_mean"] = "mine"
    with (
        unchanged(adata),
        pytest.raises(DataError, match="node 'g1_0' of the tree has 'cellfate_lineage_mean' already"),
    ):
        cf.tl.predict(adata, "ancestors")


def test_leaves_without_a_cell_have_ancestors_too():
    """The fit prunes them; here they are asked for. What is known of the cells stays."""
    larger = f"(({half_tree(0, N // 2)},(lost1:1,lost2:2)lost:0.5)a:1,({half_tree(N // 2, N)},lost3:1)b:0)zygote;"
    effects = {}
    for kernel in ("brownian", "ou", "pagel", "early_burst"):
        adata = fitted(tree_data(to_graph(to_forest(larger)), alignment="subset"), lineage_kernel=kernel, spatial=None)
        table = at_cells(adata)
        agree(table, cf.get.effects(adata), "lineage")
        nodes = adata.obst["tree"].nodes
        lost = cf.get.ancestors(adata).set_index("node").loc[["lost1", "lost2", "lost3", "lost"]]
        assert lost["n_cells"].tolist() == [0, 0, 0, 0]
        assert lost["is_leaf"].tolist() == [True, True, True, False]
        assert lost.loc["lost1", "mean"] == pytest.approx(nodes["lost1"]["cellfate_lineage_mean"])
        assert lost.loc["lost", "sd"] <= lost.loc["lost1", "sd"] <= lost.loc["lost2", "sd"] + 1e-9
        effects[kernel] = lost["mean"]
    assert effects["brownian"]["lost1"] == pytest.approx(
        effects["brownian"]["lost"]
    )  # it drifts, to nowhere in particular
    assert abs(effects["ou"]["lost1"]) < abs(effects["ou"]["lost"])


def test_one_tree_object_per_clone():
    plain = embryo(tree=False)
    adata = TreeData(
        plain.X, obs=plain.obs, obsm={"spatial": plain.obsm["spatial"]}, alignment="leaves", label="clone_tree"
    )
    for half, text in trees().items():
        adata.obst[half] = to_graph(to_forest(text))
    fitted(adata, lineage="clone_tree")
    cf.tl.predict(adata, "ancestors", rng=0)
    table = cf.get.ancestors(adata)
    for half in HALVES:
        own = table[table["tree"] == half]
        means = [data["cellfate_lineage_mean"] for _, data in adata.obst[half].nodes(data=True)]
        np.testing.assert_allclose(sorted(means), sorted(own["mean"]))


# --- every way of fitting ---

GROUPS = {"batch": "~ 1 + time", "clone": None, "stage": "~ 0 + time"}
FITS = {
    "groups": {"groups": ["batch", "stage"], "formula": "~ 1 + time"},
    "slopes": {"groups": GROUPS},
    "covarying": {"groups": {"batch": "(1 + time | batch)", "stage": "~ 1"}},
    "an interaction": {"interaction": True},
    "specimens": {"library_key": "stage"},  # of three, each gets an intercept
    "no specimens": {"library_key": "stage", "groups": []},
    "held": {"priors": {"sd_lineage": ("fixed", 1.5), "beta": ("normal", 20.0)}, "lengthscale": 30.0},
    "a prior object": {"priors": {"beta": Normal(20.0), "sd_spatial": ("half_normal", 1)}},
    "maximized": {"reml": False, "formula": "~ 1 + time"},
    "counts": {"fate": "count", "family": "negative_binomial", "offset": "log_size"},
    "many tries": {"fate": "edited", "family": "binomial", "trials": 10, "link": "probit"},
    "tries in a column": {"fate": "edited", "family": "binomial", "trials": "sites", "method": "ep"},
    "a gene": {"fate": "elt-2", "family": "poisson"},
    "overdispersed": {"fate": "count", "family": "poisson", "olre": True},
    "clones": {"lineage": "clone", "lineage_kernel": "clone"},
    "early burst": {"lineage_kernel": "early_burst", "spatial_kernel": "rbf"},
    "sweeps": {"engine": "structured", "rank": 16, "lineage_kernel": "ou"},
    "single precision": {"dtype": "float32", "formula": "~ 1"},
    "a graph": {"spatial_kernel": "graph", "graph": "near", "rank": 12},
    "a graph and a niche": {"spatial_kernel": "graph", "niche": "types", "graph": "near"},
    "niche": {"niche": "types"},
    "without a field": {"spatial": None, "niche": "types", "graph": "near"},
}


def full_embryo():
    adata = embryo()
    adata.obs["a/b"] = adata.obs["batch"]
    near = np.linalg.norm(adata.obsm["spatial"][:, None] - adata.obsm["spatial"], axis=-1)
    adata.obsp["near"] = csr_matrix(((near < 35) & (near > 0)).astype(float))
    adata.obsm["types"] = np.eye(3)[np.arange(N) % 3]
    return adata


@pytest.fixture
def seen(monkeypatch):
    """The cells of each fit and of each prediction."""
    found = []

    def noting(cells, *arguments, **more):
        model = {name: value for name, value in more.items() if name != "tree"}  # of messages only
        found.append((cells, (*arguments, *model.values())))
        return components_of(cells, *arguments, **more)

    for module in ("decompose", "fitted"):
        monkeypatch.setattr(sys.modules[f"cellfate.tl.{module}"], "components_of", noting)
    return found


@pytest.mark.parametrize("name", FITS)
def test_every_fit_can_be_read_again(name, tmp_path, seen):
    adata = from_file(fitted(full_embryo(), **FITS[name]), tmp_path)
    effects = cf.get.effects(adata)
    agree(at_cells(adata), effects, "lineage", rtol=0.2)
    (cells, arguments), (again, its_arguments) = seen
    assert all(one == other for one, other in zip(arguments, its_arguments, strict=True) if other)  # "": not in the fit
    same(again, cells)
    assert repr((again.trials, again.groups, again.slopes)) == repr((cells.trials, cells.groups, cells.slopes))
    np.testing.assert_array_equal(again.niche, cells.niche)
    assert again.graph is None or abs(again.graph - cells.graph).max() == 0
    if FITS[name].get("spatial_kernel") == "graph" or "spatial" in FITS[name]:
        return
    library = {"library": adata.obs[FITS[name]["library_key"]]} if "library_key" in FITS[name] else {}
    # few columns leave much of the field to the cells themselves; 1,024 draws know a spread with a heavy tail to a tenth
    rtol = 0.4 if name == "sweeps" else 0.3
    agree(cf.tl.predict(adata, adata.obsm["spatial"], draws=1024, rng=0, **library), effects, "spatial", rtol=rtol)


def test_names_with_a_slash(tmp_path):
    adata = from_file(fitted(full_embryo(), groups={"a/b": "~ 1 + time"}), tmp_path)
    agree(at_cells(adata), cf.get.effects(adata), "lineage")


@pytest.mark.parametrize("missing", ["drop", "isolate"])
def test_cells_without_a_leaf(missing, tmp_path):
    adata = embryo(tree=False)
    cf.pp.set_tree(adata, half_tree(0, 20) + ";", missing=missing)
    fitted(adata)
    back = from_file(adata, tmp_path)
    cf.tl.predict(back, "ancestors", draws=256, rng=0)
    table = cf.get.ancestors(back).set_index("node")
    assert ("c22" in table.index) == (missing == "isolate")
    assert table["n_cells"].max() == 20
    kept = [name for name in adata.obs_names if name in table.index]
    agree(table.loc[kept], cf.get.effects(back).loc[kept], "lineage", rtol=0.2)


def test_what_was_handed_over_is_handed_over_again(tmp_path):
    adata = embryo(tree=False)
    handed = {"lineage": to_graph(to_forest(one_tree())), "spatial": adata.obsm.pop("spatial"), "offset": np.ones(N)}
    adata = from_file(fitted(adata, fate="count", family="poisson", **handed), tmp_path)
    for name, what in (("lineage", "tree"), ("spatial", "coordinates"), ("offset", "what it was")):
        rest = {k: v for k, v in handed.items() if k != name}
        with pytest.raises(DataError, match=f"made with a {name} that was handed over.*{name}=<{what}>"):
            cf.tl.predict(adata, "ancestors", **rest)
    agree(at_cells(adata, **handed), cf.get.effects(adata), "lineage")
    with pytest.raises(DataError, match="niche is given, but the fit had none"):
        cf.tl.predict(adata, "ancestors", **handed, niche="types")


def test_a_graph_that_was_handed_over():
    adata = full_embryo()
    near = adata.obsp.pop("near")
    fitted(adata, spatial_kernel="graph", graph=near)
    with pytest.raises(DataError, match="spatial=<graph>"):
        cf.tl.predict(adata, "ancestors")
    one, other = at_cells(adata, graph=near), at_cells(adata, spatial=near)
    np.testing.assert_array_equal(one["mean"], other["mean"])


# --- what cannot be ---


def test_without_a_fit(one):
    with pytest.raises(DataError, match="No decomposition under 'cellfate'"):
        cf.tl.predict(embryo(), "ancestors")
    with pytest.raises(DataError, match=r"No decomposition under 'other'.*use key='cellfate'"):
        cf.tl.predict(one, "ancestors", key="other")


def test_without_lineage_and_without_positions():
    adata = fitted(lineage=None)
    with pytest.raises(DataError, match="the fit of 'size' has no lineage"):
        cf.tl.predict(adata, "ancestors")
    adata = fitted(spatial=None)
    with pytest.raises(DataError, match="the fit of 'size' has no spatial field"):
        cf.tl.predict(adata, "grid")
    adata = fitted(full_embryo(), spatial_kernel="graph", graph="near")
    with pytest.raises(DataError, match="on a neighbor graph, and has no value between"):
        cf.tl.predict(adata, np.zeros((1, 2)))


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("ancestor", {}, "unknown target 'ancestor'; did you mean 'ancestors'"),
        (np.zeros((2, 3)), {}, r"shape \(2, 3\), wanted \(k, 2\)"),
        (np.zeros(2), {}, r"shape \(2,\)"),
        (np.zeros((0, 2)), {}, r"shape \(0, 2\)"),
        ([["a", "b"]], {}, "hold no numbers|holds no numbers"),
        ([[np.nan, 0.0]], {}, "positions"),
        (
            pd.DataFrame(np.zeros((1, 3)), columns=["u", "v", "w"]),
            {},
            "columns 'u', 'v', 'w': wanted x, y, or 2 columns",
        ),
        (np.zeros((1, 2)), {"library": "left"}, "had no library_key"),
        (np.zeros((1, 2)), {"size": 5}, "size is for target='grid'"),
        ("ancestors", {"size": 5}, "size is for target='grid'"),
        ("grid", {"size": 1}, "size is 1, wanted"),
        ("grid", {"library": "left"}, "library is for positions"),
        ("grid", {"draws": 0}, "draws is 0"),
    ],
)
def test_targets_that_are_refused(one, target, options, message):
    with unchanged(one), pytest.raises(DataError, match=message):
        cf.tl.predict(one, target, **options)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (None, r"obs\['half'\] has a field of its own: say with library="),
        ("lft", "1 specimens are not in obs.*'lft'; similar: 'left'"),
        (["left"], r"library has shape \(1,\) for 2 positions"),
        (["left", None], "library is NaN in 1 of 2"),
    ],
)
def test_specimens_that_are_refused(two, library, message):
    with pytest.raises(DataError, match=message):
        cf.tl.predict(two, np.zeros((2, 2)), library=library)


def test_other_cells_than_those_of_the_fit(one):
    with pytest.raises(DataError, match="made on 24 cells, and 20 are read now, 20 of them the same"):
        cf.tl.predict(one[:20].copy(), "ancestors")
    adata = one.copy()
    cf.pp.set_tree(adata, half_tree(0, 20) + ";", missing="drop")
    with pytest.raises(DataError, match="made on 24 cells, and 20 are read now"):
        cf.tl.predict(adata, "ancestors")


def test_nothing_is_said_twice(recwarn):
    adata = embryo(tree=False)
    cf.pp.set_tree(adata, half_tree(0, 20) + ";", missing="drop")
    fitted(adata)
    recwarn.clear()
    cf.tl.predict(adata, "ancestors", rng=0)
    assert [w for w in recwarn if issubclass(w.category, CellfateWarning)] == []


def test_a_gene_is_read_from_its_layer_again():
    adata = embryo()
    adata.layers["other"] = adata.X.copy()
    adata.X = np.full(adata.shape, 0.5)  # no counts: reading these would not even work
    fitted(adata, fate="elt-2", family="poisson", layer="other")
    agree(at_cells(adata), cf.get.effects(adata), "lineage", rtol=0.2)


def test_of_many_fates_there_is_nothing_to_predict_from():
    adata = embryo()
    cf.tl.decompose(adata, ["elt-2", "pha-4"], family="poisson", lengthscale=30.0, rng=0)
    with pytest.raises(DataError, match="holds the fits of 2 fates"):
        cf.tl.predict(adata, "ancestors")


def test_a_new_fit_takes_the_old_ancestors_away():
    adata = tree_data(to_graph(to_forest(one_tree())))
    fitted(adata)
    cf.tl.predict(adata, "ancestors", rng=0)
    assert "cellfate_lineage_mean" in adata.obst["tree"].nodes["zygote"]
    fitted(adata)
    assert not any("cellfate_lineage_mean" in data for _, data in adata.obst["tree"].nodes(data=True))
