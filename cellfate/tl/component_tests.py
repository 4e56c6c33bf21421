"""Is ancestry there at all, given neighborhood? And neighborhood, given ancestry?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from cellfate import _keys
from cellfate._runtime import SeedLike, generator, logger, progress
from cellfate.distributed.executors import Executor, answered, executor, here, ordered
from cellfate.distributed.tasks import Task
from cellfate.errors import DataError, unknown
from cellfate.inference.bootstrap import DRAWABLE, bootstrapped, draw_seeds
from cellfate.inference.many import chunks
from cellfate.io.again import OBJECTS
from cellfate.io.columns import check_adata
from cellfate.io.many import Fates
from cellfate.io.store import write_table
from cellfate.tl.fitted import Fitted, check_there, fitted_all
from cellfate.tl.sets import clades, neighborhoods
from cellfate.tl.tested import Asked, TestJob, given

if TYPE_CHECKING:
    import torch
    from anndata import AnnData
    from distributed import Client

METHODS = ("score", "likelihood_ratio", "bootstrap", "permutation")
TOGETHER, LEAST_CHUNKS = 16, 64  # fates of a chunk at most, and chunks at least where there are as many fates
DRAWN = 10  # fates of a bootstrap that are drawn in one task
SWAPPED = 6  # cells of a set within which they are swapped, on average
MOST_SWAPPED = 8  # of a neighborhood


def test_components(
    adata: AnnData,
    components: str | Sequence[str] | None = None,
    *,
    key: str = _keys.KEY,
    method: str = "score",
    n_boot: int = 199,
    n_perm: int = 999,
    lineage: Any = None,
    spatial: Any = None,
    graph: Any = None,
    niche: Any = None,
    offset: Any = None,
    trials: Any = None,
    device: str | torch.device = "auto",
    rng: SeedLike | None = None,
    client: Client | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Test each component given all others: the model is fitted without it, and its score is looked at.

    An interval of a variance never holds zero, so it is no test. The score of a variance is a quadratic form, whose distribution is
    known (Lin 1997; Zhang & Lin 2003). Where the component has a length-scale, four are looked at and combined (Liu & Xie 2020).

    Parameters
    ----------
    components
        Names of components of the fit; all of them by default.
    key
        The `key_added` of the fit, of one fate or of many.
    method
        ``"score"``. ``"bootstrap"``: the same p-value held against those of `n_boot` fates drawn from the null model, each with a
        null fit of its own: slower, and right where samples are small. ``"permutation"``, for `lineage` and `spatial`: cells swapped
        `n_perm` times in space within small clades, or in the tree within small neighborhoods, which believes in no distribution and
        sees only what is finer than these sets. ``"likelihood_ratio"``: twice the gain in free energy from mode to mode, against half
        a chi-square of one degree of freedom (Self & Liang 1987). That mixture is for many independent specimens, and for components
        without a length-scale: with one tree, or one field, all cells are one dependent cluster, and of absent components 3 to 9 % are
        called at a level of 5 % (`benchmarks/false_positives.py`; the score 5 %, permutation 3 to 5 %).
    n_boot, n_perm
        How many fates to draw, and how often to swap.
    lineage, spatial, graph, niche, offset, trials
        What was handed to the fit itself, and not the name of something in `adata`, has to be handed over again.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    rng
        Seed of the bootstrap and of the swaps.
    client
        A `dask.distributed.Client`: chunks of many fates, or of the fates that a bootstrap draws, are tested by its workers, each on
        one thread. What is found is what one process on one thread finds.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes a table to `adata.uns[key]["tests"]`, see :func:`cellfate.get.tests`. Of many fates it has a row for each
    and component, with `q`, the p-value adjusted over the fates (Benjamini & Hochberg 1995).

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(80, family="gaussian", rng=0)
    >>> cf.tl.decompose(adata, "fate", family="gaussian", rng=0)
    >>> cf.tl.test_components(adata)
    >>> cf.get.tests(adata)["component"].tolist()
    ['lineage', 'spatial']
    """
    check_adata(adata)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    for argument, value, what in (("n_boot", n_boot, "fates to draw"), ("n_perm", n_perm, "swaps to make")):
        if not isinstance(value, int | np.integer) or value < 1:
            raise DataError(f"{argument} is {value!r}, wanted how many {what}, such as 199.")
    handed = dict(zip(OBJECTS, (lineage, spatial, graph, niche, offset, trials), strict=True))
    workers = executor(client)
    fit, fates = fitted_all(adata, key, handed, device if client is None else here(workers.device(device)))
    family = fit.glmm.family
    check_there(fit, "tests of components")
    if method == "bootstrap" and family.kind not in DRAWABLE:
        raise NotImplementedError(
            f"method='bootstrap' draws fates again, which is not there yet for family={family.name!r}. Take method='score'."
        )
    names = _names(fit, components)
    sets = {name: _sets(fit, name) for name in names} if method == "permutation" else {}
    seed = int(generator(rng).integers(2**63))
    job = TestJob(
        replace(fit, glmm=fit.glmm.plain(workers.device(device))),
        method,
        int(n_boot),
        int(n_perm),
        sets,
        seed,
        workers.threads,
    )
    rows = []
    for name, response, found in _answers(job, names, fates, workers):
        row = {} if fates is None else {"response": response}
        row |= {
            "component": name,
            "given": " + ".join(c.name for c in given(fit.glmm.components, name)),
            "method": method,
        }
        rows.append(row | found)
    table = pd.DataFrame(rows)
    if fates is None:
        for row in rows:
            logger.info("%s given %s: p = %.3g", row["component"], row["given"], row["p"])
        table = table.drop(columns="status")
    else:
        table = _adjusted(table)
    adata = adata.copy() if copy else adata
    write_table(adata, key, _keys.TESTS, table)
    return adata if copy else None


