"""The dispersion of each of many count responses, shrunk towards the trend over responses of a like mean.

A single gene says little about its dispersion beside the variances of ancestry and neighborhood, which make counts vary too; genes
together say how dispersion goes with the mean. As in DESeq2 (Love, Huber & Anders 2014) the trend is a0 + a1 / mean and the spread
about it, less what estimates err, is the width of the prior. Different from there, estimates come from the mixed model itself: one
from fixed effects alone would count ancestry and neighborhood as dispersion, and give the components too little. Sixty
responses spread over all means, on a thousand cells, are enough for the three numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy.optimize import least_squares

from cellfate._runtime import logger, progress
from cellfate.errors import DataError
from cellfate.inference.mode import PILOT_GAIN, find_mode

DISPERSION = "dispersion"
FEWEST = 20  # responses from which on there is a trend
MOST = 60  # responses that it is worked out from
CELLS = 1000  # of each
NARROWEST = 0.5  # sd of the log dispersion about the trend, at least, as in DESeq2
WIDEST = 1.5
Estimate: TypeAlias = tuple[float, float]  # of a log dispersion, and its variance
AT_END = 0.05  # of the log dispersion's bounds: a mode there is no estimate


@dataclass(frozen=True)
class Trend:
    """Dispersion a0 + a1 / mean, and the sd of its log about that."""

    a0: float
    a1: float
    sd: float

    def at(self, counts: np.ndarray) -> float:
        """Expected for a response (n,)."""
        return self.a0 + self.a1 / mean_count(counts)

    def prior(self, counts: np.ndarray) -> tuple[str, float, float]:
        """As a prior of the dispersion."""
        return ("lognormal", self.at(counts), self.sd)


def mean_count(counts: np.ndarray) -> float:
    """Counts per cell, which is also the rate times the mean exposure; one without any has the smallest that could be seen."""
    return float(max(counts.sum(), 0.5) / len(counts))


def dispersion_trend(
    names: Sequence[str],
    read: Callable[[slice], Sequence[Any]],
    parts: Sequence[slice],
    estimates: Callable[[Sequence[str], Sequence[np.ndarray]], Iterable[Estimate | None]],
) -> Trend | None:
    """The trend over the responses that `read` gives by chunks; None where too few can be estimated.

    estimates: of some responses by their names, in order, as :func:`estimate` gives them.
    """
    chosen, means = spread_over_means(names, read, parts)
    found: list[Estimate | None] = []
    with progress(total=len(chosen), desc="trend of the dispersion", unit="response") as bar:
        for places, columns in columns_at(chosen, read, parts):
            for one in estimates([names[i] for i in places], columns):
                found.append(one)
                bar.update(1)
    return trend_through(names, means, dict(zip(chosen, found, strict=True)))


def spread_over_means(
    names: Sequence[str], read: Callable[[slice], Sequence[Any]], parts: Sequence[slice]
) -> tuple[list[int], np.ndarray]:
    """Places, rising, of the responses that the trend is worked out from, and the means of all; NaN where there is none."""
    means = np.concatenate(
        [[math.nan if isinstance(y, DataError) else mean_count(y) for y in read(part)] for part in parts]
    )
    ranked = _ranked(names, means)
    places = ranked[np.unique(np.linspace(0, len(ranked) - 1, min(MOST, len(ranked))).astype(int))]
    return sorted(places.tolist()), means


def _ranked(names: Sequence[str], means: np.ndarray) -> np.ndarray:
    usable = np.flatnonzero(np.isfinite(means))
    return usable[np.lexsort((np.asarray(names, dtype=str)[usable], means[usable]))]


def columns_at(
    chosen: Sequence[int], read: Callable[[slice], Sequence[Any]], parts: Sequence[slice]
) -> Iterator[tuple[list[int], list[Any]]]:
    """Places in each chunk that are among the chosen ones, and the responses there."""
    for part in parts:
        places = [i for i in chosen if part.start <= i < part.stop]
        if places:
            columns = read(part)
            yield places, [columns[i - part.start] for i in places]


def trend_through(names: Sequence[str], means: np.ndarray, found: Mapping[int, Estimate | None]) -> Trend | None:
    """The trend through the estimates of responses at these places; None where there are too few."""
    known = {i: one for i, one in found.items() if one is not None}
    if len(known) < FEWEST // 2:
        logger.info("the dispersion of %d responses only can be estimated: there is no trend to shrink to", len(known))
        return None
    order = [i for i in _ranked(names, means).tolist() if i in known]  # sums in the same order whatever the chunks
    return _through(means[order], np.array([known[i][0] for i in order]), np.array([known[i][1] for i in order]))


def estimate(
    glmm: Any,
    name: str,
    y: np.ndarray,
    X: np.ndarray | None,
    offset: np.ndarray | None,
    terms: Sequence[str] | None,
) -> Estimate | None:
    """Log dispersion at the mode of a fit of some of the cells, and its variance there; None where it is at its bounds."""
    try:
        own = glmm.with_priors({})  # one that others do not share
        model, engine, _ = own.on(y, X, offset, terms=terms, response=name).problem
        cells = model.data.some(CELLS)
        thin = model.at(cells)
        mode = find_mode(thin, engine.pilot(thin.components, cells), glmm.rule, gain=PILOT_GAIN)
    except (DataError, ArithmeticError, ValueError, RuntimeError):
        logger.debug("%s has no estimate of its dispersion", name, exc_info=True)
        return None
    place = [p.name for p in thin.parameters].index(DISPERSION)
    bounds = thin.parameters[place]
    value = float(mode.u[place])
    if value < math.log(bounds.lower) + AT_END or value > math.log(bounds.upper) - AT_END:
        return None
    values, vectors = np.linalg.eigh(mode.curvature.cpu().numpy())
    variance = float((vectors[place] ** 2 / np.clip(values, 1e-3, None)).sum())
    return (value, variance) if math.isfinite(value + variance) else None


def _through(means: np.ndarray, log_dispersion: np.ndarray, variance: np.ndarray) -> Trend:
    """Robust fit on the log scale, each response by what it knows; the spread is what errors do not explain."""
    between = 1.0

    def residuals(x: np.ndarray) -> np.ndarray:
        return (log_dispersion - np.log(np.exp(x[0]) + np.exp(x[1]) / means)) / np.sqrt(variance + between)

    start = np.array([np.median(log_dispersion), np.median(log_dispersion) - 1.0])
    fit = least_squares(residuals, start, loss="soft_l1", bounds=(-12.0, 12.0))
    for _ in range(3):
        raw = residuals(fit.x) * np.sqrt(variance + between)
        total = (1.4826 * float(np.median(np.abs(raw)))) ** 2
        between = float(np.clip(total - float(np.median(variance)), NARROWEST**2, WIDEST**2))
        fit = least_squares(residuals, fit.x, loss="soft_l1", bounds=(-12.0, 12.0))
    trend = Trend(math.exp(fit.x[0]), math.exp(fit.x[1]), math.sqrt(between))
    logger.info(
        "dispersion of %d responses goes as %.3g + %.3g / mean, sd of its log about that %.2f: each gets this as its prior",
        len(means),
        trend.a0,
        trend.a1,
        trend.sd,
    )
    return trend
