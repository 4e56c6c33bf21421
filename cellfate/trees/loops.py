"""The compiled loops over a tree: its schedule, and one batch entry and block of columns of each sweep.

They release the interpreter's lock, keep to the rows and columns they are given and allocate nothing per node.
:mod:`cellfate.trees.sweeps_compiled` hands out the work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

compiled: Any = njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
summing: Any = njit(cache=True, nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy")


# -- topology ----------------------------------------------------------------------------------------------------------


@compiled
def cut(source, pair):  # type: ignore[no-untyped-def]
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
    pieces, rest = cut(source, pair)
    return depth, cell, source, eldest, inner, end, pair, rows, fresh, pieces, rest


@compiled
def chains(source, end, pair, cell, single):  # type: ignore[no-untyped-def]
    """Segments as chains for the batched twin: main and light inputs (nodes + n,), chain, place in it, round of each chain.

    A cell as an input is numbered nodes + n + cell. The main input is the one that needs more rounds (Strahler's order: n cells
    take at most log2(n) rounds), or, where every segment is to be a chain of its own (`single`), the first.
    """
    nodes, n = source.size, pair.shape[0]
    size = nodes + n
    main = np.full(size, -1)
    light = np.full(size, -1)
    chain = np.full(size, -1)
    place = np.zeros(size, np.int64)
    order = np.zeros(size, np.int64)
    rounds = np.zeros(size, np.int64)  # of chains
    count = 0
    for v in range(nodes):
        for t in range(-1, end[v + 1] - end[v]):
            if t < 0:
                e = v
                if cell[v] >= 0:
                    i, j = size + cell[v], -1
                elif source[v] >= 0:
                    i, j = source[v], -1
                else:
                    continue
            else:
                e = nodes + end[v] + t
                i, j = pair[end[v] + t, 0], pair[end[v] + t, 1]
                if j < 0:
                    continue
                if not single and order[j] > order[i]:
                    i, j = j, i
            here = 0
            if i < size:
                here = order[i] + single
            if j >= 0:
                here = max(here, order[j] + 1)
            main[e], light[e], order[e] = i, j, here
            if single or i >= size:
                chain[e] = count
                count += 1
            else:
                chain[e], place[e] = chain[i], place[i] + 1
            rounds[chain[e]] = here  # the last of a chain has the highest
    return main, light, chain, place, rounds[:count]


# -- one number per node -----------------------------------------------------------------------------------------------


@compiled
def factor(cell, source, end, pair, gain, noise, own, precision, h, p, coefficients):  # type: ignore[no-untyped-def]
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
def marginals(  # type: ignore[no-untyped-def]
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
def slopes(  # type: ignore[no-untyped-def]
    parent, cell, source, end, pair, gain, noise, own, precision, h, outside, up, cavity, along,
    d_message, d_outside, d_up, d_cavity, d_rho, d_cell_cavity,
):  # fmt: skip
    """The tangents of `factor` and `marginals`; `outside` of branches only, that of merges is made again."""
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
def whiten(runs, rows, fresh, coefficients, x, out, begin, stop, copy):  # type: ignore[no-untyped-def]
    """Runs of merges applied to columns begin..stop of `out`, in place; rows come from x when they are first met."""
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
def whiten_t(runs, rows, coefficients, x, out, begin, stop, copy):  # type: ignore[no-untyped-def]
    """The same runs backwards, transposed."""
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
def sum_up(parent, cell, source, eldest, gain, x, begin, stop, out):  # type: ignore[no-untyped-def]
    """Every node: its cell, or the sum of its children times their gains."""
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
def pass_down(parent, gain, noise, field, begin, stop):  # type: ignore[no-untyped-def]
    """`field` holds sums and leaves with the field that their noise makes."""
    for v in range(parent.size - 1, -1, -1):
        p, g, q = parent[v], gain[v], noise[v]
        if p < 0:
            for k in range(begin, stop):
                field[v, k] *= q
        else:
            for k in range(begin, stop):
                field[v, k] = q * field[v, k] + g * field[p, k]


@compiled
def times(parent, cell, eldest, inner, gain, noise, x, begin, stop, field, out):  # type: ignore[no-untyped-def]
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
def paired(parent, depth, cell, source, eldest, gain, x, y, begin, stop, sx, sy, total):  # type: ignore[no-untyped-def]
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
def draw(parent, depth, cell, gain, noise, z, begin, stop, field, out, to_cells):  # type: ignore[no-untyped-def]
    """A walk from the roots; `field` has one row per depth, which is all that is open at a time."""
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
