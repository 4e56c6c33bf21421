"""Proposals against their own density, tails of known shape, and what an interpolant does not know."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from cellfate.inference.importance import DEGREES, FoldedT, Surface, pareto_smooth, systematic, uniforms

PROPOSALS = {
    "one sd, well away from zero": FoldedT(np.array([3.0]), np.array([[0.3]]), np.array([True])),
    "one sd, at zero": FoldedT(np.array([0.1]), np.array([[0.8]]), np.array([True])),
    "one length-scale": FoldedT(np.array([-0.4]), np.array([[0.5]]), np.array([False])),
    "two sds": FoldedT(np.array([0.3, 1.0]), np.array([[0.5, 0.0], [-0.4, 0.6]]), np.array([True, True])),
    "sd and length-scale": FoldedT(np.array([0.2, -1.0]), np.array([[0.6, 0.0], [0.9, 0.4]]), np.array([True, False])),
    "three": FoldedT(
        np.array([0.5, 0.1, 0.3]),
        np.array([[0.5, 0.0, 0.0], [0.2, 0.4, 0.0], [-0.3, 0.1, 0.7]]),
        np.array([True, False, True]),
    ),
}


@pytest.fixture(params=PROPOSALS, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def proposal(request):
    return PROPOSALS[request.param]


def test_draws_are_folded(proposal):
    u = proposal.draw(uniforms(512, len(proposal.location) + 1, np.random.default_rng(0)))
    assert u.shape == (512, len(proposal.location))
    assert (u[:, proposal.folded] >= 0).all()
    if not proposal.folded.all():
        assert (u[:, ~proposal.folded] < 0).any()


def test_density_against_that_of_the_unfolded_t(proposal):
    """scipy's multivariate t, summed over the points that fold onto one."""
    u = proposal.draw(uniforms(64, len(proposal.location) + 1, np.random.default_rng(1)))
    t = stats.multivariate_t(proposal.location, proposal.scale @ proposal.scale.T, df=DEGREES)
    d = len(proposal.location)
    total = np.zeros(len(u))
    for signs in np.ndindex(*[2] * d):
        sign = 1 - 2 * np.array(signs)
        if (proposal.folded | (sign == 1)).all():
            total += t.pdf(u * sign)
    np.testing.assert_allclose(proposal.log_density(u), np.log(total), rtol=1e-10)


def test_density_integrates_to_one(proposal):
    """By importance sampling with another density, whose draws these are not."""
    d, n = len(proposal.location), 2**15
    wide = 3 * np.sqrt((proposal.scale**2).sum(1)) + np.abs(proposal.location)
    q = np.random.default_rng(2).random((n, d))
    x = stats.cauchy.ppf(0.5 + q / 2) * wide  # half-Cauchy
    log_q = stats.cauchy.logpdf(x / wide).sum(1) + d * math.log(2) - np.log(wide).sum()
    sign = np.where(np.random.default_rng(3).random((n, d)) < 0.5, -1, 1)
    x = np.where(proposal.folded, x, x * sign)
    log_q = log_q - math.log(2) * (~proposal.folded).sum()
    ratio = np.exp(proposal.log_density(x) - log_q)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(n)


def test_draws_follow_the_density(proposal):
    """Draws reweighted to another density have its moments, and their weights average 1."""
    d, n = len(proposal.location), 2**14
    u = proposal.draw(np.random.default_rng(4).random((n, d + 1)))
    scale = np.sqrt((proposal.scale**2).sum(1))
    # the target: half-normals and normals, independent
    log_p = stats.norm.logpdf((u - np.where(proposal.folded, 0, proposal.location)) / scale) - np.log(scale)
    log_p = (log_p + math.log(2) * proposal.folded).sum(1)
    weight = np.exp(log_p - proposal.log_density(u))
    assert abs(weight.mean() - 1) < 4 * weight.std() / math.sqrt(n)
    for j in range(d):
        mean = scale[j] * math.sqrt(2 / math.pi) if proposal.folded[j] else proposal.location[j]
        x = weight * (u[:, j] - mean)
        assert abs(x.mean()) < 4 * x.std() / math.sqrt(n)


