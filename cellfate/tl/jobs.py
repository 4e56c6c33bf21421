"""Many fates in chunks: on the workers of a Dask client, kept in a store, or both. What comes out is what one process gives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate._runtime import SeedLike, generator, logger, progress
from cellfate.distributed.digest import digest
from cellfate.distributed.executors import Executor
from cellfate.distributed.fits import Chunk, FitJob, chunk_task, layout
from cellfate.distributed.store import MANIFEST, Plan, Store, read_manifest
from cellfate.distributed.tasks import Lost, Task
from cellfate.errors import DataError, Failure, Interrupted
from cellfate.inference.dispersion import Trend, columns_at, spread_over_means, trend_through
from cellfate.inference.fit import GLMMFit
from cellfate.inference.many import Responses, chunks
from cellfate.io.many import Fates
from cellfate.kernels.base import Component

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

TREND = "dispersion_trend"
LINES = 10  # of a log that say how many chunks are done
StorePath = str | os.PathLike[str]


@dataclass(frozen=True)
class Run:
    """Who computes, where it is kept (None: nowhere), the settings that a store is held against, and on which device."""

    executor: Executor
    store: StorePath | None
    settings: Mapping[str, Any]
    device: str | torch.device = "auto"


def seed_of(rng: SeedLike | None, store: StorePath | None) -> int:
    """One number from which a job's seeds come; without `rng` that of the store, where it was begun."""
    if rng is None and store is not None and (Path(store) / MANIFEST).exists():
        return int(read_manifest(Path(store))["settings"]["seed"])
    return int(rng) if isinstance(rng, int | np.integer) else int(generator(rng).integers(2**63))


def fit_chunks(responses: Responses, fates: Fates, run: Run, chunk_size: int | str) -> list[GLMMFit | Failure]:
    """A fit of each fate in order, or what went wrong with it."""
    parts = chunks(len(fates.names), responses.n, layout(responses, chunk_size))
    logger.info("%s", responses.glmm.reason)
    store = None if run.store is None else _opened(responses, fates, run, parts)
    # of those that share tables last digits depend on the threads, which are then the store's
    threads = store.threads if store is not None and responses.shares_tables else run.executor.threads
    work = _Chunks(FitJob(responses, threads), fates, parts, run.executor, store)
    found = with_store(store, len(parts), work.compute)
    return [one for index in range(len(parts)) for one in found[index]]


def with_store(
    store: Store | None, count: int, compute: Callable[[Sequence[int], dict[int, list[Any]]], None]
) -> dict[int, list[Any]]:
    """Answers of all chunks: those that a store has, and those that `compute` adds, given which are missing."""
    found: dict[int, list[Any]] = {}
    if store is not None:
        kept = ((index, store.read(index)) for index in store.done())
        found = {index: answers for index, answers in kept if answers is not None}
    if found:
        logger.info("%d of %d chunks are there already", len(found), count)
    missing = [index for index in range(count) if index not in found]
    if missing:
        try:
            compute(missing, found)
        except (Interrupted, KeyboardInterrupt) as error:
            raise type(error)(_stopped(error, store, len(found), count)) from error
    return found


def _stopped(error: BaseException, store: Store | None, done: int, count: int) -> str:
    what = str(error) or "stopped"
    if store is None:
        return f"{what}: {done} of {count} chunks were done and are lost, since there is no store. Give store=<folder> to keep them."
    return f"{what}: {store.progress()}. Run the same again: only what is missing is computed."


