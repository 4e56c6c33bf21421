"""How far the shares lean on the priors of the variances."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from cellfate import _keys
from cellfate._runtime import SeedLike, generator
from cellfate.errors import DataError
from cellfate.inference.predict import focused, spread
from cellfate.inference.sensitivity import diagnosis, log_densities, sensitivity
from cellfate.io.again import OBJECTS
from cellfate.io.columns import check_adata
from cellfate.io.store import write_table
from cellfate.tl.fitted import fitted

if TYPE_CHECKING:
    from anndata import AnnData

FEWEST = 50  # draws
ASKED = ("share_", "variance_")


def prior_sensitivity(
    adata: AnnData,
    *,
    key: str = _keys.KEY,
    draws: int = 500,
    lineage: Any = None,
    spatial: Any = None,
    graph: Any = None,
    niche: Any = None,
    offset: Any = None,
    trials: Any = None,
    device: str | torch.device = "auto",
    rng: SeedLike | None = None,
    copy: bool = False,
) -> AnnData | None:
    """How much shares and variances would move under a slightly stronger or weaker prior, and likelihood.

    Power-scaling (Kallioinen et al. 2024): nothing is fitted again, draws are reweighted. Above 0.05 an answer is sensitive. One that
    is sensitive to the prior and not to the likelihood is the prior's: the data say little. One that is sensitive to both is held back
    or pulled along by the prior, and a wider one, such as ``("half_t", 3, 2)``, is worth a look.

    Parameters
    ----------
    key
        The `key_added` of the fit.
    draws
        How many posterior draws are looked at; the likelihood is computed anew at each.
    lineage, spatial, graph, niche, offset, trials
        What was handed to the fit itself, and not the name of something in `adata`, has to be handed over again.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    rng
        Seed of which draws are taken.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes a table to `adata.uns[key]["prior_sensitivity"]`, see :func:`cellfate.get.prior_sensitivity`.

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(60, family="gaussian", rng=0)
    >>> cf.tl.decompose(adata, "fate", family="gaussian", rng=0)
    >>> cf.tl.prior_sensitivity(adata, draws=100, rng=0)
    >>> cf.get.prior_sensitivity(adata).columns.tolist()
    ['quantity', 'prior', 'likelihood', 'diagnosis']
    """
    check_adata(adata)
    if not isinstance(draws, int | np.integer) or draws < FEWEST:
        raise DataError(f"draws is {draws!r}, wanted how many posterior draws to look at, {FEWEST} or more.")
    handed = dict(zip(OBJECTS, (lineage, spatial, graph, niche, offset, trials), strict=True))
    fit = fitted(adata, key, handed, device)
    model, engine, _ = fit.glmm.problem
    if not model.parameters:
        raise DataError("the fit holds every hyperparameter: there is no prior that could matter.")
    values = model.from_draws(fit.draws)
    chosen = spread(values, min(int(draws), len(next(iter(values.values())))), generator(rng))
    theta, points = model.from_natural({name: x[chosen] for name, x in values.items()})
    prior, likelihood = log_densities(model, focused(engine, theta), fit.glmm.rule, theta, points)
    rows = []
    for name in (name for name in fit.draws if name.startswith(ASKED)):
        found = [sensitivity(fit.draws[name][chosen], density) for density in (prior, likelihood)]
        rows.append(
            dict(zip(("quantity", "prior", "likelihood", "diagnosis"), (name, *found, diagnosis(*found)), strict=True))
        )
    adata = adata.copy() if copy else adata
    write_table(adata, key, _keys.PRIOR_SENSITIVITY, pd.DataFrame(rows))
    return adata if copy else None
