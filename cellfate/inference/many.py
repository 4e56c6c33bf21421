"""Many responses over the same cells, each with hyperparameters of its own.

Responses are read in chunks, so that a sparse matrix of genes is never made dense as a whole. What does not depend on a response
is made once: the engine, its bases, and for gaussian responses everything but a few numbers of each
(:mod:`cellfate.inference.gaussian_many`). A response's random numbers go by its name: neither the order of responses, nor the
chunks, nor the company changes an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cellfate._runtime import announce, logger, named_generator, progress, side_by_side
from cellfate.cells import Coded
from cellfate.errors import DataError, Failure
from cellfate.inference.arrays import numbers, term_names
from cellfate.inference.dispersion import DISPERSION, FEWEST, Estimate, Trend, dispersion_trend, estimate
from cellfate.inference.fit import GLMM, GLMMFit
from cellfate.inference.gaussian_many import Together, can_serve
from cellfate.model.checks import check_design, check_response

CHUNK_BYTES = 2.5e8  # of dense columns at once
LARGEST_CHUNK = 4096
ENOUGH = 20  # gaussian responses from which on they share tables


Column = np.ndarray | Coded | DataError  # (n,), or what is wrong with it
Read = Callable[[slice], Sequence[Column]]  # the responses at these places, which are read when they are needed


def chunks(count: int, n: int, chunk_size: int | str) -> list[slice]:
    """Places of the responses that are read together."""
    if chunk_size == "auto":
        size = min(LARGEST_CHUNK, max(1, int(CHUNK_BYTES / (8 * n))))
    elif isinstance(chunk_size, int | np.integer) and not isinstance(chunk_size, bool) and chunk_size > 0:
        size = int(chunk_size)
    else:
        raise DataError(
            f"chunk_size is {chunk_size!r}, wanted 'auto' or how many responses to read at once, such as 64."
        )
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


@dataclass(frozen=True, eq=False)
class Responses:
    """What many responses over the same `n` cells share, as plain data: it pickles, so that it can be sent to a worker.

    glmm: the model, see :meth:`cellfate.GLMM.plain`; count: of all responses, not only of those that are fitted in one place.
    X: (n, p), its columns `terms`; offset, trials: (n,) or None. seed: random numbers of a response go by it and by its name.
    """

    glmm: GLMM
    count: int
    n: int
    X: Any = None
    offset: Any = None
    trials: Any = None
    terms: Sequence[str] | None = None
    seed: int = 0

    @property
    def wants_trend(self) -> bool:
        """Whether each is fitted under a trend of the dispersion over all of them."""
        glmm = self.glmm
        return glmm.family.parameter == DISPERSION and DISPERSION not in glmm.priors and self.count >= FEWEST

    @property
    def shares_tables(self) -> bool:
        """Whether they are gaussian, many, and of a model whose likelihood can be tabulated."""
        glmm = self.glmm
        many = glmm.family.name == "gaussian" and self.count >= ENOUGH
        return many and can_serve(glmm.components, engine=glmm.engine_name, reml=glmm.reml) is None

    def ready(self) -> Ready:
        """With what is made once."""
        return Ready(self)


class Ready:
    """What is made once for many responses: the engine, its bases, tables. Answers do not depend on what was asked before."""

    def __init__(self, of: Responses) -> None:
        self.of, self.glmm = of, of.glmm.shared()
        self._together = _together(self.glmm, of)

    def fits(
        self, names: Sequence[str], columns: Sequence[Column], trend: Trend | None = None
    ) -> Iterator[GLMMFit | Failure]:
        """A fit of each of these responses in turn, or what went wrong with it."""
        of = self.of
        if self._together is not None:
            return _fit_together(self._together, names, columns, of.seed, self.glmm.engine_name)
        return side_by_side(
            lambda one: _fit_one(self.glmm, trend, *one, of.X, of.offset, of.trials, of.terms, of.seed),
            list(zip(names, columns, strict=True)),
            self.glmm.device,
            alone=of.count == 1,
        )

    def estimates(self, names: Sequence[str], columns: Sequence[np.ndarray]) -> Iterator[Estimate | None]:
        """What each of these responses alone says of its dispersion, see :mod:`cellfate.inference.dispersion`."""
        of = self.of
        return side_by_side(
            lambda one: estimate(self.glmm, *one, of.X, of.offset, of.terms),
            list(zip(names, columns, strict=True)),
            self.glmm.device,
        )


def fit_many(
    glmm: GLMM,
    names: Sequence[str],
    read: Read,
    X: Any = None,
    offset: Any = None,
    *,
    n: int,
    trials: Any = None,
    terms: Sequence[str] | None = None,
    seed: int = 0,
    chunk_size: int | str = "auto",
) -> Iterator[GLMMFit | Failure]:
    """A fit for each response in turn, as :meth:`cellfate.GLMM.fit` gives it, or what went wrong with it.

    Counts under the negative binomial have a dispersion each, with a prior about the trend over responses of a like mean
    (:mod:`cellfate.inference.dispersion`), unless the model's priors say otherwise or there are fewer than 20 of them.
    """
    parts = chunks(len(names), n, chunk_size)
    ready = Responses(glmm, len(names), n, X, offset, trials, terms, seed).ready()
    logger.info("%s", ready.glmm.reason)
    trend = dispersion_trend(names, read, parts, ready.estimates) if ready.of.wants_trend else None
    with progress(total=len(names), desc="responses", unit="response") as bar:
        for part in parts:
            for one in ready.fits(names[part], read(part), trend):
                yield one
                bar.update(1)


def _together(glmm: GLMM, of: Responses) -> Together | None:
    """What gaussian responses share, where they are many and the model is one whose likelihood can be tabulated."""
    if not of.shares_tables:
        if glmm.family.name == "gaussian" and of.count >= ENOUGH:
            refused = can_serve(glmm.components, engine=glmm.engine_name, reml=glmm.reml)
            announce("each of %d responses is fitted by itself: %s", of.count, refused)
        return None
    design = np.zeros((of.n, 0)) if of.X is None else numbers("X", of.X, 2, of.n)
    names = term_names(of.terms, design.shape[1])
    if names:
        check_design(design, names, np.arange(of.n), "X")
    known = None if of.offset is None else numbers("offset", of.offset, 1, of.n)
    return Together(glmm.components, design, names, known, glmm.priors, glmm.rank, glmm.device)


def _fit_together(
    together: Together, names: Sequence[str], columns: Sequence[Column], seed: int, engine: str
) -> Iterator[GLMMFit | Failure]:
    """Fits of a chunk in its order; what cannot be read is set aside before."""
    failures: dict[int, Failure] = {}
    usable: dict[int, np.ndarray] = {}
    for i, (name, column) in enumerate(zip(names, columns, strict=True)):
        try:
            if isinstance(column, DataError):
                raise column
            assert not isinstance(column, Coded)  # measurements have no levels
            check_response(column, np.arange(len(column)), name, kind="real", trials=None)
            usable[i] = column
        except DataError as error:
            failures[i] = Failure(name, str(error))
    fits: Iterator[GLMMFit] = iter(())
    if usable:
        fits = together.fits(np.column_stack(list(usable.values())), [names[i] for i in usable], seed, engine)
    for i in range(len(names)):
        yield failures[i] if i in failures else next(fits)


def _fit_one(
    glmm: GLMM,
    trend: Trend | None,
    name: str,
    column: Column,
    X: Any,
    offset: Any,
    trials: Any,
    terms: Sequence[str] | None,
    seed: int,
) -> GLMMFit | Failure:
    if isinstance(column, DataError):
        return Failure(name, str(column))
    column, levels = (column.y, column.levels) if isinstance(column, Coded) else (column, None)
    glmm = glmm.with_priors({} if trend is None else {DISPERSION: trend.prior(column)})  # one that others do not share
    try:
        fit = glmm.fit(
            column, X, offset, trials=trials, terms=terms, levels=levels, response=name, rng=named_generator(seed, name)
        )
    except (
        DataError,
        ArithmeticError,
        ValueError,
        RuntimeError,
        MemoryError,
    ) as error:  # linear algebra raises some of them
        logger.debug("%s failed", name, exc_info=True)
        return Failure(name, f"{type(error).__name__}: {error}" if not isinstance(error, DataError) else str(error))
    if levels is not None:
        fit = replace(fit, diagnostics=fit.diagnostics | {"levels": ", ".join(levels)})
    if trend is None:
        return fit
    return replace(fit, diagnostics=fit.diagnostics | {"dispersion_trend": trend.at(column)})


def summarized(found: Sequence[GLMMFit | Failure]) -> Mapping[str, list[str]]:
    """Names of the responses that have no fit, and of those whose fit is in doubt."""
    failed = [f.response for f in found if isinstance(f, Failure)]
    doubtful = [
        str(f.components["response"][0])
        for f in found
        if isinstance(f, GLMMFit) and f.diagnostics["status"] != "converged"
    ]
    return {"failed": failed, "doubtful": doubtful}
