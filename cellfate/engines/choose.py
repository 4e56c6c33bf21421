"""Which engine answers, and why."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from cellfate.engines.base import Engine
from cellfate.engines.dense import DenseEngine
from cellfate.engines.structured import StructuredEngine, refusal
from cellfate.errors import DataError, unknown
from cellfate.kernels.base import Component
from cellfate.kernels.fates import Loaded
from cellfate.kernels.product import Product

ENGINES = ("auto", "dense", "structured")
NOT_YET = ("iterative",)
SHARE_OF_MEMORY = 0.7  # of what is free, for the matrices of one hyperparameter point
DENSE_ENOUGH = 3000  # cells of a block up to which exact matrices take about as long as sweeps and columns
WITHOUT_FIELDS = 500  # the same where there is no field to approximate,
NARROW = 0.1  # and fewer columns than this part of the cells
CONTROL_GROUPS = (  # where Linux keeps limit and use, in either version
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory(device: torch.device) -> float:
    """Bytes that can be used on a device: what the machine has, and what a job is allowed; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(_available(), *(_allowed(Path(limit), Path(used)) for limit, used in CONTROL_GROUPS))


def _available() -> float:
    """Of the machine, file caches included: they give way."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * float(line.split()[1])
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


def _allowed(limit: Path, used: Path) -> float:
    """Of a control group, as containers and cluster jobs are."""
    try:
        return max(0.0, float(limit.read_text()) - float(used.read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        return float("inf")


def choose(
    name: str,
    components: Sequence[Component],
    n: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    rank: int | None = None,
) -> tuple[Engine, str]:
    """The engine called `name`, or the one that suits for ``"auto"``, with the reason in words."""
    if name in NOT_YET:
        raise NotImplementedError(
            f"engine {name!r} is not there yet; use engine='structured', whose cost is linear in the cells."
        )
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise DataError(f"rank is {rank!r}, wanted the number of columns for a spatial field, such as 256, or None.")
    free = SHARE_OF_MEMORY * free_memory(device)
    refused = refusal(components)
    if name == "structured" and refused and any(isinstance(c.kernel, Product | Loaded) for c in components):
        raise NotImplementedError(f"engine='structured' cannot take this model: {refused}. Use engine='dense'.")
    if name == "structured" and refused:
        raise DataError(f"engine='structured' cannot take this model: {refused}. Use engine='dense'.")
    dense = DenseEngine(components, n, device=device, dtype=dtype)
    largest, count = dense.blocks.largest, dense.blocks.count
    blocks = "one block" if count == 1 else f"{count} independent blocks, the largest"
    needed = dense.bytes_per_point()
    reason = "as asked for"
    if name == "auto" and refused is None:
        sweeps = StructuredEngine(components, n, device=device, dtype=dtype, rank=rank)
        narrow = not sweeps.approximates and sweeps.width() < NARROW * largest
        enough = WITHOUT_FIELDS if narrow else DENSE_ENOUGH
        if rank is not None and sweeps.approximates:
            name, reason = "structured", f"a rank of {rank} was asked for"
        elif largest > enough:
            name, reason = "structured", "more than exact matrices are good for"
        elif needed > free:
            name, reason = "structured", "more than exact matrices have memory for"
        else:
            name = "dense"
    if name == "structured":
        structured = StructuredEngine(components, n, device=device, dtype=dtype, rank=rank)
        needed = structured.bytes_shared() + structured.bytes_per_point()
        if needed > free:
            raise DataError(
                f"{n} cells with {structured.width()} columns need {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB are at hand on {device}. Give a smaller `rank`, fewer cells, or a larger machine."
            )
        return structured, f"structured: {n} cells in {blocks} of {largest}, {reason}"
    if needed > free:
        why = f"; engine='structured' cannot take this model: {refused}" if refused else "; use engine='structured'"
        raise DataError(
            f"{n} cells in {count} independent blocks, the largest of {largest}, need {needed / 2**30:.1f} GiB of "
            f"dense matrices, and {free / 2**30:.1f} GiB are at hand on {device}. Give library_key if the cells come from "
            f"several specimens, take fewer cells, or use a larger machine{why}."
        )
    return dense, f"dense: {blocks} of {largest} cells, {needed / 2**20:.0f} MiB for one hyperparameter point"
