"""Independent blocks of cells, batched by size.

Specimens that share only hyperparameters and fixed effects never meet in one matrix. Blocks of similar size are stacked; the few
cells that pad a stack have no prior variance and no data, and so change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

PADDING = 1.25  # largest ratio of block sizes within a stack


def connect(labels: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Block (n,) of each cell: cells that share a label in any of `labels` are in one block."""
    edges = [np.stack([np.arange(n), n + offset + code], 1) for offset, code in _offsets(labels)]
    if not edges:
        return np.zeros(n, dtype=np.int64)
    rows, cols = np.concatenate(edges).T
    size = int(max(rows.max(), cols.max())) + 1
    graph = coo_matrix((np.ones(len(rows)), (rows, cols)), shape=(size, size))
    return connected_components(graph, directed=False)[1][:n]


def _offsets(labels: Sequence[np.ndarray]) -> list[tuple[int, np.ndarray]]:
    out, offset = [], 0
    for label in labels:
        codes = np.unique(label, return_inverse=True)[1]
        out.append((offset, codes))
        offset += int(codes.max()) + 1
    return out


class Blocks:
    """`stacks`: indices (blocks, s) into the cells, `n` for padding; one tensor per stack."""

    def __init__(self, block: np.ndarray, device: torch.device | str = "cpu") -> None:
        self.n = len(block)
        members = np.split(np.argsort(block, kind="stable"), np.cumsum(np.unique(block, return_counts=True)[1])[:-1])
        members.sort(key=len)
        groups: list[list[np.ndarray]] = []
        for cells in members:
            if groups and len(cells) <= PADDING * len(groups[-1][0]):
                groups[-1].append(cells)
            else:
                groups.append([cells])
        self.stacks: list[Tensor] = []
        for group in groups:
            index = np.full((len(group), len(group[-1])), self.n)
            for row, cells in zip(index, group, strict=True):
                row[: len(cells)] = cells
            self.stacks.append(torch.as_tensor(index, device=device))
        slots = torch.cat([stack.reshape(-1) for stack in self.stacks])
        self._slot = torch.empty(self.n, dtype=torch.long, device=device)
        real = slots < self.n
        self._slot[slots[real]] = torch.arange(len(slots), device=device)[real]
        self.count = len(members)
        self.largest = max(len(cells) for cells in members)
        self.entries = sum(stack.shape[0] * stack.shape[1] ** 2 for stack in self.stacks)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Columns (..., n, k) to one (..., blocks, s, k) per stack, padding zero."""
        padded = torch.cat([x, x.new_zeros(*x.shape[:-2], 1, x.shape[-1])], -2)
        return [padded[..., stack, :] for stack in self.stacks]

    def scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """One (..., blocks, s, k) per stack back to columns (..., n, k)."""
        flat = torch.cat([part.flatten(-3, -2) for part in parts], -2)
        return flat[..., self._slot, :]
