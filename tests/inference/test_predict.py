"""Predictions after a fit: draws that stand for all, their mixture, and the way from a stored fit back to a posterior."""

import numpy as np
import pytest
import torch

import cellfate as cf
from cellfate import CellfateWarning, DataError
from cellfate.inference import predict as predict_module
from cellfate.inference.predict import mixed, spread
from cellfate.kernels import Brownian, Matern32, OrnsteinUhlenbeck
from cellfate.trees.convert import to_forest
from tests.embryo import half_tree

N = 40
RNG = np.random.default_rng(4)
FOREST = to_forest([half_tree(0, 32) + ";", half_tree(32, 64) + ";"])
LEAF = np.sort(RNG.permutation(FOREST.leaves)[:N])  # the others are unobserved
XY = RNG.normal(size=(N, 2))
X = np.column_stack([np.ones(N), RNG.normal(size=N)])
TERMS = ["Intercept", "x"]
FIELD = 1.5 * np.sin(2 * XY[:, 0])
Y = {
    "gaussian": X @ [1.0, 0.5] + FIELD + 0.4 * RNG.normal(size=N) + FOREST.tree[LEAF],
    "bernoulli": (RNG.random(N) < 1 / (1 + np.exp(-FIELD))).astype(float),
}


def glmm(family="gaussian", lineage=Brownian, **options):
    return cf.GLMM(family, {"lineage": lineage(FOREST, LEAF), "spatial": Matern32(XY)}, **options)


def close(one, other, tolerance=1e-9):
    np.testing.assert_allclose(one.mean, other.mean, atol=tolerance)
    np.testing.assert_allclose(one.sd, other.sd, atol=tolerance)


@pytest.fixture(scope="module")
def fitted():
    model = glmm("bernoulli", OrnsteinUhlenbeck)
    return model, model.fit(Y["bernoulli"], X, terms=TERMS, rng=0)


def test_the_law_of_total_variance():
    rng = np.random.default_rng(0)
    means, variances = rng.normal(size=(3, 2)), rng.gamma(2.0, size=(3, 2))
    drawn = (means + np.sqrt(variances) * rng.normal(size=(200_000, 3, 2))).reshape(-1, 2)
    found = mixed(means, variances)
    np.testing.assert_allclose(found.mean, means.mean(0))
    np.testing.assert_allclose([found.mean, found.sd], [drawn.mean(0), drawn.std(0)], atol=0.01)


def test_few_draws_stand_for_all():
    rng = np.random.default_rng(1)
    shape = rng.normal(size=4000)
    draws = {
        "variance_lineage": rng.gamma(1.0, size=4000),
        "lengthscale_spatial": np.exp(0.3 * shape),
        "alpha_lineage": np.full(4000, 2.0),
        "beta": np.column_stack([shape, rng.normal(size=4000)]),
    }
    means = []
    for seed in range(50):
        chosen = spread(draws, 16, np.random.default_rng(seed))
        assert len(set(chosen)) == 16
        means.append(np.sqrt(draws["variance_lineage"][chosen]).mean())
    root = np.sqrt(draws["variance_lineage"])
    assert abs(np.mean(means) - root.mean()) < 0.02
    assert np.std(means) < 0.75 * root.std() / 4  # of independent draws


def test_few_draws_of_few():
    assert sorted(spread({"variance_a": np.arange(3.0)}, 16, np.random.default_rng(0))) == [0, 1, 2]
    assert len(spread({"variance_a": np.ones(50)}, 4, np.random.default_rng(0))) == 4
    assert spread({}, 4, np.random.default_rng(0)).tolist() == [0]


@pytest.mark.parametrize("ask", ["ancestors", "elsewhere"])
def test_the_mixture_is_that_of_single_draws(fitted, ask):
    model, fit = fitted
    where = () if ask == "ancestors" else (np.random.default_rng(2).normal(size=(6, 2)),)
    found = getattr(model, ask)(fit, *where, count=5, rng=1)
    names = [n for n in fit.draws if not n.startswith(("share_", "beta"))]
    chosen = spread({n: fit.draws[n] for n in names}, 5, np.random.default_rng(1))
    each = []
    for i in chosen:
        each.append(getattr(model, ask)({n: fit.draws[n][i : i + 1] for n in names}, *where, rng=0))
    expected = mixed(np.stack([e.mean for e in each]), np.stack([e.sd for e in each]) ** 2)
    close(found, expected, 2e-3)  # updates are stopped where they are settled enough


def test_leaves_and_positions_of_cells_are_the_effects_of_the_fit(fitted):
    model, fit = fitted
    for name, found in (
        ("lineage", model.ancestors(fit, count=64, rng=0)),
        ("spatial", model.elsewhere(fit, torch.as_tensor(XY), count=64, rng=0)),
    ):
        at = LEAF if name == "lineage" else slice(None)
        mean, sd = fit.effects[name]
        # those of the fit are weighted over more points, and their spread is that of a few draws of the fields
        np.testing.assert_allclose(found.mean[at], mean, atol=0.15 * float(sd.max()))
        np.testing.assert_allclose(found.sd[at].mean(), sd.mean(), rtol=0.1)


