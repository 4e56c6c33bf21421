"""What every run needs and no formula does: device, dtype, seeds, the logger, progress bars.

Nothing here alters a result unseen: there is no global seed, no global dtype, and verbosity only moves text on stderr.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from cellfate.errors import CellfateWarning

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

SeedLike: TypeAlias = int | np.integer | np.random.SeedSequence | np.random.Generator | np.random.RandomState

AHEAD = 8  # tasks for each thread that may be done before their results are taken

T = TypeVar("T")
R = TypeVar("R")

LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}


class _Stderr(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is now, and stands aside where the application has set up logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self.stream = sys.stderr
            super().emit(record)


logger = logging.getLogger("cellfate")
if not logger.handlers:
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("cellfate: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def verbosity(level: int | str) -> None:
    """Set how much is said on stderr: ``"error"`` (0), ``"warning"`` (1), ``"info"`` (2, default) or ``"debug"`` (3).

    Progress bars are shown from ``"info"`` on. Warnings about a result go through `warnings` at every level.
    """
    names = list(LEVELS)
    if isinstance(level, int) and 0 <= level < len(names):
        level = names[level]
    if level not in LEVELS:
        raise ValueError(f"verbosity {level!r} is unknown: use one of {names} or 0 to {len(names) - 1}.")
    logger.setLevel(LEVELS[level])


_one_of_many: ContextVar[bool] = ContextVar("one_of_many", default=False)


@contextmanager
def one_of_many() -> Iterator[None]:
    """Inside, work is one of many pieces alike: it has no progress bar of its own, and `announce` and `warn` are silent."""
    token = _one_of_many.set(True)
    try:
        yield
    finally:
        _one_of_many.reset(token)


def warn(message: str, *, stacklevel: int = 2) -> None:
    """Warn of a result; silent for one of many, which has to hold its own doubts."""
    if not _one_of_many.get():
        warnings.warn(message, CellfateWarning, stacklevel=stacklevel + 1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch computes on so many threads: their number moves the last digits of a factorization."""
    import torch

    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


def side_by_side(
    work: Callable[[T], R], tasks: Sequence[T], device: torch.device, *, alone: bool = False
) -> Iterator[R]:
    """`work` on each of many tasks alike, in order: on a CPU several at a time, each on one thread, which wastes none of them.

    One thread also where there is a single task, since last digits depend on how many there are and must not on the company; a
    task that is `alone` has them all.

    Warnings are silenced, see :func:`warn`, and those of others while a result is waited for. Tasks run ahead of what is asked for, but not far, so that results need not be
    kept.
    """
    import torch

    count = torch.get_num_threads() if device.type == "cpu" else 1

    def one(task: T) -> R:
        with one_of_many():
            return work(task)

    def silently(result: Callable[[], R]) -> R:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return result()

    if count == 1 or alone:
        for task in tasks:
            yield silently(partial(one, task))
        return
    # whoever takes the results has warnings and threads as before: the number of threads is a worker's own
    pool, ahead = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)), deque[Future[R]]()
    try:
        for task in tasks:
            ahead.append(pool.submit(one, task))
            if len(ahead) == AHEAD * count:
                yield silently(ahead.popleft().result)
        while ahead:
            yield silently(ahead.popleft().result)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(count)  # of workers that others start


def announce(message: str, *details: object) -> None:
    """Log at ``"info"`` what is said once for a fit, and at ``"debug"`` where there are many."""
    logger.log(logging.DEBUG if _one_of_many.get() else logging.INFO, message, *details)


def progress(
    iterable: Iterable[Any] | None = None, *, total: float | None = None, desc: str | None = None, unit: str = "it"
) -> tqdm:
    """Return a progress bar on stderr, over an iterable or moved by hand with `.update()`; silent below ``"info"``."""
    from tqdm.auto import tqdm

    # A log file is no screen: there, a line every ten seconds is enough.
    interactive = sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        leave=False,
        disable=_one_of_many.get() or not logger.isEnabledFor(logging.INFO),
        mininterval=0.1 if interactive else 10.0,
        dynamic_ncols=interactive,
    )


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device to compute on; ``"auto"`` is the first CUDA device if there is one, else the CPU."""
    import torch

    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"device {device!r} is unknown: use 'auto', 'cpu', 'cuda' or 'cuda:<number>'.") from e
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not supported: use 'auto', 'cpu', 'cuda' or 'cuda:<number>'.")
    if resolved.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found == 0:
            raise ValueError(
                f"device {str(device)!r} was asked for, but this torch ({torch.__version__}) finds no CUDA device. "
                "Use device='cpu' or 'auto', or install a CUDA build of torch."
            )
        if resolved.index is not None and resolved.index >= found:
            raise ValueError(
                f"device {str(device)!r} was asked for, but there are {found} CUDA devices, 'cuda:0' to "
                f"'cuda:{found - 1}'."
            )
    return resolved


def resolve_dtype(dtype: str | torch.dtype = "float64") -> torch.dtype:
    """Return the torch dtype to compute in: ``"float64"`` or ``"float32"``."""
    import torch

    known = {"float64": torch.float64, "float32": torch.float32}
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in known:
        raise ValueError(f"dtype {name!r} is not supported: use 'float64' (default) or 'float32'.")
    return known[name]


def generator(rng: SeedLike | None = None) -> np.random.Generator:
    """Return a numpy Generator from a seed; a Generator or a legacy RandomState is used as it is and moves on."""
    if isinstance(rng, np.random.RandomState):
        return np.random.Generator(rng._bit_generator)  # its own stream, so that it advances for the caller too
    if isinstance(rng, bool) or not (
        rng is None or isinstance(rng, int | np.integer | np.random.SeedSequence | np.random.Generator)
    ):
        raise TypeError(f"rng must be None, an integer, a SeedSequence or a Generator, not {type(rng).__name__}.")
    if isinstance(rng, int | np.integer) and rng < 0:
        raise ValueError(f"rng is {rng}: a seed must be 0 or more.")
    return np.random.default_rng(rng)


def named_generator(seed: int, name: str) -> np.random.Generator:
    """Return a Generator for a task by its name: the same numbers whatever other tasks there are, and in whatever order."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], dtype=np.uint32)
    return np.random.default_rng([seed, *(int(word) for word in words)])


def out_of_memory(error: BaseException) -> bool:
    """Whether torch says that a device, or the machine, has no memory left."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
