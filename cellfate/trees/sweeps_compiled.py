"""The compiled twin of :mod:`cellfate.trees.sweeps`: one pass over the tree per sweep, each row touched while it is warm.

Kernels are plain compiled loops over one batch entry and one block of columns. They release the interpreter's lock, and
ordinary threads run them (`torch.get_num_threads()`): no threading layer that a fork or a second caller could break. Blocks do
not depend on the number of threads, and neither do results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

if TYPE_CHECKING:
    from cellfate.trees.plan import TreePlan

WORTH_A_THREAD = 200_000  # numbers touched
WHOLE_ROW = 1024  # columns
BUFFER = 2**27  # bytes of scratch per thread where a sweep has to remember a value per node

compiled: Any = njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
summing: Any = njit(cache=True, nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy")


# -- topology ----------------------------------------------------------------------------------------------------------


@compiled
def _pieces(source, pair):  # type: ignore[no-untyped-def]
    """Runs of merges that share no row, and the runs that are left and wait for them; both (runs, 2), in order."""
    nodes, n = source.size, pair.shape[0]
    most = max(256, n // 32)
    span = np.ones(n, np.int64)  # merges that a merge ends, itself included: the run t - span[t] + 1..t
    for t in range(n):
        for side in range(2):
            segment = pair[t, side]
            while 0 <= segment < nodes:
                segment = source[segment]
            if segment >= nodes:
                span[t] += span[segment - nodes]
    runs = np.empty((n, 3), np.int64)  # begin, stop, whether it stands alone
    count, t = 0, n - 1
    while t >= 0:
        alone = span[t] <= most
        begin = t - span[t] + 1 if alone else t
        if count > 0 and runs[count - 1, 2] == alone and (not alone or runs[count - 1, 1] - begin <= most):
            runs[count - 1, 0] = begin
        else:
            runs[count, 0], runs[count, 1], runs[count, 2] = begin, t + 1, alone
            count += 1
        t = begin - 1
    runs = runs[:count][::-1]
    worth = (runs[:, 2] == 1) & (runs[:, 1] - runs[:, 0] >= most // 32)
    return runs[worth][:, :2].copy(), runs[~worth][:, :2].copy()


@compiled
def schedule(parent, leaf):  # type: ignore[no-untyped-def]
    """The arrays of a :class:`cellfate.trees.plan.Schedule`, without the parent."""
    nodes, n = parent.size, leaf.size
    depth = np.zeros(nodes, np.int64)
    cell = np.full(nodes, -1)
    eldest = np.zeros(nodes, np.int64)
    waiting = np.zeros(nodes, np.int64)  # children with cells that have not come yet
    children = np.zeros(nodes, np.int64)
    for i in range(n):
        cell[leaf[i]] = i
    for v in range(nodes - 1, -1, -1):
        if parent[v] >= 0:
            depth[v] = depth[parent[v]] + 1
    holds = cell >= 0
    for v in range(nodes):
        p = parent[v]
        if p >= 0:
            eldest[v] = children[p] == 0
            children[p] += 1
            if holds[v]:
                holds[p] = True
                waiting[p] += 1
    top = np.full(nodes, -1)  # of the pile of segments that wait at a node, each linked to the one below it
    under = np.full(nodes + n, -1)
    came = np.zeros(nodes, np.int64)
    row = np.empty(nodes + n, np.int64)
    met = np.zeros(n, np.int64)
    source = np.full(nodes, -1)
    end = np.zeros(nodes + 1, np.int64)
    pair = np.empty((n, 2), np.int64)
    rows = np.empty((n, 2), np.int64)
    fresh = np.zeros(n, np.int64)
    t = 0
    for v in range(nodes):
        if not holds[v]:
            if children[v] > 0:
                source[v] = -2
        else:
            if cell[v] >= 0:
                row[v] = cell[v]
            else:
                source[v] = top[v]
                row[v] = row[top[v]]
            p = parent[v]
            if p < 0:
                pair[t, 0], pair[t, 1] = v, -1
                rows[t, 0], rows[t, 1] = row[v], -1
                fresh[t] = 1 - met[row[v]]
                t += 1
            else:
                under[v] = top[p]
                top[p] = v
                came[p] += 1
                waiting[p] -= 1
                left = came[p]
                # as a binary counter carries: 2^k segments on either side; the last child makes all the rest meet
                while under[top[p]] >= 0 and (left % 2 == 0 or waiting[p] == 0):
                    second = top[p]
                    first = under[second]
                    left //= 2
                    pair[t, 0], pair[t, 1] = first, second
                    rows[t, 0], rows[t, 1] = row[first], row[second]
                    fresh[t] = (1 - met[row[first]]) + 2 * (1 - met[row[second]])
                    met[row[first]] = 1
                    met[row[second]] = 1
                    row[nodes + t] = row[first]
                    under[nodes + t] = under[first]
                    top[p] = nodes + t
                    t += 1
        end[v + 1] = t
    inner = np.where(children > 0, np.cumsum(children > 0) - 1, -1)
    pieces, rest = _pieces(source, pair)
    return depth, cell, source, eldest, inner, end, pair, rows, fresh, pieces, rest


# -- one number per node -----------------------------------------------------------------------------------------------


@compiled
def _factor(cell, source, end, pair, gain, noise, own, precision, h, p, coefficients):  # type: ignore[no-untyped-def]
    """Slopes h and pending scales p of all segments; the rotation of every merge; returns log|B|."""
    nodes, log_det = cell.size, 0.0
    for v in range(nodes):
        if cell[v] >= 0:
            t = precision[cell[v]]
            z = t * own[cell[v]]
            s = np.sqrt(1 + z)
            h_here, p_here = np.sqrt(t) / s, 1 / s
            log_det += np.log1p(z)
        elif source[v] >= 0:
            h_here, p_here = h[source[v]], p[source[v]]
        else:
            h[v] = 0.0
            continue
        z = h_here * h_here * noise[v]
        s = np.sqrt(1 + z)
        h[v], p[v] = gain[v] * h_here / s, p_here / s
        log_det += np.log1p(z)
        for t in range(end[v], end[v + 1]):
            i, j = pair[t, 0], pair[t, 1]
            if j < 0:
                coefficients[t, 0] = p[i]
                continue
            r = np.sqrt(h[i] * h[i] + h[j] * h[j])
            if r > 0:
                c, s = h[i] / r, h[j] / r
            else:
                c, s = 1.0, 0.0
            coefficients[t, 0], coefficients[t, 1] = c * p[i], s * p[j]
            coefficients[t, 2], coefficients[t, 3] = s * p[i], -c * p[j]
            h[nodes + t], p[nodes + t] = r, 1.0
    return log_det


@compiled
def _marginals(  # type: ignore[no-untyped-def]
    parent, cell, source, end, pair, gain, noise, own, precision, h, outside, up, cavity, rho, cell_cavity
):
    """`outside`: variance at the upper end of every segment, given the cells that are not below it."""
    nodes = cell.size
    for v in range(nodes - 1, -1, -1):
        for t in range(end[v + 1] - 1, end[v] - 1, -1):
            i, j = pair[t, 0], pair[t, 1]
            if j >= 0:
                w = outside[nodes + t]
                outside[i] = w / (1 + h[j] * h[j] * w)
                outside[j] = w / (1 + h[i] * h[i] * w)
        p = parent[v]
        if cell[v] >= 0:
            up[v] = precision[cell[v]] / (1 + precision[cell[v]] * own[cell[v]])
        elif source[v] >= 0:
            up[v] = h[source[v]] * h[source[v]]
        else:
            up[v] = 0.0
            if p >= 0:
                outside[v] = cavity[p] / (1 + up[p] * cavity[p])
        if p < 0:
            outside[v] = 0.0
            cavity[v] = noise[v]
        else:
            cavity[v] = gain[v] * gain[v] * outside[v] + noise[v]
        rho[v] = up[v] / (1 + up[v] * cavity[v])
        if cell[v] >= 0:
            cell_cavity[cell[v]] = cavity[v] + own[cell[v]]
        elif source[v] >= 0:
            outside[source[v]] = cavity[v]


@compiled
def _slopes(  # type: ignore[no-untyped-def]
    parent, cell, source, end, pair, gain, noise, own, precision, h, outside, up, cavity, along,
    d_message, d_outside, d_up, d_cavity, d_rho, d_cell_cavity,
):  # fmt: skip
    """The tangents of `_factor` and `_marginals`; `outside` of branches only, that of merges is made again."""
    nodes = cell.size
    for v in range(nodes):
        if cell[v] >= 0:
            s = 1 + precision[cell[v]] * own[cell[v]]
            d_up[v] = along[cell[v]] / (s * s)
        elif source[v] >= 0:
            d_up[v] = d_message[source[v]]
        else:
            d_up[v] = 0.0
        s = gain[v] / (1 + up[v] * noise[v])
        d_message[v] = s * s * d_up[v]
        for t in range(end[v], end[v + 1]):
            if pair[t, 1] >= 0:
                d_message[nodes + t] = d_message[pair[t, 0]] + d_message[pair[t, 1]]
    for v in range(nodes - 1, -1, -1):
        for t in range(end[v + 1] - 1, end[v] - 1, -1):
            i, j = pair[t, 0], pair[t, 1]
            if j >= 0:
                w, dw = outside[nodes + t], d_outside[nodes + t]
                a, b = 1 + h[j] * h[j] * w, 1 + h[i] * h[i] * w
                outside[i], outside[j] = w / a, w / b
                d_outside[i] = (dw - w * w * d_message[j]) / (a * a)
                d_outside[j] = (dw - w * w * d_message[i]) / (b * b)
        p = parent[v]
        if p < 0:
            d_outside[v] = 0.0
            d_cavity[v] = 0.0
        else:
            if cell[v] < 0 and source[v] < 0:
                a = 1 + up[p] * cavity[p]
                d_outside[v] = (d_cavity[p] - cavity[p] * cavity[p] * d_up[p]) / (a * a)
            d_cavity[v] = gain[v] * gain[v] * d_outside[v]
        a = 1 + up[v] * cavity[v]
        d_rho[v] = (d_up[v] - up[v] * up[v] * d_cavity[v]) / (a * a)
        if cell[v] >= 0:
            d_cell_cavity[cell[v]] = d_cavity[v]
        elif source[v] >= 0:
            outside[source[v]], d_outside[source[v]] = cavity[v], d_cavity[v]


# -- columns -----------------------------------------------------------------------------------------------------------


@compiled
def _whiten(runs, rows, fresh, coefficients, x, out, begin, stop, copy):  # type: ignore[no-untyped-def]
    for run in range(runs.shape[0]):
        for t in range(runs[run, 0], runs[run, 1]):
            i, j = rows[t, 0], rows[t, 1]
            if copy and fresh[t] & 1:
                for k in range(begin, stop):
                    out[i, k] = x[i, k]
            if j < 0:
                a = coefficients[t, 0]
                for k in range(begin, stop):
                    out[i, k] *= a
                continue
            if copy and fresh[t] & 2:
                for k in range(begin, stop):
                    out[j, k] = x[j, k]
            a, b, c, d = coefficients[t, 0], coefficients[t, 1], coefficients[t, 2], coefficients[t, 3]
            for k in range(begin, stop):
                first, second = out[i, k], out[j, k]
                out[i, k] = a * first + b * second
                out[j, k] = c * first + d * second


@compiled
def _whiten_t(runs, rows, coefficients, x, out, begin, stop, copy):  # type: ignore[no-untyped-def]
    for run in range(runs.shape[0] - 1, -1, -1):
        for t in range(runs[run, 1] - 1, runs[run, 0] - 1, -1):
            i, j = rows[t, 0], rows[t, 1]
            if copy:
                met = j if j >= 0 else i
                for k in range(begin, stop):
                    out[met, k] = x[met, k]
            if j < 0:
                a = coefficients[t, 0]
                for k in range(begin, stop):
                    out[i, k] *= a
                continue
            a, b, c, d = coefficients[t, 0], coefficients[t, 1], coefficients[t, 2], coefficients[t, 3]
            for k in range(begin, stop):
                first, second = out[i, k], out[j, k]
                out[i, k] = a * first + c * second
                out[j, k] = b * first + d * second


@compiled
def _sum_up(parent, cell, source, eldest, gain, x, begin, stop, out):  # type: ignore[no-untyped-def]
    for v in range(parent.size):
        if cell[v] >= 0:
            for k in range(begin, stop):
                out[v, k] = x[cell[v], k]
        elif source[v] == -1:
            for k in range(begin, stop):
                out[v, k] = 0.0
        p, g = parent[v], gain[v]
        if p >= 0 and eldest[v]:
            for k in range(begin, stop):
                out[p, k] = g * out[v, k]
        elif p >= 0:
            for k in range(begin, stop):
                out[p, k] += g * out[v, k]


@compiled
def _pass_down(parent, gain, noise, field, begin, stop):  # type: ignore[no-untyped-def]
    for v in range(parent.size - 1, -1, -1):
        p, g, q = parent[v], gain[v], noise[v]
        if p < 0:
            for k in range(begin, stop):
                field[v, k] *= q
        else:
            for k in range(begin, stop):
                field[v, k] = q * field[v, k] + g * field[p, k]


@compiled
def _times(parent, cell, eldest, inner, gain, noise, x, begin, stop, field, out):  # type: ignore[no-untyped-def]
    """Up and down at once; `field` has rows for nodes with children only, leaves read x and write `out`."""
    width = stop - begin
    for v in range(parent.size):
        p, g = inner[parent[v]] if parent[v] >= 0 else -1, gain[v]
        here, at = inner[v], cell[v]
        if p < 0:
            continue
        if here >= 0:
            if eldest[v]:
                for k in range(width):
                    field[p, k] = g * field[here, k]
            else:
                for k in range(width):
                    field[p, k] += g * field[here, k]
        elif at >= 0:
            if eldest[v]:
                for k in range(width):
                    field[p, k] = g * x[at, begin + k]
            else:
                for k in range(width):
                    field[p, k] += g * x[at, begin + k]
        elif eldest[v]:
            for k in range(width):
                field[p, k] = 0.0
    for v in range(parent.size - 1, -1, -1):
        p, g, q = inner[parent[v]] if parent[v] >= 0 else -1, gain[v], noise[v]
        here, at = inner[v], cell[v]
        if here >= 0 and p >= 0:
            for k in range(width):
                field[here, k] = q * field[here, k] + g * field[p, k]
        elif here >= 0:
            for k in range(width):
                field[here, k] *= q
        elif at >= 0 and p >= 0:
            for k in range(width):
                out[at, begin + k] = q * x[at, begin + k] + g * field[p, k]
        elif at >= 0:
            for k in range(width):
                out[at, begin + k] = q * x[at, begin + k]


@summing
def _paired(parent, depth, cell, source, eldest, gain, x, y, begin, stop, sx, sy, total):  # type: ignore[no-untyped-def]
    """Adds to `total`; sums wait in one row per depth, which is all that is open at a time in post-order."""
    width = stop - begin
    for v in range(parent.size):
        here = depth[v]
        if cell[v] >= 0:
            for k in range(width):
                sx[here, k] = x[cell[v], begin + k]
                sy[here, k] = y[cell[v], begin + k]
        elif source[v] == -1:
            for k in range(width):
                sx[here, k] = 0.0
                sy[here, k] = 0.0
        product = 0.0
        for k in range(width):
            product += sx[here, k] * sy[here, k]
        total[v] += product
        g = gain[v]
        if here > 0 and eldest[v]:
            for k in range(width):
                sx[here - 1, k] = g * sx[here, k]
                sy[here - 1, k] = g * sy[here, k]
        elif here > 0:
            for k in range(width):
                sx[here - 1, k] += g * sx[here, k]
                sy[here - 1, k] += g * sy[here, k]


@compiled
def _draw(parent, depth, cell, gain, noise, z, begin, stop, field, out, to_cells):  # type: ignore[no-untyped-def]
    width = stop - begin
    for v in range(parent.size - 1, -1, -1):
        here, g, q = depth[v], gain[v], np.sqrt(noise[v])
        if here == 0:
            for k in range(width):
                field[here, k] = q * z[v, begin + k]
        else:
            for k in range(width):
                field[here, k] = g * field[here - 1, k] + q * z[v, begin + k]
        row = cell[v] if to_cells else v
        if row >= 0:
            for k in range(width):
                out[row, begin + k] = field[here, k]


# -- from tensors to kernels -------------------------------------------------------------------------------------------


def _run(job: Callable[..., None], tasks: Iterable[tuple[int, ...]], work: int) -> None:
    """Every task, on several threads where that is worth it."""
    todo = list(tasks)
    threads = min(torch.get_num_threads(), len(todo))
    if threads < 2 or work < WORTH_A_THREAD:
        for task in todo:
            job(*task)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda task: job(*task), todo))


def _blocks(batch: int, k: int, width: int) -> list[tuple[int, int, int]]:
    return [(s, begin, min(begin + width, k)) for s in range(batch) for begin in range(0, k, width)]


def _row_width(k: int) -> int:
    """Columns per block: whole cache lines, two blocks at least where there are two lines, half a page at most."""
    return min(64, max(8, -(-k // 16) * 8))


def _buffer_width(rows: int, k: int, size: int) -> int:
    return min(_row_width(k), max(8, BUFFER // (rows * size) // 8 * 8))


class Entries:
    """Rows of a batch as contiguous arrays; a batch of one stands for all."""

    def __init__(self, x: Tensor) -> None:
        self._x = x.detach().contiguous().numpy()

    def __getitem__(self, s: int) -> np.ndarray:
        return self._x[s if len(self._x) > 1 else 0]


def _batch(*tensors: Tensor) -> int:
    return max(len(x) for x in tensors)


def factor(
    plan: TreePlan, gain: Tensor, noise: Tensor, own: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log|B| (batch,), coefficients of the merges (batch, n, 4), slopes of the segments (batch, nodes + n)."""
    at, batch = plan.schedule, _batch(gain, noise, own, precision)
    log_det = noise.new_empty(batch)
    coefficients = noise.new_empty(batch, plan.n_cells, 4)
    h = noise.new_empty(batch, plan.n_nodes + plan.n_cells)
    inputs = [Entries(x) for x in (gain, noise, own, precision)]

    def job(s: int) -> None:
        p = np.empty_like(h[s].numpy())
        given = [x[s] for x in inputs]
        log_det[s] = _factor(at.cell, at.source, at.end, at.pair, *given, h[s].numpy(), p, coefficients[s].numpy())

    _run(job, ((s,) for s in range(batch)), batch * plan.n_nodes)
    return log_det, coefficients, h


