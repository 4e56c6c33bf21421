"""From AnnData to Cells: everything a fit needs, read and checked before anything runs; nothing is written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate import _keys
from cellfate.cells import Cells
from cellfate.errors import CellfateWarning, DataError
from cellfate.io.columns import (
    among,
    check_adata,
    check_present,
    column,
    factorize,
    instead,
    numbers,
    per_cell,
)
from cellfate.io.design import columns_of, design_matrix, separating
from cellfate.io.groups import check_not_one_each, read_groups
from cellfate.io.lineage import Ancestry, check_specimens, find_ancestry, match
from cellfate.io.neighbors import graph_of_field, has_graph, read_graph, read_niche
from cellfate.io.responses import Response, read_response, read_trials
from cellfate.model.checks import check_finite, check_log_offset, find_family, warn_of_two_dispersions
from cellfate.trees.forest import Forest, examples

if TYPE_CHECKING:
    from anndata import AnnData


def read_cells(
    adata: AnnData,
    fate: str | None,
    *,
    layer: str | None = None,
    family: str,
    formula: str = "~ 1",
    lineage: Any = _keys.TREE,
    lineage_kernel: str = "brownian",
    spatial: Any = _keys.SPATIAL,
    spatial_kernel: str = "matern32",
    graph: Any = None,
    niche: Any = None,
    library_key: str | None = None,
    groups: str | list[str] | Mapping[str, str] | None = None,
    offset: Any = None,
    trials: Any = None,
) -> Cells:
    """Read one fate and all that may explain it; see :func:`cellfate.tl.decompose` for the arguments.

    With None for `fate` all but the fate, which is NaN: many fates are read by :mod:`cellfate.io.many`.

    Every break of the data contract is a :class:`DataError`. Doubtful input is a :class:`CellfateWarning`: cells
    without a leaf that are left out (`cf.pp.set_tree(..., missing="drop")`), shared positions, perfect separation.
    `adata` stays as it is.
    """
    check_adata(adata)
    kind = _kind(family)
    if lineage is None and spatial is None and niche is None and not groups:
        raise DataError(
            "lineage, spatial and groups are all None, and there is no niche: there is no component to partition the fate "
            "into. Give at least one."
        )
    names = adata.obs_names.to_numpy().astype(object)
    ancestry = None if lineage is None else find_ancestry(adata, lineage, lineage_kernel)
    forest, leaf, kept = None, None, np.ones(len(names), dtype=bool)
    if ancestry is not None:
        forest, leaf, kept = match(ancestry, names)
    names = names[kept]
    if fate is None:
        shared = read_trials(adata, trials, kept, "the fates")[0] if kind == "successes" else None
        response = Response(np.full(int(kept.sum()), np.nan), shared, None)
    else:
        response = read_response(adata, fate, kind=kind, trials=trials, kept=kept, layer=layer)
    if not kept.all():
        left_out = adata.obs_names[~kept]
        trees = (
            "the tree" if ancestry is None or ancestry.one_of == 1 else f"one or more of the {ancestry.one_of} trees"
        )
        warnings.warn(
            f"{len(left_out)} of {len(kept)} cells have no leaf in {trees} and are left out of the fit, as "
            f"`cf.pp.set_tree(..., missing='drop')` asked: {examples(left_out)}.",
            CellfateWarning,
            stacklevel=3,
        )
    specimen, specimens = _specimens(adata, library_key, kept)
    if ancestry is not None and forest is not None and leaf is not None:
        if ancestry.by_specimen:
            _check_trees_by_specimen(adata, ancestry, forest, leaf, names, specimen, specimens, library_key)
        if ancestry.clones and check_not_one_each(forest.tree[leaf], ancestry.label, kind, response):
            warn_of_two_dispersions(f"{ancestry.label} has as many levels as cells:", family)
    named = graph_of_field(adata, spatial, graph) if spatial_kernel == "graph" and spatial is not None else None
    if graph is not None and niche is None and named is not graph:
        raise DataError(
            "graph was given, but nothing goes by it. Take spatial_kernel='graph' or a niche, or leave it out."
        )
    field = None if named is None else read_graph(adata, named, library_key, "spatial_kernel 'graph'")

    def positions(key: Any) -> np.ndarray:
        return _coordinates(adata, key, names, kept, specimen, specimens, library_key)

    coordinates = None if spatial is None or field is not None else positions(spatial)
    around = None
    if niche is not None:
        near = coordinates
        if near is None and not has_graph(adata, graph, field) and _keys.SPATIAL in adata.obsm:
            near = positions(_keys.SPATIAL)
        around = read_niche(
            adata, niche, graph, field=field, coordinates=near, specimen=specimen, library_key=library_key, kept=kept
        )
    codes, levels, slopes, correlated = read_groups(adata, groups, fate, kind, response, kept)
    design, terms = _design(adata, formula, fate, response, kept)
    return Cells(
        names=names,
        response=response.y,
        response_name="" if fate is None else fate,
        design=design,
        terms=terms,
        offset=_offset(adata, offset, kind, names, kept),
        trials=response.trials,
        forest=forest,
        leaf=leaf,
        coordinates=coordinates,
        specimen=specimen,
        specimens=specimens,
        groups=codes,
        group_levels=levels,
        kept=kept,
        levels=response.levels,
        slopes=slopes,
        correlated=correlated,
        graph=field,
        niche=around,
    )


def _kind(family: str) -> str:
    """What a family's response has to be."""
    return find_family(family).kind


