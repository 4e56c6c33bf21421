"""Interaction: what relatives share only where they are also neighbors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from cellfate.errors import DataError
from cellfate.kernels.base import Basis, Dense, Kernel, Structure, mask_padding


@dataclass(frozen=True)
class Hadamard(Dense):
    """Two covariances, entry by entry; positive semi-definite by Schur's product theorem."""

    factors: tuple[Structure, Structure]
    n: int

    def dense(self, geometry: tuple[Any, Any]) -> Tensor:
        one, other = (_entries(factor, where, self.n) for factor, where in zip(self.factors, geometry, strict=True))
        return one * other


def _entries(structure: Structure, geometry: Any, n: int) -> Tensor:
    """Entries (..., blocks, s, s); a basis is asked with the cells alone."""
    if isinstance(structure, Basis):
        return mask_padding(structure.among(structure.phi[geometry.clamp(max=n - 1)]), geometry, n)
    assert isinstance(structure, Dense)
    return structure.dense(geometry)


@dataclass(frozen=True, eq=False)
class Product(Kernel):
    r"""The product of two kernels, :math:`k_{ij} = k^{(1)}_{ij} k^{(2)}_{ij}`: the interaction of their components.

    Cells are alike as far as they are related *and* near, as in models of genotype by environment. It has no shape of its own: the
    length-scale, and what else shapes the two, is that of the components called `names`, which have to be in the model. One of its
    own would be told by hardly any data, and at its ends the product is another component again: at a long length-scale the first
    kernel itself, at a short one an effect of each cell alone.
    """

    one: Kernel
    other: Kernel
    names: tuple[str, str] = ("lineage", "spatial")

    def __post_init__(self) -> None:
        if self.one.holds_variance or self.other.holds_variance:
            raise NotImplementedError(
                "a product with intercepts and slopes that covary is not there yet: give `Intercepts` or `Slopes`."
            )
        if self.one.n != self.other.n:
            raise DataError(
                f"a product of kernels over {self.one.n} and {self.other.n} cells. Give two over the same cells."
            )

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.one.n

    @property
    def factors(self) -> tuple[tuple[Kernel, str], tuple[Kernel, str]]:
        """Both kernels, with the components whose shapes they take."""
        return (self.one, self.names[0]), (self.other, self.names[1])

    @cached_property
    def borrowed(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(h.parameter(name) for kernel, name in self.factors for h in kernel.hyperparameters)

    @property
    def constant(self) -> bool:
        return self.one.constant and self.other.constant

    def structure(self, values: dict[str, Tensor], like: Tensor) -> Hadamard:
        one, other = (
            kernel.structure({h.name: values[h.parameter(name)] for h in kernel.hyperparameters}, like)
            for kernel, name in self.factors
        )
        return Hadamard((one, other), self.n)

    def geometry(self, cells: Tensor) -> tuple[Any, Any]:
        one, other = (self._where(kernel, cells) for kernel, _ in self.factors)
        return one, other

    def _where(self, kernel: Kernel, cells: Tensor) -> Any:
        try:
            return kernel.geometry(cells)
        except NotImplementedError:  # a basis: its columns say it all
            return cells

    def independent(self) -> np.ndarray | None:
        labels = [label for kernel, _ in self.factors if (label := kernel.independent()) is not None]
        return np.unique(np.column_stack(labels), axis=0, return_inverse=True)[1].reshape(-1) if labels else None

    def at(self, cells: np.ndarray) -> Product:
        return Product(self.one.at(cells), self.other.at(cells), self.names)
