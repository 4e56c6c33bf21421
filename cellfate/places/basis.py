"""A stationary field in few columns: fixed functions of position, and a small matrix that moves with the length-scale.

Among cells at positions x the covariance k(d / l) is taken to be `phi S(l) phi' + diag(left_out(l))`. The columns of `phi` are
the leading eigenvectors of the covariance at one reference length-scale among landmarks, carried to all cells by the Nyström
formula (Williams & Seeger 2001, eq. 8), so they never change with l. `S(l)` is the covariance at l projected on them, and what
this misses of a cell's variance is given back to the cell as its own, as in the FITC approximation (Snelson & Ghahramani 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

Correlation = Callable[[Tensor], Tensor]

LANDMARKS = 2000  # positions up to which a field is decomposed as it is; beyond, as many landmarks stand for all
ENTRIES = 1e-9  # error of interpolated correlations, where all positions are landmarks or columns of S are concerned
VARIANCES = (
    1e-5  # the same for the variance left out, where landmarks stand for the cells: they are no better than that
)
RESOLVED = (
    1e-11  # eigenvalues below this part of the largest are rounding: what belongs to them cannot be carried elsewhere
)
STEP = 32  # the rank is a multiple
NATS, FINE = (
    0.1,
    512,
)  # that truncated directions may cost of the log evidence, and columns up to which more are taken for it
PLACE = 1 / 3  # of the reference between the bounds, in logs: estimates of a length-scale reach further up than down
CHUNK = 2**20  # entries of a covariance at a time: they stay in cache, and memory is columns, not landmarks


def _distance(a: Tensor, b: Tensor) -> Tensor:
    # from differences: the inner-product form loses half the digits for close cells
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(CHUNK // max(columns, 1), 1)
    return [slice(i, i + step) for i in range(0, rows, step)]


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
        inside = (lengthscale >= self.lower * (1 - 1e-9)) & (lengthscale <= self.upper * (1 + 1e-9))
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


@dataclass(frozen=True, eq=False)
class FieldBlock:
    """The field of one specimen: `phi S(l) phi'` among its cells."""

    cells: Tensor  # (n_s,), their places among all cells
    phi: Tensor  # (n_s, m_s)
    series: LogChebyshev  # of S(l) (m_s, m_s)
    captured: LogChebyshev  # of diag(phi S(l) phi') (n_s,)
    landmarks: Tensor  # (u, d)
    lift: Tensor  # (u, m_s): phi at a position is its correlation with the landmarks, times this


@dataclass(frozen=True, eq=False)
class FieldBasis:
    """Independent fields of specimens as `phi S(l) phi' + diag(left_out(l))`; made by :func:`field_basis`.

    `left_out` restores the unit diagonal, up to where S overestimates a variance: at l far from the reference `captured` can
    exceed 1 in some cells, `left_out` is then 0 and the diagonal is larger than 1 (see `trace`).
    """

    n: int
    correlation: Correlation
    lower: float
    upper: float
    reference: float  # the length-scale whose eigenvectors are the columns
    tolerance: float  # on the mean of `left_out` at the reference
    blocks: tuple[FieldBlock, ...]  # of specimens with columns
    codes: np.ndarray  # (blocks,), the specimens they belong to
    errors: tuple[
        float, float, float
    ]  # of covariances, relative (Frobenius), at the lower bound, the middle, the upper bound
    truncated_share: tuple[float, float, float]  # mean of `left_out` at the same; specimens of one cell do not count
    like: Tensor

    @property
    def rank(self) -> int:
        return sum(block.phi.shape[1] for block in self.blocks)

    @property
    def error(self) -> float:
        return max(self.errors)

    @property
    def meets_tolerance(self) -> bool:
        return self.truncated_share[1] <= self.tolerance

    @property
    def verdict(self) -> str:
        """What the basis misses, in a sentence, and what to do where that is more than the tolerance."""
        middle = self.reference
        short, typical, _ = self.truncated_share
        said = (
            f"{self.rank} columns leave {typical:.1%} of the field's variance to the cells themselves at length-scale {middle:.3g}, "
            f"{short:.1%} at the lower bound {self.lower:.3g}"
        )
        if self.meets_tolerance:
            return f"{said}."
        return f"{said}: more than {self.tolerance:.1%}. Allow more columns, raise the lower bound, or use the dense engine."

    @property
    def whole(self) -> bool:
        """One block that holds all cells in their order, so that nothing has to be put in place."""
        return len(self.blocks) == 1 and len(self.blocks[0].cells) == self.n

    @property
    def slices(self) -> list[slice]:
        """Columns of each block."""
        ends = np.cumsum([0] + [block.phi.shape[1] for block in self.blocks])
        return [slice(int(a), int(b)) for a, b in pairwise(ends)]

    @cached_property
    def phi(self) -> Tensor:
        """All columns (n, m): zero outside of a column's specimen."""
        if self.whole:
            return self.blocks[0].phi
        out = self.like.new_zeros(self.n, self.rank)
        for block, columns in zip(self.blocks, self.slices, strict=True):
            out[block.cells, columns] = block.phi
        return out

    def spectrum(self, lengthscale: Tensor) -> Tensor:  # (...) -> (..., m, m)
        """S(l), block by specimen; positive semidefinite up to the interpolation's error, see `factor`."""
        if self.whole:
            return self.blocks[0].series(lengthscale)
        out = self.like.new_zeros(*lengthscale.shape, self.rank, self.rank)
        for block, columns in zip(self.blocks, self.slices, strict=True):
            out[..., columns, columns] = block.series(lengthscale)
        return out

    jitter = 1e-9

    def factor(self, lengthscale: Tensor) -> Tensor:  # (...) -> (..., m, m)
        """Lower triangular F with `F F' = S(l) + jitter tr(S_s) I`, by specimen s.

        Interpolation may leave S indefinite by `ENTRIES` of its trace. The jitter outweighs it; it adds about `jitter * m` to a
        cell's variance.
        """
        spectrum = self.spectrum(lengthscale)
        trace = spectrum.new_zeros(spectrum.shape[:-1])
        diagonal = spectrum.diagonal(dim1=-2, dim2=-1)
        for columns in self.slices:
            trace[..., columns] = diagonal[..., columns].sum(-1, keepdim=True)
        jitter = max(self.jitter, 10 * torch.finfo(spectrum.dtype).eps)
        return torch.linalg.cholesky(spectrum + torch.diag_embed(jitter * trace))

    def captured(self, lengthscale: Tensor) -> Tensor:  # (...) -> (..., n)
        """diag(phi S(l) phi'): what the columns give of each cell's variance of 1."""
        if self.whole:
            return self.blocks[0].captured(lengthscale)
        out = self.like.new_zeros(*lengthscale.shape, self.n)
        for block in self.blocks:
            out[..., block.cells] = block.captured(lengthscale)
        return out

    def left_out(self, lengthscale: Tensor) -> Tensor:  # (...) -> (..., n)
        """What the columns miss of each cell's variance: the cell's own from here on, and never negative."""
        return (1 - self.captured(lengthscale)).clamp(min=0)

    def trace(self, lengthscale: Tensor) -> Tensor:  # (...) -> (...)
        """Trace of the approximation: n, and more where `captured` exceeds 1."""
        return self.captured(lengthscale).clamp(min=1).sum(-1)

    @cached_property
    def _total(self) -> LogChebyshev:
        """1' phi S(l) phi' 1, of each block."""
        sums = [block.phi.sum(0) for block in self.blocks]
        totals = [block.series.coefficients @ s @ s for block, s in zip(self.blocks, sums, strict=True)]
        return LogChebyshev(self.lower, self.upper, torch.stack(totals, -1))

    def total(self, lengthscale: Tensor) -> Tensor:  # (...) -> (...)
        """1' K 1 of the approximation, for c(K)."""
        own = self.left_out(lengthscale).sum(-1)
        return own + self._total(lengthscale).sum(-1) if self.blocks else own

    def at(self, coordinates: np.ndarray, specimen: np.ndarray | None = None) -> Tensor:  # (k, m)
        """The columns at other positions: those of a specimen without a field of its own are zero.

        What the columns miss there is `1 - (phi S phi').diagonal()` with this `phi`, see :func:`variance_left`.
        """
        codes = np.zeros(len(coordinates), dtype=np.int64) if specimen is None else np.asarray(specimen)
        out = self.like.new_zeros(len(coordinates), self.rank)
        for code, block, columns in zip(self.codes, self.blocks, self.slices, strict=True):
            here = np.flatnonzero(codes == code)
            if len(here):
                phi = extend(coordinates[here], block.landmarks, block.lift, self.correlation, self.reference)
                out[torch.as_tensor(here, device=out.device), columns] = phi.to(out)
        return out


