"""Grouping factors: batch, embryo, clone, each level with an intercept, or a slope, of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cellfate.errors import DataError
from cellfate.kernels.base import (
    Basis,
    Diagonal,
    Hyperparameter,
    Kernel,
    Structure,
    sample_variance,
    tensor,
    with_copies,
)


@dataclass(frozen=True, eq=False)
class Intercepts(Kernel):
    """Random intercepts. Not scaled: the variance is that of the intercepts, as every mixed-model package reports it.

    With a level per cell, `Intercepts(np.arange(n))`, this is the observation-level random effect (OLRE) that absorbs the
    overdispersion of counts.
    """

    codes: np.ndarray  # (n,)
    normalized = False

    @property
    def n(self) -> int:  # type: ignore[override]
        return len(self.codes)

    @cached_property
    def one_each(self) -> bool:
        """Whether every cell is a level of its own."""
        return len(np.unique(self.codes)) == self.n

    @cached_property
    def _phi(self) -> Tensor:
        return one_hot(self.codes)

    @property
    def expected_variance(self) -> float:
        total = float((np.bincount(self.codes).astype(float) ** 2).sum())
        return float(sample_variance(tensor(self.n), tensor(total), self.n, self.copies))

    def copied(self, count: int) -> Kernel:
        return with_copies(Intercepts(tiled(self.codes, count)), count)

    def at(self, cells: np.ndarray) -> Intercepts:
        return Intercepts(np.unique(self.codes[cells], return_inverse=True)[1])

    def independent(self) -> np.ndarray | None:
        # other levels may cross specimens: whether theirs do not, an engine finds out from the columns
        return self.codes if self.one_each else None

    def geometry(self, cells: Tensor) -> tuple[Tensor, int]:
        if not self.one_each:
            raise NotImplementedError("intercepts are columns: they have no geometry.")
        return cells, self.n

    def structure(self, values: dict[str, Tensor], like: Tensor) -> Structure:
        if self.one_each:
            return Diagonal(torch.ones(self.n, dtype=like.dtype, device=like.device))
        phi = self._phi.to(like)
        return Basis(phi, phi.new_ones(phi.shape[1]))


@dataclass(frozen=True, eq=False)
class Slopes(Kernel):
    """Random slopes: each level answers to a covariate in its own way, `phi = one_hot(codes) * covariate`.

    Independent of the intercepts of the same levels, so that it matters where the covariate is zero: center it, unless zero means
    that levels are alike. The covariate keeps its unit, and the variance is that of the slopes per unit, as lme4 reports it; what
    it contributes among these cells is that times c(K).
    """

    codes: np.ndarray  # (n,)
    covariate: np.ndarray  # (n,)
    normalized = False

    def __post_init__(self) -> None:
        x = np.asarray(self.covariate, dtype=np.float64)
        if x.shape != np.shape(self.codes) or not np.isfinite(x).all():
            raise DataError(
                f"covariate of shape {x.shape} for codes of shape {np.shape(self.codes)}: wanted one finite number per cell."
            )
        object.__setattr__(self, "covariate", x)

    @property
    def n(self) -> int:  # type: ignore[override]
        return len(self.codes)

    @cached_property
    def _phi(self) -> Tensor:
        return one_hot(self.codes) * torch.as_tensor(self.covariate)[:, None]

    @cached_property
    def unit(self) -> float:  # type: ignore[override]
        """Slopes of this size make cells differ by about 1: one over the covariate's root mean square."""
        return 1 / (float(np.sqrt(np.mean(self.covariate**2))) or 1.0)

    @property
    def expected_variance(self) -> float:
        total = float((np.bincount(self.codes, self.covariate) ** 2).sum())
        return float(sample_variance(tensor((self.covariate**2).sum()), tensor(total), self.n, self.copies))

    def copied(self, count: int) -> Kernel:
        return with_copies(Slopes(tiled(self.codes, count), np.tile(self.covariate, count)), count)

    def at(self, cells: np.ndarray) -> Slopes:
        some = Slopes(np.unique(self.codes[cells], return_inverse=True)[1], self.covariate[cells])
        some.__dict__["unit"] = self.unit  # that of all cells
        return some

    def structure(self, values: dict[str, Tensor], like: Tensor) -> Basis:
        phi = self._phi.to(like)
        return Basis(phi, phi.new_ones(phi.shape[1]))


