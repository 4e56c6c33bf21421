"""Neighborhood without coordinates: fields on a neighbor graph, and the composition of the niche.

Both are low-rank: fixed columns, of which hyperparameters move only the variances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellfate.errors import DataError
from cellfate.kernels.base import Basis, Hyperparameter, Kernel
from cellfate.places.neighbors import Modes, laplacian_modes, neighbor_graph

MOST_FEATURES = 100  # of a niche; of more, the leading principal components


class _Columns(Kernel):
    """A kernel of fixed columns, divided by its own c(K), so that no engine has to."""

    normalized = False
    what: str

    @property
    def n(self) -> int:  # type: ignore[override]
        return len(self._columns)

    @property
    def _columns(self) -> np.ndarray:
        raise NotImplementedError

    @cached_property
    def _at(self) -> dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]]:
        return {}

    def _phi(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (n, m) and their sample variances (m,), moved once to where they are used."""
        key = like.dtype, like.device
        if key not in self._at:
            spread = self._columns.var(0, ddof=1) if self.n > 1 else np.zeros(self._columns.shape[1])
            self._at[key] = torch.as_tensor(self._columns).to(like), torch.as_tensor(spread).to(like)
        return self._at[key]

    def _unit(self, spectrum: Tensor, like: Tensor) -> Basis:
        """The columns with this spectrum (..., m), divided by c(K): the sum over columns of spectrum times sample variance."""
        phi, spread = self._phi(like)
        scale = (spectrum * spread).sum(-1, keepdim=True)
        if not bool((scale > 1e-12 * spectrum.amax(-1, keepdim=True) / self.n).all()):
            raise DataError(f"{self.what} is constant over the cells: it cannot explain any variation. Leave it out.")
        return Basis(phi, spectrum / scale)


