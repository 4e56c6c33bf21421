"""A field in few columns, against the covariance it stands for."""

import math

import numpy as np
import pytest
import torch

from cellfate.kernels.spatial import SPATIAL_KERNELS
from cellfate.places.basis import field_basis, variance_left
from cellfate.places.series import LogChebyshev, order_for

LOWER, UPPER = 0.12, 0.9
LENGTHSCALES = torch.tensor([LOWER, 0.31, UPPER], dtype=torch.float64)
RNG = np.random.default_rng(5)
PLANE = RNG.random((150, 2))
PLACES = {
    "plane": PLANE,
    "space": RNG.random((150, 3)),
    "duplicated positions": PLANE[np.arange(150) % 40],
    "on a line": np.outer(RNG.random(80), [1.0, 2.0]),
    "on a grid": np.argwhere(np.ones((9, 9))) / 8,
    "two cells": PLANE[:2],
    "all at one place": np.repeat(PLANE[:1], 5, axis=0),
}


def correlation_of(name):
    return SPATIAL_KERNELS[name](np.zeros((1, 2))).correlation


MATERN32 = correlation_of("matern32")


def exact(xyz, correlation, lengthscales=LENGTHSCALES, specimen=None):
    distance = np.linalg.norm(xyz[:, None] - xyz, axis=-1)
    k = correlation(torch.as_tensor(distance) / lengthscales[:, None, None])
    return k if specimen is None else k * torch.as_tensor(np.equal.outer(specimen, specimen))


def covariance(basis, lengthscales=LENGTHSCALES):
    smooth = basis.phi @ basis.spectrum(lengthscales) @ basis.phi.T
    return smooth + torch.diag_embed(basis.left_out(lengthscales))


@pytest.mark.parametrize("places", PLACES, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("name", SPATIAL_KERNELS)
def test_with_a_column_a_position_it_is_the_kernel(name, places):
    xyz, correlation = PLACES[places], correlation_of(name)
    basis = field_basis(xyz, correlation, LOWER, UPPER, rank=len(xyz))
    assert basis.rank == len(np.unique(xyz, axis=0))
    torch.testing.assert_close(covariance(basis), exact(xyz, correlation), rtol=0, atol=1e-8)
    assert max(basis.truncated_share) < 1e-8
    assert max(basis.errors) < 1e-7


@pytest.mark.parametrize("name", SPATIAL_KERNELS)
@pytest.mark.parametrize("rank", [3, 20, 70])
def test_what_is_left_out_restores_the_diagonal(name, rank):
    basis = field_basis(PLANE, correlation_of(name), LOWER, UPPER, rank=rank)
    left_out, captured = basis.left_out(LENGTHSCALES), basis.captured(LENGTHSCALES)
    assert basis.rank == rank
    assert (left_out >= 0).all()
    smooth = basis.phi @ basis.spectrum(LENGTHSCALES) @ basis.phi.T
    diagonal = smooth.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(captured, diagonal, rtol=0, atol=1e-10)
    torch.testing.assert_close(left_out + diagonal, diagonal.clamp(min=1), rtol=0, atol=1e-10)
    middle = torch.tensor(basis.reference, dtype=torch.float64)
    # columns of a blend are not the leading ones of any of its parts: a few cells may have a little more than their variance
    excess = basis.captured(middle) + basis.left_out(middle) - 1
    assert float(excess.min()) > -1e-8
    assert float(excess.mean()) < 0.005
    assert float(excess.max()) < 0.1
    torch.testing.assert_close(variance_left(basis.phi, basis.spectrum(LENGTHSCALES)), left_out, rtol=0, atol=1e-10)


@pytest.mark.parametrize("specimen", [None, np.arange(150) % 3], ids=["whole", "specimens"])
@pytest.mark.parametrize("method", ["spectrum", "left_out", "captured", "total", "trace"])
def test_gradients_in_the_lengthscale(method, specimen):
    basis = field_basis(PLANE, MATERN32, LOWER, UPPER, rank=24, specimen=specimen)
    l = torch.tensor([0.14, 0.4, 0.85], dtype=torch.float64, requires_grad=True)
    shape = getattr(basis, method)(l).shape[1:]
    weight = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape) + 0.5

    def some(l):
        return (getattr(basis, method)(l) * weight).flatten(1).sum(-1) if shape else getattr(basis, method)(l)

    assert torch.autograd.gradcheck(some, (l,), eps=1e-6, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SPATIAL_KERNELS)
