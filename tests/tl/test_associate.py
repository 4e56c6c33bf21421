"""Covariates beside a fitted model: against generalized least squares written out, a whole fit, and nothing to find."""

import anndata
import numpy as np
import pytest
import torch

import cellfate as cf
from cellfate import DataError
from cellfate.inference.associate import Associations, inflation
from cellfate.inference.sites import Variational
from cellfate.kernels.base import unit_scale
from tests.embryo import embryo
from tests.problem import entries, small_problem

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")


def test_of_measurements_it_is_generalized_least_squares():
    model, engine = small_problem("gaussian", lineage="brownian", groups=(), lengthscale=0.8)
    values = {"variance_lineage": 0.9, "variance_spatial": 0.6, "variance_residual": 0.3}
    kernels = {c.name: c.kernel for c in model.components}
    v = 0.9 * unit_scale(entries(kernels["lineage"])) + 0.6 * unit_scale(entries(kernels["spatial"], lengthscale=0.8))
    v = v.numpy() + 0.3 * np.eye(model.data.n)
    design, y = model.data.design.numpy(), (model.data.outcome.y - model.data.offset).numpy()
    x = np.random.default_rng(0).normal(size=(model.data.n, 3))
    estimates, errors = Associations(model, engine, Variational(), values)(np.column_stack([x, design[:, 1]]))
    for j in range(3):
        both = np.column_stack([design, x[:, j]])
        information = both.T @ np.linalg.solve(v, both)
        beta = np.linalg.solve(information, both.T @ np.linalg.solve(v, y))
        # fixed effects have a prior, wide and not flat
        assert estimates[j] == pytest.approx(beta[-1], abs=0.02 * np.linalg.inv(information)[-1, -1] ** 0.5)
        assert errors[j] == pytest.approx(np.linalg.inv(information)[-1, -1] ** 0.5, rel=0.01)
    assert np.isnan(errors[3])  # it is in the design


@pytest.mark.parametrize("family", ["bernoulli", "poisson"])
def test_where_nothing_is_to_be_found_nothing_is(family):
    """Smooth covariates of their own: lambda of 400 is known to about 0.12; a regression without the fields is far off."""
    adata = cf.datasets.simulate(300, family=family, variance_lineage=1.0, variance_spatial=1.0, lengthscale=0.7, rng=1)
    cf.tl.decompose(adata, "fate", family=family, rng=0)
    rng = np.random.default_rng(0)
    places = torch.as_tensor(adata.obsm["spatial"])
    k = torch.exp(-0.5 * torch.cdist(places, places).square() / 0.7**2).numpy()
    smooth = np.linalg.cholesky(k + 1e-8 * np.eye(300)) @ rng.standard_normal((300, 400))
    with_genes = anndata.AnnData(smooth, obs=adata.obs, obsm=dict(adata.obsm), uns=dict(adata.uns))
    with_genes.var_names = [f"g{i}" for i in range(400)]
    cf.tl.associate(with_genes)
    table = cf.get.associations(with_genes)
    assert inflation(table["z"].to_numpy()) == pytest.approx(1.0, abs=0.3)
    assert (table["p"] < 0.05).mean() < 0.1
    y = np.asarray(adata.obs["fate"] if family == "bernoulli" else np.log1p(adata.obs["fate"]), dtype=float)
    naive = np.array([np.corrcoef(y, column)[0, 1] * 300**0.5 for column in smooth.T])
    assert inflation(naive) > 2
    parts = cf.tl.associate(with_genes, chunk_size=7, copy=True)
    np.testing.assert_allclose(cf.get.associations(parts)["z"], table["z"], rtol=1e-9)


def test_what_is_there_is_found(caplog):
    adata = embryo()
    adata.obs["size"] = adata.obs["size"] + 3 * adata.obs["time"]
    adata.obs["stage_code"] = (adata.obs["stage"] == "mid").astype(float)
    cf.tl.decompose(adata, "size", family="gaussian", formula="~ 1 + stage", rng=0)
    with caplog.at_level("INFO", logger="cellfate"):
        cf.tl.associate(adata, ["time", "log_size", "stage_code", "elt-2"])
    assert "3 covariates tested" in caplog.text  # and no lambda of so few
    table = cf.get.associations(adata).set_index("covariate")
    assert table.loc["time", "q"] < 0.01
    assert table.loc["log_size", "p"] > 1e-3
    assert table.loc["stage_code", "status"] == "the fixed effects hold it"
    assert table.loc[["time", "elt-2"], "status"].tolist() == ["tested"] * 2
    with pytest.raises(DataError, match="the fate 'size' is among the covariates"):
        cf.tl.associate(adata, ["size"])
    with pytest.raises(DataError, match="neither obs columns nor genes"):
        cf.tl.associate(adata, ["tiem"])
