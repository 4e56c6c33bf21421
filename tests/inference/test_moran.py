"""Moran's I against its definition with a written-out matrix of weights."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from cellfate.inference.moran import NEIGHBORS, Near, Related, permuted
from cellfate.trees.convert import to_forest
from tests.problem import random_newick

N = 60


def by_definition(x, weights):
    """Over cells that have neighbors, each row of weights summing to one."""
    used = weights.sum(1) > 0
    x = x - x[used].mean()
    return (x[used] @ weights[used] @ x) / (x[used] ** 2).sum()


def test_over_space():
    rng = np.random.default_rng(0)
    xyz, specimen = rng.random((N, 2)), rng.permutation(np.r_[np.zeros(40), np.ones(19), 2.0]).astype(int)
    apart = cdist(xyz, xyz)
    apart[specimen[:, None] != specimen] = np.inf
    np.fill_diagonal(apart, np.inf)
    weights = np.zeros((N, N))
    for i, row in enumerate(apart):
        nearest = [j for j in np.argsort(row)[:NEIGHBORS] if np.isfinite(row[j])]
        if nearest:
            weights[i, nearest] = 1 / len(nearest)
    near, x = Near.of(xyz, specimen), rng.normal(size=N)
    np.testing.assert_allclose(near.weights.toarray(), weights, atol=1e-12)
    assert near.alone.sum() == 1
    assert near.moran(x[:, None])[0] == pytest.approx(by_definition(x, weights))


def test_over_the_tree():
    rng = np.random.default_rng(1)
    names = [f"c{i}" for i in range(N)]
    forest = to_forest(
        {"a": random_newick(names[:40], rng), "b": random_newick(names[40:-1], rng), "c": f"({names[-1]}:1);"}
    )
    order = rng.permutation(N)
    leaf = forest.nodes_of([names[i] for i in order])
    weights = np.zeros((N, N))
    ancestors = []
    for node in leaf:
        path = [node]
        while forest.parent[path[-1]] >= 0:
            path.append(forest.parent[path[-1]])
        ancestors.append(path)
    for i in range(N):
        for node in ancestors[i]:
            others = [j for j in range(N) if j != i and node in ancestors[j]]
            if others:
                weights[i, others] = 1 / len(others)
                break
    related, x = Related.of(forest, leaf), rng.normal(size=N)
    assert related.alone.tolist() == (weights.sum(1) == 0).tolist()
    around = related.around(x[:, None])[:, 0]
    np.testing.assert_allclose(around[~related.alone], (weights @ x)[~related.alone], atol=1e-12)
    assert related.moran(x[:, None])[0] == pytest.approx(by_definition(x, weights))


def test_random_orders_know_noise_from_a_pattern():
    rng = np.random.default_rng(2)
    xyz = rng.random((200, 2))
    near = Near.of(xyz, np.zeros(200, dtype=int))
    found, drawn, p = permuted(near, np.sin(6 * xyz[:, 0]), 199, rng)
    assert found > 0.8
    assert p == 1 / 200
    assert abs(drawn.mean() + 1 / 199) < 4 * drawn.std() / np.sqrt(199)
    ps = [permuted(near, rng.normal(size=200), 99, rng)[2] for _ in range(40)]
    assert 0.2 < np.mean(ps) < 0.8  # uniform: a mean of 40 has an sd of 0.046
