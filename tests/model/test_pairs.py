"""Fates by all pairs: against the variational bound with a block of sites for each cell, written out with dense matrices."""

import itertools

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

import cellfate as cf
from cellfate.inference import fates
from cellfate.inference.fates import Form
from cellfate.inference.free_energy import evaluate, evaluate_with_gradient
from cellfate.inference.sites import Variational
from cellfate.kernels import Brownian, Graph, Matern32
from cellfate.kernels.base import unit_scale
from cellfate.kernels.fates import Loaded
from cellfate.kernels.groups import CorrelatedSlopes, Intercepts, Slopes
from cellfate.model.categorical import contrasts
from cellfate.model.families import Outcome
from cellfate.model.pairs import Pairs, differences, loadings, pairs, variances_of_fates
from cellfate.trees.convert import to_forest
from tests.model.test_categorical import kernels
from tests.problem import double, entries

BETA = 5.0  # prior sd of the intercepts


def nearest(xyz: np.ndarray) -> csr_matrix:
    """Symmetric graph of the four nearest neighbors."""
    away = np.linalg.norm(xyz[:, None] - xyz, axis=-1)
    near = np.argsort(away, 1)[:, 1:5]
    graph = np.zeros_like(away)
    np.put_along_axis(graph, near, 1.0, 1)
    return csr_matrix(np.maximum(graph, graph.T))


class Blocks:
    """The corrected bound at a prior covariance (J n, J n) of all contrasts; arrays over cells are (n, J), contrasts last."""

    def __init__(self, weights: np.ndarray, nodes: int) -> None:
        self.h = double(contrasts(weights.shape[1]))
        self.y, self.t = double(weights) @ self.h, double(weights.sum(1))
        x, w = np.polynomial.hermite_e.hermegauss(nodes)
        axes = weights.shape[1] - 1
        self.z = double(list(itertools.product(x, repeat=axes)))
        self.w = double([np.prod(p) for p in itertools.product(w / w.sum(), repeat=axes)])

    def moments(self, mean, covariance):
        """E f (n,), its gradient, minus its Hessian, and the correction, under the normal distribution of each cell."""
        away = torch.einsum("qj,nij->nqi", self.z, torch.linalg.cholesky(covariance))
        logits = (mean[:, None] + away) @ self.h.T
        p, lse = torch.softmax(logits, -1), torch.logsumexp(logits, -1)
        f = ((mean[:, None] + away) * self.y[:, None]).sum(-1) - self.t[:, None] * lse
        expected = p @ self.h
        slope = self.y - self.t[:, None] * torch.einsum("nqj,q->nj", expected, self.w)
        curved = torch.einsum("nqk,q,ki,kj->nij", p, self.w, self.h, self.h)
        curved = (curved - torch.einsum("nqi,q,nqj->nij", expected, self.w, expected)) * self.t[:, None, None]
        bend = torch.einsum("nqi,nij,nqj->nq", away, curved, away) - (curved * covariance).sum((1, 2))[:, None]
        rest = f - (f @ self.w)[:, None] - torch.einsum("nqj,nj->nq", away, slope) + bend / 2
        return f @ self.w, slope, curved, torch.logsumexp(torch.log(self.w) + rest, -1)

    def settle(self, prior):
        """Free energy, mean (n, J) and covariance (n, J, J) of each cell."""
        n, axes = self.y.shape
        precision, shift = 0.2 * torch.eye(axes).expand(n, -1, -1).to(prior), self.y.clone()
        for _ in range(300):
            lower = torch.linalg.cholesky(precision)
            root = torch.cat([torch.cat([torch.diag(lower[:, i, j]) for j in range(axes)], 1) for i in range(axes)])
            b = torch.eye(n * axes) + root.T @ prior @ root
            whole = prior - prior @ root @ torch.linalg.solve(b, root.T @ prior)
            mean = (whole @ shift.T.reshape(-1, 1)).reshape(axes, n).T
            own = whole.reshape(axes, n, axes, n).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
            value, slope, curved, rest = self.moments(mean, own)
            weights = shift - (precision @ mean[..., None])[..., 0]
            kl = (torch.logdet(b) - (precision * own).sum() + (mean * weights).sum()) / 2
            target = curved, (curved @ mean[..., None])[..., 0] + slope
            if max(float((a - b).abs().max()) for a, b in zip(target, (precision, shift), strict=True)) < 1e-7:
                return float(value.sum() + rest.sum() - kl), mean, own
            precision, shift = (0.3 * a + 0.7 * b for a, b in zip((precision, shift), target, strict=True))
        raise AssertionError("the twin did not settle")


