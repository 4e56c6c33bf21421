"""The three rules: what their fixed points are, what their free energies approximate, how these slope."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from cellfate.engines.base import Sites
from cellfate.inference.free_energy import evaluate, evaluate_with_gradient, likelihood_at
from cellfate.inference.sites import RULES, ExpectationPropagation, Laplace, Likelihood, Variational, divergence
from cellfate.inference.variational_laplace import Status, fit_sites
from cellfate.kernels.base import Component, Given
from cellfate.model.catalog import concrete, get_family
from cellfate.model.families import Outcome
from cellfate.model.glmm import Data, Model
from tests.problem import dense_engine, double, small_problem

FAMILIES = [family.name for family in concrete() if family.kind != "fates"]  # those are in test_categorical.py
OWN = {"gaussian": 1, "negative_binomial": 1, "beta": 1, "ordinal": 2}  # hyperparameters of a family
# fixed effects that few cells determine leave posterior sds of 3 and more, where forty quadrature nodes lose digits
INFORMED = {"beta": ("normal", 1.0)}


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]()


def points(model: Model, count: int = 3, seed: int = 0) -> torch.Tensor:
    return model.start() + double(0.3 * np.random.default_rng(seed).normal(size=(count, len(model.parameters))))


def settled(model, engine, rule, u, **options):
    here = evaluate(model, engine, model.theta(u), rule, tolerance=1e-10, **options)
    assert (here.fit.status == Status.CONVERGED).all()
    return here


def covariance(model: Model, engine, u: torch.Tensor) -> np.ndarray:
    """Prior covariance (points, n, n) of the latent field."""
    terms = model.terms(model.theta(u))
    nothing = torch.zeros(len(u), model.data.n, dtype=torch.float64)
    posterior = engine.condition(terms, Sites(nothing, nothing))
    return posterior.prior_times(torch.eye(model.data.n, dtype=torch.float64).expand(len(u), -1, -1)).numpy()


# --- fixed points ---


@pytest.mark.parametrize("family", FAMILIES)
def test_laplace_is_the_mode_and_its_curvature(family):
    """Against a general optimizer of the joint density, and the textbook formula there."""
    model, engine = small_problem(family)
    u = points(model)
    here = settled(model, engine, Laplace(), u)
    k, likelihood = covariance(model, engine, u), likelihood_at(model, here.theta)
    for i in range(len(u)):
        phi = None if likelihood.phi is None else likelihood.phi[i]

        def density(x, phi=phi):
            x = double(x).requires_grad_(True)
            value = model.family.log_prob(model.data.outcome, x + model.data.offset, phi).sum()
            (slope,) = torch.autograd.grad(value, x)
            return float(value.detach()), slope.numpy()

        prior = np.linalg.pinv(k[i], rcond=1e-13)
        root = np.linalg.cholesky(k[i] + 1e-13 * np.trace(k[i]) * np.eye(model.data.n))

        def negative(z, root=root, density=density):
            value, slope = density(root @ z)
            return 0.5 * z @ z - value, z - root.T @ slope

        found = optimize.minimize(negative, np.zeros(model.data.n), jac=True, method="BFGS", options={"gtol": 1e-9})
        mode = root @ found.x
        np.testing.assert_allclose(here.posterior.mean[i], mode, atol=2e-5)
        eta = double(mode) + model.data.offset
        w = -model.family.derivatives(model.data.outcome, eta, phi)[1].expand_as(eta).numpy()
        log_det = np.linalg.slogdet(np.eye(model.data.n) + np.sqrt(w)[:, None] * k[i] * np.sqrt(w))[1]
        assert float(here.free_energy[i]) == pytest.approx(-found.fun - 0.5 * log_det, abs=1e-6)
        assert prior.shape == k[i].shape


@pytest.mark.parametrize("family", FAMILIES)
def test_the_variational_posterior_maximizes_the_bound(family):
    """No other mean and covariance does better; the bound is written out with matrices."""
    model, engine = small_problem(family, sizes=(4, 3), groups=())
    u = points(model, 1)
    here = settled(model, engine, Variational(), u)
    likelihood = likelihood_at(model, here.theta)
    n = model.data.n
    k = covariance(model, engine, u)[0]
    k = k + 1e-10 * np.trace(k) * np.eye(n)
    inverse = np.linalg.inv(k)

    def bound(mean, sigma):
        e = likelihood.expect(double(mean)[None], double(np.diag(sigma).copy())[None]).value.sum()
        log_det = np.linalg.slogdet(sigma)[1] - np.linalg.slogdet(k)[1]
        return float(e) - 0.5 * (np.trace(inverse @ sigma) + mean @ inverse @ mean - n - log_det)

    posterior = here.posterior
    mean = posterior.mean[0].numpy().copy()
    sigma = np.linalg.inv(inverse + np.diag(posterior.sites.precision[0].numpy()))
    best = bound(mean, sigma)
    objective = Variational().update(likelihood, posterior).objective
    assert float(objective) == pytest.approx(best, abs=1e-5)
    rng = np.random.default_rng(0)
    for _ in range(40):
        direction = 0.05 * rng.normal(size=n) * np.sqrt(np.diag(sigma))
        stretch = np.eye(n) + 0.05 * rng.normal(size=(n, n))
        for sign in (1, -1):
            assert bound(mean + sign * direction, sigma) < best
        assert bound(mean, stretch @ sigma @ stretch.T) < best
    if family != "gaussian":
        assert float(here.free_energy) > best  # what the Gaussian could not absorb is put back


@pytest.mark.parametrize("family", FAMILIES)
def test_ep_matches_the_moments_of_every_tilted_distribution(family):
    model, engine = small_problem(family, priors=INFORMED)
    u = points(model)
    here = settled(model, engine, ExpectationPropagation(), u)
    likelihood, posterior = likelihood_at(model, here.theta), here.posterior
    cavity_precision = 1 / posterior.variance - posterior.sites.precision
    cavity = (posterior.mean / posterior.variance - posterior.sites.shift) / cavity_precision
    grid = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
    for i in range(len(u)):
        x = posterior.mean[i] + posterior.variance[i].sqrt() * grid  # (grid, n)
        phi = None if likelihood.phi is None else likelihood.phi[i]
        tilted = model.family.log_prob(model.data.outcome, x + model.data.offset, phi)
        tilted = torch.softmax(tilted - 0.5 * cavity_precision[i] * (x - cavity[i]).square(), 0)
        mean = (tilted * x).sum(0)
        torch.testing.assert_close(mean, posterior.mean[i], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close((tilted * (x - mean).square()).sum(0), posterior.variance[i], rtol=1e-5, atol=1e-7)


def test_divergence_is_that_of_two_gaussians(rule):
    model, engine = small_problem("poisson", groups=("clutch",))
    u = points(model)
    here = settled(model, engine, rule, u)
    k = covariance(model, engine, u)
    k = double(k + 1e-9 * np.eye(model.data.n))
    sigma = torch.linalg.inv(torch.linalg.inv(k) + torch.diag_embed(here.posterior.sites.precision))
    normal = torch.distributions.MultivariateNormal
    q, p = normal(here.posterior.mean, (sigma + sigma.mT) / 2), normal(torch.zeros_like(here.posterior.mean), k)
    torch.testing.assert_close(
        divergence(here.posterior), torch.distributions.kl_divergence(q, p), rtol=1e-5, atol=1e-5
    )


# --- evidence ---


def test_all_rules_are_exact_for_a_gaussian_fate(rule):
    model, engine = small_problem("gaussian")
    u = points(model)
    here = settled(model, engine, rule, u)
    k, noise = covariance(model, engine, u), here.theta.values["sd_residual"] ** 2
    y = (model.data.outcome.y - model.data.offset).numpy()
    for i in range(len(u)):
        v = k[i] + float(noise[i]) * np.eye(len(y))
        exact = stats.multivariate_normal(np.zeros(len(y)), v).logpdf(y)
        assert float(here.free_energy[i]) == pytest.approx(exact, abs=1e-8)
        np.testing.assert_allclose(here.posterior.mean[i], k[i] @ np.linalg.solve(v, y), atol=1e-8)


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_units_of_a_gaussian_fate_do_not_matter(rule, unit):
    """The density of the data is per unit of the response, and nothing else changes: priors, sites, length-scales."""
    model, engine = small_problem("gaussian")
    data = Data(Outcome(unit * model.data.outcome.y), model.data.design, model.data.terms, unit * model.data.offset)
    scaled = Model(model.family, model.components, data)
    u = points(model)
    v = u.clone()
    v[:, :4] *= unit
    v[:, 4] += math.log(unit)
    assert [p.name for p in model.parameters][4] == "sd_residual"
    one, other = evaluate_with_gradient(model, engine, u, rule), evaluate_with_gradient(scaled, engine, v, rule)
    shift = len(data.offset) * math.log(unit)
    torch.testing.assert_close(other.free_energy, one.free_energy - shift, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(other.posterior.mean, unit * one.posterior.mean, rtol=1e-7, atol=1e-9 * unit)
    slope = other.gradient.clone()
    slope[:, :4] *= unit
    torch.testing.assert_close(slope, one.gradient, rtol=1e-6, atol=1e-7)


def pair(family: str, correlation: float, variance: float) -> tuple[Model, object]:
    """Two cells whose latent values correlate."""
    k = double(variance * np.array([[1.0, correlation], [correlation, 1.3]]))
    components = [Component("pair", Given(k, normalized=False))]
    known = {
        "gaussian": [0.5, -1.0],
        "bernoulli": [1.0, 1.0],
        "binomial": [2.0, 7.0],
        "beta": [0.2, 0.9],
        "ordinal": [0, 1],
    }
    y = known.get(family, [0.0, 4.0])
    levels = 3 if family == "ordinal" else None
    trials = double([5.0, 8.0]) if family == "binomial" else None
    data = Data(Outcome(double(y), trials, levels), torch.zeros(2, 0, dtype=torch.float64), (), double([0.2, -0.1]))
    return Model(get_family(family), components, data), dense_engine(components, 2)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_of_two_cells(family, correlation):
    """Against an integral over both latent values. Independent cells leave nothing out, dependent ones little."""
    model, engine = pair(family, correlation, 1.5)
    own = {
        "gaussian": {"sd_residual": 0.8},
        "negative_binomial": {"dispersion": 0.4},
        "beta": {"precision": 5.0},
        "ordinal": {"gap_1": 1.2},
    }.get(family, {})
    theta, _ = model.from_natural({"sd_pair": 1.0} | own)
    k = model.components[0].kernel.matrix
    x = torch.linspace(-11, 11, 1501, dtype=torch.float64)
    one, two = (
        model.family.log_prob(
            Outcome(
                model.data.outcome.y[i], None if model.data.outcome.trials is None else model.data.outcome.trials[i]
            ),
            x + model.data.offset[i],
            None if model.phi(theta) is None else model.phi(theta)[0],
        )
        for i in range(2)
    )
    grid = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), k).log_prob(grid)
    exact = float(torch.logsumexp((one[:, None] + two + prior).flatten(), 0)) + 2 * math.log(float(x[1] - x[0]))
    error = {
        name: float(evaluate(model, engine, theta, r(), tolerance=1e-10).free_energy) - exact
        for name, r in RULES.items()
    }
    if family == "gaussian":
        assert max(map(abs, error.values())) < 1e-8
    else:
        # where cells are independent only the quadrature is left
        assert abs(error["ep"]) < (1e-5 if correlation == 0 else 0.003)
        assert abs(error["variational"]) < (1e-5 if correlation == 0 else 0.006)
        assert abs(error["laplace"]) > 0.001


# --- slopes ---


def with_values(model: Model, u: torch.Tensor) -> torch.Tensor:
    """Where no length-scale or rate is out of the ordinary, and fixed effects are not zero."""
    u = u.clone()
    for i, p in enumerate(model.parameters):
        if p.scale == "real":
            u[:, i] += 0.3
    return u


@pytest.mark.parametrize("reml", [True, False], ids=["reml", "ml"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_the_free_energy(family, rule, reml):
    """Every hyperparameter: sds, rate of forgetting, length-scale, groups in and across blocks, the family's own, fixed effects."""
    model, engine = small_problem(family, reml=reml, priors=INFORMED if reml else None)
    u = with_values(model, points(model, 2))
    here = evaluate_with_gradient(model, engine, u, rule, tolerance=1e-11)
    h, d = 1e-4, u.shape[1]
    assert d == 6 + OWN.get(family, 0) + 2 * (not reml)
    offsets = h * torch.eye(d, dtype=torch.float64)
    around = torch.cat([(u[:, None] + offsets).flatten(0, 1), (u[:, None] - offsets).flatten(0, 1)])
    start = Sites(*(x.repeat_interleave(d, 0).repeat(2, 1) for x in (here.fit.sites.precision, here.fit.sites.shift)))
    value = evaluate(model, engine, model.theta(around), rule, start=start, tolerance=1e-11).free_energy
    above, below = value.reshape(2, len(u), d)
    numeric = (above - below) / (2 * h)
    torch.testing.assert_close(here.gradient, numeric, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("link", ["probit", "cloglog"])
def test_gradient_for_other_links(link, rule):
    model, engine = small_problem("bernoulli", link=link, groups=(), priors=INFORMED)
    u = points(model, 1)
    here = evaluate_with_gradient(model, engine, u, rule, tolerance=1e-11)
    h = 1e-4 * torch.eye(u.shape[1], dtype=torch.float64)
    value = evaluate(model, engine, model.theta(torch.cat([u + h, u - h])), rule, tolerance=1e-11).free_energy
    numeric = (value[: len(h)] - value[len(h) :]) / 2e-4
    tolerance = (
        1e-5 if link == "probit" else 1e-3
    )  # of a cloglog, quadrature leaves so much between a sum and its slope
    torch.testing.assert_close(here.gradient[0], numeric, rtol=tolerance, atol=0.1 * tolerance)


def test_an_absent_component_has_no_slope(rule):
    """The free energy is even in a standard deviation, so that zero is an ordinary point."""
    model, engine = small_problem("bernoulli", groups=())
    u = points(model, 2)
    u[0, 0] = 0.0
    u[1, 1] = 0.0
    here = evaluate_with_gradient(model, engine, u, rule, tolerance=1e-10)
    assert here.gradient.isfinite().all()
    assert abs(float(here.gradient[0, 0])) < 1e-10
    assert abs(float(here.gradient[1, 1])) < 1e-10
    mirrored = u.clone()
    mirrored[:, 2:] = u[:, 2:]
    mirrored[:, :2] *= -1
    torch.testing.assert_close(
        evaluate(model, engine, model.theta(mirrored), rule, tolerance=1e-10).free_energy, here.free_energy
    )


# --- the loop ---


@pytest.mark.parametrize("family", ["bernoulli", "poisson"])
def test_a_point_does_not_depend_on_its_company(family, rule):
    """To the last digits: points leave the batch as they converge, and take no step for others."""
    model, engine = small_problem(family, priors=INFORMED)
    u = points(model, 5)
    u[3, :4] *= 3  # one that takes long
    together = evaluate_with_gradient(model, engine, u, rule)
    for i in range(len(u)):
        alone = evaluate_with_gradient(model, engine, u[i : i + 1], rule)
        assert int(alone.fit.updates) == int(together.fit.updates[i])
        torch.testing.assert_close(alone.free_energy[0], together.free_energy[i], rtol=1e-11, atol=1e-10)
        torch.testing.assert_close(alone.posterior.mean[0], together.posterior.mean[i], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(alone.gradient[0], together.gradient[i], rtol=1e-6, atol=1e-7)
    assert rule.name == "ep" or len(set(together.fit.updates.tolist())) > 1


def test_the_answer_does_not_depend_on_the_start(rule):
    model, engine = small_problem("poisson")
    u = points(model)
    cold = settled(model, engine, rule, u)
    rng = np.random.default_rng(0)
    n = model.data.n
    start = Sites(double(rng.gamma(1.0, size=(3, n))), double(rng.normal(size=(3, n))))
    other = settled(model, engine, rule, u, start=start)
    torch.testing.assert_close(other.free_energy, cold.free_energy, rtol=1e-9, atol=1e-8)
    warm = settled(model, engine, rule, u, start=cold.fit.sites)
    assert int(warm.fit.updates.max()) <= 2
    torch.testing.assert_close(warm.free_energy, cold.free_energy, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("rule", [Laplace(), Variational()], ids=lambda r: r.name)
def test_every_accepted_step_raises_the_objective(rule):
    """From a start so bad that full steps overshoot."""
    model, engine = small_problem("poisson", sizes=(12,), groups=())
    theta = model.theta(points(model, 1))
    terms, likelihood = model.terms(theta), likelihood_at(model, theta)
    bad = Sites(torch.full((1, 12), 0.5, dtype=torch.float64), torch.full((1, 12), 4.0, dtype=torch.float64))
    values = []
    for updates in range(25):
        fit = fit_sites(engine, terms, likelihood, rule, bad, tolerance=1e-12, max_updates=updates)
        values.append(float(rule.update(likelihood, fit.posterior).objective))
    assert (np.diff(values) >= -1e-9 * np.abs(values[1:])).all()
    assert values[-1] > values[0] + 1


def test_converged_means_that_another_update_changes_nothing(rule):
    """A plain one, from the sites that are returned: a short accelerated step would not say so."""
    for family in ("bernoulli", "poisson"):
        model, engine = small_problem(family)
        here = settled(model, engine, rule, points(model))
        target = rule.update(likelihood_at(model, here.theta), here.posterior).target
        again = engine.condition(here.terms, target)
        sd = here.posterior.variance.sqrt()
        assert float(((again.mean - here.posterior.mean) / sd).abs().max()) < 1e-8
        torch.testing.assert_close(again.variance, here.posterior.variance, rtol=1e-8, atol=0)


EXTREMES = {
    "a huge count": ("poisson", [0, 1, 0, 200_000, 2, 0]),
    "a huge overdispersed count": ("negative_binomial", [0, 1, 0, 200_000, 2, 0]),
    "one count in all": ("poisson", [0, 0, 1, 0, 0, 0]),
    "one fate only": ("bernoulli", [1, 1, 1, 1, 1, 1]),
    "one fate but one": ("bernoulli", [1, 1, 1, 0, 1, 1]),
    "a far outlier": ("gaussian", [0.1, -0.2, 0.3, 1e3, 0.0, 0.2]),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_responses_have_a_free_energy(name):
    """Two rules that share little say the same, and slopes are numbers."""
    family, y = EXTREMES[name]
    model, engine = small_problem("poisson", sizes=(6,), groups=())
    data = Data(Outcome(double(y)), model.data.design, model.data.terms, model.data.offset)
    model = Model(get_family(family), model.components, data)
    u = model.start()[None].repeat(3, 1)
    u[:, :2] *= double([[0.3], [1.0], [3.0]])
    variational, ep = (evaluate_with_gradient(model, engine, u, r) for r in (Variational(), ExpectationPropagation()))
    torch.testing.assert_close(variational.free_energy, ep.free_energy, rtol=0, atol=0.12)
    for here in (variational, ep):
        assert (here.fit.status == Status.CONVERGED).all()
        assert here.gradient.isfinite().all()


def test_no_cell_starts_from_a_negative_precision():
    """Next to a fate of 0 the curvature of a beta density is the small difference of two large numbers."""
    model, _ = small_problem("beta")
    y = double(np.geomspace(1e-300, 0.5, model.data.n))
    for precision in (0.1, 1.0, 4.95, 30.0):
        likelihood = Likelihood(model.family, Outcome(y), double([[0.0]]), double([[precision]]))
        e = model.family.at(Outcome(y), model.family.start(Outcome(y)), double([[precision]]))
        assert (e.precision < 0).any()
        start = likelihood.start(1)
        assert (start.precision >= 0).all()
        kept = e.precision > 0  # where there is curvature, the sites are Laplace's
        mean = (e.slope / e.precision + model.family.start(Outcome(y)))[kept]
        np.testing.assert_allclose((start.shift / start.precision)[kept], mean, rtol=1e-10)


def test_counts_of_nothing_settle(rule):
    """Under a wide prior the first guess of a rate is off by e^30."""
    model, engine = small_problem("poisson", sizes=(6,), groups=())
    data = Data(Outcome(double([0] * 6)), model.data.design, model.data.terms, model.data.offset)
    model = Model(model.family, model.components, data)
    here = evaluate(model, engine, model.theta(model.start()[None]), rule)
    assert (here.fit.status == Status.CONVERGED).all()
    assert -2.5 < float(here.free_energy) < -1.4  # of the order of what a prior on the intercept costs


def test_an_offset_far_off_is_met():
    """Counts 800 e-folds below their exposure are absurd, but not beyond the latent field."""
    model, engine = small_problem("poisson", sizes=(6,), groups=())
    data = Data(model.data.outcome, model.data.design, model.data.terms, model.data.offset + 800.0)
    model = Model(model.family, model.components, data)
    here = evaluate(model, engine, model.theta(points(model)), Variational())
    assert (here.fit.status == Status.CONVERGED).all()
    assert float(here.posterior.mean.max()) < -780


def test_every_status_has_a_sentence():
    assert len({status.sentence for status in Status}) == len(Status)
