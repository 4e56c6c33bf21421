"""Landmarks of a specimen, the eigenvectors among them, and the columns that these become."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from cellfate.places.series import Correlation, LogChebyshev

RESOLVED = (
    1e-11  # eigenvalues below this part of the largest are rounding: what belongs to them cannot be carried elsewhere
)
STEP = 32  # the rank is a multiple
NATS = 0.05  # that truncated directions may cost of the log evidence: half of what the log evidence then errs by
FINE = 1024  # columns up to which more are taken for it
ALL = 3072  # columns of all specimens
BLENDED = 4  # length-scales between the bounds whose covariances are blended
CHUNK = 2**20  # entries of a covariance at a time: they stay in cache, and memory is columns, not landmarks


def _distance(a: Tensor, b: Tensor) -> Tensor:
    # from differences: the inner-product form loses half the digits for close cells
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(CHUNK // max(columns, 1), 1)
    return [slice(i, i + step) for i in range(0, rows, step)]


@dataclass(frozen=True)
class Blend:
    """A weighted mean of the covariances at several length-scales, whose leading eigenvectors serve all of these.

    Eigenvectors at a short one alone are zero in cells far from all others, which a longer one connects; those at a long one alone
    are rounding errors from some column on. Weights rise as the square: in the plane, what is smooth has that much more variance.
    """

    correlation: Correlation
    lower: float
    upper: float

    def __call__(self, distance: Tensor) -> Tensor:
        if self.lower == self.upper:
            return self.correlation(distance / self.lower)
        at = self.lower * (self.upper / self.lower) ** ((np.arange(BLENDED) + 0.5) / BLENDED)
        weight = at**2 / (at**2).sum()
        total = torch.zeros_like(distance)
        for l, w in zip(at.tolist(), weight.tolist(), strict=True):
            total += w * self.correlation(distance / l)
        return total


@dataclass(frozen=True, eq=False)
class FieldBlock:
    """The field of one specimen: `phi S(l) phi'` among its cells."""

    cells: Tensor  # (n_s,), their places among all cells
    phi: Tensor  # (n_s, m_s)
    series: LogChebyshev  # of S(l) (m_s, m_s)
    captured: LogChebyshev  # of diag(phi S(l) phi') (n_s,)
    landmarks: Tensor  # (u, d)
    lift: Tensor  # (u, m_s): phi at a position is its covariance with the landmarks under the blend, times this


@dataclass(frozen=True)
class Plan:
    """What the drafts of all specimens have in common."""

    xyz: np.ndarray  # (n, d)
    correlation: Correlation
    blend: Blend
    reference: float
    lower: float
    upper: float
    order: int  # nodes for S
    coarse: int  # nodes for the variance captured, where landmarks stand for the cells


@dataclass(frozen=True, eq=False)
class Draft:
    """A specimen's landmarks and the eigenvectors among them, before it is known how many are kept."""

    code: int
    cells: np.ndarray  # (n_s,)
    landmarks: Tensor  # (u, d)
    count: Tensor  # (u,), cells that each stands for
    position: (
        np.ndarray | None
    )  # (n_s,), the landmark at which a cell is; None where landmarks are not positions of cells
    values: Tensor  # (u,), falling
    vectors: Tensor  # (u, u)
    captured: Tensor  # (u,), variance along each of them at the reference

    def block(self, m: int, plan: Plan, like: Tensor) -> tuple[FieldBlock, np.ndarray]:
        """The block with the `m` leading columns, and its part of the errors (see `_measure`)."""
        values, vectors = self.values[:m], self.vectors[:, :m]
        root = self.count.sqrt()[:, None]
        floor = RESOLVED * float(self.values[0])
        lift = root * vectors * (values / (values.square() + floor**2))
        if self.position is None:
            phi = extend(plan.xyz[self.cells], self.landmarks, lift, plan.blend)
        else:
            phi = (vectors / root)[torch.as_tensor(self.position, device=vectors.device)]
        series = self._series(root * vectors, plan)
        captured = self._captured(phi, series, plan.coarse)
        measure = self._measure(phi, series, captured, plan)
        cells = torch.as_tensor(self.cells, device=like.device)
        return FieldBlock(cells, phi.to(like), series.to(like), captured.to(like), self.landmarks, lift), measure

    def _series(self, weighted: Tensor, plan: Plan) -> LogChebyshev:
        distance = _distance(self.landmarks, self.landmarks)
        spectra = weighted.new_zeros(plan.order, weighted.shape[1], weighted.shape[1])
        for spectrum, l in zip(spectra, LogChebyshev.nodes(plan.lower, plan.upper, plan.order), strict=True):
            for rows in _chunks(len(distance), len(distance)):
                spectrum += weighted[rows].T @ (plan.correlation(distance[rows] / l) @ weighted)
        return LogChebyshev.through(plan.lower, plan.upper, (spectra + spectra.mT) / 2)

    def _captured(self, phi: Tensor, series: LogChebyshev, coarse: int) -> LogChebyshev:
        lower, upper = series.lower, series.upper
        if self.position is not None:  # few positions: as exact as S itself
            first, back = np.unique(self.position, return_index=True, return_inverse=True)[1:]
            rows = phi[torch.as_tensor(first, device=phi.device)]
            few = torch.stack([(rows @ c * rows).sum(-1) for c in series.coefficients])
            return LogChebyshev(lower, upper, few[:, torch.as_tensor(back, device=phi.device)])
        # n m^2 flops a node, the most expensive step for many cells: hence few nodes, and single precision
        spectra = series(torch.as_tensor(LogChebyshev.nodes(lower, upper, coarse), device=phi.device)).float()
        values = phi.new_empty(coarse, len(phi))
        for chunk in _chunks(len(phi), phi.shape[1]):
            rows = phi[chunk].float()
            for k, spectrum in enumerate(spectra):
                values[k, chunk] = torch.einsum("ij,ij->i", rows @ spectrum, rows).double()
        return LogChebyshev.through(lower, upper, values)

    def _measure(self, phi: Tensor, series: LogChebyshev, captured: LogChebyshev, plan: Plan) -> np.ndarray:
        """At the bounds and the reference between them: squared errors of covariances, squared covariances, and the variance left out.

        Covariances are those among at most 1,000 of the cells, scaled up.
        """
        n = len(self.cells)
        some = np.random.default_rng(0).permutation(n)[:1000]
        xyz = torch.as_tensor(plan.xyz[self.cells[some]], device=phi.device)
        distance, rows = _distance(xyz, xyz), phi[torch.as_tensor(some, device=phi.device)]
        scale = (n / len(some)) ** 2
        out = np.zeros((3, 3))
        for row, l in zip(out, (plan.lower, plan.reference, plan.upper), strict=True):
            lengthscale = torch.tensor(l, dtype=torch.float64, device=phi.device)
            exact = plan.correlation(distance / l)
            wrong = (rows @ series(lengthscale) @ rows.T - exact).fill_diagonal_(0)  # the diagonal is restored
            left = (1 - captured(lengthscale)).clamp(min=0).sum()
            row[:] = float(wrong.square().sum()) * scale, float(exact.square().sum()) * scale, float(left)
        return out


