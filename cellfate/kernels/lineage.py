"""Ancestry: Gaussian steps from parent to child along a tree.

A new lineage kernel is a gain and a noise per branch. Everything else (dense entries here, linear-time sweeps in an engine)
follows from those, because the field is Markov on the tree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cellfate.errors import DataError
from cellfate.kernels.base import Dense, Hyperparameter, Kernel, mask_padding, with_copies
from cellfate.trees.forest import Forest


@dataclass(frozen=True)
class TreeSteps(Dense):
    """`child | parent ~ N(gain * parent, noise)`; a root is its noise alone.

    gain, noise: (..., nodes) in the order of the forest, gain > 0; `gain=None` stands for 1 everywhere.
    """

    parent: Tensor  # (nodes,), -1 at a root
    gain: Tensor | None
    noise: Tensor

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Log-gain from the root and variance of every node, (..., nodes).

        By pointer jumping: each round composes the step of a node with that of the node it points to and doubles the stride,
        so a path of any depth takes log2(depth) rounds.
        """
        log_gain = torch.zeros_like(self.noise) if self.gain is None else torch.log(self.gain)
        root = self.parent < 0
        log_gain = torch.where(root, torch.zeros_like(log_gain), log_gain)
        variance, jump = self.noise, self.parent.clone()
        while bool((jump >= 0).any()):
            on, target = jump >= 0, jump.clamp(min=0)
            variance = variance + torch.where(
                on, torch.exp(2 * log_gain) * variance[..., target], torch.zeros_like(variance)
            )
            log_gain = log_gain + torch.where(on, log_gain[..., target], torch.zeros_like(log_gain))
            jump = torch.where(on, jump[target], jump)
        return log_gain, variance

    def dense(self, geometry: TreeGeometry) -> Tensor:
        log_gain, variance = self.marginals()
        k = variance[..., geometry.ancestor]
        if self.gain is not None:
            at_leaf = log_gain[..., geometry.leaf]
            k = k * torch.exp(at_leaf[..., :, None] + at_leaf[..., None, :] - 2 * log_gain[..., geometry.ancestor])
        return k * geometry.related


@dataclass(frozen=True)
class TreeGeometry:
    """For blocks of cells: their leaves, most recent common ancestors, and whether there is one."""

    leaf: Tensor  # (blocks, s)
    ancestor: Tensor  # (blocks, s, s)
    related: Tensor  # (blocks, s, s), 1 or 0


@dataclass(frozen=True, eq=False)
class LineageKernel(Kernel):
    """A kernel on a forest; `leaf` (n,) is the node of each cell."""

    forest: Forest
    leaf: np.ndarray

    @property
    def n(self) -> int:  # type: ignore[override]
        return len(self.leaf)

    @cached_property
    def _parent(self) -> Tensor:
        return torch.as_tensor(self.forest.parent)

    @cached_property
    def _length(self) -> Tensor:
        return torch.as_tensor(self.forest.branch_length)

    def _above(self, like: Tensor) -> Tensor:
        """Path (nodes,) from the root to where the branch of each node begins."""
        return torch.as_tensor(self.forest.depth - self.forest.branch_length).to(like)

    @property
    def _height(self) -> float:
        height = float(self.forest.depth[self.leaf].max())
        if height <= 0:
            raise DataError("all branches above the cells have length 0: the tree says nothing about ancestry.")
        return height

    def geometry(self, cells: Tensor) -> TreeGeometry:
        device = cells.device
        leaf = torch.as_tensor(np.append(self.leaf, self.leaf[0]), device=device)[cells]
        ancestor = torch.stack([torch.as_tensor(self.forest.mrca(row)) for row in leaf.cpu().numpy()]).to(device)
        related = mask_padding((ancestor >= 0).to(self._length.dtype), cells, self.n)
        return TreeGeometry(leaf, ancestor.clamp(min=0), related)

    def at(self, cells: np.ndarray) -> LineageKernel:
        forest, leaf = self.forest.above(self.leaf[cells])  # some cells of many: most of the tree is not above any
        return replace(self, forest=forest, leaf=leaf)

    def copied(self, count: int) -> Kernel:
        leaf = np.concatenate([self.leaf + copy * self.forest.n_nodes for copy in range(count)])
        return with_copies(replace(self, forest=self.forest.copies(count), leaf=leaf), count)

    def independent(self) -> np.ndarray:
        return self.forest.tree[self.leaf]


@dataclass(frozen=True, eq=False)
class Brownian(LineageKernel):
    """Ancestry that drifts: the covariance is the path shared from the root."""

    def structure(self, values: dict[str, Tensor], like: Tensor) -> TreeSteps:
        return TreeSteps(self._parent.to(like.device), None, self._length.to(like))


