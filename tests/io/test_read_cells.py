"""What comes out of a good AnnData: everything in its place, whatever form it came in."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from treedata import TreeData

import cellfate as cf
from cellfate import CellfateWarning, DataError
from cellfate.cells import Cells
from cellfate.io.anndata import read_cells
from cellfate.kernels.spatial import Matern32
from cellfate.pp import set_tree
from cellfate.trees.convert import to_forest, to_graph
from tests.embryo import N, embryo, half_tree, one_tree, same, trees, unchanged

FATE = {"fate": "fate", "family": "bernoulli"}


def test_everything_arrives_in_the_order_of_the_cells():
    adata = embryo()[np.random.default_rng(1).permutation(N)].copy()
    cells = read_cells(
        adata, **FATE, formula="~ 1 + time", library_key="half", groups=["batch", "clone"], offset="log_size"
    )
    assert cells.names.tolist() == adata.obs_names.tolist()
    np.testing.assert_array_equal(cells.response, adata.obs["fate"] == "neuron")
    assert cells.levels == ("skin", "neuron")
    assert cells.terms == ("Intercept", "time")
    np.testing.assert_array_equal(cells.design, np.column_stack([np.ones(N), adata.obs["time"]]))
    np.testing.assert_array_equal(cells.offset, adata.obs["log_size"])
    np.testing.assert_array_equal(cells.coordinates, adata.obsm["spatial"])
    assert cells.specimens == ("left", "right")
    assert [cells.specimens[code] for code in cells.specimen] == adata.obs["half"].tolist()
    assert cells.group_levels["batch"] == ("1", "2", "3", "4")
    assert [cells.group_levels["clone"][code] for code in cells.groups["clone"]] == adata.obs["clone"].tolist()
    assert cells.forest.names[cells.leaf].tolist() == adata.obs_names.tolist()
    assert cells.trials is None
    assert cells.kept.all()
    assert cells.n == N
    assert cells.n_specimens == 2


TWO_LEVELS = {
    "categorical, in its own order": (pd.Categorical(["b", "a"] * 12, categories=["b", "a"]), ("b", "a"), 1),
    "categorical with unused levels": (pd.Categorical(["b", "a"] * 12, categories=["z", "a", "b", "y"]), ("a", "b"), 0),
    "text": (["b", "a"] * 12, ("a", "b"), 0),
    "pandas text": (pd.array(["b", "a"] * 12, dtype="string"), ("a", "b"), 0),
    "bool": ([True, False] * 12, ("False", "True"), 0),
    "nullable bool": (pd.array([True, False] * 12, dtype="boolean"), ("False", "True"), 0),
    "object bool": (np.array([True, False] * 12, dtype=object), ("False", "True"), 0),
    "0 and 1": ([1, 0] * 12, ("0", "1"), 0),
    "0.0 and 1.0": ([1.0, 0.0] * 12, ("0", "1"), 0),
    "other integers": ([7, -1] * 12, ("-1", "7"), 0),
    "nullable integers": (pd.array([1, 0] * 12, dtype="Int64"), ("0", "1"), 0),
}


@pytest.mark.parametrize(("values", "levels", "odd"), TWO_LEVELS.values(), ids=TWO_LEVELS)
def test_second_level_is_one(values, levels, odd):
    adata = embryo()
    adata.obs["state"] = values
    cells = read_cells(adata, "state", family="bernoulli")
    assert cells.levels == levels
    np.testing.assert_array_equal(cells.response, np.resize([1.0 - odd, odd], N))
    assert cells.response.dtype == np.float64


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, lambda x: x.toarray()])
def test_a_gene_is_a_fate(form):
    adata = embryo()
    counts = adata.X.toarray()
    adata.X = form(adata.X)
    cells = read_cells(adata, "pha-4", family="poisson", lineage=None)
    np.testing.assert_array_equal(cells.response, counts[:, 1])
    assert cells.response_name == "pha-4"


@pytest.mark.parametrize("dtype", ["int8", "uint16", "float32", "Int64", "Float64", object])
def test_counts_of_any_type(dtype):
    adata = embryo()
    wanted = adata.obs["count"].to_numpy(float)
    adata.obs["count"] = adata.obs["count"].astype(dtype)
    cells = read_cells(adata, "count", family="negative_binomial")
    assert cells.response.dtype == np.float64
    np.testing.assert_array_equal(cells.response, wanted)


@pytest.mark.parametrize(
    "trials", ["sites", 10, 10.0, np.full(N, 10), [10] * N, pd.Series(10, index=[f"c{i}" for i in range(N)])]
)
def test_trials_in_every_form(trials):
    adata = embryo()
    cells = read_cells(adata, "edited", family="binomial", trials=trials)
    np.testing.assert_array_equal(cells.response, adata.obs["edited"])
    np.testing.assert_array_equal(cells.trials, np.full(N, 10.0))


def test_series_are_matched_by_name_and_arrays_by_position():
    adata = embryo()
    order = np.random.default_rng(2).permutation(N)
    values = np.arange(N, dtype=float)
    by_name = pd.Series(values, index=adata.obs_names).iloc[order]
    for offset in (values, by_name, pd.Series(values)):  # the last has no names
        np.testing.assert_array_equal(read_cells(adata, **FATE, offset=offset).offset, values)
    frame = pd.DataFrame(adata.obsm["spatial"], index=adata.obs_names, columns=["x", "y"])
    for spatial in (adata.obsm["spatial"], frame.iloc[order], "spatial"):
        np.testing.assert_array_equal(read_cells(adata, **FATE, spatial=spatial).coordinates, adata.obsm["spatial"])


def test_coordinates_in_three_dimensions_and_as_a_frame():
    adata = embryo()
    xyz = np.random.default_rng(0).integers(0, 500, (N, 3))
    adata.obsm["spatial"] = pd.DataFrame(xyz, index=adata.obs_names, columns=list("xyz"))
    coordinates = read_cells(adata, **FATE).coordinates
    assert coordinates.dtype == np.float64
    np.testing.assert_array_equal(coordinates, xyz)


def test_components_can_be_left_out():
    cells = read_cells(embryo(tree=False), **FATE, lineage=None)
    assert cells.forest is None
    assert cells.leaf is None
    cells = read_cells(embryo(), **FATE, spatial=None)
    assert cells.coordinates is None
    cells = read_cells(embryo(tree=False), **FATE, lineage=None, spatial=None, groups="batch")
    assert list(cells.groups) == ["batch"]


def test_views_stay_views():
    view = embryo()[5:20]
    with unchanged(view):
        cells = read_cells(view, **FATE, formula="~ 1 + time", library_key="half", groups="batch", offset="log_size")
    assert view.is_view
    assert cells.names.tolist() == [f"c{i}" for i in range(5, 20)]


@pytest.mark.parametrize("by_specimen", [False, True])
@pytest.mark.parametrize("missing", ["drop", "isolate"])
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_files_give_back_the_same_cells(tmp_path, suffix, missing, by_specimen):
    adata = embryo(tree=False)
    adata.obs["alive"] = np.resize([True, True, False, False, True], N)
    set_tree(
        adata,
        trees() | {"right": half_tree(N // 2, N - 1) + ";"} if by_specimen else half_tree(0, N - 1) + ";",
        missing=missing,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the writers, about formats
        getattr(adata, f"write_{suffix}")(tmp_path / f"embryo.{suffix}")
        back = getattr(anndata, f"read_{suffix}")(tmp_path / f"embryo.{suffix}")
        arguments = {"formula": "~ 1 + stage + alive", "library_key": "half", "groups": "clone"}
        for fate, family in (("fate", "bernoulli"), ("alive", "bernoulli"), ("count", "poisson"), ("hlh-1", "poisson")):
            formula = {} if fate != "alive" else {"formula": "~ 1 + stage"}
            with unchanged(back):
                same(read_cells(back, fate, family=family, **arguments | formula),
                     read_cells(adata, fate, family=family, **arguments | formula))  # fmt: skip


def test_backed_files_are_read(tmp_path):
    adata = embryo()
    adata.write_h5ad(tmp_path / "embryo.h5ad")
    backed = anndata.read_h5ad(tmp_path / "embryo.h5ad", backed="r")
    cells = read_cells(backed, "pha-4", family="poisson")
    np.testing.assert_array_equal(cells.response, adata.X.toarray()[:, 1])
    backed.file.close()


def treedata(*, label="tree", **obst):
    plain = embryo(tree=False)
    return TreeData(
        plain.X, obs=plain.obs, var=plain.var, obsm={"spatial": plain.obsm["spatial"]}, obst=obst, label=label
    )


def test_treedata_keeps_trees_in_obst():
    tdata = treedata(tree=to_graph(to_forest(one_tree())))
    with unchanged(tdata):
        same(read_cells(tdata, **FATE), read_cells(embryo(), **FATE))
    few = tdata[:10]
    with unchanged(few):
        same(read_cells(few, **FATE), read_cells(embryo()[:10], **FATE))


def test_treedata_set_tree(tmp_path):
    tdata = treedata()
    set_tree(tdata, one_tree())
    wanted = read_cells(embryo(), **FATE)
    same(read_cells(tdata, **FATE), wanted)
    import treedata as td

    tdata.write_h5td(tmp_path / "embryo.h5td")
    same(read_cells(td.read_h5td(tmp_path / "embryo.h5td"), **FATE), wanted)


def test_treedata_with_a_tree_per_clone():
    """`label` names the obs column that says which tree a cell is in; as a lineage it stands for all of them."""
    halves = {name: to_graph(to_forest(text)) for name, text in trees().items()}
    cells = read_cells(treedata(label="clones", **halves), **FATE, lineage="clones")
    same(cells, read_cells(embryo(), **FATE, lineage=list(trees().values())))


def test_treedata_overlapping_trees_are_refused():
    tdata = treedata(label="clones", one=to_graph(to_forest(one_tree())), left=to_graph(to_forest(trees()["left"])))
    with pytest.raises(DataError, match=r"trees obst: .*12 leaf names occur more than once"):
        read_cells(tdata, **FATE, lineage="clones")


def test_shared_positions_are_counted():
    adata = embryo()
    adata.obsm["spatial"][[3, 4, 15]] = adata.obsm["spatial"][0]
    with pytest.warns(CellfateWarning, match=r"4 of 24 cells share their position .*'c0', 'c3', 'c4', 'c15'"):
        cells = read_cells(adata, **FATE)
    assert cells.n == N
    with pytest.warns(
        CellfateWarning, match=r"3 of 24 cells share their position .*'c0', 'c3', 'c4'"
    ):  # c15 is elsewhere
        read_cells(adata, **FATE, library_key="half")


def test_shared_positions_leave_the_covariance_positive_semidefinite():
    adata = embryo()
    adata.obsm["spatial"][[3, 4, 15]] = adata.obsm["spatial"][0]
    with pytest.warns(CellfateWarning, match="share their position"):
        cells = read_cells(adata, **FATE)
    kernel = Matern32(cells.coordinates, cells.specimen)
    like = torch.zeros(0, dtype=torch.float64)
    structure = kernel.structure({"lengthscale": torch.tensor(20.0, dtype=torch.float64)}, like)
    k = structure.dense(kernel.geometry(torch.arange(N)[None]))[0]
    assert k[0, 3] == k[0, 0]
    assert torch.linalg.eigvalsh(k).min() > -1e-12


def test_specimens_of_one_cell_are_legal():
    adata = embryo()
    adata.obs["half"] = ["alone", *["rest"] * (N - 1)]
    assert read_cells(adata, **FATE, library_key="half").n_specimens == 2


def test_observation_level_effects():
    adata = embryo()
    adata.obs["cell"] = adata.obs_names
    assert len(read_cells(adata, "count", family="poisson", groups="cell").group_levels["cell"]) == N
    assert read_cells(adata, "edited", family="binomial", trials="sites", groups="cell").n == N
    # of a group the model warns, once; of clones, which are a tree to it, the reader
    clones = {"lineage": "cell", "lineage_kernel": "clone"}
    for arguments in ({"lineage": None, "spatial": None, "groups": "cell"}, clones | {"spatial": None}):
        with pytest.warns(CellfateWarning) as said:
            cf.tl.decompose(adata, "count", family="negative_binomial", rng=0, **arguments)
        assert sum("dispersion of the negative binomial" in str(w.message) for w in said) == 1


def cells_fields():
    cells = read_cells(embryo(), **FATE, groups="batch", library_key="half")
    return {field: getattr(cells, field) for field in Cells.__dataclass_fields__}


@pytest.mark.parametrize(("changes", "text"), [
    ({"response": np.zeros(3)}, "Cells.response has 3 rows for 24 cells"),
    ({"coordinates": np.zeros((3, 2))}, "Cells.coordinates has 3 rows"),
    ({"groups": {"batch": np.zeros(3, dtype=int)}}, r"Cells.groups\['batch'\] has 3 rows"),
    ({"terms": ("a", "b")}, "Cells.design has shape"),
    ({"leaf": None}, "belong together"),
    ({"kept": np.zeros(N, dtype=bool)}, "Cells.kept marks 0 rows"),
    ({"group_levels": {}}, "different names"),
    ({"specimens": ("left",)}, "Cells.specimen has codes outside 0..0"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_cells_check_themselves(changes, text):
    Cells(**cells_fields())
    with pytest.raises(DataError, match=text):
        Cells(**cells_fields() | changes)


def test_cells_are_plain_data():
    import pickle

    cells = read_cells(embryo(), **FATE, groups="batch")
    same(pickle.loads(pickle.dumps(cells)), cells)
    assert "24 cells" in repr(cells)


def test_a_hundred_thousand_cells_take_seconds():
    import time

    n = 100_000
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {"fate": rng.integers(0, 2, n), "half": rng.integers(0, 20, n)}, index=[f"c{i}" for i in range(n)]
    )
    adata = AnnData(obs=obs, obsm={"spatial": rng.normal(size=(n, 2))})
    forest = "".join(f"(c{i}:1,c{i + 1}:1,c{i + 2}:1,c{i + 3}:1);\n" for i in range(0, n, 4))
    begin = time.perf_counter()
    set_tree(adata, forest)
    cells = read_cells(adata, "fate", family="bernoulli", library_key="half")
    assert cells.n == n
    assert time.perf_counter() - begin < 30  # about 5; comparing every pair of names would take hours