def variance_left(phi: Tensor, spectrum: Tensor) -> Tensor:  # (k, m), (..., m, m) -> (..., k)
    """What columns `phi` with covariance `spectrum` miss of a unit variance."""
    return (1 - ((phi @ spectrum) * phi).sum(-1)).clamp(min=0)


def field_basis(
    coordinates: np.ndarray,
    correlation: Correlation,
    lower: float,
    upper: float,
    *,
    specimen: np.ndarray | None = None,
    rank: int | None = None,
    tolerance: float = 0.003,
    information: float = 0.0,
    most: int = 1024,
    landmarks: int = LANDMARKS,
    like: Tensor | None = None,
) -> FieldBasis:
    """Columns for a stationary field whose length-scale lies within `lower` and `upper`.

    Coordinates (n, d); `correlation` of the ratio d / l; `specimen` (n,) are codes of independent fields. The rank is the smallest
    multiple of 32, at most `most`, that leaves out no more than `tolerance` of the variance at the reference between the
    bounds; or `rank` as given. Where a cell's own data say so much of the field, `information` (variance of the field times the
    precision of a cell's data), that a truncated direction would count for more, it is larger still, up to `FINE` columns. Specimens share it: the pooled leading eigenvalues are taken. Up to `landmarks` distinct
    positions and with as many columns, the basis is exact; beyond, four landmarks a column are enough, and fewer are faster.
    """
    if not 0 < lower <= upper < math.inf:
        raise ValueError(f"bounds of a length-scale are 0 < lower <= upper, these are {lower} and {upper}.")
    like = torch.zeros((), dtype=torch.float64) if like is None else like
    xyz = np.ascontiguousarray(coordinates, dtype=np.float64)
    codes = np.zeros(len(xyz), dtype=np.int64) if specimen is None else np.asarray(specimen)
    # Between the bounds. Eigenvectors at the lower bound err ten times as much for longer length-scales and overestimate
    # variances there (0.28 in a cell); those at the upper bound are rounding errors from some column on where the kernel is smooth.
    reference = lower * (upper / lower) ** PLACE

    extent = float(np.linalg.norm(xyz.max(0) - xyz.min(0))) or lower
    order, coarse = (order_for(correlation, lower, upper, extent, accuracy) for accuracy in (ENTRIES, VARIANCES))
    plan = _Plan(xyz, correlation, reference, lower, upper, order, coarse)
    drafts = _drafts(plan, codes, landmarks, like.device)
    n = sum(len(draft.cells) for draft in drafts)
    # among the cells that landmarks stand for, somewhat more is left out than among the landmarks
    strict = tolerance if all(draft.position is not None for draft in drafts) else 0.8 * tolerance
    kept = _shared_rank([draft.values for draft in drafts], n, rank, strict, most, information)
    blocks, measures = [], []
    for draft, m in zip(drafts, kept, strict=True):
        block, measure = draft.block(m, plan, like)
        measures.append(measure)
        blocks.append(block)
    norms = np.array(measures).reshape(-1, 3, 3).sum(0)  # lengthscale x (error, norm, left out)
    share = norms[:, 2] / max(n, 1)
    error = np.sqrt(norms[:, 0] / np.maximum(norms[:, 1], np.finfo(float).tiny))
    return FieldBasis(
        n=len(xyz),
        correlation=correlation,
        lower=lower,
        upper=upper,
        reference=reference,
        tolerance=tolerance,
        blocks=tuple(block for block in blocks if block.phi.shape[1]),
        codes=np.array([draft.code for draft, block in zip(drafts, blocks, strict=True) if block.phi.shape[1]]),
        errors=(float(error[0]), float(error[1]), float(error[2])),
        truncated_share=(float(share[0]), float(share[1]), float(share[2])),
        like=like,
    )