def test_the_gradient_is_that_of_the_kernel_up_to_the_bounds(name):
    correlation = correlation_of(name)
    basis = field_basis(PLANE, correlation, LOWER, UPPER, rank=150)
    l, k = LENGTHSCALES.clone().requires_grad_(), LENGTHSCALES.clone().requires_grad_()
    rows = basis.phi[:30]
    weight = torch.linspace(-1, 1, 900, dtype=torch.float64).reshape(30, 30)
    ((rows @ basis.spectrum(l) @ rows.T) * weight).sum().backward()
    (exact(PLANE[:30], correlation, k) * weight).sum().backward()
    torch.testing.assert_close(l.grad, k.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPATIAL_KERNELS)
@pytest.mark.parametrize("landmarks", [600, 200], ids=["all positions", "landmarks"])
def test_the_error_falls_with_the_rank(name, landmarks):
    xyz = np.random.default_rng(1).random((600, 2))
    bases = [field_basis(xyz, correlation_of(name), 0.2, 0.6, rank=m, landmarks=landmarks) for m in (10, 30, 90)]
    errors, shares = np.array([b.errors for b in bases]), np.array([b.truncated_share for b in bases])
    assert (np.diff(errors, axis=0) < 0).all()
    assert (np.diff(shares, axis=0) < 0).all()


def test_the_errors_are_what_they_say():
    xyz = np.random.default_rng(1).random((300, 2))
    basis = field_basis(xyz, MATERN32, 0.2, 0.6, rank=25, landmarks=120)
    at = torch.tensor([0.2, basis.reference, 0.6], dtype=torch.float64)
    k = exact(xyz, MATERN32, at)
    wrong = basis.phi @ basis.spectrum(at) @ basis.phi.T - k
    wrong.diagonal(dim1=-2, dim2=-1).zero_()
    np.testing.assert_allclose(basis.errors, wrong.norm(dim=(-2, -1)) / k.norm(dim=(-2, -1)), rtol=1e-6)
    np.testing.assert_allclose(basis.truncated_share, basis.left_out(at).mean(-1), rtol=1e-6)


def test_landmarks_stand_for_uneven_cells():
    """Nine in ten cells in a tenth of the area: a third as many landmarks cost little, and the diagonal holds."""
    rng = np.random.default_rng(2)
    xyz = np.concatenate([rng.random((900, 2)) * [0.1, 1.0], rng.random((100, 2))])
    full = field_basis(xyz, MATERN32, 0.2, 0.6, rank=60)
    few = field_basis(xyz, MATERN32, 0.2, 0.6, rank=60, landmarks=300)
    assert len(few.blocks[0].landmarks) == 300
    assert (np.array(few.errors) < 3 * np.array(full.errors)).all()
    assert max(few.errors) < 0.005
    assert (np.array(few.truncated_share) - np.array(full.truncated_share) < 0.003).all()
    l = torch.tensor([0.2, 0.37, 0.6], dtype=torch.float64)
    smooth = few.phi @ few.spectrum(l) @ few.phi.T
    torch.testing.assert_close(few.captured(l), smooth.diagonal(dim1=-2, dim2=-1), rtol=0, atol=3e-5)


SPECIMEN = np.array([7] * 60 + [2] * 1 + [9] * 2 + [4] * 80 + [5] * 7)


@pytest.mark.parametrize("order", [np.arange(150), RNG.permutation(150)], ids=["sorted", "shuffled"])
def test_specimens_are_independent_fields(order):
    specimen, xyz = SPECIMEN[order], PLANE[order]
    full = field_basis(xyz, MATERN32, LOWER, UPPER, specimen=specimen, rank=150)
    torch.testing.assert_close(covariance(full), exact(xyz, MATERN32, specimen=specimen), rtol=0, atol=1e-8)
    basis = field_basis(xyz, MATERN32, LOWER, UPPER, specimen=specimen, rank=40)
    assert basis.rank == 40
    apart = torch.as_tensor(np.not_equal.outer(specimen, specimen))
    assert (covariance(basis)[:, apart] == 0).all()
    for code, block, columns in zip(basis.codes, basis.blocks, basis.slices, strict=True):
        assert (specimen[block.cells] == code).all()
        torch.testing.assert_close(basis.phi[block.cells, columns], block.phi)
        alone = field_basis(xyz[specimen == code], MATERN32, LOWER, UPPER, rank=block.phi.shape[1])
        part = covariance(basis)[:, block.cells[:, None], block.cells]
        torch.testing.assert_close(part, covariance(alone), rtol=0, atol=1e-8)


