"""Correlations of fates through each component: the written likelihood, simulated truth, and bad input."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal

import cellfate as cf
from cellfate.errors import DataError
from cellfate.inference.correlate import Marginal, correlations
from cellfate.io.anndata import read_cells
from cellfate.kernels.base import unit_scale
from tests.problem import entries

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.CellfateWarning")
N = 150
TRUTH = {"lineage": 0.7, "spatial": -0.6, "residual": 0.3}


@pytest.fixture(scope="module")
def embryo():
    """Ten pairs of gaussian responses with known correlations, on one tree and one tissue."""
    adata = cf.datasets.simulate(N, family="gaussian", rng=5, inheritance=0.2)
    cells = read_cells(adata, "fate", family="gaussian")
    kernels = {
        "lineage": unit_scale(entries(cf.kernels.Brownian(cells.forest, cells.leaf))).numpy(),
        "spatial": unit_scale(entries(cf.kernels.Matern32(cells.coordinates), lengthscale=0.5)).numpy(),
        "residual": 0.3 * np.eye(N),
    }
    rng = np.random.default_rng(1)
    for k in range(10):
        pair = np.zeros((N, 2))
        for name, matrix in kernels.items():
            rho = TRUTH[name]
            between = np.linalg.cholesky([[1, rho], [rho, 1]])
            pair += np.linalg.cholesky(matrix + 1e-9 * np.eye(N)) @ rng.standard_normal((N, 2)) @ between.T
        adata.obs[f"a{k}"], adata.obs[f"b{k}"] = pair.T
    return adata


@pytest.fixture(scope="module")
def found(embryo):
    parts = []
    for k in range(10):
        cf.tl.correlate(embryo, [f"a{k}", f"b{k}"], family="gaussian", lengthscale=0.5)
        parts.append(cf.get.correlations(embryo))
    return pd.concat(parts)


@pytest.mark.parametrize("component", TRUTH)
def test_truth_is_within_standard_errors(found, component):
    """Ten independent pairs: z-scores in Fisher's scale have mean zero and spread one, each within their Monte-Carlo error."""
    rows = found[found["component"] == component]
    estimate = rows["correlation"].to_numpy()
    z = (np.arctanh(estimate) - np.arctanh(TRUTH[component])) / (rows["se"] / (1 - estimate**2)).to_numpy()
    assert abs(z.mean()) < 3.5 / np.sqrt(10)
    assert 0.4 < z.std() < 1.8


def test_it_is_the_mode_of_the_written_likelihood():
    rng, n = np.random.default_rng(0), 12
    roots = [
        {name: torch.as_tensor((lambda m: m @ m.T / n)(rng.normal(size=(n, n)))) for name in ("lineage", "spatial")}
        for _ in range(2)
    ]
    seen, noise = rng.normal(size=(2, n)), rng.uniform(0.5, 1, size=(2, n))
    pair = [
        Marginal(f"r{i}", torch.as_tensor(seen[i]), torch.as_tensor(noise[i]), roots[i], None, ()) for i in range(2)
    ]
    estimates = {c.component: c.estimate for c in correlations(*pair)}

    def value(rho):
        blocks = [np.diag(noise[i]) + sum((r @ r).numpy() for r in roots[i].values()) for i in range(2)]
        cross = sum(rho[name] * (roots[0][name] @ roots[1][name]).numpy() for name in rho)
        whole = np.block([[blocks[0], cross], [cross.T, blocks[1]]])
        return multivariate_normal(np.zeros(2 * n), whole).logpdf(seen.ravel()) + sum(
            np.log1p(-(r**2)) for r in rho.values()
        )

    best = value(estimates)
    for name in estimates:
        for step in (-0.02, 0.02):
            assert value(estimates | {name: np.clip(estimates[name] + step, -0.99, 0.99)}) < best


def test_a_fate_is_correlated_with_itself_and_not_with_its_like_reversed(embryo):
    embryo = embryo.copy()
    embryo.obs["same"], embryo.obs["turned"] = embryo.obs["a0"], -embryo.obs["a0"]
    cf.tl.correlate(embryo, ["a0", "same", "turned"], family="gaussian", lengthscale=0.5)
    table = cf.get.correlations(embryo).set_index(["response", "other"])
    assert (table.loc[("a0", "same"), "correlation"] > 0.8).all()
    assert (table.loc[("a0", "turned"), "correlation"] < -0.8).all()


def test_counts_and_a_copy(embryo):
    embryo = embryo.copy()
    for name in ("a1", "b1"):
        embryo.obs[name] = np.random.default_rng(2).poisson(np.exp(embryo.obs[name] + 1))
    out = cf.tl.correlate(embryo, ["a1", "b1"], family="poisson", lengthscale=0.5, copy=True, key_added="counts")
    assert "counts" not in embryo.uns
    table = cf.get.correlations(out, "counts").set_index("component")
    assert list(table.index) == ["lineage", "spatial"]
    assert table.loc["lineage", "correlation"] > 0 > table.loc["spatial", "correlation"]


@pytest.mark.parametrize(
    ("fates", "more", "text"),
    [
        ("a0", {}, "wanted a list of two or more names"),
        (["a0", "a0"], {}, "each once"),
        (["a0", "no"], {}, "neither obs columns nor genes: 'no'"),
        (["a0", "b0"], {"key_added": "truth"}, "no table of correlations"),
    ],
)
def test_wrong_input_is_named(embryo, fates, more, text):
    with pytest.raises(DataError, match=text):
        cf.tl.correlate(embryo, fates, family="gaussian", **more)


def test_without_a_table_it_says_what_to_run():
    with pytest.raises(DataError, match=r"Run `cf\.tl\.correlate"):
        cf.get.correlations(cf.datasets.simulate(20, rng=0))


def test_successes_have_their_trials(embryo):
    adata = embryo.copy()
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        adata.obs[name] = rng.binomial(10, 1 / (1 + np.exp(-adata.obs["a0"] + adata.obs["a0"].mean()))).astype(float)
    adata.obs["tries"] = 10
    cf.tl.correlate(adata, ["one", "two"], family="binomial", trials="tries", lengthscale=0.5)
    table = cf.get.correlations(adata).set_index("component")
    assert table.loc["lineage", "correlation"] > 0.5
    assert set(table["status"]) <= {"converged", *(s for s in table["status"] if "absent" in s)}


def test_no_maximum_is_no_certainty():
    """Where the search cannot have ended at a maximum the error is unknown, and it is said."""
    one = torch.eye(3, dtype=torch.float64)
    part = Marginal(
        "a", torch.ones(3, dtype=torch.float64), torch.full((3,), 1e-12), {"x": one}, None, ("stopped early",)
    )
    (found,) = correlations(part, part)
    assert "stopped early" in found.status
