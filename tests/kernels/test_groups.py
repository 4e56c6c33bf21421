"""Random intercepts: cells of a level share one value, and the variance is that of the values."""

import numpy as np
import pytest

from cellfate.kernels.groups import Intercepts
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


def test_levels_do_not_hold_cells_apart():
    """A batch may cross embryos: it is the engine that finds out whether its levels lie inside the blocks."""
    assert Intercepts(np.array([0, 1, 0])).independent() is None


def test_dtype_follows_the_model():
    basis = Intercepts(np.array([0, 1, 0])).structure({}, double(0.0).float())
    assert basis.phi.dtype == basis.spectrum.dtype == double(0.0).float().dtype
