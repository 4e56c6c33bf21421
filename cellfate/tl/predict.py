"""Effects where there is no cell: of the ancestors in the tree, and between the cells of a tissue."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate import _keys, get
from cellfate._runtime import SeedLike
from cellfate.cells import Cells
from cellfate.errors import CellfateWarning, DataError, unknown
from cellfate.inference.fit import GLMM
from cellfate.io.again import GRAPH, modelling, reading
from cellfate.io.ancestors import ancestors_table, check_attributes, graphs_of, with_all_nodes, write_attributes
from cellfate.io.anndata import read_cells
from cellfate.io.columns import check_adata
from cellfate.io.places import grid_places, read_places
from cellfate.io.store import write_table
from cellfate.tl.components import components_of

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
    get.diagnostics(adata, key)  # of many fates there are none, and it says what to do
    of_nodes = isinstance(target, str) and target == ANCESTORS
    _check_target(params, of_nodes, target, library, size)
    handed = {
        "lineage": lineage,
        "spatial": spatial,
        "graph": graph,
        "niche": niche,
        "offset": offset,
        "trials": trials,
    }
    arguments = reading(params, handed)
    graphs = graphs_of(adata, arguments["lineage"]) if of_nodes else {}
    check_attributes(graphs, key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)  # the fit has said them
        cells = read_cells(adata, str(params["fate"]), **arguments)
        _check_same(adata, key, params, cells)
        if of_nodes:
            cells = with_all_nodes(adata, cells, arguments["lineage"], str(params["lineage_kernel"]))
        glmm = _model(cells, params, device)
    stored = get.draws(adata, key)
    values = {name: stored[name].to_numpy() for name in stored.columns}
    if not of_nodes:
        library_key = arguments.get("library_key")
        where = (
            grid_places(cells, size, library_key)
            if isinstance(target, str)
            else read_places(target, library, cells, library_key)
        )
        found = glmm.elsewhere(values, where.coordinates, where.codes, count=draws, rng=rng)
        return where.frame.assign(mean=found.mean, sd=found.sd)
    found = glmm.ancestors(values, count=draws, rng=rng)
    adata = adata.copy() if copy else adata
    table = ancestors_table(cells, found.mean, found.sd)
    write_table(adata, key, _keys.ANCESTORS, table)
    write_attributes(graphs_of(adata, arguments["lineage"]), key, cells, table)
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


def _check_same(adata: AnnData, key: str, params: Mapping[str, Any], cells: Cells) -> None:
    """The cells that are read now are those of the fit."""
    fitted = get.effects(adata, key).notna().all(axis=1).to_numpy()
    if int(params["n_cells"]) != len(cells.names) or not np.array_equal(fitted, cells.kept):
        raise DataError(
            f"the fit was made on {int(params['n_cells'])} cells, and {len(cells.names)} are read now, {int((fitted & cells.kept).sum())} "
            "of them the same. Predict from the adata that was fitted, or fit this one."
        )


def _model(cells: Cells, params: Mapping[str, Any], device: str | torch.device) -> GLMM:
    options = modelling(params)
    lengthscale = float(params["lengthscale"]) if "lengthscale" in params else None
    kernels = [str(params.get(f"{name}_kernel", "")) for name in ("lineage", "spatial")]
    more = {name: bool(params.get(name, False)) for name in ("interaction", "olre")}
    components = components_of(cells, kernels[0], kernels[1], lengthscale, options["rank"], **more)
    glmm = GLMM(str(params["family"]), components, device=device, **options)
    return glmm.on(
        cells.response,
        cells.design,
        cells.offset,
        trials=cells.trials,
        terms=cells.terms,
        response=cells.response_name,
    )
