"""Which engine answers, and why."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from cellfate.engines.base import Engine
from cellfate.engines.dense import DenseEngine
from cellfate.errors import DataError
from cellfate.kernels.base import Component

NOT_YET = ("structured", "iterative")
SHARE_OF_MEMORY = 0.7  # of what is free, for the matrices of one hyperparameter point


def free_memory(device: torch.device) -> float:
    """Bytes that can be used on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


def choose(
    name: str, components: Sequence[Component], n: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[Engine, str]:
    """The engine called `name`, or the one that suits for ``"auto"``, with the reason in words."""
    if name in NOT_YET:
        raise NotImplementedError(
            f"engine {name!r} is not there yet; use engine='dense', exact up to some thousands of cells in a specimen."
        )
    if name not in ("auto", "dense"):
        raise DataError(f"unknown engine {name!r}; choose 'auto' or 'dense'.")
    engine = DenseEngine(components, n, device=device, dtype=dtype)
    needed, free = engine.bytes_per_point(), SHARE_OF_MEMORY * free_memory(device)
    largest, count = engine.blocks.largest, engine.blocks.count
    if needed > free:
        raise DataError(
            f"{n} cells in {count} independent blocks, the largest of {largest}, need {needed / 2**30:.1f} GiB of "
            f"dense matrices, and {free / 2**30:.1f} GiB are at hand on {device}. Give library_key if the cells come from "
            "several specimens, take fewer cells, or use a larger machine; an engine of linear cost is not there yet."
        )
    blocks = "one block" if count == 1 else f"{count} independent blocks, the largest"
    return engine, f"dense: {blocks} of {largest} cells, {needed / 2**20:.0f} MiB for one hyperparameter point"
