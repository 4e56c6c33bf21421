"""Problems: the same arguments give the same arrays, and fields have the variances they claim."""

import numpy as np
import pytest

NAMES = ("both", "both_gaussian", "space", "lineage")
ARRAYS = ("parent", "branch_length", "leaf", "coordinates", "y", "effect")


@pytest.mark.parametrize("name", NAMES)
def test_a_problem_is_its_arguments(script, name, tmp_path):
    problems = script("problems")
    one, again, other = (problems.make(name, 150, seed=seed) for seed in (3, 3, 4))
    one.save(tmp_path / "problem.npz")
    stored = problems.Problem.load(tmp_path / "problem.npz")
    for array in ARRAYS:
        np.testing.assert_array_equal(getattr(one, array), getattr(again, array))
        np.testing.assert_array_equal(getattr(one, array), getattr(stored, array))
    assert one.truth == again.truth == stored.truth
    assert not np.array_equal(one.y, other.y)


def test_problems_of_a_seed_share_cells_and_fields(script):
    problems = script("problems")
    both, space, lineage = (problems.make(name, 150) for name in ("both", "space", "lineage"))
    np.testing.assert_array_equal(both.coordinates, space.coordinates)
    np.testing.assert_array_equal(both.parent, lineage.parent)
    np.testing.assert_allclose(both.effect, space.effect + lineage.effect, rtol=1e-12)


def test_extent_is_the_longest_side_over_the_lengthscale(script):
    problem = script("problems").make("space", 200, extent=20.0)
    assert np.ptp(problem.coordinates, axis=0).max() / problem.lengthscale == pytest.approx(20.0)


def test_kernels_are_those_that_the_truth_names(script):
    problems = script("problems")
    for name in NAMES:
        problem = problems.make(name, 60)
        assert set(problem.kernels()) == set(problem.fields)
        for matrix in problem.covariances().values():
            centered = matrix - matrix.mean(0)
            assert np.trace(centered) / (problem.n - 1) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["space", "lineage"])
@pytest.mark.parametrize(("n", "seeds"), [(100, 200), (1600, 30)])  # exact covariance; random Fourier features
def test_fields_have_the_variance_they_claim(script, name, n, seeds):
    problems = script("problems")
    claimed = problems.make(name, n).truth[f"variance_{'spatial' if name == 'space' else 'lineage'}"]
    found = np.array([problems.make(name, n, extent=20.0, seed=seed).effect.var(ddof=1) for seed in range(seeds)])
    z = (found.mean() - claimed) / (found.std(ddof=1) / np.sqrt(len(found)))
    assert abs(z) < 3.5


def test_gaussian_noise_has_the_variance_it_claims(script):
    problem = script("problems").make("both_gaussian", 5000)
    found = (problem.y - problem.effect).var()
    assert found == pytest.approx(problem.truth["variance_residual"], rel=5 * np.sqrt(2 / problem.n))


def test_spatial_scale_is_that_of_all_pairs(script):
    problem = script("problems").make("space", 300)
    raw = problem.kernels(lengthscale=problem.lengthscale)["spatial"]
    apart = np.linalg.norm(problem.coordinates[:, None] - problem.coordinates, axis=-1) / raw.lengthscale
    matrix = (1 + np.sqrt(3) * apart) * np.exp(-np.sqrt(3) * apart)
    expected = (np.trace(matrix) - matrix.sum() / problem.n) / (problem.n - 1)
    found = problem.spatial_scale(problem.lengthscale, np.random.default_rng(0))
    assert found == pytest.approx(expected, abs=2e-3)
