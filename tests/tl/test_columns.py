"""Graphs, niches and slopes through the whole of it: the same fit as with their covariances given, and known truths."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array

import cellfate as cf
from cellfate import CellfateWarning
from cellfate.kernels import Component, Composition, Given, Graph, Intercepts, Slopes
from cellfate.kernels.base import unit_scale
from cellfate.places import neighbors
from cellfate.places.neighbors import nearest_neighbors, neighbor_average
from tests.problem import double, entries

N = 72
# What is fitted is small on purpose, and the posterior of a variance behind two or three columns is wide.
ROUGH = pytest.mark.filterwarnings("ignore:k-hat|between evaluated points:cellfate.errors.CellfateWarning")


def tissue(seed=0):
    """Positions, their graph, types that neighbors share, and levels with a covariate whose mean square is 1."""
    rng = np.random.default_rng(seed)
    xy = rng.random((N, 2))
    nearest = nearest_neighbors(xy, np.zeros(N, dtype=int), 5)
    types = np.eye(3)[np.digitize(xy[:, 0] + 0.3 * rng.normal(size=N), [0.3, 0.7])]
    x = rng.normal(size=N)
    x -= x.mean()
    return rng, nearest + nearest.T, types, np.arange(N) % 9, x / x.std()


def kernels():
    _, graph, types, codes, x = tissue()
    return {
        "slopes": Slopes(codes, x),
        "composition": Composition(neighbor_average(graph, types)),
        "graph": Graph(graph, lengthscale=4.0),
    }


def given(kernel):
    """The covariance, computed from its definition."""
    _, graph, types, codes, x = tissue()
    if isinstance(kernel, Slopes):
        return Given(double(np.equal.outer(codes, codes) * np.outer(x, x)), normalized=False)
    if isinstance(kernel, Composition):
        w = graph.toarray()
        f = (w @ types) / w.sum(1, keepdims=True)
        z = (f - f.mean(0)) / f.std(0)
        return Given(unit_scale(double(z @ z.T)))
    w = graph.toarray()
    values, vectors = np.linalg.eigh(np.eye(N) - w / np.sqrt(np.outer(w.sum(1), w.sum(1))))
    return Given(unit_scale(double((vectors * (3 / 16 + values.clip(0)) ** -1.5) @ vectors.T)))


@ROUGH
@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("name", kernels())
def test_the_fit_is_that_of_the_covariance(name, family):
    rng, _, _, codes, x = tissue()
    kernel = kernels()[name]
    k = entries(kernel, **({"lengthscale": 4.0} if name == "graph" else {})).numpy()
    eta = 1.5 * np.linalg.cholesky(k + 1e-8 * np.eye(N)) @ rng.normal(size=N) + 0.7 * rng.normal(size=9)[codes]
    y = eta + 0.5 * rng.normal(size=N) if family == "gaussian" else (eta > 0).astype(float)
    design = np.column_stack([np.ones(N), x])
    one, other = (
        cf.GLMM(family, [Component("batch", Intercepts(codes)), Component("extra", k)], engine="dense").fit(
            y, design, rng=0
        )
        for k in (kernel, given(kernel))
    )
    assert list(one.mode)[:2] == ["variance_batch", "variance_extra"]
    shared = [key for key in one.mode if not key.startswith("lengthscale")]
    np.testing.assert_allclose([one.mode[k] for k in shared], [other.mode[k] for k in shared], rtol=1e-6, atol=1e-6)
    assert one.free_energy == pytest.approx(other.free_energy, abs=1e-6)
    assert one.log_evidence == pytest.approx(other.log_evidence, abs=1e-4)
    latent = [i for i, scale in enumerate(one.components["scale"]) if scale == "latent"]
    for column in ("variance", "variance_lower", "variance_upper"):
        both = [[fit.components[column][i] for i in latent] for fit in (one, other)]
        np.testing.assert_allclose(*both, rtol=1e-3)
    np.testing.assert_allclose(one.effects["extra"][0], other.effects["extra"][0], atol=1e-4)


def test_slopes_of_any_unit_are_one_fit():
    """Hours or minutes: the variance is per unit squared, everything else is the same."""
    rng, _, _, codes, x = tissue()
    y = (2 * rng.normal(size=9)[codes] * x + rng.normal(size=N) > 0).astype(float)
    fits = [cf.GLMM("bernoulli", {"slope": Slopes(codes, scale * x)}).fit(y, rng=0) for scale in (1.0, 60.0)]
    assert fits[0].mode["variance_slope"] == pytest.approx(3600 * fits[1].mode["variance_slope"], rel=1e-4)
    assert fits[0].free_energy == pytest.approx(fits[1].free_energy, abs=1e-6)
    np.testing.assert_allclose(fits[0].shares["share"], fits[1].shares["share"], rtol=1e-2, atol=1e-9)


def test_the_variance_of_slopes_is_found():
    """60 levels of 6 cells: the estimate is within 4 of its standard errors in a balanced design, 2 v^2 / (levels - 1)."""
    rng = np.random.default_rng(5)
    levels, size, intercept, slope, noise = 60, 6, 0.5, 0.09, 0.25
    codes = np.repeat(np.arange(levels), size)
    hours = np.tile(np.linspace(-5, 5, size), levels)
    y = 3 + rng.normal(0, intercept**0.5, levels)[codes] + rng.normal(0, slope**0.5, levels)[codes] * hours
    y += rng.normal(0, noise**0.5, len(y))
    components = {"dish": Intercepts(codes), "dish:hours": Slopes(codes, hours)}
    fit = cf.GLMM("gaussian", components).fit(y, np.column_stack([np.ones(len(y)), hours]), rng=0)
    for name, truth, own in (
        ("dish", intercept, noise / size),
        ("dish:hours", slope, noise / (hours[:size] ** 2).sum()),
    ):
        error = (truth + own) * np.sqrt(2 / (levels - 1))
        assert abs(fit.mode[f"variance_{name}"] - truth) < 4 * error


@pytest.fixture(scope="module")
def adata():
    rng, graph, types, codes, x = tissue()
    names = [f"c{i}" for i in range(N)]
    obs = pd.DataFrame({"dish": codes, "hours": 60 + 12 * x}, index=names)
    obs["size"] = 2 + types @ [1.0, 0, -1] + rng.normal(size=9)[codes] * x + 0.5 * rng.normal(size=N)
    out = anndata.AnnData(obs=obs)
    out.obsp["spatial_connectivities"] = csr_array(graph)
    out.obsm["types"] = pd.DataFrame(types, index=names, columns=["a", "b", "c"])
    return out


CALLS = {
    "graph": ({"spatial_kernel": "graph"}, ["spatial"]),
    "niche": ({"spatial": None, "niche": "types"}, ["niche"]),
    "slopes": ({"spatial": None, "groups": {"dish": "~ 1 + hours"}}, ["dish", "dish:hours"]),
    "all": (
        {"spatial_kernel": "graph", "niche": "types", "groups": {"dish": "~ 0 + hours"}, "lengthscale": 5.0},
        ["spatial", "niche", "dish:hours"],
    ),
}


@ROUGH
@pytest.mark.parametrize("call", CALLS)
def test_from_anndata_to_a_file_and_back(adata, call, tmp_path):
    arguments, components = CALLS[call]
    out = cf.tl.decompose(adata, "size", family="gaussian", lineage=None, rng=0, copy=True, **arguments)
    out.write_h5ad(tmp_path / "out.h5ad")
    back = anndata.read_h5ad(tmp_path / "out.h5ad")
    for result in (out, back):
        table = cf.get.components(result)
        assert list(table["component"]) == [*components, "residual"]
        assert np.isfinite(table.drop(columns=["response", "component"]).to_numpy(dtype=float)).all()
        assert {f"variance_{name}" for name in components} <= set(cf.get.draws(result))
        effects = cf.get.effects(result)
        assert [f"{name}_mean" for name in components] == [c for c in effects if c.endswith("_mean")]
    pd.testing.assert_frame_equal(cf.get.components(out), cf.get.components(back), check_dtype=False)
    params = cf.get.params(back)
    if call == "graph":
        (row,) = cf.get.hyperparameters(back).itertuples()
        assert row.term == "lengthscale_spatial"
        assert 1 < row.median < 20  # hops
        assert params["spatial"] == "spatial_connectivities"
        assert cf.get.diagnostics(back)["truncated_share_spatial"] == 0
        assert cf.get.diagnostics(back)["rank_spatial"] == N
    if call in ("niche", "all"):
        assert params["niche"] == "types"
    if call in ("slopes", "all"):
        assert list(params["slopes"]) == ["dish:hours"]
    back.obsm["spatial"] = np.random.default_rng(0).normal(size=(N, 2))
    cf.pl.variance_shares(back, show=False)
    cf.pl.posterior(back, show=False)
    cf.pl.effects(back, show=False)


def test_a_fit_without_the_finest_detail_says_so(adata, monkeypatch):
    monkeypatch.setattr(neighbors, "EXACT", 40)
    monkeypatch.setattr(neighbors, "RANK", 12)
    with pytest.warns(
        CellfateWarning, match=r"component 'spatial': 12 modes of the graph leave out \d\d% of the variance"
    ):
        out = cf.tl.decompose(
            adata, "size", family="gaussian", lineage=None, spatial_kernel="graph", lengthscale=3.0, rng=0, copy=True
        )
    modes = Graph(adata.obsp["spatial_connectivities"], lengthscale=3.0)
    assert cf.get.diagnostics(out)["truncated_share_spatial"] == pytest.approx(modes.truncated(3.0))


def test_specimens_of_a_graph_get_an_intercept(adata):
    some = adata.copy()
    some.obs["embryo"] = np.repeat(["e1", "e2", "e3"], N // 3)
    w = some.obsp["spatial_connectivities"].toarray() * np.kron(np.eye(3), np.ones((N // 3, N // 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)
        out = cf.tl.decompose(
            some,
            "size",
            family="gaussian",
            lineage=None,
            spatial=csr_array(w),
            spatial_kernel="graph",
            lengthscale=4.0,
            library_key="embryo",
            rng=0,
            copy=True,
        )
    assert list(cf.get.components(out)["component"]) == ["spatial", "embryo", "residual"]
    assert cf.get.params(out)["spatial"] == "given"
