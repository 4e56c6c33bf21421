"""Loaders on a small folder made here, and on the real sets where `CELLFATE_DATA` points to them."""

import gzip
import inspect
import os

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import cellfate as cf
from cellfate.datasets import loaders
from cellfate.datasets.loaders import SOURCES
from cellfate.errors import DataError
from cellfate.trees.convert import to_forest

real = pytest.mark.skipif(
    not os.environ.get("CELLFATE_DATA"), reason="CELLFATE_DATA does not point to the folder of real data"
)

# cells, genes, trees, dimensions, as the README of the data states them
SIZES = {
    "ascidian_embryos": (1793, 0, 5, 3),
    "celegans_reporter_embryos": (3434, 0, 9, 3),
    "celegans_gene_atlas": (444, 62, 1, 3),
    "intmemoir_colonies": (1441, 0, 102, 2),
    "fly_hemibrain_hemilineages": (11993, 0, 1, 3),
    "mouse_blastocysts": (11580, 0, 1, 3),
    "kp_tracer_large_tree": (21108, 0, 1, 0),
    "larry_clones_expression": (781, 2481, 1, 0),
    "mcf10a_timelapse": (638, 0, 16, 2),
}


def test_every_source_has_its_loader():
    assert set(SOURCES) == set(SIZES)
    for name in SOURCES:
        loader = getattr(cf.datasets, name)
        assert loader is getattr(loaders, name)
        assert name in cf.datasets.__all__
        assert list(inspect.signature(loader).parameters) == ["path"]


@pytest.fixture(scope="module")
def loaded():
    kept: dict[str, anndata.AnnData] = {}

    def load(name: str) -> anndata.AnnData:
        if name not in kept:
            kept[name] = getattr(cf.datasets, name)()
        return kept[name]

    return load


@real
@pytest.mark.parametrize("name", SOURCES)
def test_real_set_is_what_its_readme_says(name, loaded):
    adata = loaded(name)
    cells, genes, trees, dimensions = SIZES[name]
    assert adata.shape == (cells, genes)
    assert adata.obs_names.is_unique
    tree = adata.uns["tree"]
    forest = to_forest(tree)
    assert forest.n_trees == trees
    assert sorted(forest.names[forest.leaves]) == sorted(adata.obs_names)
    if dimensions:
        assert adata.obsm["spatial"].shape == (cells, dimensions)
        assert np.isfinite(adata.obsm["spatial"]).all()
    else:
        assert "spatial" not in adata.obsm
    assert adata.obs["sample"].dtype == "category"
    if trees > 1:  # each tree holds the cells of its own sample
        assert isinstance(tree, dict)
        assert set(tree) == set(adata.obs["sample"])
        held = pd.Series(np.array(forest.tree_names)[forest.tree[forest.leaves]], forest.names[forest.leaves])
        assert (held.loc[adata.obs_names] == adata.obs["sample"].astype(str)).all()
    else:
        assert isinstance(tree, str)
    assert not any(dtype.kind == "O" for dtype in adata.obs.dtypes if dtype != "category")
    assert not {"x", "y", "z", "cell_id", "emb_x"} & set(adata.obs)
    assert "\n" not in adata.uns["source"]


@real
@pytest.mark.parametrize("name", SOURCES)
def test_real_newick_and_real_edge_table_are_one_tree(name, loaded):
    forest = to_forest(loaded(name).uns["tree"])
    table = pd.read_csv(os.path.join(os.environ["CELLFATE_DATA"], name, "edges.csv"), keep_default_na=False)
    table["branch_length"] = table["branch_length"].astype(float)
    other = to_forest(table)
    leaves = forest.names[forest.leaves]
    one, two = forest.nodes_of(leaves), other.nodes_of(leaves)
    np.testing.assert_allclose(forest.depth[one], other.depth[two], rtol=1e-12)
    some = np.random.default_rng(0).choice(len(leaves), 200)
    depth, other_depth = np.append(forest.depth, -1), np.append(other.depth, -1)
    np.testing.assert_allclose(depth[forest.mrca(one[some])], other_depth[other.mrca(two[some])], rtol=1e-12)


