"""A covariate in two parts: the mean of a cell's relatives, and how far the cell is from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate import _keys
from cellfate.errors import DataError
from cellfate.io.columns import check_adata, instead
from cellfate.io.lineage import find_ancestry, match
from cellfate.io.store import own
from cellfate.model.checks import check_finite
from cellfate.trees.forest import Forest

if TYPE_CHECKING:
    from anndata import AnnData


def within_between(
    adata: AnnData, covariate: str, by: Any, *, lineage: Any = _keys.TREE, copy: bool = False
) -> AnnData | None:
    """Split a covariate into its mean over a cell's group and the cell's deviation from it.

    Where relatives share causes of the covariate and of the fate, cells that have more of it differ from others in more than that.
    Within a clone all that is shared is held: the coefficient of the deviation is free of it, that of the mean is not (Mundlak 1978;
    Bell & Jones 2015). Put both in a formula, and compare them with :func:`cellfate.tl.mundlak`.

    Parameters
    ----------
    covariate
        A column of numbers in `adata.obs`.
    by
        A column of `adata.obs` that says which cells belong together, such as ``"clone"``; or a depth of the tree, in its units of
        branch length from the top of the root: cells are then grouped by their ancestor at that depth.
    lineage
        The tree, where `by` is a depth; as in :func:`cellfate.tl.decompose`.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes `adata.obs[f"{covariate}_between"]`, the mean of the group, and `adata.obs[f"{covariate}_within"]`, the
    deviation from it; they sum to the covariate. Cells without a group are NaN.

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(60, rng=0)
    >>> adata.obs["x"] = range(60)
    >>> cf.pp.within_between(adata, "x", by=0.5)
    >>> bool((adata.obs["x_within"] + adata.obs["x_between"] - adata.obs["x"]).abs().max() < 1e-9)
    True
    """
    check_adata(adata)
    if covariate not in adata.obs:
        raise DataError(f"adata.obs has no {covariate!r}; {instead(covariate, adata.obs.columns)}.")
    values = adata.obs[covariate]
    if not pd.api.types.is_numeric_dtype(values.dtype):
        raise DataError(
            f"obs[{covariate!r}] holds {values.dtype}, and a mean is of numbers. Turn a level into 0 and 1 first: "
            f"(adata.obs[{covariate!r}] == <level>).astype(float)."
        )
    x = values.to_numpy(dtype=np.float64)
    check_finite(x, adata.obs_names.to_numpy(), f"obs[{covariate!r}]", "Fill it in, or leave those cells out.")
    names = [f"{covariate}_between", f"{covariate}_within"]
    group = _groups(adata, by, lineage)
    frame = pd.DataFrame({"x": x, "group": group}, index=adata.obs_names)
    between = frame.groupby("group", dropna=True, observed=True)["x"].transform("mean")
    between = between.where(frame["group"].notna())
    if not np.ptp(between.dropna()) > 0:
        raise DataError(
            f"by={by!r} makes groups whose means of {covariate!r} are all the same: there is nothing between them."
        )
    if not (x - between).abs().max() > 0:
        raise DataError(
            f"by={by!r} makes groups in which {covariate!r} is the same in all cells: there is nothing within them. Take larger groups, "
            "or a smaller depth."
        )
    adata = adata.copy() if copy else adata
    own(adata)
    adata.obs[names[0]], adata.obs[names[1]] = between.to_numpy(), x - between.to_numpy()
    return adata if copy else None


def _groups(adata: AnnData, by: Any, lineage: Any) -> pd.Series:
    """Which group each cell belongs to, NaN for none."""
    if isinstance(by, str):
        if by not in adata.obs:
            raise DataError(
                f"adata.obs has no {by!r} to group by; {instead(by, adata.obs.columns)}, or give a depth of the tree."
            )
        return adata.obs[by].astype(object)
    if isinstance(by, bool) or not isinstance(by, int | float | np.number) or not np.isfinite(by) or by < 0:
        raise DataError(f"by is {by!r}, wanted a column of obs, or a depth of the tree, a number from 0 on.")
    names = adata.obs_names.to_numpy().astype(object)
    forest, leaf, kept = match(find_ancestry(adata, lineage, "brownian"), names)
    out = pd.Series(np.full(len(names), np.nan), index=adata.obs_names, dtype=object)
    out[kept] = clades(forest, float(by))[leaf].astype(str)
    return out


def clades(forest: Forest, depth: float) -> np.ndarray:
    """For each node (nodes,) its highest ancestor that is as deep as `depth`; itself, where none is."""
    found = np.arange(forest.n_nodes)
    for node in range(forest.n_nodes - 1, -1, -1):  # parents come after their children
        above = forest.parent[node]
        if above >= 0 and forest.depth[above] >= depth:
            found[node] = found[above]
    return found