@dataclass(frozen=True)
class _Plan:
    """What the drafts of all specimens have in common."""

    xyz: np.ndarray  # (n, d)
    correlation: Correlation
    reference: float
    lower: float
    upper: float
    order: int  # nodes for S
    coarse: int  # nodes for the variance captured, where landmarks stand for the cells


@dataclass(frozen=True, eq=False)
class _Draft:
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

    def block(self, m: int, plan: _Plan, like: Tensor) -> tuple[FieldBlock, np.ndarray]:
        """The block with the `m` leading columns, and its part of the errors (see `_measure`)."""
        values, vectors = self.values[:m], self.vectors[:, :m]
        root = self.count.sqrt()[:, None]
        floor = RESOLVED * float(self.values[0])
        lift = root * vectors * (values / (values.square() + floor**2))
        if self.position is None:
            phi = extend(plan.xyz[self.cells], self.landmarks, lift, plan.correlation, plan.reference)
        else:
            phi = (vectors / root)[torch.as_tensor(self.position, device=vectors.device)]
        series = self._series(root * vectors, plan)
        captured = self._captured(phi, series, plan.coarse)
        measure = self._measure(phi, series, captured, plan)
        cells = torch.as_tensor(self.cells, device=like.device)
        return FieldBlock(cells, phi.to(like), series.to(like), captured.to(like), self.landmarks, lift), measure

    def _series(self, weighted: Tensor, plan: _Plan) -> LogChebyshev:
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

    def _measure(self, phi: Tensor, series: LogChebyshev, captured: LogChebyshev, plan: _Plan) -> np.ndarray:
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


