"""The batched twin of :mod:`cellfate.trees.sweeps`: few launches on long arrays, for GPUs; and differentiable.

Segments (messages through branches, results of merges) come in the rounds of :class:`cellfate.trees.plan.Round`. A round holds
chains of segments that follow one another, each a recurrence that is scanned by doubling: information along a chain is a Moebius
map u -> (a u + b) / (c u + d) with entries >= 0, rows and tangents are linear. Nothing is subtracted but tangents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cellfate.trees.plan import Chains, TreePlan

BLOCK = 32  # columns at once where a value per segment is held


# -- recurrences -------------------------------------------------------------------------------------------------------


def _write(x: Tensor, index: Tensor, value: Tensor) -> None:
    x.index_copy_(1, index, value)


def _linear(chains: Chains, a: Tensor, y: Tensor, start: Tensor, *, down: bool = False) -> Tensor:
    """y_k <- a_k y_(k-1) + y_k along chains, from `start` (batch, chains, k); upwards, or from the last to the first."""
    begin = chains.last if down else chains.first
    a, y = a.clone(), y.clone()
    _write(y, begin, y[:, begin] + a[:, begin, None] * start)
    for far, near in chains.leaps:
        to, of = (near, far) if down else (far, near)
        step = a[:, to]
        _write(y, to, y[:, to] + step[..., None] * y[:, of])
        _write(a, to, step * a[:, of])
    return y


def _moebius(chains: Chains, entries: list[Tensor], start: Tensor, *, down: bool = False) -> Tensor:
    """u_k = (a u + b) / (c u + d) of u_(k-1) along chains; entries a, b, c, d (batch, segments) >= 0."""
    m = torch.stack(torch.broadcast_tensors(*entries), -1)
    for far, near in chains.leaps:
        to, of = (near, far) if down else (far, near)
        (a, b, c, d), (e, f, g, h) = m[:, to].unbind(-1), m[:, of].unbind(-1)
        product = torch.stack([a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h], -1)
        _write(m, to, product / product.amax(-1, keepdim=True))
    a, b, c, d = m.unbind(-1)
    u = start[:, chains.chain]
    return (a * u + b) / (c * u + d)


def _shifted(chains: Chains, y: Tensor, start: Tensor, *, down: bool = False) -> Tensor:
    """y_(k-1), with `start` before the first; downwards y_(k+1) and the last."""
    begin, step = (chains.last, -1) if down else (chains.first, 1)
    before = torch.roll(y, step, 1)
    _write(before, begin, start)
    return before


# -- one number per node -----------------------------------------------------------------------------------------------


def _pick(merge: Tensor, at_merge: Tensor | float, at_node: Tensor) -> Tensor:
    return torch.where(merge, at_merge, at_node)


def _cells_last(plan: TreePlan, values: Tensor) -> Tensor:
    """Room for a value per segment, followed by those of the cells (batch, n, ...)."""
    room = values.new_zeros(len(values), plan.n_nodes + plan.n_cells, *values.shape[2:])
    return torch.cat([room, values], 1)


def _information(
    plan: TreePlan, gain: Tensor, noise: Tensor, own: Tensor, precision: Tensor
) -> Tensor:  # (batch, nodes + 2 n)
    """Information in every segment, at its upper end, and in every cell."""
    gain, noise, own, precision = _together(gain, noise, own, precision)
    u = _cells_last(plan, precision / (1 + precision * own))
    zero = u.new_zeros(())
    for at in plan.rounds:
        g, q, light = gain[:, at.node], noise[:, at.node], u[:, at.light]
        entries = [
            _pick(at.merge, 1.0, g.square()),
            _pick(at.merge, light, zero),
            _pick(at.merge, 0.0, q),
            torch.ones_like(g),
        ]
        _write(u, at.segment, _moebius(at.chains, entries, u[:, at.main[at.chains.first]]))
    return u


def _together(*tensors: Tensor) -> list[Tensor]:
    batch = max(len(x) for x in tensors)
    return [x.expand(batch, *x.shape[1:]) for x in tensors]


def _root(x: Tensor) -> Tensor:
    # the derivative of a square root at zero is no number, and whoever is there has nothing to say
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)


def _up(plan: TreePlan, u: Tensor) -> Tensor:  # (batch, nodes)
    """Information at nodes, before their own branches."""
    return torch.where(plan.holds, u[:, plan.input], 0.0)


def factor(
    plan: TreePlan, gain: Tensor, noise: Tensor, own: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log|B| (batch,), coefficients of the merges (batch, n, 4), information in the segments (batch, nodes + 2 n)."""
    gain, noise, own, precision = _together(gain, noise, own, precision)
    u = _information(plan, gain, noise, own, precision)
    z = _up(plan, u) * noise
    log_det = torch.log1p(precision * own).sum(-1) + torch.log1p(z).sum(-1)
    # what rows have still to be multiplied by, since their last merge
    shrink = 1 / torch.sqrt(1 + z)
    p = _cells_last(plan, 1 / torch.sqrt(1 + precision * own))
    for at in plan.rounds:
        a = _pick(at.merge, 0.0, shrink[:, at.node])
        y = at.merge.to(a).expand_as(a)
        _write(p, at.segment, _linear(at.chains, a, y[..., None], p[:, at.main[at.chains.first], None])[..., 0])
    i, j = plan.pair.unbind(1)
    alone, j = j < 0, j.clamp(min=0)
    total = u[:, i] + u[:, j]
    told = total > 0
    share = torch.where(told, total, 1.0)
    c, s = torch.where(told, _root(u[:, i] / share), 1.0), _root(u[:, j] / share)
    c, s = torch.where(alone, 1.0, c), torch.where(alone, 0.0, s)
    return log_det, torch.stack([c * p[:, i], s * p[:, j], s * p[:, i], -c * p[:, j]], -1), u


