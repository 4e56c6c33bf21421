"""Fates as probabilities, such as the score of a classifier."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cellfate.model.families import Family, Outcome, Own

LARGEST_ETA = 300.0  # beyond it a probability is 0 or 1 in every dtype


class Beta(Family):
    r"""`y ~ Beta(mu phi, (1 - mu) phi)` strictly between 0 and 1, mean mu and precision phi (Ferrari & Cribari-Neto 2004)."""

    name, links, kind, parameter = "beta", ("logit",), "proportion", "precision"

    def own(self, outcome: Outcome) -> tuple[Own, ...]:
        return (Own("precision", 10.0, 1.5, 5.0, 1e-2, 1e6),)

    @staticmethod
    def _shapes(eta: Tensor, phi: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert phi is not None
        eta = eta.clamp(-LARGEST_ETA, LARGEST_ETA)
        mu, other = torch.sigmoid(eta), torch.sigmoid(-eta)
        return mu, other, phi * mu, phi * other

    def log_prob(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> Tensor:
        assert phi is not None
        _, _, a, b = self._shapes(eta, phi)
        constant = torch.lgamma(phi) - torch.lgamma(a) - torch.lgamma(b)
        return constant + (a - 1) * torch.log(outcome.y) + (b - 1) * torch.log1p(-outcome.y)

    def derivatives(self, outcome: Outcome, eta: Tensor, phi: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mu, other, a, b = self._shapes(eta, phi)
        # a' = a (1 - mu), b' = -b mu; each digamma is multiplied by its own shape, so that a tail does not overflow
        pull = torch.logit(outcome.y) - torch.digamma(a) + torch.digamma(b)
        slope = a * other
        trigamma = torch.polygamma(1, a) + torch.polygamma(1, b)
        return slope * pull, slope * (other - mu) * pull - slope.square() * trigamma

    def start(self, outcome: Outcome) -> Tensor:
        return torch.logit(outcome.y)

    def inverse_link(self, eta: Tensor) -> Tensor:
        return torch.sigmoid(eta)

    def simulate(self, eta, *, rng, trials=None, variance_residual=None, **own):  # type: ignore[no-untyped-def]
        phi = own.get("precision", 10.0)
        mu = 1 / (1 + np.exp(-np.asarray(eta)))
        y = rng.beta(mu * phi, (1 - mu) * phi)
        return np.clip(y, np.finfo(float).tiny, 1 - np.finfo(float).epsneg)

    def noise(self, mean: Tensor, phi: Tensor | None = None) -> Tensor:
        assert phi is not None
        return mean * (1 - mean) / (1 + phi)

    def distribution_variance(self, eta: Tensor, total: Tensor, phi: Tensor | None = None) -> Tensor:
        """Variance of the logit of a beta variable, exactly: trigamma(mu phi) + trigamma((1 - mu) phi), averaged over cells."""
        _, _, a, b = self._shapes(eta, phi)
        return (torch.polygamma(1, a) + torch.polygamma(1, b)).mean(-1, keepdim=True).expand_as(total)
