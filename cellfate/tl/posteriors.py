"""One fate under one model, or under each of several trees: on the workers of a Dask client, kept in a store, or both."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import closing, nullcontext
from typing import Any

import numpy as np

from cellfate._runtime import SeedLike, generator, logger, one_of_many, progress
from cellfate.cells import Cells
from cellfate.distributed.digest import digest
from cellfate.distributed.executors import answered
from cellfate.distributed.posteriors import Ask, Found, PosteriorJob
from cellfate.distributed.store import Plan, Store
from cellfate.distributed.tasks import Task
from cellfate.errors import CellfateWarning
from cellfate.inference.fit import GLMM, GLMMFit
from cellfate.inference.report import Integrated, report
from cellfate.kernels.base import Component
from cellfate.tl.jobs import Run, inputs_of, seed_of, settings_of, with_store


def arguments_of(cells: Cells) -> dict[str, Any]:
    """Of :meth:`cellfate.GLMM.fit` and the like, but for `rng`."""
    return {
        "y": cells.response,
        "X": cells.design,
        "offset": cells.offset,
        "trials": cells.trials,
        "terms": cells.terms,
        "levels": cells.levels,
        "response": cells.response_name,
    }


def stream_of(rng: SeedLike | None, run: Run | None) -> tuple[np.random.Generator, int | None]:
    """Random numbers of a fit, and for a store the seed that they come from."""
    if run is None or run.store is None:
        return generator(rng), None
    seed = seed_of(rng, run.store)
    return generator(seed), seed


def fit_elsewhere(glmm: GLMM, cells: Cells, rng: SeedLike | None, run: Run) -> GLMMFit:
    """What `glmm.fit` gives, by a run."""
    began = time.perf_counter()
    stream, seed = stream_of(rng, run)
    name = cells.response_name
    (found,) = posteriors(glmm, cells, [None], [stream], [f"the fit of {name!r}"], [name], run, seed)
    fit = report(found, name)
    fit.diagnostics["seconds"] = time.perf_counter() - began
    return fit


def posteriors(
    glmm: GLMM,
    cells: Cells,
    components: Sequence[Sequence[Component] | None],
    streams: Sequence[np.random.Generator],
    labels: Sequence[str],
    names: Sequence[str],
    run: Run,
    seed: int | None,
) -> list[Integrated]:
    """The posterior of the fate of these cells under each of these sets of components (None: those of the model), in order.

    labels: how each is called in a message, names: in the store. The first stream moves on, for the caller.
    """
    arguments, count = arguments_of(cells), len(components)
    plain = glmm.plain(run.executor.device(run.device))
    models = []
    for i, own in enumerate(components):  # says here what is to be said of the data, and once
        with warnings.catch_warnings(), one_of_many() if i else nullcontext():
            if i:
                warnings.simplefilter("ignore", CellfateWarning)
            models.append((glmm if own is None else glmm.with_components(own)).on(**arguments).problem)
    logger.info("%s", models[0][2])
    store = None
    if run.store is not None:
        inputs = inputs_of(plain.components, cells.design, cells.terms, cells.offset, cells.trials, cells.kept)
        plan = Plan(
            inputs | {"fate": digest([cells.response, cells.levels])},
            settings_of(run, seed),
            list(names),
            [(i, i + 1) for i in range(count)],
            [digest(own) for own in components],
            run.executor.threads,
        )
        store = Store.open(run.store, plan)
    job = PosteriorJob(plain, arguments, run.executor.threads if store is None else store.threads)

    def compute(missing: Sequence[int], found: dict[int, list[Any]]) -> None:
        tasks = [Task(i, labels[i], Ask(components[i], streams[i])) for i in missing]
        with (
            progress(total=count, desc="fits", unit="fit") as bar,
            closing(run.executor.run(job, tasks)) as answers,
        ):
            bar.update(len(found))
            for task, (one, moved) in answered(answers):
                found[task.index] = [one] if store is None else store.write(task.index, [one])
                if task.index == 0:
                    streams[0].bit_generator.state = moved.bit_generator.state
                bar.update()

    kept: dict[int, list[Found]] = with_store(store, count, compute)
    return [kept[i][0].under(models[i][0], arguments) for i in range(count)]