@real
@pytest.mark.parametrize("name", SOURCES)
def test_real_set_survives_the_disk(name, loaded, tmp_path):
    adata = loaded(name)
    adata.write_h5ad(tmp_path / "a.h5ad")
    read = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert read.uns["tree"] == adata.uns["tree"]
    assert read.obs.equals(adata.obs)


@real
def test_positions_and_traits_belong_to_their_cells(loaded):
    """What the READMEs state about particular cells, which a shuffled column would break."""
    worms = loaded("celegans_reporter_embryos")
    share = worms.obs.groupby("founder", observed=True)["reporter_on"].mean()
    assert share["E"] > 0.98
    assert abs(share["ABar"] - 0.40) < 0.02
    assert share.drop(["E", "ABar", "ABal"]).max() < 0.1
    genes = loaded("celegans_gene_atlas")
    gut = genes.obs["founder"] == "E"
    for gene in ("elt-2", "elt-7", "end-3"):
        np.testing.assert_array_equal(np.asarray(genes[:, gene].X).ravel() > 0, gut)
    sea_squirts = loaded("ascidian_embryos")
    for embryo in sea_squirts.obs["sample"].cat.categories:  # left and right are two halves of space
        rows = sea_squirts.obs["sample"] == embryo
        xyz, left = sea_squirts.obsm["spatial"][rows], (sea_squirts.obs["side"] == "left")[rows]
        across = xyz[left].mean(axis=0) - xyz[~left].mean(axis=0)
        side = (xyz - xyz.mean(axis=0)) @ across > 0
        assert (side == left).mean() > 0.9
    colonies = loaded("intmemoir_colonies").obs
    sites = colonies[[f"site_{i}" for i in range(10)]]
    np.testing.assert_array_equal((sites != 1).sum(axis=1), colonies["n_edited"])


@real
def test_counts_are_sparse_and_in_the_order_of_the_cells(loaded):
    adata = loaded("larry_clones_expression")
    assert scipy.sparse.issparse(adata.X)
    assert adata.X.nnz == 225_001
    np.testing.assert_array_equal(adata.X.data, adata.X.data.round())
    for gene, state in (("Ngp", "Neutrophil"), ("Gata2", "Mast"), ("Ccr2", "Monocyte")):  # their textbook markers
        counts = pd.Series(np.asarray(adata[:, gene].X.todense()).ravel(), adata.obs_names)
        assert counts.groupby(adata.obs["state"], observed=True).mean().idxmax() == state
    assert adata.obsm["X_emb"].shape == (781, 2)
    forest = to_forest(adata.uns["tree"])
    clone = forest.names[forest.parent[forest.nodes_of(adata.obs_names)]]
    assert list(clone) == [f"C-{name}" for name in adata.obs["clone"]]


# --- a folder made here: what does not depend on the real data ---


@pytest.fixture
def folder(tmp_path):
    colonies = tmp_path / "intmemoir_colonies"
    colonies.mkdir()
    (colonies / "cells.csv").write_text(
        "cell_id,sample,x,y,dish,n_edited,mother_cycle_frames\nNA,2,1.5,2,s1,3,\nb,2,0,1,s1,4,20\nc,1,5,6,,5,30\n"
    )
    (colonies / "trees.nwk").write_text("(NA:1,b:2)r;\nc:1;\n")
    (colonies / "trees_index.csv").write_text("line,sample\n2,1\n1,2\n")
    atlas = tmp_path / "celegans_gene_atlas"
    atlas.mkdir()
    (atlas / "cells.csv").write_text("cell_id,sample,x,y,z,founder\na,e,1,2,3,AB\nb,e,4,5,6,E\n")
    (atlas / "tree.nwk").write_text("(a:1,b:1)r;\n")
    (atlas / "expression.csv").write_text("cell_id,elt-2,nan\nb,7,0\na,0,3\n")
    counts = tmp_path / "larry_clones_expression"
    counts.mkdir()
    (counts / "cells.csv").write_text("cell_id,sample,clone,emb_x,emb_y\na,c,1,0,1\nb,c,2,2,3\n")
    (counts / "tree.nwk").write_text("((a:1)x:1,(b:1)y:1)r;\n")
    (counts / "genes.csv").write_text("gene\nNA\nGata1\nKit\n")
    with gzip.open(counts / "counts.mtx.gz", "wt") as file:
        file.write("%%MatrixMarket matrix coordinate integer general\n%\n2 3 2\n1 2 5\n2 1 9\n")
    return tmp_path


