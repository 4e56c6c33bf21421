"""Distribution functions of the families: the probability of less than what was observed, and of no more than it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import special, stats

from cellfate.errors import DataError

Range = tuple[np.ndarray, np.ndarray]  # P(Y < y) and P(Y <= y)
Own = dict[str, np.ndarray]  # hyperparameters of a family by natural name


def cumulative(family: str, mean: np.ndarray, y: np.ndarray, trials: np.ndarray | None, own: Own) -> Range:
    """P(Y < y) and P(Y <= y) at conditional means, on the scale of a single trial; everything broadcasts.

    The mean of an ordinal fate are the probabilities (..., K) of its levels. `own` holds the hyperparameters of the family:
    `variance_residual`, `dispersion` or `precision`.
    """
    if family not in _OF:
        raise DataError(f"family {family!r} has no distribution function here; those of {', '.join(_OF)} are known.")
    return _OF[family](mean, y, trials, own)


def _continuous(value: np.ndarray) -> Range:
    return value, value


def _gaussian(mean: np.ndarray, y: np.ndarray, trials: np.ndarray | None, own: Own) -> Range:
    return _continuous(special.ndtr((y - mean) / np.sqrt(own["variance_residual"])))


def _bernoulli(mean: np.ndarray, y: np.ndarray, trials: np.ndarray | None, own: Own) -> Range:
    one = y > 0.5
    return np.where(one, 1 - mean, 0.0), np.where(one, 1.0, 1 - mean)


def _binomial(mean: np.ndarray, y: np.ndarray, trials: np.ndarray | None, own: Own) -> Range:
    return stats.binom.cdf(y - 1, trials, mean), stats.binom.cdf(y, trials, mean)


def _poisson(mean: np.ndarray, y: np.ndarray, trials: np.ndarray | None, own: Own) -> Range:
    return stats.poisson.cdf(y - 1, mean), stats.poisson.cdf(y, mean)


def _negative_binomial(mean: np.ndarray, y: np.ndarray, trials: np.ndarray | None, own: Own) -> Range:
    size = 1 / own["dispersion"]
    p = size / (size + mean)
    return stats.nbinom.cdf(y - 1, size, p), stats.nbinom.cdf(y, size, p)


def _beta(mean: np.ndarray, y: np.ndarray, trials: np.ndarray | None, own: Own) -> Range:
    phi = own["precision"]
    return _continuous(special.betainc(mean * phi, (1 - mean) * phi, y))


def _ordinal(mean: np.ndarray, y: np.ndarray, trials: np.ndarray | None, own: Own) -> Range:
    level = np.arange(mean.shape[-1])
    below, upto = level < y[..., None], level <= y[..., None]
    return (mean * below).sum(-1), (mean * upto).sum(-1)


_OF: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray | None, Own], Range]] = {
    "gaussian": _gaussian,
    "bernoulli": _bernoulli,
    "binomial": _binomial,
    "poisson": _poisson,
    "negative_binomial": _negative_binomial,
    "beta": _beta,
    "ordinal": _ordinal,
}
