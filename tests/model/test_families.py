"""Every family with every link: densities and derivatives with 50 digits, expectations by brute force, draws by their law."""

import inspect
import math

import mpmath
import numpy as np
import pytest
import torch

from cellfate.errors import DataError
from cellfate.model.catalog import concrete, get_family
from cellfate.model.families import Family, Outcome
from tests.problem import double

# a fate of several fields is in test_categorical.py
ALL = [(family.name, link) for family in concrete() if family.kind != "fates" for link in family.links]
DISCRETE = [(name, link) for name, link in ALL if name not in ("gaussian", "beta")]
PHI = {"gaussian": 0.7, "negative_binomial": 0.6, "beta": 8.0, "ordinal": [[0.8, 1.7]]}
# outcomes (y, trials) of every kind of response, the extremes among them
OUTCOMES = {
    "real": [(-2.5, None), (0.0, None), (4.0, None)],
    "binary": [(0.0, None), (1.0, None)],
    "successes": [(0.0, 1.0), (0.0, 9.0), (4.0, 9.0), (9.0, 9.0), (30.0, 200.0)],
    "count": [(0.0, None), (1.0, None), (6.0, None), (300.0, None)],
    "levels": [(0.0, None), (1.0, None), (2.0, None), (3.0, None)],
    "proportion": [(0.02, None), (0.5, None), (0.93, None)],
}
CENTRAL = [-6.0, -2.3, -0.4, 0.0, 0.1, 1.7, 5.0]
TAILS = [-700.0, -90.0, -33.0, -29.0, -20.0, -12.0, 9.0, 20.0, 35.0]


@pytest.fixture(params=ALL, ids="-".join)
def family(request):
    return get_family(*request.param)


def outcomes(family: Family) -> list[tuple[float, float | None]]:
    return OUTCOMES[family.kind]


def crossed(family: Family, etas) -> tuple[Outcome, torch.Tensor, torch.Tensor | None]:
    """Each outcome at each eta, as cells."""
    rows = [(y, trials, eta) for y, trials in outcomes(family) for eta in etas]
    y, trials, eta = (None if column[0] is None else double(column) for column in zip(*rows, strict=True))
    assert y is not None
    assert eta is not None
    return Outcome(y, trials), eta, phi_of(family)


def phi_of(family: Family) -> torch.Tensor | None:
    return None if family.name not in PHI else double(PHI[family.name] if family.several else [PHI[family.name]])


# --- the definition, with as many digits as it takes ---


def exact_log_prob(family: Family, y: float, trials: float | None, eta) -> mpmath.mpf:
    if family.name == "ordinal":
        cuts = [mpmath.mpf(c) for c in np.cumsum([0.0, *PHI["ordinal"][0]])]
        inner = (
            (lambda x: 1 / (1 + mpmath.exp(-x)))
            if family.link == "logit"
            else (lambda x: mpmath.erfc(-x / mpmath.sqrt(2)) / 2)
        )
        below = inner(cuts[int(y) - 1] - eta) if y > 0 else 0
        return mpmath.log((inner(cuts[int(y)] - eta) if y < len(cuts) else 1) - below)
    y, phi = mpmath.mpf(y), mpmath.mpf(PHI.get(family.name, 1))
    if family.name == "beta":
        mu, other = 1 / (1 + mpmath.exp(-eta)), 1 / (1 + mpmath.exp(eta))
        constant = mpmath.loggamma(phi) - mpmath.loggamma(mu * phi) - mpmath.loggamma(other * phi)
        return constant + (mu * phi - 1) * mpmath.log(y) + (other * phi - 1) * mpmath.log(1 - y)
    if family.name == "gaussian":
        return -((y - eta) ** 2) / (2 * phi) - mpmath.log(2 * mpmath.pi * phi) / 2
    if family.name == "poisson":
        return y * eta - mpmath.exp(eta) - mpmath.loggamma(y + 1)
    if family.name == "negative_binomial":
        mu, r = mpmath.exp(eta), 1 / phi
        ways = mpmath.loggamma(y + r) - mpmath.loggamma(r) - mpmath.loggamma(y + 1)
        return ways + r * mpmath.log(r / (r + mu)) + y * mpmath.log(mu / (r + mu))
    n = mpmath.mpf(1 if trials is None else trials)
    if family.link == "logit":
        p, q = 1 / (1 + mpmath.exp(-eta)), 1 / (1 + mpmath.exp(eta))
    elif family.link == "probit":
        p, q = mpmath.erfc(-eta / mpmath.sqrt(2)) / 2, mpmath.erfc(eta / mpmath.sqrt(2)) / 2
    else:
        p, q = -mpmath.expm1(-mpmath.exp(eta)), mpmath.exp(-mpmath.exp(eta))
    ways = mpmath.loggamma(n + 1) - mpmath.loggamma(y + 1) - mpmath.loggamma(n - y + 1)
    return ways + (y * mpmath.log(p) if y else 0) + ((n - y) * mpmath.log(q) if n > y else 0)


