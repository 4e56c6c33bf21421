"""Priors against scipy's densities, and the coordinates in which they are used."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from cellfate.errors import DataError
from cellfate.model.priors import (
    Flat,
    HalfNormal,
    HalfT,
    Lkj,
    LogNormal,
    Normal,
    Parameter,
    Penalised,
    Prior,
    Uniform,
    parse_prior,
)
from tests.problem import double


class Folded:
    """Twice the density of a symmetric distribution."""

    def __init__(self, whole):
        self.whole = whole

    def logpdf(self, x):
        return self.whole.logpdf(x) + math.log(2)


class Rounded:
    """An exponential density of `hypot(x, 0.01 upper)`, its integral by quadrature."""

    def __init__(self, upper, tail):
        self.rate, self.round = -math.log(tail) / upper, 0.01 * upper

    def logpdf(self, x):
        def density(x):
            return np.exp(-self.rate * np.hypot(x, self.round))

        whole = sum(
            integrate.quad(density, a, b, epsabs=0, epsrel=1e-13)[0] for a, b in ((0, 1), (1, 10), (10, np.inf))
        )
        return -self.rate * np.hypot(x, self.round) - np.log(whole)


PRIORS = {
    HalfT(3.0, 1.5): Folded(stats.t(3.0, scale=1.5)),
    HalfT(1.0, 0.4): stats.halfcauchy(scale=0.4),
    Penalised(2.0, 0.05): Rounded(2.0, 0.05),
    HalfNormal(2.0): stats.halfnorm(scale=2.0),
    HalfNormal(0.3): stats.halfnorm(scale=0.3),
    LogNormal(0.5, 1.5): stats.lognorm(s=1.5, scale=0.5),
    LogNormal(40.0, 0.2): stats.lognorm(s=0.2, scale=40.0),
    Normal(5.0): stats.norm(scale=5.0),
    Uniform(): stats.uniform(),
    Lkj(1.0): stats.uniform(-1, 2),
    Lkj(2.5): stats.beta(2.5, 2.5, -1, 2),
}


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_density(prior):
    x = np.array([1e-3, 0.1, 0.5, 2.0, 11.0])
    if isinstance(prior, Uniform | Lkj):
        x = np.array([0.001, 0.02, 0.4, 0.99]) * ([1, -1, -1, 1] if isinstance(prior, Lkj) else 1)
    np.testing.assert_allclose(prior.log_density(double(x)), PRIORS[prior].logpdf(x), rtol=1e-12, atol=1e-14)


def test_every_prior_is_compared():
    assert {type(prior) for prior in PRIORS} | {Flat} == set(Prior.__subclasses__())


@pytest.mark.parametrize(
    ("spec", "prior"),
    [
        ("flat", Flat()),
        (("flat",), Flat()),
        (("half_normal", 2), HalfNormal(2.0)),
        (["lognormal", 0.5, 1.5], LogNormal(0.5, 1.5)),
        (("half_t", 3, 1.5), HalfT(3.0, 1.5)),
        (("pc", 2, 0.05), Penalised(2.0, 0.05)),
        (("normal", 5.0), Normal(5.0)),
        (("uniform",), Uniform()),
        ("uniform", Uniform()),
        (("lkj", 2), Lkj(2.0)),
        (("fixed", 0.3), 0.3),
        (HalfNormal(1.0), HalfNormal(1.0)),
    ],
    ids=str,
)
def test_what_the_user_writes(spec, prior):
    assert parse_prior("sd_lineage", spec) == prior


@pytest.mark.parametrize(
    "spec",
    [
        "half_normal",
        ("half_normal",),
        ("half_normal", 0.0),
        ("half_normal", -1.0),
        ("half_normal", math.inf),
        ("half_normal", math.nan),
        ("half_normal", 1.0, 2.0),
        ("half_t", 3.0),
        ("pc", 2.0, 1.0),
        ("half_normal", "wide"),
        ("lognormal", 1.0),
        ("flat", 1.0),
        ("fixed",),
        ("fixed", 0.0),
        ("fixed", -2.0),
        ("cauchy", 1.0),
    ],
    ids=str,
)
def test_what_is_not_understood_is_shown_with_what_would_be(spec):
    with pytest.raises(DataError, match=r"prior .* of 'sd_lineage' is not understood; write 'flat', \('half_normal', "):
        parse_prior("sd_lineage", spec)


# --- coordinates ---

SCALES = {
    "sd": (HalfNormal(2.0), [0.0, 0.3, 7.0]),
    "log": (LogNormal(0.5, 1.5), [1e-3, 0.5, 40.0]),
    "logit": (Uniform(), [0.01, 0.5, 0.97]),
    "atanh": (Lkj(2.5), [-0.97, 0.0, 0.5]),
    "real": (Normal(3.0), [-2.0, 0.0, 5.0]),
}


@pytest.mark.parametrize("scale", SCALES)
def test_coordinate_and_natural_value_are_inverse(scale):
    prior, values = SCALES[scale]
    parameter = Parameter("x", scale, prior, 0.5)
    u = double([parameter.coordinate(x) for x in values])
    np.testing.assert_allclose(parameter.natural(u), values, rtol=1e-14)


@pytest.mark.parametrize("scale", SCALES)
def test_density_of_the_coordinate_is_that_of_the_value(scale):
    """Probability is kept: the Jacobian is in it. An sd is the absolute value of a coordinate that is only looked at from 0 up."""
    prior, _ = SCALES[scale]
    parameter = Parameter("x", scale, prior, 0.5)

    def density(u):
        return float(torch.exp(parameter.log_density(double(u))))

    low = 0.0 if scale == "sd" else -60.0
    total, _ = integrate.quad(density, low, 60.0, points=[0.0], limit=200)
    assert total == pytest.approx(1.0, abs=1e-8)
    below, _ = integrate.quad(density, low, parameter.coordinate(0.4), limit=200)
    assert below == pytest.approx(float(PRIORS.get(prior, stats.norm(scale=3.0)).cdf(0.4)), abs=1e-8)


@pytest.mark.parametrize("scale", ["sd", "log", "logit", "atanh", "real"])
def test_flat_is_flat_in_the_coordinate(scale):
    parameter = Parameter("x", scale, Flat(), 0.5)
    np.testing.assert_array_equal(parameter.log_density(double([-3.0, 0.1, 2.0])), np.zeros(3))


@pytest.mark.parametrize("scale", SCALES)
def test_density_and_value_are_differentiable(scale):
    prior, values = SCALES[scale]
    parameter = Parameter("x", scale, prior, 0.5)
    u = double([parameter.coordinate(x) for x in values if x != 0] + [0.77]).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda u: (parameter.natural(u), parameter.log_density(u)), u)


def test_a_standard_deviation_is_even_at_zero():
    """An absent component is an ordinary point: the density has a slope of zero there, not an edge."""
    parameter = Parameter("sd_lineage", "sd", HalfNormal(2.0), 0.7)
    u = double([-1.3, 0.0, 1.3]).requires_grad_(True)
    density = parameter.log_density(u)
    (slope,) = torch.autograd.grad(density.sum(), u)
    assert density[0] == density[2]
    np.testing.assert_allclose(slope, [1.3 / 4, 0.0, -1.3 / 4], rtol=1e-15)


def test_bounds_are_in_the_coordinate():
    assert Parameter("sd_a", "sd", Flat(), 0.5, 0.0, 50.0).bounds == (-math.inf, 50.0)
    assert Parameter("l", "log", Flat(), 1.0, 0.5, 8.0).bounds == pytest.approx((math.log(0.5), math.log(8)))
    assert Parameter("b", "real", Flat(), 0.0).bounds == (-math.inf, math.inf)
    low, high = Parameter("lam", "logit", Flat(), 0.5, 1e-4, 1 - 1e-4).bounds
    assert (low, high) == pytest.approx((math.log(1e-4 / (1 - 1e-4)), -math.log(1e-4 / (1 - 1e-4))))


def test_a_uniform_correlation_is_one_up_to_its_ends():
    parameter = Parameter("correlation_clone", "atanh", Lkj(1.0), 0.0)
    u = double([-40.0, -1.0, 0.0, 1.0, 40.0])
    np.testing.assert_allclose(parameter.log_density(u)[1:4], stats.logistic(scale=0.5).logpdf(u[1:4]), rtol=1e-13)
    assert bool(parameter.log_density(u).isfinite().all())


def test_only_a_correlation_is_held_below_zero():
    assert parse_prior("correlation_clone", ("fixed", -0.4)) == -0.4
    with pytest.raises(DataError, match="is not understood"):
        parse_prior("correlation_clone", ("fixed", -1.0))


def test_penalised_complexity_says_how_often_an_sd_is_large():
    prior = Penalised(2.0, 0.05)
    above = integrate.quad(lambda x: math.exp(float(prior.log_density(double(x)))), 2.0, np.inf)[0]
    assert above == pytest.approx(0.05, rel=0.02)  # rounded off at a hundredth of 2
