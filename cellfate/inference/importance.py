"""Importance draws of a low-dimensional posterior: folded proposals, quasi-random points, Pareto-smoothed weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import RBFInterpolator
from scipy.special import gammaln, logsumexp
from scipy.stats import chi2, norm, qmc

DEGREES = 5.0  # of the Student-t proposal


@dataclass(frozen=True)
class FoldedT:
    """A multivariate Student-t, folded at zero in the coordinates `folded`: the density of `|u|` there.

    The posterior of a standard deviation that piles up at zero is covered as well as one that does not.
    """

    location: np.ndarray  # (d,)
    scale: np.ndarray  # (d, d), lower factor
    folded: np.ndarray  # (d,) bool

    def draw(self, uniform: np.ndarray) -> np.ndarray:
        """Points (s, d) from uniforms (s, d + 1)."""
        z = norm.ppf(uniform[:, :-1])
        radius = np.sqrt(DEGREES / chi2.ppf(uniform[:, -1], DEGREES))
        u = self.location + (z * radius[:, None]) @ self.scale.T
        return np.where(self.folded, np.abs(u), u)

    def log_density(self, u: np.ndarray) -> np.ndarray:
        d, where = len(self.location), np.flatnonzero(self.folded)
        constant = gammaln((DEGREES + d) / 2) - gammaln(DEGREES / 2) - 0.5 * d * np.log(DEGREES * np.pi)
        constant -= np.log(np.diag(self.scale)).sum()
        parts = []
        for signs in itertools.product((1.0, -1.0), repeat=len(where)):
            mirrored = u.copy()
            mirrored[:, where] *= np.array(signs)
            z = np.linalg.solve(self.scale, (mirrored - self.location).T)
            parts.append(constant - 0.5 * (DEGREES + d) * np.log1p((z * z).sum(0) / DEGREES))
        return logsumexp(parts, axis=0)


def uniforms(count: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """Scrambled Sobol points (count, d) in the open unit cube."""
    points = qmc.Sobol(d, seed=rng).random_base2(max(int(np.ceil(np.log2(count))), 1))[:count]
    return np.clip(points, 1e-12, 1 - 1e-12)


def pareto_smooth(log_ratio: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed log weights, normalized, and the shape k of their tail (Vehtari et al. 2024).

    The tail is fitted by the estimator of Zhang & Stephens (2009) with the weakly informative adjustment of k towards 0.5.
    """
    s = len(log_ratio)
    log_weight = log_ratio - log_ratio.max()
    tail = int(min(0.2 * s, 3 * np.sqrt(s)))
    if tail < 5 or np.ptp(log_weight) < 1e-12:
        return log_weight - logsumexp(log_weight), -np.inf if tail >= 5 else np.nan
    order = np.argsort(log_weight)
    cut = log_weight[order[-tail - 1]]
    excess = np.exp(log_weight[order[-tail:]]) - np.exp(cut)
    k, sigma = _generalized_pareto(excess)
    if np.isfinite(k):
        p = (np.arange(tail) + 0.5) / tail
        quantile = sigma * np.expm1(-k * np.log1p(-p)) / k if abs(k) > 1e-12 else -sigma * np.log1p(-p)
        log_weight[order[-tail:]] = np.minimum(np.log(quantile + np.exp(cut)), 0.0)
    return log_weight - logsumexp(log_weight), float(k)


def _generalized_pareto(x: np.ndarray) -> tuple[float, float]:
    x = np.sort(np.maximum(x, 1e-300))
    n = len(x)
    m = 30 + int(np.sqrt(n))
    b = 1 / x[-1] + (1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))) / (3 * x[int(n / 4 + 0.5) - 1])
    with np.errstate(all="ignore"):
        k = np.log1p(-b[:, None] * x).mean(1)
        profile = n * (np.log(-b / k) - k - 1)
        weight = np.exp(profile - logsumexp(profile[np.isfinite(profile)]))
    keep = np.isfinite(weight) & (weight > 0)
    b_hat = float((b[keep] * weight[keep]).sum() / weight[keep].sum())
    k_hat = float(np.log1p(-b_hat * x).mean())
    sigma = -k_hat / b_hat
    return (n * k_hat + 5.0) / (n + 10.0), sigma


def effective(log_weight: np.ndarray) -> float:
    """Effective number of draws of normalized log weights."""
    return float(np.exp(-logsumexp(2 * log_weight)))


def systematic(weight: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices (count,) resampled in proportion to `weight`, with one random number."""
    edges = np.cumsum(weight / weight.sum())
    return np.minimum(np.searchsorted(edges, (np.arange(count) + rng.random()) / count), len(weight) - 1)


class Surface:
    """Smooth interpolation through scattered points z (s, d) of functions (s, k) that are known there."""

    def __init__(self, z: np.ndarray, values: np.ndarray, degree: int) -> None:
        self._z, self._values, self.degree = z, values, degree
        self._interpolate = self._through(z, values)

    def _through(self, z: np.ndarray, values: np.ndarray) -> RBFInterpolator:
        return RBFInterpolator(z, values, kernel="cubic", degree=self.degree)

    @staticmethod
    def degrees(points: int, d: int) -> tuple[int, ...]:
        """Degrees of the polynomial below that may be tried: a quadratic through hardly more points than its terms is noise."""
        return (1, 2) if points >= 1.5 * (d + 1) * (d + 2) / 2 else (1,)

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return self._interpolate(z)

    def error(self, weight: np.ndarray, folds: int = 8) -> float:
        """Error of the first function at points left out, fold by fold: root of the mean square weighted by `weight` (s,)."""
        index = np.arange(len(self._z))
        square = np.zeros(len(index))
        for fold in range(folds):
            out = index % folds == fold
            fit = self._through(self._z[~out], self._values[~out, :1])
            square[out] = (fit(self._z[out])[:, 0] - self._values[out, 0]) ** 2
        return float(np.sqrt((weight * square).sum() / weight.sum()))
