"""Functions of a length-scale as series that are known between two bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Correlation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LogChebyshev:
    """A smooth function of log l between two bounds, as Chebyshev series; where the bounds are one, a constant."""

    lower: float
    upper: float
    coefficients: Tensor  # (order, ...)

    @classmethod
    def through(cls, lower: float, upper: float, values: Tensor) -> LogChebyshev:
        """The series through `values` (order, ...) at `nodes(lower, upper, order)`."""
        order = len(values)
        angle = math.pi * (torch.arange(order, dtype=torch.float64) + 0.5) / order
        transform = torch.cos(torch.arange(order, dtype=torch.float64)[:, None] * angle) * (2 / order)
        transform[0] /= 2
        return cls(lower, upper, (transform.to(values) @ values.flatten(1)).reshape(values.shape))

    @staticmethod
    def nodes(lower: float, upper: float, order: int) -> np.ndarray:
        x = np.cos(np.pi * (np.arange(order) + 0.5) / order)
        return np.exp((math.log(lower) * (1 - x) + math.log(upper) * (1 + x)) / 2)

    def weights(self, lengthscale: Tensor, order: int) -> Tensor:  # (..., order)
        """Chebyshev polynomials by their recurrence: unlike cos(k arccos x) it has a derivative at the bounds too."""
        slack = max(1e-9, 8 * torch.finfo(lengthscale.dtype).eps)  # a bound that went through its logarithm
        inside = (lengthscale >= self.lower * (1 - slack)) & (lengthscale <= self.upper * (1 + slack))
        if not bool(inside.all()):
            outside = lengthscale.detach()[~inside].flatten()[0].item()
            raise ValueError(
                f"length-scale {outside:.6g} is outside [{self.lower:.6g}, {self.upper:.6g}], for which this basis was made."
            )
        width = math.log(self.upper / self.lower) or 1.0
        x = (2 * (lengthscale / self.lower).log() - width) / width
        terms = [torch.ones_like(x), x]
        while len(terms) < order:
            terms.append(2 * x * terms[-1] - terms[-2])
        return torch.stack(terms[:order], -1)

    def __call__(self, lengthscale: Tensor) -> Tensor:  # (..., *the shape of a value)
        weights = self.weights(lengthscale.to(self.coefficients), len(self.coefficients))
        return torch.tensordot(weights, self.coefficients, dims=1)

    def to(self, like: Tensor) -> LogChebyshev:
        return LogChebyshev(self.lower, self.upper, self.coefficients.to(like))


def order_for(correlation: Correlation, lower: float, upper: float, extent: float, accuracy: float) -> int:
    """How many nodes interpolate the correlation at any distance up to `extent` to `accuracy`, whatever l within its bounds.

    Entries of a covariance are such correlations and `S` is linear in them, so its error is known before it is computed.
    """
    if lower == upper:
        return 1
    shortest = min(lower / 100, extent)
    distance = torch.logspace(math.log10(shortest), math.log10(extent), 150, dtype=torch.float64)
    fine = torch.as_tensor(LogChebyshev.nodes(lower, upper, 401))
    exact = correlation(distance / fine[:, None])
    for order in (*range(4, 64, 2), *range(64, 257, 8)):
        nodes = torch.as_tensor(LogChebyshev.nodes(lower, upper, order))
        series = LogChebyshev.through(lower, upper, correlation(distance / nodes[:, None]))
        if float((series(fine.clamp(lower, upper)) - exact).abs().max()) <= accuracy:
            return order
    raise ValueError(
        f"length-scales from {lower:.3g} to {upper:.3g} are too wide a range for one basis: narrow the bounds."
    )
