"""A variance of each component for every fate: against the shared one, a dense twin, and a truth in which the fates differ."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pytest
import torch

import cellfate as cf
from cellfate.engines.dense import DenseEngine
from cellfate.errors import CellfateWarning, DataError
from cellfate.kernels import Matern32
from cellfate.kernels.base import Component
from cellfate.kernels.fates import own_fields
from cellfate.kernels.groups import Intercepts
from cellfate.model.categorical import contrasts

N, LEVELS = 60, 4
NAMES = ["A", "B", "C", "D"]


@pytest.fixture(scope="module")
def problem() -> tuple[dict, np.ndarray]:
    adata = cf.datasets.simulate(N, family="categorical", n_fates=LEVELS, rng=3)
    rng = np.random.default_rng(0)
    sisters = np.kron(np.eye(N // 4), np.ones((4, 4))) + 0.1 * np.eye(N)
    kernels = {
        "lineage": sisters,
        "spatial": Matern32(adata.obsm["spatial"]),
        "clone": Intercepts(rng.integers(0, 9, N)),
    }
    return kernels, np.unique(np.asarray(adata.obs["fate"]), return_inverse=True)[1].astype(float)


def test_equal_variances_are_the_shared_one(problem):
    kernels, y = problem
    shared = cf.GLMM("categorical", kernels)
    own = cf.GLMM("categorical", kernels, per_fate=True)
    theta = {"variance_lineage": 0.8, "variance_spatial": 1.3, "variance_clone": 0.4}
    each = {f"{name}[{k}]": value / LEVELS for name, value in theta.items() for k in range(LEVELS)}
    one = shared.evaluate({**theta, "lengthscale_spatial": 0.6}, y, np.ones((N, 1)))
    other = own.evaluate({**each, "lengthscale_spatial": 0.6}, y, np.ones((N, 1)))
    assert other.free_energy == pytest.approx(one.free_energy, abs=1e-6)
    np.testing.assert_allclose(other.mean, one.mean, atol=1e-6)


def test_names_of_the_fates_do_not_matter(problem):
    """Contrasts single out no fate: with the fates in another order, each keeps its variance."""
    kernels, y = problem
    own = cf.GLMM("categorical", kernels, per_fate=True)
    order = np.array([2, 0, 3, 1])
    values = {f"variance_lineage[{k}]": 0.1 + 0.3 * k for k in range(LEVELS)}
    values |= {f"variance_spatial[{k}]": 0.5 - 0.1 * k for k in range(LEVELS)}
    rest = {f"variance_clone[{k}]": 0.2 for k in range(LEVELS)} | {"lengthscale_spatial": 0.6}
    moved = {name.replace(f"[{name[-2]}]", f"[{order[int(name[-2])]}]"): v for name, v in values.items()}
    one = own.evaluate({**values, **rest}, y, np.ones((N, 1)))
    other = own.evaluate({**moved, **rest}, order[y.astype(int)].astype(float), np.ones((N, 1)))
    gap = np.abs(other.mean[:, order] - one.mean) / np.sqrt(one.variance)
    assert gap.max() < 0.02  # quadrature in three dimensions goes along axes
    assert other.free_energy == pytest.approx(one.free_energy, abs=0.005)


def test_covariance_is_that_of_centred_fields(problem):
    """Fields of each fate with variances of their own, less their mean over the fates."""
    kernels, _ = problem
    h, variance = contrasts(LEVELS), np.array([0.3, 0.9, 0.0, 1.7])
    components = own_fields([Component("spatial", kernels["spatial"])], h.T, NAMES)
    engine = DenseEngine(components, N * (LEVELS - 1), device="cpu", dtype=torch.float64)
    lengthscale = torch.tensor([0.6], dtype=torch.float64)
    values = {"lengthscale": lengthscale, "lengthscale_spatial": lengthscale}
    from cellfate.kernels.base import Term, unit_scale

    terms = [
        Term(c.name, c.kernel.structure(values, engine.like), torch.tensor([v]), True)
        for c, v in zip(components, variance, strict=True)
    ]
    found = sum(engine.covariance(term)[0][0, 0].numpy() for term in terms)
    apart = np.linalg.norm(kernels["spatial"].coordinates[:, None] - kernels["spatial"].coordinates, axis=-1)
    s = np.sqrt(3) * apart / 0.6
    field = unit_scale(torch.as_tensor((1 + s) * np.exp(-s))).numpy()
    centre = np.eye(LEVELS) - 1 / LEVELS
    of_fates = np.kron(centre @ np.diag(LEVELS * variance) @ centre, field)
    up = np.kron(h, np.eye(N))
    np.testing.assert_allclose(up @ found @ up.T, of_fates, atol=1e-12)


def test_the_fate_with_a_field_has_the_variance():
    rng = np.random.default_rng(5)
    n = 240
    family = np.repeat(np.arange(n // 8), 8)
    sisters = (family[:, None] == family).astype(float)
    u = np.zeros((n, 3))
    u[:, 1] = 3.0 * rng.standard_normal(n // 8)[family]
    y = np.argmax(u + rng.gumbel(size=u.shape), 1).astype(float)
    glmm = cf.GLMM("categorical", {"lineage": sisters}, per_fate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)
        fit = glmm.fit(y, np.ones((n, 1)), levels=["a", "b", "c"], rng=0)
    share = {name: x.mean() for name, x in fit.draws.items() if name.startswith("share_lineage")}
    assert share["share_lineage[b]"] > 0.75
    mean, sd = fit.effects["lineage[b]"]
    centred = u[:, 1] * 2 / 3
    assert np.corrcoef(mean, centred)[0, 1] > 0.9
    inside = np.abs(mean - centred)[::8] < 1.96 * sd[::8]
    assert inside.mean() > 0.79  # four sds below 95% of 30 families


@pytest.mark.parametrize(
    ("arguments", "wrong", "says"),
    [
        ({"family": "bernoulli"}, DataError, "goes with family='categorical'"),
        ({"family": "categorical", "engine": "structured"}, NotImplementedError, "variances of their own"),
    ],
)
def test_where_it_cannot_be(problem, arguments, wrong, says):
    kernels, y = problem
    family = arguments.pop("family")
    with pytest.raises(wrong, match=says):
        cf.GLMM(family, {"spatial": kernels["spatial"]}, per_fate=True, **arguments).fit(y, np.ones((N, 1)))


def test_two_fates_have_one_field(problem):
    kernels, y = problem
    with pytest.raises(DataError, match="three fates or more"):
        cf.GLMM("categorical", kernels, per_fate=True).fit((y > 1).astype(float), np.ones((N, 1)))


def test_from_cells_to_a_file_and_back(tmp_path):
    adata = cf.datasets.simulate(90, family="categorical", n_fates=3, rng=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)
        cf.tl.decompose(adata, "fate", family="categorical", per_fate=True, spatial=None, rng=0)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    back = ad.read_h5ad(tmp_path / "cells.h5ad")
    shares = cf.get.components(back)
    assert list(shares["component"]) == ["lineage[0]", "lineage[1]", "lineage[2]"]
    assert shares["share"].sum() == pytest.approx(1)
    assert list(cf.get.effects(back).columns) == [f"lineage[{k}]_{x}" for k in range(3) for x in ("mean", "sd")]


def test_a_fit_is_taken_up_again():
    """By the names of the fates, with a variance for each."""
    adata = cf.datasets.simulate(36, family="categorical", n_fates=3, rng=1)
    adata.obs["fate"] = adata.obs["fate"].map({0: "a", 1: "b", 2: "c"}).astype("category")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)
        cf.tl.decompose(adata, "fate", family="categorical", per_fate=True, spatial=None, rng=0)
        cf.tl.prior_sensitivity(adata)
    assert "variance_lineage[b]" in cf.get.prior_sensitivity(adata).to_string()
