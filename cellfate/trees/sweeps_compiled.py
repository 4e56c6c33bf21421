"""The compiled twin of :mod:`cellfate.trees.sweeps`: one pass over the tree per sweep, each row touched while it is warm.

Kernels are plain compiled loops over one batch entry and one block of columns. They release the interpreter's lock, and
ordinary threads run them (`torch.get_num_threads()`): no threading layer that a fork or a second caller could break. Every number is
made by the same operations in the same order whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cellfate.trees import loops

if TYPE_CHECKING:
    from cellfate.trees.plan import TreePlan

WORTH_A_THREAD = 200_000  # numbers touched
WHOLE_ROW = 1024  # columns
PARTS = 8  # for each thread
BUFFER = 2**27  # bytes of scratch per thread where a sweep has to remember a value per node


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


def _parts(count: int) -> list[tuple[int, int]]:
    """Runs of pieces: all at once on one thread, a few for each of several, so that none waits long for the last."""
    threads = torch.get_num_threads()
    size = max(1, count if threads < 2 else -(-count // (PARTS * threads)))
    return [(first, min(first + size, count)) for first in range(0, count, size)]


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
        log_det[s] = loops.factor(at.cell, at.source, at.end, at.pair, *given, h[s].numpy(), p, coefficients[s].numpy())

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
        loops.marginals(at.parent, at.cell, at.source, at.end, at.pair, *given, outside, *out)
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
        loops.slopes(at.parent, at.cell, at.source, at.end, at.pair, *(x[s] for x in inputs), outside, *given, *out)
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
            loops.whiten_t(runs, at.rows, turn[s], given[s], result[s], begin, stop, not same)
        else:
            loops.whiten(runs, at.rows, at.fresh, turn[s], given[s], result[s], begin, stop, not same)

    # whole rows stream twice as fast as parts of them, so it is rather the tree that is cut; its rest is cut into columns
    phases = [
        lambda: _run(
            lambda first, last, *block: turn_rows(at.pieces[first:last], *block),
            [(*part, *block) for block in _blocks(batch, k, WHOLE_ROW) for part in _parts(len(at.pieces))],
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
        loops.sum_up(at.parent, at.cell, at.source, at.eldest, slope[s], given[s], begin, stop, result[s])

    _run(job, _blocks(batch, k, _row_width(k)), out.numel())
    return out


def path_sums(plan: TreePlan, gain: Tensor, noise: Tensor, x: Tensor) -> Tensor:
    """The field at all nodes, (batch, nodes, k)."""
    at, batch, k = plan.schedule, _batch(gain, noise, x), x.shape[-1]
    out = x.new_empty(batch, plan.n_nodes, k)
    slope, step, given, result = Entries(gain), Entries(noise), Entries(x), out.numpy()

    def job(s: int, begin: int, stop: int) -> None:
        own = result[s]
        loops.sum_up(at.parent, at.cell, at.source, at.eldest, slope[s], given[s], begin, stop, own)
        loops.pass_down(at.parent, slope[s], step[s], own, begin, stop)

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
        loops.times(*topology, slope[s], step[s], given[s], begin, stop, field, result[s])

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
            loops.paired(*topology, slope[s], first[s], second[s], begin, stop, sx, sy, total)

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
        loops.draw(*topology, slope[s], step[s], given[s], begin, stop, field, result[s], not nodes)

    _run(job, _blocks(batch, k, width), batch * plan.n_nodes * k)
    return out
