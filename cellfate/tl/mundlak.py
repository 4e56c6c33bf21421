"""Is the effect of a covariate the same within and between groups of relatives?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import norm

from cellfate import _keys, get
from cellfate.errors import DataError
from cellfate.model.partition import summary

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


def mundlak(adata: AnnData, covariate: str, key: str = _keys.KEY) -> pd.DataFrame:
    """Compare the coefficients of a covariate within and between groups (Mundlak 1978).

    Needs :func:`cellfate.pp.within_between`, and :func:`cellfate.tl.decompose` with ``"~ 1 + x_within + x_between"``. Random effects
    are taken to have nothing to do with covariates. Where the two coefficients differ they do, or the covariate has an effect of its
    own on the group: then only the one within is free of what relatives share.

    Parameters
    ----------
    covariate
        The covariate that was split.
    key
        The `key_added` of the fit.

    Returns
    -------
    Rows `within`, `between` and `difference` (between less within), with columns `estimate`, `sd`, `lower`, `upper` (95% interval),
    on link scale, and for the difference `p`, of a two-sided Wald test.

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(60, family="gaussian", rng=0)
    >>> adata.obs["x"] = adata.obsm["spatial"][:, 0]
    >>> cf.pp.within_between(adata, "x", by=0.5)
    >>> cf.tl.decompose(adata, "fate", family="gaussian", formula="~ 1 + x_within + x_between", rng=0)
    >>> cf.tl.mundlak(adata, "x").index.tolist()
    ['within', 'between', 'difference']
    """
    import pandas as pd

    draws = get.draws(adata, key)
    names = {part: f"beta[{covariate}_{part}]" for part in ("within", "between")}
    missing = [name for name in names.values() if name not in draws]
    if missing:
        raise DataError(
            f"the fit has no {missing}. Split the covariate with `cf.pp.within_between(adata, {covariate!r}, by=...)`, and fit with "
            f"formula='~ 1 + {covariate}_within + {covariate}_between'."
        )
    within, between = (draws[name].to_numpy() for name in names.values())
    rows = {"within": within, "between": between, "difference": between - within}
    table = pd.DataFrame({name: summary(x) for name, x in rows.items()}, index=["estimate", "sd", "lower", "upper"]).T
    table["p"] = np.nan
    last = table.loc["difference"]
    table.loc["difference", "p"] = 2 * norm.sf(abs(last["estimate"] / last["sd"]))
    return table