@dataclass(frozen=True)
class _Chunks:
    job: FitJob
    fates: Fates
    parts: Sequence[slice]
    executor: Executor
    store: Store | None

    def compute(self, missing: Sequence[int], found: dict[int, list[GLMMFit | Failure]]) -> None:
        """Add the answers of missing chunks to `found`, and keep each as it comes."""
        trend = self._trend() if self.job.responses.wants_trend else None
        count = len(self.fates.names)
        begun = sum(len(answers) for answers in found.values())
        with progress(total=count, desc="responses", unit="response") as bar:
            bar.update(begun)
            tasks = self._tasks(missing, trend, found)
            with closing(self.executor.run(self.job, tasks)) as answers:
                for task, answer in answers:
                    said = _with_reasons(task, answer)
                    found[task.index] = said if self.store is None else self.store.write(task.index, said)
                    bar.update(len(said))
                    if len(found) % max(1, len(self.parts) // LINES) == 0:
                        logger.info("%d of %d chunks are done", len(found), len(self.parts))

    def _tasks(
        self, missing: Sequence[int], trend: Trend | None, found: dict[int, list[GLMMFit | Failure]]
    ) -> Iterator[Task]:
        """A chunk each, read when it is handed out; one that another job on this store has finished meanwhile is taken from there."""
        for index in missing:
            if self.store is not None and self.store.finished_by_another(index):
                answers = self.store.read(index)
                if answers is not None:
                    found[index] = answers
                    continue
            part = self.parts[index]
            names = tuple(self.fates.names[part])
            label = f"chunk {index} ({names[0]!r}{f' to {names[-1]!r}' if len(names) > 1 else ''})"
            yield chunk_task(index, label, Chunk(names, tuple(self.fates.read(part)), trend))

    def _trend(self) -> Trend | None:
        """Of the dispersion, over all fates: worked out once for a store."""
        if self.store is not None:
            try:
                kept = self.store.value(TREND)
                return None if kept is None else Trend(*kept)
            except KeyError:
                pass
        names = self.fates.names
        chosen, means = spread_over_means(names, self.fates.read, self.parts)
        found: dict[int, Any] = {}
        at: dict[int, list[int]] = {}

        def tasks() -> Iterator[Task]:
            for places, columns in columns_at(chosen, self.fates.read, self.parts):
                some = tuple(names[i] for i in places)
                at[places[0]] = places
                yield Task(places[0], f"the dispersion of {some[0]!r}", Chunk(some, tuple(columns), estimates=True))

        with (
            progress(total=len(chosen), desc="trend of the dispersion", unit="response") as bar,
            closing(self.executor.run(self.job, tasks())) as answers,
        ):
            for task, answer in answers:
                places = at[task.index]
                said = [None] * len(places) if isinstance(answer, Lost) else answer
                found |= dict(zip(places, said, strict=True))
                bar.update(len(places))
        trend = trend_through(names, means, found)
        if self.store is not None:
            self.store.keep_value(TREND, None if trend is None else [trend.a0, trend.a1, trend.sd])
        return trend


def _with_reasons(task: Task, answer: Any) -> list[GLMMFit | Failure]:
    """The answers to a chunk, a failure where a worker was lost."""
    names = task.data.names
    if isinstance(answer, Lost):
        answer = [answer] * len(names)
    return [
        Failure(name, one.reason) if isinstance(one, Lost) else one for name, one in zip(names, answer, strict=True)
    ]


def _opened(responses: Responses, fates: Fates, run: Run, parts: Sequence[slice]) -> Store:
    """The store of this job; everything that goes into it is read once for its digest."""
    inputs = inputs_of(
        responses.glmm.components, responses.X, responses.terms, responses.offset, responses.trials, fates.kept
    )
    columns = []
    with progress(total=len(fates.names), desc="checking inputs", unit="response") as bar:
        for part in parts:
            columns.append(digest(fates.read(part)))
            bar.update(part.stop - part.start)
    settings = settings_of(run, responses.seed)
    assert run.store is not None
    return Store.open(
        run.store,
        Plan(inputs, settings, list(fates.names), [(p.start, p.stop) for p in parts], columns, run.executor.threads),
    )


def inputs_of(
    components: Sequence[Component], X: Any, terms: Sequence[str] | None, offset: Any, trials: Any, kept: Any
) -> dict[str, str]:
    """Digests of what all chunks share."""
    return {
        "design": digest([X, list(terms or ())]),
        "offset": digest(offset),
        "trials": digest(trials),
        "cells": digest(kept),
        **{f"component {c.name!r}": digest(c.kernel) for c in components},
    }


def settings_of(run: Run, seed: int | None) -> dict[str, Any]:
    """As a manifest holds them."""
    return dict(json.loads(json.dumps({**run.settings, "seed": seed}, default=str)))


def check_store(store: Any) -> None:
    """Is this the name of a folder?"""
    if store is not None and not isinstance(store, str | os.PathLike):
        raise DataError(f"store is a {type(store).__name__}, wanted the name of a folder.")