@dataclass(frozen=True, eq=False)
class CorrelatedSlopes(Kernel):
    r"""Random intercepts and slopes of the same levels with a covariance, as lme4's `(1 + x | level)`.

    The intercept and the slope of a level are normal with sds :math:`s_0`, :math:`s_1` and correlation :math:`\rho`, levels are
    independent: :math:`\mathrm{cov}(i, j) = s_0^2 + \rho s_0 s_1 (x_i + x_j) + s_1^2 x_i x_j` within one. Unlike independent ones
    these are the same model wherever the zero of the covariate is; what the sd of intercepts and the correlation are, does depend
    on it. Not scaled: the component's own sd is that of the intercepts, `slope` names that of the slopes, per unit of covariate.
    """

    codes: np.ndarray  # (n,)
    covariate: np.ndarray  # (n,)
    slope: str = "slope"
    normalized = False
    holds_variance = True
    constant = False  # type: ignore[assignment]

    @cached_property
    def _slopes(self) -> Slopes:
        return Slopes(self.codes, self.covariate)

    def __post_init__(self) -> None:
        object.__setattr__(self, "covariate", self._slopes.covariate)  # checked

    @property
    def n(self) -> int:  # type: ignore[override]
        return len(self.codes)

    @cached_property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:  # type: ignore[override]
        return (
            Hyperparameter("slope", "sd", 0.0, np.inf, unit=self._slopes.unit, of=self.slope),
            Hyperparameter("correlation", "atanh", -1.0, 1.0),
        )

    @cached_property
    def _phi(self) -> Tensor:
        """Columns (n, 2 levels): membership, and membership times covariate."""
        return torch.cat([one_hot(self.codes), self._slopes._phi], -1)

    @cached_property
    def _contributions(self) -> np.ndarray:
        """What variances and covariance (2, 2) of 1 contribute among these cells."""
        columns = self._phi.reshape(self.n, 2, -1)
        trace, total = torch.einsum("nal,nbl->ab", columns, columns), columns.sum(0) @ columns.sum(0).mT
        return sample_variance(trace, total, self.n, self.copies).numpy()

    def copied(self, count: int) -> Kernel:
        other = CorrelatedSlopes(tiled(self.codes, count), np.tile(self.covariate, count), self.slope)
        return with_copies(other, count)

    def contribution(self, sd: np.ndarray, values: dict[str, np.ndarray]) -> np.ndarray:
        of, slope = self._contributions, values["slope"]
        return sd**2 * of[0, 0] + 2 * values["correlation"] * sd * slope * of[0, 1] + slope**2 * of[1, 1]

    def at(self, cells: np.ndarray) -> CorrelatedSlopes:
        codes = np.unique(self.codes[cells], return_inverse=True)[1]
        some = CorrelatedSlopes(codes, self.covariate[cells], self.slope)
        some._slopes.__dict__["unit"] = self._slopes.unit  # that of all cells
        return some

    def structure(self, values: dict[str, Tensor], like: Tensor) -> Basis:
        intercept, slope, correlation = (values[name].to(like) for name in ("sd", "slope", "correlation"))
        cross, none = correlation * intercept * slope, torch.zeros_like(slope)
        covariance = [[intercept.square(), cross], [cross, slope.square()]]
        left = slope * (1 - correlation.square()).clamp(min=0).sqrt()
        root = [[intercept, none], [correlation * slope, left]]
        phi = self._phi.to(like)
        spectrum, factor = (_for_each_level(m, phi.shape[1] // 2) for m in (covariance, root))
        return Basis(phi, spectrum, factor.detach())  # no derivative goes through the root, which has none at zero


def _for_each_level(entries: list[list[Tensor]], levels: int) -> Tensor:
    """The Kronecker product (..., 2 levels, 2 levels) of a matrix, given by its entries (...,), with the identity."""
    matrix = torch.stack([torch.stack(row, -1) for row in entries], -2)
    eye = torch.eye(levels, dtype=matrix.dtype, device=matrix.device)
    out = matrix[..., :, None, :, None] * eye[:, None, :]
    return out.reshape(*matrix.shape[:-2], 2 * levels, 2 * levels)


def tiled(codes: np.ndarray, count: int) -> np.ndarray:
    """Codes of `count` copies, of levels of their own."""
    return np.concatenate([codes + copy * (int(codes.max()) + 1) for copy in range(count)])


def one_hot(codes: np.ndarray) -> Tensor:
    """Membership (n, levels) of codes (n,)."""
    return torch.nn.functional.one_hot(torch.as_tensor(codes), int(codes.max()) + 1).to(torch.float64)
