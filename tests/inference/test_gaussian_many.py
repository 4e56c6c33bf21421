"""Many gaussian responses at once against each by itself, and against the covariance written out."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

import cellfate as cf
from cellfate.engines.structured import StructuredEngine
from cellfate.errors import DataError
from cellfate.inference.free_energy import evaluate
from cellfate.inference.gaussian_many import Together, can_serve, fit_gaussian_many
from cellfate.inference.mode import find_mode
from cellfate.inference.sites import Variational
from cellfate.kernels import Brownian, Intercepts, Matern32, OrnsteinUhlenbeck
from cellfate.kernels.base import Component, unit_scale
from cellfate.trees.convert import to_forest
from tests.problem import entries, random_newick

N = 150
TERMS = ("Intercept", "x")
RATIOS = [
    (0.5, 0.3),
    (1.0, 0.0),
    (0.0, 0.8),
    (0.0, 0.0),
    (2.0, 2.0),
]  # variances of lineage and space over the residual's


@lru_cache
def problem():
    """Components, design and five responses of 150 cells, from nothing but noise to little noise."""
    rng = np.random.default_rng(3)
    names = [f"c{i}" for i in range(N)]
    forest = to_forest(random_newick(names, rng))
    lineage, spatial = Brownian(forest, forest.nodes_of(names)), Matern32(rng.random((N, 2)))
    design = np.column_stack([np.ones(N), rng.normal(size=N)])
    fields = [
        np.linalg.cholesky(unit_scale(k).numpy() + 1e-8 * np.eye(N)) @ rng.normal(size=(N, len(RATIOS)))
        for k in (entries(lineage), entries(spatial, lengthscale=0.2))
    ]
    noise, units = rng.normal(size=(N, len(RATIOS))), np.array([1.0, 30.0, 0.01, 1.0, 1.0])
    ratios = np.sqrt(RATIOS).T
    y = units * (4 + 0.3 * design[:, 1:] + ratios[0] * fields[0] + ratios[1] * fields[1] + noise)
    return (Component("lineage", lineage), Component("spatial", spatial)), design, y


def names_of(y):
    return [f"gene{i}" for i in range(y.shape[1])]


@lru_cache
def located(rank=N, window=(0.05, 0.8)):
    """Posteriors over a window of length-scales, their modes, and the engine that evaluates them one by one."""
    components, design, y = problem()
    work = Together(components, design, TERMS, None, {}, rank, "cpu")
    models = [work.model(column).within({"lengthscale_spatial": window}) for column in y.T]
    posteriors, modes = work.located(window, models, y)
    engine = StructuredEngine(components, N, device="cpu", dtype=torch.float64, rank=rank, ranges={"spatial": window})
    return posteriors, modes, engine


def by_engine(model, engine, u):
    u = torch.as_tensor(u)
    value = evaluate(model, engine, model.theta(u), Variational(), tolerance=1e-9).free_energy
    return (value + model.log_prior(u)).numpy()


def test_a_point_of_the_tables_is_the_likelihood_of_the_written_covariance():
    components, design, y = problem()
    posteriors, _, _ = located()
    model, scale = posteriors.models[0], posteriors.scale[0]
    grid, shared = posteriors.tables.shared.grid, posteriors.tables.shared
    i, j, k = 20, 7, 22
    gamma, l, rho, v = grid.lineage.natural[i], np.exp(grid.lengthscale.x[j]), grid.columns.natural[k], 0.3
    lineage = unit_scale(entries(components[0].kernel)).numpy()
    spatial = unit_scale(entries(components[1].kernel, lengthscale=l)).numpy()
    covariance = v * (np.eye(N) + gamma * lineage + rho * spatial) * scale**2
    covariance += (design * model.beta_sd.numpy() ** 2) @ design.T
    found = np.concatenate([posteriors.tables.forms[0, i, j, k], shared.forms[i, j, k]])[None, None]
    value = posteriors.log_likelihood(np.array([0]), np.array([[v]]), found)[0, 0]
    assert value == pytest.approx(multivariate_normal(np.zeros(N), covariance).logpdf(y[:, 0]), abs=1e-5)


@pytest.mark.parametrize(("rank", "tolerance"), [(N, 1e-3), (96, 0.03)])
def test_between_the_points_it_is_what_the_engine_says(rank, tolerance):
    """About the modes, also where columns leave a part of the field to the cells, here up to a twelfth of its variance.

    A log posterior that is off by d moves a posterior mean by no more than the spread of d, in posterior sds.
    """
    posteriors, modes, engine = located(rank)
    rng = np.random.default_rng(0)
    for i, model in enumerate(posteriors.models):
        sd = 1 / np.sqrt(np.maximum(np.diag(modes.curvature[i]), 1.0))
        u = modes.u[i] + np.vstack([np.zeros(4), 0.5 * rng.normal(size=(6, 4))]) * sd
        u = np.clip(u, *(b[0] + e for b, e in zip(posteriors.bounds(np.array([i])), (0.01, -0.01), strict=True)))
        mine = posteriors.log_posterior(np.array([i]), u[None], posteriors.forms(np.array([i])))[0]
        off = mine - by_engine(model, engine, u)
        assert abs(off.mean()) < tolerance
        assert off.std() < tolerance


def test_modes_are_those_of_the_search_one_by_one():
    posteriors, modes, engine = located()
    for i, model in enumerate(posteriors.models):
        alone = find_mode(model, engine, Variational(), gain=1e-9)
        assert modes.log_posterior[i] >= alone.log_posterior - 1e-3
        unit = posteriors.unit(np.array([i]))[0]
        if modes.log_posterior[i] < alone.log_posterior + 1e-3:
            sd = 1 / np.sqrt(np.maximum(np.diag(modes.curvature[i]) * unit**2, 1.0))
            assert (np.abs(modes.u[i] - alone.u.numpy()) / unit < 0.05 * sd).all()


@lru_cache
def together(seed=0):
    components, design, y = problem()
    return list(fit_gaussian_many(components, design, TERMS, y, names_of(y), rank=N, device="cpu", seed=seed))


def test_estimates_are_those_of_one_by_one():
    components, design, y = problem()
    for i, fit in enumerate(together()):
        glmm = cf.GLMM("gaussian", components, engine="dense", device="cpu")
        alone = glmm.fit(y[:, i], design, terms=TERMS, response=f"gene{i}", rng=0)
        assert fit.log_evidence == pytest.approx(alone.log_evidence, abs=0.1)
        assert fit.mode.keys() == alone.mode.keys()
        assert fit.draws.keys() == alone.draws.keys()
        latent = sum(scale == "latent" for scale in alone.shares["scale"])
        for column in ("share", "share_lower", "share_upper"):
            np.testing.assert_allclose(fit.shares[column][:latent], alone.shares[column][:latent], atol=0.05)
        for name in ("variance_lineage", "variance_spatial", "variance_residual", "beta[x]"):
            a, b = fit.draws[name], alone.draws[name]
            assert abs(a.mean() - b.mean()) < 0.2 * b.std()
            assert 0.8 < a.std() / b.std() < 1.25


def test_company_and_order_do_not_matter():
    components, design, y = problem()
    order = [3, 0, 4]
    some = fit_gaussian_many(
        components, design, TERMS, y[:, order], [f"gene{i}" for i in order], rank=N, device="cpu", seed=0, chunk_size=2
    )
    for i, fit in zip(order, some, strict=True):
        other = together()[i]
        assert fit.shares["response"][0] == f"gene{i}"
        assert fit.log_evidence == other.log_evidence
        for name, draws in fit.draws.items():
            np.testing.assert_array_equal(draws, other.draws[name], err_msg=name)


def test_another_seed_gives_other_draws_of_the_same_posterior():
    components, design, y = problem()
    (other,) = fit_gaussian_many(components, design, TERMS, y[:, :1], ["gene0"], rank=N, device="cpu", seed=1)
    a, b = other.draws["variance_lineage"], together()[0].draws["variance_lineage"]
    assert not np.array_equal(a, b)
    assert abs(a.mean() - b.mean()) < 0.1 * b.std()


def test_a_tree_alone_and_a_tree_with_groups():
    components, design, y = problem()
    groups = Component("batch", Intercepts(np.arange(N) % 6))
    for some in (components[:1], (components[0], groups), (groups,)):
        (fit,) = fit_gaussian_many(some, design, TERMS, y[:, :1], ["gene0"], device="cpu")
        alone = cf.GLMM("gaussian", some, engine="structured", device="cpu").fit(y[:, 0], design, terms=TERMS, rng=0)
        assert fit.log_evidence == pytest.approx(alone.log_evidence, abs=0.1)
        for name in alone.mode:
            assert fit.mode[name] == pytest.approx(alone.mode[name], rel=0.02, abs=1e-3)


def test_what_is_refused_is_said():
    components, design, y = problem()
    tree = components[0].kernel
    ou = Component("lineage", OrnsteinUhlenbeck(tree.forest, tree.leaf))
    assert can_serve(components) is None
    assert "hyperparameter of its own" in can_serve((ou,))
    assert "reml" in can_serve(components, reml=False)
    assert "dense" in can_serve(components, engine="dense")
    assert "one more component" in can_serve((*components, Component("batch", Intercepts(np.arange(N) % 6))))
    with pytest.raises(DataError, match="hyperparameter of its own"):
        next(fit_gaussian_many((ou,), design, TERMS, y, names_of(y)))
