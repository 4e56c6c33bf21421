"""What a design can tell: against the information matrix written out, and against what fits find."""

import numpy as np
import pytest
import torch

import cellfate as cf
import cellfate.inference.identifiability as module
from cellfate import DataError
from cellfate.inference.mode import find_mode
from cellfate.inference.report import mode_values
from cellfate.inference.sites import Variational
from cellfate.io.anndata import read_cells
from cellfate.kernels import Brownian, Matern32
from cellfate.kernels.base import unit_scale
from tests.embryo import embryo
from tests.problem import entries

KEY = "cellfate_identifiability"
N, LENGTHSCALE, STEP = 90, 0.5, 1e-4


@pytest.fixture(scope="module")
def adata():
    return cf.datasets.simulate(N, inheritance=0.7, rng=1)


def written_out(adata, variances, precision, *, residual):
    """Covariance of both estimates and alignment, with dense matrices and nothing else."""
    cells = read_cells(adata, None, family="gaussian")
    kernels = Brownian(cells.forest, cells.leaf), Matern32(cells.coordinates)

    def spatial(lengthscale):
        return unit_scale(entries(kernels[1], lengthscale=lengthscale)).numpy()

    a, s = unit_scale(entries(kernels[0])).numpy(), spatial(LENGTHSCALE)
    slope = spatial(LENGTHSCALE * np.exp(STEP)) - spatial(LENGTHSCALE * np.exp(-STEP))
    parts = [a, s, variances[1] * slope / (2 * STEP)] + ([np.eye(N)] if residual else [])
    v = variances[0] * a + variances[1] * s + np.eye(N) / precision + 100.0  # the intercept, of prior sd 10
    r = np.linalg.inv(v)
    information = np.array([[np.trace(r @ p @ r @ q) / 2 for q in parts] for p in parts])
    wide = 10 * sum(variances)
    weak = 1 / np.array([wide, wide, np.log(10), wide][: len(parts)]) ** 2
    covariance = np.linalg.inv(information + np.diag(weak))
    p = np.eye(N) - 1 / N
    one, other = p @ a @ p, p @ s @ p
    return covariance[:2, :2], (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)


@pytest.mark.parametrize("size", [1.0, 0.01])
@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
def test_against_the_information_matrix_written_out(adata, family, size):
    """Small variances, too, are known no better than the data know them."""
    given = {"lineage": 1.5 * size, "spatial": 0.7 * size} | ({"residual": 0.5} if family == "gaussian" else {})
    cf.pp.identifiability(adata, family=family, variances=given, lengthscales=[LENGTHSCALE])
    row = adata.uns[KEY].iloc[0]
    precision = 2.0
    if family == "bernoulli":  # E p (1 - p) by a fine sum
        z = np.linspace(-12, 12, 20_001)
        p = 1 / (1 + np.exp(-z * (2.2 * size) ** 0.5))
        weight = np.exp(-(z**2) / 2)
        precision = (p * (1 - p) * weight).sum() / weight.sum()
    covariance, alignment = written_out(adata, (1.5 * size, 0.7 * size), precision, residual=family == "gaussian")
    error = np.sqrt(np.diag(covariance))
    assert row["alignment"] == pytest.approx(alignment, rel=1e-9)
    assert row["error_lineage"] == pytest.approx(error[0], rel=1e-4)
    assert row["error_spatial"] == pytest.approx(error[1], rel=1e-4)
    assert row["correlation"] == pytest.approx(covariance[0, 1] / error.prod(), rel=1e-4, abs=1e-6)
    slope = np.array([0.7, -1.5]) / 2.2**2 / size
    assert row["error_share"] == pytest.approx(np.sqrt(slope @ covariance @ slope), rel=1e-4)
    assert row["share"] == pytest.approx(1.5 / 2.2)