def extend(coordinates: np.ndarray, landmarks: Tensor, lift: Tensor, blend: Blend) -> Tensor:
    """Columns at positions (k, d), from their covariance with the landmarks: (k, m), a chunk of positions at a time."""
    xyz = torch.as_tensor(np.ascontiguousarray(coordinates, dtype=np.float64), device=landmarks.device)
    out = lift.new_empty(len(xyz), lift.shape[1])
    for rows in _chunks(len(xyz), len(landmarks)):
        out[rows] = blend(_distance(xyz[rows], landmarks)) @ lift
    return out


def drafts(plan: Plan, codes: np.ndarray, landmarks: int, device: torch.device) -> list[Draft]:
    """Landmarks and eigenvectors of each specimen of two cells or more; a cell alone is all its own, without any column."""
    order = np.argsort(codes, kind="stable")
    found, starts = np.unique(codes[order], return_index=True)
    groups = np.split(order, starts[1:])
    budget = _affordable(np.array([len(cells) for cells in groups]), landmarks)
    out = []
    for code, cells in zip(found, groups, strict=True):
        if len(cells) < 2:
            continue
        places, position, count = np.unique(plan.xyz[cells], axis=0, return_inverse=True, return_counts=True)
        inside: np.ndarray | None = position.reshape(-1)
        if len(places) > budget:
            places, count = _spread(plan.xyz[cells], budget)
            inside = None
        at = torch.as_tensor(places, device=device)
        weight = torch.as_tensor(count, dtype=torch.float64, device=device)
        root = weight.sqrt()
        apart = _distance(at, at)
        values, vectors = torch.linalg.eigh(root[:, None] * plan.blend(apart) * root)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        if inside is None:
            resolved = int((values > RESOLVED * values[0]).sum())
            values, vectors = values[:resolved], vectors[:, :resolved]
        weighted = root[:, None] * vectors
        captured = ((plan.correlation(apart / plan.reference) @ weighted) * weighted).sum(0)
        out.append(Draft(int(code), cells, at, weight, inside, values, vectors, captured))
    return out


