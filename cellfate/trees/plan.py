"""What the sweeps need of a topology, worked out once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = 200  # more than that, one after the other, and trees are taken as chains


@dataclass(frozen=True, eq=False)
class Schedule:
    """The order of all merges, and where each sweep finds what it needs; `int64` and contiguous, as the compiled twin wants it.

    A **segment** is what moves up the tree: a node's message through its own branch (numbered as the node) or what a merge keeps
    (`nodes` + number of the merge). A node with many children merges them as a balanced tournament, each merge as early as it
    can come, so that a star is as deep as a balanced tree and rows are still warm when they are met again. A root ends with a
    merge of its own, with nothing: so n cells make n merges, each of which finishes one row.
    """

    parent: np.ndarray  # (nodes,), -1 at a root
    depth: np.ndarray  # (nodes,), branches from the root
    cell: np.ndarray  # (nodes,), the cell on a node, -1 where there is none
    source: (
        np.ndarray
    )  # (nodes,), the segment in which all that a node's children say ends; -1 at leaves, -2 over no cell
    eldest: np.ndarray  # (nodes,), 1 where a node is the first child of its parent
    inner: np.ndarray  # (nodes,), numbers the nodes with children, -1 at leaves
    end: np.ndarray  # (nodes + 1,), merges that come right after node v are end[v]..end[v + 1]
    pair: np.ndarray  # (n, 2), the segments that a merge joins, the second -1 at a root
    rows: (
        np.ndarray
    )  # (n, 2), the cells whose rows hold them: what is kept goes to the first, the contrast to the second
    fresh: np.ndarray  # (n,), +1 if the first row has not been met before, +2 if the second
    pieces: np.ndarray  # (pieces, 2), runs of merges that share no row
    rest: np.ndarray  # (runs, 2), what is left of the merges and comes after the pieces


@dataclass(frozen=True, eq=False)
class Chains:
    """Runs of a flat array, each of which is a recurrence, to be scanned by doubling."""

    first: Tensor  # (chains,)
    last: Tensor  # (chains,)
    chain: Tensor  # (flat,), the chain of every element
    leaps: tuple[tuple[Tensor, Tensor], ...]  # elements that are 1, 2, 4, ... further in a chain than others, and those

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device) -> Chains:
        last = np.cumsum(lengths) - 1
        first = last - lengths + 1
        chain = np.repeat(np.arange(lengths.size), lengths)
        place, stride, leaps = np.arange(chain.size) - first[chain], 1, []
        while (far := np.flatnonzero(place >= stride)).size:
            leaps.append((torch.as_tensor(far, device=device), torch.as_tensor(far - stride, device=device)))
            stride *= 2
        ends = torch.as_tensor(first, device=device), torch.as_tensor(last, device=device)
        return cls(*ends, torch.as_tensor(chain, device=device), tuple(leaps))


@dataclass(frozen=True, eq=False)
class Round:
    """Segments that the batched twin works out at once, all (flat,), chain after chain from the leaves up.

    A cell as an input is numbered `nodes + n + cell`. What belongs to merges (`light`) or to nodes (`node`) only, is 0 elsewhere.
    """

    segment: Tensor
    main: Tensor  # the input that a chain follows
    light: Tensor  # the other one, of a merge
    node: Tensor
    merge: Tensor  # bool
    chains: Chains


@dataclass(frozen=True, eq=False)
class Rotations:
    """The merges of a :class:`Round` as they act on rows; chains skip the nodes."""

    merge: Tensor  # (flat,), their numbers
    swapped: Tensor  # (flat,) bool, whether the chain is the second input
    light: Tensor  # (flat,), row that comes in
    done: Tensor  # (flat,), row that the contrast goes to
    head: Tensor  # (chains,), row at the beginning
    kept: Tensor  # (chains,), row that holds the result
    chains: Chains


class TreePlan:
    """Topology of a forest in post-order with cells on some of its leaves.

    `parent` (nodes,) is -1 at a root, and a subtree is a contiguous run of nodes that ends at its top, as in
    :class:`cellfate.trees.forest.Forest`; `leaf` (n,) is the node of each cell.
    """

    def __init__(self, parent: Any, leaf: Any, device: torch.device | str = "cpu") -> None:
        from cellfate.trees import loops

        above = torch.as_tensor(parent).cpu().numpy().astype(np.int64)
        at = torch.as_tensor(leaf).cpu().numpy().astype(np.int64)
        self.n_nodes, self.n_cells = above.size, at.size
        self.device = torch.device(device)
        if self.n_cells == 0:
            raise ValueError("The tree holds no cell. Give the leaf of at least one.")
        if at.min() < 0 or at.max() >= self.n_nodes:
            raise ValueError(f"Leaves have to be nodes of the tree, 0..{self.n_nodes - 1}; got {at.min()}..{at.max()}.")
        below = above[above >= 0]
        if ((above >= 0) & (above <= np.arange(self.n_nodes))).any() or above.max() >= self.n_nodes:
            raise ValueError("The nodes are not in post-order: a parent has to come after its children.")
        if (np.bincount(below, minlength=self.n_nodes)[at] > 0).any():
            raise ValueError("Some cells sit on nodes that have children. Give every cell a leaf of its own.")
        if np.bincount(at, minlength=self.n_nodes).max() > 1:
            raise ValueError("Some leaves hold several cells. Give every cell a leaf of its own.")
        self.parent = torch.as_tensor(above, device=self.device)
        self.leaf = torch.as_tensor(at, device=self.device)
        self.schedule = Schedule(above, *loops.schedule(above, at))

    @cached_property
    def height(self) -> int:
        """Branches from a root to the deepest leaf."""
        return int(self.schedule.depth.max())

    # -- what the batched twin needs -----------------------------------------------------------------------------------

    @cached_property
    def rounds(self) -> tuple[Round, ...]:
        """Level by level where levels are few, else in chains: log2(n) rounds at most, of log2(nodes) steps at most."""
        return self._batched[0]

    @cached_property
    def rotations(self) -> tuple[Rotations, ...]:
        """The rounds' merges."""
        return self._batched[1]

    @property
    def steps(self) -> int:
        """Batched steps of one sweep, each a handful of launches."""
        return sum(1 + len(at.chains.leaps) for at in self.rounds)

    @cached_property
    def _batched(self) -> tuple[tuple[Round, ...], tuple[Rotations, ...]]:
        from cellfate.trees import loops

        at = self.schedule
        topology = at.source, at.end, at.pair, at.cell
        main, light, chain, place, order = loops.chains(*topology, True)
        if int(order.max()) >= LEVELS:
            main, light, chain, place, order = loops.chains(*topology, False)
        rank = np.argsort(order, kind="stable")  # chains by round
        used = np.flatnonzero(chain >= 0)
        lengths = np.bincount(chain[used], minlength=order.size)[rank]
        begin = np.empty_like(rank)
        begin[rank] = np.cumsum(lengths) - lengths
        flat = np.empty_like(used)
        flat[begin[chain[used]] + place[used]] = used
        cuts = np.searchsorted(order[rank], np.arange(order.max() + 2))
        ends = np.append(0, np.cumsum(lengths))
        rounds, rotations = [], []
        for low, high in pairwise(cuts.tolist()):
            segment = flat[ends[low] : ends[high]]
            rounds.append(self._round(segment, main[segment], light[segment], lengths[low:high]))
            merge = segment >= self.n_nodes
            own = np.repeat(np.arange(high - low), lengths[low:high])[merge]
            if own.size:
                rotations.append(self._rotations(segment[merge], main, light, np.bincount(own)))
        return tuple(rounds), tuple(rotations)

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(x), device=self.device)

    def _round(self, segment: np.ndarray, main: np.ndarray, light: np.ndarray, lengths: np.ndarray) -> Round:
        merge = segment >= self.n_nodes
        return Round(
            segment=self._tensor(segment),
            main=self._tensor(main),
            light=self._tensor(np.where(merge, light, 0)),
            node=self._tensor(np.where(merge, 0, segment)),
            merge=self._tensor(merge),
            chains=Chains.of(lengths, self.device),
        )

    def _rotations(self, segment: np.ndarray, main: np.ndarray, light: np.ndarray, lengths: np.ndarray) -> Rotations:
        at, lengths = self.schedule, lengths[lengths > 0]
        t = segment - self.n_nodes
        swapped = main[segment] != at.pair[t, 0]
        last = np.cumsum(lengths) - 1
        first = last - lengths + 1
        followed = np.where(swapped, at.rows[t, 1], at.rows[t, 0])
        return Rotations(
            merge=self._tensor(t),
            swapped=self._tensor(swapped),
            light=self._tensor(np.where(swapped, at.rows[t, 0], at.rows[t, 1])),
            done=self._tensor(at.rows[t, 1]),
            head=self._tensor(followed[first]),
            kept=self._tensor(at.rows[t[last], 0]),
            chains=Chains.of(lengths, self.device),
        )

    @cached_property
    def pair(self) -> Tensor:  # (n, 2)
        """See :class:`Schedule`."""
        return self._tensor(self.schedule.pair)

    @cached_property
    def root_merge(self) -> Tensor:  # (roots,)
        """The merges of roots with nothing."""
        return self._tensor(np.flatnonzero(self.schedule.pair[:, 1] < 0))

    @cached_property
    def root_row(self) -> Tensor:  # (roots,)
        """The rows that arrive at roots."""
        return self._tensor(self.schedule.rows[self.schedule.pair[:, 1] < 0, 0])

    @cached_property
    def holds(self) -> Tensor:  # (nodes,) bool
        """Whether there are cells at a node or below it."""
        return self._tensor((self.schedule.cell >= 0) | (self.schedule.source >= 0))

    @cached_property
    def input(self) -> Tensor:  # (nodes,)
        """Segment or cell (`nodes + n + cell`) in which a node hears of the cells below it; 0 where there are none."""
        at = self.schedule
        return self._tensor(
            np.where(at.cell >= 0, self.n_nodes + self.n_cells + at.cell, np.where(at.source >= 0, at.source, 0))
        )

    @cached_property
    def bare(self) -> Tensor:  # (bare,)
        """Nodes without cells at them or below."""
        return torch.nonzero(~self.holds)[:, 0]

    @cached_property
    def jumps(self) -> tuple[Tensor, ...]:
        """Ancestors of the bare nodes 1, 2, 4, ... branches up, as places among them; their tops are their own."""
        bare, above = self.bare.cpu().numpy(), self.schedule.parent
        place = np.full(self.n_nodes, -1)
        place[bare] = np.arange(bare.size)
        up = np.where(above[bare] >= 0, place[above[bare]], -1)
        jump = np.where(up >= 0, up, np.arange(bare.size))
        out = [self._tensor(jump)]
        while (jump != jump[jump]).any():
            jump = jump[jump]
            out.append(self._tensor(jump))
        return tuple(out)
