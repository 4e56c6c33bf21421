"""Where each component pushes fate up and where down, over the tissue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate import _keys, get
from cellfate._runtime import logger
from cellfate.pl import _style

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

MOST = 12  # specimens drawn unasked
CMAP = "RdBu_r"


@dataclass(frozen=True)
class Panel:
    """One component in one specimen."""

    component: str
    title: str
    xyz: np.ndarray  # (cells, 2 | 3)
    value: np.ndarray  # (cells,), NaN where left out of the fit


def effects(
    adata: AnnData,
    components: Sequence[str] | None = None,
    *,
    key: str = _keys.KEY,
    basis: str = _keys.SPATIAL,
    dims: Sequence[int] | None = None,
    library_key: str | None = None,
    specimen: str | Sequence[str] | None = None,
    size: float | None = None,
    vmax: float | None = None,
    ncols: int = 4,
    units: str = "units",
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw the posterior mean of each component over the tissue, all panels on one color scale and one map scale.

    Needs :func:`cellfate.tl.decompose`. Red pushes the linear predictor up, blue down; cells that were left out of the
    fit are grey. Specimens are small multiples, one block of panels per component.

    Parameters
    ----------
    components
        Which components; by default lineage, spatial and groups, as far as the fit has them.
    basis
        Key of `adata.obsm` with the coordinates.
    dims
        Columns of the coordinates to use: two give a flat picture, drawn from back to front where there is a third;
        by default all, up to three.
    library_key
        Column of `adata.obs` that tells specimens apart; by default that of the fit.
    specimen
        One or several specimens; by default all, or the twelve with most cells.
    size
        Area of a cell's marker, in square points.
    vmax
        End of the color scale; by default the 99th percentile of the absolute effects.
    ncols
        Most panels in a row.
    units
        What one unit of the coordinates is, for the scale bar: ``"µm"``.
    ax
        Axes to draw in, as many as there are panels, instead of a new figure. The color bar is then left to you
        (`fig.colorbar(ax.collections[-1])`).
    show, save
        As in :func:`cellfate.pl.variance_shares`.

    Returns
    -------
    The axes, or a list of them if there are several panels.
    """
    import matplotlib

    table, params = get.effects(adata, key), get.params(adata, key)
    components = _components(table, components)
    xyz = _coordinates(adata, basis, dims)
    specimens = _specimens(adata, library_key or params.get("library_key") or None, specimen)
    panels = [
        Panel(c, name, xyz[rows], table[f"{c}_mean"].to_numpy(dtype=float)[rows])
        for c in components
        for name, rows in specimens
    ]
    if vmax is None:
        vmax = _limit(np.concatenate([p.value for p in panels]))
    flat = len(dims) == 2 if dims is not None else xyz.shape[1] == 2
    half = np.max([np.ptp(p.xyz, axis=0) for p in panels], axis=0) / 2 * 1.06
    half = np.where(half > 0, half, 1.0)
    response = str(get.components(adata, key)["response"].iloc[0])
    label = f"posterior mean effect ({_style.link_units(params, response)})"
    with matplotlib.rc_context(_style.STYLE):
        given = ax is not None
        axes = _given(ax, panels, flat) if ax is not None else _layout(len(panels), len(specimens), ncols, half, flat)
        drawn = [
            _draw(axis, panel, flat=flat, vmax=vmax, size=size, half=half)
            for axis, panel in zip(axes, panels, strict=True)
        ]
        corner = 0 if given else _corner(axes)
        names = [f"{basis} {d + 1}" for d in dims or range(2 if flat else 3)]
        _mark(axes[corner], panels[corner], half, flat, units, names)
        if not given:
            beyond = max(np.nanmax(np.abs(p.value), initial=0.0) for p in panels) > vmax
            _colorbar(axes, drawn[0], label, flat=flat, extend="both" if beyond else "neither")
    _style.finish(_style.figure_of(axes[0]), given_ax=given, show=show, save=save)
    return axes[0] if len(axes) == 1 else axes


def _components(table: pd.DataFrame, wanted: Sequence[str] | None) -> list[str]:
    found = [c.removesuffix("_mean") for c in table.columns if c.endswith("_mean")]
    if wanted is None:
        return found
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    if unknown := [c for c in wanted if c not in found]:
        raise ValueError(f"The fit has no effects of {unknown}: use some of {found}.")
    return wanted


