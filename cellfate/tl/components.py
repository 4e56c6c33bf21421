"""The components of a fit, by what the cells come with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cellfate.cells import Cells
from cellfate.errors import CellfateWarning, DataError, unknown
from cellfate.inference.fit import GLMMFit
from cellfate.kernels.base import Component
from cellfate.kernels.graph import Composition, Graph
from cellfate.kernels.groups import CorrelatedSlopes, Intercepts, Slopes
from cellfate.kernels.lineage import LINEAGE_KERNELS
from cellfate.kernels.product import Product
from cellfate.kernels.spatial import SPATIAL_KERNELS, SpatialKernel
from cellfate.trees.forest import Forest

COARSE = 0.2  # share of a field's variance that its modes may leave out without a warning
FAR = 5.0  # times the extent, or below the distance of neighbors, that a length-scale may be held at
INTERACTION = "lineage:spatial"
OLRE = "olre"  # the observation-level random effect; "observation" is the name of a scale
GRAPH = "graph"  # the spatial kernel that goes by neighbors, not by positions


def check_kernels(lineage_kernel: str, spatial_kernel: str, lengthscale: float | None) -> None:
    """Are there kernels of these names, and is the length-scale one?"""
    for argument, name, known in (
        ("lineage_kernel", lineage_kernel, LINEAGE_KERNELS),
        ("spatial_kernel", spatial_kernel, (*SPATIAL_KERNELS, GRAPH)),
    ):
        if name not in known:
            if name == "composition":
                raise DataError(
                    "spatial_kernel 'composition' is a component of its own: give niche='<key of obsm>' beside a field."
                )
            raise unknown(argument, name, known)
    if lengthscale is not None and not (
        isinstance(lengthscale, int | float | np.number) and np.isfinite(lengthscale) and lengthscale > 0
    ):
        raise DataError(
            f"lengthscale is {lengthscale!r}, wanted a positive number in the units of the coordinates, or hops."
        )


def _warn_of_lengthscale(kernel: SpatialKernel | Graph) -> None:
    """A length-scale that is held where positions cannot show it, most often for its units."""
    if kernel.lengthscale is None:
        return
    nearest, extent = kernel.bounds
    if kernel.lengthscale > FAR * extent:
        what = f"far beyond the extent of the tissue, {extent:.3g}: the field is all but constant"
    elif kernel.lengthscale < nearest / FAR:
        what = f"far below the distance of nearest neighbors, {nearest:.3g}: no cell has a neighbor"
    else:
        return
    warnings.warn(
        f"lengthscale is {kernel.lengthscale:.3g}, {what}. Check that both are in one unit, or leave it out to have it estimated.",
        CellfateWarning,
        stacklevel=4,
    )


def _warn_of_star(forest: Forest, lineage_kernel: str, tree: str) -> None:
    """All leaves hang on the root, equally far: what ancestry then explains is what every cell has for itself."""
    parent = forest.parent[forest.leaves]
    if lineage_kernel == "clone" or (parent < 0).any() or not forest.is_root[parent].all():
        return
    length = forest.branch_length[forest.leaves]
    rooted = bool(forest.branch_length[forest.is_root].any()) or lineage_kernel == "ou"
    if np.ptp(length) > 1e-9 * length.max() or (forest.n_trees > 1 and rooted):  # there, a tree is a clone
        return
    warnings.warn(
        f"{tree} is a star: its {forest.n_leaves} leaves all hang on {'the root' if forest.n_trees == 1 else 'a root'}, on "
        "branches of one length. It holds no ancestry, and what is called lineage is confounded with the residual. Take "
        "lineage=None, or a resolved tree.",
        CellfateWarning,
        stacklevel=4,
    )


def components_of(
    cells: Cells,
    lineage_kernel: str,
    spatial_kernel: str,
    lengthscale: float | None,
    rank: int | None,
    *,
    interaction: bool = False,
    olre: bool = False,
    tree: str = "the tree",
) -> list[Component]:
    """The components of a fit, by what the cells come with; `tree` is how theirs is called in a message."""
    out = []
    if cells.forest is not None and cells.leaf is not None:
        _warn_of_star(cells.forest, lineage_kernel, tree)
        out.append(Component("lineage", LINEAGE_KERNELS[lineage_kernel](cells.forest, cells.leaf)))
    field: SpatialKernel | Graph | None = None
    if cells.graph is not None:
        rows = None if cells.kept.all() else np.flatnonzero(cells.kept)
        field = Graph(cells.graph, rank=rank, lengthscale=lengthscale, cells=rows)
    elif cells.coordinates is not None:
        field = SPATIAL_KERNELS[spatial_kernel](cells.coordinates, cells.specimen, lengthscale)
    if field is not None:
        _warn_of_lengthscale(field)
        out.append(Component("spatial", field))
    if interaction:
        if len(out) < 2:
            raise DataError(
                "interaction=True needs ancestry and neighborhood, and "
                f"{'lineage' if field is not None else 'spatial'} is None. Give both, or leave it out."
            )
        out.append(Component(INTERACTION, Product(out[0].kernel, out[1].kernel)))
    if cells.niche is not None:
        out.append(Component("niche", Composition(cells.niche)))
    for name, codes in cells.groups.items():
        if name in cells.correlated:
            slopes = cells.correlated[name]
            kernel = CorrelatedSlopes(codes, cells.slopes[slopes][1], slopes.removeprefix(f"{name}:"))
            out.append(Component(name, kernel))
        else:
            out.append(Component(name, Intercepts(codes)))
    own = {name: pair for name, pair in cells.slopes.items() if name not in cells.correlated.values()}
    out += [Component(name, Slopes(codes, x)) for name, (codes, x) in own.items()]
    if olre:
        _warn_of_lambda(cells, lineage_kernel)
        out.append(Component(OLRE, Intercepts(np.arange(cells.n))))
    return out


def under_tree(components: Sequence[Component], cells: Cells, lineage_kernel: str, tree: str) -> list[Component]:
    """The same components, ancestry by the `tree` of these cells; the others are shared, with what was worked out for them."""
    assert cells.forest is not None
    assert cells.leaf is not None
    _warn_of_star(cells.forest, lineage_kernel, tree)
    ancestry = LINEAGE_KERNELS[lineage_kernel](cells.forest, cells.leaf)
    out = []
    for component in components:
        kernel = component.kernel
        if component.name == "lineage":
            kernel = ancestry
        elif isinstance(kernel, Product):
            kernel = replace(kernel, one=ancestry)
        out.append(replace(component, kernel=kernel))
    return out


def _warn_of_lambda(cells: Cells, lineage_kernel: str) -> None:
    """What Pagel's lambda takes from the tree, it gives to the cells themselves."""
    if cells.forest is not None and lineage_kernel == "pagel":
        warnings.warn(
            "lineage_kernel='pagel' with olre=True: at a lambda below 1 ancestry holds an effect of each cell alone, which is what "
            "olre is. The two cannot be told apart: take lineage_kernel='brownian', or leave olre out.",
            CellfateWarning,
            stacklevel=4,
        )


def with_truncation(fit: GLMMFit, components: Sequence[Component]) -> tuple[GLMMFit, str]:
    """The fit with a note of what the modes of a graph leave out, at the length-scale of the mode, and the doubt if it is much."""
    doubt = ""
    for name, kernel in ((c.name, c.kernel) for c in components):
        if isinstance(kernel, Graph):
            rank, share = len(kernel.modes.values), kernel.truncated(fit.mode[f"lengthscale_{name}"])
            found = fit.diagnostics | {f"rank_{name}": rank, f"truncated_share_{name}": share}
            if share > COARSE:
                doubt = (
                    f"component {name!r}: {rank} modes of the graph leave out {share:.0%} of the variance that a field of this "
                    "length-scale has among these cells, its finest detail: what is estimated is the smoother rest. Give a larger "
                    "`rank` for more."
                )
                said = [] if found["status"] == "converged" else [found["status"]]
                found["status"] = "; ".join([*said, doubt.removesuffix(".")])
            fit = replace(fit, diagnostics=found)
    return fit, doubt
