"""How fates go together: through ancestry, through neighborhood."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate import _keys
from cellfate._runtime import one_of_many, progress
from cellfate.cells import Coded
from cellfate.errors import CellfateWarning, DataError
from cellfate.inference.correlate import check_names, correlations, marginal, table_of
from cellfate.inference.fit import GLMM
from cellfate.io.anndata import read_cells
from cellfate.io.columns import check_adata
from cellfate.io.many import find_fates
from cellfate.io.store import check_no_other, own
from cellfate.tl.components import check_kernels, components_of
from cellfate.trees.forest import examples

if TYPE_CHECKING:
    from anndata import AnnData


def correlate(
    adata: AnnData,
    fates: Sequence[str],
    *,
    family: str,
    link: str | None = None,
    layer: str | None = None,
    formula: str = "~ 1",
    lineage: Any = _keys.TREE,
    lineage_kernel: str = "brownian",
    spatial: Any = _keys.SPATIAL,
    spatial_kernel: str = "matern32",
    lengthscale: float | None = None,
    library_key: str | None = None,
    offset: Any = None,
    trials: Any = None,
    key_added: str = _keys.CORRELATIONS,
    copy: bool = False,
) -> AnnData | None:
    """Correlation of every two fates through ancestry and through neighborhood.

    Each fate is fitted by itself; then, for each pair, the correlations of their effects are found with everything else held at the
    two modes. Two fates that relatives share are correlated through ancestry, whether or not they go together within a cell; for
    gaussian fates that is a correlation of residuals of its own.

    Nothing is drawn at random, so there is no `rng`: the same fates give the same numbers.

    Parameters
    ----------
    fates
        Names of two or more columns of `adata.obs` or genes, all of one family.
    family, link, layer, formula, lineage, lineage_kernel, spatial, spatial_kernel, lengthscale, library_key, offset, trials
        As in :func:`cellfate.tl.decompose`. Specimens get no random intercept here: put what makes them differ into `formula`.
    key_added
        Name of the table in `adata.uns`. An earlier one of that name is replaced, anything else is refused.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes `adata.uns[key_added]`, see :func:`cellfate.get.correlations`.

    Raises
    ------
    DataError
        Where the input breaks the data contract, or a fate cannot be fitted.
    NotImplementedError
        Above 3,000 cells, of which exact matrices are made, and for categorical fates.

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(60, family="gaussian", rng=0)
    >>> adata.obs["other"] = adata.obs["fate"] + adata.obs["fate"].mean()
    >>> adata.obs["other"] += adata.obsm["spatial"][:, 0]
    >>> cf.tl.correlate(adata, ["fate", "other"], family="gaussian", lengthscale=0.5)
    >>> list(cf.get.correlations(adata)["component"])
    ['lineage', 'spatial', 'residual']
    """
    check_adata(adata)
    check_names(fates)
    check_kernels(lineage_kernel, spatial_kernel, lengthscale)
    if spatial_kernel == "graph":
        raise NotImplementedError("correlations on a neighbor graph are not there yet: take a kernel of positions.")
    if family == "categorical":
        raise NotImplementedError(
            "correlations of categorical fates are not there yet: take each against the rest, 'bernoulli'."
        )
    check_no_other(adata, key_added, "correlation", "of correlations")
    cells = read_cells(
        adata,
        None,
        family=family,
        formula=formula,
        lineage=lineage,
        lineage_kernel=lineage_kernel,
        spatial=spatial,
        spatial_kernel=spatial_kernel,
        library_key=library_key,
        offset=offset,
        trials=trials,
    )
    glmm = GLMM(
        family, components_of(cells, lineage_kernel, spatial_kernel, lengthscale, None), link=link, engine="dense"
    )
    found = find_fates(
        adata, list(fates), layer=layer, min_cells=1, kind=glmm.family.kind, trials=trials, kept=cells.kept
    )
    marginals = []
    with warnings.catch_warnings(), one_of_many():
        warnings.simplefilter("ignore", CellfateWarning)
        for name, column in zip(found.names, found.read(slice(None)), strict=True):
            if isinstance(column, DataError):
                raise column
            y = column.y if isinstance(column, Coded) else column
            marginals.append(marginal(glmm, name, y, cells.design, cells.offset, cells.terms, cells.trials))
    pairs = [(one, other) for i, one in enumerate(marginals) for other in marginals[i + 1 :]]
    values = {(a.name, b.name): correlations(a, b) for a, b in progress(pairs, desc="pairs", unit="pair")}
    doubtful = [
        f"{a} and {b}"
        for (a, b), some in values.items()
        if any(c.status != "converged" and np.isfinite(c.estimate) for c in some)
    ]
    if doubtful:
        warnings.warn(
            f"{len(doubtful)} of {len(values)} pairs are in doubt: {examples(doubtful)}. See `status` in `cf.get.correlations`.",
            CellfateWarning,
            stacklevel=2,
        )
    adata = adata.copy() if copy else adata
    own(adata)
    adata.uns[key_added] = pd.DataFrame(table_of(values))
    return adata if copy else None
