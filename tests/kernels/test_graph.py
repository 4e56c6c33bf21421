"""Fields on graphs against the function of the whole Laplacian, and the niche against its products."""

import numpy as np
import pytest
import torch
from scipy.linalg import expm, fractional_matrix_power
from scipy.sparse import coo_matrix, csr_array, csr_matrix, random_array
from scipy.spatial import Delaunay

from cellfate.errors import DataError
from cellfate.kernels.base import unit_scale
from cellfate.kernels.graph import MOST_FEATURES, Composition, Graph
from tests.problem import double, entries


def tissue(n: int, seed: int = 0) -> csr_array:
    """Cells scattered over a square, neighbors as in a triangulation, with weights."""
    rng = np.random.default_rng(seed)
    start, to = Delaunay(rng.random((n, 2))).vertex_neighbor_vertices
    w = csr_array((rng.exponential(size=len(to)), to, start), shape=(n, n))
    return w + w.T


def laplacian(w: np.ndarray) -> np.ndarray:
    w = (w + w.T) / 2
    np.fill_diagonal(w, 0)
    d = np.array([x or 1.0 for x in w.sum(1)])
    return np.eye(len(w)) - w / np.sqrt(d[:, None] * d)


def matern(w: np.ndarray, lengthscale: float, nu: float) -> np.ndarray:
    """The formula, as a function of a matrix."""
    return fractional_matrix_power(2 * nu / lengthscale**2 * np.eye(len(w)) + laplacian(w), -nu)


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
@pytest.mark.parametrize("lengthscale", [0.5, 3.0, 20.0])
def test_all_modes_are_the_formula(lengthscale, nu):
    w = tissue(60)
    k = entries(Graph(w, nu=nu), lengthscale=lengthscale)
    torch.testing.assert_close(k, unit_scale(double(matern(w.toarray(), lengthscale, nu))), rtol=1e-9, atol=1e-10)


def test_it_is_a_mixture_of_random_walks():
    """The docstring's reading of a hop: walks with a gamma distributed number of steps of mean kappa^2 / 2."""
    w, nu, kappa = tissue(12).toarray(), 1.5, 2.0
    l = laplacian(w)
    t, step = np.linspace(0, 40, 4001, retstep=True)
    density = t ** (nu - 1) * np.exp(-2 * nu * t / kappa**2)
    assert (t * density).sum() / density.sum() == pytest.approx(kappa**2 / 2, rel=1e-3)
    walks = sum(weight * step * expm(-time * l) for weight, time in zip(density, t, strict=True))
    torch.testing.assert_close(entries(Graph(w), lengthscale=kappa), unit_scale(double(walks)), rtol=0.01, atol=0.01)


def test_weights_in_any_form_and_unit():
    w = tissue(30)
    k = entries(Graph(w), lengthscale=3.0)
    directed = np.triu(w.toarray()) * 2
    for same in (w.toarray(), coo_matrix(w), csr_matrix(w) * 7, directed, w.toarray() + np.diag(np.arange(30.0))):
        torch.testing.assert_close(entries(Graph(same), lengthscale=3.0), k, rtol=1e-9, atol=1e-11)


def test_parts_that_hang_together_are_independent_fields_of_one_variance():
    sizes = (25, 1, 8, 2, 1)
    part = np.repeat(np.arange(5), sizes)
    order = np.random.default_rng(1).permutation(len(part))
    w = np.zeros((len(part), len(part)))
    for code, size in enumerate(sizes):
        rows = np.flatnonzero(part == code)
        w[np.ix_(rows, rows)] = tissue(size).toarray() if size > 3 else np.ones((size, size))
    kernel = Graph(w[np.ix_(order, order)])
    label = kernel.independent()
    np.testing.assert_array_equal(np.equal.outer(label, label), np.equal.outer(part[order], part[order]))
    k = entries(kernel, lengthscale=4.0).numpy()
    blocks = [matern(w[np.ix_(part == c, part == c)], 4.0, 1.5) for c in range(5)]
    wanted = np.zeros_like(w)
    for c, block in enumerate(blocks):
        wanted[np.ix_(part == c, part == c)] = block / block.diagonal().mean()
    wanted = unit_scale(double(wanted[np.ix_(order, order)])).numpy()
    np.testing.assert_allclose(k, wanted, rtol=1e-9, atol=1e-10)
    # each part has a column that is constant but for the number of neighbors, and no column touches two parts
    touched = np.stack([(np.abs(kernel.modes.vectors[label == c]) > 0).any(0) for c in np.unique(label)])
    assert (touched.sum(0) == 1).all()
    assert (np.bincount(kernel.modes.owner, kernel.modes.values == 0) == 1).all()


