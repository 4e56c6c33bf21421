"""What runs on a worker of Dask; imported only where Dask is there."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from threading import Lock
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker

from cellfate._runtime import one_of_many, threads
from cellfate.distributed.tasks import Job, Work


class Holder(WorkerPlugin):
    """The job on a worker. The scheduler gives a plugin also to workers that come later, and again to one that died."""

    def __init__(self, name: str, job: Job) -> None:
        self.name, self.job = name, job
        self._work: Work | None = None

    def setup(self, worker: Worker) -> None:
        self._lock, self._alone = Lock(), Lock()  # locks do not pickle, and are made here
        if worker.nanny:  # a process of its own: Ctrl-C in a terminal is for whoever started it, who will end it
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    def answer(self, data: Any) -> Any:
        """Of a task; what its tasks share is made at the first one."""
        with one_of_many(), _on(self.job.threads):
            with self._lock:
                work = self._work = self._work or self.job.prepare()
            with self._alone if self.job.one_at_a_time else contextlib.nullcontext():
                return work(data)


@contextlib.contextmanager
def _on(count: int) -> Iterator[None]:
    """So many threads for torch and for compiled loops, in this thread."""
    if not count:
        yield
        return
    import numba

    numba.set_num_threads(min(count, numba.get_num_threads()))
    with threads(count):
        yield


def answer_task(name: str, data: Any) -> Any:
    """The answer to a task of the job called `name`."""
    holder = get_worker().plugins[name]
    assert isinstance(holder, Holder)
    return holder.answer(data)
