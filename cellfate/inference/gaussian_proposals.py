"""Proposals for the hyperposteriors of many responses at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln
from scipy.stats import chi2, norm

from cellfate.inference.importance import DEGREES, uniforms


class Proposals:
    """Folded Student-t distributions, see :class:`cellfate.inference.importance.FoldedT`, one a response."""

    def __init__(self, location: np.ndarray, factor: np.ndarray, folded: np.ndarray) -> None:
        self.location, self.factor, self.folded = location, factor, folded

    def draw(self, count: int, turns: Sequence[np.random.Generator]) -> np.ndarray:  # (g, count, d)
        """The same points for all, each time turned about the centre at random."""
        d = self.location.shape[1]
        z = _standard(count, d)
        turn = np.linalg.qr(np.array([rng.standard_normal((d, d)) for rng in turns]))[0]
        u = self.location[:, None] + z @ (self.factor @ turn).mT
        return np.where(self.folded, np.abs(u), u)

    def log_density(self, u: np.ndarray) -> np.ndarray:  # (g, t, d) -> (g, t)
        d, where = u.shape[-1], np.flatnonzero(self.folded)
        constant = gammaln((DEGREES + d) / 2) - gammaln(DEGREES / 2) - 0.5 * d * np.log(DEGREES * np.pi)
        constant = constant - np.log(np.diagonal(self.factor, axis1=1, axis2=2)).sum(-1)
        inverse, total = np.linalg.inv(self.factor).mT, np.zeros(u.shape[:2])
        for signs in itertools.product((1.0, -1.0), repeat=len(where)):
            mirror = np.ones(d)
            mirror[where] = signs
            square = (((u * mirror - self.location[:, None]) @ inverse) ** 2).sum(-1)
            total += (1 + square / DEGREES) ** (-0.5 * (DEGREES + d))
        with np.errstate(divide="ignore"):
            return np.log(total) + constant[:, None]


_POINTS: dict[tuple[int, int], np.ndarray] = {}


def _standard(count: int, d: int) -> np.ndarray:
    """Quasi-random points (count, d) of a standard Student-t; always the same ones."""
    if (count, d) not in _POINTS:
        uniform = uniforms(count, d + 1, np.random.default_rng(0))
        radius = np.sqrt(DEGREES / chi2.ppf(uniform[:, -1], DEGREES))
        _POINTS[count, d] = norm.ppf(uniform[:, :-1]) * radius[:, None]
    return _POINTS[count, d]


def factor_of(curvature: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Lower factors of the inverse curvatures, no wider than three units in any direction."""
    values, vectors = np.linalg.eigh(curvature * unit[:, :, None] * unit[:, None, :])
    values = np.clip(values, 1 / 9, 1e8)
    return np.linalg.cholesky((vectors / values[:, None, :]) @ vectors.mT * unit[:, :, None] * unit[:, None, :])