def test_from_the_stored_draws_of_a_fit(fitted):
    model, fit = fitted
    other = glmm("bernoulli", OrnsteinUhlenbeck).on(Y["bernoulli"], X, terms=TERMS)
    close(other.ancestors(fit.draws, rng=3), model.ancestors(fit, rng=3))
    assert model.ancestors(fit, rng=3).mean.shape == (FOREST.n_nodes,)


@pytest.mark.filterwarnings("ignore:k-hat")
@pytest.mark.parametrize("options", [{}, {"reml": False}], ids=["reml", "maximized"])
def test_both_engines(options):
    fit = glmm(**options).fit(Y["gaussian"], X, terms=TERMS, rng=0)
    where = np.random.default_rng(3).uniform(-1, 1, size=(5, 2))
    found = {}
    for engine, rank in (("dense", None), ("structured", N)):
        model = glmm(engine=engine, rank=rank, **options).on(Y["gaussian"], X, terms=TERMS)
        found[engine] = model.ancestors(fit, rng=0), model.elsewhere(fit, where, rng=0)
    (nodes, places), (same_nodes, near_places) = found.values()
    close(nodes, same_nodes, 1e-3)
    close(places, near_places, 0.1 * float(places.sd.min()))  # between cells, columns are an approximation
    assert np.corrcoef(found["dense"][1].mean, np.sin(2 * where[:, 0]))[0, 1] > 0.9


def test_after_a_fit_the_basis_of_the_fit_is_used(monkeypatch):
    model = glmm(engine="structured")
    fit = model.fit(Y["gaussian"], X, terms=TERMS, rng=0)
    before = model.elsewhere(fit, XY[:3], rng=0)
    monkeypatch.setattr("cellfate.engines.structured.field_basis", None)
    close(model.elsewhere(fit, XY[:3], rng=0), before)


def test_all_hyperparameters_held():
    held = {f"sd_{name}": ("fixed", 1.0) for name in ("lineage", "spatial", "residual")}
    held["lengthscale_spatial"] = ("fixed", 0.6)
    model = glmm(priors=held)
    fit = model.fit(Y["gaussian"], X, rng=0)
    found = model.ancestors(fit)
    np.testing.assert_allclose(found.mean[LEAF], fit.effects["lineage"][0], atol=1e-6)


def test_a_few_draws_at_a_time(fitted, monkeypatch):
    model, fit = fitted
    whole = model.ancestors(fit, rng=0)
    problem = model._problem
    monkeypatch.setattr(type(problem[1]), "points_at_once", lambda *_: 3)
    close(model.ancestors(fit, rng=0), whole, 2e-3)


def test_sites_that_do_not_settle_are_said(fitted, monkeypatch):
    model, fit = fitted
    monkeypatch.setattr(predict_module, "SETTLED", 0.0)
    evaluate = predict_module.evaluate

    def stopped(*args, **options):
        here = evaluate(*args, **options)
        here.fit.status[:2] = 1
        return here

    monkeypatch.setattr(predict_module, "evaluate", stopped)
    with pytest.warns(CellfateWarning, match="did not settle at 2 of 16 draws"):
        model.ancestors(fit, rng=0)


def test_what_cannot_be_predicted(fitted):
    model, fit = fitted
    for call, message in (
        (lambda: model.ancestors(fit, "clone"), "no component 'clone'; it has lineage, spatial"),
        (lambda: model.ancestors(fit, "spatial"), "component 'spatial' is no ancestry"),
        (lambda: model.elsewhere(fit, XY, component="lineage"), "component 'lineage' has no value at new positions"),
        (lambda: model.elsewhere(fit, np.zeros((2, 3))), r"have shape \(2, 3\).*wanted \(k, 2\)"),
        (lambda: model.elsewhere(fit, XY, [0, 1]), r"specimens \(2,\)"),
        (lambda: model.elsewhere(fit, [[np.nan, 0.0]]), "coordinates has 1 values that are NaN"),
        (lambda: model.ancestors(fit, count=0), "draws is 0"),
        (lambda: model.ancestors({"variance_lineage": np.ones(3)}), "draws have no 'variance_spatial'"),
        (lambda: glmm().ancestors(fit), "there is no data yet"),
    ):
        with pytest.raises(DataError, match=message):
            call()


def test_names_that_a_file_has_changed():
    forest = {"lineage/a": Brownian(FOREST, LEAF)}
    fit = cf.GLMM("gaussian", forest).fit(Y["gaussian"], X, rng=0)
    stored = {name.replace("/", "_"): x for name, x in fit.draws.items()}
    found = cf.GLMM("gaussian", forest).on(Y["gaussian"], X).ancestors(stored, "lineage/a", rng=0)
    assert np.isfinite(found.sd).all()
