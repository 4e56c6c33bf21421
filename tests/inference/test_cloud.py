"""The interpolant of the log posterior between evaluated points, where its shape is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cellfate.inference.hyperposterior import _Cloud
from cellfate.inference.importance import FoldedT, uniforms
from cellfate.inference.points import Points

SUM, RESIDUAL = (1.2, 0.02), (0.15, 0.05)  # means and sds of the sum of two variances, and of one of them


def log_posterior(u: np.ndarray) -> np.ndarray:
    """Of an sd and a log sd whose variances have a sum that data know well, as a residual and the last branches of a tree."""
    one, other = u[:, 0] ** 2, np.exp(2 * u[:, 1])
    flat = np.log(u[:, 0]) + 2 * u[:, 1]  # in the variances
    return flat - 0.5 * ((one + other - SUM[0]) / SUM[1]) ** 2 - 0.5 * ((other - RESIDUAL[0]) / RESIDUAL[1]) ** 2


def test_a_ridge_between_two_variances_needs_few_points():
    mode = np.array([np.sqrt(SUM[0] - RESIDUAL[0]), 0.5 * np.log(RESIDUAL[0])])
    slope = np.diag([2 * mode[0], 2 * RESIDUAL[0]])  # of the variances in the coordinates
    precision = np.array([[1, 1], [1, 1]]) / SUM[1] ** 2 + np.diag([0, 1 / RESIDUAL[1] ** 2])
    curvature = slope @ precision @ slope
    parameters = [
        SimpleNamespace(name="sd_lineage", scale="sd", start=1.0, bounds=(-np.inf, np.inf)),
        SimpleNamespace(name="sd_residual", scale="log", start=1.0, bounds=(-9.0, 9.0)),
    ]
    model = SimpleNamespace(parameters=parameters, data=SimpleNamespace(n=50_000))
    proposal = FoldedT(mode, 1.3 * np.linalg.cholesky(np.linalg.inv(curvature)), np.array([True, False]))
    rng = np.random.default_rng(0)
    u = proposal.draw(uniforms(24, 3, rng))
    cloud = _Cloud(
        model, SimpleNamespace(u=torch.tensor(mode), curvature=torch.tensor(curvature)), [proposal], [len(u)], rng
    )
    empty = np.zeros((len(u), 0))
    points = Points(u, log_posterior(u), {}, {}, empty, np.zeros((len(u), 0, 0)), {}, 0)
    assert cloud.fit(points)
    drawn, _ = cloud.draws(rng)
    assert cloud.error < 0.1  # by their logs or sds as they are: 0.45, and the sd below is 15 % too small
    residual = np.exp(2 * drawn[:, 1])  # normal, and above zero, which is three sds away
    assert residual.mean() == pytest.approx(RESIDUAL[0], abs=0.1 * RESIDUAL[1])
    assert residual.std() == pytest.approx(RESIDUAL[1], rel=0.1)
