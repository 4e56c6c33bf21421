"""What is asked of an engine, whichever way it answers.

The prior is a sum of components; the likelihood acts through sites, a Gaussian pseudo-observation per cell. An engine joins the
two. Nothing above this file knows how it is done, and every quantity carries leading batch dimensions (hyperparameter points,
responses).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellfate.kernels.base import Component, Term


@dataclass(frozen=True)
class Sites:
    """Pseudo-observations `shift / precision` with noise `1 / precision`, both (..., n).

    The natural parameters are kept, because a cell that says nothing has precision 0 and no pseudo-observation at all.
    """

    precision: Tensor
    shift: Tensor

    def where(self, keep: Tensor, other: Sites) -> Sites:
        """These sites where `keep` (...,), the others elsewhere."""
        keep = keep[..., None]
        return Sites(torch.where(keep, self.precision, other.precision), torch.where(keep, self.shift, other.shift))

    def __getitem__(self, index: Tensor) -> Sites:
        return Sites(self.precision[index], self.shift[index])


class Posterior(ABC):
    """The Gaussian posterior N(mean, Sigma) of the latent field `u`, the sum of all components, given sites.

    With K the prior covariance and T the diagonal of site precisions: Sigma = (K^-1 + T)^-1, R = (K + T^-1)^-1.
    """

    prior: Any  # what the engine prepared of the components
    sites: Sites
    mean: Tensor  # (..., n)
    variance: Tensor  # (..., n), the diagonal of Sigma
    weights: Tensor  # (..., n), K^-1 mean
    log_det: Tensor  # (...,), log|I + T^1/2 K T^1/2|

    def noted(self, name: str, make: Callable[[], Any]) -> Any:
        """What was worked out from this posterior before under a name, or `make()`, kept as long as the posterior."""
        notes: dict[str, Any] = self.__dict__.setdefault("_notes", {})
        if name not in notes:
            notes[name] = make()
        return notes[name]

    @abstractmethod
    def smooth(self, x: Tensor) -> Tensor:
        """Sigma x for columns x (..., n, k)."""

    @abstractmethod
    def smooth_squared(self, x: Tensor) -> Tensor:
        """(Sigma o Sigma) x, the elementwise square, for columns x (..., n, k)."""

    @abstractmethod
    def residual(self, x: Tensor) -> Tensor:
        """R x for columns x (..., n, k)."""

    @abstractmethod
    def prior_times(self, x: Tensor) -> Tensor:
        """K x for columns x (..., n, k)."""

    @abstractmethod
    def component_times(self, term: Term, x: Tensor) -> Tensor:
        """The same of one component, variance included."""

    @abstractmethod
    def surrogate(self, terms: Sequence[Term], pair: Tensor | None = None, omega: Tensor | None = None) -> Tensor:
        """A scalar (...,) whose derivative in the hyperparameters behind `terms` is

        1/2 b' dK b - 1/2 tr(R dK) + pair' dK b + tr(R diag(omega) R dK),    b = K^-1 mean.
        """

    @abstractmethod
    def component_mean(self, term: Term) -> Tensor:
        """Posterior mean (..., n) of one component."""

    @abstractmethod
    def component_variance(self, term: Term) -> Tensor:
        """Posterior variance (..., n) of one component."""

    @abstractmethod
    def coefficients(self, term: Term) -> tuple[Tensor, Tensor]:
        """Posterior mean (..., m) and covariance (..., m, m) of the coefficients of a basis component."""

    @abstractmethod
    def ancestors(self, term: Term) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance (..., nodes) of a lineage component at every node of its forest."""

    @abstractmethod
    def elsewhere(
        self, term: Term, coordinates: np.ndarray, specimen: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance (..., k) of a spatial field at positions (k, d), in the specimens coded (k,)."""

    @abstractmethod
    def sample(self, terms: Sequence[Term], count: int, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Joint draws (points, n, count) of each component, with one generator per point of the batch."""


class Engine(ABC):
    """Answers for a sum of components over `n` cells."""

    name: str
    n: int

    @abstractmethod
    def condition(self, terms: Sequence[Term], sites: Sites, prior: object | None = None) -> Posterior:
        """Posterior given sites; `prior` is what :meth:`prepare` made of the same terms."""

    @abstractmethod
    def prepare(self, terms: Sequence[Term]) -> object:
        """What does not change while sites do."""

    @abstractmethod
    def select(self, prior: object, index: Tensor) -> object:
        """The prepared prior at some of the batch."""

    @abstractmethod
    def at(self, components: Sequence[Component], cells: np.ndarray) -> Engine:
        """The same engine for the same components over some of the cells."""

    @abstractmethod
    def points_at_once(self, memory: float) -> int:
        """How many hyperparameter points fit into `memory` bytes."""

    def fields(self) -> tuple[str, ...]:
        """Components that are approximated over a range of length-scales, which :meth:`focus` can narrow."""
        return ()

    def focus(
        self, ranges: Mapping[str, tuple[float, float]], information: Mapping[str, float] | None = None
    ) -> Engine:
        """The same engine, its approximations made for these ranges (component -> lower, upper) of the length-scales.

        information: component -> its variance times the precision of a cell's data, where an approximation may be finer for it.
        """
        return self

    def shared(self) -> Engine:
        """The same engine, which keeps what it makes for one response where another may need it."""
        return self

    def pilot(self, components: Sequence[Component], cells: np.ndarray) -> Engine:
        """A cheap engine for a first fit of some of the cells."""
        return self.at(components, cells)

    def report(self, values: Mapping[str, float]) -> tuple[dict[str, Any], list[str]]:
        """What was approximated and how well at hyperparameters `values`, for the results, and what of it is doubtful."""
        return {}, []
