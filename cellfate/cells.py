"""Cells: everything that a fit needs to know, as plain arrays. The one object that crosses from AnnData to numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_array

from cellfate.errors import DataError
from cellfate.trees.forest import Forest


@dataclass(frozen=True, eq=False, repr=False)
class Cells:
    """`n` cells: what each became, where it sits, who its ancestors were, and what else is known of it.

    Every array has one entry or row per cell that enters the fit; `kept` says which rows of the input those are. Plain
    data: it pickles, so it can be sent to a worker.
    """

    names: np.ndarray  # (n,) str as objects
    response: np.ndarray  # (n,) float64; 0/1 for bernoulli, successes for binomial; (n, K) where fates are weights
    response_name: str
    design: np.ndarray  # (n, p) float64, columns called `terms`
    terms: tuple[str, ...]
    offset: np.ndarray  # (n,) float64, link scale
    trials: np.ndarray | None  # (n,) float64, binomial only
    forest: Forest | None  # these cells are among its leaves
    leaf: np.ndarray | None  # (n,) int64, node of each cell in the forest
    coordinates: np.ndarray | None  # (n, 2 or 3) float64
    specimen: np.ndarray  # (n,) int64 codes into `specimens`, zeros where there is one
    specimens: tuple[str, ...]
    groups: dict[str, np.ndarray]  # name -> (n,) int64 codes into `group_levels[name]`
    group_levels: dict[str, tuple[str, ...]]
    kept: np.ndarray  # (n_obs,) bool, rows of the input that are here
    levels: tuple[str, ...] | None  # bernoulli, ordinal, categorical: what 0, 1, ... stand for
    slopes: dict[str, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict
    )  # name -> codes and covariate, each (n,)
    correlated: dict[str, str] = field(default_factory=dict)  # groups whose intercepts covary with these slopes
    graph: csr_array | None = None  # (n_obs, n_obs) weights between neighbors, also those that are not kept
    niche: np.ndarray | None = None  # (n, q) features averaged over the neighbors

    def __post_init__(self) -> None:
        n = self.n
        arrays = {
            "response": self.response,
            "design": self.design,
            "offset": self.offset,
            "trials": self.trials,
            "leaf": self.leaf,
            "coordinates": self.coordinates,
            "specimen": self.specimen,
            "niche": self.niche,
        }
        arrays.update({f"groups[{name!r}]": codes for name, codes in self.groups.items()})
        for name, pair in self.slopes.items():
            arrays |= {f"slopes[{name!r}]": pair[0], f"slopes[{name!r}] (covariate)": pair[1]}
        for name, slopes in self.correlated.items():
            if name not in self.groups or slopes not in self.slopes:
                raise DataError(
                    f"Cells.correlated joins {name!r} and {slopes!r}. Give intercepts and slopes of these names."
                )
        for slot, array in arrays.items():
            if array is not None and len(array) != n:
                raise DataError(f"Cells.{slot} has {len(array)} rows for {n} cells. Give one row per cell.")
        if self.design.ndim != 2 or self.design.shape[1] != len(self.terms):
            raise DataError(
                f"Cells.design has shape {self.design.shape} for {len(self.terms)} terms. Give one column per term."
            )
        if (self.forest is None) != (self.leaf is None):
            raise DataError("Cells.forest and Cells.leaf belong together. Give both or neither.")
        if int(self.kept.sum()) != n:
            raise DataError(f"Cells.kept marks {int(self.kept.sum())} rows for {n} cells. Mark one row per cell.")
        if self.graph is not None and self.graph.shape != (len(self.kept),) * 2:
            raise DataError(
                f"Cells.graph has shape {self.graph.shape} for {len(self.kept)} cells of the input. Give a row and a column of each."
            )
        if self.group_levels.keys() != self.groups.keys():
            raise DataError("Cells.groups and Cells.group_levels have different names. Give the levels of every group.")
        for slot, codes, levels in [
            ("specimen", self.specimen, self.specimens),
            *((f"groups[{name!r}]", self.groups[name], self.group_levels[name]) for name in self.groups),
        ]:
            if n and not (codes.min() >= 0 and codes.max() < len(levels)):
                raise DataError(f"Cells.{slot} has codes outside 0..{len(levels) - 1}. Give one name per code.")

    def __repr__(self) -> str:
        parts = [f"{self.n} cells", f"response {self.response_name!r}"]
        if self.forest is not None:
            parts.append(repr(self.forest))
        if self.coordinates is not None:
            parts.append(f"{self.coordinates.shape[1]}-D coordinates")
        if self.graph is not None:
            parts.append("a neighbor graph")
        if self.niche is not None:
            parts.append(f"a niche of {self.niche.shape[1]} features")
        if self.n_specimens > 1:
            parts.append(f"{self.n_specimens} specimens")
        parts += [f"{len(levels)} levels of {name!r}" for name, levels in self.group_levels.items()]
        parts += [f"slopes {name!r}" for name in self.slopes]
        return f"Cells({', '.join(parts)})"

    @property
    def n(self) -> int:
        """How many cells."""
        return len(self.names)

    @property
    def n_specimens(self) -> int:
        """How many specimens; 1 where there is no `library_key`."""
        return len(self.specimens)


@dataclass(frozen=True, eq=False)
class Coded:
    """A response of levels: `y` (n,) are their places in `levels`."""

    y: np.ndarray
    levels: tuple[str, ...]