@dataclass(frozen=True, eq=False)
class Graph(_Columns):
    r"""A Matérn field on a neighbor graph: :math:`K = (2\nu/\kappa^2 + L)^{-\nu}` (Borovitskiy et al. 2021, eq. 9).

    :math:`L = 1 - D^{-1/2} W D^{-1/2}`, with *W* the symmetric part of the weights, without self-loops. Normalized, because then
    neither the unit of the weights nor the number of neighbors is a length: *K* is the average over walks on the graph whose
    number of steps is gamma distributed with mean :math:`\kappa^2/2`, so that the length-scale :math:`\kappa` counts hops. It
    also keeps the variance more even between the border and the inside of a tissue than *D - W* does, up to about ten hops.

    Connected components are independent fields, scaled to one mean variance: else a few cells apart, whose field is almost
    constant, would have a multiple of everyone's variance. A cell without neighbors has an effect of its own. The field is that of
    the leading modes, the eigenvectors of *L* with small eigenvalues, and what the others would add is left out, see `truncated`.

    weights: (N, N), sparse or dense. rank: how many modes; by default all of up to 1,500 cells, beyond that 256 for each
    connected component, fewer where the matrix of modes would be large. lengthscale: :math:`\kappa` where it is not to be
    estimated. cells: those of the N over which the kernel is, all by default; the others are still neighbors.
    """

    weights: Any
    nu: float = 1.5
    rank: int | None = None
    lengthscale: float | None = None
    cells: np.ndarray | None = None
    what = "the field on the graph"

    def __post_init__(self) -> None:
        if not (np.isfinite(self.nu) and self.nu > 0):
            raise DataError(f"nu is {self.nu!r}, wanted a positive number: 3/2 is rough, 5/2 smoother.")
        if self.rank is not None and not (isinstance(self.rank, int | np.integer) and self.rank >= 1):
            raise DataError(f"rank is {self.rank!r}, wanted the number of modes to keep, 1 or more.")
        object.__setattr__(self, "weights", neighbor_graph(self.weights))

    @cached_property
    def modes(self) -> Modes:
        """Eigenvectors and eigenvalues of the Laplacian; computed once."""
        return laplacian_modes(self.weights, self.rank)

    @cached_property
    def _columns(self) -> np.ndarray:  # type: ignore[override]
        vectors = self.modes.vectors
        return vectors if self.cells is None else np.ascontiguousarray(vectors[self.cells])

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.weights.shape[0] if self.cells is None else len(self.cells)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """One hop, below which neighbors are strangers, and the extent in hops of the part where a typical cell is."""
        extent = np.sort(self.modes.extent[self.independent()])
        return 1.0, max(float(extent[len(extent) // 2]), 2.0)

    @cached_property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:  # type: ignore[override]
        lower, upper = self.bounds if self.lengthscale is None else (self.lengthscale, self.lengthscale)
        return (Hyperparameter("lengthscale", "log", lower, upper, self.lengthscale),)

    def structure(self, values: dict[str, Tensor], like: Tensor) -> Basis:
        lengthscale = values["lengthscale"].to(like)
        eigenvalues = torch.as_tensor(self.modes.values).to(like)
        owner = torch.as_tensor(self.modes.owner, device=like.device)
        size = torch.as_tensor(np.bincount(self.modes.component)).to(like)
        spectrum = torch.exp(-self.nu * torch.log(2 * self.nu / lengthscale[..., None].square() + eigenvalues))
        total = spectrum.new_zeros(*spectrum.shape[:-1], len(size)).index_add(-1, owner, spectrum)
        return self._unit(spectrum * (size / total)[..., owner], like)

    def truncated(self, lengthscale: float) -> float:
        """Share of the field's variance that the modes left out would have had, at a length-scale."""
        nodes, weight, owner = self.modes.rest
        size = np.bincount(self.modes.component)

        def power(values: np.ndarray) -> np.ndarray:
            return (2 * self.nu / lengthscale**2 + values) ** -self.nu

        left_out = np.bincount(owner, weight * power(nodes), minlength=len(size))
        kept = np.bincount(self.modes.owner, power(self.modes.values), minlength=len(size))
        return float((size * left_out / (left_out + kept)).sum() / size.sum())

    def at(self, cells: np.ndarray) -> Graph:
        some = replace(self, cells=np.asarray(cells) if self.cells is None else self.cells[cells])
        some.__dict__["modes"] = self.modes  # of the same graph
        return some

    def independent(self) -> np.ndarray:
        component = self.modes.component
        return component if self.cells is None else component[self.cells]


@dataclass(frozen=True, eq=False)
class Composition(_Columns):
    """What a cell is surrounded by: `F F'`, with F (N, q) features of its neighbors, such as shares of cell types.

    Columns are centered and scaled to one variance; those that do not vary are left out. Of more than 100, the leading 100
    principal components stand for all. See :func:`cellfate.places.neighbors.neighbor_average` for how to make F; `cells` are
    those rows over which the kernel is, all by default. There is no hyperparameter but the variance.
    """

    features: np.ndarray
    cells: np.ndarray | None = None
    what = "the niche"

    def __post_init__(self) -> None:
        features = np.asarray(self.features, dtype=np.float64)
        if features.ndim != 2 or not features.size or not np.isfinite(features).all():
            raise DataError(
                f"features of shape {features.shape} are no table of finite numbers. Give (n, q), a row per cell and a column "
                "per feature."
            )
        object.__setattr__(self, "features", features)

    @cached_property
    def _standardized(self) -> np.ndarray:
        centered = self.features - self.features.mean(0)
        spread = centered.std(0)
        varies = spread > 1e-10 * np.abs(self.features).max(0)
        out = centered[:, varies] / spread[varies]
        if out.shape[1] > MOST_FEATURES:
            left, singular, _ = np.linalg.svd(out, full_matrices=False)
            out = left[:, :MOST_FEATURES] * singular[:MOST_FEATURES]
        return out

    @cached_property
    def _columns(self) -> np.ndarray:  # type: ignore[override]
        if not self._standardized.shape[1]:
            raise DataError(f"{self.what} is constant over the cells: it cannot explain any variation. Leave it out.")
        return self._standardized if self.cells is None else self._standardized[self.cells]

    @property
    def n(self) -> int:  # type: ignore[override]
        return len(self.features) if self.cells is None else len(self.cells)

    def structure(self, values: dict[str, Tensor], like: Tensor) -> Basis:
        phi, _ = self._phi(like)
        return self._unit(phi.new_ones(phi.shape[1]), like)

    def at(self, cells: np.ndarray) -> Composition:
        some = replace(self, cells=np.asarray(cells) if self.cells is None else self.cells[cells])
        some.__dict__["_standardized"] = self._standardized  # over all cells
        return some
