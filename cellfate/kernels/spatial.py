"""Neighborhood: stationary covariance of positions, one independent field per specimen."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from cellfate.errors import DataError
from cellfate.kernels.base import Dense, Hyperparameter, Kernel, Structure, mask_padding, with_copies


@dataclass(frozen=True)
class FieldGeometry:
    """Distances (blocks, s, s) and whether two cells are in one specimen, 1 or 0; None where all are."""

    distance: Tensor
    together: Tensor | None


@dataclass(frozen=True)
class Stationary(Dense):
    """Correlation of distance over length-scale."""

    kernel: SpatialKernel
    lengthscale: Tensor  # (...,)

    def dense(self, geometry: FieldGeometry) -> Tensor:
        ratio = geometry.distance / self.lengthscale[..., None, None, None]
        correlation = self.kernel.correlation(ratio)
        return correlation if geometry.together is None else correlation * geometry.together


@dataclass(frozen=True, eq=False)
class SpatialKernel(Kernel):
    """A stationary kernel on coordinates (n, d), d = 2 or 3; `specimen` (n,) are codes of independent fields."""

    coordinates: np.ndarray
    specimen: np.ndarray | None = None
    lengthscale: float | None = None
    _codes: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        codes = np.zeros(len(self.coordinates), dtype=np.int64) if self.specimen is None else self.specimen
        object.__setattr__(self, "_codes", codes)

    @property
    def n(self) -> int:  # type: ignore[override]
        return len(self.coordinates)

    @property
    def specimens(self) -> np.ndarray:
        """Code (n,) of the independent field that each cell belongs to."""
        return self._codes

    @abstractmethod
    def correlation(self, ratio: Tensor) -> Tensor:
        """Correlation at `ratio` = distance / length-scale."""

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Median distance to the nearest neighbor, and the extent, of a typical specimen."""
        nearest, extent = [], []
        for code in np.unique(self._codes):
            xyz = np.unique(self.coordinates[self._codes == code], axis=0)
            if len(xyz) > 1:
                nearest.append(KDTree(xyz).query(xyz, k=2)[0][:, 1])
                extent.append(float(np.linalg.norm(xyz.max(0) - xyz.min(0))))
        if not nearest:
            raise DataError("all cells of each specimen are at one point: positions say nothing about neighborhood.")
        return float(np.median(np.concatenate(nearest))), float(np.median(extent))

    @cached_property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:  # type: ignore[override]
        lower, upper = self.bounds if self.lengthscale is None else (self.lengthscale, self.lengthscale)
        if lower >= upper and self.lengthscale is None:
            lower = upper / 4  # two cells: nothing to tell them apart
        return (Hyperparameter("lengthscale", "log", lower, upper, self.lengthscale),)

    def structure(self, values: dict[str, Tensor], like: Tensor) -> Structure:
        return Stationary(self, values["lengthscale"].to(like))

    def geometry(self, cells: Tensor) -> FieldGeometry:
        inside = cells.clamp(max=self.n - 1)
        xyz = torch.as_tensor(np.asarray(self.coordinates, dtype=np.float64), device=cells.device)[inside]
        # from differences: the inner-product form loses half the digits for close cells
        distance = torch.cdist(xyz, xyz, compute_mode="donot_use_mm_for_euclid_dist")
        codes = torch.as_tensor(self._codes, device=cells.device)[inside]
        together = (codes[:, :, None] == codes[:, None, :]).to(xyz.dtype)
        together = mask_padding(together, cells, self.n)
        return FieldGeometry(distance, None if bool(together.all()) else together)

    def at(self, cells: np.ndarray) -> SpatialKernel:
        return type(self)(self.coordinates[cells], self._codes[cells], self.lengthscale)

    def copied(self, count: int) -> Kernel:
        codes = np.concatenate([self._codes + copy * (int(self._codes.max()) + 1) for copy in range(count)])
        return with_copies(type(self)(np.tile(self.coordinates, (count, 1)), codes, self.lengthscale), count)

    def independent(self) -> np.ndarray:
        return self._codes


class Matern12(SpatialKernel):
    """Rough: exp(-d/l)."""

    def correlation(self, ratio: Tensor) -> Tensor:
        return torch.exp(-ratio)


class Matern32(SpatialKernel):
    """Once differentiable: (1 + s) exp(-s), s = sqrt(3) d/l."""

    def correlation(self, ratio: Tensor) -> Tensor:
        s = math.sqrt(3.0) * ratio
        return (1 + s) * torch.exp(-s)


class Matern52(SpatialKernel):
    """Twice differentiable: (1 + s + s^2/3) exp(-s), s = sqrt(5) d/l."""

    def correlation(self, ratio: Tensor) -> Tensor:
        s = math.sqrt(5.0) * ratio
        return (1 + s + s.square() / 3) * torch.exp(-s)


class Rbf(SpatialKernel):
    """Smooth: exp(-d^2 / 2 l^2)."""

    def correlation(self, ratio: Tensor) -> Tensor:
        return torch.exp(-ratio.square() / 2)


SPATIAL_KERNELS: dict[str, type[SpatialKernel]] = {
    "matern12": Matern12,
    "matern32": Matern32,
    "matern52": Matern52,
    "rbf": Rbf,
}
