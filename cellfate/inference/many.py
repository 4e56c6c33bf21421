"""Many responses over the same cells, each with hyperparameters of its own.

Responses are read in chunks, so that a sparse matrix of genes is never made dense as a whole. What does not depend on a response
is made once: the engine, its bases, and for gaussian responses everything but a few numbers of each
(:mod:`cellfate.inference.gaussian_many`). A response's random numbers go by its name: neither the order of responses, nor the
chunks, nor the company changes an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cellfate._runtime import logger, named_generator, progress, side_by_side
from cellfate.cells import Coded
from cellfate.errors import DataError, Failure
from cellfate.inference.arrays import numbers, term_names
from cellfate.inference.dispersion import DISPERSION, FEWEST, Trend, dispersion_trend
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
    shared = glmm.shared()
    logger.info("%s", shared.reason)
    trend = None
    if glmm.family.parameter == DISPERSION and DISPERSION not in glmm.priors and len(names) >= FEWEST:
        trend = dispersion_trend(shared, names, read, parts, X, offset, terms)
    together = _together(shared, len(names), X, offset, terms, n)
    with progress(total=len(names), desc="responses", unit="response") as bar:
        for part in parts:
            columns = read(part)
            if together is not None:
                found = _fit_together(together, names[part], columns, seed, shared.engine_name)
            else:
                found = side_by_side(
                    lambda one: _fit_one(shared, trend, *one, X, offset, trials, terms, seed),
                    list(zip(names[part], columns, strict=True)),
                    shared.device,
                )
            for one in found:
                yield one
                bar.update(1)


def _together(glmm: GLMM, count: int, X: Any, offset: Any, terms: Sequence[str] | None, n: int) -> Together | None:
    """What gaussian responses share, where they are many and the model is one whose likelihood can be tabulated."""
    if glmm.family.name != "gaussian" or count < ENOUGH:
        return None
    refused = can_serve(glmm.components, engine=glmm.engine_name, reml=glmm.reml)
    if refused is not None:
        logger.info("each of %d responses is fitted by itself: %s", count, refused)
        return None
    design = np.zeros((n, 0)) if X is None else numbers("X", X, 2, n)
    names = term_names(terms, design.shape[1])
    if names:
        check_design(design, names, np.arange(n), "X")
    known = None if offset is None else numbers("offset", offset, 1, n)
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
