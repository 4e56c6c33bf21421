"""Categorical fates: against yes or no, brute force, exact evidence, and whatever order the fates come in."""

import itertools

import numpy as np
import pytest
import torch

import cellfate as cf
from cellfate.engines.dense import DenseEngine
from cellfate.errors import DataError
from cellfate.inference import fates
from cellfate.inference.free_energy import evaluate, evaluate_with_gradient, likelihood_at
from cellfate.inference.sites import Variational
from cellfate.kernels import Brownian, CorrelatedSlopes, Intercepts, Matern32, Slopes
from cellfate.kernels.base import Component, unit_scale
from cellfate.model.catalog import get_family
from cellfate.model.categorical import PROBES, Categorical, Nodes, apart, contrasts, stacked
from cellfate.model.families import Outcome
from cellfate.trees.convert import to_forest
from tests.problem import double, entries, random_newick

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.CellfateWarning")


def kernels(n=40, seed=0, lengthscale=0.4):
    rng = np.random.default_rng(seed)
    names = [f"c{i}" for i in range(n)]
    forest = to_forest(random_newick(names, rng))
    return {
        "lineage": Brownian(forest, forest.nodes_of(names)),
        "spatial": Matern32(rng.random((n, 2)), None, lengthscale),
    }


def outcome(weights):
    y, trials = Categorical.outcome(np.asarray(weights, dtype=float))
    return Outcome(double(y), double(trials), len(weights[0]))


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_contrasts_are_orthonormal_and_sum_to_zero(levels):
    h = contrasts(levels)
    np.testing.assert_allclose(h.T @ h, np.eye(levels - 1), atol=1e-14)
    np.testing.assert_allclose(h.sum(0), 0, atol=1e-14)


@pytest.mark.parametrize("engine", ["dense", "structured"])
def test_two_fates_are_a_yes_or_no(engine):
    """eta_1 - eta_0 is sqrt(2) times the contrast, so that variances are half of those of the difference."""
    rng, n = np.random.default_rng(1), 40
    y, X = (rng.random(n) < 0.4).astype(float), np.column_stack([np.ones(n), rng.normal(size=n)])
    one = cf.GLMM("categorical", kernels(), engine=engine, rank=30, priors={"beta": ("normal", 5.0)})
    other = cf.GLMM("bernoulli", kernels(), engine=engine, rank=30, priors={"beta": ("normal", 5.0 * 2**0.5)})
    a = one.evaluate({"variance_lineage": [0.2, 1.5], "variance_spatial": [1.0, 0.3]}, y, X)
    b = other.evaluate({"variance_lineage": [0.4, 3.0], "variance_spatial": [2.0, 0.6]}, y, X)
    np.testing.assert_allclose(a.free_energy, b.free_energy, atol=1e-8)
    np.testing.assert_allclose(a.mean[..., 1] - a.mean[..., 0], b.mean, atol=1e-6)


def test_derivatives_by_autograd():
    family, data = get_family("categorical"), outcome([[1, 0, 0, 0], [0, 0.2, 0.5, 0.3], [3, 0, 4, 1]])
    eta = double(np.random.default_rng(0).normal(size=9) * 3).requires_grad_(True)
    value = family.log_prob(data, eta).sum()
    (slope,) = torch.autograd.grad(value, eta, create_graph=True)
    d1, d2 = family.derivatives(data, eta)
    torch.testing.assert_close(slope, d1)
    bend = torch.stack([torch.autograd.grad(slope[i], eta, retain_graph=True)[0][i] for i in range(9)])
    torch.testing.assert_close(bend, d2)