def test_a_cell_alone_needs_no_column():
    specimen = np.arange(6)
    basis = field_basis(PLANE[:6], MATERN32, LOWER, UPPER, specimen=specimen)
    assert basis.rank == 0
    assert basis.meets_tolerance
    torch.testing.assert_close(covariance(basis), torch.eye(6, dtype=torch.float64).expand(3, 6, 6))
    torch.testing.assert_close(basis.total(LENGTHSCALES), torch.full((3,), 6.0, dtype=torch.float64))
    assert basis.at(PLANE[:2], np.array([0, 1])).shape == (2, 0)


@pytest.mark.parametrize("landmarks", [600, 100])
@pytest.mark.parametrize("specimen", [None, SPECIMEN], ids=["whole", "specimens"])
def test_at_the_cells_own_positions_the_columns_are_their_own(specimen, landmarks):
    basis = field_basis(PLANE, MATERN32, LOWER, UPPER, specimen=specimen, rank=30, landmarks=landmarks)
    torch.testing.assert_close(basis.at(PLANE, specimen), basis.phi, rtol=0, atol=1e-9)


def test_between_the_cells_the_columns_carry_the_field():
    train, new = np.random.default_rng(0).random((400, 2)), np.random.default_rng(9).random((50, 2))
    basis = field_basis(train, MATERN32, 0.4, 0.8, rank=200)
    phi, l = basis.at(new), torch.tensor([0.55], dtype=torch.float64)
    both = exact(np.concatenate([train, new]), MATERN32, l)
    torch.testing.assert_close(phi @ basis.spectrum(l) @ basis.phi.T, both[:, 400:, :400], rtol=0, atol=0.02)
    left = variance_left(phi, basis.spectrum(l))
    assert left.min() >= 0
    assert left.mean() < 0.02


@pytest.mark.parametrize("rank", [20, 150])
@pytest.mark.parametrize("specimen", [None, SPECIMEN], ids=["whole", "specimens"])
@pytest.mark.parametrize("name", SPATIAL_KERNELS)
def test_the_spectrum_is_a_covariance(name, specimen, rank):
    """Up to what interpolation between length-scales leaves."""
    basis = field_basis(PLANE, correlation_of(name), LOWER, UPPER, specimen=specimen, rank=rank)
    l = torch.logspace(math.log10(LOWER), math.log10(UPPER), 9, dtype=torch.float64)
    spectrum = basis.spectrum(l)
    assert (torch.linalg.eigvalsh(spectrum).amin(-1) > -1e-9 * spectrum.diagonal(dim1=-2, dim2=-1).sum(-1)).all()


@pytest.mark.parametrize("rank", [20, 150])
@pytest.mark.parametrize("specimen", [None, SPECIMEN], ids=["whole", "specimens"])
def test_total_and_trace_are_those_of_the_covariance(specimen, rank):
    basis = field_basis(PLANE, MATERN32, LOWER, UPPER, specimen=specimen, rank=rank)
    k = covariance(basis)
    torch.testing.assert_close(basis.total(LENGTHSCALES), k.sum((-2, -1)), rtol=1e-9, atol=0)
    torch.testing.assert_close(basis.trace(LENGTHSCALES), k.diagonal(dim1=-2, dim2=-1).sum(-1), rtol=1e-9, atol=0)


def test_a_lengthscale_that_is_held():
    basis = field_basis(PLANE, MATERN32, 0.3, 0.3, rank=150)
    l = torch.tensor([0.3], dtype=torch.float64)
    assert len(basis.blocks[0].series.coefficients) == 1
    torch.testing.assert_close(covariance(basis, l), exact(PLANE, MATERN32, l), rtol=0, atol=1e-10)


