"""What a kernel is: hyperparameters in, the structure of a covariance out.

A structure knows its covariance entry by entry (steps along a tree, a stationary field, a product of two, what each cell has for
itself), or is a basis, a low-rank product. What can be asked of a sum of them is an engine's business. A kernel also says which cells
it can make dependent, so that an engine can keep independent specimens apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Hyperparameter:
    """A number that shapes a kernel, besides its variance.

    `scale` is the coordinate in which it is estimated ("log" for a positive number, "logit" for one between 0 and 1, "atanh" for a
    correlation, "sd" for a standard deviation beside the component's own); `lower` and `upper` bound what the data can tell;
    `fixed` takes it out of the estimation. An sd has a `unit`, as a kernel has, and says what it is `of`. One that several
    components go by is called after `component`.
    """

    name: str
    scale: str
    lower: float
    upper: float
    fixed: float | None = None
    unit: float = 1.0
    of: str | None = None
    component: str | None = None

    def parameter(self, component: str) -> str:
        """Its name in a model, such as `lengthscale_spatial`, or `sd_clone:time` for that of slopes."""
        component = self.component or component
        return f"{self.name}_{component}" if self.of is None else f"sd_{component}:{self.of}"


class Structure:
    """A covariance at given hyperparameters, leading dimensions are a batch."""


class Dense(Structure, ABC):
    """A covariance known entry by entry."""

    @abstractmethod
    def dense(self, geometry: Any) -> Tensor:
        """Entries (..., blocks, s, s) among the cells for which `geometry` was made by :meth:`Kernel.geometry`."""


@dataclass(frozen=True)
class Basis(Structure):
    """Covariance `phi S phi'`: fixed effects, grouping factors.

    S is the diagonal matrix of `spectrum`, or `spectrum` itself where a `root` F comes with it, F F' = S.
    """

    phi: Tensor  # (n, m), fixed
    spectrum: Tensor  # (..., m), what the hyperparameters move; (..., m, m) with a root
    root: Tensor | None = None  # (..., m, m)

    @property
    def diagonal(self) -> bool:
        return self.root is None

    def matrix(self) -> Tensor:
        """S (..., m, m)."""
        return torch.diag_embed(self.spectrum) if self.root is None else self.spectrum

    def factor(self) -> Tensor:
        """F (..., m, m)."""
        return torch.diag_embed(self.spectrum.sqrt()) if self.root is None else self.root

    def times(self, x: Tensor) -> Tensor:
        """S x for columns x (..., m, k)."""
        return self.spectrum[..., None] * x if self.root is None else self.spectrum @ x

    def spread(self, z: Tensor) -> Tensor:
        """F z for columns z (..., m, k): draws of the coefficients."""
        return self.spectrum.sqrt()[..., None] * z if self.root is None else self.root @ z

    def among(self, phi: Tensor) -> Tensor:
        """Covariance (..., blocks, s, s) of some rows (blocks, s, m) of the columns."""
        s = self.spectrum
        return (phi * s[..., None, None, :] if self.root is None else phi @ s[..., None, :, :]) @ phi.mT


@dataclass(frozen=True)
class Diagonal(Dense):
    """Covariance of effects that each cell has for itself: as a basis it would need as many columns as cells."""

    variances: Tensor  # (..., n)

    def dense(self, geometry: tuple[Tensor, int]) -> Tensor:
        cells, n = geometry
        inside = self.variances[..., cells.clamp(max=n - 1)]  # (..., blocks, s)
        same = cells[:, :, None] == cells[:, None, :]  # a cell may be there twice
        return mask_padding(inside[..., None, :] * same, cells, n)


class Kernel(ABC):
    """Hyperparameters to covariance, over the `n` cells it was made for."""

    normalized = True  # divided by c(K), so that the variance is "among these cells"
    hyperparameters: tuple[Hyperparameter, ...] = ()
    borrowed: tuple[
        str, ...
    ] = ()  # parameters of other components that shape this one too; among `values` by these names
    holds_variance = False  # whether the structure holds the component's variance, with its sd as `values["sd"]`
    copies: int = 1  # independent copies of its cells that a fate of several fields has, one after the other
    unit: float = 1.0  # a standard deviation that makes cells differ by about 1: its prior and the search go by it
    n: int

    @abstractmethod
    def structure(self, values: dict[str, Tensor], like: Tensor) -> Structure:
        """The covariance at hyperparameters `values`, each (...,), in the dtype and on the device of `like`."""

    def geometry(self, cells: Tensor) -> Any:
        """What :meth:`Dense.dense` needs for blocks of cells (blocks, s); index `n` is padding. Made once a fit."""
        raise NotImplementedError

    def independent(self) -> np.ndarray | None:
        """Label (n,) of the independent set that each cell belongs to; None where the kernel does not say."""
        return None

    @abstractmethod
    def at(self, cells: np.ndarray) -> Kernel:
        """The same kernel over some of the cells."""

    def copied(self, count: int) -> Kernel:
        """The same kernel over `count` independent copies of its cells, one after the other."""
        raise NotImplementedError(
            f"a {type(self).__name__} is not there yet for fates of several fields, such as family='categorical'. Leave it out, or "
            "ask about one fate at a time with family='bernoulli'."
        )

    @property
    def expected_variance(self) -> float:
        """c(K) of the kernel as it enters the model: what a variance of 1 contributes among these cells."""
        return 1.0

    @property
    def constant(self) -> bool:
        """Whether nothing but a variance, as a factor, moves the covariance."""
        return all(h.fixed is not None for h in self.hyperparameters)

    def contribution(self, sd: np.ndarray, values: dict[str, np.ndarray]) -> np.ndarray:
        """What the component contributes among these cells at draws of its sd and its hyperparameters."""
        return sd**2 * self.expected_variance


@dataclass(frozen=True)
class Component:
    """A named share of the variation: a kernel, with its variance as a hyperparameter."""

    name: str
    kernel: Kernel


@dataclass(frozen=True)
class Term:
    """A component at given hyperparameters: `variance` (...,) times its structure, divided by c(K) where `normalized`."""

    name: str
    structure: Structure
    variance: Tensor
    normalized: bool


def sample_variance(trace: Tensor, total: Tensor, n: int, copies: int = 1) -> Tensor:
    """c(K) = tr(P K P) / (n - 1), the expected sample variance of a draw, from `tr K` and `1' K 1`; of `copies`, of one."""
    n //= copies
    return (trace - total / n) / (copies * max(n - 1, 1))


def with_copies(kernel: Kernel, count: int) -> Kernel:
    """`kernel`, over cells that are `count` copies."""
    kernel.__dict__["copies"] = count
    return kernel


def unit_scale(covariance: Tensor) -> Tensor:
    """A covariance (..., n, n) divided by its c(K): a dense twin for tests and for small problems."""
    n = covariance.shape[-1]
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return covariance / sample_variance(trace, covariance.sum((-2, -1)), n)[..., None, None]


def mask_padding(matrix: Tensor, cells: Tensor, n: int) -> Tensor:
    """Zero the rows and columns of padding cells."""
    real = (cells < n).to(matrix.dtype)
    return matrix * real[:, :, None] * real[:, None, :]


@dataclass(frozen=True)
class _Entries(Dense):
    matrix: Tensor

    def dense(self, geometry: tuple[Tensor, int]) -> Tensor:
        cells, n = geometry
        inside = cells.clamp(max=n - 1)
        return mask_padding(self.matrix[inside[:, :, None], inside[:, None, :]], cells, n)


@dataclass(frozen=True, eq=False)
class Given(Kernel):
    """A covariance (n, n) that the user hands over; scaled to unit c(K) unless `normalized=False`."""

    matrix: Tensor
    normalized: bool = True  # type: ignore[misc]

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", self.matrix.shape[0])

    def structure(self, values: dict[str, Tensor], like: Tensor) -> Structure:
        return _Entries(self.matrix.to(like))

    @property
    def expected_variance(self) -> float:
        if self.normalized:
            return 1.0
        return float(sample_variance(self.matrix.diagonal().sum(), self.matrix.sum(), self.n, self.copies))

    def copied(self, count: int) -> Given:
        eye = torch.eye(count, dtype=self.matrix.dtype, device=self.matrix.device)
        other = Given(torch.kron(eye, self.matrix), self.normalized)
        with_copies(other, count)
        return other

    def at(self, cells: np.ndarray) -> Given:
        index = torch.as_tensor(cells)
        return Given(self.matrix[index[:, None], index], self.normalized)

    def geometry(self, cells: Tensor) -> tuple[Tensor, int]:
        return cells, self.n

    def independent(self) -> np.ndarray:
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import connected_components

        return connected_components(csr_matrix(self.matrix.cpu().numpy() != 0), directed=False)[1]


def tensor(values: Any, like: Tensor | None = None) -> Tensor:
    """Array-likes as float64, or in the dtype and on the device of `like`."""
    if like is None:
        return torch.as_tensor(np.asarray(values, dtype=np.float64))
    return torch.as_tensor(np.asarray(values), dtype=like.dtype, device=like.device)
