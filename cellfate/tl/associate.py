"""Many covariates or genes, each tested as a fixed effect given ancestry and neighborhood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, norm

from cellfate import _keys
from cellfate._runtime import logger, progress
from cellfate.distributed.executors import answered, executor, here, ordered
from cellfate.distributed.tasks import Job, Task, Work
from cellfate.errors import DataError
from cellfate.inference.associate import Associations, inflation
from cellfate.inference.fit import GLMM
from cellfate.inference.many import Column, chunks
from cellfate.io.again import OBJECTS
from cellfate.io.columns import check_adata
from cellfate.io.many import Fates, find_fates
from cellfate.io.store import write_table
from cellfate.tl.fitted import check_there, fitted
from cellfate.tl.posteriors import arguments_of

if TYPE_CHECKING:
    import torch
    from anndata import AnnData
    from distributed import Client

FEWEST = 20  # covariates, of which a median says something
CALIBRATED, MANY = (0.9, 1.1), 100  # lambda within which, and covariates below which, nothing is said of it
AT_ONCE = 256  # covariates of a chunk


def associate(
    adata: AnnData,
    covariates: Sequence[str] | None = None,
    *,
    layer: str | None = None,
    min_cells: int = 10,
    key: str = _keys.KEY,
    lineage: Any = None,
    spatial: Any = None,
    graph: Any = None,
    niche: Any = None,
    offset: Any = None,
    trials: Any = None,
    device: str | torch.device = "auto",
    chunk_size: int | str = "auto",
    client: Client | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Test many covariates or genes, one at a time, against a fate, given its ancestry and neighborhood.

    Relatives and neighbors are alike in everything, so that a plain regression finds associations everywhere. Here the fit under
    `key` is the null model, its hyperparameters stay, and each covariate is asked whether it explains what is left (score tests, as in
    mixed-model association; Chen et al. 2016). Estimates take one step from the null: right for small effects, somewhat small for
    large ones.

    Parameters
    ----------
    covariates
        Columns of `adata.obs` and genes; by default all genes that are not zero in `min_cells` cells.
    layer
        Where genes are read, in place of `adata.X`, and as they are: take logarithms first.
    key
        The `key_added` of the fit.
    lineage, spatial, graph, niche, offset, trials
        What was handed to the fit itself, and not the name of something in `adata`, has to be handed over again.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    chunk_size
        How many covariates to read at once.
    client
        A `dask.distributed.Client`: chunks of covariates are tested by its workers, each on one thread. What is found is what one
        process on one thread finds.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes a table to `adata.uns[key]["associations"]`, see :func:`cellfate.get.associations`.

    Examples
    --------
    >>> import numpy as np
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(80, family="gaussian", rng=0)
    >>> adata.obs["noise"] = np.random.default_rng(0).normal(size=80)
    >>> cf.tl.decompose(adata, "fate", family="gaussian", rng=0)
    >>> cf.tl.associate(adata, ["noise"])
    >>> cf.get.associations(adata).columns.tolist()
    ['covariate', 'estimate', 'error', 'z', 'p', 'q', 'status']
    """
    check_adata(adata)
    handed = dict(zip(OBJECTS, (lineage, spatial, graph, niche, offset, trials), strict=True))
    workers = executor(client)
    fit = fitted(adata, key, handed, device if client is None else here(workers.device(device)))
    check_there(fit, "associations")
    found = find_fates(
        adata, covariates, layer=layer, min_cells=min_cells, kind="real", trials=None, kept=fit.cells.kept
    )
    if str(fit.params["fate"]) in found.names:
        raise DataError(f"the fate {fit.params['fate']!r} is among the covariates: leave it out.")
    job = AssociateJob(fit.glmm.plain(workers.device(device)), arguments_of(fit.cells), fit.mode, workers.threads)
    parts = chunks(len(found.names), fit.cells.n, AT_ONCE if chunk_size == "auto" else chunk_size)
    rows = []
    with (
        progress(total=len(found.names), desc="covariates", unit="covariate") as bar,
        closing(workers.run(job, _tasks(found, parts))) as answers,
    ):
        for task, (estimates, errors) in ordered(answered(answers), range(len(parts))):
            columns = task.data
            tested = iter(zip(estimates, errors, strict=True))
            for name, column in zip(found.names[parts[task.index]], columns, strict=True):
                estimate, error = next(tested) if isinstance(column, np.ndarray) else (np.nan, np.nan)
                status = "tested" if np.isfinite(error) else "the fixed effects hold it"
                status = str(column) if isinstance(column, DataError) else status
                rows.append({"covariate": name, "estimate": estimate, "error": error, "status": status})
            bar.update(len(columns))
    table = pd.DataFrame(rows)
    table.insert(3, "z", table["estimate"] / table["error"])
    table.insert(4, "p", 2 * norm.sf(table["z"].abs()))
    table.insert(5, "q", np.nan)
    known = table["p"].notna()
    if known.any():
        table.loc[known, "q"] = false_discovery_control(table.loc[known, "p"])
        _say_spread(table.loc[known, "z"].to_numpy())
    adata = adata.copy() if copy else adata
    write_table(adata, key, _keys.ASSOCIATIONS, table)
    return adata if copy else None


def _say_spread(z: np.ndarray) -> None:
    """How many there were, and lambda where they are enough for it."""
    if len(z) < FEWEST:
        logger.info("%d covariate%s tested", len(z), "" if len(z) == 1 else "s")
        return
    spread, said = inflation(z), ""
    if len(z) >= MANY and not CALIBRATED[0] <= spread <= CALIBRATED[1]:
        said = ": the fate goes with many of them, or the model misses something"
    logger.info("%d covariates, lambda %.2f%s", len(z), spread, said)


def _tasks(found: Fates, parts: Sequence[slice]) -> Iterator[Task]:
    """Chunks of covariates, read when they are handed out."""
    for index, part in enumerate(parts):
        yield Task(index, f"the association of {found.names[part.start]!r}", found.read(part))


@dataclass(frozen=True, eq=False)
class AssociateJob(Job):
    """Score tests of covariates against a fitted null model. Columns are answered by estimates and errors of those that are numbers."""

    glmm: GLMM
    arguments: Mapping[str, Any]  # the data of the fit
    mode: Mapping[str, float]
    threads: int = 1

    def prepare(self) -> Work:
        model, engine, _ = self.glmm.on(**self.arguments).problem
        ask = Associations(model, engine, self.glmm.rule, self.mode)

        def work(columns: Sequence[Column]) -> tuple[np.ndarray, np.ndarray]:
            usable = [c for c in columns if isinstance(c, np.ndarray)]
            return ask(np.column_stack(usable)) if usable else (np.zeros(0), np.zeros(0))

        return work
