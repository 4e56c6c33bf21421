"""The integral over hyperparameters: against long MCMC runs of the stored problem, and against a fine grid."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import cellfate.inference.mode as mode_module
from cellfate.datasets import simulate
from cellfate.engines.base import Sites
from cellfate.engines.structured import StructuredEngine
from cellfate.get import components
from cellfate.inference.free_energy import evaluate
from cellfate.inference.hyperposterior import Hyperposterior, integrate, too_large
from cellfate.inference.mode import find_mode
from cellfate.inference.points import LOOSE, of_known_field
from cellfate.inference.sites import Laplace, Variational
from cellfate.kernels.base import Component
from cellfate.kernels.groups import Intercepts
from cellfate.kernels.spatial import Matern32
from cellfate.model.catalog import get_family
from cellfate.model.families import Outcome
from cellfate.model.glmm import Data, Model
from cellfate.tl import decompose
from tests.problem import dense_engine, double, small_problem, stored_json, stored_problem

PRIORS = {"sd_lineage": ("half_normal", 2.0), "sd_spatial": ("half_normal", 2.0), "beta": ("normal", 5.0)}
STORED = {"sd_lineage": "lin", "sd_spatial": "spa"}


# --- the stored problem ---


@pytest.fixture(scope="module", params=["bernoulli", "poisson"])
def runs(request, reference_dir) -> tuple[dict, pd.DataFrame, list[Hyperposterior]]:
    """A long NUTS run, its effects, and what we make of the same model from two seeds."""
    family = request.param
    model, engine = stored_problem(reference_dir, f"{family}_both", priors=PRIORS)
    mode = find_mode(model, engine, Variational())
    found = [integrate(model, engine, Variational(), mode, np.random.default_rng(seed)) for seed in range(2)]
    effects = pd.read_csv(reference_dir / "mcmc_effects_n300.csv", index_col="id")
    effects = effects.filter(regex=f"^{family}_").rename(columns=lambda name: name.removeprefix(f"{family}_"))
    return stored_json(reference_dir, f"mcmc_{family}_n300.json"), effects, found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", STORED)
def test_standard_deviations_of_components(runs, name, seed):
    stored, _, found = runs
    x, expected = found[seed].values[name], stored[f"sd_{STORED[name]}"]
    assert x.mean() == pytest.approx(expected["mean"], rel=0.05)
    assert x.std(ddof=1) == pytest.approx(expected["std"], rel=0.05)
    quantiles = stored[f"v_{STORED[name]}"][
        "q"
    ]  # of the variance: a quantile of a square is the square of the quantile
    for percent in ("2.5", "50", "97.5"):
        assert np.quantile(x, float(percent) / 100) == pytest.approx(math.sqrt(quantiles[percent]), rel=0.08)


@pytest.mark.parametrize("seed", range(2))
def test_share_of_lineage(runs, seed):
    stored, _, found = runs
    lineage, spatial = (found[seed].values[name] ** 2 for name in STORED)
    share, expected = lineage / (lineage + spatial), stored["lineage_share"]
    assert share.mean() == pytest.approx(expected["mean"], abs=0.02)
    assert share.std(ddof=1) == pytest.approx(expected["sd"], rel=0.08)
    np.testing.assert_allclose(np.quantile(share, [0.025, 0.5, 0.975]), expected["q"], atol=0.03)


@pytest.mark.parametrize("seed", range(2))
def test_fixed_effects(runs, seed):
    stored, _, found = runs
    beta, expected = found[seed].beta, stored["beta"]
    sd = np.array(expected["std"])
    assert (np.abs(beta.mean(0) - expected["mean"]) < 0.1 * sd).all()
    np.testing.assert_allclose(beta.std(0, ddof=1), sd, rtol=0.07)


@pytest.mark.parametrize("seed", range(2))
def test_effects_of_cells(runs, seed):
    _, effects, found = runs
    for name, stored in {"lineage": "flin", "spatial": "fspa"}.items():
        mean, sd = found[seed].effects[name]
        assert np.corrcoef(mean, effects[f"{stored}_mean"])[0, 1] > 0.995
        assert np.abs(mean - effects[f"{stored}_mean"]).max() < 0.25 * effects[f"{stored}_sd"].mean()
        ratio = sd / effects[f"{stored}_sd"]
        assert ratio.mean() == pytest.approx(1, abs=0.05)
        assert np.abs(ratio - 1).mean() < 0.1


def test_diagnostics_of_a_good_fit(runs):
    for found in runs[2]:
        assert found.pareto_k < 0.7
        assert found.interpolation_error < 0.25
        assert found.unsettled == 0
        assert 40 < found.evaluations < 1000


def test_seeds_agree(runs):
    """Better than they have to agree with the truth: what is left is the error of the quadrature over hyperparameters."""
    one, two = runs[2]
    assert one.log_evidence == pytest.approx(two.log_evidence, abs=0.03)
    for name in STORED:
        assert one.values[name].mean() == pytest.approx(two.values[name].mean(), rel=0.02)
        assert not np.array_equal(one.values[name], two.values[name])


def test_plain_laplace_attenuates_binary_fates(reference_dir):
    """The known defect, at about its known size: MCMC has 1.009 and 0.883."""
    model, engine = stored_problem(reference_dir, "bernoulli_both", priors=PRIORS)
    found = integrate(model, engine, Laplace(), find_mode(model, engine, Laplace()), np.random.default_rng(0))
    for name, mean in (("sd_lineage", 0.765), ("sd_spatial", 0.702)):
        assert found.values[name].mean() == pytest.approx(mean, rel=0.08)


# --- a fine grid ---

AXIS = (torch.arange(32, dtype=torch.float64) + 0.5) * 0.13  # of an sd; half-normal(1) leaves nothing beyond 4


class Grid:
    """A model with two hyperparameters, integrated by brute force."""

    def __init__(self, family: str, seed: int) -> None:
        self.model, self.engine = absent(family, seed)
        parameters = self.model.parameters
        second = torch.linspace(-1.0, 1.0, 61, dtype=torch.float64) if family == "gaussian" else AXIS  # log of an sd
        u = torch.cartesian_prod(AXIS, second)
        engine = dense_engine(self.model.components, self.model.data.n)
        parts = [
            evaluate(self.model, engine, self.model.theta(part), Variational(), tolerance=1e-4) for part in u.split(64)
        ]
        log_density = torch.cat([here.free_energy for here in parts]) + self.model.log_prior(u)
        cell = math.log(float(AXIS[1] - AXIS[0])) + math.log(float(second[1] - second[0]))
        self.log_evidence = float(torch.logsumexp(log_density, 0)) + cell
        self.weight = torch.softmax(log_density, 0).numpy()
        self.values = {p.name: p.natural(u[:, i]).numpy() for i, p in enumerate(parameters)}
        self.effects = {}
        for i, term in enumerate(parts[0].terms):
            mean = torch.cat([here.posterior.component_mean(here.terms[i]) for here in parts]).numpy()
            variance = torch.cat([here.posterior.component_variance(here.terms[i]) for here in parts]).numpy()
            average = self.weight @ mean
            self.effects[term.name] = (average, np.sqrt(self.weight @ (variance + (mean - average) ** 2)))
        coefficients = [here.posterior.coefficients(here.terms[-1]) for here in parts]
        mean, covariance = (torch.cat(x).numpy() for x in zip(*coefficients, strict=True))
        self.beta = self.weight @ mean
        second_moment = np.einsum("s,sij->ij", self.weight, covariance + mean[:, :, None] * mean[:, None, :])
        self.beta_covariance = second_moment - np.outer(self.beta, self.beta)

    def quantile(self, name: str, p: np.ndarray) -> np.ndarray:
        order = np.argsort(self.values[name], kind="stable")
        x, mass = self.values[name][order], np.cumsum(self.weight[order])
        levels, last = np.unique(x, return_index=True)
        # the mass of a cell of the grid lies around its middle
        upper = np.append(mass[last[1:] - 1], 1.0)
        edges = np.append((levels[1:] + levels[:-1]) / 2, levels[-1])
        return np.interp(p, np.append(0, upper), np.append(max(0.0, 2 * levels[0] - edges[0]), edges))


def absent(family: str, seed: int) -> tuple[Model, object]:
    """Forty cells whose fates know of a covariate alone: both components are absent, or nearly so."""
    rng = np.random.default_rng(seed)
    model, _ = small_problem("poisson", sizes=(15, 25), lineage="brownian", lengthscale=0.8, groups=(), seed=seed)
    components = model.components[:1] if family == "gaussian" else model.components
    x = model.data.design.numpy()
    fate = get_family(family)
    y = fate.simulate(x @ [0.2, 0.7], rng=rng)
    data = Data(Outcome(double(y)), model.data.design, model.data.terms, torch.zeros(40, dtype=torch.float64))
    priors = {f"sd_{c.name}": ("half_normal", 1.0) for c in components} | {"beta": ("normal", 2.0)}
    return Model(fate, components, data, priors), dense_engine(components, 40)


@pytest.fixture(scope="module", params=["bernoulli", "poisson", "gaussian"])
def gridded(request) -> tuple[Grid, Hyperposterior]:
    grid = Grid(request.param, seed=3)
    mode = find_mode(grid.model, grid.engine, Variational())
    return grid, integrate(grid.model, grid.engine, Variational(), mode, np.random.default_rng(0))


def test_quantiles_where_a_component_is_absent(gridded):
    """A posterior that piles up at zero, its lower quantiles included."""
    grid, found = gridded
    p = np.array([0.025, 0.25, 0.5, 0.75, 0.975])
    for name in grid.values:
        np.testing.assert_allclose(np.quantile(found.values[name], p), grid.quantile(name, p), atol=0.03)
    lineage = found.values["sd_lineage"]
    assert (lineage >= 0).all()
    assert np.quantile(lineage, 0.025) < 0.1  # it does pile up


def test_evidence(gridded):
    grid, found = gridded
    assert found.log_evidence == pytest.approx(grid.log_evidence, abs=0.03)


def test_hyperparameters_correlate_as_on_the_grid(gridded):
    grid, found = gridded
    one, two = list(grid.values)
    x = np.stack([grid.values[one], grid.values[two]])
    centered = x - (x @ grid.weight)[:, None]
    covariance = (centered * grid.weight) @ centered.T
    expected = covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])
    assert np.corrcoef(found.values[one], found.values[two])[0, 1] == pytest.approx(expected, abs=0.07)


def test_effects_and_fixed_effects_are_mixtures_over_the_grid(gridded):
    grid, found = gridded
    for name, (mean, sd) in grid.effects.items():
        # sites are settled to LOOSE posterior sds, by their root mean square
        np.testing.assert_allclose(found.effects[name][0], mean, atol=2 * LOOSE * sd.mean())
        assert (found.effects[name][1] / sd).mean() == pytest.approx(1, abs=0.05)
        assert np.abs(found.effects[name][1] / sd - 1).mean() < 0.08
    sd = np.sqrt(np.diag(grid.beta_covariance))
    draws = found.beta
    assert (np.abs(draws.mean(0) - grid.beta) < 4.5 * sd / math.sqrt(len(draws)) + 0.01 * sd).all()
    np.testing.assert_allclose(draws.std(0, ddof=1), sd, rtol=0.05)
    correlation = grid.beta_covariance[0, 1] / sd.prod()
    assert np.corrcoef(draws.T)[0, 1] == pytest.approx(correlation, abs=0.06)


@pytest.mark.parametrize("engine", ["dense", "structured"])
def test_realized_shares_in_single_precision(engine):
    """The wide prior of fixed effects takes no digits from what is theirs."""
    adata = simulate(200, coefficients={"x": 0.5}, rng=0)
    shares = []
    for dtype in ("float64", "float32"):
        decompose(
            adata,
            "fate",
            family="bernoulli",
            formula="~ 1 + x",
            engine=engine,
            dtype=dtype,
            priors={"beta": ("normal", 20.0)},
            rng=0,
        )
        shares.append(components(adata, scale="realized").set_index("component")["variance"])
    np.testing.assert_allclose(shares[1], shares[0], rtol=0.05, atol=0.03)
    assert shares[0]["fixed"] < 1.0


@pytest.mark.parametrize("name", ["dense", "structured"])
def test_parts_of_a_known_field(name):
    """K_k K^-1 u by dense algebra; however u came to be divided in a draw, and all of it together."""
    model, dense = small_problem("bernoulli", lengthscale=0.8, seed=2)
    n, rng, terms = model.data.n, np.random.default_rng(0), model.terms(model.theta(model.start()[None]))
    nothing = Sites(torch.zeros(1, n).double(), torch.zeros(1, n).double())
    k = {t.name: dense.condition([t], nothing).prior_times(torch.eye(n).double()[None])[0] for t in terms}
    whole = torch.linalg.cholesky(sum(k.values())) @ double(rng.standard_normal((1, n, 3)))
    fields = {t.name: whole * (t.name == "lineage") for t in terms}
    fast = StructuredEngine(model.components, n, device="cpu", dtype=torch.float64, rank=n, ranges={})
    parts = of_known_field(dense if name == "dense" else fast, terms, fields)
    for t in terms:
        expected = k[t.name] @ torch.linalg.solve(sum(k.values()), whole)
        torch.testing.assert_close(parts[t.name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", [0.05, 2.0])
@pytest.mark.parametrize(("same", "shares"), [(True, (0.25, 0.25, 0.5)), (False, (0.5, 0.5, 0.0))])
def test_what_cannot_be_told_apart_is_shared(same, shares, noise):
    """Two components of one kernel: each is expected to hold half of the field, so of its variance a quarter is either's own and half is
    shared, whatever the field, and however much is known of it. Of two kernels that have nothing in common, nothing is.
    """
    rng, k = np.random.default_rng(0), 12
    codes, other = np.divmod(np.arange(k * k), k)  # each level of one has each level of the other once
    other, n = codes if same else other, k * k
    fields = [rng.standard_normal(k)[c] for c in (codes, other)]
    fields = [(f - f.mean()) / f.std() for f in fields]
    y = (np.sqrt(2) * fields[0] if same else fields[0] + fields[1]) + noise * rng.standard_normal(n)
    components = [Component("one", Intercepts(codes)), Component("two", Intercepts(other))]
    data = Data(Outcome(torch.as_tensor(y)), torch.ones(n, 1, dtype=torch.float64), ("Intercept",), double(np.zeros(n)))
    priors = {"sd_one": ("fixed", 1.0), "sd_two": ("fixed", 1.0), "sd_residual": ("lognormal", noise, 0.1)}
    model = Model(get_family("gaussian", None), components, data, priors)
    engine = dense_engine(components, n)
    mode = find_mode(model, engine, Variational())
    found = integrate(model, engine, Variational(), mode, np.random.default_rng(0)).realized
    total = found["one"] + found["two"] + found["shared"]
    means = [(found[name] / total).mean() for name in ("one", "two", "shared")]
    assert means == pytest.approx(shares, abs=0.03)


def test_what_is_a_components_own_is_exact_where_hyperparameters_are_known():
    """The expected sample variance of A u, u the field of a posterior by dense algebra and A = K_k K^-1; kernels that overlap in part."""
    rng, n = np.random.default_rng(1), 60
    codes = np.arange(n) // 6, np.repeat(np.arange(n // 4), 4)
    variances, noise = (1.5, 0.7), 0.8
    kernels = [np.equal.outer(c, c).astype(float) for c in codes]
    y = np.linalg.cholesky(
        sum(v * k for v, k in zip(variances, kernels, strict=True)) + noise * np.eye(n)
    ) @ rng.standard_normal(n)
    components = [Component(name, Intercepts(c)) for name, c in zip(("one", "two"), codes, strict=True)]
    data = Data(Outcome(torch.as_tensor(y)), torch.ones(n, 1, dtype=torch.float64), ("Intercept",), double(np.zeros(n)))
    sds = dict(zip(("sd_one", "sd_two", "sd_residual"), np.sqrt([*variances, noise]), strict=True))
    priors = {name: ("fixed", sd) for name, sd in sds.items()} | {"beta": ("normal", 1.0)}
    model, engine = Model(get_family("gaussian", None), components, data, priors), dense_engine(components, n)
    mode = find_mode(model, engine, Variational())
    # there is one point, and a run has few draws of fields at it
    runs = [integrate(model, engine, Variational(), mode, np.random.default_rng(seed)).realized for seed in range(40)]

    terms = {t.name: t.variance.item() for t in model.terms(model.from_natural({})[0])}
    scaled = {"one": terms["one"] * kernels[0], "two": terms["two"] * kernels[1]}
    fixed = terms["fixed"] * np.ones((n, n))
    k = sum(scaled.values()) + fixed
    solve = np.linalg.inv(k + noise * np.eye(n))
    mean, covariance, center = k @ solve @ y, k - k @ solve @ k, np.eye(n) - 1 / n
    expected = {name: part @ np.linalg.pinv(k, rcond=1e-12) for name, part in scaled.items()}
    expected = {
        name: (a @ mean).var(ddof=1) + np.trace(center @ a @ covariance @ a.T) / (n - 1) for name, a in expected.items()
    }
    whole = mean.var(ddof=1) + np.trace(center @ covariance) / (n - 1)
    assert min(expected.values()) < 0.9 * min(variances)  # something is shared
    expected["shared"] = whole - sum(expected.values())
    for name, value in expected.items():
        means = [run[name].mean() for run in runs]
        error = np.std(means, ddof=1) / np.sqrt(len(means))
        assert np.mean(means) == pytest.approx(value, abs=4 * error)
        assert error < 0.03 * whole


# --- the ends of the range ---


def test_the_same_seed_gives_the_same_draws():
    model, engine = absent("bernoulli", 3)
    mode = find_mode(model, engine, Variational())
    one, two = (integrate(model, engine, Variational(), mode, np.random.default_rng(5)) for _ in range(2))
    for name in one.values:
        np.testing.assert_array_equal(one.values[name], two.values[name])
    np.testing.assert_array_equal(one.beta, two.beta)
    assert one.log_evidence == two.log_evidence


def test_nothing_to_integrate():
    """Every hyperparameter held: the fixed effects' posterior and the free energy are what is left."""
    model, _ = absent("poisson", 3)
    priors = {"sd_lineage": ("fixed", 0.5), "sd_spatial": ("fixed", 0.3), "beta": ("normal", 2.0)}
    model = Model(model.family, model.components, model.data, priors)
    engine = dense_engine(model.components, model.data.n)
    mode = find_mode(model, engine, Variational())
    found = integrate(model, engine, Variational(), mode, np.random.default_rng(0))
    theta, _ = model.from_natural({})
    here = evaluate(model, engine, theta, Variational())
    assert found.log_evidence == pytest.approx(float(here.free_energy), abs=1e-4)
    assert set(found.values["sd_lineage"]) == {0.5}
    mean, covariance = here.posterior.coefficients(here.terms[-1])
    sd = covariance[0].diagonal().sqrt().numpy()
    assert (np.abs(found.beta.mean(0) - mean[0].numpy()) < 4.5 * sd / math.sqrt(len(found.beta))).all()
    np.testing.assert_allclose(found.beta.std(0, ddof=1), sd, rtol=0.06)
    for term in here.terms:
        np.testing.assert_allclose(found.effects[term.name][0], here.posterior.component_mean(term)[0], atol=1e-4)


