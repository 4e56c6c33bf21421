"""What every row of a benchmark has to say: on which machine, with which versions; and where results go."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import cellfate as cf

RESULTS = Path(__file__).parent / "results"
THREADS = ("OMP", "MKL", "OPENBLAS", "NUMBA", "VECLIB_MAXIMUM", "NUMEXPR")  # before _NUM_THREADS


def processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> dict[str, str]:
    """Hardware and versions."""
    accelerator = {"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "processor": processor(),
        **accelerator,
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": version("torch").split("+")[0],
        "numpy": np.__version__,
        "cellfate": cf.__version__,
    }


def table(rows: Sequence[Mapping[str, object]], digits: int = 3) -> str:
    """Rows as text; what a row does not have stays empty."""
    frame = pd.DataFrame(rows)
    return frame.to_string(index=False, na_rep="", float_format=lambda x: f"{x:.{digits}f}")


def write(name: str, rows: Sequence[Mapping[str, object]], folder: Path = RESULTS) -> Path:
    """Rows with the machine beside them, as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    pd.DataFrame([{**row, **machine()} for row in rows]).to_csv(path, index=False, float_format="%.6g")
    return path


def thread_environment(threads: int) -> dict[str, str]:
    """The environment for a new process in which everything that counts its threads starts with as many."""
    return {**os.environ, **{f"{library}_NUM_THREADS": str(threads) for library in THREADS}}


def set_threads(threads: int) -> int:
    """Threads of torch in this process, and of what it starts."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return threads


def peak_mib() -> float:
    """Largest memory that this process has held, since the last :func:`forget_peak` where that works (Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak() -> None:
    """Count the peak from here; where the system does not let us, it stays the peak of the whole process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def warm_up() -> None:
    """A fit of 40 cells, so that no clock counts what Python loads at a first call."""
    cf.tl.decompose(cf.datasets.simulate(40, family="poisson", rng=0), "fate", family="poisson", rng=0)
