r"""Exact Gaussian algebra along a forest, linear in its nodes.

The field starts at a root as `N(0, noise)` and takes a step :math:`x_{child} = gain\,x_{parent} + N(0, noise)` along each branch;
cell *i* sees :math:`u_i = x_{leaf(i)} + N(0, own_i)`. With the gains from node *e* to the cells below it as :math:`g_e` and
:math:`G = (g_1, g_2, \ldots)`, the covariance of the cells is :math:`A = G\,\mathrm{diag}(noise)\,G' + \mathrm{diag}(own)`.

:class:`TreeFactor` joins sites of precision :math:`\tau_i \ge 0`; its factor is a sequence of plane rotations, Felsenstein's (1973)
contrasts in the square-root information form of Bierman (1977): a segment of the tree is one observation :math:`y = h x + N(0, 1)`
of the node it ends at, two of them turn into one observation and one contrast. Nothing is divided by :math:`\tau` and nothing is
subtracted, so cells without data, branches without length and sites without noise are ordinary cases.

Tensors on the CPU go to :mod:`cellfate.trees.sweeps_compiled`; those on a GPU, and those that a gradient is wanted for, to
:mod:`cellfate.trees.sweeps_batched`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from cellfate.trees.plan import TreePlan

Twin = Literal["auto", "compiled", "batched"]


@dataclass(frozen=True)
class TreeMarginals:
    """Information and variances, node by node and cell by cell, given the sites.

    With R = (A + T^-1)^-1 and the covariance k_p between the cells and the parent of node e, the field's derivatives along a
    branch are `g_e' R g_e = rho` and `k_p' R g_e = gain * parent_cavity * rho`.
    """

    up: Tensor  # (..., nodes), information about a node in the cells below it
    cavity: Tensor  # (..., nodes), variance of a node given all cells that are not below it
    parent_cavity: Tensor  # (..., nodes), variance of its parent given the same cells; 0 at a root
    rho: Tensor  # (..., nodes), up / (1 + up * cavity)
    prior_cavity: Tensor  # (..., n), variance of u_i given all other cells
    variance: Tensor  # (..., n), variance of u_i given all cells

    @property
    def node_variance(self) -> Tensor:  # (..., nodes)
        """Variance of every node given all cells."""
        return self.cavity / (1 + self.up * self.cavity)


@dataclass(frozen=True)
class TreeSlopes:
    """Derivatives of fields of :class:`TreeMarginals` as the precisions move."""

    rho: Tensor  # (..., nodes)
    parent_cavity: Tensor  # (..., nodes)
    prior_cavity: Tensor  # (..., n)
    variance: Tensor  # (..., n)


class TreeFactor:
    r"""Factor of B = I + W A W, W = diag(sqrt(precision)), at a batch of points.

    gain: (..., nodes) >= 0, or None for 1 everywhere, of no meaning at a root; noise: (..., nodes) >= 0; own, precision:
    (..., n) >= 0. Leading dimensions broadcast.
    """

    log_det: Tensor  # (...,), log|B|

    def __init__(
        self, plan: TreePlan, gain: Tensor | None, noise: Tensor, own: Tensor, precision: Tensor, *, twin: Twin = "auto"
    ) -> None:
        self.plan = plan
        self._call = _Call(plan, twin, (gain, noise, own, precision), (1, 1, 1, 1))
        self._gain, self._noise, self._own, self._precision = self._call.flat
        log_det, self._rotations, self._slopes = self._call.twin.factor(plan, *self._call.flat)
        self.log_det = self._call.restore(log_det)
        self._marginals: TreeMarginals | None = None

    def whiten(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """M x for columns x (..., n, k), where M'M = B^-1.

        A row of M x is a contrast, in the place of the cell whose row the merge used up, or what arrives at a root, in the place
        of the first cell of the tree. `out` takes the result and may be x itself.
        """
        return self._rotate(x, out, "whiten")

    def whiten_t(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """M' x for columns x (..., n, k): `whiten_t(whiten(x))` is B^-1 x."""
        return self._rotate(x, out, "whiten_t")

    def _rotate(self, x: Tensor, out: Tensor | None, way: str) -> Tensor:
        call = self._call.join(x)
        (columns,) = call.flat
        into = None
        if out is not None:
            shape = (*call.batch, self.plan.n_cells, x.shape[-1])
            if out.shape != shape or out.dtype != columns.dtype or not out.is_contiguous():
                raise ValueError(f"`out` has to be a contiguous {columns.dtype} tensor of shape {tuple(shape)}.")
            into = out.view(call.size, *shape[-2:])
        result = getattr(call.twin, way)(self.plan, self._call.lift(self._rotations, call), columns, into)
        return out if out is not None else call.restore(result)

    def marginals(self) -> TreeMarginals:
        """Information and variances of all nodes and cells."""
        if self._marginals is None:
            found = self._call.twin.marginals(self.plan, self._slopes, *self._call.flat)
            up, cavity, parent_cavity, rho, prior = (self._call.restore(x) for x in found)
            precision = self._call.restore(self._precision)
            variance = prior / (1 + precision * prior)
            self._marginals = TreeMarginals(up, cavity, parent_cavity, rho, prior, variance)
        return self._marginals

    def marginals_slope(self, d_precision: Tensor) -> TreeSlopes:
        """What :meth:`marginals` changes by, to first order, when the precisions move by `d_precision` (..., n)."""
        known = self.marginals()
        call = self._call.join(d_precision, tail=1)
        at = [self._call.flatten(x, 1) for x in (known.up, known.cavity, known.parent_cavity)]
        lifted = [self._call.lift(x, call) for x in (self._slopes, *self._call.flat, *at)]
        found = call.twin.slopes(self.plan, *lifted, *call.flat)
        d_parent_cavity, d_rho, d_prior = (call.restore(x) for x in found)
        scale = 1 + self._call.restore(self._precision) * known.prior_cavity
        d_variance = (d_prior - known.prior_cavity.square() * d_precision) / scale.square()
        return TreeSlopes(d_rho, d_parent_cavity, d_prior, d_variance)


