"""What takes a client gives what one process gives: a fate under several trees, tests, their bootstrap, associations."""

import numpy as np
import pandas as pd
import pytest

import cellfate as cf
from tests.distributed.helpers import SETTINGS, decomposed, embryo

pytest.importorskip("distributed")

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.CellfateWarning")


def same_fit(one, other):
    a, b = one.uns["cellfate"], other.uns["cellfate"]
    assert set(a) == set(b)
    for name, table in a.items():
        if isinstance(table, pd.DataFrame):
            pd.testing.assert_frame_equal(table, b[name], check_exact=True)
    for name in ("diagnostics", "mode", "params"):
        said = [{k: str(v) for k, v in x[name].items() if k != "seconds"} for x in (a, b)]
        assert said[0] == said[1], name
    assert (a["free_energy"], a["log_evidence"]) == (b["free_energy"], b["log_evidence"])
    pd.testing.assert_frame_equal(one.obsm["cellfate_effects"], other.obsm["cellfate_effects"], check_exact=True)


@pytest.fixture(scope="module")
def fitted():
    adata = embryo(genes=5)
    cf.tl.decompose(adata, "gene0", family="poisson", **SETTINGS)
    return adata


def test_one_fate(fitted, client):
    there = cf.tl.decompose(fitted, "gene0", family="poisson", **SETTINGS, client=client, copy=True)
    same_fit(fitted, there)


def test_one_fate_in_a_store(fitted, tmp_path, monkeypatch):
    options = {"family": "poisson", **SETTINGS, "store": tmp_path / "s", "copy": True}
    same_fit(fitted, cf.tl.decompose(fitted, "gene0", **options))
    monkeypatch.setattr(cf.GLMM, "posterior", None)  # it is not computed again
    same_fit(fitted, cf.tl.decompose(fitted, "gene0", **options))
    with pytest.raises(cf.DataError, match="begun with fate='gene0', and now fate is 'gene1'"):
        cf.tl.decompose(fitted, "gene1", **options)


@pytest.mark.parametrize("weights", ["evidence", "equal"])
def test_a_fate_under_several_trees(client, weights, tmp_path):
    adata = embryo(genes=1)
    other = adata.uns["tree"].replace("cell7:", "x:").replace("cell9:", "cell7:").replace("x:", "cell9:")
    adata.uns["other"] = other
    options = {"family": "poisson", "lineage": ["tree", "other"], "tree_weights": weights, "lengthscale": 0.7}
    streams = [np.random.default_rng(3) for _ in range(2)]
    here = cf.tl.decompose(adata, "gene0", **options, rng=streams[0], copy=True)
    there = cf.tl.decompose(adata, "gene0", **options, rng=streams[1], client=client, copy=True)
    same_fit(here, there)
    assert streams[0].random() == streams[1].random()  # the caller's has moved on as far
    kept = {"rng": 3, "store": tmp_path / "s", "copy": True}
    first = cf.tl.decompose(adata, "gene0", **options, **kept, client=client)
    (tmp_path / "s" / "chunks" / "00001.zarr.zip").unlink()
    for again in (first, cf.tl.decompose(adata, "gene0", **options, **kept)):
        same_fit(here, again)


@pytest.mark.parametrize(("method", "options"), [("score", {}), ("bootstrap", {"n_boot": 12})])
def test_tests_of_one_fate(fitted, client, method, options):
    here, there = (
        cf.tl.test_components(fitted, method=method, **options, rng=1, client=c, copy=True) for c in (None, client)
    )
    pd.testing.assert_frame_equal(cf.get.tests(here), cf.get.tests(there), check_exact=True)
    if method == "bootstrap":
        assert (cf.get.tests(here)["p"] * 13).round(9).isin(range(1, 14)).all()


def test_tests_of_many_fates(client):
    adata = embryo(genes=4)
    adata.X[:, 2] = 0.0
    many = decomposed(adata)
    here, there = (cf.tl.test_components(many, rng=1, client=c, copy=True) for c in (None, client))
    table = cf.get.tests(here)
    pd.testing.assert_frame_equal(table, cf.get.tests(there), check_exact=True)
    assert table["component"].tolist() == ["lineage"] * 4 + ["spatial"] * 4
    assert table["response"].tolist() == list(adata.var_names) * 2
    assert (table["status"] == "tested").sum() == 6


def test_associations(fitted, client):
    names = list(fitted.var_names[1:])
    here, there = (cf.tl.associate(fitted, names, client=c, chunk_size=3, copy=True) for c in (None, client))
    pd.testing.assert_frame_equal(cf.get.associations(here), cf.get.associations(there), check_exact=True)
    assert cf.get.associations(there)["covariate"].tolist() == names
