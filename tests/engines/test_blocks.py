"""Which cells meet in a matrix, and that stacking loses none of them."""

import numpy as np
import pytest
import torch

from cellfate.engines.blocks import PADDING, Blocks, connect


def naive_connect(labels: list[np.ndarray], n: int) -> np.ndarray:
    """Grow each block from its first cell until nothing joins."""
    block = np.full(n, -1)
    for first in range(n):
        if block[first] < 0:
            members = {first}
            while True:
                more = {j for j in range(n) if any(label[j] == label[i] for label in labels for i in members)}
                if more <= members:
                    break
                members |= more
            block[list(members)] = first
    return block


def random_labels(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [3 * rng.integers(levels, size=15) - 7 for levels in (12, 9)]  # codes need not be 0, 1, 2, ...


@pytest.mark.parametrize("labels", [*map(random_labels, range(6)), [np.arange(15)], [np.zeros(15, int)]])
def test_cells_that_share_any_label_are_in_one_block(labels):
    found, expected = connect(labels, 15), naive_connect(labels, 15)
    np.testing.assert_array_equal(np.equal.outer(found, found), np.equal.outer(expected, expected))


def test_without_labels_every_cell_may_depend_on_every_other():
    assert set(connect([], 4)) == {0}


SIZES = {
    "one block": [7],
    "singles": [1] * 6,
    "unequal": [1, 5, 2, 2, 9, 4, 1, 5, 6],
    "one large": [40, 1, 1, 1],
    "one cell": [1],
}


@pytest.fixture(params=SIZES, ids=lambda name: name.replace(" ", "-"))
def block(request):
    """Block of each cell, in no order."""
    sizes = SIZES[request.param]
    return np.random.default_rng(0).permutation(np.repeat(10 * np.arange(len(sizes))[::-1], sizes))


def test_every_cell_is_in_its_block_and_nowhere_else(block):
    blocks, n = Blocks(block), len(block)
    rows = [row[row < n].numpy() for stack in blocks.stacks for row in stack]
    assert sorted(np.concatenate(rows)) == list(range(n))
    assert sorted(tuple(np.unique(block[row])) for row in rows) == sorted((b,) for b in np.unique(block))
    assert blocks.count == len(rows) == len(np.unique(block))
    assert blocks.largest == max(map(len, rows))
    assert blocks.entries == sum(stack.shape[0] * stack.shape[1] ** 2 for stack in blocks.stacks)


def test_padding_is_bounded(block):
    """A specimen of ten cells is not stacked with one of a thousand."""
    blocks, n = Blocks(block), len(block)
    for stack in blocks.stacks:
        sizes = (stack < n).sum(1)
        assert sizes.max() == stack.shape[1] <= PADDING * int(sizes.min())


def test_equal_blocks_are_one_stack():
    assert [stack.shape for stack in Blocks(np.repeat(np.arange(8), 3)).stacks] == [(8, 3)]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_gather_and_scatter_are_inverse(block, batch):
    blocks, n = Blocks(block), len(block)
    x = torch.as_tensor(np.random.default_rng(1).normal(size=(*batch, n, 2)))
    parts = blocks.gather(x)
    for stack, part in zip(blocks.stacks, parts, strict=True):
        assert part.shape == (*batch, *stack.shape, 2)
        padding = stack == n
        assert (part[..., padding, :] == 0).all()
        assert (part[..., ~padding, :] == x[..., stack[~padding], :]).all()
    assert (blocks.scatter(parts) == x).all()


def test_what_happens_in_the_padding_is_dropped(block):
    blocks, n = Blocks(block), len(block)
    x = torch.ones(n, 1, dtype=torch.float64)
    parts = [
        torch.where((stack < n)[..., None], part, torch.nan)
        for stack, part in zip(blocks.stacks, blocks.gather(x), strict=True)
    ]
    assert (blocks.scatter(parts) == x).all()
