"""The hyperposterior: quasi-random points about the mode, evaluated as one batch and reweighted to the truth.

The weights are importance ratios, Pareto-smoothed. Between the evaluated points the log posterior is smooth
(in coordinates in which an absent component is an ordinary point), so that many more draws than evaluations can be taken from an
interpolant, once more batches have filled the gaps that matter. The interpolant's error at points left out is reported, and where
it stays large the evaluated points are used alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import KDTree
from scipy.special import logsumexp

from cellfate.engines.base import Engine
from cellfate.inference.importance import FoldedT, Surface, effective, pareto_smooth, systematic, uniforms
from cellfate.inference.mode import LARGE, MEMORY, Mode
from cellfate.inference.points import Points, evaluate_points
from cellfate.inference.sites import Rule
from cellfate.model.glmm import Model
from cellfate.model.priors import Flat

INFLATE = 1.3  # of the proposal's scale
MANY = 16  # points at once from which on they are cheap
FILL = 0.25  # share of the points that fill gaps
CLOUD = 2**14  # draws weighted by the interpolant
DRAWS = 4000  # equally weighted, kept
LARGEST_K = 0.7
LARGEST_ERROR = 0.3  # of the interpolant, in log density: more points are placed while it is larger
REACH = 2.5  # posterior sds from evaluated points within which gaps are filled where a point is dear: further out it takes longest
BEND, STRAIGHT = 2.0, 1e6  # posterior sds up to which an sd is taken as it is, and beyond which like its log; of others
DEEP, SHALLOW = 25.0, 12.0  # nats below which a density is as good as none; where points are few
USELESS = 1.0  # error from which on the interpolant is not used at all
ROUNDS = 3  # of proposals
LEAST = 4  # points per coordinate and one more, without which nothing is interpolated


def too_large(k: float) -> str:
    """A k-hat beyond the largest in words, with so many digits that it is seen to be: 0.7004, not 0.70."""
    digits = 2
    while float(f"{k:.{digits}f}") <= LARGEST_K < k:
        digits += 1
    return f"{k:.{digits}f}, above {LARGEST_K}"


@dataclass(frozen=True)
class Hyperposterior:
    """Draws of hyperparameters and fixed effects, and what was integrated over them.

    values: natural value (DRAWS,) by name; beta: (DRAWS, p); effects: component -> mean and sd (n,); realized: component ->
    (DRAWS,) of the sample variance over the cells of what the component is expected to hold of the whole field, and "shared" for twice the
    covariance of what two of them are.
    """

    values: dict[str, np.ndarray]
    beta: np.ndarray
    effects: dict[str, tuple[np.ndarray, np.ndarray]]
    realized: dict[str, np.ndarray]
    log_evidence: float
    pareto_k: float
    interpolation_error: float
    effective_draws: float  # draws that a plain sample would need for the same precision
    evaluations: int
    unsettled: int  # points whose site updates did not converge


def integrate(model: Model, engine: Engine, rule: Rule, mode: Mode, rng: np.random.Generator) -> Hyperposterior:
    """Integrate over the hyperparameters."""
    d = len(mode.u)
    if d == 0:
        points = evaluate_points(model, engine, rule, mode, np.zeros((1, 0)), rng)
        draws = _with_beta(np.zeros((DRAWS, 0)), points.beta.repeat(DRAWS, 0), points.beta_factor.repeat(DRAWS, 0), rng)
        return _summarize(
            model, points, np.ones(1), draws, _Diagnostics(float(points.log_posterior[0]), -np.inf, 0.0, DRAWS), rng
        )
    most = 48 if d <= 3 else 96 if d <= 5 else 192
    if engine.points_at_once(MEMORY) >= MANY and model.data.n <= LARGE:
        count = most = min(2 * most, 256)
        fill = int(FILL * count)
    else:  # where points are dear, as few as the interpolant can be judged by, and then as many as it turns out to need
        terms = (d + 1) * (d + 2) // 2  # of a quadratic
        count, fill = 16 + 6 * d, 4 + 2 * d
        if model.data.n > LARGE:
            fill = 1 + d
            count = max(min(2 * terms, 10 + 6 * d), LEAST * (d + 1) + fill)
    most *= 2
    location, scale, folded = mode.u.cpu().numpy(), _factor(model, mode), _folded(model)
    reach = REACH if model.data.n > LARGE else np.inf
    proposals: list[FoldedT] = []
    counts: list[int] = []
    kept: list[float] = []  # share of the draws that lies within the bounds
    drawn: list[Points] = []
    filled: list[Points] = []
    while True:
        proposals.append(FoldedT(location, INFLATE * scale, folded))
        u = _inside(model, proposals[-1].draw(uniforms(4 * count, d + 1, rng)))
        kept.append(len(u) / (4 * count))
        u = u[: count - fill]
        counts.append(len(u))
        drawn.append(evaluate_points(model, engine, rule, mode, u, rng))
        points = Points.join(drawn + filled)
        cloud = _Cloud(model, mode, proposals, counts, rng)
        last, off = len(proposals) == ROUNDS, False
        if cloud.fit(points):
            off = cloud.pareto_k > LARGEST_K
            while np.isfinite(cloud.error) and len(points.u) < most and (last or not off):
                gaps, expected, weight = cloud.gaps(fill, reach)
                filled.append(evaluate_points(model, engine, rule, mode, gaps, rng))
                points = Points.join(drawn + filled)
                if cloud.fit(points):
                    cloud.tested(expected, weight, filled[-1].log_posterior)
                # where points are few it may only show now, where they are many more of them mend it
                off = model.data.n > LARGE and cloud.pareto_k > LARGEST_K
                if cloud.error <= LARGEST_ERROR:
                    break
        if last or not off:
            break
        location, scale = cloud.moments()  # the proposal was off: move it to where the weight is

    if cloud.error <= USELESS:
        return _summarize(model, points, cloud.mass, cloud.draws(rng), _diagnosed(cloud), rng, cloud.quadrature)
    points = Points.join(drawn)  # the points that fill gaps are no draws of a proposal, and have no weight of their own
    log_ratio = np.nan_to_num(points.log_posterior - _mixture(proposals, counts, points.u), nan=-np.inf, neginf=-np.inf)
    log_weight, k = pareto_smooth(log_ratio)
    chosen = systematic(np.exp(log_weight), DRAWS, rng)[rng.permutation(DRAWS)]
    draws = _with_beta(points.u[chosen], points.beta[chosen], points.beta_factor[chosen], rng)
    log_evidence = float(logsumexp(log_ratio) - np.log(len(log_ratio) / np.mean(kept)))
    diagnostics = _Diagnostics(log_evidence, k, cloud.error, effective(log_weight))
    return _summarize(model, points, np.exp(log_weight), draws, diagnostics, rng)


@dataclass(frozen=True)
class _Diagnostics:
    log_evidence: float
    pareto_k: float
    interpolation_error: float
    effective_draws: float


def _diagnosed(cloud: _Cloud) -> _Diagnostics:
    return _Diagnostics(cloud.log_evidence, cloud.pareto_k, cloud.error, cloud.effective_draws)


class _Cloud:
    """Many draws of the proposals, weighted by an interpolant through the evaluated points."""

    def __init__(
        self, model: Model, mode: Mode, proposals: list[FoldedT], counts: list[int], rng: np.random.Generator
    ) -> None:
        self._proposals, self._counts = proposals, counts
        self._scale, self._centre = _factor(model, mode), mode.u.cpu().numpy()
        sd = np.sqrt((self._scale**2).sum(1))
        self._folded, self._sd = _folded(model), sd
        self._curve = np.where(self._folded, BEND * sd, STRAIGHT * sd)
        self._logs = np.array([p.scale == "log" and p.name.startswith("sd_") for p in model.parameters], dtype=bool)
        d, total = len(self._centre), sum(counts)
        drawn = [
            q.draw(uniforms(max(16, CLOUD * c // total), d + 1, rng)) for q, c in zip(proposals, counts, strict=True)
        ]
        self._drawn = sum(len(u) for u in drawn)
        u = _inside(model, np.concatenate(drawn))
        # neighbors in space are neighbors in order, so that systematic resampling spreads over the space
        self._u = u[KDTree(self._whiten(u), leafsize=1).indices]
        self._z = self._whiten(self._u)
        self._log_proposal, self._large = _mixture(proposals, counts, self._u), model.data.n > LARGE
        self.error, self.log_evidence, self.pareto_k, self.effective_draws = np.inf, np.nan, np.inf, 0.0

    def _whiten(self, u: np.ndarray) -> np.ndarray:
        return np.linalg.solve(self._scale, (u - self._centre).T).T

    def _bend(self, u: np.ndarray) -> np.ndarray:
        """The same with an sd as it is next to zero, and like its log far from it."""
        slope = 1 / np.hypot(1, self._centre / self._curve)
        bent = self._curve * (np.arcsinh(u / self._curve) - np.arcsinh(self._centre / self._curve)) / slope
        return np.linalg.solve(self._scale, bent.T).T

    def _variances(self, u: np.ndarray) -> np.ndarray:
        """The same by variances in place of sds: a ridge where data know little but the sum of two of them is straight."""
        x, c = u - self._centre, np.maximum(np.abs(self._centre), self._sd)
        squared = np.where(
            self._folded, (u * u - self._centre**2) / (2 * c), np.where(self._logs, np.expm1(2 * x) / 2, x)
        )
        return np.linalg.solve(self._scale, squared.T).T

    def fit(self, points: Points) -> bool:
        """Interpolate through `points`; False where there are too few.

        With many cells the log posterior is all but quadratic and points are few, so it is taken as it is; its ratio to the proposal,
        which is flatter in the tails, serves better where points are many.
        """
        seen = np.isfinite(points.log_posterior)
        proposal = _mixture(self._proposals, self._counts, points.u)
        log_ratio = np.where(seen, points.log_posterior - proposal, -np.inf)
        target = points.log_posterior if self._large else log_ratio
        highest = target[seen].max(initial=-np.inf)
        # a point that is all but impossible says so, and no more: its depth would bend the interpolant everywhere
        target, needed = np.maximum(target, highest - DEEP), LEAST * (len(self._centre) + 1)
        if seen.sum() < needed:
            return False
        lowest = min(highest - SHALLOW, np.sort(target[seen])[-needed]) if self._large else -np.inf
        good = seen & (target >= lowest)
        rest = self._log_proposal if self._large else 0.0
        rows, columns = np.tril_indices(points.beta.shape[1])
        values = np.column_stack([target[good], points.beta[good], points.beta_factor[good][:, rows, columns]])
        self._distance, nearest = KDTree(self._whiten(points.u[good])).query(self._z)
        # where it extrapolates, the ratio is not trusted to be much above what was seen, there or near
        cap = np.full(len(self._z), log_ratio[seen].max() + 1.0)
        if self._large:
            far, any_nearest = KDTree(self._whiten(points.u[seen])).query(self._z)
            cap = np.minimum(cap, log_ratio[seen][any_nearest] + 0.5 + far)
        self.error, best = np.inf, None
        # which coordinates and which polynomial make a log density simple differs: the points decide
        ways = (self._whiten, self._bend, self._variances) if self._logs.any() else (self._whiten, self._bend)
        for coordinates in ways:
            z, cloud = coordinates(points.u[good]), coordinates(self._u)
            for surface in (Surface(z, values, degree) for degree in Surface.degrees(*z.shape)):
                found = surface(cloud)
                log_weight = np.minimum(found[:, 0] - rest, cap)
                smoothed, k = pareto_smooth(log_weight)
                error = surface.error(np.bincount(nearest, np.exp(smoothed), minlength=len(z)))
                if error < self.error:
                    self.error, self.pareto_k, self._found, self._weight = error, k, found, np.exp(smoothed)
                    self.log_evidence = float(logsumexp(log_weight) - np.log(self._drawn))
                    self.effective_draws = effective(smoothed)
                    best = z, cloud, surface.degree
        if best is None:  # no error is a number
            return False
        z, cloud, degree = best
        self.mass = np.zeros(len(good))  # posterior mass nearest to each evaluated point
        self.mass[good] = np.bincount(nearest, self._weight, minlength=len(z))
        # of each point on the interpolant, for integrals of what is kept
        influence = Surface(z, np.eye(len(z)), degree)(cloud)
        self.quadrature = np.zeros(len(good))
        self.quadrature[good] = self._weight @ influence
        return True

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (d,) and lower factor of the covariance (d, d)."""
        mean = self._weight @ self._u
        centered = self._u - mean
        covariance = (centered * self._weight[:, None]).T @ centered
        return mean, np.linalg.cholesky(covariance + 1e-2 * self._scale @ self._scale.T)

    def tested(self, expected: np.ndarray, weight: np.ndarray, found: np.ndarray) -> None:
        """Where points are few, the error is also by what was `expected` of the last ones, and what they would weigh, before they were
        `found`.

        Leaving out some of few points asks more than is asked of the interpolant; five points that were gaps are few. Of the two the
        root mean square.
        """
        if self._large:
            square = np.where(np.isfinite(found), found - expected, DEEP) ** 2
            self.error = float(np.sqrt((self.error**2 + np.average(square, weights=weight)) / 2))

    def gaps(self, count: int, reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points (count, d) that are far from every evaluated one, up to `reach`, weighed by what they would contribute.

        With what is expected (count,) there of what is interpolated, and their weights.
        """
        keep = (self._weight > 1e-4 * self._weight.max()) & (self._distance < max(reach, 1.001 * self._distance.min()))
        z, whole, distance = self._z[keep], self._weight[keep], self._distance[keep]
        weight = np.sqrt(whole)
        chosen = []
        for _ in range(count):
            chosen.append(int(np.argmax(weight * distance)))
            distance = np.minimum(distance, np.linalg.norm(z - z[chosen[-1]], axis=1))
        return self._u[keep][chosen], self._found[keep, 0][chosen], whole[chosen]

    def draws(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Equally weighted draws of hyperparameters (DRAWS, d) and fixed effects (DRAWS, p)."""
        chosen = systematic(self._weight, DRAWS, rng)[rng.permutation(DRAWS)]
        p = int((np.sqrt(9 + 8 * (self._found.shape[1] - 1)) - 3) / 2)  # 1 + p + p (p + 1) / 2 columns
        rows, columns = np.tril_indices(p)
        factor = np.zeros((DRAWS, p, p))
        factor[:, rows, columns] = self._found[chosen, 1 + p :]
        return _with_beta(self._u[chosen], self._found[chosen, 1 : 1 + p], factor, rng)


def _folded(model: Model) -> np.ndarray:
    return np.array([p.scale == "sd" for p in model.parameters])


def _inside(model: Model, u: np.ndarray) -> np.ndarray:
    low, high = (np.array(b) for b in zip(*(p.bounds for p in model.parameters), strict=True))
    return u[((u >= low) & (u <= high)).all(1)]


def _mixture(proposals: list[FoldedT], counts: list[int], u: np.ndarray) -> np.ndarray:
    share = np.log(np.array(counts) / sum(counts))
    return logsumexp([s + p.log_density(u) for s, p in zip(share, proposals, strict=True)], axis=0)


def _factor(model: Model, mode: Mode) -> np.ndarray:
    """Lower factor of the inverse curvature, no wider than three units in any direction."""
    unit = np.array([p.start if p.scale == "sd" else 1.0 for p in model.parameters])
    values, vectors = np.linalg.eigh(mode.curvature.cpu().numpy() * unit[:, None] * unit)
    values = np.clip(values, 1 / 9, None)
    return np.linalg.cholesky((vectors / values) @ vectors.T * unit[:, None] * unit)


def _with_beta(
    u: np.ndarray, mean: np.ndarray, factor: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    return u, mean + (factor @ rng.standard_normal((*mean.shape, 1)))[..., 0]


def _summarize(
    model: Model,
    points: Points,
    weight: np.ndarray,
    draws: tuple[np.ndarray, np.ndarray],
    diagnostics: _Diagnostics,
    rng: np.random.Generator,
    quadrature: np.ndarray | None = None,
) -> Hyperposterior:
    """Mixtures over the points: means with the weights of an interpolant through them, if any, spreads with weights that are positive."""
    proper = not any(isinstance(p.prior, Flat) for p in model.parameters)  # a flat prior has no evidence
    effects, used = {}, weight > 0  # a point whose updates failed has no weight, and numbers that are none
    for name, mean in points.means.items():
        average = (
            weight[used] @ mean[used] if quadrature is None else quadrature @ np.where(quadrature[:, None], mean, 0.0)
        )
        effects[name] = (average, np.sqrt(weight[used] @ (points.spreads[name][used] + (mean[used] - average) ** 2)))

    fields = next(iter(points.realized.values())).shape[1]
    pick = systematic(np.repeat(weight, fields), DRAWS, rng)
    u, beta = draws
    theta = model.theta(torch.as_tensor(u).to(model.data.offset))
    return Hyperposterior(
        values={name: value.cpu().numpy() for name, value in theta.values.items()},
        beta=beta,
        effects=effects,
        realized={name: x.reshape(-1)[pick] for name, x in points.realized.items()},
        log_evidence=diagnostics.log_evidence if proper else np.nan,
        pareto_k=float(diagnostics.pareto_k),
        interpolation_error=diagnostics.interpolation_error,
        effective_draws=diagnostics.effective_draws,
        evaluations=len(points.u),
        unsettled=points.unsettled,
    )
