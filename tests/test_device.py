"""A model on a device: nothing is mixed with the CPU, and the numbers are the same. The device is a fake one, see `tests.fake_cuda`."""

import numpy as np
import pytest
import torch

import cellfate as cf
from cellfate.inference.checks import check
from cellfate.inference.free_energy import evaluate_with_gradient
from cellfate.inference.hyperposterior import integrate
from cellfate.inference.locate import locate
from cellfate.kernels import Intercepts, Matern32, OrnsteinUhlenbeck, Product
from cellfate.trees.convert import to_forest
from tests.fake_cuda import OnDevice, fake_cuda
from tests.problem import random_newick

N = 24
FAMILIES = ("gaussian", "bernoulli", "binomial", "poisson", "negative_binomial", "beta", "ordinal", "categorical")


def components(interaction=True):
    rng = np.random.default_rng(0)
    names = [f"c{i}" for i in range(N)]
    forest = to_forest({"a": random_newick(names[:10], rng), "b": random_newick(names[10:], rng)})
    specimen = np.repeat([0, 1], [10, 14])
    tree, field = OrnsteinUhlenbeck(forest, forest.nodes_of(names)), Matern32(rng.random((N, 2)), specimen)
    out = {"lineage": tree, "spatial": field, "batch": Intercepts(rng.integers(3, size=N))}
    return out | ({"lineage:spatial": Product(tree, field)} if interaction else {})


def response(family):
    adata = cf.datasets.simulate(N, family=family, rng=2)
    codes = adata.obs["fate"]
    if family in ("categorical", "ordinal"):
        codes = codes.astype("category").cat.codes
    return codes.to_numpy().astype(float), {"trials": 10} if family == "binomial" else {}


def evaluated(family, engine, device):
    y, more = response(family)
    glmm = cf.GLMM(family, components(family != "categorical"), engine=engine, device=device)
    glmm.on(y, np.ones((N, 1)), **more)
    model, engine, _ = glmm.problem
    u = model.start()[None] + 0.1
    assert isinstance(u, OnDevice) == (device == "cuda")
    here = evaluate_with_gradient(model, engine, u, glmm.rule, tolerance=1e-8)
    posterior, term = here.posterior, here.terms[0]
    draws = posterior.sample(here.terms, 2, [torch.Generator().manual_seed(0)])
    found = [
        here.free_energy,
        here.gradient,
        posterior.mean,
        posterior.variance,
        posterior.component_variance(term),
        draws[term.name],
    ]
    if family != "categorical":
        found += [*posterior.ancestors(term), *posterior.elsewhere(here.terms[1], np.zeros((2, 2)), np.array([0, 1]))]
    return [x.detach().cpu().numpy() for x in found]


@pytest.mark.parametrize("engine", ["dense", "structured"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")
def test_every_family_stays_on_its_device(family, engine):
    wanted = evaluated(family, engine, "cpu")
    with fake_cuda():
        found = evaluated(family, engine, "cuda")
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(
            a, b, rtol=1e-6, atol=1e-8
        )  # sweeps by level and in post-order differ in the last digits


@pytest.mark.parametrize("engine", ["dense", "structured"])
@pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")
def test_mode_and_integration_stay_there(engine, monkeypatch):
    """The search, and a few points of the integral."""
    import cellfate.inference.hyperposterior as hyperposterior

    monkeypatch.setattr(hyperposterior, "MANY", 10**9)
    y, _ = response("gaussian")
    field = {"spatial": components(interaction=False)["spatial"]}

    def integrated(device):
        glmm = cf.GLMM("gaussian", field, engine=engine, rank=8, device=device).on(y, np.ones((N, 1)))
        model, its, mode = locate(glmm.problem[0], glmm.problem[1], glmm.rule)
        posterior = integrate(model, its, glmm.rule, mode, np.random.default_rng(0))
        return mode.free_energy, posterior.log_evidence, posterior.values["sd_spatial"].mean()

    wanted = integrated("cpu")
    with fake_cuda():
        found = integrated("cuda")
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_the_fake_device_refuses_company():
    with fake_cuda(), pytest.raises(RuntimeError, match="on the CPU, others on cuda:0"):
        torch.ones(3, device="cuda") + torch.ones(3)


@pytest.mark.parametrize("engine", ["dense", "structured"])
@pytest.mark.parametrize("family", ["binomial", "ordinal", "categorical"])
@pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")
def test_checks_stay_there(family, engine):
    """Cells and sets of cells predicted from the rest."""

    def checked(device):
        y, more = response(family)
        glmm = cf.GLMM(family, {"batch": components()["batch"]}, engine=engine, device=device)
        model, its, _ = glmm.on(y, np.ones((N, 1)), **more).problem
        theta = model.theta(model.start()[None])
        found = check(model, its, glmm.rule, theta, 1, {"set": np.arange(N) % 3}, 2, np.random.default_rng(0))
        return [x for one in found.predicted.values() for x in (one.log_p, one.below, one.upto, one.mean)]

    wanted = checked("cpu")
    with fake_cuda():
        found = checked("cuda")
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
