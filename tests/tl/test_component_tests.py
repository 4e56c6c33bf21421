"""`cf.tl.test_components`: what is there is seen, what is not is not, and every question is answered in words."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import cellfate as cf
from cellfate import DataError
from cellfate.inference.bootstrap import draw_fate
from cellfate.inference.mode import find_mode
from cellfate.inference.score import Null
from cellfate.inference.sites import Variational
from cellfate.kernels.base import unit_scale
from cellfate.model.glmm import Model
from tests.embryo import embryo
from tests.problem import entries, small_problem

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")


@pytest.fixture(scope="module")
def fit():
    """Ancestry strong, no neighborhood."""
    adata = cf.datasets.simulate(150, family="gaussian", variance_spatial=0.0, variance_lineage=2.0, rng=4)
    cf.tl.decompose(adata, "fate", family="gaussian", rng=0)
    return adata


def test_what_is_there_and_what_is_not(fit, tmp_path):
    before = set(fit.uns["cellfate"])
    copy = cf.tl.test_components(fit, copy=True)
    assert set(fit.uns["cellfate"]) == before
    copy.write_h5ad(tmp_path / "fit.h5ad")
    table = cf.get.tests(anndata.read_h5ad(tmp_path / "fit.h5ad")).set_index("component")
    assert table.loc["lineage", "p"] < 1e-4
    assert table.loc["spatial", "p"] > 0.05
    assert table["given"].to_dict() == {"lineage": "spatial", "spatial": "lineage"}
    pd.testing.assert_frame_equal(cf.get.tests(copy), table.reset_index()[list(cf.get.tests(copy))])


def test_the_bootstrap_agrees_with_the_score(fit):
    """Both p-values of an absent component; 40 draws know one of a half to 0.08."""
    copy = cf.tl.test_components(fit, "spatial", method="bootstrap", n_boot=39, rng=0, copy=True)
    (row,) = cf.get.tests(copy).to_dict("records")
    assert row["p"] == pytest.approx(row["p_score"], abs=0.25)
    assert (row["p"] * 40) == pytest.approx(round(row["p"] * 40))


@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "negative_binomial", "binomial", "beta"])
def test_fates_of_the_null_model_are_like_its_data(family):
    """Mean of many drawn fates is that of the model: checked for the linear one against its covariance, for others by range."""
    model, engine = small_problem(family, lineage="brownian", groups=())
    null = Null(model, engine, Variational(), find_mode(model, engine, Variational()))
    rng = np.random.default_rng(0)
    drawn = np.array([draw_fate(null, rng) for _ in range(400 if family == "gaussian" else 5)])
    assert drawn.shape[1] == model.data.n
    assert np.isfinite(drawn).all()
    trials = model.data.outcome.trials
    if family in ("bernoulli", "binomial"):
        assert ((drawn >= 0) & (drawn <= (1 if trials is None else trials.numpy()))).all()
    if family == "gaussian":
        assert isinstance(model, Model)
        values = {
            name: float(x) for name, x in model.theta(find_mode(model, engine, Variational()).u[None]).values.items()
        }
        kernels = {c.name: c.kernel for c in model.components}
        k = values["sd_lineage"] ** 2 * unit_scale(entries(kernels["lineage"]))
        k = k + values["sd_spatial"] ** 2 * unit_scale(
            entries(kernels["spatial"], lengthscale=values["lengthscale_spatial"])
        )
        expected = float(k.diagonal().sum()) + model.data.n * values["sd_residual"] ** 2
        spread = ((drawn - drawn.mean(0)) ** 2).sum(1)
        assert spread.mean() == pytest.approx(expected, abs=5 * spread.std() / 20 + 0.01 * expected)
        assert torch.isfinite(null.b).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"components": "tree"}, DataError, r"components has \['tree'\]; the fit has lineage, spatial"),
        ({"components": []}, DataError, "components has no names"),
        ({"method": "wald"}, DataError, "method"),
        ({"n_boot": 0}, DataError, "n_boot is 0, wanted how many fates"),
    ],
)
def test_wrong_questions(fit, arguments, error, message):
    with pytest.raises(error, match=message):
        cf.tl.test_components(fit, **arguments)
    with pytest.raises(DataError, match=r"has no 'tests'. Run `cf.tl.test_components\(adata\)` first"):
        cf.get.tests(fit)


def test_one_component_has_nothing_to_be_held_against():
    adata = embryo()
    cf.tl.decompose(adata, "size", family="gaussian", lineage=None, rng=0)
    with pytest.raises(DataError, match="the fit has one component, 'spatial'"):
        cf.tl.test_components(adata)


def test_groups_and_interactions_are_components_too():
    adata = embryo()
    cf.tl.decompose(adata, "size", family="gaussian", groups="batch", interaction=True, rng=0)
    cf.tl.test_components(adata)
    table = cf.get.tests(adata).set_index("component")
    assert table["p"].between(0, 1).all()
    assert table.loc["batch", "given"] == "lineage + spatial + lineage:spatial"
    assert table.loc["spatial", "given"] == "lineage + batch"  # an interaction goes by its length-scale
