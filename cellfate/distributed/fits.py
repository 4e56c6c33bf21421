"""The job of many responses over the same cells: chunks of them, each answered by fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cellfate.distributed.tasks import Job, Task, Work
from cellfate.errors import Failure
from cellfate.inference.dispersion import Estimate, Trend
from cellfate.inference.fit import GLMMFit
from cellfate.inference.many import Column, Ready, Responses

FEW_DRAWS = 200  # kept of each response, where there are many
MOST_TOGETHER = 16  # responses of a chunk that are fitted one by one,
LEAST_CHUNKS = 64  # or fewer, so that many workers end at about the same time
TABLED = 256  # of a chunk that shares tables, which are made anew for each chunk


@dataclass(frozen=True, eq=False)
class Chunk:
    """Responses that are read and fitted together, each as a family takes it or with what is wrong with it."""

    names: tuple[str, ...]
    columns: tuple[Column, ...]
    trend: Trend | None = None
    estimates: bool = False  # asks for what they say of their dispersion, before there is a trend


@dataclass(frozen=True, eq=False)
class FitJob(Job):
    """Fits of many responses over the same cells. A :class:`Chunk` is answered by a list, of fits or failures."""

    responses: Responses
    threads: int = 1

    @property
    def one_at_a_time(self) -> bool:
        return (
            self.responses.shares_tables
        )  # whose compiled loops have threads of their own, which bear no second caller

    def prepare(self) -> Work:
        ready = self.responses.ready()
        return lambda chunk: fit_chunk(ready, chunk)


def fit_chunk(ready: Ready, chunk: Chunk) -> list[GLMMFit | Failure] | list[Estimate | None]:
    """The answer to a chunk."""
    if chunk.estimates:
        return list(ready.estimates(chunk.names, chunk.columns))  # type: ignore[arg-type]
    return [shortened(one) for one in ready.fits(chunk.names, chunk.columns, chunk.trend)]


def shortened(one: GLMMFit | Failure) -> GLMMFit | Failure:
    """What is kept of one of many."""
    if isinstance(one, Failure):
        return one
    return replace(one, draws={name: x[:FEW_DRAWS].copy() for name, x in one.draws.items()}, effects={})


def chunk_task(index: int, label: str, chunk: Chunk) -> Task:
    """A task whose parts are its responses one by one: none depends on the company."""
    parts = None
    if len(chunk.names) > 1:
        parts = [
            Task(index, repr(name), replace(chunk, names=(name,), columns=(column,)))
            for name, column in zip(chunk.names, chunk.columns, strict=True)
        ]
    return Task(index, label, chunk, parts)


def layout(responses: Responses, chunk_size: int | str) -> int | str:
    """How many responses a chunk has: by what they are, so that it is the same whoever computes them."""
    if chunk_size != "auto":
        return chunk_size
    if responses.shares_tables:
        return TABLED
    return max(1, min(MOST_TOGETHER, -(-responses.count // LEAST_CHUNKS)))
