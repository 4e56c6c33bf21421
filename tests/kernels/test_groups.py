"""Intercepts and slopes: cells of a level share one value, or one answer to a covariate, whose variance it is."""

import numpy as np
import pytest
import torch

from cellfate.errors import DataError
from cellfate.kernels.groups import CorrelatedSlopes, Intercepts, Slopes
from cellfate.kernels.product import Product
from cellfate.kernels.spatial import Matern32
from tests.problem import double, entries

GROUPS = {
    "batches": [0, 1, 2, 0, 1, 0, 0],
    "one level": [0, 0, 0],
    "a level per cell": [3, 1, 0, 2],
    "one cell": [0],
    "a level without cells": [0, 3, 3, 0],
}


@pytest.fixture(params=GROUPS, ids=lambda name: name.replace(" ", "-"))
def codes(request):
    return np.array(GROUPS[request.param])


def test_cells_of_a_level_share_one_value(codes):
    np.testing.assert_array_equal(entries(Intercepts(codes)), np.equal.outer(codes, codes))


def test_the_variance_is_not_scaled_but_what_it_contributes_is_known(codes):
    kernel, n = Intercepts(codes), len(codes)
    assert not kernel.normalized
    assert kernel.hyperparameters == ()
    k = np.equal.outer(codes, codes).astype(float)
    p = np.eye(n) - 1 / n
    np.testing.assert_allclose(kernel.expected_variance, np.trace(p @ k @ p) / max(n - 1, 1), atol=1e-15)


@pytest.fixture
def slopes(codes):
    return Slopes(codes, np.random.default_rng(0).normal(1.0, 3.0, size=len(codes)))


def test_cells_of_a_level_share_one_slope(codes, slopes):
    """The covariance of b_level x, pair by pair."""
    wanted = [
        [x * y * (i == j) for y, j in zip(slopes.covariate, codes, strict=True)]
        for x, i in zip(slopes.covariate, codes, strict=True)
    ]
    np.testing.assert_allclose(entries(slopes), wanted, rtol=1e-15)


def test_the_variance_is_that_of_the_slopes(codes, slopes):
    n = len(codes)
    assert not slopes.normalized
    p = np.eye(n) - 1 / n
    c = np.trace(p @ entries(slopes).numpy() @ p) / max(n - 1, 1)
    np.testing.assert_allclose(slopes.expected_variance, c, rtol=1e-13, atol=1e-13)


def test_a_covariate_in_other_units_has_slopes_in_other_units():
    """Prior and search go by `unit`, so that minutes and days give the same fit."""
    codes, hours = np.array([0, 1, 0, 1, 2]), np.array([-3.0, 1.0, 4.0, 2.0, -1.0])
    in_hours, in_minutes = Slopes(codes, hours), Slopes(codes, 60 * hours)
    assert in_hours.unit == pytest.approx(60 * in_minutes.unit)
    np.testing.assert_allclose(in_hours.unit**2 * entries(in_hours), in_minutes.unit**2 * entries(in_minutes))
    some = in_hours.at(np.array([4, 0, 2]))
    assert some.unit == in_hours.unit  # of all cells, as the other units of a model
    np.testing.assert_array_equal(entries(some), entries(in_hours)[np.ix_([4, 0, 2], [4, 0, 2])])


@pytest.mark.parametrize("covariate", [np.zeros(2), np.array([1.0, np.nan, 2.0])])
def test_a_covariate_is_known_for_every_cell(covariate):
    with pytest.raises(DataError, match="wanted one finite number per cell"):
        Slopes(np.array([0, 1, 0]), covariate)


def test_levels_do_not_hold_cells_apart():
    """A batch may cross embryos: it is the engine that finds out whether its levels lie inside the blocks."""
    assert Intercepts(np.array([0, 1, 0])).independent() is None