@dataclass(frozen=True, eq=False)
class OrnsteinUhlenbeck(LineageKernel):
    r"""Ancestry that forgets: :math:`k_{ij} = \exp(-\alpha d_{ij})`, with the path length :math:`d_{ij}` between the leaves.

    Stationary: a root starts at full variance. The half-life is :math:`\ln 2/\alpha`. After Hansen (1997).
    """

    alpha: float | None = None

    @cached_property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:  # type: ignore[override]
        # from a half-life of seven tree heights, all but brownian, to a fourteenth of one, all but independent
        return (Hyperparameter("alpha", "log", 0.1 / self._height, 10.0 / self._height, self.alpha),)

    def structure(self, values: dict[str, Tensor], like: Tensor) -> TreeSteps:
        parent = self._parent.to(like.device)
        # beyond 80 e-folds the past is gone in any dtype, and the logarithm of the gain stays finite
        x = (values["alpha"].to(like)[..., None] * self._length.to(like)).clamp(max=80.0)
        noise = torch.where(
            parent < 0, torch.ones_like(x), -torch.expm1(-2 * x)
        )  # 1 - exp(-2x) cancels on short branches
        return TreeSteps(parent, torch.exp(-x), noise)


@dataclass(frozen=True, eq=False)
class Pagel(LineageKernel):
    """Ancestry in part: internal branches scaled by lambda, what this takes from a leaf's path put on its last branch.

    lambda = 1 is brownian, lambda = 0 independent cells. After Pagel (1999).
    """

    lam: float | None = None

    @cached_property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:  # type: ignore[override]
        return (Hyperparameter("lambda", "logit", 0.0, 1.0, self.lam),)

    def structure(self, values: dict[str, Tensor], like: Tensor) -> TreeSteps:
        lam = values["lambda"].to(like)[..., None]
        length = self._length.to(like)
        is_leaf = torch.as_tensor(self.forest.is_leaf, device=like.device)
        above = self._above(like)
        return TreeSteps(
            self._parent.to(like.device), None, torch.where(is_leaf, length + (1 - lam) * above, lam * length)
        )


@dataclass(frozen=True, eq=False)
class EarlyBurst(LineageKernel):
    r"""Ancestry that settles: drift slows down with the path from the root as :math:`\exp(-r\,t)`.

    For fates that are decided early and then kept: late relatives are all but equal. r -> 0 is brownian. After Harmon et al.
    (2010), where the rate of change is :math:`\sigma^2 e^{-r t}`.
    """

    rate: float | None = None

    @cached_property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:  # type: ignore[override]
        # over the height of the tree drift slows by a tenth, all but brownian, up to twenty e-folds
        return (Hyperparameter("rate", "log", 0.1 / self._height, 20.0 / self._height, self.rate),)

    def structure(self, values: dict[str, Tensor], like: Tensor) -> TreeSteps:
        rate = values["rate"].to(like)[..., None]
        noise = torch.exp(-rate * self._above(like)) * -torch.expm1(-rate * self._length.to(like)) / rate
        return TreeSteps(self._parent.to(like.device), None, noise)


@dataclass(frozen=True, eq=False)
class Clone(LineageKernel):
    """Ancestry as membership: cells of a clone share one value, clones are independent.

    A clone is a tree of the forest, or, where there is one tree only, a subtree below its first branching.
    """

    @cached_property
    def _founder(self) -> np.ndarray:
        """Marks the node at which each clone begins."""
        root = self.forest.is_root
        if self.forest.n_trees > 1 or self.forest.n_nodes == 1:
            return root
        stem = int(np.flatnonzero(root)[0])
        while self.forest.n_children[stem] == 1:  # a stem without branches founds nothing
            stem = int(np.flatnonzero(self.forest.parent == stem)[0])
        return self.forest.parent == stem if self.forest.n_children[stem] else root

    @cached_property
    def _clone(self) -> np.ndarray:
        """The founder of every node (nodes,), -1 for the root of a single tree."""
        clone = np.where(self._founder, np.arange(self.forest.n_nodes), -1)
        for node in range(self.forest.n_nodes - 1, -1, -1):  # post-order backwards: parents before children
            if clone[node] < 0 and self.forest.parent[node] >= 0:
                clone[node] = clone[self.forest.parent[node]]
        return clone

    def structure(self, values: dict[str, Tensor], like: Tensor) -> TreeSteps:
        return TreeSteps(self._parent.to(like.device), None, torch.as_tensor(self._founder).to(like))

    def copied(self, count: int) -> Kernel:
        other = super().copied(count)
        other.__dict__["_founder"] = np.tile(self._founder, count)  # of a single tree, which is one no longer
        return other

    def at(self, cells: np.ndarray) -> LineageKernel:
        other = super().at(cells)
        above = self.forest.is_above(self.leaf[cells])
        other.__dict__["_founder"] = self._founder[above]  # fewer branches must not make other clones
        return other

    def independent(self) -> np.ndarray:
        return self._clone[self.leaf]


LINEAGE_KERNELS: dict[str, type[LineageKernel]] = {
    "brownian": Brownian,
    "ou": OrnsteinUhlenbeck,
    "pagel": Pagel,
    "early_burst": EarlyBurst,
    "clone": Clone,
}
