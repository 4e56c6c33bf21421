"""Data that is legal and awkward: far from zero, in odd units, rare levels, cells that nothing is known of."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import cellfate as cf
from cellfate.engines.base import Sites
from cellfate.errors import DataError
from cellfate.inference.free_energy import evaluate
from cellfate.inference.hyperposterior import _Diagnostics, _summarize
from cellfate.inference.mode import find_mode
from cellfate.inference.points import Points
from cellfate.inference.sites import RULES, Variational
from cellfate.inference.variational_laplace import Status
from cellfate.kernels.base import Component, Given
from cellfate.kernels.lineage import LINEAGE_KERNELS, Brownian, Clone
from cellfate.kernels.spatial import Matern32
from cellfate.model.families import Outcome
from cellfate.model.glmm import FIXED, Data, Model
from cellfate.trees.convert import to_forest
from tests.problem import dense_engine, double, small_problem


def with_lineage(kernel: str, lengthscale: float | None = 0.8) -> Model:
    model, _ = small_problem(groups=(), lengthscale=lengthscale)
    lineage = model.components[0].kernel
    components = [
        Component("lineage", LINEAGE_KERNELS[kernel](lineage.forest, lineage.leaf)),
        Component("spatial", model.components[1].kernel),
    ]
    return Model(model.family, components, model.data)


@pytest.mark.parametrize("kernel", LINEAGE_KERNELS)
def test_a_batch_beside_a_kernel_that_is_held(kernel):
    """A covariance that does not change is computed once: whichever the batch that asked first."""
    model = with_lineage(kernel)
    engine = dense_engine(model.components, model.data.n)
    u = model.start() + 0.1 * torch.arange(3.0, dtype=torch.float64)[:, None]
    together = evaluate(model, engine, model.theta(u), Variational()).free_energy
    fresh = dense_engine(model.components, model.data.n)
    alone = torch.cat([evaluate(model, fresh, model.theta(one[None]), Variational()).free_energy for one in u])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-7)
    again = evaluate(model, engine, model.theta(u[:1]), Variational()).free_energy
    torch.testing.assert_close(again, alone[:1], rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("level", [1e3, 1e5])
def test_a_response_and_a_covariate_far_from_zero(level):
    """Years from 2000, weights in grams: the partition is that of the centered data."""
    rng = np.random.default_rng(0)
    adata = cf.datasets.simulate(100, family="gaussian", rng=5)
    adata.obs["time"] = rng.standard_normal(100)
    adata.obs["year"], adata.obs["weight"] = adata.obs["time"] + level, adata.obs["fate"] + level
    cf.tl.decompose(adata, "fate", family="gaussian", formula="~ 1 + time", rng=0, key_added="near")
    cf.tl.decompose(adata, "weight", family="gaussian", formula="~ 1 + year", rng=0, key_added="far")
    near, far = (cf.get.components(adata, key=key).set_index("component") for key in ("near", "far"))
    np.testing.assert_allclose(far["share"], near["share"], atol=0.02)
    slope = [cf.get.fixed_effects(adata, key=key).set_index("term") for key in ("near", "far")]
    sd = slope[0].loc["time", "sd"]
    assert slope[1].loc["year", "estimate"] == pytest.approx(slope[0].loc["time", "estimate"], abs=0.1 * sd)
    assert slope[1].loc["year", "sd"] == pytest.approx(sd, rel=0.05)


def test_a_thinned_model_keeps_units_and_priors():
    """Of a level that two cells have, a thinned model may have none: its column is zero, and its prior has to stay finite."""
    base, _ = small_problem("gaussian", groups=())
    rare = torch.zeros(base.data.n, dtype=torch.float64)
    rare[3] = 1.0
    x = torch.column_stack([base.data.design, rare])
    model = Model(
        base.family, base.components, Data(base.data.outcome, x, (*base.data.terms, "rare"), base.data.offset)
    )
    thin = model.at(np.arange(4, 16))
    torch.testing.assert_close(thin.beta_sd, model.beta_sd)
    assert thin.response_scale == model.response_scale
    engine = dense_engine(model.components, model.data.n).at(thin.components, np.arange(4, 16))
    here = evaluate(thin, engine, thin.theta(thin.start()[None]), Variational())
    assert here.free_energy.isfinite().all()
    assert here.posterior.mean.isfinite().all()


def test_an_overflow_is_a_status_and_not_an_exception():
    model, engine = small_problem(groups=("batch",))
    huge = Sites(torch.full((1, model.data.n), 1e308, dtype=torch.float64), torch.ones(1, model.data.n).double())
    posterior = engine.condition(model.terms(model.theta(0 * model.start()[None] + 3)), huge)
    assert not posterior.log_det.isfinite().any()


def test_a_failed_point_has_no_say():
    model = with_lineage("brownian")
    n = model.data.n
    good = {"lineage": np.ones((2, n)), "spatial": np.zeros((2, n))}
    bad = {name: np.concatenate([x, np.full((1, n), np.nan)]) for name, x in good.items()}
    realized = {name: np.ones((3, 16)) for name in good}
    points = Points(
        np.ones((3, 2)), np.array([0.0, 0.0, np.nan]), bad, bad, np.zeros((3, 2)), np.zeros((3, 2, 2)), realized, 1
    )
    draws = np.ones((4000, 2)), np.zeros((4000, 2))
    found = _summarize(
        model, points, np.array([0.5, 0.5, 0.0]), draws, _Diagnostics(0.0, 0.0, 0.0, 4000.0), np.random.default_rng(0)
    )
    np.testing.assert_array_equal(found.effects["lineage"][0], 1.0)
    np.testing.assert_array_equal(found.effects["lineage"][1], 1.0)


@pytest.mark.parametrize("rule", RULES)
def test_a_component_of_variance_zero(rule):
    """Cells that the prior holds at zero do not move, and do not keep the others from it."""
    model, engine = small_problem(groups=(), reml=False)
    theta, _ = model.from_natural(
        {"sd_lineage": 0.0, "sd_spatial": 0.0, "alpha_lineage": 0.5, "lengthscale_spatial": 0.8, "beta": [[0.3, 0.6]]}
    )
    here = evaluate(model, engine, theta, RULES[rule]())
    assert Status(int(here.fit.status[0])) is Status.CONVERGED
    eta = model.shift(theta)
    expected = model.family.log_prob(model.data.outcome, eta).sum()
    torch.testing.assert_close(here.free_energy[0], expected, rtol=1e-8, atol=1e-8)


def test_ep_in_any_unit():
    model, engine = small_problem("gaussian", groups=())
    scaled = Model(model.family, model.components, Data(Outcome(1e6 * model.data.outcome.y), *rest(model, 1e6)))
    u = model.start()[None]
    v = u.clone()
    v[:, :2] *= 1e6
    v[:, 2] += np.log(1e6)
    one = evaluate(model, engine, model.theta(u), RULES["ep"]())
    other = evaluate(scaled, engine, scaled.theta(v), RULES["ep"]())
    torch.testing.assert_close(other.posterior.mean, 1e6 * one.posterior.mean, rtol=1e-7, atol=1e-3)
    shift = model.data.n * np.log(1e6)
    torch.testing.assert_close(other.free_energy, one.free_energy - shift, rtol=1e-9, atol=1e-6)


def rest(model: Model, unit: float) -> tuple:
    return model.data.design, model.data.terms, unit * model.data.offset


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_single_precision_gives_the_same_partition(dtype):
    adata = cf.datasets.simulate(60, family="poisson", rng=3)
    cf.tl.decompose(adata, "fate", family="poisson", dtype=dtype, rng=0)
    assert cf.get.diagnostics(adata)["status"] == "converged"
    if dtype == "float32":
        cf.tl.decompose(adata, "fate", family="poisson", rng=0, key_added="double")
        single, double_ = (cf.get.components(adata, key=key) for key in ("cellfate", "double"))
        np.testing.assert_allclose(single["share"], double_["share"], atol=0.02)


def test_what_is_held_cannot_be_given():
    model, _ = small_problem(lengthscale=0.5, groups=(), lineage="brownian")
    with pytest.raises(DataError, match=r"theta gives \['lengthscale_spatial'\], which this model holds at \[0.5\]"):
        model.from_natural({"sd_lineage": 1.0, "sd_spatial": 1.0, "lengthscale_spatial": 5.0})
    flat = Model(model.family, model.components, model.data, reml=False)
    with pytest.raises(DataError, match="theta lacks 'beta', the fixed effects of"):
        flat.from_natural({"sd_lineage": 1.0, "sd_spatial": 1.0})


def test_a_covariance_that_is_not_scaled_contributes_its_own_variance():
    k = double(9.0 * np.eye(5) + 9.0)
    assert Given(k, normalized=False).expected_variance == pytest.approx(9.0)
    assert Given(k).expected_variance == 1.0


def test_the_variance_of_a_group_is_that_of_its_intercepts_everywhere():
    adata = cf.datasets.simulate(60, family="poisson", rng=1, groups={"batch": (4, 0.5)})
    cf.tl.decompose(adata, "fate", family="poisson", groups=["batch"], lineage=None, rng=0)
    table, draws = cf.get.components(adata).set_index("component"), cf.get.draws(adata)
    assert table.loc["batch", "variance"] == pytest.approx(draws["variance_batch"].mean(), rel=1e-9)
    assert table.loc["batch", "share"] == pytest.approx(draws["share_batch"].mean(), rel=1e-9)


def test_clones_of_a_tree_with_a_stem_begin_at_its_first_branching():
    forest = to_forest("(((a:1,b:1)x:1,(c:1,d:2)y:1)first:1)stem:1;")
    labels = Clone(forest, forest.nodes_of(["a", "b", "c", "d"])).independent()
    assert labels[0] == labels[1] != labels[2] == labels[3]


def test_a_star_of_sisters_is_fitted_beside_a_field():
    """Zero-length branches above some cells: a singular covariance."""
    forest = to_forest("((a:0,b:0):1,(c:1,d:0):0,e:1,f:1);")
    leaf = forest.nodes_of(list("abcdef"))
    base, _ = small_problem("gaussian", sizes=(6,), groups=())
    xy = base.components[1].kernel.coordinates
    components = [Component("lineage", Brownian(forest, leaf)), Component("spatial", Matern32(xy, lengthscale=0.8))]
    model = Model(base.family, components, base.data)
    mode = find_mode(model, dense_engine(components, 6), Variational())
    assert mode.converged
    assert np.isfinite(mode.free_energy)
    assert FIXED not in mode.at_bound


@pytest.mark.parametrize("engine", ["dense", "structured"])
def test_a_cell_without_prior_variance(engine):
    """Two leaves at the root itself: whatever the variances, their effect is zero, and everything else is as ever."""
    n, rng = 40, np.random.default_rng(0)
    text = (
        f"(c0:0,c1:0,({','.join(f'c{i}:1' for i in range(2, 20))}):1,({','.join(f'c{i}:1' for i in range(20, n))}):1);"
    )
    forest = to_forest(text)
    tree = Brownian(forest, forest.nodes_of([f"c{i}" for i in range(n)]))
    y = (rng.random(n) < np.where(np.arange(n) < 20, 0.2, 0.8)).astype(float)
    fit = cf.GLMM("bernoulli", {"lineage": tree}, engine=engine).fit(y, rng=0)
    assert np.isfinite(fit.log_evidence)
    assert fit.diagnostics["interpolation_error"] < 1
    mean, sd = fit.effects["lineage"]
    np.testing.assert_allclose(mean[:2], 0, atol=1e-12)
    np.testing.assert_allclose(sd[:2], 0, atol=1e-6)
    assert sd[2:].min() > 0.1


def test_a_gradient_that_overflows_beside_the_mode(monkeypatch):
    """The curvature is then what the search has learned, and the fit says so."""
    from cellfate.inference import mode as search

    model, _ = small_problem("poisson", groups=())
    engine, derivatives = dense_engine(model.components, model.data.n), search._derivatives

    def overflown(*arguments):
        hessian, mean, variance = derivatives(*arguments)
        return torch.full_like(hessian, torch.nan), mean, variance

    exact = find_mode(model, engine, Variational())
    monkeypatch.setattr(search, "_derivatives", overflown)
    found = find_mode(model, engine, Variational())
    assert not found.converged
    assert found.message == "next to the mode a number overflowed"
    assert bool(found.curvature.isfinite().all())
    sds = [m.curvature.inverse().diagonal().sqrt() for m in (found, exact)]
    assert float((sds[0] / sds[1]).log().abs().max()) < 1.0


def test_a_search_without_any_finite_number_is_an_error_in_words(monkeypatch):
    from cellfate.inference import mode as search

    model, _ = small_problem("poisson", groups=())
    engine = dense_engine(model.components, model.data.n)
    ascend, derivatives = search._ascend, search._derivatives

    def lost(*arguments):
        found = ascend(*arguments)
        return replace(found, curvature=torch.full_like(found.curvature, torch.nan))

    def overflown(*arguments):
        hessian, mean, variance = derivatives(*arguments)
        return torch.full_like(hessian, torch.nan), mean, variance

    monkeypatch.setattr(search, "_ascend", lost)
    monkeypatch.setattr(search, "_derivatives", overflown)
    with pytest.raises(DataError, match="met no finite number: the response or its offset is extreme"):
        find_mode(model, engine, Variational())