def _coordinates(adata: AnnData, basis: str, dims: Sequence[int] | None) -> np.ndarray:
    if basis not in adata.obsm:
        raise ValueError(f"adata.obsm has no {basis!r}, found {sorted(adata.obsm)}: name the coordinates with `basis`.")
    xyz = np.asarray(adata.obsm[basis], dtype=float)
    dims = list(range(min(3, xyz.shape[1]))) if dims is None else list(dims)
    if len(dims) not in (2, 3) or any(not 0 <= d < xyz.shape[1] for d in dims):
        raise ValueError(f"dims is {dims}: use two or three of 0 to {xyz.shape[1] - 1}, the columns of {basis!r}.")
    rest = [d for d in range(xyz.shape[1]) if d not in dims][:1] if len(dims) == 2 else []
    return xyz[:, dims + rest]  # a third column behind two asked for is depth


def _specimens(
    adata: AnnData, library_key: str | None, wanted: str | Sequence[str] | None
) -> list[tuple[str, np.ndarray]]:
    """Name and rows of each specimen to draw."""
    if library_key is None:
        if wanted is not None:
            raise ValueError(f"specimen is {wanted!r}, but `library_key`, which tells specimens apart, is not given.")
        return [("", np.arange(adata.n_obs))]
    if library_key not in adata.obs:
        raise ValueError(f"adata.obs has no column {library_key!r} (library_key), found {list(adata.obs.columns)}.")
    labels = adata.obs[library_key].astype(str).to_numpy()
    names, counts = np.unique(labels, return_counts=True)
    if wanted is None:
        shown = sorted(names[np.argsort(-counts, kind="stable")[:MOST]])
        if len(shown) < len(names):
            logger.info("drawing the %d largest of %d specimens: choose others with `specimen`", MOST, len(names))
    else:
        shown = [wanted] if isinstance(wanted, str) else [str(s) for s in wanted]
        if unknown := [s for s in shown if s not in set(names)]:
            raise ValueError(
                f"adata.obs[{library_key!r}] has no specimen {unknown}: use some of {list(names[:5])}"
                f"{' ...' if len(names) > 5 else ''}."
            )
    return [(name, np.flatnonzero(labels == name)) for name in shown]


def _limit(values: np.ndarray) -> float:
    """Where the color scale ends: a few extreme cells must not bleach the rest."""
    finite = np.abs(values[np.isfinite(values)])
    if not len(finite):
        raise ValueError("No cell that would be drawn has an effect: all were left out of the fit.")
    return float(np.quantile(finite, 0.99)) or 1.0


def _given(ax: Any, panels: list[Panel], flat: bool) -> list[Axes]:
    axes = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(axes) != len(panels):
        raise ValueError(
            f"`ax` holds {len(axes)} axes for {len(panels)} panels: give as many, or choose `components` and `specimen`."
        )
    if any((axis.name == "3d") == flat for axis in axes):
        raise ValueError("Axes and coordinates differ in dimension: use dims=(0, 1), or axes with projection='3d'.")
    return axes