def test_dtype_follows_the_model():
    basis = Intercepts(np.array([0, 1, 0])).structure({}, double(0.0).float())
    assert basis.phi.dtype == basis.spectrum.dtype == double(0.0).float().dtype


def test_intercept_and_slope_of_a_level_covary(codes):
    """Pair by pair, from the draws of a level: (1, x) C (1, y)'."""
    x = np.random.default_rng(1).normal(size=len(codes))
    sd, slope, correlation = 0.8, 1.7, -0.4
    c = np.array([[sd**2, correlation * sd * slope], [correlation * sd * slope, slope**2]])
    wanted = np.array([[[1, a] @ c @ [1, b] for b in x] for a in x]) * np.equal.outer(codes, codes)
    kernel = CorrelatedSlopes(codes, x)
    found = entries(kernel, sd=sd, slope=slope, correlation=correlation)
    np.testing.assert_allclose(found, wanted, rtol=1e-13, atol=1e-14)
    structure = kernel.structure(
        {k: double(v) for k, v in (("sd", sd), ("slope", slope), ("correlation", correlation))}, double(0.0)
    )
    np.testing.assert_allclose(structure.root @ structure.root.mT, structure.spectrum, rtol=1e-13, atol=1e-14)
    some = np.arange(len(codes))[::2]
    part = entries(kernel.at(some), sd=sd, slope=slope, correlation=correlation)
    np.testing.assert_allclose(part, wanted[np.ix_(some, some)], rtol=1e-13, atol=1e-14)


def test_where_zero_is_does_not_matter_to_what_covaries():
    codes, x = np.array([0, 1, 0, 1, 2, 0]), np.array([-3.0, 1.0, 4.0, 2.0, -1.0, 0.5])
    sd, slope, correlation, shift = 0.8, 1.7, -0.4, 2.5
    moved = sd**2 - 2 * shift * correlation * sd * slope + shift**2 * slope**2  # variance of intercepts at x = -shift
    cross = correlation * sd * slope - shift * slope**2
    one = entries(CorrelatedSlopes(codes, x), sd=sd, slope=slope, correlation=correlation)
    other = entries(
        CorrelatedSlopes(codes, x + shift), sd=moved**0.5, slope=slope, correlation=cross / (moved**0.5 * slope)
    )
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_perfectly_correlated_and_absent_ones_have_a_gradient():
    kernel = CorrelatedSlopes(np.array([0, 1, 0, 1]), np.array([-1.0, 0.5, 2.0, 1.0]))
    for at in ((0.0, 1.0, 0.5), (1.0, 0.0, -0.5), (1.0, 1.0, 1.0)):
        values = [double(v).requires_grad_(True) for v in at]
        structure = kernel.structure(dict(zip(("sd", "slope", "correlation"), values, strict=True)), double(0.0))
        structure.spectrum.sum().backward()
        assert all(bool(v.grad.isfinite()) for v in values)


def test_a_product_with_intercepts():
    """Cells are alike where they are of one batch and near: a block of the field's covariance for each batch."""
    codes, xyz = np.array([0, 0, 1, 1, 1, 0]), np.random.default_rng(0).normal(size=(6, 2))
    field = Matern32(xyz, lengthscale=0.7)
    product = Product(Intercepts(codes), field, ("batch", "spatial"))
    values = {"lengthscale_spatial": torch.tensor([0.7], dtype=torch.float64)}
    like = torch.empty(0, dtype=torch.float64)
    cells = torch.arange(6)[None]
    found = product.structure(values, like).dense(product.geometry(cells)).reshape(6, 6)
    alone = (
        field.structure({"lengthscale": values["lengthscale_spatial"]}, like).dense(field.geometry(cells)).reshape(6, 6)
    )
    np.testing.assert_allclose(found, alone * torch.as_tensor(np.equal.outer(codes, codes)))
    with pytest.raises(NotImplementedError, match="covary"):
        Product(CorrelatedSlopes(codes, xyz[:, 0]), field)
