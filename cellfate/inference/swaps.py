"""A referee of the score test that believes in no distribution: cells swapped within sets that the null model holds alike.

Under a null model of ancestry alone, cells of a small clade are all but exchangeable, so that their places may be swapped; under one of
neighborhood alone, the ancestors of cells of one small neighborhood. Swapping leaves the null model, covariates and exposures of every cell
as they are and only moves the tested component: b'Kb with the entries of b swapped, for the weights b of the null fit. Coarser structure, which
the sets do not break up, stays in every swap and so is no evidence.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from cellfate.engines.base import Engine
from cellfate.inference.score import Null, tested
from cellfate.kernels.base import Component

AT_ONCE = 64  # swaps beside each other


@torch.no_grad()
def swap_test(
    null: Null, engine: Engine, component: Component, sets: np.ndarray, *, count: int, rng: np.random.Generator
) -> float:
    """How often swapped cells, within `sets` (n,) of labels, make the component look as present as the cells do.

    Of several shapes the one that stands out most counts, each by its own mean and spread over the swaps.
    """
    operators = tested(null, engine, component)[1]
    b, done = null.b.cpu().numpy(), 0
    found = np.empty((len(operators), count + 1))
    for orders in swaps(sets, count, rng):
        part = slice(done, done + len(orders))
        moved = torch.as_tensor(b[orders].T.copy()).to(null.b)
        for q, k in zip(found, operators, strict=True):
            q[part] = (moved * k(moved)).sum(0).cpu().numpy()
        done += len(orders)
    centered, spread = found - found.mean(1, keepdims=True), found.std(1, keepdims=True)
    moves = spread > 1e-10 * np.abs(found).max(1, keepdims=True)  # and not by rounding alone
    most = np.where(moves, centered / np.where(moves, spread, 1.0), 0.0).max(0)
    return float((most >= most[0] - 1e-9).sum() / (count + 1))


def swaps(sets: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Orders (k, n) of the cells, each swapped within its set, a few at a time and `count` + 1 in all; the first is as they are."""
    n, by_set = len(sets), np.argsort(sets, kind="stable")
    for first in range(0, count + 1, AT_ONCE):
        out = np.empty((min(AT_ONCE, count + 1 - first), n), dtype=np.int64)
        for i, order in enumerate(out, start=first):
            # sorted by set and then at random: each cell of a set gets the place of another
            order[by_set] = np.lexsort((rng.random(n), sets)) if i else by_set
        yield out
