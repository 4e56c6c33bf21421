"""The dense engine against one big matrix in numpy: no blocks, no padding, no low rank, one point at a time."""

from dataclasses import dataclass
from functools import lru_cache

import mpmath
import numpy as np
import pytest
import torch

from cellfate.engines.base import Sites
from cellfate.engines.dense import DenseEngine, invert_lower
from cellfate.kernels.base import Basis, Component, Given, Term, unit_scale
from cellfate.kernels.groups import Intercepts
from cellfate.kernels.spatial import Matern32
from cellfate.model.glmm import FIXED, Model
from tests.problem import dense_engine, double, entries, small_problem

POINTS = 3


def as_array(matrix: mpmath.matrix) -> np.ndarray:
    return np.array(matrix.tolist(), dtype=float)


class Twin:
    """What the engine answers at one point, by the definitions, from the covariance of each component.

    In 50 digits, because prior variances of 100 against precisions from 1e-9 to 1e4 leave few in a double.
    """

    def __init__(self, covariances: dict[str, np.ndarray], precision: np.ndarray, shift: np.ndarray) -> None:
        self.covariances = covariances
        with mpmath.workdps(50):
            k = mpmath.zeros(len(precision))
            for covariance in covariances.values():
                k += mpmath.matrix(covariance.tolist())
            t, s = mpmath.diag(precision.tolist()), mpmath.matrix(shift.tolist())
            inverse = mpmath.inverse(mpmath.eye(len(precision)) + k * t)
            mean = inverse * (k * s)
            self.k = as_array(k)
            self.sigma = as_array(inverse * k)  # (K^-1 + T)^-1
            self.r = as_array(t * inverse)  # (K + T^-1)^-1
            self.mean = as_array(mean)[:, 0]
            self.weights = as_array(s - t * mean)[:, 0]  # K^-1 mean
            self.log_det = -float(mpmath.log(mpmath.det(inverse)))

    def component(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and covariance of a component."""
        k = self.covariances[name]
        return k @ self.weights, k - k @ self.r @ k


@dataclass
class Case:
    model: Model
    engine: DenseEngine
    u: torch.Tensor  # (points, d)
    sites: Sites
    fixed: bool  # whether fixed effects are integrated out
    precision: float  # what precisions of 1e-9 beside 1e4 leave of the digits of a single component

    def terms(self, u: torch.Tensor) -> list[Term]:
        return [t for t in self.model.terms(self.model.theta(u)) if self.fixed or t.name != FIXED]

    @property
    def n(self) -> int:
        return self.model.data.n

    def covariances(self, u: torch.Tensor) -> dict[str, np.ndarray]:
        """Of each component at a point u (d,), as (n, n)."""
        theta = self.model.theta(u[None])
        out = {}
        for component in self.model.components:
            kernel = component.kernel
            held = {h.name: theta.values[f"{h.name}_{component.name}"][0] for h in kernel.hyperparameters}
            k = entries(kernel, **held)
            k = unit_scale(k) if kernel.normalized else k
            out[component.name] = float(theta.values[f"sd_{component.name}"]) ** 2 * k.numpy()
        if self.fixed:
            x = self.model.data.design.numpy() * self.model.beta_sd.numpy()
            out[FIXED] = x @ x.T
        return out

    @lru_cache  # noqa: B019 (a handful of cases, alive as long as the tests)
    def twin(self, i: int) -> Twin:
        return Twin(self.covariances(self.u[i]), self.sites.precision[i].numpy(), self.sites.shift[i].numpy())

    def __hash__(self) -> int:
        return id(self)

    @property
    def posterior(self):
        return self.engine.condition(self.terms(self.u), self.sites)


def make(*, sizes=(1, 5, 2, 9, 4), groups=("clutch", "batch"), fixed=True, keep=None, sites="usual", seed=0) -> Case:
    model, engine = small_problem("negative_binomial", sizes=sizes, groups=groups, seed=seed)
    if keep is not None:
        components = [c for c in model.components if c.name in keep]
        model, engine = Model(model.family, components, model.data), dense_engine(components, model.data.n)
    rng = np.random.default_rng(seed)
    u = model.start() + double(0.5 * rng.normal(size=(POINTS, len(model.parameters))))
    precision = rng.gamma(1.0, size=(POINTS, model.data.n))
    if sites == "zero":
        precision[rng.random(precision.shape) < 0.4] = 0.0
        precision[1] = 0.0  # at one point nobody says anything
    elif sites == "uneven":
        precision = 10 ** rng.uniform(-9, 4, size=precision.shape)
    # a shift within reach of the precision, as sites have it
    shift = (precision + np.sqrt(precision)) * rng.normal(size=precision.shape)
    if sites == "zero":
        shift[2] += 0.3 * rng.normal(size=model.data.n)  # a slope without a curvature is legal
    return Case(model, engine, u, Sites(double(precision), double(shift)), fixed, 1e-5 if sites == "uneven" else 1e-9)


CASES = {
    "one block": {"sizes": (17,), "groups": (), "fixed": False},
    "one block, fixed effects": {"sizes": (17,), "groups": ()},
    "one block, groups": {"sizes": (17,)},
    "unequal blocks": {"groups": (), "fixed": False},
    "blocks with padding": {"sizes": (8, 9, 10, 3, 8, 1, 1), "groups": ("clutch",), "fixed": False},
    "groups inside blocks": {"groups": ("clutch",)},
    "groups inside and across": {},
    "groups across only": {"keep": ("spatial", "batch"), "fixed": False},
    "nothing inside": {"keep": (), "groups": ()},
    "cells without sites": {"sites": "zero"},
    "cells without sites, one block": {"sizes": (14,), "groups": (), "sites": "zero"},
    "uneven sites": {"sites": "uneven"},
    "two cells": {"sizes": (1, 1), "groups": (), "keep": ("spatial",)} | {"sizes": (2,)},
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""), scope="module")
def case(request):
    return make(**CASES[request.param])


def close(found: torch.Tensor, expected: list[np.ndarray], tolerance: float = 1e-9) -> None:
    expected = np.stack(expected)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance * scale)


def twins(case: Case) -> list[Twin]:
    return [case.twin(i) for i in range(POINTS)]


def test_cases_are_what_they_say():
    shared = {name: make(**options).engine for name, options in CASES.items()}
    assert [shared[name].blocks.count for name in ("one block", "unequal blocks", "groups inside blocks")] == [1, 5, 5]
    padded = shared["blocks with padding"].blocks
    assert any((stack == padded.n).any() for stack in padded.stacks)
    case = make()
    inside = {term.name: case.engine._inside(term) for term in case.terms(case.u)}
    assert inside == {"lineage": True, "spatial": True, "clutch": True, "batch": False, FIXED: False}


def test_moments(case):
    posterior = case.posterior
    close(posterior.mean, [twin.mean for twin in twins(case)])
    close(posterior.variance, [np.diag(twin.sigma) for twin in twins(case)])
    close(posterior.weights, [twin.weights for twin in twins(case)], 1e-7)
    close(posterior.log_det, [twin.log_det for twin in twins(case)])


def test_variances_keep_their_digits(case):
    """Relative, not absolute: of a cell known to 1e-6 the variance is not lost beside those of others."""
    expected = np.stack([np.diag(twin.sigma) for twin in twins(case)])
    np.testing.assert_allclose(case.posterior.variance, expected, rtol=1e-6)


def test_products(case):
    x = np.random.default_rng(7).normal(size=(POINTS, case.n, 4))
    posterior, columns = case.posterior, double(x)
    close(posterior.smooth(columns), [t.sigma @ c for t, c in zip(twins(case), x, strict=True)])
    close(posterior.residual(columns), [t.r @ c for t, c in zip(twins(case), x, strict=True)])
    close(posterior.prior_times(columns), [t.k @ c for t, c in zip(twins(case), x, strict=True)])


def test_squared_smoother(case):
    """Its arguments and what becomes of its answers vanish with a cell's precision, as derivatives of its log-density do."""
    seen = np.minimum(case.sites.precision.numpy(), 1)[..., None]
    x = np.random.default_rng(8).normal(size=(POINTS, case.n, 4)) * seen
    found = case.posterior.smooth_squared(double(x)) * double(seen)
    close(found, [(t.sigma**2 @ c) * s for t, c, s in zip(twins(case), x, seen, strict=True)])


def test_components(case):
    posterior = case.posterior
    for term in case.terms(case.u):
        expected = [twin.component(term.name) for twin in twins(case)]
        close(posterior.component_mean(term), [mean for mean, _ in expected], case.precision)
        close(posterior.component_variance(term), [np.diag(covariance) for _, covariance in expected], case.precision)


def test_component_means_add_up(case):
    terms = case.terms(case.u)
    total = sum(case.posterior.component_mean(term) for term in terms)
    torch.testing.assert_close(total, case.posterior.mean, rtol=case.precision, atol=case.precision)


def test_coefficients(case):
    """Of fixed effects and of the levels of a group, against regression on the columns with everything else as noise."""
    posterior = case.posterior
    for term in case.terms(case.u):
        if not isinstance(term.structure, Basis):
            continue
        mean, covariance = posterior.coefficients(term)
        phi = term.structure.phi.numpy()
        spectrum = (term.variance[..., None] * term.structure.spectrum).expand(POINTS, -1).numpy()
        for i, twin in enumerate(twins(case)):
            s = np.diag(spectrum[i])
            close(mean[i], s @ phi.T @ twin.weights, case.precision)
            close(covariance[i], s - s @ phi.T @ twin.r @ phi @ s, case.precision)


# --- the batch ---


def test_a_batch_is_its_points_one_by_one(case):
    together = case.posterior
    for i in range(POINTS):
        index = torch.tensor([i])
        terms, sites = case.terms(case.u[index]), case.sites[index]
        alone = case.engine.condition(terms, sites)
        x = double(np.random.default_rng(i).normal(size=(1, case.n, 2)))
        pair, omega = x[..., 0], x[..., 1]
        for one, all_of_them in (
            (alone.mean, together.mean),
            (alone.variance, together.variance),
            (alone.weights, together.weights),
            (alone.log_det, together.log_det),
            (alone.smooth(x), together.smooth(x.expand(POINTS, -1, -1))),
            (
                alone.surrogate(terms, pair, omega),
                together.surrogate(case.terms(case.u), pair.expand(POINTS, -1), omega.expand(POINTS, -1)),
            ),
        ):
            torch.testing.assert_close(one[0], all_of_them[i], rtol=1e-9, atol=1e-9)


def test_selected_points_are_the_points(case):
    index = torch.tensor([2, 0])
    prior = case.engine.prepare(case.terms(case.u))
    selected = case.engine.condition(case.terms(case.u), case.sites[index], case.engine.select(prior, index))
    torch.testing.assert_close(selected.mean, case.posterior.mean[index], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(selected.variance, case.posterior.variance[index], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(selected.log_det, case.posterior.log_det[index], rtol=1e-12, atol=1e-12)


def test_points_of_one_prior_with_sites_of_their_own():
    """One set of hyperparameters, many responses: the prior broadcasts against the sites."""
    case = make()
    one = case.terms(case.u[:1])
    together = case.engine.condition(one, case.sites)
    for i in range(POINTS):
        alone = case.engine.condition(one, case.sites[torch.tensor([i])])
        torch.testing.assert_close(together.mean[i], alone.mean[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(together.log_det[i], alone.log_det[0], rtol=1e-10, atol=1e-10)


# --- derivatives ---


@pytest.mark.parametrize("part", ["sites held", "pair", "omega", "all"])
def test_surrogate_has_the_slope_it_says(case, part):
    """1/2 b' dK b - 1/2 tr(R dK) + pair' dK b + tr(R diag(omega) R dK), dK by differences of the whole covariance."""
    rng = np.random.default_rng(3)
    pair = rng.normal(size=(POINTS, case.n)) if part in ("pair", "all") else None
    omega = rng.normal(size=(POINTS, case.n)) if part in ("omega", "all") else None
    u = case.u.clone().requires_grad_(True)
    total = case.posterior.surrogate(
        case.terms(u), None if pair is None else double(pair), None if omega is None else double(omega)
    )
    assert total.shape == (POINTS,)
    found = np.zeros(u.shape)
    if u.shape[1] and total.requires_grad:
        (slope,) = torch.autograd.grad(total.sum(), u, allow_unused=True)
        found = np.zeros(u.shape) if slope is None else slope.numpy()
    step = 1e-5
    for i, twin in enumerate(twins(case)):
        r, b = twin.r, twin.weights
        cotangent = 0.5 * np.outer(b, b) - 0.5 * r
        if pair is not None:
            cotangent += np.outer(pair[i], b)
        if omega is not None:
            cotangent += r @ np.diag(omega[i]) @ r
        size = (np.abs(cotangent) * np.abs(twin.k)).sum()
        for j in range(u.shape[1]):
            above, below = (case.u[i].clone() for _ in range(2))
            above[j] += step
            below[j] -= step
            dk = (sum(case.covariances(above).values()) - sum(case.covariances(below).values())) / (2 * step)
            assert found[i, j] == pytest.approx((cotangent * dk).sum(), rel=1e-6, abs=1e-9 * size)


# --- draws ---


def generators(points: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(points)]


@pytest.mark.parametrize("name", ["one block, fixed effects", "groups inside and across", "cells without sites"])
def test_draws_have_the_joint_moments_of_the_components(name):
    case, count = make(**CASES[name]), 30_000
    terms = case.terms(case.u)
    drawn = case.posterior.sample(terms, count, generators(POINTS))
    for i, twin in enumerate(twins(case)):
        names = list(twin.covariances)
        x = np.concatenate([drawn[name][i].numpy() for name in names])  # (components * n, count)
        mean = np.concatenate([twin.component(name)[0] for name in names])
        covariance = np.block(
            [
                [(one == other) * twin.covariances[one] - twin.covariances[one] @ twin.r @ twin.covariances[other] for other in names]
                for one in names
            ]
        )  # fmt: skip
        # along the principal axes, in units of their sds: independent standard normals, or nothing at all
        variance, axes = np.linalg.eigh(covariance)
        along = axes.T @ (x - mean[:, None])
        seen = variance > 1e-6 * variance.max()
        assert (along[~seen].std(1) < 1e-2 * np.sqrt(variance.max())).all()
        z = along[seen] / np.sqrt(variance[seen, None])
        assert np.abs(z.mean(1)).max() < 4.5 / np.sqrt(count)
        error = np.sqrt((1 + np.eye(len(z))) / count)
        deviation = (z @ z.T / count - np.eye(len(z))) / error
        assert np.abs(deviation).max() < 5
        assert 0.9 < np.sqrt((deviation**2).mean()) < 1.1


def test_draws_of_a_point_depend_on_its_generator_alone():
    case = make()
    together = case.posterior.sample(case.terms(case.u), 5, generators(POINTS, 10))
    for i in range(POINTS):
        index = torch.tensor([i])
        terms = case.terms(case.u[index])
        alone = case.engine.condition(terms, case.sites[index]).sample(terms, 5, generators(1, 10 + i))
        for name, draws in alone.items():
            torch.testing.assert_close(draws[0], together[name][i], rtol=1e-8, atol=1e-8)


# --- limits ---


# prior sd of the coefficients -> relative precision that is left of their covariance
WIDE = {10.0: 1e-9, 100.0: 1e-4}


def test_a_wide_prior_of_fixed_effects_costs_no_digits():
    """At a prior sd of 1e4 the weights are still K^-1 mean; the coefficients are ridge regression."""
    case = make(groups=(), keep=("spatial",))
    x, sites = case.model.data.design.numpy(), case.sites[torch.tensor([0])]
    v = case.covariances(case.u[0])["spatial"] + np.diag(1 / sites.precision[0].numpy())
    y = (sites.shift / sites.precision)[0].numpy()

    def regression(sd):
        covariance = np.linalg.inv(x.T @ np.linalg.solve(v, x) + np.eye(2) / sd**2)
        return covariance @ x.T @ np.linalg.solve(v, y), covariance

    for sd, tolerance in WIDE.items():
        wide = [
            Term(FIXED, Basis(t.structure.phi, 0 * t.structure.spectrum + sd**2), t.variance, False)
            if t.name == FIXED
            else t
            for t in case.terms(case.u[:1])
        ]
        posterior = case.engine.condition(wide, sites)
        mean, covariance = regression(sd)
        close(posterior.weights, [np.linalg.solve(v, y - x @ mean)], 1e-10)
        close(posterior.mean, [y - np.linalg.solve(v, y - x @ mean) / sites.precision[0].numpy()], 1e-10)
        found_mean, found_covariance = posterior.coefficients(next(t for t in wide if t.name == FIXED))
        np.testing.assert_allclose(found_mean[0], mean, rtol=tolerance)
        np.testing.assert_allclose(found_covariance[0], covariance, rtol=tolerance)


def test_an_overflow_does_not_pass_for_a_number():
    case = make(groups=(), keep=("spatial",), fixed=False)
    sites = Sites(torch.full_like(case.sites.precision, 1e308), case.sites.shift)
    assert not case.engine.condition(case.terms(case.u * 0 + 3), sites).log_det.isfinite().any()


@pytest.mark.parametrize("n", [1, 5, 128, 129, 300])
def test_inverse_of_a_triangle(n):
    rng = np.random.default_rng(n)
    lower = double(np.tril(0.3 * rng.normal(size=(2, n, n)) / np.sqrt(n)) + np.eye(n))
    torch.testing.assert_close(invert_lower(lower), torch.linalg.inv(lower), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(invert_lower(lower, leaf=3), torch.linalg.inv(lower), rtol=1e-10, atol=1e-12)


def test_a_given_covariance_has_blocks_of_its_own():
    root = np.random.default_rng(0).normal(size=(6, 2))
    specimen = np.array([0, 1, 0, 1, 1, 2])
    matrix = double((root @ root.T + np.eye(6)) * np.equal.outer(specimen, specimen))
    engine = dense_engine([Component("niche", Given(matrix))], 6)
    assert engine.blocks.count == 3
    terms = [Term("niche", _structure(Given(matrix)), double([0.8]), True)]
    precision = double([[1.0, 0.5, 2.0, 0.1, 1.0, 3.0]])
    twin = Twin({"niche": 0.8 * unit_scale(matrix).numpy()}, precision[0].numpy(), np.ones(6))
    posterior = engine.condition(terms, Sites(precision, torch.ones_like(precision)))
    close(posterior.mean, [twin.mean])
    close(posterior.log_det, [twin.log_det])


def _structure(kernel):
    return kernel.structure({}, double(0.0))


def test_single_precision_stays_single():
    rng = np.random.default_rng(0)
    xyz, codes = rng.normal(size=(12, 2)), np.arange(12) % 3
    components = [Component("spatial", Matern32(xyz)), Component("batch", Intercepts(codes))]
    engine = DenseEngine(components, 12, device="cpu", dtype=torch.float32)
    like = torch.zeros(0, dtype=torch.float32)
    terms = [
        Term("spatial", components[0].kernel.structure({"lengthscale": torch.tensor([0.8])}, like), torch.tensor([1.2]), True),
        Term("batch", components[1].kernel.structure({}, like), torch.tensor([0.5]), False),
    ]  # fmt: skip
    precision, shift = rng.gamma(1.0, size=(1, 12)), rng.normal(size=(1, 12))
    posterior = engine.condition(terms, Sites(double(precision).float(), double(shift).float()))
    k = {
        "spatial": 1.2 * unit_scale(entries(components[0].kernel, lengthscale=0.8)).numpy(),
        "batch": 0.5 * np.equal.outer(codes, codes),
    }
    twin = Twin(k, precision[0], shift[0])
    assert posterior.mean.dtype == posterior.variance.dtype == posterior.log_det.dtype == torch.float32
    close(posterior.mean, [twin.mean], 1e-5)
    close(posterior.variance, [np.diag(twin.sigma)], 1e-5)


def test_memory_bounds_the_batch():
    engine = make().engine
    small, large = engine.points_at_once(1e5), engine.points_at_once(1e6)
    assert 1 <= small < large
    assert engine.points_at_once(1.0) == 1
    matrix = 8 * sum(stack.shape[0] * stack.shape[1] ** 2 for stack in engine.blocks.stacks)
    assert large * matrix < 1e6
