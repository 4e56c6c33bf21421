"""Who answers tasks: this process, or the workers of a Dask cluster. The answers are the same.

Dask decides what runs where. Here is only what it leaves open: the job is sent to each worker once, also to one that comes later or
again; few tasks are under way at a time, so that their data need not be in memory all at once; and where a worker dies with a task on it
time and again, the task is tried by itself, piece by piece, until it is clear which piece is to blame.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from cellfate._runtime import logger, resolve_device, threads
from cellfate.distributed.tasks import Job, Lost, Task
from cellfate.errors import DataError, Interrupted

if TYPE_CHECKING:
    from distributed import Client, Future

Answers: TypeAlias = Generator[tuple[Task, Any], None, None]
AHEAD = 2  # tasks under way for each thread of a worker
FEWEST_AHEAD = 4
ASKED_AGAIN = 2.0  # seconds after which it is asked again how many workers there are
BEAT = 20.0  # seconds without an answer, after which it is looked whether there are workers
FORGOTTEN = 3  # times that a task is handed out again, where the cluster forgot it


class Executor(ABC):
    """Answers the tasks of a job."""

    @abstractmethod
    def run(self, job: Job, tasks: Iterable[Task]) -> Answers:
        """Each task with its answer, or with :class:`Lost`, as they are ready; in which order is not said."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """On how many each worker computes, where a job does not say."""

    @abstractmethod
    def device(self, device: str | torch.device) -> torch.device:
        """Where the workers compute if `device` is asked for."""


class Serial(Executor):
    """One task after the other, in this process."""

    def run(self, job: Job, tasks: Iterable[Task]) -> Answers:
        work = None
        for task in tasks:
            work = work or job.prepare()
            with threads(job.threads or self.threads):
                answer = work(task.data)
            yield task, answer

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def device(self, device: str | torch.device) -> torch.device:
        return resolve_device(device)


def executor(client: Client | None) -> Executor:
    """The workers of a Dask client, or this process where there is none."""
    return Serial() if client is None else Dask(client)


class Dask(Executor):
    """The workers of a Dask cluster, through its client."""

    def __init__(self, client: Client) -> None:
        check_client(client)
        self.client = client
        self._devices: dict[str, torch.device] = {}

    @property
    def threads(self) -> int:
        return 1  # a core each: tasks stand side by side already

    def device(self, device: str | torch.device) -> torch.device:
        if str(device) not in self._devices:
            self._devices[str(device)] = self._device(device)
        return self._devices[str(device)]

    def _device(self, device: str | torch.device) -> torch.device:
        wanted = torch.device("cpu") if str(device) == "auto" else torch.device(device)
        if wanted.type == "cpu" and str(device) != "auto":
            return wanted
        self._wait_for_workers()
        have = self.client.run(_has_cuda, on_error="ignore")
        with_gpu = [address for address, has in have.items() if has is True]
        if str(device) == "auto":
            if with_gpu and len(with_gpu) < len(have):
                raise DataError(
                    f"{len(with_gpu)} of {len(have)} workers have a GPU, and results of the two kinds differ in their last digits. "
                    "Give device='cuda' or 'cpu', with workers that are alike."
                )
            return torch.device("cuda" if with_gpu else "cpu")
        if len(with_gpu) < len(have):
            raise DataError(
                f"device {str(device)!r} was asked for, but {len(have) - len(with_gpu)} of {len(have)} workers find no CUDA device. "
                "Start workers with a GPU each (dask-cuda), or take device='cpu'."
            )
        return wanted

    def run(self, job: Job, tasks: Iterable[Task]) -> Answers:
        yield from _Run(self.client, job).answers(tasks)

    def _wait_for_workers(self) -> None:
        began = time.monotonic()
        while not self.client.nthreads():
            if time.monotonic() - began > BEAT:
                logger.info("there is no worker yet; waiting for the first one")
                began = time.monotonic()
            time.sleep(0.2)


def here(device: torch.device) -> torch.device:
    """The device on which a model is put together that others will fit: theirs, where this machine has it as well."""
    return device if device.type == "cpu" or torch.cuda.is_available() else torch.device("cpu")


def check_client(client: Any) -> None:
    """Is this a client of Dask that can be used from here?"""
    try:
        from distributed import Client
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError('Running on a cluster needs Dask: pip install "cellfate[cluster]".') from e
    if not isinstance(client, Client):
        raise DataError(f"client is a {type(client).__name__}, wanted a dask.distributed.Client.")
    if client.asynchronous:
        raise DataError("client is asynchronous, and results are waited for here. Give Client(...) without it.")


def _has_cuda() -> bool:
    return torch.cuda.is_available()


class _Run:
    """One job on a cluster, from the first task to the last answer."""

    def __init__(self, client: Client, job: Job) -> None:
        from distributed import wait

        from cellfate.distributed.worker import answer_task

        self.client, self.job, self.wait = client, job, wait
        self.name = f"cellfate-{uuid.uuid4().hex[:12]}"
        self.where = client.scheduler.address if client.scheduler is not None else "an unknown address"
        self.pending: dict[Future, tuple[Task, int]] = {}
        self.again: list[tuple[Task, int]] = []  # forgotten by the cluster
        self.suspects: list[Task] = []
        self.handed, self.ahead, self.asked_at = 0, FEWEST_AHEAD, -math.inf
        self.answer_task = answer_task

    def answers(self, tasks: Iterable[Task]) -> Answers:
        try:
            self._send_job()
            source = iter(tasks)
            yield from self._answers(source, None)
            while self.suspects:
                task = self.suspects.pop()
                logger.warning(
                    "%s was under way on workers that died, several times in a row: it is tried by itself", task.label
                )
                yield task, self._by_itself(task)
        finally:
            self._leave()

    def _answers(self, source: Iterator[Task], limit: int | None) -> Answers:
        from distributed import CancelledError, KilledWorker

        self._fill(source, limit)
        while self.pending:
            for future in self._done():
                task, times = self.pending.pop(future)
                try:
                    answer = future.result()
                except KilledWorker as error:
                    logger.info("%s", _one_line(error))
                    self.suspects.append(task)
                    continue
                except CancelledError as error:
                    self._check_there(error)
                    if times >= FORGOTTEN:
                        raise Interrupted(
                            f"the cluster at {self.where} dropped {task.label} {times + 1} times"
                        ) from error
                    self.again.append((task, times + 1))
                    continue
                finally:
                    future.release()
                self._fill(source, limit)  # before the answer is dealt with, so that no worker waits for it
                yield task, answer
            self._fill(source, limit)

    def _by_itself(self, task: Task) -> Any:
        """Nothing else is under way: the piece on which workers die is the one to blame."""
        if task.parts:
            joined: list[Any] = []
            for part in task.parts:
                answer = self._by_itself(part)
                joined += [answer] if isinstance(answer, Lost) else answer
            return joined
        for _, answer in self._answers(iter([replace(task, parts=None)]), 1):
            return answer
        self.suspects.pop()  # itself, again
        reason = (
            "its workers died, several times in a row and with nothing else under way. Most often memory is short: give workers more, "
            "or take fewer cells"
        )
        logger.warning("%s: %s", task.label, reason)
        return Lost(task.label, reason)

    def _fill(self, source: Iterator[Task], limit: int | None) -> None:
        most = self._ahead() if limit is None else limit
        while len(self.pending) < most:
            if self.again:
                task, times = self.again.pop()
            else:
                found = next(source, None)
                if found is None:
                    return
                task, times = found, 0
            self.handed += 1
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sending large graph")  # a chunk of columns is what it is
                future = self._asked(
                    self.client.submit,
                    self.answer_task,
                    self.name,
                    task.data,
                    key=f"{self.name}-{task.index}-{self.handed}",
                    pure=False,
                )
            self.pending[future] = task, times

    def _ahead(self) -> int:
        """How many tasks may be under way, by the workers there are now."""
        if time.monotonic() > self.asked_at + ASKED_AGAIN:
            self.asked_at = time.monotonic()
            self.ahead = max(FEWEST_AHEAD, AHEAD * sum(self._asked(self.client.nthreads).values()))
        return self.ahead

    def _done(self) -> list[Future]:
        """Those that have an answer, at least one; meanwhile it is said where nothing can go on."""
        from distributed import CancelledError

        while True:
            with contextlib.suppress(TimeoutError, CancelledError, asyncio.CancelledError):
                self.wait(list(self.pending), timeout=BEAT, return_when="FIRST_COMPLETED")
            done = [future for future in self.pending if future.status not in ("pending", "processing")]
            if done:
                return done
            if not self._asked(self.client.nthreads):
                logger.warning("there is no worker at %s; waiting for one", self.where)

    def _send_job(self) -> None:
        from cellfate.distributed.worker import Holder

        plugin = Holder(self.name, self.job)
        for attempt in range(5):
            try:
                self.client.register_plugin(plugin, name=self.name)
                return
            except ModuleNotFoundError as error:
                raise DataError(
                    f"workers at {self.where} cannot take the job: {error}. Install cellfate there, as it is here."
                ) from error
            except (OSError, TimeoutError) as error:
                # a worker went away meanwhile; those that come get the job as well
                self._check_there(error)
                if attempt == 4:
                    raise
                time.sleep(0.5)

    def _leave(self) -> None:
        """Let go of what is under way, of the job, too; where the cluster is gone, there is nothing to let go of."""
        if self.client.status != "running":
            return
        with contextlib.suppress(Exception):
            self.client.cancel(list(self.pending), force=True)
        with contextlib.suppress(Exception):
            self.client.unregister_worker_plugin(self.name)

    def _asked(self, call: Any, *arguments: Any, **options: Any) -> Any:
        """What the client answers; where it has lost its scheduler, it is not waited for another."""
        self._check_there(None)
        try:
            return call(*arguments, **options)
        except (Exception, asyncio.CancelledError) as error:  # the latter where the connection is lost meanwhile
            self._check_there(error)
            raise

    def _check_there(self, error: BaseException | None) -> None:
        """Is the scheduler there? If not, say so in place of what its absence led to."""
        reason = getattr(error, "reason", None)
        if reason == "scheduler-connection-lost" or self.client.status != "running":
            raise Interrupted(f"the scheduler at {self.where} is gone") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def answered(found: Iterable[tuple[Task, Any]]) -> Iterator[tuple[Task, Any]]:
    """Tasks with their answers; one that was lost ends the whole, where nothing can stand in its place."""
    for task, answer in found:
        if isinstance(answer, Lost):
            raise Interrupted(f"{task.label}: {answer.reason}")
        yield task, answer


def ordered(found: Iterable[tuple[Task, Any]], order: Sequence[int]) -> Iterator[tuple[Task, Any]]:
    """Answers in the order of these indices, each as soon as it and all before it are there."""
    waiting: dict[int, tuple[Task, Any]] = {}
    places = iter(order)
    at = next(places, None)
    for task, answer in found:
        waiting[task.index] = task, answer
        while at in waiting:
            yield waiting.pop(at)
            at = next(places, None)
