"""Links of a binary fate: from the latent scale to a probability, with both tails kept exact.

A link is described by the log-probability of a success and of a failure and by the first two derivatives of each, because
that is all that a likelihood needs and because `log(1 - p)` taken from `p` loses the tail.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

LARGEST_ETA = 40.0  # exp(40) is finite in every dtype that we use, and 1 - exp(-exp(40)) is 1


class BinaryLink(ABC):
    """`p = inverse(eta)`; each method returns (success, failure) of shape `eta`."""

    name: str
    distribution_variance: float  # variance of the latent threshold distribution (Nakagawa et al. 2017, table 2)

    @abstractmethod
    def inverse(self, eta: Tensor) -> Tensor: ...

    @abstractmethod
    def log_probabilities(self, eta: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def first(self, eta: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def second(self, eta: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def forward(self, p: Tensor) -> Tensor: ...


class SymmetricLink(BinaryLink):
    """A failure at `eta` is as probable as a success at `-eta`."""

    @abstractmethod
    def log_success(self, eta: Tensor) -> Tensor: ...

    @abstractmethod
    def derivatives(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of :meth:`log_success`."""

    def log_probabilities(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_success(eta), self.log_success(-eta)

    def first(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        return self.derivatives(eta)[0], -self.derivatives(-eta)[0]

    def second(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        return self.derivatives(eta)[1], self.derivatives(-eta)[1]


class Logit(SymmetricLink):
    """Logistic threshold."""

    name = "logit"
    distribution_variance = math.pi**2 / 3

    def inverse(self, eta: Tensor) -> Tensor:
        return torch.sigmoid(eta)

    def log_success(self, eta: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(eta)

    def derivatives(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        failure = torch.sigmoid(-eta)
        return failure, -failure * torch.sigmoid(eta)

    def forward(self, p: Tensor) -> Tensor:
        return torch.logit(p)


class Probit(SymmetricLink):
    """Normal threshold."""

    name = "probit"
    distribution_variance = 1.0

    def inverse(self, eta: Tensor) -> Tensor:
        return torch.special.ndtr(eta)

    def log_success(self, eta: Tensor) -> Tensor:
        return torch.special.log_ndtr(eta)

    def derivatives(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        # the inverse Mills ratio of the lower tail
        hazard = torch.exp(-0.5 * eta.square() - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(eta))
        return hazard, -hazard * (eta + hazard)

    def forward(self, p: Tensor) -> Tensor:
        return torch.special.ndtri(p)


class Cloglog(BinaryLink):
    """Extreme-value threshold: at least one event of a Poisson process with log rate eta."""

    name = "cloglog"
    distribution_variance = math.pi**2 / 6

    def inverse(self, eta: Tensor) -> Tensor:
        return -torch.expm1(-torch.exp(eta.clamp(max=LARGEST_ETA)))

    def log_probabilities(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        rate = torch.exp(eta.clamp(max=LARGEST_ETA))
        # log(1 - exp(-rate)): for a small rate by way of expm1, for a large one by way of log1p
        small = rate < math.log(2)
        near = torch.log(-torch.expm1(-torch.where(small, rate, torch.ones_like(rate))))
        far = torch.log1p(-torch.exp(-torch.where(small, torch.ones_like(rate), rate)))
        # for a vanishing rate log(rate) = eta itself, which does not underflow
        tiny = eta < -30
        return torch.where(tiny, eta, torch.where(small, near, far)), -rate

    @staticmethod
    def _weight(rate: Tensor) -> tuple[Tensor, Tensor]:
        """`w = rate / expm1(rate)` and `1 - rate - w`, the second by its series where the difference would cancel."""
        small = rate < 1e-3
        safe = torch.where(small, torch.ones_like(rate), rate.clamp(max=500.0))
        w = torch.where(small, 1 - rate / 2 + rate.square() / 12, safe / torch.expm1(safe))
        return w, torch.where(small, -rate / 2 - rate.square() / 12, 1 - rate - w)

    def first(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        rate = torch.exp(eta.clamp(max=LARGEST_ETA))
        return self._weight(rate)[0], -rate

    def second(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        rate = torch.exp(eta.clamp(max=LARGEST_ETA))
        w, rest = self._weight(rate)
        return w * rest, -rate

    def forward(self, p: Tensor) -> Tensor:
        return torch.log(-torch.log1p(-p))


BINARY_LINKS: dict[str, type[BinaryLink]] = {link.name: link for link in (Logit, Probit, Cloglog)}