def exact(family: Family, outcome: Outcome, eta: torch.Tensor, order: int) -> np.ndarray:
    """Value or derivative, from differences of 60-digit values."""
    out = []
    trials = [None] * len(eta) if outcome.trials is None else outcome.trials.tolist()
    for y, n, x in zip(outcome.y.tolist(), trials, eta.tolist(), strict=True):
        with mpmath.workdps(800 if family.name == "ordinal" else 400 if abs(x) > 25 else 60):

            def f(e, y=y, n=n):
                return exact_log_prob(family, y, n, e)

            h = mpmath.mpf(10) ** -12  # central differences: off by 1e-24
            x = mpmath.mpf(x)
            if order == 0:
                out.append(float(f(x)))
            elif order == 1:
                out.append(float((f(x + h) - f(x - h)) / (2 * h)))
            else:
                out.append(float((f(x + h) - 2 * f(x) + f(x - h)) / h**2))
    return np.array(out)


def possible(family: Family, etas: list[float]) -> list[float]:
    """Where the log-density itself is a number: a double ends where exp(eta) does."""
    if family.name == "gaussian":
        return etas
    if family.name == "ordinal":
        return [eta for eta in etas if abs(eta) < 40]
    if family.name in ("bernoulli", "binomial", "beta") and family.link != "cloglog":
        return [eta for eta in etas if abs(eta) < 100]
    return [eta for eta in etas if eta > -100 and eta < 30]


@pytest.mark.parametrize("where", ["central", "tails"])
@pytest.mark.parametrize("order", [0, 1, 2], ids=["value", "slope", "curvature"])
def test_log_density_and_derivatives(family, order, where):
    outcome, eta, phi = crossed(family, CENTRAL if where == "central" else possible(family, TAILS))
    found = (family.log_prob(outcome, eta, phi), *family.derivatives(outcome, eta, phi))[order]
    # of the curvature in the far tail of a probit, eta + hazard(eta) ~ 1/|eta| is a difference of the two
    # and torch's trigamma has ten digits
    rough = (family.link == "probit" or family.name == "beta") and order == 2
    tolerance = 1e-8 if rough else 1e-12
    expected = exact(family, outcome, eta, order)
    np.testing.assert_allclose(found.expand_as(eta), expected, rtol=tolerance, atol=tolerance * 0.1)


def test_autograd_of_the_log_density_is_its_derivative(family):
    """The gradient of the free energy goes through both, so both have to survive the tails."""
    outcome, eta, phi = crossed(family, CENTRAL + possible(family, TAILS))
    eta.requires_grad_(True)
    (slope,) = torch.autograd.grad(family.log_prob(outcome, eta, phi).sum(), eta)
    d1, d2 = (d.expand_as(eta) for d in family.derivatives(outcome, eta, phi))
    (curvature,) = torch.autograd.grad(d1.sum(), eta, retain_graph=True)
    torch.testing.assert_close(slope, d1.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(curvature, d2.detach(), rtol=1e-7, atol=1e-7)
    if d2.requires_grad:
        (third,) = torch.autograd.grad(d2.sum(), eta)
        assert third.isfinite().all()


def test_probabilities_add_up(family):
    eta = double([-1.5, 0.0, 1.2])[:, None]
    if family.kind == "proportion":
        t = torch.linspace(-60, 60, 200_001, dtype=torch.float64)  # of the logit, in which nothing is lost at the ends
        y = torch.sigmoid(t).clamp(max=1 - 1e-16)
        change = torch.sigmoid(t) * torch.sigmoid(-t)
        density = torch.exp(family.log_prob(Outcome(y), eta, phi_of(family)))
        total = (density * change).sum(-1) * float(t[1] - t[0])
    elif family.kind == "real":
        y = torch.linspace(-40, 40, 80_001, dtype=torch.float64)
        total = torch.exp(family.log_prob(Outcome(y), eta, phi_of(family))).sum(-1) * float(y[1] - y[0])
    else:
        trials = 9.0 if family.kind == "successes" else 1.0
        y = torch.arange({"binary": 2, "successes": 10, "count": 4000, "levels": 4}[family.kind], dtype=torch.float64)
        density = family.log_prob(Outcome(y, torch.full_like(y, trials)), eta, phi_of(family))
        total = torch.exp(density).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-11, atol=0)


