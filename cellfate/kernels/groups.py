"""Grouping factors: batch, embryo, clone, each level with an intercept, or a slope, of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cellfate.errors import DataError
from cellfate.kernels.base import Basis, Kernel


@dataclass(frozen=True, eq=False)
class Intercepts(Kernel):
    """Random intercepts. Not scaled: the variance is that of the intercepts, as every mixed-model package reports it."""

    codes: np.ndarray  # (n,)
    normalized = False

    @property
    def n(self) -> int:  # type: ignore[override]
        return len(self.codes)

    @cached_property
    def _phi(self) -> Tensor:
        return one_hot(self.codes)

    @property
    def expected_variance(self) -> float:
        total = float((np.bincount(self.codes).astype(float) ** 2).sum())
        return (self.n - total / self.n) / max(self.n - 1, 1)

    def at(self, cells: np.ndarray) -> Intercepts:
        return Intercepts(np.unique(self.codes[cells], return_inverse=True)[1])

    def structure(self, values: dict[str, Tensor], like: Tensor) -> Basis:
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
        return (float((self.covariate**2).sum()) - total / self.n) / max(self.n - 1, 1)

    def at(self, cells: np.ndarray) -> Slopes:
        some = Slopes(np.unique(self.codes[cells], return_inverse=True)[1], self.covariate[cells])
        some.__dict__["unit"] = self.unit  # that of all cells
        return some

    def structure(self, values: dict[str, Tensor], like: Tensor) -> Basis:
        phi = self._phi.to(like)
        return Basis(phi, phi.new_ones(phi.shape[1]))


def one_hot(codes: np.ndarray) -> Tensor:
    """Membership (n, levels) of codes (n,)."""
    return torch.nn.functional.one_hot(torch.as_tensor(codes), int(codes.max()) + 1).to(torch.float64)
