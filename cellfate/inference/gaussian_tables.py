r"""Quadratic forms of many gaussian responses over a grid of variance ratios and length-scales, most of it shared by all.

With :math:`v` the variance that cells have for themselves, :math:`\gamma` and :math:`\rho` the variances of lineage and columns over
it, the covariance of a response is :math:`v\,(I + \gamma A + \rho\,(\Phi S(l)\Phi' + \mathrm{diag}(D(l) - \bar d(l))))` and what is known of
the fixed effects. For each :math:`\gamma` one whitening along the tree serves every response, for each :math:`(\gamma, l)` one eigenvalue
problem of the columns, as in FaST-LMM (Lippert et al. 2011); then a :math:`\rho` is a sum over columns. All are smooth in
:math:`\log(\gamma + \gamma_0)`, :math:`\log l`, :math:`\log(\rho + \rho_0)`: values at Chebyshev nodes give them everywhere.

:math:`\bar d(l)`, the mean of what truncated columns leave to the cells, is part of :math:`v`; of what differs between cells the leading
pattern, :math:`D(l) - \bar d(l) \approx \sigma(l) f`, moves the forms by little, and smoothly: that is worked out on a coarser grid.
"""

from __future__ import annotations

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
LARGEST_PATTERN = 0.5  # of the variance that differs between cells, in units of what they share
PATTERNS = (0.25, 1.0)  # of that, where its effect is worked out
COLUMNS = 128  # responses at a time, always as many: what is found for one does not depend on its company


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

    def every(self, step: int) -> Axis:
        return Axis(self.x[::step], self.base)


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
    """What all responses share: the log-determinant and X' V^-1 X at the nodes, and the mean of what columns leave out.

    forms: (lineage, lengthscale, columns, 1 + p (p + 1) / 2), for unit own variance.
    """

    grid: Grid
    forms: np.ndarray
    left_out: np.ndarray  # (lengthscale,), mean over cells of D(l), for unit variance
    pattern_rest: float  # what the leading pattern misses of D - mean, rms over cells at the worst length-scale


