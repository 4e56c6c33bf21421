"""Positions at which a field is asked for: as the user gives them, or a grid over the cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial import KDTree

from cellfate.cells import Cells
from cellfate.errors import DataError
from cellfate.io.columns import check_present, factorize, instead, numbers
from cellfate.model.checks import check_finite
from cellfate.trees.forest import examples

AXES = ("x", "y", "z")
SPECIMEN = "specimen"
SIZES = {2: 50, 3: 20}  # grid points along the longest side, by dimension
REACH = 3.0  # median distances of nearest neighbors to which a grid point is within reach of a cell


@dataclass(frozen=True, eq=False)
class Places:
    """Positions (k, d) and the codes (k,) of their specimens; `frame` is how they go back to the user."""

    coordinates: np.ndarray
    codes: np.ndarray
    frame: pd.DataFrame


def read_places(target: Any, library: Any, cells: Cells, library_key: str | None) -> Places:
    """New positions: an array (k, d), or a data frame with columns of coordinates and perhaps one of specimens."""
    assert cells.coordinates is not None
    d = cells.coordinates.shape[1]
    frame = target if isinstance(target, pd.DataFrame) else None
    if frame is not None:
        own = [c for c in (library_key, SPECIMEN) if c is not None and c in frame.columns]
        if own and library is None:
            library = frame[own[0]]
        target = frame[_axes(frame, own, d)]
    shape = np.shape(target)
    if len(shape) != 2 or shape[1] != d or not shape[0]:
        raise DataError(f"positions have shape {shape}, wanted (k, {d}), as the coordinates of the cells have.")
    label = "positions"
    xyz = numbers(target, label, "Give numbers.")
    rows = np.arange(len(xyz)) if frame is None else frame.index.to_numpy()
    check_finite(xyz, rows, label, "Leave those out.")
    names = list(target.columns) if frame is not None else list(AXES[:d])
    out = pd.DataFrame(xyz, columns=names, index=None if frame is None else frame.index)
    codes = _specimens(library, out.index, cells, library_key)
    if library_key is not None:
        out[SPECIMEN] = np.array(cells.specimens, dtype=object)[codes]
    return Places(xyz, codes, out)


def _axes(frame: pd.DataFrame, apart: list[str], d: int) -> list[Any]:
    if all(axis in frame.columns for axis in AXES[:d]):
        return list(AXES[:d])
    rest = [column for column in frame.columns if column not in apart]
    if len(rest) != d:
        raise DataError(
            f"positions have the columns {examples(frame.columns)}: wanted {', '.join(AXES[:d])}, or {d} columns of coordinates "
            "and at most one of specimens."
        )
    return rest


def _specimens(library: Any, index: pd.Index, cells: Cells, library_key: str | None) -> np.ndarray:
    k = len(index)
    if library_key is None:
        if library is not None:
            raise DataError(
                "library is given, but the fit had no library_key: all cells share one field. Leave it out."
            )
        return np.zeros(k, dtype=np.int64)
    if library is None:
        raise DataError(
            f"each specimen of obs[{library_key!r}] has a field of its own: say with library= to which the positions belong, "
            f"one name or (k,), such as {examples(cells.specimens[:3])}."
        )
    values = [library] * k if isinstance(library, str) or np.ndim(library) == 0 else library
    if np.shape(values) != (k,):
        raise DataError(f"library has shape {np.shape(values)} for {k} positions. Give one name, or one per position.")
    column = pd.Series(np.asarray(values), index=index) if not isinstance(values, pd.Series) else values
    check_present(column, "library", "Every position belongs to a specimen.")
    codes, levels = factorize(column, "library")
    unknown = [level for level in levels if level not in cells.specimens]
    if unknown:
        raise DataError(
            f"{len(unknown)} specimens are not in obs[{library_key!r}] of the fit: {examples(unknown)}; "
            f"{instead(unknown[0], cells.specimens)}."
        )
    return np.array([cells.specimens.index(level) for level in levels])[codes]


def grid_places(cells: Cells, size: int | None, library_key: str | None) -> Places:
    """A regular grid over the bounding box of every specimen, where cells are within reach.

    `size` points along the longest side, the same spacing along the others. Within reach is three times the median distance
    of nearest neighbors, or one spacing where that is more.
    """
    assert cells.coordinates is not None
    d = cells.coordinates.shape[1]
    size = SIZES[d] if size is None else size
    if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 2:
        raise DataError(f"size is {size!r}, wanted how many points the longest side of a grid has, 2 or more.")
    grids = [_grid(cells.coordinates[cells.specimen == code], int(size)) for code in range(cells.n_specimens)]
    xyz = np.concatenate(grids)
    codes = np.repeat(np.arange(len(grids)), [len(grid) for grid in grids])
    frame = pd.DataFrame(xyz, columns=list(AXES[:d]))
    if library_key is not None:
        frame[SPECIMEN] = np.array(cells.specimens, dtype=object)[codes]
    return Places(xyz, codes, frame)


def _grid(xyz: np.ndarray, size: int) -> np.ndarray:
    low, extent = xyz.min(0), np.ptp(xyz, axis=0)
    spacing = extent.max() / (size - 1)
    if spacing == 0:  # one cell
        return xyz[:1]
    steps = np.floor(extent / spacing + 1e-9)
    axes = [
        a + (e - s * spacing) / 2 + spacing * np.arange(int(s) + 1) for a, e, s in zip(low, extent, steps, strict=True)
    ]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    tree = KDTree(np.unique(xyz, axis=0))
    nearest = float(np.median(tree.query(tree.data, k=2)[0][:, 1]))
    return points[tree.query(points)[0] <= max(spacing, REACH * nearest)]