def test_no_extrapolation():
    basis = field_basis(PLANE, MATERN32, LOWER, UPPER, rank=5)
    slack = torch.tensor([LOWER * (1 - 1e-10), UPPER * (1 + 1e-10)], dtype=torch.float64)
    assert torch.isfinite(basis.spectrum(slack)).all()
    for outside in (LOWER * 0.999, UPPER * 1.001, math.nan):
        with pytest.raises(ValueError, match=r"is outside \[0\.12, 0\.9\]"):
            basis.left_out(torch.tensor([0.5, outside], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"0 < lower <= upper, these are 0\.5 and 0\.2"):
        field_basis(PLANE, MATERN32, 0.5, 0.2)
    with pytest.raises(ValueError, match="too wide a range for one basis"):
        order_for(correlation_of("rbf"), 1e-8, 1e8, 1.0, 1e-9)


@pytest.mark.parametrize("landmarks", [2000, 100])
def test_the_same_cells_have_the_same_basis(landmarks):
    state = np.random.get_state()[1].copy()
    one, other = (field_basis(PLANE, MATERN32, LOWER, UPPER, landmarks=landmarks) for _ in range(2))
    torch.testing.assert_close(one.phi, other.phi, rtol=0, atol=0)
    assert (np.random.get_state()[1] == state).all()


def test_the_rank_follows_the_tolerance():
    xyz = np.random.default_rng(3).random((700, 2))
    ranks = []
    for tolerance in (0.03, 0.01, 0.003):
        basis = field_basis(xyz, MATERN32, 0.2, 0.5, tolerance=tolerance)
        assert basis.meets_tolerance
        assert basis.rank % 32 == 0
        assert basis.truncated_share[1] <= tolerance
        fewer = (
            field_basis(xyz, MATERN32, 0.2, 0.5, rank=basis.rank - 32, tolerance=tolerance) if basis.rank > 32 else None
        )
        assert fewer is None or not fewer.meets_tolerance
        ranks.append(basis.rank)
    assert ranks == sorted(set(ranks))
    short = field_basis(xyz, MATERN32, 0.02, 0.05, most=64)
    assert short.rank == 64
    assert not short.meets_tolerance


def test_dtype_follows_the_model():
    basis = field_basis(
        PLANE, MATERN32, LOWER, UPPER, specimen=SPECIMEN, rank=30, like=torch.zeros((), dtype=torch.float32)
    )
    l = LENGTHSCALES.float()
    for answer in (
        basis.phi,
        basis.spectrum(l),
        basis.left_out(l),
        basis.total(l),
        basis.at(PLANE[:3]),
    ):
        assert answer.dtype == torch.float32
    precise = field_basis(PLANE, MATERN32, LOWER, UPPER, specimen=SPECIMEN, rank=30)
    torch.testing.assert_close(covariance(basis, l).double(), covariance(precise), rtol=0, atol=1e-4)


def test_a_series_is_exact_at_its_nodes_and_for_polynomials_of_the_logarithm():
    nodes = torch.as_tensor(LogChebyshev.nodes(0.1, 3.0, 5))
    values = torch.stack([nodes.log() ** k for k in range(5)], -1)
    series = LogChebyshev.through(0.1, 3.0, values)
    torch.testing.assert_close(series(nodes), values)
    l = torch.tensor([0.1, 0.77, 3.0], dtype=torch.float64)
    torch.testing.assert_close(series(l), torch.stack([l.log() ** k for k in range(5)], -1))


def test_cells_far_from_all_others_have_their_part_of_a_long_lengthscale():
    """Columns that are right for short length-scales alone are zero there, and leave such a cell all by itself."""
    rng = np.random.default_rng(3)
    xyz = np.concatenate([0.3 * rng.standard_normal((400, 2)), [[3.0, 3.0], [-3.0, 2.0], [2.5, -3.0]]])
    basis = field_basis(xyz, MATERN32, 0.1, 3.0, rank=60)
    at = torch.tensor([2.5], dtype=torch.float64)
    left, k = basis.left_out(at)[0, -3:], exact(xyz, MATERN32, at)[0]
    # given all other cells, a far one keeps this much of its variance to itself
    alone = torch.stack([1 / torch.linalg.inv(k + 1e-9 * torch.eye(len(k)))[i, i] for i in (-3, -2, -1)])
    assert (left < alone + 0.1).all()
