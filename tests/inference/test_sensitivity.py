"""Power-scaling: reweighted draws against fits under the scaled prior, and the distance against its definition."""

import numpy as np
import pytest
from scipy import integrate, stats

import cellfate as cf
from cellfate import DataError
from cellfate.inference.sensitivity import POWER, diagnosis, log_densities, sensitivity

TWICE = 2.0


def simulated(n=60, family="poisson", **more):
    return cf.datasets.simulate(n, family=family, rng=3, **more)


def of_fit(adata, priors=None, **more):
    cf.tl.decompose(adata, "fate", family="poisson", lengthscale=0.5, priors=priors, rng=0, key_added="fit", **more)
    return cf.get.draws(adata, "fit")


@pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")
def test_reweighted_draws_are_those_of_the_scaled_prior():
    """A half-normal squared is a half-normal whose scale is smaller by the root of two."""
    adata = simulated()
    priors = {f"sd_{name}": ("half_normal", 0.7) for name in ("lineage", "spatial")}
    draws = of_fit(adata, priors)
    from cellfate.io.again import OBJECTS
    from cellfate.tl.fitted import fitted

    fit = fitted(adata, "fit", dict.fromkeys(OBJECTS), "cpu")
    model, engine, _ = fit.glmm.problem
    theta, points = model.from_natural(model.from_draws(fit.draws))
    prior, _ = log_densities(model, engine, fit.glmm.rule, theta, points)
    weight = np.exp((TWICE - 1) * prior)
    stronger = of_fit(adata, {f"sd_{name}": ("half_normal", 0.7 / np.sqrt(TWICE)) for name in ("lineage", "spatial")})
    for name in ("variance_lineage", "variance_spatial", "share_lineage"):
        x, y = draws[name].to_numpy(), stronger[name].to_numpy()
        found = np.average(x, weights=weight)
        # two quasi-random integrals of 4,000 draws each, the one with weights
        error = np.hypot(x.std() / np.sqrt(4000 * weight.mean() ** 2 / (weight**2).mean()), y.std() / np.sqrt(4000))
        assert found == pytest.approx(y.mean(), abs=4 * error + 0.01 * y.mean())
        assert abs(x.mean() - y.mean()) > 2 * abs(found - y.mean())


@pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")
def test_likelihood_is_the_free_energy():
    adata = simulated()
    draws = of_fit(adata)
    from cellfate.io.again import OBJECTS
    from cellfate.tl.fitted import fitted

    fit = fitted(adata, "fit", dict.fromkeys(OBJECTS), "cpu")
    model, engine, _ = fit.glmm.problem
    values = {name: draws[name].to_numpy()[:20] for name in ("variance_lineage", "variance_spatial")}
    theta, points = model.from_natural(values)
    _, likelihood = log_densities(model, engine, fit.glmm.rule, theta, points)
    np.testing.assert_allclose(likelihood, fit.glmm.evaluate(values).free_energy, atol=1e-3)


def test_distance_of_a_shift():
    """A density exp(a x) moves a standard normal by a times the power: the distance from the two cumulative functions."""
    x = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    slope = 3.0

    def distance(shift):
        def integrand(t, other):
            p, q = stats.norm.cdf(t), stats.norm.cdf(t - shift)
            one, two = (p, q) if other else (q, p)
            return one * np.log2(2 * one / (one + two)) + (two - one) / (2 * np.log(2))

        def whole(t):
            return stats.norm.cdf(t) + stats.norm.cdf(t - shift)

        edge = (-7.0, x[-1])
        total = sum(integrate.quad(integrand, *edge, args=(other,), limit=200)[0] for other in (0, 1))
        return np.sqrt(total / integrate.quad(whole, *edge, limit=200)[0])

    shifts = slope * (POWER - 1), slope * (1 / POWER - 1)
    wanted = sum(distance(shift) for shift in shifts) / (2 * np.log2(POWER))
    assert sensitivity(x, slope * x) == pytest.approx(wanted, rel=0.02)
    assert sensitivity(x, np.zeros_like(x)) < 1e-6


def test_verdicts():
    assert diagnosis(0.01, 0.5) == "the prior hardly matters"
    assert diagnosis(0.2, 0.01) == "the prior decides, the data say little"
    assert diagnosis(0.2, 0.3) == "the prior decides with the data"


@pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")
def test_few_yes_or_no_lean_on_the_prior_more_than_many_counts():
    found = []
    for adata, family in ((simulated(40, "bernoulli"), "bernoulli"), (simulated(150), "poisson")):
        cf.tl.decompose(adata, "fate", family=family, rng=0)
        cf.tl.prior_sensitivity(adata, draws=300, rng=0)
        table = cf.get.prior_sensitivity(adata).set_index("quantity")
        assert {"share_lineage", "share_spatial", "variance_lineage", "variance_spatial"} <= set(table.index)
        found.append(table.loc["variance_lineage", "prior"])
    assert found[0] > 2 * found[1]


def test_what_it_needs():
    adata = simulated(40)
    with pytest.raises(DataError, match="No decomposition"):
        cf.tl.prior_sensitivity(adata)
    cf.tl.decompose(adata, "fate", family="poisson", lengthscale=0.5, rng=0)
    with pytest.raises(DataError, match=r"draws is 3, wanted .* 50 or more"):
        cf.tl.prior_sensitivity(adata, draws=3)
    with pytest.raises(DataError, match=r"Run `cf\.tl\.prior_sensitivity\(adata\)` first"):
        cf.get.prior_sensitivity(adata)
    copy = cf.tl.prior_sensitivity(adata, draws=50, rng=0, copy=True)
    assert "prior_sensitivity" in copy.uns["cellfate"]
    assert "prior_sensitivity" not in adata.uns["cellfate"]