def _layout(n_panels: int, n_specimens: int, ncols: int, half: np.ndarray, flat: bool) -> list[Axes]:
    """One component per block of rows; with one specimen, components side by side."""
    import matplotlib.pyplot as plt

    per_block = n_specimens if n_specimens > 1 else n_panels
    blocks = n_panels // per_block
    nrows = -(-per_block // ncols)  # of each block
    ncols = -(-per_block // nrows)  # rows of even length
    rows = blocks * nrows
    width = max(_style.WIDTH, 1.3 * ncols)
    cells = [(block * nrows + i // ncols) * ncols + i % ncols + 1 for block in range(blocks) for i in range(per_block)]
    if flat:
        height = rows * (width / ncols * float(np.clip(half[1] / half[0], 0.3, 1.6)) + 0.2) + 0.6
        figure = plt.figure(figsize=(width, height), layout="constrained")
        return [figure.add_subplot(rows, ncols, cell) for cell in cells]
    # A box in perspective has margins of its own, which an automatic layout would take for contents.
    height = rows * (0.75 * width / ncols + 0.2) + 0.65
    figure = plt.figure(figsize=(width, height))
    figure.subplots_adjust(0.01, 0.65 / height, 0.99, 1 - 0.2 / height, wspace=0.02, hspace=0.2)
    return [figure.add_subplot(rows, ncols, cell, projection="3d") for cell in cells]


def _corner(axes: list[Axes]) -> int:
    """Which panel is the last one at the left edge."""
    specs = [axis.get_subplotspec() for axis in axes]
    return max(i for i, spec in enumerate(specs) if spec is not None and spec.colspan.start == 0)


LONGEST_TITLE = 18


def _draw(ax: Any, panel: Panel, *, flat: bool, vmax: float, size: float | None, half: np.ndarray) -> ScalarMappable:
    xyz, value = panel.xyz, panel.value
    if flat and xyz.shape[1] == 3:
        order = np.argsort(xyz[:, 2], kind="stable")
        xyz, value = xyz[order], value[order]
    if flat:
        xyz = xyz[:, :2]
    if size is None:
        size = float(np.clip(2200 / len(xyz), 1.5, 22))
    absent = np.isnan(value)
    edges: dict[str, Any] = {"linewidths": 0.25 if size > 3 else 0.0, "edgecolors": "#808080"}
    more = {} if flat else {"depthshade": False}  # shading would change the colors, which are the data
    if absent.any():
        ax.scatter(*xyz[absent].T, s=size, c=_style.ABSENT, linewidths=0, **more)
    drawn = ax.scatter(*xyz[~absent].T, s=size, c=value[~absent], cmap=CMAP, vmin=-vmax, vmax=vmax, **edges, **more)
    title = ": ".join(filter(None, [panel.component, panel.title]))
    # beside each other, long names would run into one line
    ax.set_title(title if len(title) <= LONGEST_TITLE else title.replace(": ", "\n"), pad=2)
    names = "xy" if flat else "xyz"
    for name, low, high in zip(names, *_box(panel, half), strict=False):
        getattr(ax, f"set_{name}lim")(low, high)
        getattr(ax, f"set_{name}ticks")([])
    if flat:
        ax.set_aspect("equal")
        ax.spines[:].set_visible(False)
    else:
        ax.set_box_aspect(half.copy(), zoom=1.15)  # matplotlib scales what it is given in place
        ax.patch.set_visible(False)  # it would cover the labels of the panel before
    return drawn


def _box(panel: Panel, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a panel begins and ends: as wide as the widest, so that sizes compare and one scale bar serves all."""
    center = (panel.xyz.min(0) + panel.xyz.max(0)) / 2
    return center - half, center + half


def _mark(ax: Any, panel: Panel, half: np.ndarray, flat: bool, units: str, names: list[str]) -> None:
    """Name the axes and draw the scale bar, once."""
    length = 2 * half[0] / 4
    step = 10.0 ** np.floor(np.log10(length))
    length = step * max(k for k in (1, 2, 5) if k * step <= length)
    low, _ = _box(panel, half)
    if flat:
        ax.plot([low[0], low[0] + length], [low[1], low[1]], color=_style.INK, linewidth=1.5, clip_on=False)
        ax.set_xlabel(f"{names[0]}  (bar: {length:g} {units})", fontsize=7, labelpad=3, loc="left")
        ax.set_ylabel(names[1], fontsize=7, labelpad=2)
    else:
        ax.plot([low[0], low[0] + length], [low[1]] * 2, [low[2]] * 2, color=_style.INK, linewidth=2, clip_on=False)
        for name, label in zip("xyz", names, strict=True):
            getattr(ax, f"set_{name}label")(label.rsplit(" ", 1)[1], fontsize=7, labelpad=-14)
        basis = names[0].rsplit(" ", 1)[0]
        ax.text2D(0.0, -0.03, f"{basis}  (bar: {length:g} {units})", transform=ax.transAxes, fontsize=7, va="top")


def _colorbar(axes: list[Axes], drawn: ScalarMappable, label: str, *, flat: bool, extend: str) -> None:
    figure = _style.figure_of(axes[0])
    width, height = figure.get_size_inches()
    length = min(0.8 * width, 2.6)  # inches, as is the thickness of 0.08
    if flat:
        place: dict[str, Any] = {"ax": axes, "location": "bottom", "shrink": length / width, "aspect": length / 0.08}
    else:
        box = ((1 - length / width) / 2, 0.42 / height, length / width, 0.08 / height)
        place = {"cax": figure.add_axes(box), "orientation": "horizontal"}
    bar = figure.colorbar(drawn, label=label, extend=extend, **place)
    bar.outline.set_linewidth(0.5)
    bar.ax.tick_params(labelsize=7)
