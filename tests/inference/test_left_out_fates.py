"""Fates and levels of cells that are left out: by linear algebra, by a new fit without them, by brute-force probabilities."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import softmax

import cellfate as cf
from cellfate.inference.checks import _again, _each, _point, _without
from cellfate.inference.fates import Form
from cellfate.inference.free_energy import evaluate
from cellfate.inference.left_out_fates import cavity_of_cells, totals
from cellfate.model.categorical import Categorical, contrasts
from cellfate.model.families import Outcome
from cellfate.model.pairs import Pairs, differences
from tests.model.test_categorical import kernels
from tests.model.test_pairs import BETA, Blocks, matrices, whole_prior
from tests.problem import double

THETA = {"variance_lineage": 1.5, "variance_spatial": 0.7}


def problem(levels, n=30, counts=False):
    rng = np.random.default_rng(levels)
    weights = rng.multinomial(4 if counts else 1, np.ones(levels) / levels, n) + 0.0
    return weights, np.ones((n, 1)), kernels(n)


def fitted_at(weights, X, found, theta=THETA, **options):
    glmm = cf.GLMM("categorical", found, priors={"beta": ("normal", BETA)}, **options).on(weights, X)
    model, engine, _ = glmm.problem
    at, _ = model.from_natural(theta)
    return _point(model, engine, glmm.rule, at, 0)


def kinds(levels):
    by_fate = {f"variance_{name}[{k}]": 0.2 + 0.3 * k for name in ("lineage", "spatial") for k in range(levels)}
    return {
        "pairs": (THETA, {}),
        "per fate": (by_fate, {"per_fate": True}),
        "contrasts": (THETA, {"engine": "structured"}),
    }


@pytest.mark.parametrize("kind", ["pairs", "per fate", "contrasts"])
@pytest.mark.parametrize("levels", [3, 4])
def test_the_posterior_without_the_sites_of_a_cell(levels, kind):
    """In closed form for all cells at once, against all of linear algebra again for each."""
    theta, options = kinds(levels)[kind]
    point = fitted_at(*problem(levels), theta, **options)
    assert Form.of(point.model).paired == (kind != "contrasts")
    one, other = _each(point), _without(point, np.random.default_rng(0).permutation(30))
    for name in ("log_p", "below", "upto", "mean"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-7)
    # and it makes a difference
    with_all = Form.of(point.model).by_fate(point.here.posterior.mean.numpy())[0]
    without = Form.of(point.model).by_fate(cavity_of_cells(point.model, point.here.posterior)[0].numpy())[0]
    assert np.abs(with_all - without).max() > 0.1


def test_a_new_fit_without_the_cell():
    """Sites of the other cells do not know that one is gone, and hardly mind."""
    levels, n = 3, 30
    weights, X, found = problem(levels, n)
    p = _each(fitted_at(weights, X, found)).mean
    prior = whole_prior(levels, found, X, np.full(3, 0.5), np.full(3, 0.7 / 3))
    h, apart = contrasts(levels), []
    rng = np.random.default_rng(0)
    for i in range(0, n, 6):
        rest = np.delete(np.arange(n), i)
        places = np.concatenate([rest, rest + n])
        among = prior[places][:, places]
        blocks = Blocks(weights[rest], 16)
        _, mean, own = blocks.settle(among)
        # sites of that fit, for the covariance of the cell with all others
        curved = blocks.moments(mean, own)[2]
        precision = torch.zeros(2 * (n - 1), 2 * (n - 1), dtype=torch.float64)
        for a in range(2):
            for b in range(2):
                precision[a * (n - 1) : (a + 1) * (n - 1), b * (n - 1) : (b + 1) * (n - 1)] = torch.diag(
                    curved[:, a, b]
                )
        cross = prior[[i, i + n]][:, places]
        gain = torch.linalg.solve(among, cross.T).T
        posterior = torch.linalg.inv(torch.linalg.inv(among) + precision)
        away = prior[[i, i + n]][:, [i, i + n]] - gain @ cross.T + gain @ posterior @ gain.T
        u = rng.multivariate_normal((gain @ mean.T.reshape(-1)).numpy(), away.numpy(), 40_000)
        apart.append(softmax(u @ h.T, -1).mean(0) - p[i])
    assert np.abs(apart).max() < 0.01


@pytest.mark.parametrize("link", ["logit", "probit"])
def test_levels_from_a_new_fit_without_the_cell(link):
    n, theta = 40, {"gap_1": 0.8, "gap_2": 1.4}
    found, rng = kernels(n), np.random.default_rng(0)
    y, X = rng.permutation(np.arange(n) % 4).astype(float), np.ones((n, 1))
    whole = sum(v * k for v, k in zip((1.5, 0.7), matrices(found), strict=True)).numpy()
    glmm = cf.GLMM("ordinal", found, link=link, priors={"beta": ("normal", BETA)}).on(y, X)
    model, engine, _ = glmm.problem
    predicted = _each(_point(model, engine, glmm.rule, model.from_natural(THETA | theta)[0], 0))
    count = 100_000
    for i in range(0, n, 7):
        rest = np.delete(np.arange(n), i)
        among = whole[np.ix_(rest, rest)]
        of_sample = (np.trace(among) - among.mean() * (n - 1)) / (n - 2)  # what a matrix is scaled by
        part = cf.GLMM("ordinal", {"all": among}, link=link, priors={"beta": ("normal", BETA)}).on(y[rest], X[rest])
        own, its, _ = part.problem
        at, _ = own.from_natural({"variance_all": of_sample, **theta})
        posterior = evaluate(own, its, at, part.rule, tolerance=1e-8).posterior
        cross, tau = whole[i, rest] + BETA**2, posterior.sites.precision[0].numpy()
        mean = cross @ posterior.weights[0].numpy()
        away = np.linalg.solve(among + BETA**2 + np.diag(1 / tau), cross)
        eta = mean + rng.normal(size=count) * (whole[i, i] + BETA**2 - cross @ away) ** 0.5
        level = own.family.simulate(eta, rng=rng, gaps=(0.8, 1.4))
        p = np.bincount(level.astype(int), minlength=4) / count
        np.testing.assert_allclose(predicted.mean[i], p, atol=0.015)  # about 0.003 of it from the draws
        k = int(y[i])
        assert np.exp(predicted.log_p[i]) == pytest.approx(predicted.mean[i, k], abs=1e-9)
        assert predicted.below[i] == pytest.approx(predicted.mean[i, :k].sum(), abs=1e-9)
        assert predicted.upto[i] == pytest.approx(predicted.mean[i, : k + 1].sum(), abs=1e-9)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("levels", "tries"), [(2, 1), (3, 1), (3, 5), (3, 60), (4, 3), (5, 1)])
def test_probabilities_of_a_normal_cell(levels, tries, paired):
    """Against draws from the normal distribution of its contrasts."""
    rng, n, count = np.random.default_rng([levels, tries]), 4, 200_000
    h = contrasts(levels)
    seen = rng.multinomial(tries, rng.dirichlet(np.ones(levels)), n) + 0.0
    mean = rng.normal(size=(n, levels - 1))
    root = rng.normal(size=(n, levels - 1, levels - 1))
    covariance = root @ root.swapaxes(1, 2) + 0.1 * np.eye(levels - 1)
    if paired:
        d = differences(levels) @ h
        family, m, v = Pairs(), (mean @ d.T).T, np.einsum("ri,nij,rj->rn", d, covariance, d)
    else:
        covariance *= np.eye(levels - 1)
        family, m, v = Categorical(), mean.T, np.einsum("nii->in", covariance)
    y, t = family.outcome(seen)
    outcome = Outcome(double(y), double(t), levels)
    np.testing.assert_allclose(family.weights(outcome).numpy(), seen, atol=1e-12)
    log_p, p, below, upto = (x.numpy() for x in family.predictive(outcome, double(m).flatten(), double(v).flatten()))
    rough = (
        8e-3 if tries > 1 else 2e-3 if levels > 3 else 3e-4
    )  # of quadrature, with few nodes an axis, or of 512 points

    def near(found, values):
        assert found == pytest.approx(values.mean(), abs=4 * values.std() / count**0.5 + rough)

    for i in range(n):
        drawn = softmax(rng.multivariate_normal(mean[i], covariance[i], count) @ h.T, -1)
        density = stats.multinomial.pmf(seen[i], tries, drawn / drawn.sum(-1, keepdims=True))
        near(np.exp(log_p[i]), density)
        assert log_p[i] == pytest.approx(
            np.log(density.mean()), abs=0.01 + 4 * density.std() / density.mean() / count**0.5
        )
        for k in range(levels):
            near(p[i, k], drawn[:, k])
            near(below[i, k], stats.binom.cdf(seen[i, k] - 1, tries, drawn[:, k]))
            near(upto[i, k], stats.binom.cdf(seen[i, k], tries, drawn[:, k]))


@pytest.mark.parametrize("kind", ["pairs", "per fate", "contrasts"])
def test_fates_drawn_again_are_those_of_the_posterior(kind):
    theta, options = kinds(3)[kind]
    point = fitted_at(*problem(3, counts=True), theta, **options)
    drawn = _again(point, 4000, np.random.default_rng(0))
    assert drawn.shape == (30, 4000, 3)
    assert (drawn.sum(-1) == 4).all()
    assert (totals(point.model) == 4).all()
    _, p, _, _ = point.model.family.predictive(
        point.model.data.outcome, point.here.posterior.mean[0], point.here.posterior.variance[0]
    )
    z = (drawn.mean(1) - 4 * p.numpy()) / (drawn.std(1) / 4000**0.5)
    assert np.abs(z).max() < 4.5
    assert z.std() == pytest.approx(1, abs=0.3)
