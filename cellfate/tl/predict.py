"""Effects where there is no cell: of the ancestors in the tree, and between the cells of a tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cellfate import _keys, get
from cellfate._runtime import SeedLike
from cellfate.cells import Cells
from cellfate.errors import DataError, unknown
from cellfate.io.again import GRAPH, OBJECTS, reading
from cellfate.io.ancestors import ancestors_table, check_attributes, graphs_of, with_all_nodes, write_attributes
from cellfate.io.columns import check_adata
from cellfate.io.places import grid_places, read_places
from cellfate.io.store import write_table
from cellfate.tl.fitted import fitted

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    import torch
    from anndata import AnnData

ANCESTORS, GRID = "ancestors", "grid"


def predict(
    adata: AnnData,
    target: Any,
    *,
    key: str = _keys.KEY,
    library: Any = None,
    size: int | None = None,
    draws: int = 16,
    lineage: Any = None,
    spatial: Any = None,
    graph: Any = None,
    niche: Any = None,
    offset: Any = None,
    trials: Any = None,
    device: str | torch.device = "auto",
    rng: SeedLike | None = None,
    copy: bool = False,
) -> AnnData | pd.DataFrame | None:
    """Effects where there is no cell: what ancestors were inclined to, and what neighborhood does between the cells.

    Needs :func:`cellfate.tl.decompose`. The cells are read again by the settings of the fit, and the posterior is worked out at
    some of its draws of the hyperparameters and averaged over them. Like those of the cells, effects are on link scale and
    without fixed effects: 0 is the average. With little data nearby they are pulled to 0, and their sd is that of the component.

    Parameters
    ----------
    target
        ``"ancestors"``: the effect of ancestry at every node of the tree. Positions, as an array (k, 2 or 3) or a data frame with
        columns `x`, `y` (and `z`), or just those of the coordinates: the effect of neighborhood there. ``"grid"``: the same on a
        regular grid over the cells of each specimen.
    key
        The `key_added` of the fit.
    library
        Specimens of the positions, where the fit had a `library_key`: one name, or one per position. In a data frame also a column
        of that name, or `specimen`.
    size
        Points of a grid along its longest side: by default 50 in two dimensions, 20 in three.
    draws
        Posterior draws of the hyperparameters to average over.
    lineage, spatial, graph, niche, offset, trials
        What was handed to the fit itself, and not the name of something in `adata`, has to be handed over again.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    rng
        Seed of the choice of draws.
    copy
        For ancestors: return a copy and leave `adata` as it is.

    Returns
    -------
    For positions and grids a data frame: coordinates, `specimen` (with a `library_key`), posterior `mean` and `sd`. For ancestors
    `None`, or the copy. Writes then:

    `adata.uns[key]["ancestors"]`
        A row per node, see :func:`cellfate.get.ancestors`.
    `adata.obst[...]`
        In a TreeData, posterior mean and sd as attributes `{key}_lineage_mean` and `{key}_lineage_sd` of the nodes.

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(60, family="gaussian", rng=0)
    >>> cf.tl.decompose(adata, "fate", family="gaussian", rng=0)
    >>> cf.tl.predict(adata, "ancestors", rng=0)
    >>> founders = cf.get.ancestors(adata).query("n_cells >= 20")
    >>> cf.tl.predict(adata, [[0.0, 0.0], [0.5, 0.5]], rng=0).columns.tolist()
    ['x', 'y', 'mean', 'sd']
    """
    check_adata(adata)
    if isinstance(target, str) and target not in (ANCESTORS, GRID):
        raise unknown("target", target, (ANCESTORS, GRID))
    params = get.params(adata, key)
    of_nodes = isinstance(target, str) and target == ANCESTORS
    _check_target(params, of_nodes, target, library, size)
    handed = dict(zip(OBJECTS, (lineage, spatial, graph, niche, offset, trials), strict=True))
    graphs = graphs_of(adata, reading(params, handed)["lineage"]) if of_nodes else {}
    check_attributes(graphs, key)

    def all_nodes(cells: Cells, arguments: Mapping[str, Any]) -> Cells:
        return with_all_nodes(adata, cells, arguments["lineage"], str(params["lineage_kernel"]))

    fit = fitted(adata, key, handed, device, all_nodes if of_nodes else None)
    cells, glmm = fit.cells, fit.glmm
    if not of_nodes:
        library_key = fit.arguments.get("library_key")
        where = (
            grid_places(cells, size, library_key)
            if isinstance(target, str)
            else read_places(target, library, cells, library_key)
        )
        found = glmm.elsewhere(fit.draws, where.coordinates, where.codes, count=draws, rng=rng)
        return where.frame.assign(mean=found.mean, sd=found.sd)
    found = glmm.ancestors(fit.draws, count=draws, rng=rng)
    adata = adata.copy() if copy else adata
    table = ancestors_table(cells, found.mean, found.sd)
    write_table(adata, key, _keys.ANCESTORS, table)
    write_attributes(graphs_of(adata, fit.arguments["lineage"]), key, cells, table)
    return adata if copy else None


def _check_target(params: Mapping[str, Any], of_nodes: bool, target: Any, library: Any, size: int | None) -> None:
    """What is asked for suits the fit, and the arguments suit what is asked for."""
    fate = params.get("fate")
    if of_nodes and "lineage" not in params:
        raise DataError(f"the fit of {fate!r} has no lineage: it knows no ancestors. Fit it with a tree first.")
    if not of_nodes and "spatial" not in params:
        raise DataError(
            f"the fit of {fate!r} has no spatial field: it knows no positions. Fit it with coordinates first."
        )
    if not of_nodes and params.get("spatial_kernel") == GRAPH:
        raise DataError(
            f"the field of {fate!r} is on a neighbor graph, and has no value between its cells. Fit it with a kernel of positions, "
            "such as spatial_kernel='matern32'."
        )
    on_grid = isinstance(target, str) and not of_nodes
    if size is not None and not on_grid:
        raise DataError("size is for target='grid'. Leave it out.")
    if library is not None and isinstance(target, str):
        raise DataError(f"library is for positions; {target!r} is of all specimens. Leave it out, and select rows.")