def extend(
    coordinates: np.ndarray, landmarks: Tensor, lift: Tensor, correlation: Correlation, reference: float
) -> Tensor:
    """Columns at positions (k, d), from their correlation with the landmarks: (k, m), a chunk of positions at a time."""
    xyz = torch.as_tensor(np.ascontiguousarray(coordinates, dtype=np.float64), device=landmarks.device)
    out = lift.new_empty(len(xyz), lift.shape[1])
    for rows in _chunks(len(xyz), len(landmarks)):
        out[rows] = correlation(_distance(xyz[rows], landmarks) / reference) @ lift
    return out


def _drafts(plan: _Plan, codes: np.ndarray, landmarks: int, device: torch.device) -> list[_Draft]:
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
        values, vectors = torch.linalg.eigh(root[:, None] * plan.correlation(_distance(at, at) / plan.reference) * root)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        if inside is None:
            resolved = int((values > RESOLVED * values[0]).sum())
            values, vectors = values[:resolved], vectors[:, :resolved]
        out.append(_Draft(int(code), cells, at, weight, inside, values, vectors))
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


def _shared_rank(
    values: list[Tensor], n: int, rank: int | None, tolerance: float, most: int, information: float
) -> list[int]:
    """Columns of each specimen: the leading ones of all together, few enough and as many as it takes."""
    if not values:
        return []
    pooled = torch.cat(values)
    ordered, where = pooled.sort(descending=True, stable=True)
    if rank is None:
        missed = 1 - ordered.cumsum(0) / n
        enough = int((missed > tolerance).sum()) + 1
        # the log evidence of a direction of variance x, in units of the noise, errs by about x^2 / 4 where it is given to the cells
        lost = (information * ordered).square().flip(0).cumsum(0).flip(0) / 4
        fine = min(int((lost > NATS**2).sum()) + 1, FINE)
        rank = min(STEP * math.ceil(max(enough, fine) / STEP), most)
    owner = torch.cat([torch.full((len(v),), i) for i, v in enumerate(values)])
    kept = torch.bincount(owner[where.cpu()[:rank]], minlength=len(values))
    return [int(k) for k in kept]
