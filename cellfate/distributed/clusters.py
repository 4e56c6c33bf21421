"""Workers: processes of this machine, jobs of Slurm, or a Dask cluster that runs already."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cellfate._runtime import logger
from cellfate.errors import DataError

if TYPE_CHECKING:
    from distributed import Client

LOCAL, SLURM = "local", "slurm"
CONNECT = 30.0  # seconds to find a scheduler
CLOSE = 5.0  # to end workers of ours: a scheduler of jobs does not wait long after it has sent SIGTERM
SCHEMES = ("tcp://", "tls://", "ucx://", "ws://", "wss://", "inproc://")


@contextmanager
def cluster(
    scheduler: str, workers: int | None = None, gpus_per_worker: int = 0, options: Mapping[str, Any] | None = None
) -> Iterator[Client]:
    """A client with workers, which are ended behind it if they were started for it.

    scheduler: ``"local"``, ``"slurm"`` or an address. workers: how many; with ``"local"`` by default one for each core, or each GPU.
    gpus_per_worker: 0, or 1 for a GPU each. options: of the class that starts workers, `LocalCluster`, `LocalCUDACluster` or
    `dask_jobqueue.SLURMCluster`.
    """
    if workers is not None and workers < 1:
        raise DataError(f"workers is {workers}, wanted 1 or more.")
    if gpus_per_worker not in (0, 1):
        raise DataError(
            f"gpus_per_worker is {gpus_per_worker}: a fit runs on one GPU. Give 1, with more workers for more GPUs, or 0."
        )
    try:
        from distributed import Client
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError('Running on a cluster needs Dask: pip install "cellfate[cluster]".') from e

    if scheduler in (LOCAL, SLURM):
        start = _local if scheduler == LOCAL else _slurm
        found = start(workers, gpus_per_worker, dict(options or {}))
        client = Client(found)
        try:
            logger.info("workers: %s", _about(scheduler, client, workers))
            yield client
        finally:
            _quietly(client.close, found)
        return
    if not scheduler.startswith(SCHEMES):
        raise DataError(
            f"scheduler is {scheduler!r}: give 'local', 'slurm', or the address of a Dask scheduler, such as tcp://10.0.0.5:8786."
        )
    try:
        client = Client(scheduler, timeout=CONNECT)
    except (OSError, TimeoutError) as e:
        raise DataError(f"there is no Dask scheduler at {scheduler}: {' '.join(str(e).split())[:200]}") from e
    try:
        logger.info("workers: %s", _about(scheduler, client, workers))
        yield client
    finally:
        with contextlib.suppress(Exception):
            client.close(timeout=CLOSE)


def _quietly(close: Any, found: Any) -> None:
    """End client and cluster; what they say of connections that close is of no use to anybody."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with contextlib.suppress(Exception):
        close(timeout=CLOSE)
    with contextlib.suppress(Exception):
        found.close(timeout=CLOSE)


def _about(scheduler: str, client: Client, workers: int | None) -> str:
    where = client.scheduler.address if client.scheduler is not None else "?"
    if scheduler == SLURM:
        return f"{workers or 1} asked of Slurm, scheduler {where}"
    return f"{len(client.nthreads())}, scheduler {where}"


def _local(workers: int | None, gpus: int, options: dict[str, Any]) -> Any:
    """Processes of this machine, one task at a time in each."""
    if gpus:
        try:
            from dask_cuda import LocalCUDACluster
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError("A GPU for each local worker needs dask-cuda: pip install dask-cuda.") from e
        return LocalCUDACluster(
            **{"n_workers": workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"} | options
        )
    from distributed import LocalCluster

    mine = {
        "n_workers": workers or _cores(),
        "threads_per_worker": 1,
        "processes": True,
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": logging.CRITICAL,
    }
    return LocalCluster(**mine | options)


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _slurm(workers: int | None, gpus: int, options: dict[str, Any]) -> Any:
    """A job of Slurm for each worker; what is not said here is as in the configuration of dask-jobqueue."""
    try:
        from dask_jobqueue import SLURMCluster
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError('--scheduler slurm needs dask-jobqueue: pip install "cellfate[cluster]".') from e

    mine: dict[str, Any] = {"cores": 1, "processes": 1}
    if gpus:
        asked = [str(line) for line in options.get("job_extra_directives", [])]
        if not any("gpu" in line for line in asked):
            asked.append(f"--gres=gpu:{gpus}")
        options["job_extra_directives"] = asked
    try:
        found = SLURMCluster(**mine | options)
    except (TypeError, ValueError) as e:
        raise DataError(
            f"Slurm workers cannot be described: {' '.join(str(e).split())} Give what they need in a table [slurm] of --config, such as "
            'memory = "8GB", queue, account, walltime = "04:00:00".'
        ) from e
    found.scale(n=workers or 1)
    return found