def problem(levels, n=40, seed=0):
    rng = np.random.default_rng([seed, levels])
    weights = rng.multinomial(1, np.ones(levels) / levels, n) + 0.0
    weights[: n // 4] = rng.multinomial(3, np.ones(levels) / levels, n // 4)  # some are counts
    return weights, np.column_stack([np.ones(n), rng.normal(size=n)]), kernels(n, seed=seed)


def matrices(found):
    return [unit_scale(entries(k, **{h.name: h.fixed for h in k.hyperparameters})) for k in found.values()]


def whole_prior(levels, found, X, lineage, spatial):
    """Covariance of all contrasts for variances of each fate (K,)."""
    h, (a, b) = double(contrasts(levels)), matrices(found)
    across = [levels * h.T @ torch.diag(double(v)) @ h for v in (lineage, spatial)]
    fixed = torch.kron(torch.eye(levels - 1), BETA**2 * double(X) @ double(X).T)
    return torch.kron(across[0], a) + torch.kron(across[1], b) + fixed


@pytest.mark.parametrize("per_fate", [False, True])
@pytest.mark.parametrize(("levels", "nodes", "apart"), [(3, 24, 1e-4), (4, 14, 3e-3)])
def test_free_energy_and_posterior_are_those_of_blocks_of_sites(levels, nodes, apart, per_fate):
    weights, X, found = problem(levels)
    glmm = cf.GLMM("categorical", found, per_fate=per_fate, priors={"beta": ("normal", BETA)})
    lineage, spatial = np.linspace(0.1, 1.5, levels), np.linspace(1.0, 0.0, levels)
    if per_fate:
        theta = {f"variance_lineage[{k}]": v for k, v in enumerate(lineage)}
        theta |= {f"variance_spatial[{k}]": v for k, v in enumerate(spatial)}
    else:
        lineage, spatial = np.full(levels, 1.5 / levels), np.full(levels, 0.7 / levels)
        theta = {"variance_lineage": 1.5, "variance_spatial": 0.7}
    here = glmm.evaluate(theta, weights, X)
    assert here.status == "converged"
    free_energy, mean, own = Blocks(weights, nodes).settle(whole_prior(levels, found, X, lineage, spatial))
    h = contrasts(levels)
    assert here.free_energy == pytest.approx(free_energy, abs=apart)
    np.testing.assert_allclose(here.mean, mean.numpy() @ h.T, atol=30 * apart)
    np.testing.assert_allclose(here.variance, np.einsum("ki,nij,kj->nk", h, own.numpy(), h), rtol=30 * apart)


def test_sites_of_contrasts_are_far_off_where_fates_have_variances_of_their_own(monkeypatch):
    """Why per_fate has no others: the bound is nats away, and how many depends on the variances."""
    weights, X, found = problem(3, n=60)
    own, shared = np.array([0.2, 4.0, 0.2]), np.full(3, 1.0)
    blocks, gaps = Blocks(weights, 24), []
    for lineage in (own, shared):
        form = Form(3)
        components = form.components(cf.GLMM("categorical", found).components, ["0", "1", "2"])
        theta = {f"variance_lineage[{k}]": v for k, v in enumerate(lineage)} | {
            f"variance_spatial[{k}]": 0.3 for k in range(3)
        }
        glmm = cf.GLMM("categorical", found, per_fate=True, priors={"beta": ("normal", BETA)})
        monkeypatch.setattr(glmm, "_form", lambda *_, found=(form, components, *glmm._chosen(components, 120)): found)
        value = glmm.evaluate(theta, weights, X).free_energy
        gaps.append(blocks.settle(whole_prior(3, found, X, lineage, np.full(3, 0.3)))[0] - value)
    assert abs(gaps[0]) > 1.5
    assert abs(gaps[1]) < 0.3


@pytest.mark.parametrize("per_fate", [False, True])
@pytest.mark.parametrize("levels", [3, 4])
def test_gradient_of_the_free_energy(levels, per_fate):
    weights, X, _ = problem(levels, n=30)
    glmm = cf.GLMM("categorical", kernels(30, lengthscale=None), per_fate=per_fate)
    glmm.on(weights, X)
    model, engine, _ = glmm.problem
    assert isinstance(model.family, Pairs)
    d = len(model.parameters)
    u = double(np.random.default_rng(1).uniform(0.3, 1.2, (1, d)))
    here = evaluate_with_gradient(model, engine, u, Variational(), tolerance=1e-9)
    for i in range(d):
        step = 1e-4 * torch.eye(d, dtype=torch.float64)[i]
        up, down = (evaluate(model, engine, model.theta(u + s * step), Variational(), tolerance=1e-10) for s in (1, -1))
        slope = float((up.free_energy - down.free_energy) / 2e-4)
        # quadrature in two and three dimensions is as good as that: its values and its derivatives agree to so much
        assert float(here.gradient[0, i]) == pytest.approx(slope, abs={3: 2e-4, 4: 5e-3}[levels])


def test_the_order_of_the_fates_does_not_matter():
    rng, n = np.random.default_rng(6), 40
    y, theta = rng.integers(0, 3, n), {"variance_lineage": 1.0, "variance_spatial": 1.0}
    found = [
        cf.GLMM("categorical", kernels()).evaluate(theta, np.array(order)[y], np.ones((n, 1)))
        for order in itertools.permutations(range(3))
    ]
    assert np.ptp([here.free_energy for here in found]) < 1e-4
    for order, here in zip(itertools.permutations(range(3)), found, strict=True):
        np.testing.assert_allclose(here.mean[:, order], found[0].mean, atol=1e-3)


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_differences_say_all_about_fates(levels):
    rng = np.random.default_rng(levels)
    first, second = pairs(levels)
    load = loadings(levels)
    np.testing.assert_allclose(load.T @ load, levels / 2 * np.eye(levels - 1), atol=1e-12)
    np.testing.assert_allclose(load[0], np.eye(levels - 1)[0], atol=1e-12)  # the first is the first contrast
    p = rng.dirichlet(np.ones(levels))
    d = differences(levels)
    np.testing.assert_allclose(np.diag(p) - np.outer(p, p), (2 * p[first] * p[second] * d.T) @ d, atol=1e-12)
    centre, a = np.eye(levels) - 1 / levels, rng.normal(size=(levels, levels))
    covariance = centre @ a @ a.T @ centre
    of_pairs = np.einsum("rk,kl,rl->r", d, covariance, d)
    np.testing.assert_allclose(of_pairs @ variances_of_fates(levels), covariance.diagonal(), atol=1e-12)
    eta = centre @ rng.normal(size=(levels, 7))
    np.testing.assert_allclose(Form(levels, True).by_fate((d @ eta).ravel()), eta.T, atol=1e-12)


def test_copies_have_the_covariance_of_pairs():
    """Of every kind of component: L C L' with the covariance C of contrasts."""
    n, levels = 20, 4
    x, groups = np.random.default_rng(0).normal(size=n), np.arange(n) % 4
    load = torch.kron(double(loadings(levels)), torch.eye(n, dtype=torch.float64))
    for name, kernel in {
        **kernels(n),
        "group": Intercepts(groups),
        "slope": Slopes(groups, x),
        "own": Intercepts(np.arange(n)),
    }.items():
        hyper = {h.name: h.fixed for h in kernel.hyperparameters}
        single, paired = kernel.copied(levels - 1), Loaded(kernel, loadings(levels), name)
        assert paired.expected_variance == pytest.approx(single.expected_variance)
        torch.testing.assert_close(entries(paired, **hyper), load @ entries(single, **hyper) @ load.T)


def test_what_has_no_pairs_is_by_contrasts(monkeypatch):
    n = 40
    y, X, groups = np.arange(n) % 3, np.ones((n, 1)), np.arange(n) % 5

    def form(found, y=y, **options):
        glmm = cf.GLMM("categorical", found, **options)
        glmm.on(y, X)
        return Form.of(glmm.problem[0]), glmm.problem[2]

    assert form(kernels())[0].paired
    assert form(kernels())[1].endswith("40 cells by 3 pairs of fates")
    assert not form(kernels(), engine="structured")[0].paired
    assert not form(kernels(), rank=20)[0].paired
    assert not form(kernels(), y=np.arange(n) % 2)[0].paired
    assert not form({"clone": CorrelatedSlopes(groups, np.random.default_rng(0).normal(size=n))})[0].paired
    graph = {"spatial": Graph(nearest(kernels(n)["spatial"].coordinates))}  # has no contrasts
    for name, least in (("WHOLE", 3 * n), ("ENTRIES", 9 * n * n)):
        monkeypatch.undo()
        monkeypatch.setattr(fates, name, least)
        assert form(kernels())[0].paired
        monkeypatch.setattr(fates, name, least - 1)
        assert not form(kernels())[0].paired
        assert form(kernels(), per_fate=True)[0].paired
        assert form(graph)[0].paired
    monkeypatch.undo()
    monkeypatch.setattr("cellfate.inference.fit.free_memory", lambda device: 1e5)
    assert not form(kernels())[0].paired
    with pytest.raises(NotImplementedError, match="by pairs"):
        form(graph, engine="structured")


def test_variances_that_no_covariance_has():
    """An extrapolation may break the triangle inequality; what is not a number stays none."""
    family, y = Pairs(), np.eye(3)
    seen, total = Pairs.outcome(y)
    outcome = Outcome(double(seen), double(total), 3)
    variance = double([[4.0, 0.1, 0.1], [1.0, 1.0, 1.0], [np.nan, 1.0, 1.0]]).T.reshape(1, -1)
    found = family.expect(outcome, torch.zeros(1, 9, dtype=torch.float64), variance)
    value = found.value.reshape(3, 3)
    assert value[:, :2].isfinite().all()
    assert (found.precision.reshape(3, 3)[:, :2] > 0).all()
    assert value[:, 2].isnan().all()


@pytest.mark.parametrize("engine", ["dense", "structured"])
def test_contrasts_come_near_where_what_couples_cells_is_put_back(engine, monkeypatch):
    monkeypatch.setattr(fates, "WHOLE", 0)
    n = 150
    variances = {"variance_lineage": 3.0, "variance_spatial": 3.0}
    adata = cf.datasets.simulate(n, family="categorical", n_fates=3, **variances, rng=1)
    forest = to_forest(adata.uns["tree"])
    found = {
        "lineage": Brownian(forest, forest.nodes_of(adata.obs_names)),
        "spatial": Matern32(adata.obsm["spatial"], None, 0.6),
    }
    weights, X = np.eye(3)[adata.obs["fate"]], np.ones((n, 1))
    glmm = cf.GLMM("categorical", found, engine=engine, rank=n, priors={"beta": ("normal", BETA)})
    for lineage, spatial in ((1.5, 1.0), (3.0, 3.0)):
        here = glmm.evaluate({"variance_lineage": lineage, "variance_spatial": spatial}, weights, X).free_energy
        model, its, _ = glmm.problem
        theta, _ = model.from_natural({"variance_lineage": lineage, "variance_spatial": spatial})
        bound = float(evaluate(model, its, theta, Variational()).free_energy)
        prior = whole_prior(3, found, X, np.full(3, lineage / 3), np.full(3, spatial / 3))
        known = Blocks(weights, 24).settle(prior)[0]
        assert known - bound > 0.15
        assert abs(known - here) < 0.35 * (known - bound)


def test_an_engine_serves_no_other_number_of_fates(monkeypatch):
    """Three fates by pairs and four by contrasts are as many copies of the cells."""
    n = 30
    monkeypatch.setattr(fates, "WHOLE", 3 * n)
    theta, rng = {"variance_lineage": 1.0, "variance_spatial": 1.0}, np.random.default_rng(0)
    three, four = rng.integers(0, 3, n), rng.integers(0, 4, n)
    one = cf.GLMM("categorical", kernels(n))
    one.evaluate(theta, three, np.ones((n, 1)))
    again = one.evaluate(theta, four, np.ones((n, 1))).free_energy
    fresh = cf.GLMM("categorical", kernels(n)).evaluate(theta, four, np.ones((n, 1))).free_energy
    assert again == pytest.approx(fresh, abs=1e-9)


@pytest.mark.parametrize("per_fate", [False, True])
def test_single_precision(per_fate):
    """Fields of pairs have a covariance without full rank, from which draws are made too."""
    adata = cf.datasets.simulate(60, family="categorical", variance_lineage=2.0, rng=4)
    forest = to_forest(adata.uns["tree"])
    found = {"lineage": Brownian(forest, forest.nodes_of(adata.obs_names))}
    fits = [
        cf.GLMM("categorical", found, per_fate=per_fate, dtype=dtype).fit(
            adata.obs["fate"].to_numpy(), np.ones((60, 1)), rng=0
        )
        for dtype in ("float64", "float32")
    ]
    for name in fits[0].effects:
        for a, b in zip(fits[0].effects[name], fits[1].effects[name], strict=True):
            np.testing.assert_allclose(b, a, atol=0.15 * np.abs(a).max())
    assert fits[1].free_energy == pytest.approx(fits[0].free_energy, abs=0.02)


def test_probabilities_of_fates():
    """Soft labels, against blocks of sites."""
    weights, X, found = problem(3, n=30)
    hard = np.eye(3)[weights.argmax(1)]
    soft = 0.8 * hard + 0.2 / 3
    glmm = cf.GLMM("categorical", found, priors={"beta": ("normal", BETA)})
    here = glmm.evaluate({"variance_lineage": 1.0, "variance_spatial": 0.5}, soft, X)
    known = Blocks(soft, 24).settle(whole_prior(3, found, X, np.full(3, 1 / 3), np.full(3, 0.5 / 3)))
    assert here.free_energy == pytest.approx(known[0], abs=1e-4)


def test_one_free_energy_wherever_it_is_told(monkeypatch):
    monkeypatch.setattr(fates, "WHOLE", 0)
    adata = cf.datasets.simulate(60, family="categorical", variance_lineage=3.0, rng=4)
    forest = to_forest(adata.uns["tree"])
    glmm = cf.GLMM("categorical", {"lineage": Brownian(forest, forest.nodes_of(adata.obs_names))})
    fit = glmm.fit(adata.obs["fate"].to_numpy(), np.ones((60, 1)), rng=0)
    model, engine, _ = glmm.problem
    assert glmm.evaluate(fit.mode).free_energy == pytest.approx(fit.free_energy, abs=1e-3)
    theta, _ = model.from_natural(fit.mode)
    assert fit.free_energy > float(evaluate(model, engine, theta, Variational()).free_energy) + 0.005