def test_one_coordinate_has_the_distribution_of_a_folded_t():
    proposal = PROPOSALS["one sd, at zero"]
    u = proposal.draw(np.random.default_rng(5).random((20_000, 2)))[:, 0]
    t = stats.t(DEGREES, 0.1, 0.8)
    assert stats.kstest(u, lambda x: t.cdf(x) - t.cdf(-x)).pvalue > 1e-3


def test_uniforms_are_even_open_and_from_the_generator():
    u = uniforms(100, 3, np.random.default_rng(0))
    assert u.shape == (100, 3)
    assert ((u > 0) & (u < 1)).all()
    np.testing.assert_array_equal(u, uniforms(100, 3, np.random.default_rng(0)))
    assert (u != uniforms(100, 3, np.random.default_rng(1))).any()
    counts = np.histogram(uniforms(256, 1, np.random.default_rng(2)), bins=64, range=(0, 1))[0]
    assert set(counts) == {4}  # random ones would scatter by two


# --- weights ---


@pytest.mark.parametrize("k", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_shape_of_a_known_tail(k):
    """Ratios with a generalized Pareto tail of shape k. The estimate is pulled to 0.5 as ten draws at 0.5 would pull it."""
    n, seeds = 20_000, 30
    tail = int(3 * math.sqrt(n))
    found = []
    for seed in range(seeds):
        ratio = stats.genpareto(k).rvs(n, random_state=np.random.default_rng(seed))
        found.append(pareto_smooth(np.log(ratio + 1.0))[1])
    expected = (tail * k + 10 * 0.5) / (tail + 10)
    error = (1 + k) / math.sqrt(tail)  # of a maximum-likelihood estimate from the tail, asymptotically
    assert abs(np.mean(found) - expected) < 4 * error / math.sqrt(seeds) + 0.01
    assert 0.6 * error < np.std(found, ddof=1) < 1.5 * error


def test_weights_are_normalized_and_only_the_tail_is_touched():
    rng = np.random.default_rng(0)
    log_ratio = 1.5 * rng.normal(size=1000) + 700  # exp would overflow
    log_weight, k = pareto_smooth(log_ratio.copy())
    assert logsumexp(log_weight) == pytest.approx(0, abs=1e-12)
    assert 0 < k < 1.5
    order, tail = np.argsort(log_ratio), int(3 * math.sqrt(1000))
    assert (np.diff(log_weight[order]) >= -1e-12).all()  # order is kept
    body = order[:-tail]
    np.testing.assert_allclose(np.diff(log_weight[body]), np.diff(log_ratio[body]), atol=1e-9)
    assert np.ptp(log_weight[order[-tail:]]) <= np.ptp(log_ratio[order[-tail:]])


def test_smoothing_lessens_the_error_of_a_heavy_tail():
    """Mean of the ratios, known to be 1, over many seeds: that is what smoothing is for."""
    k, raw, smooth = 0.7, [], []
    for seed in range(200):
        # ratio of a normal to a narrower one: E x^2 = 1 under the target
        x = np.random.default_rng(seed).normal(scale=k, size=500)
        log_ratio = stats.norm.logpdf(x) - stats.norm.logpdf(x, scale=k)
        raw.append((np.exp(log_ratio - logsumexp(log_ratio)) * x**2).sum())
        smooth.append((np.exp(pareto_smooth(log_ratio)[0]) * x**2).sum())
    assert np.mean((np.array(smooth) - 1) ** 2) < np.mean((np.array(raw) - 1) ** 2)


def test_equal_ratios_are_left_alone():
    log_weight, k = pareto_smooth(np.full(100, -3.0))
    np.testing.assert_allclose(np.exp(log_weight), 0.01)
    assert k == -np.inf


def test_few_ratios_have_no_shape():
    log_weight, k = pareto_smooth(np.log(np.array([1.0, 2.0, 5.0])))
    np.testing.assert_allclose(np.exp(log_weight), [0.125, 0.25, 0.625])
    assert math.isnan(k)


def test_a_good_proposal_has_a_small_shape_and_a_bad_one_a_large():
    rng = np.random.default_rng(0)
    x = rng.standard_t(DEGREES, size=2000)
    good = stats.norm.logpdf(x) - stats.t.logpdf(x, DEGREES)
    y = rng.normal(scale=0.25, size=2000)
    bad = stats.norm.logpdf(y) - stats.norm.logpdf(y, scale=0.25)
    assert pareto_smooth(good)[1] < 0.4 < 0.7 < pareto_smooth(bad)[1]


def test_systematic_resampling_keeps_proportions():
    """No count is off by more than one, and over seeds they are right on average."""
    weight = np.random.default_rng(0).gamma(0.3, size=50)
    expected = 1000 * weight / weight.sum()
    total = np.zeros(50)
    for seed in range(200):
        counts = np.bincount(systematic(weight, 1000, np.random.default_rng(seed)), minlength=50)
        assert (np.abs(counts - expected) < 1 + 1e-9).all()
        total += counts
    # a count is one of two neighbors: its variance is at most a quarter
    assert np.abs(total / 200 - expected).max() < 4.5 * 0.5 / math.sqrt(200)
    chosen = systematic(np.array([0.0, 2.0, 0.0]), 10, np.random.default_rng(1))
    np.testing.assert_array_equal(chosen, np.ones(10))


# --- the interpolant ---


def smooth_function(z: np.ndarray) -> np.ndarray:
    first = np.exp(-0.5 * (z**2).sum(1)) + 0.3 * np.sin(z[:, 0])
    return np.column_stack([first, 2 * z[:, 0] - z[:, 1]])


def test_interpolation_goes_through_the_points_and_between_them():
    rng = np.random.default_rng(0)
    z, fresh = rng.normal(size=(150, 2)), 0.7 * rng.normal(size=(400, 2))
    surface = Surface(z, smooth_function(z), 1)
    np.testing.assert_allclose(surface(z), smooth_function(z), atol=1e-8)
    error = surface(fresh) - smooth_function(fresh)
    assert np.abs(error[:, 0]).max() < 0.05
    assert np.abs(error[:, 1]).max() < 1e-8  # what is linear is exact


@pytest.mark.parametrize("count", [40, 160])
def test_the_error_at_points_left_out_is_that_at_fresh_points(count):
    """Within a factor of two, on average over designs, and nearer with more points."""
    left_out, fresh = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        z, other = rng.normal(size=(count, 2)), rng.normal(size=(400, 2))
        surface = Surface(z, smooth_function(z), 1)
        weight, mass = (np.exp(-0.5 * (x**2).sum(1)) for x in (z, other))  # the middle counts most
        left_out.append(surface.error(weight) ** 2)
        error = surface(other)[:, 0] - smooth_function(other)[:, 0]
        fresh.append((mass * error**2).sum() / mass.sum())
    ratio = math.sqrt(np.mean(left_out) / np.mean(fresh))
    assert 0.5 < ratio < 2.5


def test_the_error_counts_where_the_weight_is():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(120, 2))
    values = smooth_function(z)
    values[:, 0] += np.where(z[:, 0] > 1, rng.normal(size=120), 0)  # noise on one side
    surface = Surface(z, values, 1)
    left, right = (z[:, 0] < 0).astype(float), (z[:, 0] > 1).astype(float)
    assert surface.error(right) > 10 * surface.error(left)
    np.testing.assert_allclose(surface.error(3 * right), surface.error(right), rtol=1e-12)
