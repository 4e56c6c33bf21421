"""Many fates of the same cells: each is fitted by itself, and what they share is made once."""

from __future__ import annotations

import warnings

from cellfate._runtime import SeedLike, logger
from cellfate.cells import Cells
from cellfate.errors import CellfateWarning, DataError, Failure
from cellfate.inference.fit import GLMM, GLMMFit
from cellfate.inference.many import Responses, fit_many, summarized
from cellfate.io.design import columns_of
from cellfate.io.many import Fates
from cellfate.tl.components import with_truncation
from cellfate.tl.jobs import Run, fit_chunks, seed_of
from cellfate.trees.forest import examples


def fit_all(
    glmm: GLMM,
    cells: Cells,
    fates: Fates,
    formula: str,
    rng: SeedLike | None,
    chunk_size: int | str,
    run: Run | None = None,
) -> list[GLMMFit | Failure]:
    """The fits of all fates in their order, or why one has none; warns of those, and of those in doubt.

    With a `run` in chunks, elsewhere or into a store.
    """
    own = [name for name in fates.names if name in columns_of(formula) or name in cells.groups]
    if own:
        raise DataError(
            f"{len(own)} of {len(fates.names)} fates are also in the formula or groups: {examples(own)}. Leave them out of one."
        )
    names = " + ".join(component.name for component in glmm.components)
    logger.info("%d fates: %d cells, %s, %s", len(fates.names), cells.n, glmm.family.name, names)
    seed = seed_of(rng, None if run is None else run.store)
    known = {"n": cells.n, "trials": cells.trials, "terms": cells.terms, "seed": seed}
    if run is None:
        found = list(
            fit_many(glmm, fates.names, fates.read, cells.design, cells.offset, **known, chunk_size=chunk_size)  # type: ignore[arg-type]
        )
    else:
        responses = Responses(
            glmm.plain(run.executor.device(run.device)),
            len(fates.names),
            cells.n,
            cells.design,
            cells.offset,
            cells.trials,
            cells.terms,
            seed,
        )
        found = fit_chunks(responses, fates, run, chunk_size)
    found = [one if isinstance(one, Failure) else with_truncation(one, glmm.components)[0] for one in found]
    which = summarized(found)
    if len(which["failed"]) == len(found):
        first = next(one for one in found if isinstance(one, Failure))
        raise DataError(f"none of {len(found)} fates could be fitted; {first.response!r}: {first.reason}")
    for kind, what in (("failed", "could not be fitted"), ("doubtful", "have a fit that is in doubt")):
        if which[kind]:
            warnings.warn(
                f"{len(which[kind])} of {len(found)} fates {what}: {examples(which[kind])}. See `status` in `cf.get.responses`.",
                CellfateWarning,
                stacklevel=3,
            )
    return found