def _answers(
    job: TestJob, names: Sequence[str], fates: Fates | None, workers: Executor
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Component, fate, and what was found of it, in order."""
    alone = fates is None
    tasks = list(_of_one(job, names)) if fates is None else _of_many(job, names, fates)
    count = len(tasks) if isinstance(tasks, list) else len(names) * len(_parts(job, fates))
    response = job.fit.cells.response_name
    held: dict[str, tuple[dict[str, Any], list[float]]] = {}
    with progress(total=count, desc="tests", unit="task") as bar, closing(workers.run(job, tasks)) as answers:
        for task, answer in ordered(answered(answers), range(count)):
            asked: Asked = task.data
            bar.update()
            if not alone:
                assert asked.names is not None
                yield from ((asked.component, name, row) for name, row in zip(asked.names, answer, strict=True))
            elif job.method != "bootstrap":
                yield asked.component, response, answer[0]
            elif asked.seeds is None:
                held[asked.component] = answer[0], []
            else:
                row, drawn = held[asked.component]
                drawn += answer
                if len(drawn) == job.n_boot:
                    yield asked.component, response, row | {"p": bootstrapped(row["p_score"], drawn)}


def _of_one(job: TestJob, names: Sequence[str]) -> Iterator[Task]:
    """The fate of the fit, and fates drawn from its null model by a few."""
    index = 0
    for name in names:
        yield Task(index, f"the test of {name}", Asked(name))
        index += 1
        if job.method == "bootstrap":
            seeds = draw_seeds(job.stream(name, job.fit.cells.response_name), job.n_boot)
            for first in range(0, job.n_boot, DRAWN):
                yield Task(index, f"the bootstrap of {name}", Asked(name, seeds=tuple(seeds[first : first + DRAWN])))
                index += 1


def _of_many(job: TestJob, names: Sequence[str], fates: Fates) -> Iterator[Task]:
    """Chunks of fates, read when they are handed out."""
    parts = _parts(job, fates)
    for i, name in enumerate(names):
        for j, part in enumerate(parts):
            some = tuple(fates.names[part])
            asked = Asked(name, some, tuple(fates.read(part)))
            yield Task(i * len(parts) + j, f"the test of {name} in {some[0]!r}", asked)


def _parts(job: TestJob, fates: Fates | None) -> list[slice]:
    assert fates is not None
    count = len(fates.names)
    return chunks(count, job.fit.cells.n, max(1, min(TOGETHER, -(-count // LEAST_CHUNKS))))


def _adjusted(table: pd.DataFrame) -> pd.DataFrame:
    """With the p-values of each component adjusted over the fates that were tested."""
    table.insert(table.columns.get_loc("p") + 1, "q", np.nan)
    for name, own in table.groupby("component", sort=False):
        known = own.index[own["p"].notna()]
        if len(known):
            table.loc[known, "q"] = false_discovery_control(table.loc[known, "p"])
        logger.info("%s: %d of %d fates with q < 0.05", name, int((table.loc[known, "q"] < 0.05).sum()), len(own))
    return table


def _sets(fit: Fitted, name: str) -> np.ndarray:
    """Labels (n,) of cells that may be swapped where `name` is tested."""
    cells, held = fit.cells, [c.name for c in fit.glmm.components if c.name != name]
    count = max(cells.n // SWAPPED, 1)
    if name == "spatial" and "lineage" in held and cells.forest is not None and cells.leaf is not None:
        return clades(cells.forest, cells.leaf, count)
    if name == "lineage" and "spatial" in held and cells.coordinates is not None:
        return neighborhoods(cells.coordinates, cells.specimen, MOST_SWAPPED)
    raise NotImplementedError(
        f"method='permutation' is there for 'lineage' and 'spatial', each given the other with positions, not for {name!r} given "
        f"{', '.join(held)}. Take method='score' or 'bootstrap', or name `components`."
    )


def _names(fit: Fitted, components: str | Sequence[str] | None) -> list[str]:
    known = [c.name for c in fit.glmm.components]
    if len(known) < 2:
        raise DataError(
            f"the fit has one component, {known[0]!r}: there is no model without it to hold it against. Fit with a second one, such as "
            "a grouping factor of specimens."
        )
    wanted = known if components is None else [components] if isinstance(components, str) else list(components)
    wrong = [name for name in wanted if name not in known]
    if wrong or not wanted:
        raise DataError(f"components has {wrong or 'no names'}; the fit has {', '.join(known)}.")
    held = [c.name for c in fit.glmm.components if c.name in wanted and c.kernel.holds_variance]
    if held:
        raise NotImplementedError(
            f"a test of {held}, intercepts and slopes that covary, is not there yet. Fit them apart, as '(1 + x || {held[0]})'."
        )
    return wanted