def test_few_modes_are_the_smooth_part():
    w = tissue(80)
    few = Graph(w, rank=20)
    values, vectors = np.linalg.eigh(laplacian(w.toarray()))
    spectrum = (3 / 5.0**2 + values.clip(0)) ** -1.5
    wanted = (vectors[:, :20] * spectrum[:20]) @ vectors[:, :20].T
    torch.testing.assert_close(entries(few, lengthscale=5.0), unit_scale(double(wanted)), rtol=1e-8, atol=1e-9)
    assert few.truncated(5.0) == pytest.approx(spectrum[20:].sum() / spectrum.sum(), rel=1e-9)
    assert Graph(w).truncated(5.0) == 0
    assert few.truncated(1.0) > few.truncated(10.0)


def test_other_cells_are_still_neighbors():
    """A field is seen in some cells; those between them are no less there."""
    w = tissue(50)
    kernel, some = Graph(w), np.random.default_rng(2).permutation(50)[:18]
    k = entries(kernel, lengthscale=3.0)
    for seen in (kernel.at(some), Graph(w, cells=some)):
        torch.testing.assert_close(
            entries(seen, lengthscale=3.0), unit_scale(k[some[:, None], some]), rtol=1e-9, atol=1e-11
        )
    fewer = kernel.at(some).at(np.array([4, 0, 9]))
    rows = some[[4, 0, 9]]
    torch.testing.assert_close(
        entries(fewer, lengthscale=3.0), unit_scale(k[rows[:, None], rows]), rtol=1e-9, atol=1e-11
    )


def test_bounds_are_a_hop_and_the_extent():
    (h,) = Graph(np.eye(31, k=1)).hyperparameters  # a path
    assert (h.name, h.scale, h.lower, h.upper, h.fixed) == ("lengthscale", "log", 1.0, 30.0, None)
    (h,) = Graph(np.ones((5, 5))).hyperparameters
    assert (h.lower, h.upper) == (1.0, 2.0)
    (h,) = Graph(np.eye(9, k=1), lengthscale=4.0).hyperparameters
    assert h.fixed == 4.0
    lonely = np.zeros((60, 60))
    lonely[:31, :31] = np.eye(31, k=1)
    assert Graph(lonely).bounds == (1.0, 30.0)  # where a typical cell is


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (np.ones((3, 4)), r"shape \(3, 4\), wanted a square matrix"),
        (5, "of type int, wanted a square matrix"),
        (np.array([[0, -1.0], [-1.0, 0]]), "negative in 2 of 2 entries"),
        (np.array([[0, np.nan], [1.0, 0]]), "NaN or infinite in 1 of 2 entries"),
        (np.eye(4), "no edge between two of its 4 cells"),
        (np.array([["a", "b"], ["b", "a"]]), "wanted"),
    ],
)
def test_what_is_no_graph(weights, text):
    with pytest.raises(DataError, match=text):
        Graph(weights)


@pytest.mark.parametrize(("options", "text"), [({"nu": 0.0}, "nu is 0.0"), ({"rank": 0}, "rank is 0")])
def test_settings_are_checked(options, text):
    with pytest.raises(DataError, match=text):
        Graph(np.eye(4, k=1), **options)


def test_a_field_that_cannot_vary_is_refused():
    ring = np.roll(np.eye(6), 1, 0)
    with pytest.raises(DataError, match="the field on the graph is constant over the cells"):
        entries(Graph(ring, rank=1), lengthscale=2.0)


# --- the niche ---


def test_composition_is_the_product_of_standardized_features():
    f = np.random.default_rng(0).dirichlet([1, 2, 5], size=17)
    z = (f - f.mean(0)) / f.std(0)
    wanted = unit_scale(double(z @ z.T))
    torch.testing.assert_close(entries(Composition(f)), wanted, rtol=1e-12, atol=1e-13)
    # units and columns without variation do not matter
    more = np.column_stack([f * [1.0, 100.0, 1e-3] + 5, np.full(17, 3.0)])
    torch.testing.assert_close(entries(Composition(more)), wanted, rtol=1e-9, atol=1e-11)
    some = np.array([3, 11, 0, 5])
    torch.testing.assert_close(entries(Composition(f).at(some)), unit_scale(wanted[some[:, None], some]))


def test_many_features_are_their_principal_components():
    rng = np.random.default_rng(0)
    low = rng.normal(size=(150, 5)) @ rng.normal(size=(5, 300))
    kernel = Composition(low)
    assert kernel.structure({}, double(0.0)).phi.shape == (150, MOST_FEATURES)
    z = (low - low.mean(0)) / low.std(0)
    torch.testing.assert_close(entries(kernel), unit_scale(double(z @ z.T)), rtol=1e-9, atol=1e-9)  # of rank 5


def test_what_is_no_niche():
    with pytest.raises(DataError, match="no table of finite numbers"):
        Composition(np.array([[1.0], [np.nan]]))
    with pytest.raises(DataError, match="the niche is constant over the cells"):
        entries(Composition(np.ones((4, 2))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_model(dtype):
    like = torch.zeros((), dtype=dtype)
    w = random_array((20, 20), density=0.4, rng=np.random.default_rng(0))
    for basis in (
        Graph(w).structure({"lengthscale": torch.tensor([2.0, 5.0])}, like),
        Composition(w.toarray()).structure({}, like),
    ):
        assert basis.phi.dtype == basis.spectrum.dtype == dtype
