"""What runs on a worker of Dask; imported only where Dask is there."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from threading import Lock
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker

from cellfate import __version__
from cellfate._runtime import one_of_many
from cellfate.distributed.tasks import Job, Work
from cellfate.errors import DataError

PATIENCE = 10.0  # seconds that a task waits for its job


class Holder(WorkerPlugin):
    """The job on a worker. The scheduler gives a plugin also to workers that come later, and again to one that died."""

    def __init__(self, name: str, job: Job) -> None:
        self.name, self.job = name, job
        self._work: Work | None = None
        self._version = __version__

    def setup(self, worker: Worker) -> None:
        if self._version != __version__:
            raise DataError(
                f"the worker at {worker.address} has cellfate {__version__}, and the client {self._version}, whose answers may differ. "
                "Install one version on all."
            )
        self._lock, self._alone = Lock(), Lock()  # locks do not pickle, and are made here
        if worker.nanny:  # a process of its own: Ctrl-C in a terminal is for whoever started it, who will end it
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    def answer(self, data: Any) -> Any:
        """Of a task; what its tasks share is made at the first one."""
        with one_of_many(), PINNED.on(self.job.threads):
            with self._lock:
                work = self._work = self._work or self.job.prepare()
            with self._alone if self.job.one_at_a_time else contextlib.nullcontext():
                return work(data)


class _Pinned:
    """Threads of torch in this process while any task is answered: the last one that ends puts back what was there before."""

    def __init__(self) -> None:
        self.lock, self.tasks, self.before = Lock(), 0, 1

    @contextlib.contextmanager
    def on(self, count: int) -> Iterator[None]:
        """So many threads for torch and for compiled loops, in this thread; 0 leaves them as they are."""
        if not count:
            yield
            return
        import numba
        import torch

        with self.lock:
            self.before = torch.get_num_threads() if not self.tasks else self.before
            self.tasks += 1
        torch.set_num_threads(count)
        numba.set_num_threads(min(count, numba.get_num_threads()))
        try:
            yield
        finally:
            with self.lock:
                self.tasks -= 1
                if not self.tasks:
                    torch.set_num_threads(self.before)


PINNED = _Pinned()  # of the process, as the number of threads is


def answer_task(name: str, data: Any) -> Any:
    """The answer to a task of the job called `name`."""
    plugins, end = get_worker().plugins, time.monotonic() + PATIENCE
    while name not in plugins and time.monotonic() < end:
        time.sleep(0.05)  # of a worker that has just come, and is about to be given the job
    holder = plugins[name]
    assert isinstance(holder, Holder)
    return holder.answer(data)