@pytest.mark.parametrize(("levels", "tolerance"), [(3, 2e-4), (4, 2e-3), (6, 0.03)])
@pytest.mark.parametrize("sd", [0.5, 1.5])
def test_expectations_by_brute_force(levels, sd, tolerance):
    """A million random points, whose own error is below a thousandth, and what the rule has: quasi-random from five fates on."""
    rng, family = np.random.default_rng(3), get_family("categorical")
    data = outcome(np.vstack([np.eye(levels)[:2], np.full((1, levels), 1 / levels)]))
    mean, h = rng.normal(size=(3, levels - 1)), contrasts(levels)
    z = rng.standard_normal((400_000, levels - 1))
    z = np.concatenate([z, -z])
    m = stacked(double(mean))
    v = torch.full_like(m, sd**2)
    found, rest = family.expect(data, m, v), family.correction(data, m, v)
    for i in range(3):
        u = mean[i] + sd * z
        logits = u @ h.T
        lse = np.log(np.exp(logits).sum(1))
        p = np.exp(logits - lse[:, None])
        y = apart(data.y, levels - 1)[i].numpy()
        f, slope, bend = u @ y - lse, y - p @ h, -(p @ h**2 - (p @ h) ** 2)
        assert float(apart(found.value, levels - 1)[i].sum()) == pytest.approx(f.mean(), abs=tolerance + 2e-3)
        np.testing.assert_allclose(apart(found.slope, levels - 1)[i], slope.mean(0), atol=tolerance + 2e-3)
        np.testing.assert_allclose(apart(found.precision, levels - 1)[i], -bend.mean(0), atol=tolerance + 2e-3)
        r = f - f.mean() - sd * z @ slope.mean(0) - 0.5 * sd**2 * (z**2 - 1) @ bend.mean(0)
        assert float(apart(rest, levels - 1)[i].sum()) == pytest.approx(np.log(np.exp(r).mean()), abs=tolerance + 3e-3)


@pytest.mark.parametrize("levels", [3, 4])
def test_gradient_of_the_free_energy_by_contrasts(levels, monkeypatch):
    rng, n = np.random.default_rng(2), 30
    monkeypatch.setattr(fates, "WHOLE", 0)
    glmm = cf.GLMM("categorical", kernels(n, lengthscale=None), engine="dense")
    glmm.on(rng.integers(0, levels, n), np.ones((n, 1)))
    model, engine, _ = glmm.problem
    u = torch.tensor([[0.9, 1.2, -1.0]], dtype=torch.float64)
    here = evaluate_with_gradient(model, engine, u, Variational(), tolerance=1e-10)
    for i, h in itertools.product(range(3), [1e-4]):
        up, down = (
            evaluate(
                model,
                engine,
                model.theta(u + s * h * torch.eye(3, dtype=torch.float64)[i]),
                Variational(),
                tolerance=1e-11,
            )
            for s in (1, -1)
        )
        slope = float((up.free_energy - down.free_energy) / (2 * h))
        # quadrature in two and three dimensions is as good as that: its values and its derivatives agree to so much
        assert float(here.gradient[0, i]) == pytest.approx(slope, abs=2e-3)


@pytest.mark.parametrize("variance", [0.5, 2.0])
def test_free_energy_is_near_the_exact_evidence(variance):
    """Six related cells and three fates, by importance sampling from the prior: four million draws."""
    rng, n = np.random.default_rng(5), 6
    lineage = kernels(n)["lineage"]
    y = np.array([0, 0, 1, 1, 2, 2])
    found = cf.GLMM("categorical", {"lineage": lineage}).evaluate({"variance_lineage": variance}, y)
    factor = np.linalg.cholesky(variance * unit_scale(entries(lineage)).numpy() + 1e-12 * np.eye(n))
    total, h = [], contrasts(3)
    for _ in range(20):
        u = np.einsum("ij,sjk->sik", factor, rng.standard_normal((200_000, n, 2)))
        logits = u @ h.T
        total.append((logits[:, np.arange(n), y] - np.log(np.exp(logits).sum(-1))).sum(-1))
    draws = np.exp(np.concatenate(total))
    exact, error = np.log(draws.mean()), draws.std() / draws.mean() / np.sqrt(len(draws))
    assert error < 0.005
    assert found.free_energy == pytest.approx(exact, abs=0.03 + 4 * error)


