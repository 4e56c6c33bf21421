"""Fields against the general Matérn covariance, by Bessel functions, cell by cell."""

import numpy as np
import pytest
import torch
from scipy.special import gamma, kv

from cellfate.errors import DataError
from cellfate.kernels.spatial import SPATIAL_KERNELS, Matern32, SpatialKernel
from tests.problem import double, entries

SMOOTHNESS = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}


def matern(distance: float, lengthscale: float, nu: float) -> float:
    """Rasmussen & Williams (2006), eq. 4.14."""
    if distance == 0:
        return 1.0
    s = np.sqrt(2 * nu) * distance / lengthscale
    return 2 ** (1 - nu) / gamma(nu) * s**nu * kv(nu, s)


def formula(name: str, xyz: np.ndarray, lengthscale: float, specimen: np.ndarray | None = None) -> np.ndarray:
    out = np.zeros((len(xyz), len(xyz)))
    for i, p in enumerate(xyz):
        for j, q in enumerate(xyz):
            if specimen is None or specimen[i] == specimen[j]:
                d = float(np.sqrt(((p - q) ** 2).sum()))
                rbf = np.exp(-(d**2) / (2 * lengthscale**2))
                out[i, j] = rbf if name == "rbf" else matern(d, lengthscale, SMOOTHNESS[name])
    return out


def positions(dims: int, n: int = 14, seed: int = 0) -> np.ndarray:
    xyz = np.random.default_rng(seed).normal(size=(n, dims)) * np.array([3.0, 1.0, 0.4])[:dims]
    xyz[5] = xyz[2]  # two cells at one point
    return xyz


@pytest.mark.parametrize("lengthscale", [0.05, 0.7, 30.0])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", SPATIAL_KERNELS)
def test_entries_are_the_formula(name, dims, lengthscale):
    xyz = positions(dims)
    k = entries(SPATIAL_KERNELS[name](xyz), lengthscale=lengthscale)
    np.testing.assert_allclose(k.numpy(), formula(name, xyz, lengthscale), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", SPATIAL_KERNELS)
def test_specimens_are_independent_fields(name):
    xyz, specimen = positions(2), np.array([0, 2, 0, 1, 1, 2, 0, 1, 2, 2, 0, 0, 3, 1])
    kernel = SPATIAL_KERNELS[name](xyz, specimen)
    k = entries(kernel, lengthscale=0.9).numpy()
    np.testing.assert_allclose(k, formula(name, xyz, 0.9, specimen), rtol=1e-11, atol=1e-15)
    assert (k[np.not_equal.outer(specimen, specimen)] == 0).all()
    np.testing.assert_array_equal(kernel.independent(), specimen)


@pytest.mark.parametrize("name", SPATIAL_KERNELS)
def test_entries_are_differentiable_in_the_lengthscale(name):
    """Cells at one point included: there the slope is 0, not NaN."""
    kernel = SPATIAL_KERNELS[name](positions(3), np.array([0, 1] * 7))
    geometry = kernel.geometry(torch.arange(14)[None])
    at = double([0.3, 2.0]).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: kernel.structure({"lengthscale": x}, x).dense(geometry), at)


def test_a_batch_of_lengthscales_is_one_by_one():
    kernel = Matern32(positions(2))
    together = entries(kernel, lengthscale=[0.1, 0.5, 4.0])
    for one, value in zip(together, [0.1, 0.5, 4.0], strict=True):
        torch.testing.assert_close(one, entries(kernel, lengthscale=value), rtol=1e-15, atol=0)


def test_blocks_are_cut_out_and_padding_is_zero():
    xyz, specimen = positions(2, n=6), np.array([0, 1, 0, 1, 2, 0])
    kernel = Matern32(xyz, specimen)
    blocks = torch.tensor([[0, 2, 5], [1, 3, 6], [4, 6, 6]])
    whole = torch.nn.functional.pad(entries(kernel, lengthscale=0.8), (0, 1, 0, 1))
    cut = kernel.structure({"lengthscale": double(0.8)}, double(0.0)).dense(kernel.geometry(blocks))
    torch.testing.assert_close(cut, whole[blocks[:, :, None], blocks[:, None, :]], rtol=0, atol=0)


def test_close_cells_keep_their_distance():
    """Distances from inner products would be lost at 1e-7 of the distance from the origin."""
    xyz = np.array([[1e4, 1e4], [1e4 + 1e-4, 1e4], [1e4, 1e4 + 3e-4]])
    k = entries(SPATIAL_KERNELS["matern12"](xyz), lengthscale=1e-4).numpy()
    np.testing.assert_allclose(k, formula("matern12", xyz, 1e-4), rtol=1e-6)


# --- bounds of the length-scale ---


def test_bounds_are_the_nearest_neighbor_and_the_extent():
    grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(4.0)), -1).reshape(-1, 2)
    (h,) = Matern32(grid).hyperparameters
    assert (h.name, h.scale, h.fixed) == ("lengthscale", "log", None)
    np.testing.assert_allclose([h.lower, h.upper], [1.0, 5.0])  # diagonal of 4 by 3
    # a second specimen, a copy of the first far away, and a third of one cell: a typical specimen stays what it was
    many = np.concatenate([grid, grid + 1000, [[500.0, 500.0]]])
    specimen = np.repeat([3, 1, 2], [20, 20, 1])
    np.testing.assert_allclose(Matern32(many, specimen).bounds, [1.0, 5.0])
    # cells at one point do not make the nearest neighbor distance 0
    np.testing.assert_allclose(Matern32(np.concatenate([grid, grid])).bounds, [1.0, 5.0])


def test_two_cells_have_an_interval_of_lengthscales():
    (h,) = Matern32(np.array([[0.0, 0.0], [3.0, 4.0]])).hyperparameters
    assert 0 < h.lower < h.upper == 5.0


def test_a_given_lengthscale_is_held():
    (h,) = Matern32(positions(2), lengthscale=0.6).hyperparameters
    assert h.fixed == 0.6


@pytest.mark.parametrize("specimen", [None, np.array([0, 0, 1])])
def test_cells_at_one_point_say_nothing(specimen):
    xyz = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0] if specimen is None else [7.0, 7.0]])
    with pytest.raises(DataError, match="all cells of each specimen are at one point"):
        _ = Matern32(xyz, specimen).hyperparameters


def test_every_spatial_kernel_is_named():
    assert set(SPATIAL_KERNELS.values()) == set(SpatialKernel.__subclasses__())