def _outside(plan: TreePlan, u: Tensor, gain: Tensor, noise: Tensor) -> Tensor:  # (batch, nodes + 2 n)
    """Variance at the upper end of every segment, and of every cell's leaf, given the cells that are not below."""
    w = torch.zeros_like(u)
    for at in reversed(plan.rounds):
        g, q, light = gain[:, at.node], noise[:, at.node], u[:, at.light]
        entries = [
            _pick(at.merge, 1.0, g.square()),
            _pick(at.merge, 0.0, q),
            _pick(at.merge, light, light.new_zeros(())),
            torch.ones_like(g),
        ]
        top = w[:, at.segment[at.chains.last]]
        here = _moebius(at.chains, entries, top, down=True)
        _write(w, at.main, here)
        before = _shifted(at.chains, here, top, down=True)[:, at.merge]
        _write(w, at.light[at.merge], before / (1 + u[:, at.main[at.merge]] * before))
    return w


def _below(plan: TreePlan, field: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`field` (batch, nodes, k) with x = a x_parent + b filled in where nodes have no cells below them."""
    bare = plan.bare
    if not len(bare):
        return field
    above = plan.parent[bare]
    a, b = a[:, bare, None], b[:, bare]
    a = torch.where((above < 0)[:, None], 0.0, a)
    on = plan.holds[above.clamp(min=0)] & (above >= 0)
    y = b + torch.where(on[:, None], a * field[:, above.clamp(min=0)], 0.0)
    a = torch.where(on[:, None], 0.0, a)
    for jump in plan.jumps:
        y, a = y + a * y[:, jump], a * a[:, jump]
    return field.index_copy(1, bare, y)


def marginals(
    plan: TreePlan, u: Tensor, gain: Tensor, noise: Tensor, own: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """up, cavity, parent_cavity, rho (batch, nodes) and prior_cavity (batch, n)."""
    u, gain, noise, own = _together(u, gain, noise, own)
    w, up = _outside(plan, u, gain, noise), _up(plan, u)
    cavity = torch.where(plan.holds, w[:, plan.input], 0.0)
    given_all = _below(plan, (cavity / (1 + up * cavity))[..., None], gain.square(), noise[..., None])[..., 0]
    cavity = torch.where(plan.holds, cavity, given_all)
    above = torch.where(plan.parent < 0, 0.0, given_all[:, plan.parent.clamp(min=0)])
    parent_cavity = torch.where(plan.holds, w[:, : plan.n_nodes], above)
    return up, cavity, parent_cavity, up / (1 + up * cavity), cavity[:, plan.leaf] + own


def slopes(
    plan: TreePlan,
    u: Tensor,
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
    u, gain, noise, own, precision, along, up, cavity = _together(u, gain, noise, own, precision, along, up, cavity)
    w = _outside(plan, u, gain, noise)
    du, dw = _cells_last(plan, along / (1 + precision * own).square()), torch.zeros_like(w)
    through = (gain / (1 + up * noise)).square()
    for at in plan.rounds:
        a = _pick(at.merge, 1.0, through[:, at.node])
        b = _pick(at.merge, du[:, at.light], du.new_zeros(()))
        _write(du, at.segment, _linear(at.chains, a, b[..., None], du[:, at.main[at.chains.first], None])[..., 0])
    for at in reversed(plan.rounds):
        here, light = w[:, at.segment], at.light
        scale = (1 + u[:, light] * here).square()
        a = _pick(at.merge, 1 / scale, gain[:, at.node].square())
        b = _pick(at.merge, -here.square() * du[:, light] / scale, here.new_zeros(()))
        top = dw[:, at.segment[at.chains.last], None]
        d_here = _linear(at.chains, a, b[..., None], top, down=True)
        _write(dw, at.main, d_here[..., 0])
        before, here = _shifted(at.chains, d_here, top, down=True)[:, at.merge, 0], here[:, at.merge]
        main = at.main[at.merge]
        _write(dw, light[at.merge], (before - here.square() * du[:, main]) / (1 + u[:, main] * here).square())
    d_up = _up(plan, du)
    d_cavity = torch.where(plan.holds, dw[:, plan.input], 0.0)
    scale = (1 + up * cavity).square()
    nothing = d_cavity.new_zeros(1, 1, 1).expand(*d_cavity.shape, 1)
    given_all = ((d_cavity - cavity.square() * d_up) / scale)[..., None]
    d_given_all = _below(plan, given_all, gain.square(), nothing)[..., 0]
    d_cavity = torch.where(plan.holds, d_cavity, d_given_all)
    above = torch.where(plan.parent < 0, 0.0, d_given_all[:, plan.parent.clamp(min=0)])
    d_parent_cavity = torch.where(plan.holds, dw[:, : plan.n_nodes], above)
    return d_parent_cavity, (d_up - up.square() * d_cavity) / scale, d_cavity[:, plan.leaf]


# -- columns -----------------------------------------------------------------------------------------------------------


def whiten(plan: TreePlan, coefficients: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """M x, (batch, n, k)."""
    coefficients, x = _together(coefficients, x)
    y = x.clone()
    for at in plan.rotations:
        turn = coefficients[:, at.merge]
        kept, contrast = turn[..., :2], turn[..., 2:]
        a, c = (torch.where(at.swapped, t[..., 1], t[..., 0]) for t in (kept, contrast))
        b, d = (torch.where(at.swapped, t[..., 0], t[..., 1])[..., None] for t in (kept, contrast))
        start, light = y[:, at.head], y[:, at.light]
        rows = _linear(at.chains, a, b * light, start)
        before = _shifted(at.chains, rows, start)
        _write(y, at.done, c[..., None] * before + d * light)
        _write(y, at.kept, rows[:, at.chains.last])
    _write(y, plan.root_row, coefficients[:, plan.root_merge, :1] * y[:, plan.root_row])
    return y if out is None else out.copy_(y)


def whiten_t(plan: TreePlan, coefficients: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """M' x, (batch, n, k)."""
    coefficients, x = _together(coefficients, x)
    y = x.clone()
    _write(y, plan.root_row, coefficients[:, plan.root_merge, :1] * y[:, plan.root_row])
    for at in reversed(plan.rotations):
        turn = coefficients[:, at.merge]
        kept, contrast = turn[..., :2], turn[..., 2:]
        a, c = (torch.where(at.swapped, t[..., 1], t[..., 0]) for t in (kept, contrast))
        b, d = (torch.where(at.swapped, t[..., 0], t[..., 1])[..., None] for t in (kept, contrast))
        start, done = y[:, at.kept], y[:, at.done]
        rows = _linear(at.chains, a, c[..., None] * done, start, down=True)
        before = _shifted(at.chains, rows, start, down=True)
        _write(y, at.light, b * before + d * done)
        _write(y, at.head, rows[:, at.chains.first])
    return y if out is None else out.copy_(y)


def up_sums(plan: TreePlan, gain: Tensor, x: Tensor) -> Tensor:
    """Sums at all nodes, (batch, nodes, k)."""
    gain, x = _together(gain, x)
    z = _cells_last(plan, x)
    for at in plan.rounds:
        a = _pick(at.merge, 1.0, gain[:, at.node])
        b = _pick(at.merge[:, None], z[:, at.light], z.new_zeros(()))
        _write(z, at.segment, _linear(at.chains, a, b, z[:, at.main[at.chains.first]]))
    return torch.where(plan.holds[:, None], z[:, plan.input], 0.0)


def _descend(plan: TreePlan, gain: Tensor, b: Tensor) -> Tensor:
    """The x = gain x_parent + b of all nodes, (batch, nodes, k)."""
    gain, b = _together(gain, b)
    field = b.new_zeros(len(b), plan.n_nodes + 2 * plan.n_cells, b.shape[-1])
    for at in reversed(plan.rounds):
        a = _pick(at.merge, 1.0, gain[:, at.node])
        step = _pick(at.merge[:, None], 0.0, b[:, at.node])
        top = field[:, at.segment[at.chains.last]]
        here = _linear(at.chains, a, step, top, down=True)
        _write(field, at.main, here)
        _write(field, at.light[at.merge], here[:, at.merge])
    return _below(plan, torch.where(plan.holds[:, None], field[:, plan.input], 0.0), gain, b)


def path_sums(plan: TreePlan, gain: Tensor, noise: Tensor, x: Tensor) -> Tensor:
    """The field at all nodes, (batch, nodes, k)."""
    return torch.cat(list(_fields(plan, gain, noise, x)), -1)


def tree_times(plan: TreePlan, gain: Tensor, noise: Tensor, x: Tensor) -> Tensor:
    """The field at the cells, (batch, n, k)."""
    return torch.cat([field[:, plan.leaf] for field in _fields(plan, gain, noise, x)], -1)


def _fields(plan: TreePlan, gain: Tensor, noise: Tensor, x: Tensor) -> Iterator[Tensor]:
    for block in x.split(BLOCK, -1):
        yield _descend(plan, gain, noise[..., None] * up_sums(plan, gain, block))


def paired_up_sums(plan: TreePlan, gain: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sums of products of sums, (batch, nodes)."""
    gain, x, y = _together(gain, x, y)
    total = x.new_zeros(len(x), plan.n_nodes)
    for first, second in zip(x.split(BLOCK, -1), y.split(BLOCK, -1), strict=True):
        total = total + (up_sums(plan, gain, first) * up_sums(plan, gain, second)).sum(-1)
    return total


def draw(plan: TreePlan, gain: Tensor, noise: Tensor, z: Tensor, *, nodes: bool) -> Tensor:
    """The field that standard normals make, at all nodes (batch, nodes, k) or at the cells (batch, n, k)."""
    fields = (_descend(plan, gain, _root(noise)[..., None] * block) for block in z.split(BLOCK, -1))
    return torch.cat([field if nodes else field[:, plan.leaf] for field in fields], -1)