def _affordable(sizes: np.ndarray, landmarks: int) -> int:
    """Landmarks a specimen can have at most, so that eigenvectors of all cost no more than those of one with `landmarks`."""
    low, high = 1, landmarks
    while low < high:
        middle = (low + high + 1) // 2
        if (np.minimum(sizes, middle).astype(float) ** 3).sum() <= float(landmarks) ** 3:
            low = middle
        else:
            high = middle - 1
    return low


def _spread(xyz: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` positions that spread as the cells do, and how many cells each stands for: a few rounds of k-means.

    From a draw of its own, so that the same cells have the same landmarks.
    """
    some = xyz[np.random.default_rng(0).permutation(len(xyz))[: 20 * count]]
    centers = np.unique(some, axis=0)
    centers = centers[np.random.default_rng(1).permutation(len(centers))[:count]]
    for _ in range(6):
        nearest = KDTree(centers).query(some)[1]
        size = np.bincount(nearest, minlength=len(centers))
        sums = [np.bincount(nearest, weights=axis, minlength=len(centers)) for axis in some.T]
        centers = (np.stack(sums, 1) / np.maximum(size, 1)[:, None])[size > 0]
    size = np.bincount(KDTree(centers).query(xyz)[1], minlength=len(centers))
    return centers[size > 0], size[size > 0]


def shared_rank(
    drafts: list[Draft], n: int, rank: int | None, tolerance: float, most: int, information: float
) -> list[int]:
    """Columns of each specimen: the leading ones of all together, few enough and as many as it takes."""
    if not drafts:
        return []
    where = torch.cat([draft.values for draft in drafts]).argsort(descending=True, stable=True)
    ordered = torch.cat([draft.captured for draft in drafts])[where]
    given = rank
    if rank is None:
        missed = 1 - ordered.cumsum(0) / n
        enough = int((missed > tolerance).sum()) + 1
        # the log evidence of a direction of variance x, in units of the noise, errs by about x^2 / 4 where it is given to the cells
        lost = (information * ordered).square().flip(0).cumsum(0).flip(0) / 4
        fine = min(int((lost > NATS**2).sum()) + 1, FINE)
        # of one specimen no more than `most`: columns of others are not beside them
        rank = min(STEP * math.ceil(max(enough, fine) / STEP), max(most, min(most * len(drafts), ALL)))
    owner = torch.cat([torch.full((len(draft.values),), i) for i, draft in enumerate(drafts)])
    kept = torch.bincount(owner[where.cpu()[:rank]], minlength=len(drafts))
    return [min(int(k), most) for k in kept] if given is None else [int(k) for k in kept]
