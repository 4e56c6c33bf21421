"""A component that is not there: its standard deviation piles up at zero, and its quantiles are still those of long NUTS runs."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm

import cellfate as cf
from cellfate.kernels.lineage import Brownian
from cellfate.kernels.spatial import Matern32
from cellfate.trees.convert import to_forest

# Made by benchmarks/nuts.py; the file says with which command and versions.
REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "absent.json").read_text())
CASES = REFERENCE["cases"]
LEVELS = np.array(REFERENCE["percentiles"]) / 100
PRIORS = {"sd_lineage": ("half_normal", 2.0), "sd_spatial": ("half_normal", 2.0), "beta": ("normal", 5.0)}
WITHIN = 0.08  # on the scale of the standard deviation


def rebuild(case):
    adata = cf.datasets.simulate(**case["simulate"])
    digest = hashlib.sha256(adata.obs["fate"].to_numpy().astype("<i8").tobytes())
    digest.update(np.round(1e6 * adata.obsm["spatial"]).astype("<i8").tobytes())
    assert digest.hexdigest() == case["checksum"], "simulate() gives other data now: make the reference anew"
    return adata


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_long_enough_and_at_zero(name):
    case = CASES[name]
    assert case["piles_up"]
    assert case["divergences"] <= 10
    for sd in ("sd_lineage", "sd_spatial"):
        assert case[sd]["r_hat"] < 1.01
        assert case[sd]["effective_size"] > 2000


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_quantiles_agree_with_nuts(name):
    case = CASES[name]
    adata = rebuild(case)
    simulated = case["simulate"]
    cf.tl.decompose(
        adata, "fate", family=simulated["family"], lengthscale=simulated["lengthscale"], priors=PRIORS, rng=0
    )
    draws = cf.get.draws(adata)
    for component in ("lineage", "spatial"):
        found = np.quantile(np.sqrt(draws[f"variance_{component}"]), LEVELS)
        np.testing.assert_allclose(found, case[f"sd_{component}"]["quantiles"], rtol=0, atol=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_gaussian_in_log_variance_does_not(name):
    """The usual shortcut, on the very same free energy: a Gaussian at the mode of the posterior of log variances."""
    case = CASES[name]
    adata = rebuild(case)
    simulated = case["simulate"]
    forest = to_forest(adata.uns["tree"])
    components = {
        "lineage": Brownian(forest, forest.nodes_of(adata.obs_names)),
        "spatial": Matern32(adata.obsm["spatial"], lengthscale=simulated["lengthscale"]),
    }
    glmm = cf.GLMM(simulated["family"], components, priors=PRIORS)
    y, design = adata.obs["fate"].to_numpy(), np.ones((adata.n_obs, 1))
    glmm.evaluate({"variance_lineage": 1.0, "variance_spatial": 1.0}, y, design)

    def log_posterior(log_sd):  # (points, 2), density of log sds, which are log variances up to a factor
        sd = np.exp(log_sd)
        theta = {"variance_lineage": sd[:, 0] ** 2, "variance_spatial": sd[:, 1] ** 2}
        return glmm.evaluate(theta).free_energy + (log_sd - sd**2 / 8).sum(1)

    mode = minimize(
        lambda x: -log_posterior(x[None])[0], np.log([0.5, 0.5]), method="Nelder-Mead", options={"xatol": 1e-3}
    ).x
    h = 0.1
    steps = h * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [-1, -1], [1, -1], [-1, 1]])
    f = log_posterior(mode + steps)
    across = (f[5] + f[6] - f[7] - f[8]) / (4 * h**2)
    hessian = np.array([[(f[1] + f[2] - 2 * f[0]) / h**2, across], [across, (f[3] + f[4] - 2 * f[0]) / h**2]])
    spread = np.sqrt(np.diag(np.linalg.inv(-hessian)))
    i = ("lineage", "spatial").index(case["absent"])
    shortcut = np.exp(mode[i] + spread[i] * norm.ppf(LEVELS))
    assert np.abs(shortcut - case[f"sd_{case['absent']}"]["quantiles"]).max() > WITHIN
