"""Which engine answers by itself, and what is said of it."""

import numpy as np
import pytest
import torch

from cellfate.engines import choose as module
from cellfate.engines.choose import choose
from cellfate.errors import DataError
from cellfate.kernels.base import Component
from cellfate.kernels.groups import Intercepts
from cellfate.kernels.lineage import Brownian
from cellfate.kernels.spatial import Matern32
from cellfate.trees.convert import to_forest

CPU = {"device": torch.device("cpu"), "dtype": torch.float64}


def star(n):
    names = [f"c{i}" for i in range(n)]
    forest = to_forest(f"({','.join(f'{x}:1' for x in names)});")
    return Component("lineage", Brownian(forest, forest.nodes_of(names)))


def field(n, specimens=1):
    xyz = np.random.default_rng(0).normal(size=(n, 2))
    return Component("spatial", Matern32(xyz, np.arange(n) % specimens))


@pytest.mark.parametrize(
    ("components", "n", "rank", "expected"),
    [
        ([star(400)], 400, None, "dense"),
        ([star(600)], 600, None, "structured"),  # nothing is approximated
        ([star(600), Component("g", Intercepts(np.arange(600) % 100))], 600, None, "dense"),  # many columns
        ([star(600), field(600)], 600, None, "dense"),
        ([star(600), field(600)], 600, 64, "structured"),  # a rank is only its own
        ([field(3100)], 3100, None, "structured"),
        ([field(3100, specimens=4)], 3100, None, "dense"),
    ],
)
def test_auto_goes_by_blocks_columns_and_fields(components, n, rank, expected):
    engine, why = choose("auto", components, n, rank=rank, **CPU)
    assert engine.name == expected
    assert why.startswith(f"{expected}: ")


def test_too_little_memory_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 2e7)
    engine, _ = choose("auto", [star(2000)], 2000, **CPU)
    assert engine.name == "structured"
    with pytest.raises(DataError, match="use engine='structured'"):
        choose("dense", [star(2000)], 2000, **CPU)
    with pytest.raises(DataError, match="smaller `rank`"):
        choose("structured", [field(20_000)], 20_000, **CPU)


@pytest.mark.parametrize("rank", [0, -3, 2.5, "64"])
def test_a_rank_is_a_number_of_columns(rank):
    with pytest.raises(DataError, match="wanted the number of columns"):
        choose("structured", [field(50)], 50, rank=rank, **CPU)


def test_unknown_engines_and_those_to_come():
    with pytest.raises(DataError, match="did you mean 'dense'"):
        choose("densee", [star(3)], 3, **CPU)
    with pytest.raises(NotImplementedError, match="structured"):
        choose("iterative", [star(3)], 3, **CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_fit_on_the_gpu_is_that_on_the_cpu():
    import cellfate as cf

    rng = np.random.default_rng(0)
    components = [star(200), field(200)]
    y = (rng.random(200) < 0.5).astype(float)
    fits = [
        cf.GLMM("bernoulli", components, engine="structured", rank=32, device=device).fit(y, np.ones((200, 1)), rng=0)
        for device in ("cpu", "cuda")
    ]
    assert abs(fits[0].free_energy - fits[1].free_energy) < 1e-6
