r"""Quadratic forms of many gaussian responses over a grid of variance ratios and length-scales, most of it shared by all.

With :math:`v` the variance that cells have for themselves, :math:`\gamma` and :math:`\rho` the variances of lineage and columns over
it, the covariance of a response is :math:`v\,(I + \gamma A + \rho\,\Phi S(l)\Phi')` and what is known of the fixed effects. For each :math:`\gamma` one whitening along the tree serves every response, for each :math:`(\gamma, l)` one eigenvalue
problem of the columns, as in FaST-LMM (Lippert et al. 2011); then a :math:`\rho` is a sum over columns. All are smooth in
:math:`\log(\gamma + \gamma_0)`, :math:`\log l`, :math:`\log(\rho + \rho_0)`: values at Chebyshev nodes give them everywhere.

:math:`\bar d(l)`, the mean over cells of what truncated columns leave to them, is part of :math:`v`: a fit by itself gives each cell
its own. Where columns leave out little the two agree; where they leave out much, neither is the field that was asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from cellfate.engines.structured import StructuredEngine, square_root
from cellfate.engines.structured_posterior import Independent, Part
from cellfate.kernels.base import Component, Term
from cellfate.kernels.lineage import LineageKernel
from cellfate.trees.sweeps import TreeFactor

BASE = 1e-3  # added to a ratio before the logarithm: below it, a component is all but absent
LARGEST_RATIO = 300.0  # of a component's variance to the residual's that the grid holds
COLUMNS = 64  # responses at a time, always as many: what is found for one does not depend on its company


@dataclass(frozen=True)
class Axis:
    """Chebyshev-Lobatto nodes of a coordinate x; a natural value is `exp(x) - base`."""

    x: np.ndarray  # (order,), rising
    base: float = 0.0

    @classmethod
    def between(cls, lower: float, upper: float, order: int, base: float = 0.0) -> Axis:
        low, high = np.log(lower + base), np.log(upper + base)
        return cls(lobatto(low, high, order), base)

    @property
    def natural(self) -> np.ndarray:
        return np.maximum(np.exp(self.x) - self.base, 0.0)

    def coordinate(self, value: np.ndarray) -> np.ndarray:
        return np.log(value + self.base)


def lobatto(low: float | np.ndarray, high: float | np.ndarray, order: int) -> np.ndarray:  # (..., order)
    """Nodes between bounds; the middle where there is one."""
    t = np.zeros(1) if order == 1 else -np.cos(np.pi * np.arange(order) / (order - 1))
    low, high = np.asarray(low)[..., None], np.asarray(high)[..., None]
    return (low + high) / 2 + (high - low) / 2 * t


def cardinal(nodes: np.ndarray, x: np.ndarray) -> np.ndarray:  # (..., order), (..., k) -> (..., k, order)
    """Weights of the values at Lobatto nodes in the polynomial through them at x: the barycentric formula (Berrut & Trefethen 2004)."""
    order = nodes.shape[-1]
    if order == 1:
        return np.ones((*x.shape, 1))
    sign = np.where(np.arange(order) % 2, -1.0, 1.0)
    sign[[0, -1]] *= 0.5
    apart = x[..., None] - nodes[..., None, :]
    hit = apart == 0
    weight = sign / np.where(hit, 1.0, apart)
    weight = np.where(hit.any(-1, keepdims=True), hit.astype(float), weight)
    return weight / weight.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Grid:
    """Axes of lineage over own variance, length-scale, and columns over own variance; an axis of order 1 is no axis."""

    lineage: Axis
    lengthscale: Axis
    columns: Axis

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.lineage.x), len(self.lengthscale.x), len(self.columns.x)


@dataclass(frozen=True, eq=False)
class Shared:
    """What all responses share: the log-determinant and the factor L of X' V^-1 X at the nodes, and the mean of what columns leave out.

    forms: (lineage, lengthscale, columns, 1 + p (p + 1) / 2), for unit own variance: L L' = X' V^-1 X, row by row, with the logarithm
    of its diagonal. Where a field comes close to a fixed effect X' V^-1 X falls by orders of magnitude, and has to stay positive.
    """

    grid: Grid
    forms: np.ndarray
    left_out: np.ndarray  # (lengthscale,), mean over cells of D(l), for unit variance


@dataclass(frozen=True, eq=False)
class Tables:
    """Forms of each response at the nodes: (responses, lineage, lengthscale, columns, 1 + p), y' V^-1 y and L^-1 X' V^-1 y."""

    shared: Shared
    forms: np.ndarray


class Tabulation:
    """The parts of a model that do not change with the response, ready to be tabulated."""

    def __init__(self, engine: StructuredEngine, components: tuple[Component, ...], design: Tensor, grid: Grid) -> None:
        self.engine, self.design, self.grid = engine, design, grid
        self.n = engine.n
        like = engine.like
        self.tree: Part | None = None
        self.columns = like.new_zeros(self.n, 0)
        self.roots = like.new_zeros(1, 0, 0)
        own = like.new_zeros(1, self.n)
        for component in components:
            part, z = part_of(engine, component, torch.as_tensor(np.exp(grid.lengthscale.x)).to(like))
            if z is None:
                self.tree = part
                continue
            self.columns, self.roots = z, square_root(part)
            own = own if part.own is None else part.own
        self.left_out = own.mean(-1)

    def tabulate(self, y: Tensor) -> Tables:
        """Forms of responses y (n, k)."""
        shared, forms = self._over(y)
        return Tables(Shared(self.grid, shared, self.left_out.cpu().numpy()), forms)

    def _over(self, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Forms (lineage, lengthscale, columns, ...) that are shared, and those of each response (responses, lineage, ...)."""
        grid, p, k = self.grid, self.design.shape[1], y.shape[1]
        ratio = torch.as_tensor(grid.columns.natural).to(y)[:, None]
        lower = torch.tril_indices(p, p)
        shared = np.empty((*grid.shape, 1 + lower.shape[1]))
        forms = np.empty((k, *grid.shape, 1 + p))
        on = torch.nonzero(lower[0] == lower[1])[:, 0]
        for i, gamma in enumerate(grid.lineage.natural):
            known = self._products(y, float(gamma))
            for j in range(grid.shape[1]):
                root = self.roots[min(j, len(self.roots) - 1)]
                values, vectors = torch.linalg.eigh(root.mT @ known.zz @ root)
                values = values.clamp(min=0.0)
                turn = vectors.mT @ root.mT
                zx, zy = turn @ known.zx, by_block(turn, known.zy)
                weight = ratio / (1 + ratio * values)  # (columns, m)
                shared[i, j, :, 0] = (known.log_det + torch.log1p(ratio * values).sum(-1)).cpu()
                inner = torch.linalg.cholesky(known.xx - torch.einsum("rm,mp,mq->rpq", weight, zx, zx))
                packed = inner[:, lower[0], lower[1]]
                packed[:, on] = packed[:, on].log()
                shared[i, j, :, 1:] = packed.cpu()
                forms[:, i, j, :, 0] = (known.yy - by_block(weight, zy.square()))[:, :k].mT.cpu()
                white = y.new_empty(p, len(ratio), zy.shape[1])
                for q in range(p):  # forward substitution, one response like the other
                    white[q] = known.xy[q] - by_block(weight, zy * zx[:, q, None])
                    for r in range(q):
                        white[q] -= inner[:, q, r, None] * white[r]
                    white[q] /= inner[:, q, q, None]
                    forms[:, i, j, :, 1 + q] = white[q, :, :k].mT.cpu()
        return shared, forms

    def _products(self, y: Tensor, gamma: float) -> _Products:
        """Products of columns, design and responses with the inverse of `gamma A + I`.

        Those of responses have zeros for as many more as fill the last block.
        """
        ones = y.new_ones(self.n)
        factor: TreeFactor | Independent
        if self.tree is None or self.tree.walk is None:
            factor = Independent(torch.zeros_like(ones), ones)
        else:
            walk = self.tree.walk
            factor = TreeFactor(walk.plan, walk.gain, gamma * walk.noise.reshape(-1), torch.zeros_like(ones), ones)
        z, x = factor.whiten(self.columns), factor.whiten(self.design)
        m, k = z.shape[1], COLUMNS * math.ceil(y.shape[1] / COLUMNS)
        zt, xt = z.mT, x.mT
        zy, xy, yy = y.new_empty(m, k), y.new_empty(x.shape[1], k), y.new_empty(k)
        for first in range(0, k, COLUMNS):
            some = y[:, first : first + COLUMNS]
            block = y.new_zeros(self.n, COLUMNS)
            block[:, : some.shape[1]] = some
            white, here = factor.whiten(block, out=block), slice(first, first + COLUMNS)
            zy[:, here], xy[:, here], yy[here] = zt @ white, xt @ white, white.square().sum(0)
        return _Products(zt @ z, zt @ x, xt @ x, zy, xy, yy, factor.log_det.reshape(()))


