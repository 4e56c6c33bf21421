"""Score tests: their distribution against simulation, a permutation of nothing, and exact integrals."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2

import cellfate as cf
import cellfate.inference.score as module
from cellfate.engines.choose import choose
from cellfate.inference.mode import find_mode
from cellfate.inference.score import Null, cauchy, chi_square_mixture, score_test, three_moments
from cellfate.inference.sites import Variational
from cellfate.io.anndata import read_cells
from cellfate.kernels import Brownian, Matern32
from cellfate.kernels.base import Component, unit_scale
from tests.problem import entries


@pytest.mark.parametrize("q", [0.5, 3.0, 9.0, 25.0])
def test_of_equal_weights_it_is_a_chi_square(q):
    """The saddlepoint errs by about one percent of the tail."""
    assert chi_square_mixture(np.full(3, 2.0), q) == pytest.approx(chi2.sf(q / 2, 3), rel=0.02)
    assert three_moments(6.0, 24.0, 192.0, q) == pytest.approx(chi2.sf(q / 2, 3), rel=1e-9)


def test_a_mixture_against_draws():
    rng = np.random.default_rng(0)
    weights = np.concatenate([rng.exponential(size=40), [8.0, -0.3]])
    drawn = rng.chisquare(1, size=(400_000, len(weights))) @ weights
    for tail in (0.5, 0.2, 0.05, 0.01, 0.001):
        q = np.quantile(drawn, 1 - tail)
        assert chi_square_mixture(weights, q) == pytest.approx(tail, rel=0.03 + 4 / np.sqrt(400_000 * tail))
    mean = weights.sum()  # nothing happens there
    near = [chi_square_mixture(weights, mean + x) for x in (-1e-2, -1e-9, 0.0, 1e-9, 1e-2)]
    assert np.all(np.diff(near) <= 1e-3)
    assert np.ptp(near) < 0.01


def test_cauchy_of_one_is_itself_and_of_many_between():
    assert cauchy([0.03]) == pytest.approx(0.03)
    assert cauchy([0.2, 0.2, 0.2]) == pytest.approx(0.2)
    assert 1e-20 < cauchy([1e-20, 0.9]) < 1e-19
    assert cauchy([1e-3, 1.0]) < 0.01
    assert cauchy([0.0, 0.5]) < 1e-200


def cells_of(n, seed, inheritance=0.5):
    adata = cf.datasets.simulate(n, inheritance=inheritance, rng=seed)
    return read_cells(adata, None, family="gaussian")


def score_of(y, kernels, name):
    """p-value of a component given the other."""
    n = len(y)
    rest = {k: v for k, v in kernels.items() if k != name}
    glmm = cf.GLMM("gaussian", rest).on(y, np.ones((n, 1)))
    model, engine, _ = glmm.problem
    null = Null(model, engine, Variational(), find_mode(model, engine, Variational()))
    own = Component(name, kernels[name])
    return score_test(null, choose("dense", [own], n, device=torch.device("cpu"), dtype=torch.float64)[0], own)


@pytest.mark.parametrize("absent", ["lineage", "spatial"])
def test_under_the_null_five_percent_are_below_five_percent(absent):
    """Gaussian data with the other component only; 300 sets, so that 5 % are known to 1.3 %."""
    cells = cells_of(100, 2)
    kernels = {"lineage": Brownian(cells.forest, cells.leaf), "spatial": Matern32(cells.coordinates, lengthscale=0.5)}
    there = "spatial" if absent == "lineage" else "lineage"
    k = unit_scale(entries(kernels[there], **({"lengthscale": 0.5} if there == "spatial" else {}))).numpy()
    root = np.linalg.cholesky(k + 0.5 * np.eye(cells.n))
    rng = np.random.default_rng(1)
    p = np.array([score_of(root @ rng.standard_normal(cells.n), kernels, absent).p for _ in range(300)])
    assert 0.012 < (p < 0.05).mean() < 0.09
    assert 0.4 < p.mean() < 0.6


def test_what_is_there_is_seen():
    cells = cells_of(200, 3)
    kernels = {"lineage": Brownian(cells.forest, cells.leaf), "spatial": Matern32(cells.coordinates)}
    k = unit_scale(entries(kernels["lineage"])) + unit_scale(entries(kernels["spatial"], lengthscale=0.5))
    y = np.linalg.cholesky(k.numpy() + 0.3 * np.eye(cells.n)) @ np.random.default_rng(0).standard_normal(cells.n)
    for name in kernels:
        found = score_of(y, kernels, name)
        assert found.p < 1e-4
        assert len(found.each) == (4 if name == "spatial" else 1)


def test_moments_by_probes_are_those_of_all_eigenvalues(monkeypatch):
    cells = cells_of(150, 4)
    kernels = {"lineage": Brownian(cells.forest, cells.leaf), "spatial": Matern32(cells.coordinates, lengthscale=0.5)}
    y = np.random.default_rng(0).standard_normal(cells.n)
    exact = score_of(y, kernels, "spatial").p
    monkeypatch.setattr(module, "EXACT", 0)
    monkeypatch.setattr(module, "PROBES", 4000)
    assert score_of(y, kernels, "spatial").p == pytest.approx(exact, abs=0.02)