def test_probes_for_many_cells_and_columns_for_a_field(adata, monkeypatch):
    cf.pp.identifiability(adata, lengthscales=[LENGTHSCALE])
    exact = adata.uns[KEY].iloc[0]
    cf.pp.identifiability(
        adata, lengthscales=[LENGTHSCALE], rank=N
    )  # as many columns as cells: the engine of linear cost
    swept = adata.uns[KEY].iloc[0]
    for name in ("alignment", "error_lineage", "error_spatial", "power_lineage", "power_spatial"):
        # power is a share of 2,000 draws, which are made in other ways: each knows it to about 0.015
        assert swept[name] == pytest.approx(exact[name], rel=1e-3, abs=0.05 * name.startswith("power")), name
    monkeypatch.setattr(module, "EXACT", 0)
    monkeypatch.setattr(module, "PROBES", 2000)
    cf.pp.identifiability(adata, lengthscales=[LENGTHSCALE])
    probed = adata.uns[KEY].iloc[0]
    for name in ("alignment", "error_lineage", "error_spatial", "power_lineage"):
        # 2,000 probes know a trace to about 2 %, 512 draws a power to 0.022
        assert probed[name] == pytest.approx(exact[name], rel=0.05, abs=0.07 * name.startswith("power")), name


def test_errors_are_those_of_fits():
    """Spread of estimates over simulated fates with cells and tree held, by a gaussian fate, against what is expected."""
    adata = cf.datasets.simulate(200, inheritance=0.5, rng=5)
    cells = read_cells(adata, None, family="gaussian")
    kernels = {"lineage": Brownian(cells.forest, cells.leaf), "spatial": Matern32(cells.coordinates, lengthscale=0.5)}
    variances = {"lineage": 1.0, "spatial": 1.0, "residual": 0.2}
    a, s = (unit_scale(entries(kernels[n], **({"lengthscale": 0.5} if n == "spatial" else {}))) for n in kernels)
    root = np.linalg.cholesky((a + s + 0.2 * torch.eye(200)).numpy())
    rng = np.random.default_rng(0)
    flat = dict.fromkeys(["sd_lineage", "sd_spatial", "sd_residual"], "flat")
    found = []
    for _ in range(100):
        glmm = cf.GLMM("gaussian", kernels, priors=flat)
        model, engine, _ = glmm.on(3 + root @ rng.standard_normal(200), np.ones((200, 1))).problem
        mode = mode_values(model, find_mode(model, engine, Variational()))
        found.append([mode["variance_lineage"], mode["variance_spatial"]])
    cf.pp.identifiability(adata, family="gaussian", variances=variances, lengthscales=[0.5])
    row = adata.uns[KEY].iloc[0]
    error = np.std(found, axis=0, ddof=1)
    # the length-scale, held in these fits, costs a little; an sd of 100 is known to 7 %
    assert row["error_lineage"] == pytest.approx(error[0], rel=0.3)
    assert row["error_spatial"] == pytest.approx(error[1], rel=0.35)


@pytest.mark.parametrize("variance", [0.2, 1.0])
def test_power_is_how_often_the_score_calls(adata, variance):
    """Of the score for ancestry given neighborhood, with what the nuisance parameters mimic taken out, over gaussian draws."""
    given = {"lineage": variance, "spatial": 0.7, "residual": 0.5}
    cf.pp.identifiability(adata, family="gaussian", variances=given, lengthscales=[LENGTHSCALE])
    stated = adata.uns[KEY].iloc[0]["power_lineage"]
    cells = read_cells(adata, None, family="gaussian")
    kernels = Brownian(cells.forest, cells.leaf), Matern32(cells.coordinates)
    spatial = [unit_scale(entries(kernels[1], lengthscale=LENGTHSCALE * np.exp(h))).numpy() for h in (-STEP, 0, STEP)]
    a, others = (
        unit_scale(entries(kernels[0])).numpy(),
        [spatial[1], 0.7 * (spatial[2] - spatial[0]) / (2 * STEP), np.eye(N)],
    )
    v = 0.7 * spatial[1] + 0.5 * np.eye(N)
    r = np.linalg.inv(v + 100.0)
    cross = np.array([np.trace(r @ a @ r @ q) for q in others])
    among = np.array([[np.trace(r @ p @ r @ q) for q in others] for p in others])
    score = r @ (a - sum(w * q for w, q in zip(np.linalg.solve(among, cross), others, strict=True))) @ r
    rng = np.random.default_rng(0)
    called = []
    for whole in (v, v + variance * a):
        y = np.linalg.cholesky(whole) @ rng.standard_normal((N, 20_000))
        called.append((y * (score @ y)).sum(0))
    power = (called[1] > np.quantile(called[0], 0.95)).mean()
    assert 0.15 < power < 0.95
    assert stated == pytest.approx(power, abs=0.03)  # 20,000 draws know it to 0.004; the rest is for three cumulants