@dataclass(frozen=True, eq=False)
class Tables:
    """Forms of each response at the nodes: (responses, lineage, lengthscale, columns, 1 + p), y' V^-1 y and X' V^-1 y."""

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
        self.left_out = own.mean(-1)  # (lengthscale,)
        rest = own - self.left_out[:, None]
        # the leading pattern over cells, by one small eigenvalue problem
        lead = torch.linalg.eigh(rest @ rest.mT)[1][:, -1]
        pattern = (lead * lead.sum().sign()) @ rest
        size = pattern.square().mean().sqrt()
        self.pattern = pattern / size if float(size) > 0 else torch.zeros_like(pattern)
        self.spread = rest @ self.pattern / self.n  # sigma(l)
        missed = (rest - self.spread[:, None] * self.pattern).square().mean(-1).sqrt()
        self.pattern_rest = float(missed.max())

    def tabulate(self, y: Tensor) -> Tables:
        """Forms of responses y (n, k)."""
        grid = self.grid
        shared, forms = self._over(y, grid.lineage, grid.lengthscale, [0.0])
        shared, forms = shared[0], forms[0]
        if bool((self.spread.abs() > 1e-9).any()):
            more_shared, more = self._corrections(y)
            shared, forms = shared + more_shared, forms + more
        about = Shared(grid, shared, self.left_out.cpu().numpy(), self.pattern_rest)
        return Tables(about, forms)

    def _corrections(self, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What the pattern over cells changes, at all nodes."""
        grid = self.grid
        steps = [2 if len(grid.lineage.x) > 8 else 1, 3 if len(grid.lengthscale.x) > 6 else 1]
        lineage, lengthscale = grid.lineage.every(steps[0]), grid.lengthscale.every(steps[1])
        spread = self.spread.cpu().numpy()[:: steps[1]]
        left = self.left_out.cpu().numpy()[:: steps[1]]
        # amounts (lengthscale, columns), no larger than where all of the own variance is what columns leave out
        amount = spread[:, None] * np.minimum(grid.columns.natural, 1 / np.maximum(left, 1e-12)[:, None])
        floor = float(-self.pattern.min())
        top = min(float(amount.max()), LARGEST_PATTERN, 0.9 / max(floor, 1e-12))
        amount = np.minimum(amount, top)
        levels = [0.0, *(top * share for share in PATTERNS)]
        shared, forms = self._over(y, lineage, lengthscale, levels)
        weights = _polynomial(np.array(levels), amount)  # (levels, lengthscale, columns)
        weights[0] -= 1.0
        change = np.einsum("sjk,sijkq->ijkq", weights, shared), np.einsum("sjk,srijkq->rijkq", weights, forms)
        along = cardinal(lineage.x, grid.lineage.x), cardinal(lengthscale.x, grid.lengthscale.x)
        first = np.einsum("Ii,Jj,ijkq->IJkq", *along, change[0], optimize=True)
        k = change[1].shape
        wide = along[0] @ change[1].reshape(k[0], k[1], -1)
        wide = along[1] @ wide.reshape(k[0] * len(along[0]), k[2], -1)
        return first, wide.reshape(k[0], len(along[0]), len(along[1]), k[3], k[4])

    def _over(self, y: Tensor, lineage: Axis, lengthscale: Axis, levels: list[float]) -> tuple[np.ndarray, np.ndarray]:
        """Forms (levels, lineage, lengthscale, columns, ...) and (levels, responses, lineage, ...), patterns at `levels`."""
        p, k, ratio = self.design.shape[1], y.shape[1], torch.as_tensor(self.grid.columns.natural).to(y)
        at = np.searchsorted(self.grid.lengthscale.x, lengthscale.x - 1e-12)
        lower = torch.tril_indices(p, p)
        nodes = len(lineage.x), len(lengthscale.x), len(ratio)
        shared = np.empty((len(levels), *nodes, 1 + lower.shape[1]))
        forms = np.empty((len(levels), k, *nodes, 1 + p))
        for s, level in enumerate(levels):
            for i, gamma in enumerate(lineage.natural):
                known = self._products(y, float(gamma), level)
                for j, node in enumerate(at):
                    root = self.roots[min(node, len(self.roots) - 1)]
                    values, vectors = torch.linalg.eigh(root.mT @ known.zz @ root)
                    values = values.clamp(min=0.0)
                    turn = vectors.mT @ root.mT
                    zx, zy = turn @ known.zx, turn @ known.zy
                    weight = ratio[:, None] / (1 + ratio[:, None] * values)  # (columns, m)
                    shared[s, i, j, :, 0] = (known.log_det + torch.log1p(ratio[:, None] * values).sum(-1)).cpu()
                    inner = known.xx - torch.einsum("rm,mp,mq->rpq", weight, zx, zx)
                    shared[s, i, j, :, 1:] = inner[:, lower[0], lower[1]].cpu()
                    forms[s, :, i, j, :, 0] = (known.yy[:, None] - zy.square().mT @ weight.mT).cpu()
                    for q in range(p):
                        cross = known.xy[q][:, None] - (zy * zx[:, q, None]).mT @ weight.mT
                        forms[s, :, i, j, :, 1 + q] = cross.cpu()
        return shared, forms

    def _products(self, y: Tensor, gamma: float, level: float) -> _Products:
        """Products of columns, design and responses with the inverse of `I + gamma A + level diag(pattern)`."""
        precision = 1 / (1 + level * self.pattern)
        factor: TreeFactor | Independent
        if self.tree is None or self.tree.walk is None:
            factor = Independent(torch.zeros_like(precision), precision)
        else:
            walk = self.tree.walk
            factor = TreeFactor(
                walk.plan, walk.gain, gamma * walk.noise.reshape(-1), torch.zeros_like(precision), precision
            )
        root = precision.sqrt()[:, None]
        z, x = factor.whiten(root * self.columns), factor.whiten(root * self.design)
        m, k = z.shape[1], y.shape[1]
        zt, xt = z.mT.contiguous(), x.mT.contiguous()
        zy, xy, yy = y.new_empty(m, k), y.new_empty(x.shape[1], k), y.new_empty(k)
        for first in range(0, k, COLUMNS):
            some = y[:, first : first + COLUMNS]
            block = y.new_zeros(self.n, COLUMNS)
            torch.mul(root, some, out=block[:, : some.shape[1]])
            white, width = factor.whiten(block, out=block), some.shape[1]
            zy[:, first : first + width] = (zt @ white)[:, :width]
            xy[:, first : first + width] = (xt @ white)[:, :width]
            yy[first : first + width] = white.square().sum(0)[:width]
        log_det = factor.log_det.reshape(()) - precision.log().sum()
        return _Products(zt @ z, zt @ x, xt @ x, zy, xy, yy, log_det)


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
    return part, None if isinstance(kernel, LineageKernel) else engine.columns([term])[0]


def _polynomial(nodes: np.ndarray, x: np.ndarray) -> np.ndarray:  # (k,), (...) -> (k, ...)
    """Weights of the values at any nodes in the polynomial through them (Lagrange)."""
    out = np.ones((len(nodes), *x.shape))
    for i, a in enumerate(nodes):
        for j, b in enumerate(nodes):
            if i != j:
                out[i] *= (x - b) / (a - b)
    return out


@numba.njit(cache=True, fastmath=False)
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
    out = np.zeros((g, t, q))
    for flat in numba.prange(g * t):
        i, j = flat // t, flat % t
        of, on = (i if table.shape[0] > 1 else 0), (i if a.shape[0] > 1 else 0)
        wa, wb, wc = np.empty(na), np.empty(nb), np.empty(nc)
        _weights(a[on], at[i, j, 0], wa)
        _weights(b[on], at[i, j, 1], wb)
        _weights(c[on], at[i, j, 2], wc)
        for x in range(na):
            for y in range(nb):
                w = wa[x] * wb[y]
                if w != 0.0:
                    for z in range(nc):
                        for r in range(q):
                            out[i, j, r] += w * wc[z] * table[of, x, y, z, r]
    return out
