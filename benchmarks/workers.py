"""One task of a benchmark after the other, or on workers of Dask: processes of this machine, or a cluster that runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import set_threads
from tqdm import tqdm

import cellfate as cf
from cellfate.distributed.clusters import cluster
from cellfate.distributed.executors import answered, executor, ordered
from cellfate.distributed.tasks import Job, Task, Work

FOLDER = Path(__file__).parent


@dataclass(frozen=True, eq=False)
class Calls(Job):
    """Answers the data of a task by a function of it."""

    function: Callable[[Any], Any]
    threads: int = 1

    def prepare(self) -> Work:
        set_threads(self.threads)
        cf.verbosity("warning")
        return self.function


def add_options(parser: argparse.ArgumentParser, count: int = 1) -> None:
    parser.add_argument("--workers", type=int, default=count)
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster, in place of workers on this machine")
    parser.add_argument("--threads", type=int, default=1, help="of each worker")


Each = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


@contextmanager
def workers(options: argparse.Namespace) -> Iterator[Each]:
    """What gives the results of a function of each of many things, in their order, as soon as one and all before it are there.

    A worker that dies loses only what it was at.
    """
    with ExitStack() as stack:
        client = None
        if options.scheduler is not None or options.workers > 1:
            client = stack.enter_context(cluster(options.scheduler or "local", options.workers))
            if options.scheduler is not None:
                _send_files(client)

        def each(function: Callable[[Any], Any], todo: Sequence[Any]) -> Iterator[Any]:
            tasks = (Task(i, f"task {i}", one) for i, one in enumerate(todo))
            with closing(executor(client).run(Calls(function, options.threads), tasks)) as found:
                in_order = ordered(answered(found), range(len(todo)))
                for _, answer in tqdm(in_order, total=len(todo), mininterval=10):
                    yield answer

        yield each


def _send_files(client: Any) -> None:
    """Workers elsewhere do not have this folder: what was imported from it goes along."""
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "")
        if name != "__main__" and path.parent == FOLDER:
            client.upload_file(str(path), load=False)