# --- Gaussian expectations ---

# what 40 Gauss-Hermite nodes leave; the double exponential of a cloglog needs more of them
QUADRATURE = {1e-4: 1e-11, 0.3: 1e-11, 1.0: 1e-11, 2.0: 1e-5, 4.0: 1e-6}
QUADRATURE_PROBIT = {1e-4: 1e-11, 0.3: 1e-11, 1.0: 1e-10, 2.0: 1e-5, 4.0: 1e-5}
QUADRATURE_CLOGLOG = {1e-4: 1e-11, 0.3: 1e-11, 1.0: 1e-5, 2.0: 2e-3, 4.0: 2e-3}
Z = torch.linspace(-14, 18, 6_001, dtype=torch.float64)  # beyond 12 for the sake of exp(eta)
W = torch.softmax(-0.5 * Z.square(), 0)
MEANS = [-4.0, -1.0, 0.0, 0.5, 2.5]


def tolerance_of(family: Family, sd: float) -> float:
    found = {"probit": QUADRATURE_PROBIT, "cloglog": QUADRATURE_CLOGLOG}.get(family.link, QUADRATURE)[sd]
    return max(found, 1e-4 if sd >= 2 else 1e-8) if family.name in ("beta", "ordinal") else found


def brute_force(family: Family, outcome: Outcome, mean: torch.Tensor, sd: float, phi: torch.Tensor | None):
    """E f, E f', -E f'' and log E e^r cell by cell, by the trapezoid rule on a very fine grid."""
    rows = []
    for i, m in enumerate(mean):
        one = Outcome(outcome.y[i], None if outcome.trials is None else outcome.trials[i])
        eta = m + sd * Z
        f, (d1, d2) = family.log_prob(one, eta, phi), family.derivatives(one, eta, phi)
        value, slope, precision = (W * f).sum(), (W * d1).sum(), -(W * d2).sum()
        r = f - value - sd * slope * Z + 0.5 * sd**2 * precision * (Z.square() - 1)
        rows.append(torch.stack([value, slope, precision, torch.logsumexp(torch.log(W) + r, 0)]))
    return torch.stack(rows, -1)


