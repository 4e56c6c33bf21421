"""Many fates at once: obs columns and genes, read chunk by chunk from dense, sparse or backed matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from cellfate._runtime import logger
from cellfate.cells import Coded
from cellfate.errors import DataError
from cellfate.io.columns import instead
from cellfate.io.responses import ordered, read_response, read_trials
from cellfate.model.checks import check_finite, check_response
from cellfate.trees.forest import examples

if TYPE_CHECKING:
    from anndata import AnnData

ROWS_AT_ONCE = 2**13  # of a matrix on disk


@dataclass(frozen=True, eq=False)
class Fates:
    """Names of fates, and how to read them; cells are those that `kept` marks."""

    adata: AnnData
    names: tuple[str, ...]
    genes: np.ndarray  # (k,) column of the matrix, -1 for an obs column
    layer: str | None
    kind: str
    trials: Any
    kept: np.ndarray

    @property
    def only_genes(self) -> bool:
        return bool((self.genes >= 0).all())

    def read(self, part: slice) -> list[np.ndarray | Coded | DataError]:
        """The fates at these places as a family takes them, each (n,); in place of one that it cannot take, the reason."""
        places = range(*part.indices(len(self.names)))
        genes = [int(self.genes[i]) for i in places if self.genes[i] >= 0]
        column: dict[int, np.ndarray] = {}
        if genes:  # there may be no matrix at all
            values = columns_of_matrix(matrix_of(self.adata, self.layer), np.array(genes, dtype=np.int64), self.kept)
            column = dict(zip(genes, values.T, strict=True))
        return [self._checked(self.names[i], column.get(int(self.genes[i]))) for i in places]

    def _checked(self, name: str, values: np.ndarray | None) -> np.ndarray | Coded | DataError:
        try:
            if values is None:
                found = read_response(self.adata, name, kind=self.kind, trials=self.trials, kept=self.kept)
                return found.y if found.levels is None else Coded(found.y, found.levels)
            label, cells = f"gene {name!r}", self.adata.obs_names[self.kept].to_numpy()
            check_finite(values, cells, label, "Leave those cells out.")
            if self.kind == "binary" and not np.isin(values, (0.0, 1.0)).all():
                raise DataError(f"{label} is not 0 and 1, which family='bernoulli' wants. Use another family or layer.")
            if self.kind == "levels":
                found = ordered(pd.Series(values, index=cells), label)
                return Coded(found.y, found.levels or ())
            trials = read_trials(self.adata, self.trials, self.kept, label)[0] if self.kind == "successes" else None
            check_response(values, cells, label, kind=self.kind, trials=trials)
            return np.ascontiguousarray(values)
        except DataError as error:
            return error


def matrix_of(adata: AnnData, layer: str | None) -> Any:
    """`X` or a layer, in memory or on disk."""
    if layer is not None and layer not in adata.layers:
        raise DataError(
            f"there is no layer {layer!r}; {instead(layer, adata.layers)}. Name one, or leave it out for X."
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise DataError("fates are genes, but adata.X is empty. Put the counts into adata.X, or name a layer.")
    return matrix


def columns_of_matrix(matrix: Any, columns: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Some columns (n kept, k) of a matrix, read by rows where it is sparse by rows or on disk; only these become dense."""
    out = np.empty((int(kept.sum()), len(columns)), order="F")
    if not len(columns):
        return out
    if isinstance(matrix, np.ndarray) or (sparse.issparse(matrix) and matrix.format == "csc"):
        found = matrix[:, columns]
        out[:] = (found.toarray() if sparse.issparse(found) else found)[kept]
        return out
    rows = np.flatnonzero(kept)
    for first in range(0, matrix.shape[0], ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, matrix.shape[0])
        block = matrix[first:last]
        block = block.tocsr()[:, columns].toarray() if sparse.issparse(block) else np.asarray(block)[:, columns]
        here = slice(*np.searchsorted(rows, [first, last]))
        out[here] = block[rows[here] - first]
    return out


