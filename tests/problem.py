"""Problems whose answers are known: the stored one of 300 cells, and small ones in which every feature meets every other."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cellfate.engines.dense import DenseEngine
from cellfate.kernels.base import Basis, Component, Kernel
from cellfate.kernels.groups import Intercepts
from cellfate.kernels.lineage import LINEAGE_KERNELS, Brownian
from cellfate.kernels.spatial import Matern32
from cellfate.model.catalog import get_family
from cellfate.model.families import Outcome
from cellfate.model.glmm import Data, Model
from cellfate.trees.convert import to_forest
from cellfate.trees.forest import Forest

LENGTHSCALE = 0.6  # of the stored problem
NAMES = {"lin": "lineage", "spa": "spatial"}  # as the stored files call components, and as the package does


def double(x) -> Tensor:
    return torch.as_tensor(np.asarray(x), dtype=torch.float64)


def entries(kernel: Kernel, **values) -> Tensor:
    """Covariance (..., n, n) of all cells of a kernel as one block, as it is before it is scaled."""
    structure = kernel.structure({name: double(value) for name, value in values.items()}, double(0.0))
    if isinstance(structure, Basis):
        return structure.among(structure.phi[None])[..., 0, :, :]
    return structure.dense(kernel.geometry(torch.arange(kernel.n)[None]))[..., 0, :, :]


def dense_engine(components: Sequence[Component], n: int) -> DenseEngine:
    return DenseEngine(components, n, device="cpu", dtype=torch.float64)


# --- the stored problem ---


@lru_cache
def _stored(folder: Path) -> tuple[pd.DataFrame, Forest, np.ndarray]:
    table = pd.read_csv(folder / "problem_n300.csv")
    forest = to_forest((folder / "problem_n300.nwk").read_text())
    return table, forest, forest.nodes_of(table["id"])


def stored_json(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def stored_problem(
    folder: Path,
    response: str,
    *,
    kernels: Sequence[str] = ("lin", "spa"),
    lengthscale: float | None = LENGTHSCALE,
    beta: Sequence[float] | None = None,
    reml: bool = True,
    priors: Mapping[str, object] | None = None,
) -> tuple[Model, DenseEngine]:
    """The problem of 300 cells for one of its responses; with `beta` the fixed effects are held, in the offset."""
    table, forest, leaf = _stored(folder)
    family = {"negbin": "negative_binomial"}.get(name := response.split("_")[0], name)
    kernel = {
        "lin": Brownian(forest, leaf),
        "spa": Matern32(table[["px", "py"]].to_numpy(), lengthscale=lengthscale),
    }
    components = [Component(NAMES[k], kernel[k]) for k in kernels]
    n = len(table)
    offset = table["offset"].to_numpy() if family in ("poisson", "negative_binomial") else np.zeros(n)
    design, terms = np.column_stack([np.ones(n), table["x"]]), ("Intercept", "x")
    if beta is not None:
        offset, design, terms = offset + design @ np.asarray(beta), design[:, :0], ()
    data = Data(Outcome(double(table[response])), double(design), terms, double(offset))
    return Model(get_family(family), components, data, priors or {}, reml), dense_engine(components, n)


# --- small problems ---


def random_newick(names: Sequence[str], rng: np.random.Generator) -> str:
    """Random merges of two or three, with some branches of length zero."""
    nodes = list(names)

    def below(node: str) -> str:
        return f"{node}:{float(rng.choice([0.0, *rng.exponential(size=4)]))!r}"

    while len(nodes) > 1:
        size = int(min(rng.integers(2, 4), len(nodes)))
        merged = [nodes.pop(int(rng.integers(len(nodes)))) for _ in range(size)]
        nodes.append(f"({','.join(map(below, merged))})")
    return f"({nodes[0]}:1.0);" if nodes[0] in names else nodes[0] + ";"


def small_problem(
    family: str = "bernoulli",
    *,
    link: str | None = None,
    sizes: Sequence[int] = (1, 5, 2, 9, 4),
    lineage: str = "ou",
    lengthscale: float | None = None,
    groups: Sequence[str] = ("clutch", "batch"),
    reml: bool = True,
    priors: Mapping[str, object] | None = None,
    seed: int = 0,
) -> tuple[Model, DenseEngine]:
    """Specimens of unequal sizes with a tree and a field each, `clutch` inside the specimens and `batch` across them."""
    rng = np.random.default_rng(seed)
    n, specimen = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    order = rng.permutation(n)
    cells = np.array([f"c{i}" for i in range(n)])
    forest = to_forest({str(s): random_newick(list(cells[specimen == s]), rng) for s in range(len(sizes))})
    specimen, leaf = specimen[order], forest.nodes_of(cells[order])
    coordinates = rng.normal(size=(n, 2))
    clutch = np.unique(2 * specimen + rng.integers(2, size=n), return_inverse=True)[1]
    kernels: dict[str, Kernel] = {
        "lineage": LINEAGE_KERNELS[lineage](forest, leaf),
        "spatial": Matern32(coordinates, specimen, lengthscale),
        "clutch": Intercepts(clutch),
        "batch": Intercepts(rng.permutation(np.arange(n) % 3)),
    }
    components = [Component(name, kernels[name]) for name in ("lineage", "spatial", *groups)]
    x = rng.normal(size=n)
    eta = 0.3 + 0.6 * x + 0.8 * coordinates[:, 0] + 0.5 * rng.normal(size=n)
    offset = 0.3 * rng.normal(size=n)
    fate = get_family(family, link)
    trials = rng.integers(1, 8, size=n).astype(float) if fate.kind == "successes" else None
    y = fate.simulate(eta + offset, rng=rng, trials=trials)
    levels = 4 if fate.kind == "levels" else None
    outcome = Outcome(double(y), None if trials is None else double(trials), levels)
    data = Data(outcome, double(np.column_stack([np.ones(n), x])), ("Intercept", "x"), double(offset))
    return Model(fate, components, data, priors or {}, reml), dense_engine(components, n)
