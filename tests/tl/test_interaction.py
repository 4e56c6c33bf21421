"""The interaction of ancestry and neighborhood: found where it is, and read again."""

import numpy as np
import pytest

import cellfate as cf
from cellfate import DataError, cli
from cellfate.kernels import Brownian, Matern32, Product
from cellfate.kernels.base import unit_scale
from cellfate.trees.convert import to_forest
from tests.embryo import embryo
from tests.problem import entries

N, LENGTHSCALE = 240, 0.5
TRUTH = {"lineage": 0.5, "spatial": 0.5, "lineage:spatial": 2.0, "residual": 0.2}


def balanced(first, last):
    if last - first == 1:
        return f"c{first}:0.2"
    half = (first + last) // 2
    return f"({balanced(first, half)},{balanced(half, last)}):1"


@pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")
def test_it_is_found():
    """Truth in the intervals, and evidence for the interaction where there is one."""
    rng = np.random.default_rng(3)
    forest = to_forest(balanced(0, N) + ";")
    lineage = Brownian(forest, forest.nodes_of([f"c{i}" for i in range(N)]))
    spatial = Matern32(rng.random((N, 2)))
    a, s = entries(lineage), entries(spatial, lengthscale=LENGTHSCALE)
    y = TRUTH["residual"] ** 0.5 * rng.normal(size=N)
    for name, k in (("lineage", a), ("spatial", s), ("lineage:spatial", a * s)):
        root = np.linalg.cholesky(TRUTH[name] * unit_scale(k).numpy() + 1e-10 * np.eye(N))
        y = y + root @ rng.normal(size=N)
    components = {"lineage": lineage, "spatial": spatial}
    without = cf.GLMM("gaussian", components).fit(y, np.ones((N, 1)), rng=0)
    fit = cf.GLMM("gaussian", components | {"lineage:spatial": Product(lineage, spatial)}).fit(
        y, np.ones((N, 1)), rng=0
    )
    for name, variance in TRUTH.items():
        low, high = np.quantile(fit.draws[f"variance_{name}"], [0.005, 0.995])
        assert low < variance < high
    assert np.median(fit.draws["share_lineage:spatial"]) > 0.3
    assert fit.log_evidence > without.log_evidence + 5


@pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")
def test_from_anndata():
    adata = embryo()
    cf.tl.decompose(adata, "size", family="gaussian", interaction=True, rng=0)
    assert list(cf.get.components(adata)["component"]) == ["lineage", "spatial", "lineage:spatial", "residual"]
    assert cf.get.diagnostics(adata)["engine"] == "dense"
    assert list(cf.get.hyperparameters(adata)["term"]) == ["lengthscale_spatial"]
    cf.tl.predict(adata, "ancestors", draws=4, rng=0)  # reads the settings again
    exact = cf.get.draws(adata)
    cf.tl.decompose(adata, "size", family="gaussian", interaction=True, engine="structured", key_added="few", rng=0)
    assert cf.get.diagnostics(adata, "few")["rank_lineage:spatial"] <= adata.n_obs
    few = cf.get.draws(adata, "few")
    for name in ("share_lineage", "share_spatial", "share_lineage:spatial"):
        assert abs(few[name].mean() - exact[name].mean()) < 0.25 * exact[name].std()
    with pytest.raises(DataError, match="interaction=True needs ancestry and neighborhood, and spatial is None"):
        cf.tl.decompose(adata, "size", family="gaussian", interaction=True, spatial=None)


def test_two_kernels_over_the_same_cells():
    one, other = Matern32(np.eye(3)[:, :2]), Matern32(np.eye(4)[:, :2])
    with pytest.raises(DataError, match="over 3 and 4 cells"):
        Product(one, other)


def test_on_the_command_line():
    start = ["decompose", "in.h5ad", "--fate", "count", "--family", "poisson", "--out", "out.h5ad"]
    assert vars(cli.parser().parse_args([*start, "--interaction"]))["interaction"] is True
