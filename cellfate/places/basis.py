"""A stationary field in few columns: fixed functions of position, and a small matrix that moves with the length-scale.

Among cells at positions x the covariance k(d / l) is taken to be `phi S(l) phi' + diag(left_out(l))`. The columns of `phi` are
the leading eigenvectors, among landmarks, of a blend of the covariances between the bounds, carried to all cells by the Nyström
formula (Williams & Seeger 2001, eq. 8), so they never change with l. `S(l)` is the covariance at l projected on them, and what
this misses of a cell's variance is given back to the cell as its own, as in the FITC approximation (Snelson & Ghahramani 2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cellfate.places.drafts import Blend, FieldBlock, Plan, drafts, extend, shared_rank
from cellfate.places.series import Correlation, LogChebyshev, order_for

LANDMARKS = 2000  # positions up to which a field is decomposed as it is; beyond, as many landmarks stand for all
ENTRIES = 1e-9  # error of interpolated correlations, where all positions are landmarks or columns of S are concerned
VARIANCES = (
    1e-5  # the same for the variance left out, where landmarks stand for the cells: they are no better than that
)
PLACE = 1 / 3  # of the reference between the bounds, in logs: estimates of a length-scale reach further up than down


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
    reference: float  # a length-scale between the bounds at which the approximation is judged
    blend: Blend  # whose eigenvectors are the columns
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
    def meets_tolerance(self) -> bool:
        return self.truncated_share[1] <= self.tolerance

    @property
    def whole(self) -> bool:
        """One block that holds all cells in their order, so that nothing has to be put in place."""
        return len(self.blocks) == 1 and len(self.blocks[0].cells) == self.n

    @property
    def slices(self) -> list[slice]:
        """Columns of each block."""
        ends = np.cumsum([0] + [block.phi.shape[1] for block in self.blocks])
        return [slice(int(a), int(b)) for a, b in pairwise(ends)]

    @property
    def by_block(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Cells (n_s,) of each specimen, and its columns (n_s, m_s)."""
        return tuple(block.cells for block in self.blocks), tuple(block.phi for block in self.blocks)

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
        """S(l), block by specimen; positive semidefinite up to the error of the interpolation, `ENTRIES` of its trace."""
        if self.whole:
            return self.blocks[0].series(lengthscale)
        out = self.like.new_zeros(*lengthscale.shape, self.rank, self.rank)
        for block, columns in zip(self.blocks, self.slices, strict=True):
            out[..., columns, columns] = block.series(lengthscale)
        return out

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
                phi = extend(coordinates[here], block.landmarks, block.lift, self.blend)
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
    multiple of 32, at most `most` for each specimen, that leaves out no more than `tolerance` of the variance at the reference between the
    bounds; or `rank` as given. Where a cell's own data say so much of the field, `information` (variance of the field times the
    precision of a cell's data), that a truncated direction would count for more, it is larger still, up to `FINE` columns. Specimens share it: the pooled leading eigenvalues are taken. Up to `landmarks` distinct
    positions and with as many columns, the basis is exact; beyond, four landmarks a column are enough, and fewer are faster.
    """
    if not 0 < lower <= upper < math.inf:
        raise ValueError(f"bounds of a length-scale are 0 < lower <= upper, these are {lower} and {upper}.")
    like = torch.zeros((), dtype=torch.float64) if like is None else like
    xyz = np.ascontiguousarray(coordinates, dtype=np.float64)
    codes = np.zeros(len(xyz), dtype=np.int64) if specimen is None else np.asarray(specimen)
    reference = lower * (upper / lower) ** PLACE

    extent = float(np.linalg.norm(xyz.max(0) - xyz.min(0))) or lower
    order, coarse = (order_for(correlation, lower, upper, extent, accuracy) for accuracy in (ENTRIES, VARIANCES))
    plan = Plan(xyz, correlation, Blend(correlation, lower, upper), reference, lower, upper, order, coarse)
    found = drafts(plan, codes, landmarks, like.device)
    n = sum(len(draft.cells) for draft in found)
    # among the cells that landmarks stand for, somewhat more is left out than among the landmarks
    strict = tolerance if all(draft.position is not None for draft in found) else 0.8 * tolerance
    kept = shared_rank(found, n, rank, strict, most, information)
    blocks, measures = [], []
    for draft, m in zip(found, kept, strict=True):
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
        blend=plan.blend,
        tolerance=tolerance,
        blocks=tuple(block for block in blocks if block.phi.shape[1]),
        codes=np.array([draft.code for draft, block in zip(found, blocks, strict=True) if block.phi.shape[1]]),
        errors=(float(error[0]), float(error[1]), float(error[2])),
        truncated_share=(float(share[0]), float(share[1]), float(share[2])),
        like=like,
    )
