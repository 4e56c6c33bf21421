"""Where each component pushes fate up and where down, over the tissue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate import _keys, get
from cellfate._runtime import logger
from cellfate.pl import _maps, _style
from cellfate.pl._maps import Panel
from cellfate.pl._sheet import Box, Sheet, arrange, color_bars

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

MOST = 12  # specimens drawn unasked,
LONGEST_LEVEL, LONGEST_LABEL = 16, 54  # letters of a level, and of all a label, in a column
PANELS = 36  # and fewer where with all components that would be more panels


def effects(
    adata: AnnData,
    key: str = _keys.KEY,
    *,
    components: str | Sequence[str] | None = None,
    basis: str = _keys.SPATIAL,
    dims: Sequence[int] | None = None,
    library_key: str | None = None,
    specimen: str | Sequence[str] | None = None,
    size: float | None = None,
    vmax: float | None = None,
    common_scale: bool = True,
    ncols: int | None = None,
    units: str = "",
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw the posterior mean of each component over the tissue.

    Needs :func:`cellfate.tl.decompose`. Red pushes the linear predictor up, blue down; cells that were left out of the
    fit are grey. All panels have one map scale and, by default, one color scale: a pale component is a small one.
    Specimens are small multiples, one block of panels per component. Of categorical fates there is a column of panels for each fate, and
    a row for each component and specimen.

    Parameters
    ----------
    key
        The `key_added` of the fit.
    components
        Which components, of categorical fates `lineage` for all of `lineage[<fate>]`; by default lineage, spatial and groups, as far as the fit has them and they vary within
        specimens. What is constant in each specimen, such as its own intercept, says nothing as a map.
    basis
        Key of `adata.obsm` with the coordinates.
    dims
        Columns of the coordinates to use: two give a flat picture, drawn from back to front where there is a third;
        by default all, up to three.
    library_key
        Column of `adata.obs` that tells specimens apart; by default that of the fit.
    specimen
        One or several specimens; by default all, or the twelve with most cells, and fewer where there are many components, such as those
        of several fates.
    size
        Area of a cell's marker, in square points.
    vmax
        End of the color scale; by default the 99th percentile of the absolute effects.
    common_scale
        One color scale for all components; else each component has its own (for all fates), to show the pattern of a small one.
    ncols
        Most panels in a row, by default four, or as many as there are fates; fewer where long names need the room.
    units
        What one unit of the coordinates is, for the scale bar: ``"µm"``. By default it is a bare number.
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
    library_key = library_key or params.get("library_key") or None
    xyz = _coordinates(adata, basis, dims)
    components = _components(table, components, adata.obs.get(library_key) if library_key else None)
    specimens = _specimens(adata, library_key, specimen, min(MOST, max(1, PANELS // len(components))))
    fates = _fates(components)
    bases = list(dict.fromkeys(_base(c) for c in components)) if fates else components
    blocks = [[f"{base}[{fate}]" for fate in fates] for base in bases] if fates else [[c] for c in components]
    panels = [
        Panel(c, name, xyz[rows], table[f"{c}_mean"].to_numpy(dtype=float)[rows])
        for block in blocks
        for name, rows in specimens
        for c in block
    ]
    of = {c: k for k, block in enumerate(blocks) for c in block}
    groups = [0 if common_scale else of[p.component] for p in panels]  # panels of one color scale
    pooled = [
        np.concatenate([p.value for p, g in zip(panels, groups, strict=True) if g == h]) for h in dict.fromkeys(groups)
    ]
    limits = [_limit(values) if vmax is None else vmax for values in pooled]
    flat = len(dims or range(xyz.shape[1])) == 2
    names = [f"{basis} {d + 1}" for d in dims or range(2 if flat else 3)]
    with matplotlib.rc_context(_style.STYLE):
        sheet = None
        half = _half(panels, flat)
        if ax is None:
            per_block = len(fates) or (len(specimens) if len(specimens) > 1 else len(panels))
            sheet = _sheet(panels, groups, half, per_block, ncols or max(4, len(fates)))
        axes = _given(ax, panels, flat) if sheet is None else _place(sheet, half)
        drawn = _draw(axes, sheet, panels, half, limits=[limits[g] for g in groups], size=size)
        _mark(axes, sheet, panels, half, names, units)
        if sheet is not None:
            response = str(get.components(adata, key)["response"].iloc[0])
            label = f"posterior mean effect ({_style.link_units(params, response)}{_towards(params)})"
            label = label if len(label) <= LONGEST_LABEL else label.removeprefix("posterior ")
            beyond = [np.nanmax(np.abs(v), initial=0.0) > limit for v, limit in zip(pooled, limits, strict=True)]
            firsts = [drawn[groups.index(g)] for g in dict.fromkeys(groups)]
            color_bars(_style.figure_of(axes[0]), sheet, firsts, beyond, label)
    _style.finish(_style.figure_of(axes[0]), given_ax=sheet is None, show=show, save=save)
    return axes[0] if len(axes) == 1 else axes


def _components(table: pd.DataFrame, wanted: Sequence[str] | None, library: pd.Series | None) -> list[str]:
    found = [c.removesuffix("_mean") for c in table.columns if c.endswith("_mean")]
    if wanted is None:
        moving = {_base(c) for c in found if _varies(table[f"{c}_mean"], library)}  # if of one fate, of all
        vary = [c for c in found if _base(c) in moving] or found
        if constant := [c for c in found if c not in vary]:
            logger.info("%s: the same in all cells of a specimen, not drawn unless asked for", ", ".join(constant))
        return vary
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    wanted = [c for one in wanted for c in ([one] if one in found else _of_fates(found, one) or [one])]
    if unknown := [c for c in wanted if c not in found]:
        raise ValueError(f"The fit has no effects of {unknown}: use some of {found}.")
    return wanted


def _base(component: str) -> str:
    return component.split("[")[0] if component.endswith("]") else component


def _of_fates(found: list[str], base: str) -> list[str]:
    """The components of single fates that make up one, `lineage[<fate>]`."""
    return [c for c in found if c != base and _base(c) == base]


def _fates(components: list[str]) -> list[str]:
    """The fates that every component has an effect on each of, in their order; empty where there are none."""
    each: dict[str, list[str]] = {}
    for c in components:
        each.setdefault(_base(c), []).append(c[len(_base(c)) + 1 : -1])
    first = next(iter(each.values()))
    return first if len(first) > 1 and all(own == first and all(own) for own in each.values()) else []


def _towards(params: dict[str, Any]) -> str:
    """Which fate is up: of two levels that were text the second, of several the one of the panel."""
    if params.get("family") == "categorical":
        return "; red: towards that fate"
    levels = [str(level) for level in params.get("levels", [])]
    if len(levels) != 2 or params.get("family") not in ("bernoulli", "binomial"):
        return ""
    up = levels[1] if len(levels[1]) <= LONGEST_LEVEL else f"{levels[1][: LONGEST_LEVEL - 1]}…"
    return f"; red: towards {up}"


def _varies(effect: pd.Series, library: pd.Series | None) -> bool:
    """Whether an effect differs between cells of the same specimen, by more than rounding."""
    if library is None:
        return True
    within = effect.groupby(library.astype(str).to_numpy())
    return bool((within.max() - within.min()).max() > 1e-6 * effect.abs().max())


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts embryo 2 before embryo 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


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
    adata: AnnData, library_key: str | None, wanted: str | Sequence[str] | None, most: int
) -> list[tuple[str, np.ndarray]]:
    """Name and rows of each specimen to draw, of the largest `most` unless they are asked for."""
    if library_key is None:
        if wanted is not None:
            raise ValueError(f"specimen is {wanted!r}, but `library_key`, which tells specimens apart, is not given.")
        return [("", np.arange(adata.n_obs))]
    if library_key not in adata.obs:
        raise ValueError(f"adata.obs has no column {library_key!r} (library_key), found {list(adata.obs.columns)}.")
    labels = adata.obs[library_key].astype(str).to_numpy()
    names, counts = np.unique(labels, return_counts=True)
    if wanted is None:
        shown = sorted(names[np.argsort(-counts, kind="stable")[:most]], key=_natural)
        if len(shown) < len(names):
            logger.info("drawing the %d largest of %d specimens: choose others with `specimen`", most, len(names))
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


def _half(panels: list[Panel], flat: bool) -> np.ndarray:
    """Half the extent of the widest panel: all are drawn that wide, so that sizes compare under one scale bar."""
    half = np.max([np.ptp(p.xyz[:, : 2 if flat else 3], axis=0) for p in panels], axis=0) / 2
    return np.where(half > 0, half, half.max() / 10 or 1.0)  # cells in one line, or all in one place


def _sheet(panels: list[Panel], groups: list[int], half: np.ndarray, per_block: int, ncols: int) -> Sheet:
    seen = half if len(half) == 2 else np.subtract(*_maps.perspective(half)[::-1])
    titles = [p.title for p in panels]
    aspect, foot = float(seen[1] / seen[0]), _maps.FOOT[len(half)]
    return arrange(titles, groups, per_block=per_block, ncols=ncols, aspect=aspect, foot=foot)


def _place(sheet: Sheet, half: np.ndarray) -> list[Axes]:
    """Put axes where the sheet has its boxes; in three dimensions, so that the box as it is seen fills them."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(sheet.width, sheet.height))
    if len(half) == 2:
        return [figure.add_axes(sheet.fraction(box)) for box in sheet.panels]
    low, high = _maps.perspective(half)
    axes = []
    for left, bottom, width, height in sheet.panels:
        side = min(width / (high[0] - low[0]), height / (high[1] - low[1]))  # the axes are square, more or less empty
        x, y = np.array([left + width / 2, bottom + height / 2]) - side * (low + high) / 2
        axes.append(figure.add_axes(sheet.fraction((x, y, side, side)), projection="3d"))
    return axes