@pytest.mark.parametrize("sd", QUADRATURE)
def test_gaussian_expectations(family, sd):
    outcome, mean, phi = crossed(family, MEANS)
    found = family.expect(outcome, mean, torch.full_like(mean, sd**2), phi)
    value, slope, precision, _ = brute_force(family, outcome, mean, sd, phi)
    tolerance = tolerance_of(family, sd)
    torch.testing.assert_close(found.value, value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.slope, slope, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.precision.expand_as(mean), precision, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sd", QUADRATURE)
def test_correction_is_the_expectation_of_what_is_left(family, sd):
    outcome, mean, phi = crossed(family, MEANS)
    found = family.correction(outcome, mean, torch.full_like(mean, sd**2), phi)
    _, _, precision, expected = brute_force(family, outcome, mean, sd, phi)
    reached = precision * sd**2 < 0.95  # at a fixed point a posterior is narrower than its site
    if family.name == "beta":  # which is not log-concave, and takes a mean far from its data very badly
        reached &= (precision > 0) & (expected < 0.5)
    tolerance = {1e-4: 1e-9, 0.3: 1e-9, 1.0: 2e-6, 2.0: 5e-5, 4.0: 5e-5}[sd]
    tolerance = max(tolerance, 0.01 if sd >= 1 else 0.0) if family.name == "beta" else tolerance
    torch.testing.assert_close(found[reached], expected[reached], rtol=0, atol=tolerance)
    if family.name not in ("gaussian", "beta") and sd == 2:
        assert float(expected[reached].max()) > 0.005  # there is something to correct


def test_at_a_point_expectations_are_values(family):
    outcome, eta, phi = crossed(family, CENTRAL)
    point = family.at(outcome, eta, phi)
    d1, d2 = family.derivatives(outcome, eta, phi)
    for found, expected in (
        (point.value, family.log_prob(outcome, eta, phi)),
        (point.slope, d1),
        (point.precision, -d2),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    narrow = family.expect(outcome, eta, torch.zeros_like(eta), phi)
    torch.testing.assert_close(narrow.value, point.value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(narrow.slope, point.slope, rtol=1e-10, atol=1e-10)
    assert (family.correction(outcome, eta, torch.zeros_like(eta), phi).abs() < 1e-8).all()


def test_expectations_are_differentiable(family):
    """The gradient of the free energy needs their slopes in mean, variance and the family's own parameter."""
    outcome, mean, phi = crossed(family, [-2.0, 0.3, 1.5])
    variance = torch.linspace(0.05, 1.0, len(mean), dtype=torch.float64)
    arguments = [mean.requires_grad_(True), variance.requires_grad_(True)]
    if phi is not None:
        arguments.append(phi.clone().requires_grad_(True))

    def moments(m, v, p=None):
        e = family.expect(outcome, m, v, p)
        c = family.correction(outcome, m, v, p)
        return e.value, e.slope, e.precision.expand_as(m), c

    assert torch.autograd.gradcheck(moments, arguments, atol=1e-5, rtol=1e-4)


# --- one cell on its own ---


@pytest.mark.parametrize("sd", [0.5, 1.5, 3.0])
def test_corrected_bound_is_the_evidence_of_an_isolated_cell(family, sd):
    """At the fixed point of one cell, bound plus correction is log of the integral of p(y|eta) N(eta; 0, sd^2)."""
    outcome, _, phi = crossed(family, [0.0])
    m, v = family.start(outcome), torch.full_like(outcome.y, 0.1)
    for _ in range(150):
        e = family.expect(outcome, m, v, phi)
        new = 1 / (1 / sd**2 + e.precision)
        m, v = m + 0.5 * (new * (e.precision * m + e.slope) - m), v + 0.5 * (new - v)
    e = family.expect(outcome, m, v, phi)
    torch.testing.assert_close(m, sd**2 * e.slope, rtol=1e-7, atol=1e-9)
    divergence = 0.5 * ((v + m.square()) / sd**2 - 1 - torch.log(v / sd**2))
    bound, correction = e.value - divergence, family.correction(outcome, m, v, phi)

    span = torch.linspace(-15, 15, 6_001, dtype=torch.float64)[:, None]
    eta = m + torch.maximum(v.sqrt(), 0.7 * torch.full_like(v, sd)) * span  # reaches over the prior too
    joint = family.log_prob(outcome, eta, phi) - 0.5 * (eta / sd).square() - math.log(sd) - 0.5 * math.log(2 * math.pi)
    evidence = torch.logsumexp(joint, 0) + torch.log(eta[1] - eta[0])
    assert (bound <= evidence + 1e-9).all()  # a bound it is
    tolerance = 2e-3 if family.link == "cloglog" else 2e-5
    torch.testing.assert_close(bound + correction, evidence, rtol=0, atol=tolerance)


# --- links ---


@pytest.mark.parametrize("link", ["logit", "probit", "cloglog"])
def test_the_distribution_of_a_binary_fate_has_the_variance_of_its_threshold(link):
    """A fate is there when eta exceeds a threshold whose distribution function is the inverse link."""
    family = get_family("bernoulli", link)
    eta = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    p = family.inverse_link(eta)
    density, middle = torch.diff(p), (eta[1:] + eta[:-1]) / 2
    mean = (density * middle).sum()
    variance = float((density * (middle - mean).square()).sum())
    closed = {"logit": math.pi**2 / 3, "probit": 1.0, "cloglog": math.pi**2 / 6}[link]
    assert variance == pytest.approx(closed, rel=1e-5)
    for name in ("bernoulli", "binomial"):
        found = get_family(name, link).distribution_variance(torch.zeros(2, 5), torch.ones(2, 1))
        torch.testing.assert_close(found, torch.full((2, 1), closed))


# Nakagawa, Johnson & Schielzeth (2017): trigamma(lambda) and trigamma(1 / (1/lambda + phi)), where trigamma has closed values
TRIGAMMA = {0.5: math.pi**2 / 2, 1.0: math.pi**2 / 6, 2.0: math.pi**2 / 6 - 1}


@pytest.mark.parametrize("total", [0.0, 1.3])
def test_link_variance_of_counts(total):
    shift, variance = double([0.3, -0.8, 1.1]), double([[total]])
    for rate, expected in TRIGAMMA.items():
        eta = (
            shift - torch.logsumexp(shift, 0) + math.log(3) + math.log(rate) - total / 2
        )  # mean of the rates is `rate`
        found = get_family("poisson").distribution_variance(eta[None], variance)
        assert found.item() == pytest.approx(expected, rel=1e-9)
        for phi in (0.25, 1.0):
            if phi < 1 / rate:
                other = 1 / (1 / rate - phi)
                at = eta + math.log(other / rate)
                found = get_family("negative_binomial").distribution_variance(at[None], variance, double([[phi]]))
                assert found.item() == pytest.approx(expected, rel=1e-9)


def test_link_variance_of_a_gaussian_is_a_component_of_its_own():
    assert get_family("gaussian").distribution_variance(torch.zeros(2, 5), torch.ones(2, 1)).tolist() == [[0.0], [0.0]]


def test_start_is_near_the_best_value_of_each_cell_alone(family):
    outcome, _, phi = crossed(family, [0.0])
    eta = family.start(outcome)
    assert eta.isfinite().all()
    e = family.at(outcome, eta, phi)
    assert (e.precision.expand_as(eta) > 0).all()
    step = (e.slope / e.precision).abs()  # of Newton, unless the best value is at infinity
    inner = outcome.y > 0 if outcome.trials is None else (outcome.y > 0) & (outcome.y < outcome.trials)
    if family.kind not in ("binary", "levels", "proportion"):
        assert (step[inner] < 0.5).all()


# --- simulators ---


def moments_of(family: Family, eta: float, trials: float) -> tuple[float, float]:
    """Mean and variance of a response in closed form, from the definition of the family."""
    phi = PHI.get(family.name, 0.0)
    if family.name == "gaussian":
        return eta, phi
    if family.name == "beta":
        mu = 1 / (1 + math.exp(-eta))
        return mu, mu * (1 - mu) / (1 + phi)
    if family.name == "ordinal":
        levels = double(range(4))
        p = torch.exp(family.log_prob(Outcome(levels), double(eta), double(phi)))
        return float((p * levels).sum()), float((p * levels.square()).sum() - (p * levels).sum() ** 2)
    if family.kind == "count":
        mu = math.exp(eta)
        return mu, mu + phi * mu**2
    p = {
        "logit": 1 / (1 + math.exp(-eta)),
        "probit": 0.5 * math.erfc(-eta / math.sqrt(2)),
        "cloglog": 1 - math.exp(-math.exp(eta)),
    }[family.link]
    return trials * p, trials * p * (1 - p)


def own_of(family: Family) -> dict:
    if family.several:
        return {"gaps": PHI[family.name][0]}
    return {} if family.parameter is None else {family.parameter: PHI[family.name]}


@pytest.mark.parametrize("eta", [-1.7, 0.0, 1.4])
def test_simulated_responses_have_the_mean_and_variance_of_the_family(family, eta):
    n, trials = 100_000, 7.0 if family.kind == "successes" else 1.0
    options = {"trials": np.full(n, trials)} if family.kind == "successes" else {}
    options |= own_of(family)
    y = family.simulate(np.full(n, eta), rng=np.random.default_rng(1), **options)
    assert y.shape == (n,)
    mean, variance = moments_of(family, eta, trials)
    inverse = float(family.inverse_link(double(eta)))
    if family.name == "ordinal":  # of being above the lowest level
        assert abs((y > 0).mean() - inverse) < 4 * math.sqrt(0.25 / n)
        inverse = mean
    assert inverse * (trials if family.kind == "successes" else 1) == pytest.approx(mean, rel=1e-12)
    centered = (y - mean) ** 2
    assert abs(y.mean() - mean) < 4 * math.sqrt(variance / n)
    assert abs(centered.mean() - variance) <= 4 * centered.std() / math.sqrt(n)


@pytest.mark.parametrize(("name", "link"), DISCRETE)
def test_simulated_responses_follow_the_density(name, link):
    family, n, eta = get_family(name, link), 50_000, 0.8
    options = {"trials": 5} if family.kind == "successes" else {}
    options |= own_of(family)
    y = family.simulate(np.full(n, eta), rng=np.random.default_rng(2), **options)
    values = np.arange({"binary": 2, "successes": 6, "count": 9, "levels": 4}[family.kind])
    p = torch.exp(
        family.log_prob(Outcome(double(values), torch.full((len(values),), 5.0)), double(eta), phi_of(family))
    )
    found = np.bincount(y.astype(int), minlength=len(values))
    observed, expected = found[: len(values)], n * p.numpy()
    if family.kind == "count":
        observed, expected = np.append(observed, found[len(values) :].sum()), np.append(expected, n - expected.sum())
    assert observed.sum() == n
    chi2 = float(((observed - expected) ** 2 / expected).sum())
    free = len(observed) - 1
    assert chi2 < free + 4 * math.sqrt(2 * free) + 4  # far beyond the 99.9% quantile at these degrees of freedom


def test_a_draw_depends_on_the_generator_alone(family):
    eta = np.linspace(-1, 1, 50)
    one, two = (family.simulate(eta, rng=np.random.default_rng(5), trials=9) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert (one != family.simulate(eta, rng=np.random.default_rng(6), trials=9)).any()


# --- names ---


def test_families_are_found_by_name():
    assert {name for name, _ in ALL} == {
        "gaussian",
        "bernoulli",
        "binomial",
        "poisson",
        "negative_binomial",
        "ordinal",
        "beta",
    }
    assert all(not inspect.isabstract(family) for family in concrete())
    for name, link in ALL:
        family = get_family(name, link)
        assert (family.name, family.link) == (name, link)
    assert [get_family(name).link for name in ("bernoulli", "poisson", "gaussian")] == ["logit", "log", "identity"]


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(
        DataError, match=r"unknown family 'normal'; choose from bernoulli, beta, binomial, categorical, gaussian, "
    ):
        get_family("normal")
    with pytest.raises(DataError, match=r"family 'poisson' has no link 'logit'; choose from log\."):
        get_family("poisson", "logit")
    with pytest.raises(DataError, match=r"has no link 'log'; choose from logit, probit, cloglog\."):
        get_family("bernoulli", "log")


@pytest.mark.parametrize("spread", [0.05, 0.8, 3.0])
@pytest.mark.parametrize(("family", "link"), ALL)
def test_integrals_are_the_expectation_and_the_correction_with_its_derivatives(family, link, spread):
    rng = np.random.default_rng(2)
    fate, n = get_family(family, link), 12
    trials = rng.integers(1, 6, size=n).astype(float) if fate.kind == "successes" else None
    y = fate.simulate(rng.normal(size=n), rng=rng, trials=trials)
    outcome = Outcome(torch.as_tensor(y), None if trials is None else torch.as_tensor(trials))
    phi = None if phi_of(fate) is None else torch.stack([phi_of(fate), 1.3 * phi_of(fate)])
    m = torch.as_tensor(rng.normal(size=(2, n))).requires_grad_(True)
    v = torch.as_tensor(spread * rng.uniform(0.5, 1.2, size=(2, n))).requires_grad_(True)
    expectation, found = fate.integrals(outcome, m.detach(), v.detach(), phi)
    for x, alone in zip(
        vars(expectation).values(), vars(fate.expect(outcome, m.detach(), v.detach(), phi)).values(), strict=True
    ):
        torch.testing.assert_close(x, alone, rtol=1e-12, atol=1e-12)
    if fate.quadratic:
        assert all(not bool(x.any()) for x in vars(found).values())
        return
    correction = fate.correction(outcome, m, v, phi)
    in_mean, in_variance = torch.autograd.grad(correction.sum(), (m, v))
    precision_mean, precision_variance = torch.autograd.grad(fate.expect(outcome, m, v, phi).precision.sum(), (m, v))
    expected = (correction.detach(), in_mean, in_variance, -precision_mean, -2 * precision_variance)
    for x, truth in zip(vars(found).values(), expected, strict=True):
        # two ways to differentiate one quadrature, which agree as far as it is good: less so the wider a cell is spread
        torch.testing.assert_close(x, truth, rtol=0, atol=(1e-6 if spread < 0.1 else 2e-3) * float(truth.abs().max()))
