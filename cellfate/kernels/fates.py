"""Fields of a fate out of several: what contrasts, or differences, of the fates share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellfate.errors import DataError
from cellfate.kernels.base import Basis, Component, Dense, Hyperparameter, Kernel, Structure, tensor


@dataclass(frozen=True)
class LoadedCovariance(Dense):
    """A covariance among cells, times what two copies of the cells make of the fields."""

    inner: Dense

    def dense(self, geometry: tuple[Any, Tensor]) -> Tensor:
        inside, loading = geometry
        among = self.inner.dense(inside)
        return among * (loading @ loading.mT).to(among)


@dataclass(frozen=True, eq=False)
class Loaded(Kernel):
    r"""Independent fields of one covariance C, of which a copy of the cells has `loading` (copies, fields): :math:`LL' \otimes C`.

    Copies are contrasts of the fates, or differences of two. Where every fate has a variance of its own there is such a kernel for each,
    with one field. With :math:`h_k` the row of fate k in the orthonormal contrasts H and loadings :math:`\sqrt K h_k` the covariance
    among contrasts is :math:`K\,h_k h_k' \otimes C`. Those of all fates at one variance sum to K times that of independent contrasts, so
    that what they contribute adds up to the component. Length-scales are shared: the first fate has them, the others borrow.
    """

    inner: Kernel
    loading: np.ndarray  # (copies, fields)
    component: str
    fate: int | None = None  # None: the fields of all fates
    fates: int = 1  # components like this one that add up to the whole

    def __post_init__(self) -> None:
        if not can_be_loaded(self.inner):
            raise NotImplementedError(
                f"component {self.component!r} with a variance for each fate is not there yet: its covariance has more than one variance, "
                "or goes by those of other components. Leave it out, or give per_fate=False."
            )
        self.__dict__["copies"] = len(self.loading)

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.inner.n * len(self.loading)

    @property
    def normalized(self) -> bool:  # type: ignore[override]
        return self.inner.normalized

    @property
    def unit(self) -> float:  # type: ignore[override]
        return self.inner.unit / float(np.sqrt(self.fates))

    @property
    def _first(self) -> bool:
        return self.fate in (None, 0)

    @property
    def _told(self) -> dict[str, Hyperparameter]:
        """Hyperparameters by the name they have in a model."""
        return {h.parameter(self.component): replace(h, component=self.component) for h in self.inner.hyperparameters}

    @property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:  # type: ignore[override]
        return tuple(self._told.values()) if self._first else ()

    @property
    def borrowed(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self._first else tuple(self._told)

    @property
    def constant(self) -> bool:
        return self.inner.constant

    @property
    def expected_variance(self) -> float:
        return self.inner.expected_variance

    def structure(self, values: dict[str, Tensor], like: Tensor) -> Structure:
        held = {h.name: values[h.name if self._first else told] for told, h in self._told.items()}
        inner = self.inner.structure(held, like)
        if isinstance(inner, Basis):
            assert inner.diagonal
            loading = tensor(self.loading, like)
            phi = (loading[:, None, :, None] * inner.phi[None, :, None]).reshape(self.n, -1)  # their Kronecker product
            repeated = inner.spectrum.repeat(*[1] * (inner.spectrum.ndim - 1), self.loading.shape[1])
            return replace(inner, phi=phi, spectrum=repeated)
        assert isinstance(inner, Dense)
        return LoadedCovariance(inner)

    def geometry(self, cells: Tensor) -> tuple[Any, Tensor]:
        real = cells < self.n
        loading = torch.as_tensor(self.loading, device=cells.device)[(cells // self.inner.n).clamp(max=self.copies - 1)]
        return self.inner.geometry(torch.where(real, cells % self.inner.n, self.inner.n)), loading

    def independent(self) -> np.ndarray | None:
        label = self.inner.independent()
        return None if label is None else np.tile(label, self.copies)

    def at(self, cells: np.ndarray) -> Loaded:
        count = len(cells) // self.copies  # the same ones of every copy
        return replace(self, inner=self.inner.at(cells[:count]))


def can_be_loaded(kernel: Kernel) -> bool:
    """Whether :class:`Loaded` knows what to do with it: its covariance is one variance times what does not depend on others."""
    return not kernel.holds_variance and not kernel.borrowed


def own_fields(components: Sequence[Component], loadings: np.ndarray, names: Sequence[str]) -> tuple[Component, ...]:
    """For each component one of each fate, called `component[fate]`; loadings (copies, K): what a copy has of each fate's latent value."""
    if len(names) < 3:
        raise DataError("per_fate=True needs three fates or more: of two, one varies as much as the other.")
    each = np.sqrt(len(names)) * loadings
    return tuple(
        Component(f"{c.name}[{name}]", Loaded(c.kernel, each[:, [k]], c.name, k, len(names)))
        for c in components
        for k, name in enumerate(names)
    )
