"""What the likelihood of a gaussian response is made of, between the nodes at which it was tabulated."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from cellfate.inference.gaussian_tables import cardinal, interpolate, lobatto

LOCAL = 12  # nodes along each axis of the part of the tables in which a posterior lies


@dataclass(frozen=True)
class Forms:
    """Tabulated forms of some responses, in the whole range or in a part of it of each one's own."""

    tables: tuple[np.ndarray, ...]  # each (g or 1, na, nb, nc, q)
    nodes: tuple[np.ndarray, np.ndarray, np.ndarray]  # each (g or 1, order)
    beyond: Forms | None = None  # what holds outside of the nodes

    def __call__(self, at: np.ndarray) -> np.ndarray:
        """Values (g, t, q) at points (g, t, 3)."""
        near = at if self.beyond is None else self.clip(at)
        parts = [interpolate(table, *self.nodes, near) for table in self.tables]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts, -1)
        if self.beyond is not None:
            far = (near != at).any(-1)
            for row in np.flatnonzero(far.any(1)):
                found[row, far[row]] = self.beyond.of(int(row))(at[row, far[row]][None])[0]
        return found

    def clip(self, at: np.ndarray) -> np.ndarray:
        low, high = (np.stack([nodes[:, end] for nodes in self.nodes], -1)[:, None] for end in (0, -1))
        return np.clip(at, low, high)

    def of(self, row: int) -> Forms:
        """Those of one response."""
        return take(self, np.array([row]))

    def about(self, middle: np.ndarray, reach: np.ndarray) -> Forms:
        """What :meth:`within` gives up to `reach` from points (g, 3), as far as there are nodes."""
        low, high = (np.stack([nodes[0, end] for nodes in self.nodes]) for end in (0, -1))
        return self.within(np.maximum(middle - reach, low), np.minimum(middle + reach, high))

    def within(self, low: np.ndarray, high: np.ndarray) -> Forms:
        """The same on `LOCAL` nodes between bounds (g, 3)."""
        axes, weights = [], []
        for i, nodes in enumerate(self.nodes):
            axes.append(lobatto(low[:, i], high[:, i], 1 if nodes.shape[1] == 1 else LOCAL))
            weights.append(cardinal(np.broadcast_to(nodes, (len(low), nodes.shape[1])), axes[-1]))
        parts = []
        for table in self.tables:
            x = np.broadcast_to(table, (len(low), *table.shape[1:]))
            for i, w in enumerate(weights):
                x = np.moveaxis(x, 1 + i, 1)
                shape = x.shape
                x = np.moveaxis((w @ x.reshape(len(low), shape[1], -1)).reshape(len(low), -1, *shape[2:]), 1, 1 + i)
            parts.append(x)
        table = np.ascontiguousarray(np.concatenate(parts, -1))
        beyond = Forms(self.tables, self.nodes)
        return Forms((table,), (axes[0], axes[1], axes[2]), beyond)


def take(forms: Forms, rows: np.ndarray) -> Forms:
    """Those of some responses."""
    tables = tuple(table[rows] if len(table) > 1 else table for table in forms.tables)
    a, b, c = (nodes[rows] if len(nodes) > 1 else nodes for nodes in forms.nodes)
    beyond = None if forms.beyond is None else take(forms.beyond, rows)
    return Forms(tables, (a, b, c), beyond)


@numba.njit(cache=True, parallel=True, nogil=True)
def log_likelihood(found, v, precision, level, n):  # type: ignore[no-untyped-def]
    """Of responses whose forms are `found` (g, t, (1 + p) + (1 + p (p + 1) / 2)), own variance v, fixed effects integrated."""
    g, t = v.shape
    out = np.empty((g, t))
    p = precision.shape[1]
    for flat in numba.prange(g * t):
        i, j = flat // t, flat % t
        f, own = found[i, j], v[i, j]
        square, log_det = _reduced(f, own, precision[i], level[i], p)
        out[i, j] = -0.5 * ((n - p) * np.log(own) + f[1 + p] + log_det + square / own + n * np.log(2 * np.pi))
    return out


@numba.njit(cache=True, parallel=True, nogil=True)
def quadratic(found, v, precision, level):  # type: ignore[no-untyped-def]
    """The quadratic form alone."""
    g, t = v.shape
    out = np.empty((g, t))
    for flat in numba.prange(g * t):
        i, j = flat // t, flat % t
        out[i, j] = _reduced(found[i, j], v[i, j], precision[i], level[i], precision.shape[1])[0]
    return out


@numba.njit(cache=True)
def _reduced(f, own, precision, level, p):  # type: ignore[no-untyped-def]
    """What y' V^-1 y is less what the fixed effects explain, and log|V| less that without them, by Cholesky's method."""
    factor, lower, shift = np.zeros((p, p)), np.empty((p, p)), np.empty(p)
    square, log_det, at = f[0], 0.0, 2 + p
    for a in range(p):
        for b in range(a + 1):
            factor[a, b] = np.exp(f[at]) if a == b else f[at]
            at += 1
    for a in range(p):
        prior = own * precision[a]
        square += prior * level[a] ** 2
        value = -prior * level[a]
        for c in range(a + 1):
            value += factor[a, c] * f[1 + c]
        for b in range(a + 1):
            entry = prior if a == b else 0.0
            for c in range(b + 1):
                entry += factor[a, c] * factor[b, c]
            for c in range(b):
                entry -= lower[a, c] * lower[b, c]
            lower[a, b] = np.sqrt(entry) if a == b else entry / lower[b, b]
        for c in range(a):
            value -= lower[a, c] * shift[c]
        shift[a] = value / lower[a, a]
        square -= shift[a] ** 2
        log_det += 2 * np.log(lower[a, a]) - np.log(precision[a])
    return square, log_det