def test_order_of_the_fates_matters_little_to_contrasts(monkeypatch):
    """Contrasts of another order are others, and what their products leave out is corrected cell by cell only."""
    monkeypatch.setattr(fates, "WHOLE", 0)
    rng, n = np.random.default_rng(6), 40
    y, theta = rng.integers(0, 3, n), {"variance_lineage": 1.0, "variance_spatial": 1.0}
    values = [
        cf.GLMM("categorical", kernels()).evaluate(theta, np.array(order)[y], np.ones((n, 1))).free_energy
        for order in itertools.permutations(range(3))
    ]
    assert np.ptp(values) < 0.1


def test_copies_have_the_variance_of_one():
    n = 25
    groups = np.arange(n) % 4
    x = np.random.default_rng(0).normal(size=n)
    for kernel in (*kernels(n).values(), Intercepts(groups), Slopes(groups, x), CorrelatedSlopes(groups, x)):
        both = kernel.copied(3)
        assert both.n == 3 * n
        assert both.expected_variance == pytest.approx(kernel.expected_variance)
    for name, kernel in kernels(n).items():
        engines = [
            DenseEngine([Component(name, k)], k.n, device="cpu", dtype=torch.float64)
            for k in (kernel, kernel.copied(3))
        ]
        like, hyper = double([1.0]), {h.name: double([h.fixed]) for h in kernel.hyperparameters}
        from cellfate.kernels.base import Term

        whole = []
        for k, engine in zip((kernel, kernel.copied(3)), engines, strict=True):
            term = Term(name, k.structure(hyper, like), like, True)
            blocks = engine.covariance(term)
            whole.append(sum(float(b.diagonal(dim1=-2, dim2=-1).sum()) for b in blocks))
        assert whole[1] == pytest.approx(3 * whole[0])


@pytest.mark.parametrize(
    ("y", "text"),
    [
        (np.r_[0, np.ones(39)], "fewer than 2 cells, '0: 1'"),
        (np.zeros(40), "one level"),
        (np.r_[0.5, np.arange(39) % 3], "number the fates 0, 1, 2"),
        (np.full((40, 3), 0.3), "do not sum to one"),
        (np.tile([2.0, -1.0, 0.0], (40, 1)), "is negative"),
        (np.tile([0.5, 0.5, 0.0], (40, 1)), "no cell has fate 2"),
        (np.tile([1.0, np.nan, 0.0], (40, 1)), "NaN"),
        (np.zeros((40, 3)), "zero for every fate"),
        (np.ones((40, 1)), "wanted codes"),
    ],
)
def test_wrong_fates_are_named(y, text):
    with pytest.raises(DataError, match=text):
        cf.GLMM("categorical", kernels()).evaluate({"variance_lineage": 1.0, "variance_spatial": 1.0}, y)


def test_what_is_not_there_yet_says_so():
    y = np.arange(40) % 3
    for more in ({"method": "laplace"}, {"reml": False}):
        with pytest.raises(NotImplementedError, match="one fate at a time"):
            cf.GLMM("categorical", kernels(), **more).evaluate({"variance_lineage": 1.0, "variance_spatial": 1.0}, y)
    with pytest.raises(DataError, match="no offset"):
        cf.GLMM("categorical", kernels()).fit(y, offset=np.ones(40))