def test_fixed_effects_as_parameters():
    """With reml=False they are entries of the vector, and their draws are draws of it."""
    base, _ = absent("poisson", 3)
    components = [Component("spatial", Matern32(base.components[1].kernel.coordinates, lengthscale=0.8))]
    priors = {"sd_spatial": ("half_normal", 1.0), "beta": ("normal", 2.0)}
    draws = {}
    for reml in (True, False):
        model = Model(base.family, components, base.data, priors, reml)
        engine = dense_engine(components, 40)
        mode = find_mode(model, engine, Variational())
        draws[reml] = integrate(model, engine, Variational(), mode, np.random.default_rng(0))
    # both integrate over the same prior, one within each point and one over the points
    sd = draws[True].beta.std(0)
    assert (np.abs(draws[False].beta.mean(0) - draws[True].beta.mean(0)) < 0.15 * sd).all()
    np.testing.assert_allclose(draws[False].beta.std(0), sd, rtol=0.1)
    assert draws[False].values["sd_spatial"].mean() == pytest.approx(draws[True].values["sd_spatial"].mean(), rel=0.06)
    assert draws[False].log_evidence == pytest.approx(draws[True].log_evidence, abs=0.1)


# --- many cells, where points are dear ---


@pytest.mark.parametrize("family", ["gaussian", "poisson"])
def test_few_points_say_what_many_do(family, monkeypatch):
    """The search and the integral as they are with many cells, on a problem on which both ways can be taken.

    Few points know a posterior mean to a fifth of its sd, and its sd to a fifth.
    """
    model, engine = small_problem(family, sizes=(60, 60, 60), lineage="brownian", lengthscale=0.8, groups=(), seed=5)
    exact_mode = find_mode(model, engine, Variational())
    exact = integrate(model, engine, Variational(), exact_mode, np.random.default_rng(0))
    for module in ("mode", "hyperposterior"):
        monkeypatch.setattr(f"cellfate.inference.{module}.LARGE", 100)
    mode = find_mode(model, engine, Variational())
    few = integrate(model, engine, Variational(), mode, np.random.default_rng(0))
    sd = torch.linalg.inv(exact_mode.curvature).diagonal().sqrt()
    assert float(((mode.u - exact_mode.u) / sd).abs().max()) < 0.8  # AGAIN: less than 0.3 nats below the top
    assert mode.log_posterior > exact_mode.log_posterior - 0.4
    scaled = (mode.curvature - exact_mode.curvature) * sd * sd[:, None]
    assert float(scaled.abs().max()) < 0.5
    for name, x in few.values.items():
        reference = exact.values[name]
        assert abs(x.mean() - reference.mean()) < 0.2 * reference.std()
        assert x.std() == pytest.approx(reference.std(), rel=0.2)
    assert few.log_evidence == pytest.approx(exact.log_evidence, abs=0.15)
    assert few.evaluations < exact.evaluations


def test_a_guessed_curvature_does_not_end_the_search(monkeypatch):
    """A first guess that is far too steep promises nothing; the true curvature says that there is more to gain."""
    model, engine = small_problem("gaussian", sizes=(60, 60), lineage="brownian", lengthscale=0.8, groups=(), seed=5)
    exact = find_mode(model, engine, Variational())
    guess = mode_module._average_information
    monkeypatch.setattr(mode_module, "_average_information", lambda *a: 30 * guess(*a))
    monkeypatch.setattr(mode_module, "LARGE", 100)
    found = find_mode(model, engine, Variational())
    assert found.log_posterior > exact.log_posterior - 0.4


@pytest.mark.parametrize(
    ("k", "text"), [(0.7004, "0.7004"), (0.731, "0.73"), (np.inf, "inf"), (0.70000001, "0.70000001")]
)
def test_a_k_hat_that_is_too_large_is_seen_to_be(k, text):
    assert too_large(k) == f"{text}, above 0.7"
