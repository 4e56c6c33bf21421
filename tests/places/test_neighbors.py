"""Neighbor graphs: averages cell by cell, nearest neighbors by sorting, modes against a full decomposition."""

import numpy as np
import pytest
from scipy.sparse import block_diag, csr_array
from scipy.spatial import Delaunay

from cellfate.places import neighbors
from cellfate.places.neighbors import laplacian_modes, nearest_neighbors, neighbor_average, neighbor_graph


def tissue(n: int, seed: int = 0) -> csr_array:
    start, to = Delaunay(np.random.default_rng(seed).random((n, 2))).vertex_neighbor_vertices
    return csr_array((np.ones(len(to)), to, start), shape=(n, n))


def test_averages_are_those_of_the_neighbors():
    w = np.array([[0, 2.0, 1, 0], [1, 0, 0, 0], [0, 0, 5, 3], [0, 0, 0, 0]])
    f = np.array([[1.0, 0], [2, 5], [8, 3], [0, 7]])
    wanted = np.array([[4, 13 / 3], [1, 0], [0, 7], [5 / 3, 34 / 9]])  # the last has no neighbor
    for features in (f, csr_array(f)):
        np.testing.assert_allclose(neighbor_average(neighbor_graph(w), features), wanted)


@pytest.mark.parametrize("dims", [2, 3])
def test_nearest_neighbors_are_the_nearest_of_the_specimen(dims):
    rng = np.random.default_rng(0)
    xyz, specimen = rng.normal(size=(40, dims)), rng.integers(3, size=40)
    specimen[7] = 9  # alone
    graph = nearest_neighbors(xyz, specimen, 4).toarray()
    for i in range(40):
        others = [j for j in range(40) if j != i and specimen[j] == specimen[i]]
        others.sort(key=lambda j: np.linalg.norm(xyz[j] - xyz[i]))
        assert sorted(np.flatnonzero(graph[i])) == sorted(others[:4])


def test_cells_at_one_point_are_neighbors_of_each_other_not_of_themselves():
    graph = nearest_neighbors(np.zeros((8, 2)), np.zeros(8, dtype=int), 3).toarray()
    assert (graph.diagonal() == 0).all()
    assert (graph.sum(1) == 3).all()


@pytest.mark.parametrize("size", [400, 90], ids=["shift and invert", "with small parts"])
def test_modes_without_a_full_decomposition_are_the_same(monkeypatch, size):
    graph = csr_array(block_diag([tissue(size), tissue(30, 1), [[0]]]))
    exact = laplacian_modes(graph, 40)
    monkeypatch.setattr(neighbors, "EXACT", 50)
    fast = laplacian_modes(graph, 40 if size > 120 else 25)
    m = len(fast.values)
    np.testing.assert_allclose(np.sort(fast.values), np.sort(exact.values)[:m], atol=1e-12)
    gram = fast.vectors.T @ fast.vectors
    np.testing.assert_allclose(gram, np.eye(m), atol=1e-10)
    for c in range(3):
        project = [basis.vectors[:, basis.owner == c] for basis in (fast, exact)]
        project[1] = project[1][:, np.argsort(exact.values[exact.owner == c])[: project[0].shape[1]]]
        np.testing.assert_allclose(project[0] @ project[0].T, project[1] @ project[1].T, atol=1e-8)
    # what is left out is known: exactly in small parts, to a hundredth by quadrature
    for power in (-1.5, 1.0):
        sums = [(basis.rest[1] * (0.1 + basis.rest[0]) ** power).sum() for basis in (fast, exact)]
        kept = [((0.1 + basis.values) ** power).sum() for basis in (fast, exact)]
        assert sums[0] + kept[0] == pytest.approx(sums[1] + kept[1], rel=0.01)
    assert fast.rest[1].sum() + m == pytest.approx(graph.shape[0])


def test_each_part_has_a_mode_even_if_there_are_more_parts_than_modes():
    modes = laplacian_modes(csr_array(block_diag([tissue(20), tissue(12, 1), *([[0]] * 9)])), 3)
    assert sorted(modes.owner) == sorted(set(modes.component))
    assert (modes.values == 0).all()


def test_the_same_graph_has_the_same_modes(monkeypatch):
    monkeypatch.setattr(neighbors, "EXACT", 50)
    one, other = (laplacian_modes(tissue(200), 12) for _ in range(2))
    np.testing.assert_array_equal(one.vectors, other.vectors)
    np.testing.assert_array_equal(one.rest[0], other.rest[0])


def test_as_many_modes_as_fit(monkeypatch):
    monkeypatch.setattr(neighbors, "EXACT", 60)
    monkeypatch.setattr(neighbors, "RANK", 10)
    two = csr_array(block_diag([tissue(50), tissue(40, 1)]))
    assert len(laplacian_modes(tissue(50)).values) == 50
    assert len(laplacian_modes(two).values) == 20
    monkeypatch.setattr(neighbors, "ENTRIES", 13 * 90)
    assert len(laplacian_modes(two).values) == 13
