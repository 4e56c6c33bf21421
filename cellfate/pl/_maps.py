"""One panel of a map: cells in their places, axis names, a scale bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate.pl import _style

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable

CMAP = "RdBu_r"
LONGEST_TITLE = 18
COVER = 0.3  # of the panel, by markers
FOOT = {2: 0.34, 3: 0.2}  # inches below the last row, by number of dimensions: axis names and scale bar


@dataclass(frozen=True)
class Panel:
    """One component in one specimen."""

    component: str
    specimen: str
    xyz: np.ndarray  # (cells, 2 | 3)
    value: np.ndarray  # (cells,), NaN where left out of the fit

    @property
    def title(self) -> str:
        """Component and specimen; in two lines where side by side they would run into the next panel."""
        name = ": ".join(filter(None, [self.component, self.specimen]))
        return name if len(name) <= LONGEST_TITLE else name.replace(": ", "\n", 1)

    @property
    def center(self) -> np.ndarray:
        return (self.xyz.min(0) + self.xyz.max(0)) / 2


def marker_size(area: float, n: int) -> float:
    """Area of a marker in square points, for `n` cells on `area` square inches."""
    return float(np.clip(COVER * area * 72**2 / n, 1.5, 16))


def fill(half: np.ndarray, inches: np.ndarray, size: float) -> np.ndarray:
    """Half the span of a flat panel of so many inches, that keeps markers of `size` whole and lengths true."""
    radius = (np.sqrt(size) / 2 + 0.5) / 72
    per_inch = (2 * half / np.maximum(inches - 2 * radius, 0.1)).max()
    return per_inch * inches / 2


def perspective(half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower left and upper right corner of a box as it is seen, in parts of its (square) axes."""
    from matplotlib.figure import Figure
    from mpl_toolkits.mplot3d import Axes3D, proj3d  # type: ignore[import-untyped]

    figure = Figure(figsize=(1, 1))
    ax: Any = Axes3D(figure)
    figure.add_axes(ax)
    ax.set_position((0, 0, 1, 1))
    _frame(ax, np.zeros(3), half)
    corners = np.array(list(product(*zip(-half, half, strict=True)))).T  # (3, 8)
    x, y, _ = proj3d.proj_transform(*corners, ax.get_proj())
    seen = (ax.transData + ax.transAxes.inverted()).transform(np.column_stack([x, y]))
    return seen.min(0), seen.max(0)


def _frame(ax: Any, center: np.ndarray, half: np.ndarray) -> None:
    names = "xyz"[: len(half)]
    for name, c, h in zip(names, center, half, strict=False):  # a third coordinate of a flat panel is depth
        getattr(ax, f"set_{name}lim")(c - h, c + h)
        getattr(ax, f"set_{name}ticks")([])
    if len(half) == 2:
        ax.set_aspect("equal")
        ax.spines[:].set_visible(False)
        return
    ax.set_box_aspect(half.copy(), zoom=1)  # matplotlib scales what it is given in place
    ax.margins(0)
    ax.patch.set_visible(False)  # it would cover the labels of the panel before


def draw(ax: Any, panel: Panel, half: np.ndarray, *, vmax: float, size: float) -> ScalarMappable:
    """Draw the cells of a panel, which shows `half` of a span to each side of their center."""
    flat = len(half) == 2
    xyz, value = panel.xyz, panel.value
    if flat and xyz.shape[1] == 3:
        order = np.argsort(xyz[:, 2], kind="stable")
        xyz, value = xyz[order], value[order]
    xyz = xyz[:, : len(half)]
    absent = np.isnan(value)
    edges: dict[str, Any] = {"linewidths": 0.25 if size > 3 else 0.0, "edgecolors": "#808080"}
    more = {} if flat else {"depthshade": False}  # shading would change the colors, which are the data
    if absent.any():
        ax.scatter(*xyz[absent].T, s=size, c=_style.ABSENT, linewidths=0, **more)
    drawn = ax.scatter(*xyz[~absent].T, s=size, c=value[~absent], cmap=CMAP, vmin=-vmax, vmax=vmax, **edges, **more)
    _frame(ax, panel.center, half)
    return drawn


def bar_length(span: float) -> float:
    """Round length of a scale bar: at most a quarter of the span."""
    step = 10.0 ** np.floor(np.log10(span / 4))
    return step * max(k for k in (1, 2, 5) if k * step <= span / 4)


def name_flat(ax: Any, names: Sequence[str], *, below: bool) -> None:
    """Name both axes at their common corner, `below` the scale bar where it is in the same panel."""
    ax.set_xlabel(names[0], fontsize=7, labelpad=15 if below else 3, loc="left")
    ax.set_ylabel(names[1], fontsize=7, labelpad=2, loc="bottom")


def bar_flat(ax: Any, length: float, units: str) -> None:
    """Draw a scale bar below the right end of a panel, its length under it."""
    from matplotlib.transforms import ScaledTranslation

    right = ax.get_xlim()[1]
    place = ax.get_xaxis_transform() + ScaledTranslation(0, -4 / 72, ax.figure.dpi_scale_trans)
    ax.plot([right - length, right], [0, 0], transform=place, color=_style.INK, linewidth=1.5, clip_on=False)
    ax.annotate(
        f"{length:g} {units}".strip(),
        (right, 0),
        xycoords=ax.get_xaxis_transform(),
        xytext=(0, -7),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=7,
        annotation_clip=False,
    )


def mark_3d(ax: Any, center: np.ndarray, half: np.ndarray, names: Sequence[str], length: float, units: str) -> str:
    """Number the axes at the middle of their edges, draw the scale bar, and return what explains both."""
    low, high = center - half, center + half
    ax.plot([low[0], low[0] + length], [low[1]] * 2, [low[2]] * 2, color=_style.INK, linewidth=2, clip_on=False)
    first, second, third = (name.rsplit(" ", 1)[1] for name in names)
    ax.text(center[0], low[1], low[2], f"{first} ", ha="right", va="top", fontsize=7)
    ax.text(high[0], center[1], low[2], f" {second}", ha="left", va="top", fontsize=7)
    ax.text(high[0], high[1], center[2], f" {third}", ha="left", va="center", fontsize=7)
    return f"axes: {names[0]}, {second}, {third}; bar: {length:g} {units}".strip()