def _specimens(adata: AnnData, library_key: str | None, kept: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    if library_key is None:
        return np.zeros(int(kept.sum()), dtype=np.int64), ("all",)
    label = f"library_key obs[{library_key!r}]"
    values = column(adata, library_key, "library_key")[kept]
    check_present(values, label, "Every cell belongs to a specimen: fill it in, or leave those cells out.")
    return factorize(values, label)


def _check_trees_by_specimen(
    adata: AnnData,
    ancestry: Ancestry,
    forest: Forest,
    leaf: np.ndarray,
    names: np.ndarray,
    specimen: np.ndarray,
    specimens: tuple[str, ...],
    library_key: str | None,
) -> None:
    keys = tuple(dict.fromkeys(ancestry.forest.tree_names))
    if library_key is not None:
        in_tree = ~among(names, ancestry.missing)  # an isolated cell has a tree of its own
        check_specimens(
            forest, leaf[in_tree], names[in_tree], specimen[in_tree], specimens, keys=keys, library_key=library_key
        )
        return
    for name, values in adata.obs.items():
        if (
            len(keys) > 1
            and not pd.api.types.is_float_dtype(values.dtype)
            and set(keys) == set(values.astype(str).unique())
        ):
            warnings.warn(
                f"The trees come by specimen and obs[{name!r}] holds the same {len(keys)} names, but library_key was "
                f"not given: all cells share one field. Give library_key={name!r}; if these are clones of one tissue, "
                "give their trees as a list.",
                CellfateWarning,
                stacklevel=4,
            )
            return


def _coordinates(
    adata: AnnData,
    spatial: Any,
    names: np.ndarray,
    kept: np.ndarray,
    specimen: np.ndarray,
    specimens: tuple[str, ...],
    library_key: str | None,
) -> np.ndarray:
    if isinstance(spatial, str):
        if spatial not in adata.obsm:
            raise DataError(
                f"spatial: there are no coordinates obsm[{spatial!r}]; {instead(spatial, adata.obsm)}. "
                f"Put them there, such as `adata.obsm[{spatial!r}] = adata.obs[['x', 'y']].to_numpy()`, or take "
                "spatial=None to leave neighborhood out."
            )
        label, value = f"coordinates obsm[{spatial!r}]", adata.obsm[spatial]
    else:
        label, value = "coordinates", per_cell(adata, spatial, "coordinates")
    if hasattr(value, "toarray"):
        value = value.toarray()
    shape = np.shape(value)
    if len(shape) != 2 or shape[1] not in (2, 3):
        found = f"{shape[1]}-D" if len(shape) == 2 else "1-D" if len(shape) == 1 else "no coordinates"
        raise DataError(
            f"{label} are {found} (shape {shape}), wanted (n, 2) or (n, 3). Give the two or three columns that are "
            "positions in the tissue."
        )
    xyz = numbers(value, label, "Give numbers.")[kept]
    check_finite(xyz, names, label, "Leave those cells out, or find their positions.")
    _check_apart(xyz, names, specimen, specimens, label, library_key)
    return xyz


def _check_apart(
    xyz: np.ndarray,
    names: np.ndarray,
    specimen: np.ndarray,
    specimens: tuple[str, ...],
    label: str,
    library_key: str | None,
) -> None:
    """Cells are at different points, in every specimen."""
    size = np.bincount(specimen, minlength=len(specimens))
    first = np.unique(specimen, return_index=True)[1]
    elsewhere = np.bincount(specimen, weights=(xyz != xyz[first][specimen]).any(axis=1), minlength=len(specimens))
    if len(specimens) > 1 and size.max() == 1:
        raise DataError(
            f"library_key obs[{library_key!r}] has as many specimens as cells ({len(names)}): nobody has a neighbor. "
            "Name the column of sections or embryos, or take spatial=None."
        )
    flat = np.flatnonzero((elsewhere == 0) & (size > 1))
    if flat.size:
        where = (
            f"all {len(names)} cells"
            if len(specimens) == 1
            else f"all cells in {flat.size} of {len(specimens)} specimens of obs[{library_key!r}], "
            f"{examples(specimens[i] for i in flat)},"
        )
        point = ", ".join(f"{value:g}" for value in xyz[first[flat[0]]])
        raise DataError(
            f"{label} have {where} at one point, ({point}). Positions that were not measured are not positions: "
            "leave those cells out or take spatial=None."
        )
    shared = pd.DataFrame(np.column_stack([specimen, xyz])).duplicated(keep=False).to_numpy()
    if shared.any():
        warnings.warn(
            f"{label}: {int(shared.sum())} of {len(names)} cells share their position with another cell: "
            f"{examples(names[shared])}. They get the same neighborhood effect; check the segmentation if this is "
            "not meant.",
            CellfateWarning,
            stacklevel=5,
        )


def _design(
    adata: AnnData, formula: str, fate: str | None, response: Response, kept: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    obs = adata.obs[kept]
    design, terms = design_matrix(formula, obs)
    if fate in columns_of(formula):
        raise DataError(f"formula {formula!r} has the fate {fate!r} among its own covariates. Leave it out.")
    y, trials = response.y, response.trials
    binary = response.levels is not None and len(response.levels) == 2
    if fate is None or not (binary or trials is not None):
        return design, terms
    zero, one = y < (1 if trials is None else trials), y > 0
    found = separating(formula, obs, design, terms, zero=zero, one=one)
    if found:
        warnings.warn(
            f"fate {fate!r} is separated perfectly by {len(found)} columns of the design: {examples(found)}. "
            "The maximum-likelihood estimate of their coefficients is infinite; the prior on the fixed effects keeps "
            "the fit finite, and decides how large they come out.",
            CellfateWarning,
            stacklevel=4,
        )
    return design, terms


def _offset(adata: AnnData, offset: Any, kind: str, names: np.ndarray, kept: np.ndarray) -> np.ndarray:
    if offset is None:
        return np.zeros(int(kept.sum()))
    if isinstance(offset, str):
        label, value = f"offset obs[{offset!r}]", column(adata, offset, "offset")
    else:
        label, value = "offset", per_cell(adata, offset, "offset")
    values = numbers(value, label, "An offset is a number on the link scale, such as a log size factor.")
    if values.ndim != 1:
        raise DataError(f"{label} has shape {values.shape}. Give one number per cell.")
    values = values[kept]
    check_finite(
        values,
        names,
        label,
        "An offset is known for every cell (a log size factor of an empty cell is not): leave those cells out.",
    )
    if kind == "count":
        check_log_offset(values, label)
    return values
