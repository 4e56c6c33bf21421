"""Population effects: against brute force, closed forms, and what a coefficient would say."""

import numpy as np
import pytest
import torch

import cellfate as cf
from cellfate import DataError
from cellfate.engines.base import Sites
from cellfate.engines.structured import StructuredEngine
from cellfate.inference.marginal import prior_variance, standardized
from cellfate.model.glmm import FIXED
from tests.embryo import N, embryo
from tests.problem import small_problem

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")
THETA = {
    "variance_lineage": 0.8,
    "alpha_lineage": 0.7,
    "variance_spatial": 1.1,
    "lengthscale_spatial": 0.9,
    "variance_clutch": 0.3,
    "variance_batch": 0.2,
}
BETA = np.array([-0.4, 0.7])
SETS = 20_000


@pytest.mark.parametrize(
    ("family", "own"),
    [("bernoulli", {}), ("poisson", {}), ("negative_binomial", {"dispersion": 0.6}), ("beta", {"precision": 4.0})],
)
def test_against_brute_force(family, own):
    """Fields drawn from the prior, added up and pushed through the link, within three Monte-Carlo errors."""
    model, engine = small_problem(family)
    n, like = model.data.n, model.data.offset
    theta, _ = model.from_natural({**THETA, **own})
    terms = [term for term in model.terms(theta) if term.name != FIXED]
    nothing = like.new_zeros(1, n)
    k = engine.condition(terms, Sites(nothing, nothing)).prior_times(torch.eye(n).to(like)[None])[0].numpy()
    rng = np.random.default_rng(0)
    fields = rng.standard_normal((SETS, n)) @ np.linalg.cholesky(k + 1e-12 * np.eye(n)).T
    designs = [np.column_stack([np.ones(n), np.full(n, x)]) for x in (-1.0, 1.0)]
    draws = {name: np.repeat(x, 4) for name, x in {**THETA, **own}.items()}
    found = standardized(model, engine, draws, np.tile(BETA, (4, 1)), designs, count=4, rng=rng)
    assert np.ptp(found, axis=0).max() < 1e-12
    eta = [like.numpy() + design @ BETA for design in designs]
    inverse = (lambda x: 1 / (1 + np.exp(-x))) if family in ("bernoulli", "beta") else np.exp
    low, high = (inverse(fields + x).mean(1) for x in eta)
    for value, sample in ((found[0, 0], low), (found[0, 1], high), (found[0, 1] - found[0, 0], high - low)):
        assert value == pytest.approx(sample.mean(), abs=3 * sample.std() / SETS**0.5)


def test_prior_variances_are_the_diagonal_in_both_engines():
    model, engine = small_problem("bernoulli", lineage="brownian")
    theta, _ = model.from_natural({name: x for name, x in THETA.items() if name != "alpha_lineage"})
    like, n = model.data.offset, model.data.n
    sweeps = StructuredEngine(model.components, n, device="cpu", dtype=torch.float64)
    found = [prior_variance(e, model.terms(theta), n, like) for e in (engine, sweeps)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)
    nothing = like.new_zeros(1, n)
    terms = [term for term in model.terms(theta) if term.name != FIXED]
    k = engine.condition(terms, Sites(nothing, nothing)).prior_times(torch.eye(n).to(like)[None])[0]
    torch.testing.assert_close(found[0][0], k.diagonal(), rtol=1e-10, atol=1e-10)


def test_of_a_measurement_it_is_the_coefficient():
    adata = embryo()
    cf.tl.decompose(adata, "size", family="gaussian", formula="~ 1 + stage + center(time)", rng=0)
    before = set(adata.uns["cellfate"])
    cf.tl.marginal_effects(adata, "stage", draws=4000, rng=0)
    table, beta = cf.get.marginal_effects(adata), cf.get.draws(adata)
    assert table["scenario"].tolist() == ["early", "late", "mid", "late", "mid"]
    assert table["quantity"].tolist() == ["mean"] * 3 + ["difference"] * 2
    mid = table.query("quantity == 'difference' and scenario == 'mid'").iloc[0]
    assert mid["against"] == "early"
    assert mid["estimate"] == pytest.approx(beta["beta[stage[T.mid]]"].mean(), rel=1e-9)
    assert mid["lower"] == pytest.approx(beta["beta[stage[T.mid]]"].quantile(0.025), rel=1e-9)
    assert set(adata.uns["cellfate"]) == before | {"marginal_effects"}
    # a number is centred by the mean of the cells, not by that of a scenario, which would leave nothing
    cf.tl.marginal_effects(adata, "time", [0.0, 1.0], draws=4000, rng=0)
    one = cf.get.marginal_effects(adata).query("quantity == 'difference'").iloc[0]
    assert one["estimate"] == pytest.approx(beta["beta[center(time)]"].mean(), rel=1e-9)


def test_of_a_fate_it_is_less_than_the_coefficient():
    adata = embryo()
    adata.obs["on"] = (adata.obs["time"] + np.random.default_rng(0).normal(size=N) > 0).astype(int)
    cf.tl.decompose(adata, "on", family="bernoulli", formula="~ 1 + time", rng=0)
    copy = cf.tl.marginal_effects(adata, "time", [0.0, 1e-3], draws=100, rng=0, copy=True)
    assert "marginal_effects" not in adata.uns["cellfate"]
    table = cf.get.marginal_effects(copy)
    slope = table.query("quantity == 'difference'")["estimate"].iloc[0] / 1e-3
    coefficient = cf.get.fixed_effects(adata).set_index("term").loc["time", "estimate"]
    # a logistic curve is at most a quarter as steep, and less where cells differ
    assert 0 < slope / coefficient < 0.25
    means = table.query("quantity == 'mean'")["estimate"]
    assert means.between(0, 1).all()
    assert len(copy.obs) == N


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("half",), "formula '~ 1 \\+ stage', which does not name 'half'. Choose one of \\['stage'\\]"),
        (("stage", ["early", "later"]), "values has \\['later'\\], wanted levels of obs\\['stage'\\]"),
        (("stage", "early"), "wanted a list"),
        (("stage", []), "wanted a list"),
    ],
)
def test_wrong_questions(arguments, message):
    adata = embryo()
    cf.tl.decompose(adata, "size", family="gaussian", formula="~ 1 + stage", rng=0)
    with pytest.raises(DataError, match=message):
        cf.tl.marginal_effects(adata, *arguments)
    with pytest.raises(
        DataError, match=r"has no 'marginal_effects'. Run `cf.tl.marginal_effects\(adata, <covariate>\)` first"
    ):
        cf.get.marginal_effects(adata)
    cf.tl.decompose(adata, "size", family="gaussian", lengthscale=0.5, key_added="plain", rng=0)
    with pytest.raises(DataError, match=r"It has no covariates: fit with it in .* such as formula='~ 1 \+ stage'"):
        cf.tl.marginal_effects(adata, "stage", key="plain")
    adata.obs["stage"] = adata.obs["stage"].replace("mid", "noon")
    with pytest.raises(DataError, match=r"there are no draws of \['beta\[stage\[T.noon\]\]'\]. Has adata.obs changed"):
        cf.tl.marginal_effects(adata, "stage")