def marginals(
    plan: TreePlan, h: Tensor, gain: Tensor, noise: Tensor, own: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """up, cavity, parent_cavity, rho (batch, nodes) and prior_cavity (batch, n)."""
    at, batch, nodes = plan.schedule, len(h), plan.n_nodes
    up, cavity, parent_cavity, rho = (h.new_empty(batch, nodes) for _ in range(4))
    cell_cavity = h.new_empty(batch, plan.n_cells)
    inputs = [Entries(x) for x in (gain, noise, own, precision, h)]

    def job(s: int) -> None:
        outside = np.empty_like(h[s].numpy())
        given, out = [x[s] for x in inputs], [x[s].numpy() for x in (up, cavity, rho, cell_cavity)]
        _marginals(at.parent, at.cell, at.source, at.end, at.pair, *given, outside, *out)
        parent_cavity[s] = torch.from_numpy(outside[:nodes])

    _run(job, ((s,) for s in range(batch)), batch * nodes)
    return up, cavity, parent_cavity, rho, cell_cavity


def slopes(
    plan: TreePlan,
    h: Tensor,
    gain: Tensor,
    noise: Tensor,
    own: Tensor,
    precision: Tensor,
    up: Tensor,
    cavity: Tensor,
    parent_cavity: Tensor,
    along: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of parent_cavity, rho (batch, nodes) and prior_cavity (batch, n) as precisions move along `along`."""
    at, batch, nodes = plan.schedule, _batch(h, along), plan.n_nodes
    d_parent_cavity, d_rho = h.new_empty(batch, nodes), h.new_empty(batch, nodes)
    d_cell_cavity = h.new_empty(batch, plan.n_cells)
    inputs = [Entries(x) for x in (gain, noise, own, precision, h)]
    known = [Entries(x) for x in (parent_cavity, up, cavity, along)]

    def job(s: int) -> None:
        above, *given = (x[s] for x in known)
        outside, d_message, d_outside = (np.empty_like(inputs[4][s]) for _ in range(3))
        outside[:nodes] = above
        d_up, d_cavity = np.empty_like(above), np.empty_like(above)
        out = [d_message, d_outside, d_up, d_cavity, d_rho[s].numpy(), d_cell_cavity[s].numpy()]
        _slopes(at.parent, at.cell, at.source, at.end, at.pair, *(x[s] for x in inputs), outside, *given, *out)
        d_parent_cavity[s] = torch.from_numpy(d_outside[:nodes])

    _run(job, ((s,) for s in range(batch)), batch * nodes)
    return d_parent_cavity, d_rho, d_cell_cavity


def whiten(plan: TreePlan, coefficients: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """M x, (batch, n, k)."""
    return _rotate(plan, coefficients, x, out, transposed=False)


def whiten_t(plan: TreePlan, coefficients: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """M' x, (batch, n, k)."""
    return _rotate(plan, coefficients, x, out, transposed=True)


def _rotate(plan: TreePlan, coefficients: Tensor, x: Tensor, out: Tensor | None, *, transposed: bool) -> Tensor:
    at, batch, k = plan.schedule, _batch(coefficients, x), x.shape[-1]
    if out is None:
        out = x.new_empty(batch, plan.n_cells, k)
    same = x.data_ptr() == out.data_ptr()
    turn, given = Entries(coefficients), Entries(x)
    result = out.detach().numpy()

    def turn_rows(runs: np.ndarray, s: int, begin: int, stop: int) -> None:
        if transposed:
            _whiten_t(runs, at.rows, turn[s], given[s], result[s], begin, stop, not same)
        else:
            _whiten(runs, at.rows, at.fresh, turn[s], given[s], result[s], begin, stop, not same)

    # whole rows stream twice as fast as parts of them, so it is rather the tree that is cut; its rest is cut into columns
    phases = [
        lambda: _run(
            lambda piece, *block: turn_rows(at.pieces[piece : piece + 1], *block),
            [(piece, *block) for block in _blocks(batch, k, WHOLE_ROW) for piece in range(len(at.pieces))],
            out.numel(),
        ),
        lambda: _run(
            lambda *block: turn_rows(at.rest, *block),
            _blocks(batch, k, _row_width(k)),
            batch * k * int(np.diff(at.rest).sum()),
        ),
    ]
    for phase in reversed(phases) if transposed else phases:
        phase()
    return out


def up_sums(plan: TreePlan, gain: Tensor, x: Tensor) -> Tensor:
    """Sums at all nodes, (batch, nodes, k)."""
    at, batch, k = plan.schedule, _batch(gain, x), x.shape[-1]
    out = x.new_empty(batch, plan.n_nodes, k)
    slope, given, result = Entries(gain), Entries(x), out.numpy()

    def job(s: int, begin: int, stop: int) -> None:
        _sum_up(at.parent, at.cell, at.source, at.eldest, slope[s], given[s], begin, stop, result[s])

    _run(job, _blocks(batch, k, _row_width(k)), out.numel())
    return out


def path_sums(plan: TreePlan, gain: Tensor, noise: Tensor, x: Tensor) -> Tensor:
    """The field at all nodes, (batch, nodes, k)."""
    at, batch, k = plan.schedule, _batch(gain, noise, x), x.shape[-1]
    out = x.new_empty(batch, plan.n_nodes, k)
    slope, step, given, result = Entries(gain), Entries(noise), Entries(x), out.numpy()

    def job(s: int, begin: int, stop: int) -> None:
        own = result[s]
        _sum_up(at.parent, at.cell, at.source, at.eldest, slope[s], given[s], begin, stop, own)
        _pass_down(at.parent, slope[s], step[s], own, begin, stop)

    _run(job, _blocks(batch, k, _row_width(k)), out.numel())
    return out


def tree_times(plan: TreePlan, gain: Tensor, noise: Tensor, x: Tensor) -> Tensor:
    """The field at the cells, (batch, n, k)."""
    at, batch, k = plan.schedule, _batch(gain, noise, x), x.shape[-1]
    inside = max(1, int(at.inner.max()) + 1)
    out = x.new_empty(batch, plan.n_cells, k)
    slope, step, given, result = Entries(gain), Entries(noise), Entries(x), out.numpy()

    def job(s: int, begin: int, stop: int) -> None:
        field = np.empty((inside, stop - begin), result.dtype)
        topology = at.parent, at.cell, at.eldest, at.inner
        _times(*topology, slope[s], step[s], given[s], begin, stop, field, result[s])

    _run(job, _blocks(batch, k, _buffer_width(inside, k, x.element_size())), out.numel())
    return out


LANES = 8  # partial sums, whatever the number of threads: sums come out the same


def paired_up_sums(plan: TreePlan, gain: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sums of products of sums, (batch, nodes)."""
    at, batch, k = plan.schedule, _batch(gain, x, y), x.shape[-1]
    width = _buffer_width(plan.height + 1, k, x.element_size())
    lanes = max(1, min(LANES, -(-k // width)))
    partial = x.new_zeros(batch, lanes, plan.n_nodes)
    slope, first, second, result = Entries(gain), Entries(x), Entries(y), partial.numpy()

    def job(s: int, lane: int) -> None:
        sx, sy = (np.empty((plan.height + 1, width), result.dtype) for _ in range(2))
        for begin in range(lane * width, k, lanes * width):
            stop, total = min(begin + width, k), result[s, lane]
            topology = at.parent, at.depth, at.cell, at.source, at.eldest
            _paired(*topology, slope[s], first[s], second[s], begin, stop, sx, sy, total)

    _run(job, ((s, lane) for s in range(batch) for lane in range(lanes)), batch * plan.n_nodes * k)
    return partial.sum(1)


def draw(plan: TreePlan, gain: Tensor, noise: Tensor, z: Tensor, *, nodes: bool) -> Tensor:
    """The field that standard normals make, at all nodes (batch, nodes, k) or at the cells (batch, n, k)."""
    at, batch, k = plan.schedule, _batch(gain, noise, z), z.shape[-1]
    out = z.new_empty(batch, plan.n_nodes if nodes else plan.n_cells, k)
    width = _buffer_width(plan.height + 1, k, z.element_size())
    slope, step, given, result = Entries(gain), Entries(noise), Entries(z), out.numpy()

    def job(s: int, begin: int, stop: int) -> None:
        field = np.empty((plan.height + 1, stop - begin), result.dtype)
        topology = at.parent, at.depth, at.cell
        _draw(*topology, slope[s], step[s], given[s], begin, stop, field, result[s], not nodes)

    _run(job, _blocks(batch, k, width), batch * plan.n_nodes * k)
    return out
