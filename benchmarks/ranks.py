"""Are ranks uniform? Simulation-based calibration (Talts et al. 2018) by the largest excursion of their distribution function.

A truth drawn from the prior and a posterior drawn from the data that it made are exchangeable, so that the rank of the truth among
posterior draws is uniform, whatever the data. At each of K cuts z the number of N ranks below it is binomial(N, z), and the
statistic is the smallest two-sided p over the cuts, compared with that of N uniform numbers: its p is exact up to the simulation of
the null, whatever N. The band is made of the pointwise binomial intervals at the level at which all of them together hold 95% of uniform
samples (Säilynoja, Bürkner and Vehtari 2022, algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.stats import binom

CUTS = 100  # at most; no more than there are ranks
SIMULATED = 20_000  # uniform samples behind a p and a band


@dataclass(frozen=True)
class Uniformity:
    """p of the largest excursion, and what kind it is: `mean` 0.5 and `spread` 1 (12 times the mean square from 0.5) if uniform.

    A spread above 1 are posteriors that are too narrow, below 1 too wide; a mean above 0.5 are estimates that are too low.
    """

    p: float
    mean: float
    spread: float


def cuts(n: int) -> np.ndarray:
    """Where the distribution function is looked at."""
    k = max(min(n, CUTS), 2)
    return np.arange(1, k) / k


def uniformity(ranks: np.ndarray) -> Uniformity:
    """Of ranks as fractions of the draws, of which there are many."""
    n = len(ranks)
    below = (np.asarray(ranks)[:, None] <= cuts(n)).sum(0)
    p = (1 + (_null(n) <= _smallest(below, n) * (1 + 1e-9)).sum()) / (1 + SIMULATED)
    return Uniformity(float(p), float(np.mean(ranks)), float(12 * np.mean((np.asarray(ranks) - 0.5) ** 2)))


def band(n: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts, and within what the distribution function of n uniform ranks stays at all of them together."""
    z, gamma = cuts(n), np.quantile(_null(n), 1 - level)
    return z, binom.ppf(gamma / 2, n, z) / n, binom.ppf(1 - gamma / 2, n, z) / n


@cache
def _null(n: int) -> np.ndarray:
    """The statistic over samples of uniform ranks."""
    k = len(cuts(n)) + 1
    counts = np.random.default_rng(n).multinomial(n, np.full(k, 1 / k), size=SIMULATED)
    return _smallest(counts.cumsum(1)[:, :-1], n)


def _smallest(below: np.ndarray, n: int) -> np.ndarray:
    """Smallest two-sided p over the cuts: numbers below them are in the last dimension."""
    z = cuts(n)
    table = binom.cdf(np.arange(-1, n + 1)[:, None], n, z)  # (n + 2, cuts): P(fewer than i), as counts are few
    at = np.arange(len(z))
    p = 2 * np.minimum(table[below + 1, at], 1 - table[below, at])
    return np.minimum(p, 1.0).min(-1)
