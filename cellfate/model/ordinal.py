"""Ordered fates, such as stages: where a latent value falls among cut points."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cellfate.model.families import Family, Outcome, Own
from cellfate.model.links import BINARY_LINKS, SymmetricLink

NARROW = 0.05  # of a proportion, that a level counts for at least where cut points start


class Ordinal(Family):
    r"""Levels 0 to K - 1: `P(y <= j) = F(c_j - eta)`, the cumulative model of McCullagh (1980).

    The first cut point is 0, since the intercept moves all; `phi` (..., 1, K - 2) are the gaps between the others.
    """

    name, links, kind, several = "ordinal", ("logit", "probit"), "levels", True

    def __init__(self, link: str | None = None) -> None:
        super().__init__(link)
        found = BINARY_LINKS[self.link]()
        assert isinstance(found, SymmetricLink)
        self._link = found

    def own(self, outcome: Outcome) -> tuple[Own, ...]:
        assert outcome.levels is not None
        counts = torch.bincount(outcome.y.long(), minlength=outcome.levels).double().cpu()
        below = ((counts / counts.sum()).clamp(min=NARROW).cumsum(0) / (counts / counts.sum()).clamp(min=NARROW).sum())[
            :-1
        ]
        gaps = self._link.forward(below).diff()
        return tuple(Own(f"gap_{k + 1}", 1.0, 1.0, float(gap), 1e-3, 1e2) for k, gap in enumerate(gaps))

    def _cuts(self, outcome: Outcome, phi: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cut points below and above each response, and whether there are any; 0 where not."""
        zero = torch.zeros_like(outcome.y)[..., :1, None] if outcome.y.ndim else torch.zeros_like(outcome.y)[None, None]
        cuts = zero if phi is None else torch.cat([torch.zeros_like(phi[..., :1]), phi.cumsum(-1)], -1)
        last = cuts.shape[-1]
        y = outcome.y.long()
        shape = torch.broadcast_shapes(y.shape, cuts.shape[:-1])
        cuts, y = cuts.expand(*shape, -1), y.expand(shape)
        low = cuts.gather(-1, (y - 1).clamp(min=0)[..., None])[..., 0]
        high = cuts.gather(-1, y.clamp(max=last - 1)[..., None])[..., 0]
        return low, high, y > 0, y < last

    def log_prob(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> Tensor:
        low, high, is_low, is_high = self._cuts(outcome, phi)
        below, above = self._link.log_success(eta - low), self._link.log_success(high - eta)
        if self.link == "logit":
            # s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)), without a difference
            both = is_low & is_high
            width = torch.where(both, high - low, torch.ones_like(low))
            between = torch.where(both, torch.log(-torch.expm1(-width)), 0.0)
            return torch.where(is_low, below, 0.0) + torch.where(is_high, above, 0.0) + between
        return torch.where(is_low & is_high, self._log_between(eta, low, high), torch.where(is_low, below, above))

    def _log_between(self, eta: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """log(F(high - eta) - F(low - eta)), from the tail where both are small."""
        a, b = low - eta, high - eta
        turned = a + b > 0
        a, b = torch.where(turned, -b, a), torch.where(turned, -a, b)
        inside = b > a  # where there is no interval, a number that is not used
        b = torch.where(inside, b, a + 1)
        one, other = self._link.log_success(b), self._link.log_success(a)
        return one + torch.log(-torch.expm1(other - one))

    def derivatives(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low, high, is_low, is_high = self._cuts(outcome, phi)
        below, above = self._link.derivatives(eta - low), self._link.derivatives(high - eta)
        if self.link == "logit":
            first = torch.where(is_low, below[0], 0.0) - torch.where(is_high, above[0], 0.0)
            return first, torch.where(is_low, below[1], 0.0) + torch.where(is_high, above[1], 0.0)
        value = self._log_between(eta, low, high)
        a, b = low - eta, high - eta
        at_a, at_b = (torch.exp(-0.5 * x.square() - 0.5 * math.log(2 * math.pi) - value) for x in (a, b))
        inner = at_a - at_b
        second = a * at_a - b * at_b - inner.square()
        both = is_low & is_high
        first = torch.where(both, inner, torch.where(is_low, below[0], -above[0]))
        return first, torch.where(both, second, torch.where(is_low, below[1], above[1]))

    def start(self, outcome: Outcome) -> Tensor:
        return outcome.y - 0.5

    def above(self, eta: Tensor, phi: Tensor | None = None) -> Tensor:
        """Probabilities (..., K - 1) of being above the first level, the second, and so on."""
        cuts = torch.zeros_like(eta)[..., None]
        if phi is not None:
            rising = torch.cat([torch.zeros_like(phi[..., :1]), phi.cumsum(-1)], -1)
            cuts = rising.expand(*eta.shape, rising.shape[-1])
        return self._link.inverse(eta[..., None] - cuts)

    def probabilities(self, eta: Tensor, phi: Tensor | None = None) -> Tensor:
        """Those (..., K) of each level."""
        above = self.above(eta, phi)
        ends = torch.ones_like(above[..., :1])
        return -torch.cat([ends, above, torch.zeros_like(ends)], -1).diff(dim=-1)

    def inverse_link(self, eta: Tensor) -> Tensor:
        """Probability of being above the lowest level."""
        return self._link.inverse(eta)

    def simulate(self, eta, *, rng, trials=None, variance_residual=None, **own):  # type: ignore[no-untyped-def]
        cuts = np.concatenate([[0.0], np.cumsum(np.asarray(own.get("gaps", (1.0, 1.0)), dtype=float))])
        uniform = torch.as_tensor(rng.uniform(size=np.shape(eta)))
        latent = np.asarray(eta) + self._link.forward(uniform).numpy()
        return (latent[..., None] > cuts).sum(-1).astype(float)

    def distribution_variance(self, eta: Tensor, total: Tensor, phi: Tensor | None = None) -> Tensor:
        return torch.full_like(total, self._link.distribution_variance)