def by_block(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` by blocks of columns of one size: a column's last digits do not depend on how many there are."""
    return torch.cat([a @ block for block in b.split(COLUMNS, 1)], 1)


@dataclass(frozen=True)
class _Products:
    zz: Tensor
    zx: Tensor
    xx: Tensor
    zy: Tensor
    xy: Tensor
    yy: Tensor
    log_det: Tensor


def part_of(engine: StructuredEngine, component: Component, lengthscale: Tensor) -> tuple[Part, Tensor | None]:
    """A component of variance 1, at each of several length-scales if it has one, and its columns if it has any."""
    kernel = component.kernel
    held = {
        h.name: lengthscale if h.fixed is None else lengthscale.new_full((1,), h.fixed) for h in kernel.hyperparameters
    }
    points = len(lengthscale) if any(h.fixed is None for h in kernel.hyperparameters) else 1
    term = Term(component.name, kernel.structure(held, engine.like), engine.like.new_ones(points), kernel.normalized)
    part = engine.part(term)
    if isinstance(kernel, LineageKernel):
        return part, None
    columns = engine.columns([term])
    return part, columns.layout.dense(columns.x)


@numba.njit(cache=True)
def _weights(nodes, x, out):  # type: ignore[no-untyped-def]
    order = len(nodes)
    if order == 1:
        out[0] = 1.0
        return
    total = 0.0
    for k in range(order):
        apart = x - nodes[k]
        if apart == 0.0:
            out[:order] = 0.0
            out[k] = 1.0
            return
        w = 1.0 / apart
        if k % 2:
            w = -w
        if k == 0 or k == order - 1:
            w *= 0.5
        out[k] = w
        total += w
    for k in range(order):
        out[k] /= total


@numba.njit(cache=True, parallel=True, nogil=True)
def interpolate(table, a, b, c, at):  # type: ignore[no-untyped-def]
    """Values (g, t, q) of polynomials through `table` (g or 1, na, nb, nc, q) on nodes a, b, c (g or 1, n) at points (g, t, 3)."""
    g, t = at.shape[0], at.shape[1]
    na, nb, nc, q = table.shape[1], table.shape[2], table.shape[3], table.shape[4]
    lines = table.reshape(table.shape[0], na, nb, nc * q)
    out = np.zeros((g, t, q))
    for flat in numba.prange(g * t):
        i, j = flat // t, flat % t
        of, on = (i if table.shape[0] > 1 else 0), (i if a.shape[0] > 1 else 0)
        wa, wb, wc, line = np.empty(na), np.empty(nb), np.empty(nc), np.zeros(nc * q)
        _weights(a[on], at[i, j, 0], wa)
        _weights(b[on], at[i, j, 1], wb)
        _weights(c[on], at[i, j, 2], wc)
        for x in range(na):
            for y in range(nb):
                w = wa[x] * wb[y]
                if w != 0.0:
                    row = lines[of, x, y]
                    for k in range(nc * q):  # along memory, so that several are done at once
                        line[k] += w * row[k]
        for z in range(nc):
            for r in range(q):
                out[i, j, r] += wc[z] * line[z * q + r]
    return out