def find_fates(
    adata: AnnData,
    fates: Sequence[str] | None,
    *,
    layer: str | None,
    min_cells: int,
    kind: str,
    trials: Any,
    kept: np.ndarray,
) -> Fates:
    """The fates called so, each an obs column or a gene; with None all genes that are not zero in `min_cells` cells."""
    if trials is not None and kind != "successes":
        raise DataError("trials was given, but only family='binomial' has trials. Leave it out or use 'binomial'.")
    if fates is None:
        return _all_genes(adata, layer, min_cells, kind, trials, kept)
    if not isinstance(fates, list | tuple | np.ndarray | pd.Index | pd.Series):
        raise DataError(
            f"fate is of type {type(fates).__name__}, wanted the name of an obs column or of a gene, or a list."
        )
    names = [str(name) for name in fates]
    if not names or not all(isinstance(name, str) for name in fates):
        raise DataError(f"fate is {list(fates)[:5]!r}, wanted names of obs columns or genes, at least one.")
    twice = pd.Index(names)[pd.Index(names).duplicated()].unique()
    if len(twice):
        raise DataError(f"fate names {examples(twice)} more than once. Name each once.")
    places = pd.Series(np.arange(adata.n_vars), index=adata.var_names)
    in_obs, in_var = pd.Index(names).isin(adata.obs.columns), pd.Index(names).isin(adata.var_names)
    for found, what in (
        (~in_obs & ~in_var, "are neither obs columns nor genes"),
        (in_obs & in_var, "are both obs columns and genes"),
    ):
        if found.any():
            which = [name for name, bad in zip(names, found, strict=True) if bad]
            similar = instead(which[0], [*adata.obs.columns, *adata.var_names])
            raise DataError(
                f"{len(which)} of {len(names)} fates {what}: {examples(which)}. For {which[0]!r}: {similar}."
            )
    genes = [name for name, there in zip(names, in_var, strict=True) if there]
    shared = [name for name in genes if np.ndim(places[name])] if not adata.var_names.is_unique else []
    if shared:
        raise DataError(
            f"{examples(shared)} name several genes of adata.var_names. Run `adata.var_names_make_unique()`."
        )
    if genes:
        matrix_of(adata, layer)
    elif layer is not None:
        raise DataError(f"layer {layer!r} was given, but no fate is a gene. Leave it out.")
    where = np.array([int(places[name]) if there else -1 for name, there in zip(names, in_var, strict=True)])
    return Fates(adata, tuple(names), where, layer, kind, trials, kept)


def _all_genes(adata: AnnData, layer: str | None, min_cells: int, kind: str, trials: Any, kept: np.ndarray) -> Fates:
    if not adata.var_names.is_unique:
        raise DataError("adata.var_names are not unique. Run `adata.var_names_make_unique()`.")
    matrix = matrix_of(adata, layer)
    seen = np.zeros(adata.n_vars, dtype=np.int64)
    for first in range(0, adata.n_obs, ROWS_AT_ONCE):
        block = matrix[first : first + ROWS_AT_ONCE][kept[first : first + ROWS_AT_ONCE]]
        seen += (
            np.asarray((block != 0).sum(axis=0)).ravel() if sparse.issparse(block) else np.count_nonzero(block, axis=0)
        )
    where = np.flatnonzero(seen >= max(min_cells, 1))
    logger.info("%d of %d genes are not zero in at least %d cells", len(where), adata.n_vars, min_cells)
    if not len(where):
        raise DataError(
            f"no gene is other than zero in min_cells={min_cells} of {int(kept.sum())} cells; the most is {int(seen.max(initial=0))}. "
            "Lower `min_cells`, or look at the layer."
        )
    names = tuple(str(name) for name in adata.var_names[where])
    return Fates(adata, names, where, layer, kind, trials, kept)
