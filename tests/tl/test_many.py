"""Many responses: each as it would be alone, whatever the order, the chunks and the company; one that fails harms no other."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import cellfate as cf
from cellfate.errors import DataError
from cellfate.io.many import columns_of_matrix

N, GENES = 60, 6
BAD = {"silent": 0.0, "unknown": np.nan}
SETTINGS = {"family": "poisson", "layer": "counts", "rng": 3, "lengthscale": 0.7}


def complaint(call):
    with pytest.raises(DataError) as e:
        call()
    return str(e.value)


pytestmark = pytest.mark.filterwarnings("ignore::cellfate.CellfateWarning")


@pytest.fixture(scope="module")
def embryo():
    adata = cf.datasets.simulate(N, family="poisson", rng=4)
    rng = np.random.default_rng(5)
    rate = np.exp(0.3 * (adata.obs["fate"].to_numpy() > 1))[:, None] * rng.uniform(0.5, 3, GENES)
    counts = np.column_stack([rng.poisson(rate).astype(float), *(np.full(N, value) for value in BAD.values())])
    names = [f"gene{i}" for i in range(GENES)] + list(BAD)
    out = ad.AnnData(np.zeros_like(counts), obs=adata.obs, obsm=dict(adata.obsm), uns=dict(adata.uns))
    out.var_names = names
    out.layers["counts"] = sparse.csr_matrix(counts)
    return out


@pytest.fixture(scope="module")
def fitted(embryo):
    return cf.tl.decompose(embryo, list(embryo.var_names), **SETTINGS, copy=True)


def tables(adata):
    by = ["response", "component"]
    return (
        cf.get.components(adata).sort_values(by, ignore_index=True),
        cf.get.draws(adata).sort_values("response", kind="stable", ignore_index=True),
    )


def test_each_is_what_it_is_alone(embryo, fitted):
    name = "gene2"
    alone = cf.GLMM(
        "poisson",
        {
            "lineage": cf.kernels.Brownian(*tree_of(embryo)),
            "spatial": cf.kernels.Matern32(embryo.obsm["spatial"], None, 0.7),
        },
    ).fit(
        embryo.layers["counts"][:, 2].toarray()[:, 0],
        np.ones((N, 1)),
        rng=cf._runtime.named_generator(3, name),
    )
    mine = cf.get.responses(fitted).set_index("response").loc[name]
    assert mine["free_energy"] == pytest.approx(alone.free_energy, abs=1e-9)
    assert mine["log_evidence"] == pytest.approx(alone.log_evidence, abs=1e-9)
    mine = cf.get.components(fitted).query("response == @name")
    assert list(mine["variance"]) == pytest.approx(alone.components["variance"][: len(mine)], rel=1e-9)


def tree_of(adata):
    from cellfate.io.anndata import read_cells

    cells = read_cells(adata, None, family="poisson")
    return cells.forest, cells.leaf


def test_order_and_chunks_change_nothing(embryo, fitted):
    again = cf.tl.decompose(embryo, list(embryo.var_names)[::-1], **SETTINGS, chunk_size=3, copy=True)
    for one, other in zip(tables(fitted), tables(again), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_one_that_cannot_be_fitted_says_why(embryo, fitted):
    status = cf.get.responses(fitted).set_index("response")["status"]
    assert status["silent"].startswith("failed: ")
    assert "one level" in status["silent"]
    assert status["unknown"].startswith("failed: ")
    assert "NaN in 60 of 60 cells" in status["unknown"]
    assert not status.drop(list(BAD)).str.startswith("failed").any()
    assert set(cf.get.components(fitted)["response"]) == {f"gene{i}" for i in range(GENES)}
    with pytest.warns(cf.CellfateWarning, match=r"2 of 3 fates could not be fitted: 'silent', 'unknown'"):
        cf.tl.decompose(embryo, ["silent", "gene0", "unknown"], **SETTINGS, copy=True)
    text = complaint(lambda: cf.tl.decompose(embryo, ["silent", "unknown"], **SETTINGS, copy=True))
    assert "none of 2 fates could be fitted" in text


def test_shares_of_genes_are_in_varm(fitted):
    shares = cf.get.components(fitted).pivot_table(index="response", columns="component", values="share")
    table = fitted.varm["cellfate_shares"]
    assert list(table.columns) == ["lineage", "spatial"]
    assert list(table.index) == list(fitted.var_names)
    pd.testing.assert_frame_equal(table.loc[shares.index], shares, check_names=False)
    assert table.loc[list(BAD)].isna().all(axis=None)


def test_results_survive_a_file(fitted, tmp_path):
    fitted.write_h5ad(tmp_path / "x.h5ad")
    back = ad.read_h5ad(tmp_path / "x.h5ad")
    for read in (cf.get.components, cf.get.draws, cf.get.responses, cf.get.hyperparameters, cf.get.fixed_effects):
        pd.testing.assert_frame_equal(read(back), read(fitted), check_exact=True, check_dtype=False)


def test_all_genes_that_are_seen_often_enough(embryo):
    counts = embryo.layers["counts"].toarray()
    seen = (counts != 0).sum(0)
    least = int(np.sort(seen[:GENES])[-2])
    some = cf.tl.decompose(embryo, **SETTINGS, min_cells=least, copy=True)
    expected = list(embryo.var_names[(seen >= least)])
    assert list(cf.get.responses(some)["response"]) == expected
    assert "unknown" in expected
    assert "silent" not in expected


@pytest.mark.parametrize("kind", ["dense", "csc", "csr", "backed"])
def test_columns_are_the_same_from_any_matrix(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("cellfate.io.many.ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    x = rng.poisson(0.5, (30, 9)).astype(float)
    kept, columns = rng.random(30) < 0.7, np.array([7, 0, 3])
    matrix = {"dense": x, "csc": sparse.csc_matrix(x), "csr": sparse.csr_matrix(x)}.get(kind)
    if matrix is None:
        ad.AnnData(sparse.csr_matrix(x)).write_h5ad(tmp_path / "x.h5ad")
        matrix = ad.read_h5ad(tmp_path / "x.h5ad", backed="r").X
    np.testing.assert_array_equal(columns_of_matrix(matrix, columns, kept), x[kept][:, columns])


def test_columns_of_obs_and_genes_together(embryo):
    embryo = embryo.copy()
    embryo.obs["marked"] = np.random.default_rng(1).poisson(2.0, N)
    found = cf.tl.decompose(embryo, ["marked", "gene1"], **SETTINGS, copy=True)
    assert list(cf.get.responses(found)["response"]) == ["marked", "gene1"]
    assert "cellfate_shares" not in found.varm


def test_columns_of_obs_need_no_matrix():
    adata = cf.datasets.simulate(N, family="poisson", rng=4)
    adata.obs["twice"] = 2 * adata.obs["fate"]
    cf.tl.decompose(adata, ["fate", "twice"], family="poisson", lengthscale=0.7, rng=3)
    assert list(cf.get.responses(adata)["response"]) == ["fate", "twice"]


def test_a_new_fit_takes_the_place_of_all_that_an_earlier_one_wrote(embryo, fitted):
    again = cf.tl.decompose(fitted, "gene1", **SETTINGS, copy=True)
    assert "cellfate_shares" not in again.varm
    assert "cellfate_effects" in again.obsm
    assert list(cf.get.responses(again)["response"]) == ["gene1"]
    assert "response" not in cf.get.draws(again)


@pytest.mark.parametrize(
    ("fate", "more", "text"),
    [
        (["gene1", "gene1"], {}, "names 'gene1' more than once"),
        (["gene1", "gene77"], {}, "1 of 2 fates are neither obs columns nor genes: 'gene77'"),
        ([], {}, "wanted names of obs columns or genes, at least one"),
        (["gene1"], {"layer": "count"}, "there is no layer 'count'; similar: 'counts'"),
        (["gene1"], {"chunk_size": 0}, "chunk_size is 0"),
        (["fate"], {}, "layer 'counts' was given, but no fate is a gene"),
        (["gene1", "fate"], {"formula": "~ 1 + fate"}, "also in the formula or groups: 'fate'"),
        (None, {"min_cells": 1000}, "no gene is other than zero in min_cells=1000"),
        ("gene1", {"layer": "count"}, "there is no layer 'count'"),
    ],
)
def test_wrong_input_is_named(embryo, fate, more, text):
    assert text in complaint(lambda: cf.tl.decompose(embryo, fate, **(SETTINGS | more)))
    assert "cellfate" not in embryo.uns


def test_what_there_is_only_of_one_response_is_refused(fitted):
    for read in (cf.get.effects, cf.get.diagnostics):
        assert "many responses" in complaint(lambda read=read: read(fitted))
    assert "fates, and this is asked of one. Fit it by itself" in complaint(lambda: cf.tl.check(fitted))


def test_many_measurements_share_tables_and_fail_apart():
    """From twenty on; each as a fit by itself has it, up to what two ways of integrating differ by."""
    adata = cf.datasets.simulate(N, family="gaussian", rng=6)
    rng = np.random.default_rng(7)
    x = adata.obs["fate"].to_numpy()[:, None] * rng.uniform(0, 2, 21) + rng.normal(size=(N, 21))
    x[:, 4] = 1.0
    genes = ad.AnnData(x, obs=adata.obs, obsm=dict(adata.obsm), uns=dict(adata.uns))
    settings = {"family": "gaussian", "lengthscale": 0.7, "rng": 1}
    cf.tl.decompose(genes, list(genes.var_names), **settings)
    status = cf.get.responses(genes).set_index("response")
    assert list(status.index[status["status"].str.startswith("failed")]) == ["4"]
    assert status.loc["0", "engine_reason"] == "structured: many gaussian responses at once"
    again = cf.tl.decompose(genes, list(genes.var_names)[::-1], **settings, chunk_size=6, copy=True)
    for one, other in zip(tables(genes), tables(again), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    alone = cf.tl.decompose(genes, "7", **settings, engine="dense", copy=True)
    mine = cf.get.components(genes).query("response == '7'").set_index("component")["share"]
    theirs = cf.get.components(alone).set_index("component")["share"]
    assert (mine - theirs).abs().max() < 0.03
    assert status.loc["7", "log_evidence"] == pytest.approx(alone.uns["cellfate"]["log_evidence"], abs=0.1)


def test_levels_are_told(embryo):
    adata = embryo.copy()
    adata.obs["kind"] = np.resize(["b", "a", "c"], N)
    adata.obs["sort"] = np.resize(["x", "y", "z", "x"], N)
    cf.tl.decompose(adata, ["kind", "sort"], family="categorical", spatial=None, rng=0)
    assert cf.get.responses(adata).set_index("response")["levels"].to_dict() == {"kind": "a, b, c", "sort": "x, y, z"}
    assert "Intercept[a]" in set(cf.get.fixed_effects(adata)["term"])


@pytest.mark.parametrize(
    ("trials", "text"), [("nowhere", "no obs column 'nowhere'"), ([1, 2], "trials"), (2.5, "whole|2.5")]
)
def test_trials_of_many_are_checked_as_those_of_one(embryo, trials, text):
    adata = embryo.copy()
    with pytest.raises(DataError, match=text):
        cf.tl.decompose(adata, ["gene0", "gene1"], family="binomial", trials=trials, layer="counts", rng=0)


def test_trials_without_successes_are_refused(embryo):
    with pytest.raises(DataError, match="only family='binomial' has trials"):
        cf.tl.decompose(embryo.copy(), ["gene0", "gene1"], **SETTINGS, trials=10)