def up_sums(plan: TreePlan, gain: Tensor | None, x: Tensor, *, twin: Twin = "auto") -> Tensor:
    """Sums s_e = g_e' x of cell columns x (..., n, k) at all nodes, (..., nodes, k)."""
    call = _Call(plan, twin, (gain, x), (1, 2))
    return call.restore(call.twin.up_sums(plan, *call.flat))


def path_sums(plan: TreePlan, gain: Tensor | None, noise: Tensor, x: Tensor, *, twin: Twin = "auto") -> Tensor:
    """The field G diag(noise) G' x of cell columns x (..., n, k), read at all nodes, (..., nodes, k)."""
    call = _Call(plan, twin, (gain, noise, x), (1, 1, 2))
    return call.restore(call.twin.path_sums(plan, *call.flat))


def tree_times(plan: TreePlan, gain: Tensor | None, noise: Tensor, x: Tensor, *, twin: Twin = "auto") -> Tensor:
    """The field G diag(noise) G' x of cell columns x (..., n, k), read at the cells, (..., n, k)."""
    call = _Call(plan, twin, (gain, noise, x), (1, 1, 2))
    return call.restore(call.twin.tree_times(plan, *call.flat))


def paired_up_sums(plan: TreePlan, gain: Tensor | None, x: Tensor, y: Tensor, *, twin: Twin = "auto") -> Tensor:
    """Sums (..., nodes) over the columns of (g_e' x_k)(g_e' y_k); all columns of all nodes are never held at once."""
    call = _Call(plan, twin, (gain, x, y), (1, 2, 2))
    return call.restore(call.twin.paired_up_sums(plan, *call.flat))


def draw(
    plan: TreePlan, gain: Tensor | None, noise: Tensor, z: Tensor, *, nodes: bool = False, twin: Twin = "auto"
) -> Tensor:
    """G diag(noise)^1/2 z of standard normals z (..., nodes, k), at the cells (..., n, k), or at all `nodes`."""
    call = _Call(plan, twin, (gain, noise, z), (1, 1, 2))
    return call.restore(call.twin.draw(plan, *call.flat, nodes=nodes))


class _Call:
    """Tensors with any leading dimensions as a flat batch of one dtype, and the twin that serves them."""

    def __init__(self, plan: TreePlan, twin: Twin, given: tuple[Tensor | None, ...], tails: tuple[int, ...]) -> None:
        tensors = [x for x in given if x is not None]
        if twin == "auto":
            wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
            twin = "batched" if wanted or any(x.device.type != "cpu" for x in tensors) else "compiled"
        if twin == "batched" and any(x.device.type != plan.device.type for x in tensors):
            raise ValueError(
                f"The plan is on {plan.device}, the tensors are on {tensors[0].device}. Build the plan where they are."
            )
        self.plan, self.name = plan, twin
        self.like = tensors[0].new_empty(0)
        for x in tensors[1:]:
            self.like = self.like.to(torch.promote_types(self.like.dtype, x.dtype))
        ones = [self.like.new_ones(plan.n_nodes) if x is None else x for x in given]
        self.batch = torch.broadcast_shapes(*(x.shape[: x.ndim - tail] for x, tail in zip(ones, tails, strict=True)))
        self.flat = [self.flatten(x, tail) for x, tail in zip(ones, tails, strict=True)]

    @property
    def size(self) -> int:
        return math.prod(self.batch)

    @property
    def twin(self) -> ModuleType | Any:
        # numba and the batched twin are only imported where they are used
        if self.name == "compiled":
            from cellfate.trees import sweeps_compiled

            return sweeps_compiled
        from cellfate.trees import sweeps_batched

        return sweeps_batched

    def flatten(self, x: Tensor, tail: int) -> Tensor:  # (batch or 1, ...)
        x = x.to(self.like)
        own = x.shape[x.ndim - tail :]
        if math.prod(x.shape[: x.ndim - tail]) == 1:
            return x.reshape(1, *own)
        return x.expand((*self.batch, *own)).reshape(self.size, *own)

    def restore(self, x: Tensor) -> Tensor:
        x = x.expand(self.size, *x.shape[1:]) if len(x) == 1 else x
        return x.reshape((*self.batch, *x.shape[1:]))

    def lift(self, x: Tensor, other: _Call) -> Tensor:
        """Entries of this batch as entries of a larger one."""
        return x if self.batch == other.batch or len(x) == 1 else other.flatten(self.restore(x), x.ndim - 1)

    def join(self, x: Tensor, tail: int = 2) -> _Call:
        """A call of the same batch with one more tensor."""
        other = object.__new__(_Call)
        other.plan, other.like, other.name = self.plan, self.like, self.name
        if torch.is_grad_enabled() and x.requires_grad and self.name == "compiled":
            raise ValueError('This factor has no gradients. Build it with `twin="batched"`, or pass `x.detach()`.')
        other.batch = torch.broadcast_shapes(self.batch, x.shape[: x.ndim - tail])
        other.flat = [other.flatten(x, tail)]
        return other
