"""Who is next to whom, from AnnData: the neighbor graph of a field, and what surrounds each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_array, issparse

from cellfate import _keys
from cellfate._runtime import logger
from cellfate.errors import DataError
from cellfate.io.columns import instead, numbers, per_cell
from cellfate.model.checks import check_finite
from cellfate.places.neighbors import nearest_neighbors, neighbor_average, neighbor_graph
from cellfate.trees.forest import examples

if TYPE_CHECKING:
    from anndata import AnnData

NEAREST = 10  # neighbors of a cell where there is no graph
REMEDY = "Run `squidpy.gr.spatial_neighbors(adata)`, name another key of obsp"


def graph_of_field(adata: AnnData, spatial: Any, graph: Any) -> Any:
    """What names the graph of a field: `spatial`, unless it is the default, the coordinates; then `graph`, or squidpy's."""
    if isinstance(spatial, str) and spatial == _keys.SPATIAL and spatial not in adata.obsp:
        return _keys.CONNECTIVITIES if graph is None else graph
    return spatial


def has_graph(adata: AnnData, graph: Any, field: csr_array | None) -> bool:
    """Whether the niche has a graph to go by."""
    return graph is not None or field is not None or _keys.CONNECTIVITIES in adata.obsp


def read_graph(adata: AnnData, graph: Any, library_key: str | None, argument: str) -> csr_array:
    """Weights (n_obs, n_obs) between neighbors, all cells of `adata` included: one that is left out still is a neighbor."""
    n = adata.n_obs
    if isinstance(graph, str):
        label = f"neighbor graph obsp[{graph!r}]"
        if graph not in adata.obsp:
            raise DataError(
                f"{argument}: there is no {label}; {instead(graph, adata.obsp)}. {REMEDY}, or take a kernel of positions, "
                "'matern32'."
            )
        if "distance" in graph.lower():
            raise DataError(
                f"{label} holds distances by its name, and a weight says how close two neighbors are. Name the "
                "connectivities instead."
            )
        weights = adata.obsp[graph]
    else:
        label, weights = "neighbor graph", graph
    shape = getattr(weights, "shape", None)
    if shape != (n, n):
        found = f"of type {type(weights).__name__}" if shape is None else f"of shape {shape}"
        raise DataError(
            f"{label} is {found}, wanted ({n}, {n}), a row and a column per cell in the order of adata.obs_names. "
            f"{REMEDY}, or give such a matrix."
        )
    found = neighbor_graph(weights, label)
    if library_key is not None:
        _check_specimens(adata, found, library_key, label)
    return found


def _check_specimens(adata: AnnData, graph: csr_array, library_key: str, label: str) -> None:
    """Nobody has a neighbor in another specimen."""
    specimen = pd.factorize(adata.obs[library_key].astype(str))[0]
    edges = graph.tocoo()
    row, column = edges.coords
    across = np.flatnonzero(specimen[row] != specimen[column])
    if across.size:
        pairs = np.unique(np.sort(np.stack([row[across], column[across]], 1), 1), axis=0)
        names = adata.obs_names.to_numpy()
        shown = examples(f"{names[i]} and {names[j]}" for i, j in pairs[:6])
        raise DataError(
            f"{label} has {len(pairs)} edges between cells of different specimens of obs[{library_key!r}]: {shown}. "
            f"Compute it within specimens, such as `squidpy.gr.spatial_neighbors(adata, library_key={library_key!r})`."
        )


def read_niche(
    adata: AnnData,
    niche: Any,
    graph: Any,
    *,
    field: csr_array | None,
    coordinates: np.ndarray | None,
    specimen: np.ndarray,
    library_key: str | None,
    kept: np.ndarray,
) -> np.ndarray:
    """Features (n, q) averaged over the neighbors of each cell that is kept.

    Neighbors are those of `graph`, else of the graph of the `field`, else of squidpy's; where there is none, the nearest ones.
    """
    label, features = _features(adata, niche)
    if graph is None and field is None and _keys.CONNECTIVITIES in adata.obsp:
        graph = _keys.CONNECTIVITIES
    if graph is not None:
        field = read_graph(adata, graph, library_key, "graph")
    if field is None and coordinates is None:
        raise DataError(
            f"niche {label}: neither a neighbor graph obsp[{_keys.CONNECTIVITIES!r}] nor coordinates say who is next to whom. "
            f"{REMEDY}, or give coordinates in `spatial`."
        )
    names = adata.obs_names.to_numpy().astype(object)
    rows = kept if field is None else np.ones(len(kept), dtype=bool)
    remedy = "Correct it, or leave those cells out of adata and of the graph."
    if issparse(features):
        features = csr_array(features).astype(np.float64)
        bad = ~np.isfinite(features.data)
        if bad.any():
            cells = np.unique(features.tocoo().coords[0][bad])
            raise DataError(
                f"{label} is NaN or infinite in {len(cells)} of {len(names)} cells: {examples(names[cells])}. {remedy}"
            )
    else:
        check_finite(features[rows], names[rows], label, remedy)
    if field is None:
        assert coordinates is not None
        logger.info("niche: no neighbor graph, so neighbors are the %d nearest cells of a specimen", NEAREST)
        around = neighbor_average(nearest_neighbors(coordinates, specimen, NEAREST), features[rows])
    else:
        around = neighbor_average(field, features)[kept]
    if not (np.ptp(around, axis=0) > 1e-10 * np.abs(around).max(axis=0)).any():
        raise DataError(
            f"{label}: none of its {around.shape[1]} columns differs between the neighborhoods of {len(around)} cells. There is "
            "nothing to explain a fate with: leave `niche` out."
        )
    return around


def _features(adata: AnnData, niche: Any) -> tuple[str, Any]:
    if isinstance(niche, str):
        if niche not in adata.obsm:
            raise DataError(
                f"niche: there is no obsm[{niche!r}]; {instead(niche, adata.obsm)}. Put features of the cells there, such as "
                f"`adata.obsm[{niche!r}] = pd.get_dummies(adata.obs['type'], dtype=float)`."
            )
        label, value = f"niche obsm[{niche!r}]", adata.obsm[niche]
    else:
        label, value = "niche", per_cell(adata, niche, "niche")
    shape = np.shape(value)
    if len(shape) != 2 or not shape[1]:
        raise DataError(f"{label} has shape {shape}. Give a table (n, q), a row per cell and a column per feature.")
    if issparse(value) and np.dtype(value.dtype).kind in "biuf":
        return label, value
    if hasattr(value, "toarray"):
        value = value.toarray()
    return label, numbers(value, label, "Give numbers: types as columns of 0 and 1, such as pd.get_dummies makes.")