def test_confounding_is_seen():
    """Positions that are the tree: families of sisters in one place each."""
    newick = (
        "(" + ",".join(f"(c{4 * i}:0.1,c{4 * i + 1}:0.1,c{4 * i + 2}:0.1,c{4 * i + 3}:0.1):1" for i in range(40)) + ");"
    )
    rng = np.random.default_rng(0)
    places = np.repeat(rng.uniform(0, 10, (40, 2)), 4, axis=0) + 0.01 * rng.normal(size=(160, 2))
    from anndata import AnnData

    adata = AnnData(np.zeros((160, 1)))
    adata.obs_names = [f"c{i}" for i in range(160)]
    adata.obsm["spatial"] = places
    cf.pp.set_tree(adata, newick)
    cf.pp.identifiability(adata, lengthscales=[0.2, 5.0])
    near, far = (adata.uns[KEY].iloc[i] for i in range(2))
    assert near["alignment"] > 0.95 > far["alignment"]
    assert near["correlation"] < -0.6 < far["correlation"]
    assert near["verdict"].startswith("confounded")
    assert near["power_lineage"] < far["power_lineage"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "one yes or no per cell, 0.5 of them yes; variances lineage 1, spatial 1"),
        ({"family": "binomial", "trials": 10, "mean": 0.2}, "10 tries per cell, 0.2 of them a success"),
        ({"family": "gaussian"}, "a measurement per cell; variances lineage 1, spatial 1, residual 1"),
    ],
)
def test_the_log_says_what_was_assumed(arguments, said, adata, caplog):
    with caplog.at_level("INFO", logger="cellfate"):
        cf.pp.identifiability(adata, lengthscales=[0.5], copy=True, **arguments)
    assert f"assumed: {said}" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lineage": None}, "give both a tree and coordinates"),
        ({"family": "beta"}, "family"),
        ({"lineage_kernel": "ou"}, "has a shape of its own"),
        ({"spatial_kernel": "graph"}, "spatial_kernel"),
        ({"mean": 2.0}, "mean is 2.0, wanted the mean of a bernoulli fate, between 0 and 1"),
        ({"variances": {"residual": 1.0}}, "variances has \\['residual'\\]"),
        ({"lengthscales": [0.0]}, "wanted positive numbers in the units"),
        ({"key_added": "tree"}, r"adata.uns\['tree'\] holds a .* that is no table of identifiability"),
        ({"key_added": "spatial"}, "key_added is 'spatial', where other packages keep their own"),
    ],
)
def test_wrong_questions(arguments, message):
    adata = embryo()
    with pytest.raises(DataError, match=message):
        cf.pp.identifiability(adata, **arguments)
    assert KEY not in adata.uns


def test_trials_are_so_many_yeses_or_noes(adata):
    """One trial is a bernoulli fate; of many, errors are those of what is measured directly, with that precision."""
    tables = {}
    for name, arguments in {
        "bernoulli": {"family": "bernoulli"},
        "one": {"family": "binomial", "trials": 1},
        "many": {"family": "binomial", "trials": 40},
    }.items():
        found = cf.pp.identifiability(adata, lengthscales=[LENGTHSCALE], copy=True, **arguments)
        tables[name] = found.uns[KEY].drop(columns="verdict").iloc[0].astype(float)
    np.testing.assert_allclose(tables["one"], tables["bernoulli"])
    z, w = np.polynomial.hermite_e.hermegauss(200)
    p = 1 / (1 + np.exp(-np.sqrt(2) * z))
    precision = 40 * float((w * p * (1 - p)).sum() / w.sum())
    expected = written_out(adata, (1.0, 1.0), precision, residual=False)[0]
    np.testing.assert_allclose(
        tables["many"][["error_lineage", "error_spatial"]], np.sqrt(np.diag(expected)[:2]), rtol=1e-3
    )


def test_a_copy_leaves_adata_alone():
    adata = embryo()
    copy = cf.pp.identifiability(adata, lengthscales=[10.0], copy=True)
    assert KEY in copy.uns
    assert KEY not in adata.uns