def _draw(
    axes: list[Axes],
    sheet: Sheet | None,
    panels: list[Panel],
    half: np.ndarray,
    *,
    limits: list[float],
    size: float | None,
) -> list[ScalarMappable]:
    inches = np.array(sheet.panels[0][2:]) if sheet else np.min([_inches(axis) for axis in axes], axis=0)
    if size is None:
        size = _maps.marker_size(float(inches.prod()), max(len(p.value) for p in panels))
    flat = len(half) == 2
    title = 1.0 if flat or sheet is None else float(_maps.perspective(half)[1][1])  # above what is seen
    span = _maps.fill(half, inches, size) if flat else half * 1.03
    drawn = []
    for axis, panel, vmax in zip(axes, panels, limits, strict=True):
        drawn.append(_maps.draw(axis, panel, span, vmax=vmax, size=size))
        axis.set_title(panel.title, pad=3, y=title).set_y(title)  # three-dimensional axes change the first
    return drawn


def _mark(
    axes: list[Axes], sheet: Sheet | None, panels: list[Panel], half: np.ndarray, names: list[str], units: str
) -> None:
    """Name the axes at the panel in the lower left corner, and draw one scale bar."""
    corner = _corner(sheet.panels) if sheet else 0
    length = _maps.bar_length(2 * half[0])
    if len(half) == 2:
        _maps.bar_flat(axes[-1], length, units)
        narrow = _inches(axes[corner])[0] < 1.3
        _maps.name_flat(axes[corner], names, below=narrow and corner == len(axes) - 1)
        return
    words = _maps.mark_3d(axes[corner], panels[corner].center, half * 1.03, names, length, units)
    place, transform = (0.0, 0.0), axes[corner].transAxes
    if sheet:
        figure = _style.figure_of(axes[corner])
        place, transform = (0.1 / sheet.width, (sheet.foot - 0.04) / sheet.height), figure.transFigure
    axes[corner].annotate(words, place, xycoords=transform, fontsize=7, va="top", annotation_clip=False)


def _corner(panels: Sequence[Box]) -> int:
    """Which panel is the last one at the left edge."""
    left = min(box[0] for box in panels)
    return max(i for i, box in enumerate(panels) if box[0] < left + 0.01)


def _inches(ax: Axes) -> np.ndarray:
    return np.array(ax.get_position().size * _style.figure_of(ax).get_size_inches())