@pytest.mark.parametrize("levels", [3, 5])
def test_what_couples_cells_is_the_trace(levels, monkeypatch):
    """Against the second-order term written out with the posterior covariance of every contrast."""
    monkeypatch.setattr(fates, "WHOLE", 0)
    n, axes = 40, levels - 1
    y = np.argsort(kernels(n)["spatial"].coordinates[:, 0]) * levels // n  # fates of bands of tissue
    glmm = cf.GLMM("categorical", kernels(n))
    glmm.on(y, np.ones((n, 1)))
    model, engine, _ = glmm.problem
    theta, _ = model.from_natural({"variance_lineage": [1.0, 2.5], "variance_spatial": [0.5, 1.0]})
    here = evaluate(model, engine, theta, Variational())
    _, rest = likelihood_at(model, theta).integrals(here.posterior.mean, here.posterior.variance)
    everything = here.posterior.smooth(torch.eye(axes * n, dtype=torch.float64).expand(2, -1, -1))
    for i, sigma in enumerate(everything):
        c = torch.zeros(axes, n, axes, n, dtype=torch.float64)
        for a, b in itertools.permutations(range(axes), 2):
            c[a, :, b, :] = torch.diag(rest.cross[i, :, a, b])
        product = sigma @ c.reshape(axes * n, -1)
        own = sigma.diagonal().reshape(axes, n)
        within = torch.einsum("nab,an,bn->", rest.cross[i].square(), own, own)
        exact = float(((product @ product).diagonal().sum() - within) / 4)
        assert exact > 0.01
        # a Hutchinson estimate of a symmetric part S has variance 2 (|S|^2 - |diag S|^2) / probes, and signs of contrasts are apart
        s = (product @ product + (product @ product).T) / 2
        error = float((2 * (s.square().sum() - s.diagonal().square().sum()) / PROBES).sqrt()) / 4
        found = float(Variational().between(likelihood_at(model, theta), here.posterior)[i])
        assert found == pytest.approx(exact, abs=4 * error)
        assert error < 0.5 * exact
    of_two = cf.GLMM("categorical", kernels(n))
    of_two.on(y % 2, np.ones((n, 1)))
    model, engine, _ = of_two.problem
    here = evaluate(model, engine, model.theta(model.start()[None]), Variational())
    assert float(Variational().between(likelihood_at(model, here.theta), here.posterior)) == 0.0


@pytest.mark.parametrize("levels", [3, 6])
def test_higher_derivatives_are_those_of_the_normalizer(levels):
    """Against autograd, four times, where the distribution is all but a point."""
    axes = levels - 1
    h, t = double(contrasts(levels)), 3.0
    mean = double(np.random.default_rng(levels).normal(size=(1, axes)))
    nodes = Nodes(torch.zeros_like(mean), double([t]), mean, torch.full_like(mean, 1e-13), h, 0)
    third, fourth, cross = (x[0] for x in (*nodes.higher(), nodes.cross()))

    def value(u):
        return -t * torch.logsumexp(h @ u, 0)

    two = torch.func.hessian(value)
    four = torch.func.hessian(two)(mean[0])
    three = torch.func.jacfwd(two)(mean[0])
    torch.testing.assert_close(third, torch.einsum("iij->ij", three), rtol=0, atol=1e-10)
    torch.testing.assert_close(fourth, torch.einsum("iijj->ij", four), rtol=0, atol=1e-10)
    of_two = two(mean[0])
    torch.testing.assert_close(cross, of_two - torch.diag(of_two.diagonal()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("levels", [3, 6])
def test_sites_are_where_the_bound_that_quadrature_knows_is_highest(levels):
    """Slope and precision are its derivatives in mean and variance, whatever the quadrature: with six fates it is rough."""
    family, rng = get_family("categorical"), np.random.default_rng(levels)
    data = outcome(rng.multinomial(1, np.ones(levels) / levels, 8))
    mean = double(rng.normal(size=8 * (levels - 1))).requires_grad_(True)
    variance = double(rng.uniform(0.3, 6.0, 8 * (levels - 1))).requires_grad_(True)
    found = family.expect(data, mean, variance)
    slope, half = torch.autograd.grad(found.value.sum(), (mean, variance))
    torch.testing.assert_close(found.slope, slope, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.precision, -2 * half, rtol=0, atol=1e-10)