def test_tables_are_read_to_the_letter(folder):
    adata = cf.datasets.intmemoir_colonies(folder)
    assert list(adata.obs_names) == ["NA", "b", "c"]  # only an empty field is missing
    assert adata.uns["tree"] == {"1": "c:1;", "2": "(NA:1,b:2)r;"}  # by line number, not by order
    assert list(adata.obs.columns) == ["sample", "dish", "n_edited", "mother_cycle_frames"]
    assert list(adata.obs["sample"]) == ["2", "2", "1"]
    assert adata.obs["dish"].isna().tolist() == [False, False, True]
    assert adata.obs["mother_cycle_frames"].isna().tolist() == [True, False, False]
    assert [str(dtype) for dtype in adata.obs.dtypes] == ["category", "category", "int64", "float64"]
    np.testing.assert_array_equal(adata.obsm["spatial"], [[1.5, 2], [0, 1], [5, 6]])
    assert adata.uns["source"] == SOURCES["intmemoir_colonies"].citation


def test_genes_are_aligned_with_cells(folder):
    adata = cf.datasets.celegans_gene_atlas(str(folder))
    assert list(adata.var_names) == ["elt-2", "nan"]
    np.testing.assert_array_equal(adata.X, [[0, 3], [7, 0]])


def test_counts_of_a_small_matrix(folder):
    adata = cf.datasets.larry_clones_expression(folder)
    assert list(adata.var_names) == ["NA", "Gata1", "Kit"]
    np.testing.assert_array_equal(adata.X.toarray(), [[0, 5, 0], [9, 0, 0]])
    assert "spatial" not in adata.obsm
    np.testing.assert_array_equal(adata.obsm["X_emb"], [[0, 1], [2, 3]])


def test_the_folder_can_be_set_once(folder, monkeypatch):
    monkeypatch.setenv("CELLFATE_DATA", str(folder))
    assert cf.datasets.celegans_gene_atlas().n_obs == 2
    monkeypatch.setenv("CELLFATE_DATA", "/nowhere")
    assert cf.datasets.celegans_gene_atlas(folder).n_obs == 2  # the argument goes first


@pytest.mark.parametrize("name", SOURCES)
def test_without_a_folder_it_says_where_the_data_can_be_had(name, monkeypatch):
    monkeypatch.delenv("CELLFATE_DATA", raising=False)
    with pytest.raises(DataError) as caught:
        getattr(cf.datasets, name)()
    message = str(caught.value)
    assert message.startswith(
        f"{name} is read from a local folder, and none was given. Pass `path`, or set CELLFATE_DATA"
    )
    assert SOURCES[name].citation in message
    assert f"github.com/{SOURCES[name].repository}" in message


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("intmemoir_colonies", "cells.csv"),
        ("celegans_gene_atlas", "tree.nwk"),
        ("celegans_gene_atlas", "expression.csv"),
        ("larry_clones_expression", "counts.mtx.gz"),
    ],
)
def test_a_missing_file_is_named(folder, name, file):
    (folder / name / file).unlink()
    with pytest.raises(
        DataError, match=f"{name} has no {file} in .*{name}. Put it there, or correct `path`; the published"
    ):
        getattr(cf.datasets, name)(folder)


def test_a_missing_column_is_named(folder):
    file = folder / "celegans_gene_atlas" / "cells.csv"
    file.write_text(file.read_text().replace(",z,", ",depth,"))
    with pytest.raises(DataError, match=r"cells\.csv has no column 'z'"):
        cf.datasets.celegans_gene_atlas(folder)
