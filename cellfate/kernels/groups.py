"""Grouping factors: batch, embryo, clone, each level with an intercept of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

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
        levels = int(self.codes.max()) + 1
        return torch.nn.functional.one_hot(torch.as_tensor(self.codes), levels).to(torch.float64)

    @property
    def expected_variance(self) -> float:
        total = float((np.bincount(self.codes).astype(float) ** 2).sum())
        return (self.n - total / self.n) / max(self.n - 1, 1)

    def at(self, cells: np.ndarray) -> Intercepts:
        return Intercepts(np.unique(self.codes[cells], return_inverse=True)[1])

    def structure(self, values: dict[str, Tensor], like: Tensor) -> Basis:
        phi = self._phi.to(like)
        return Basis(phi, phi.new_ones(phi.shape[1]))
