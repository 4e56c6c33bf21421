"""Named problems with a known truth, the same for every method and at every size from 100 cells to a million.

    both            binary fate, tree (brownian) and space (Matern 3/2): what the package is for
    both_gaussian   the same two fields behind a measurement with noise
    space           the same cells, positions and spatial field, fate from space alone: what a spatial package can do
    lineage         the same cells, tree and lineage field, fate from the tree alone

One embryo: a birth-death tree, positions half inherited. `extent` is the longest side of the box around the cells over the
length-scale, so that a problem stays as hard in space when it grows. Both fields are drawn as :func:`cellfate.datasets.simulate`
draws them (down the tree by pointer jumping; in space from the exact covariance, above 1,500 cells from 2,048 random Fourier
features), each from a stream of its own, at a cost that grows as n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from cellfate.datasets.growth import grow, plant
from cellfate.datasets.simulate import PAIRS, _lineage_field, _spatial_field, correlation
from cellfate.kernels.base import Kernel, unit_scale
from cellfate.kernels.lineage import Brownian
from cellfate.kernels.spatial import Matern32
from cellfate.model.catalog import get_family
from cellfate.trees.forest import Forest

VARIANCE = {"lineage": 1.0, "spatial": 1.5, "residual": 0.5}
EXTENT = 9.0
DEATH, INHERITANCE = 0.2, 0.5
KERNEL = "matern32"


@dataclass(frozen=True)
class Recipe:
    """What a problem is made of."""

    family: str
    fields: tuple[str, ...]


PROBLEMS = {
    "both": Recipe("bernoulli", ("lineage", "spatial")),
    "both_gaussian": Recipe("gaussian", ("lineage", "spatial")),
    "space": Recipe("bernoulli", ("spatial",)),
    "lineage": Recipe("bernoulli", ("lineage",)),
}


@dataclass(frozen=True, eq=False)
class Problem:
    """Plain arrays and the truth behind them."""

    name: str
    extent: float
    seed: int
    parent: np.ndarray  # (nodes,) the tree in post-order, -1 at the root
    branch_length: np.ndarray  # (nodes,)
    leaf: np.ndarray  # (n,) the node of each cell
    coordinates: np.ndarray  # (n, 2)
    y: np.ndarray  # (n,)
    effect: np.ndarray  # (n,) the sum of the fields, link scale
    lengthscale: float

    @property
    def n(self) -> int:
        return len(self.y)

    @property
    def family(self) -> str:
        return PROBLEMS[self.name].family

    @property
    def fields(self) -> tuple[str, ...]:
        return PROBLEMS[self.name].fields

    @property
    def design(self) -> np.ndarray:
        return np.ones((self.n, 1))

    @property
    def truth(self) -> dict[str, float]:
        """What is to be estimated, by the names that a fit gives it."""
        known = {f"variance_{name}": VARIANCE[name] for name in self.fields}
        if "spatial" in self.fields:
            known["lengthscale_spatial"] = self.lengthscale
        if self.family == "gaussian":
            known["variance_residual"] = VARIANCE["residual"]
        return known

    @cached_property
    def forest(self) -> Forest:
        names = np.full(len(self.parent), "", dtype=object)
        names[self.leaf] = [f"cell{i}" for i in range(self.n)]
        return Forest(self.parent, self.branch_length, names, ("embryo",))

    def kernels(self, *, lengthscale: float | None = None) -> dict[str, Kernel]:
        """The components, with the length-scale estimated unless one is given."""
        all_: dict[str, Kernel] = {}
        if "lineage" in self.fields:
            all_["lineage"] = Brownian(self.forest, self.leaf)
        if "spatial" in self.fields:
            all_["spatial"] = Matern32(self.coordinates, lengthscale=lengthscale)
        return all_

    def covariances(self) -> dict[str, np.ndarray]:
        """Matrices (n, n) of unit c(K), at the true length-scale: for methods to which kernels are handed over."""
        like = torch.empty(0, dtype=torch.float64)
        values = {"lengthscale": torch.tensor(self.lengthscale, dtype=torch.float64)}
        whole = torch.arange(self.n)[None]
        return {
            name: unit_scale(kernel.structure(values, like).dense(kernel.geometry(whole))[0]).numpy()
            for name, kernel in self.kernels(lengthscale=self.lengthscale).items()
        }

    def spatial_scale(self, lengthscale: float, rng: np.random.Generator) -> float:
        """c(K) of the spatial kernel, estimated from random pairs of cells to about 3e-4.

        What a package calls the variance of its field, times this, is the variance among these cells.
        """
        one, other = rng.integers(self.n, size=PAIRS), rng.integers(1, self.n, size=PAIRS)
        apart = np.linalg.norm(self.coordinates[one] - self.coordinates[(one + other) % self.n], axis=-1)
        return 1.0 - float(correlation(KERNEL, apart / lengthscale).mean())

    def save(self, path: Path) -> None:
        np.savez(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> Problem:
        with np.load(path) as stored:
            return cls(**{name: x if x.ndim else x.item() for name, x in stored.items()})


def make(name: str, n: int, *, extent: float = EXTENT, seed: int = 0) -> Problem:
    """The problem called `name`, of `n` cells; the same arguments give the same arrays."""
    recipe = PROBLEMS[name]
    # Streams of their own, so that the cells and each field are shared by the problems of one seed.
    cells, for_lineage, for_space, for_fate = (
        np.random.default_rng(s) for s in np.random.SeedSequence([seed, n]).spawn(4)
    )
    grown = grow(n, DEATH, 1, INHERITANCE, 2, cells)
    forest, leaf = plant([grown], np.array([f"cell{i}" for i in range(n)]), ["embryo"])
    lengthscale = float(np.ptp(grown.positions, axis=0).max()) / extent
    effect = np.zeros(n)
    if "lineage" in recipe.fields:
        effect += _scaled("lineage", *_lineage_field(forest, leaf, "brownian", {}, for_lineage))
    if "spatial" in recipe.fields:
        one = np.zeros(n, dtype=np.int64)
        effect += _scaled("spatial", *_spatial_field(grown.positions, one, KERNEL, lengthscale, for_space))
    outcome = get_family(recipe.family, None)
    settings: Mapping[str, float] = {"dispersion": 0.0, "variance_residual": VARIANCE["residual"]}
    y = outcome.simulate(effect, rng=for_fate, trials=None, **settings)
    return Problem(
        name,
        float(extent),
        seed,
        forest.parent,
        forest.branch_length,
        leaf,
        grown.positions,
        np.asarray(y, dtype=np.float64),
        effect,
        lengthscale,
    )


def _scaled(name: str, field: np.ndarray, scale: float) -> np.ndarray:
    return np.sqrt(VARIANCE[name] / scale) * field
