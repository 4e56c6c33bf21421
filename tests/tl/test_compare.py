"""Models with and without components: their evidence, and cells left out, against closed forms."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch

import cellfate as cf
from cellfate import DataError
from cellfate.inference.loo import leave_one_out
from cellfate.inference.sites import Variational
from cellfate.io.again import priors_of
from cellfate.kernels.base import unit_scale
from cellfate.model.priors import HalfNormal, LogNormal, Normal
from tests.embryo import embryo
from tests.problem import entries, small_problem

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")


def test_of_measurements_leaving_out_is_exact():
    model, engine = small_problem("gaussian", lineage="brownian", groups=(), lengthscale=0.8)
    values = {"variance_lineage": 0.9, "variance_spatial": 0.6, "variance_residual": 0.3}
    found = leave_one_out(
        model,
        engine,
        Variational(),
        {k: np.array([v]) for k, v in values.items()},
        count=1,
        rng=np.random.default_rng(0),
    )
    kernels = {c.name: c.kernel for c in model.components}
    x, beta_sd = model.data.design.numpy(), model.beta_sd.numpy()
    covariance = 0.9 * unit_scale(entries(kernels["lineage"])) + 0.6 * unit_scale(
        entries(kernels["spatial"], lengthscale=0.8)
    )
    covariance = covariance.numpy() + 0.3 * np.eye(model.data.n) + (x * beta_sd**2) @ x.T
    y = model.data.outcome.y.numpy() - model.data.offset.numpy()
    for i in range(model.data.n):
        others = np.arange(model.data.n) != i
        weight = np.linalg.solve(covariance[np.ix_(others, others)], covariance[others, i])
        mean, variance = weight @ y[others], covariance[i, i] - weight @ covariance[others, i]
        expected = -0.5 * math.log(2 * math.pi * variance) - 0.5 * (y[i] - mean) ** 2 / variance
        assert found.each[i] == pytest.approx(expected, abs=1e-6)


def test_of_fates_leaving_out_is_near_fits_without_the_cell():
    """Free energies with and without a cell differ by its predictive density, at given hyperparameters."""
    model, engine = small_problem("bernoulli", lineage="brownian", groups=(), lengthscale=0.8)
    values = {"variance_lineage": 0.9, "variance_spatial": 0.6}
    draws = {k: np.array([v]) for k, v in values.items()}
    found = leave_one_out(model, engine, Variational(), draws, count=1, rng=np.random.default_rng(0))
    kernels = {c.name: c.kernel for c in model.components}
    k = 0.9 * unit_scale(entries(kernels["lineage"])) + 0.6 * unit_scale(entries(kernels["spatial"], lengthscale=0.8))
    y, x, offset = model.data.outcome.y.numpy(), model.data.design.numpy(), model.data.offset.numpy()
    covariance = k.numpy() + (x * model.beta_sd.numpy() ** 2) @ x.T
    rng = np.random.default_rng(1)
    u = offset + rng.standard_normal((400_000, len(y))) @ np.linalg.cholesky(covariance + 1e-9 * np.eye(len(y))).T
    log_p = -np.logaddexp(0, -(2 * y - 1) * u)
    for i in (0, 3, 11):
        rest = log_p.sum(1) - log_p[:, i]
        weight = np.exp(rest - rest.max())
        p = np.exp(log_p[:, i])
        mean = (weight * p).sum() / weight.sum()
        error = np.sqrt((weight**2 * (p - mean) ** 2).sum()) / weight.sum()
        assert math.exp(found.each[i]) == pytest.approx(mean, abs=4 * error + 0.01)


def test_the_model_behind_the_data_wins_and_none_is_the_plain_one():
    adata = cf.datasets.simulate(120, family="gaussian", variance_lineage=2.0, variance_spatial=0.0, rng=2)
    cf.tl.decompose(adata, "fate", family="gaussian", rng=0, priors={"sd_lineage": ("half_normal", 1.5)})
    before = set(adata.uns["cellfate"])
    copy = cf.tl.compare(adata, rng=0, copy=True)
    assert set(adata.uns["cellfate"]) == before
    table = cf.get.comparison(copy).set_index("model")
    assert table.index[0] == "lineage"
    assert table["weight"].sum() == pytest.approx(1)
    assert table.loc["none", "weight"] < 1e-6
    assert (table["elpd_difference"] <= 0).all()
    assert table["hyperparameters"].to_dict() == {"lineage": 2, "lineage + spatial": 4, "none": 1, "spatial": 3}
    # without any component: a normal sample, its mean under a wide prior, its sd under a half-normal one
    y = adata.obs["fate"].to_numpy()
    model, _, _ = cf.GLMM("gaussian", {"a": torch.eye(120, dtype=torch.float64)}).on(y, np.ones((120, 1))).problem
    sd, n = np.linspace(1e-3, 4 * y.std(), 20_001), len(y)
    tau = float(model.beta_sd[0])
    log_det = (n - 1) * 2 * np.log(sd) + np.log(sd**2 + n * tau**2)
    quadratic = ((y - y.mean()) ** 2).sum() / sd**2 + n * y.mean() ** 2 / (sd**2 + n * tau**2)
    log_likelihood = -0.5 * (n * np.log(2 * np.pi) + log_det + quadratic)
    scale = 2 * model.response_scale
    prior = np.log(2) - 0.5 * np.log(2 * np.pi * scale**2) - 0.5 * (sd / scale) ** 2
    both = log_likelihood + prior
    expected = both.max() + np.log(np.trapezoid(np.exp(both - both.max()), sd))
    assert table.loc["none", "log_evidence"] == pytest.approx(expected, abs=0.1)


def test_interactions_groups_and_what_cannot_be_compared():
    adata = embryo()
    cf.tl.decompose(adata, "size", family="gaussian", groups="batch", rng=0)
    cf.tl.compare(adata, interaction=True, draws=8, rng=0)
    assert set(cf.get.comparison(adata)["model"]) == {
        "none", "lineage", "spatial", "lineage + spatial", "lineage + spatial + lineage:spatial",
    }  # fmt: skip
    cf.tl.decompose(adata, "size", family="gaussian", lineage=None, rng=0)
    with pytest.raises(DataError, match="the fit has no component 'lineage', and nothing to compare"):
        cf.tl.compare(adata)
    with pytest.raises(DataError, match=r"has no 'comparison'. Run `cf.tl.compare\(adata\)` first"):
        cf.get.comparison(adata)


def test_priors_are_read_again():
    made = {
        "sd_a": HalfNormal(1.5),
        "lengthscale_spatial": LogNormal(0.5, 0.25),
        "beta": Normal(3.0),
        "sd_b": ("half_normal", 2.0),
    }
    again = priors_of({"priors": {name: str(prior) for name, prior in made.items()}})
    assert again == {
        "sd_a": ("half_normal", 1.5),
        "lengthscale_spatial": ("lognormal", 0.5, 0.25),
        "beta": ("normal", 3.0),
        "sd_b": ("half_normal", 2.0),
    }


def test_rough_elpd_is_a_warning(monkeypatch):
    adata = embryo()
    cf.tl.decompose(adata, "size", family="gaussian", lengthscale=0.5, rng=0)
    monkeypatch.setattr(sys.modules["cellfate.tl.compare"], "LARGEST_K", -np.inf)
    with pytest.warns(
        cf.CellfateWarning, match=r"elpd_loo of \d of 4 models \(.*lineage.*\) is rough: k-hat of leaving"
    ):
        cf.tl.compare(adata, draws=40, rng=0)


def test_fates_without_an_order_are_refused_by_what_they_are():
    adata = embryo()
    adata.obs["kind"] = np.resize(["a", "b", "c"], adata.n_obs)
    cf.tl.decompose(adata, "kind", family="categorical", lengthscale=0.5, rng=0)
    for tool in (cf.tl.compare, cf.tl.test_components, partial(cf.tl.associate, covariates=["size"])):
        with pytest.raises(NotImplementedError, match="not there yet for family='categorical', which the fit is of"):
            tool(adata)
