"""How every figure looks and leaves the house: one palette, one set of sizes, one way to show and save."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 3.5  # inches, one column of a journal
DPI = 300
INK = "#333333"
ABSENT = "#D9D9D9"  # cells without a value
LINE, EDGE = 0.118, 0.09  # inches: a line of 7 points, and what is left free around text

# Okabe & Ito: told apart with every common color vision deficiency. What is noise is grey, what is shared is between.
COLORS = {
    "lineage": "#D55E00",
    "spatial": "#0072B2",
    "shared": "#CC79A7",
    "interaction": "#CC79A7",
    "nonlinear": "#CC79A7",
    "fixed": "#E69F00",
    "residual": "#8C8C8C",
    "distribution": "#BDBDBD",
}
FATE_COLORS = ["#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#000000", "#F0E442"]
PALEST = 0.7  # of the way to white
GROUP_COLORS = ["#009E73", "#56B4E9", "#000000", "#F0E442"]  # yellow last, it is faint in print

STYLE: Any = {  # matplotlib types every key of its rc parameters; not so here
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 8,
    "legend.fontsize": 7,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "text.color": INK,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,  # text stays text in a vector editor
    "svg.fonttype": "none",
}

# What one unit of an effect is, by link.
LINK_UNITS = {
    "identity": "units of {response}",
    "log": "log units",
    "logit": "log-odds",
    "probit": "probit units",
    "cloglog": "cloglog units",
}


def colors(components: Sequence[str]) -> dict[str, str]:
    """Return the color of each component: the same one in every figure, grouping factors in order of appearance.

    Those of single fates, `lineage[A]`, are tints of the component's.
    """
    from matplotlib.colors import to_hex, to_rgb

    members: dict[str, list[str]] = {}
    for c in dict.fromkeys(components):
        members.setdefault(c.split("[")[0] if c.endswith("]") else c, []).append(c)
    groups = [base for base in members if base not in COLORS]
    cycle = {base: GROUP_COLORS[i % len(GROUP_COLORS)] for i, base in enumerate(groups)}
    out = {}
    for base, own in members.items():
        color = COLORS.get(base) or cycle[base]
        for k, c in enumerate(own):
            r, g, b = (x + PALEST * k / len(own) * (1 - x) for x in to_rgb(color))
            out[c] = to_hex((r, g, b)) if k else color
    return out


def fate_colors(fates: Sequence[str], *, ordered: bool = False) -> dict[str, str]:
    """Return the color of each fate: levels in an order go from light to dark, and so do all where they are too many to be told apart."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if not ordered and len(fates) <= len(FATE_COLORS):
        return dict(zip(fates, FATE_COLORS, strict=False))
    scale = colormaps["viridis_r" if ordered else "turbo"]
    return {fate: to_hex(scale(x)) for fate, x in zip(fates, np.linspace(0.12, 0.95, len(fates)), strict=True)}


def share_label(components: Iterable[str], scale: str = "latent") -> str:
    """Return what shares are shares of, for a label. With a residual, it is more than the linear predictor."""
    whole = "total variance" if "residual" in set(components) else "variance of the linear predictor"
    return {
        "latent": f"share of the {whole}",
        "link": "share of the variance on link scale",
        "realized": "share of the realized variance in these cells",
        "observation": "share of the variance of the fate itself",
        "additive": "additive share of the variance of the fate itself",
    }.get(scale, f"share of variance ({scale})")


def percent(share: float) -> str:
    """Write a share in percent, with a true minus sign."""
    return f"{round(100 * share):d}%".replace("-", "\N{MINUS SIGN}")


def percents(middle: float, lower: float, upper: float) -> str:
    """Write a share with its bounds."""
    return f"{percent(middle)} [{percent(lower)}, {percent(upper)}]"


def percent_axis(axis: Axis, low: float, high: float) -> None:
    """Put ticks of an axis of shares in percent, at the same steps in every figure."""
    step = 0.25 if high - low <= 1.8 else 0.5
    axis.set_ticks(step * np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1))
    axis.set_major_formatter(lambda share, _: percent(share))


def interval(middle: float, lower: float, upper: float) -> str:
    """Write an estimate with its bounds, all to the same decimals: two, fewer for large ones, more for tiny ones."""
    largest = max(abs(lower), abs(upper))
    exponent = int(np.floor(np.log10(largest))) if largest > 0 else 0
    decimals = 1 - exponent if exponent < -1 else max(0, 2 - max(exponent, 0))
    return f"{middle:.{decimals}f} [{lower:.{decimals}f}, {upper:.{decimals}f}]"


def link_units(params: dict[str, Any], response: str) -> str:
    """Return what an effect is measured in, for a label."""
    return LINK_UNITS.get(str(params.get("link")), "link scale").format(response=response)


def one_response(of_rows: pd.Series, wanted: str | None) -> str:
    """The response to draw."""
    found = [str(name) for name in dict.fromkeys(of_rows)]
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted not in found:
        raise ValueError(
            f"response is {wanted!r}: name one of the {len(found)} responses of the fit, such as {found[:3]}."
        )
    return str(wanted)


def finish(figure: Figure, *, given_ax: bool, show: bool | None, save: str | Path | None) -> None:
    """Save and show as asked; without being asked, show only where there is a screen and the figure is ours."""
    if save is not None:
        path = Path(save)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, bbox_inches="tight" if given_ax else None)  # ours are laid out to their size
    if show is None:
        # scanpy's switch counts if scanpy is in use; importing it for the question would cost seconds.
        scanpy = sys.modules.get("scanpy")
        show = not given_ax and save is None and _has_screen() and (scanpy is None or scanpy.settings.autoshow)
    if show:
        import matplotlib.pyplot as plt

        plt.show()


def _has_screen() -> bool:
    import matplotlib
    from matplotlib.backends import BackendFilter, backend_registry

    return matplotlib.get_backend().lower() not in backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE)


def figure_of(ax: Axes) -> Figure:
    """Return the top figure that an axes lies in."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("`ax` belongs to no figure any more.")
    return figure


def note(ax: Axes, y: float, text: str) -> None:
    """Write a number in the right margin, level with its row."""
    ax.annotate(text, (1.02, y), xycoords=("axes fraction", "data"), va="center_baseline", fontsize=7)


def foot(
    ax: Axes,
    explained: Sequence[tuple[str, str]],
    *,
    given_ax: bool,
    indent: float,
    fills: Mapping[str, str] | None = None,
) -> None:
    """Write below everything what each mark means, `indent` inches from it; a mark stands on its fill, where it has one.

    A figure of ours grows by that. Where the axes were given, it stands below their label and is as wide as they are.
    """
    figure = figure_of(ax)
    if explained and given_ax:
        figure.draw_without_rendering()  # how wide the axes are once their figure is laid out
    width = ax.get_window_extent().width / figure.dpi if given_ax else figure.get_figwidth() - 2 * EDGE
    blocks = [_lines(text, width - indent) for _, text in explained]
    heights = [LINE * len(lines) + EDGE for lines in blocks]
    strip = sum(heights) + EDGE
    whole = figure.get_figheight() + strip
    if explained and not given_ax:
        figure.set_figheight(whole)
        figure.set_layout_engine("constrained", rect=(0, strip / whole, 1, 1 - strip / whole))
    down = EDGE
    for (mark, _), lines, height in zip(explained, blocks, heights, strict=True):
        fill = (fills or {}).get(mark)
        box = {"facecolor": fill, "edgecolor": "none", "pad": 1.5} if fill else None
        for right, text, behind in ((0.0, mark, box), (indent, "\n".join(lines), None)):
            look: dict[str, Any] = {"fontsize": 7, "va": "top", "linespacing": 1.15, "bbox": behind}
            if given_ax:
                below = (72 * right, -72 * down)
                label = ("axes fraction", ax.xaxis.label)
                ax.annotate(text, (0, 0), below, xycoords=label, textcoords="offset points", **look)
            else:
                figure.text((EDGE + right) / figure.get_figwidth(), (strip - down) / whole, text, **look)
        down += height


def _lines(text: str, width: float) -> list[str]:
    """Break a text of 7 points where it would be wider than so many inches."""
    from matplotlib.textpath import TextPath

    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        # a screen puts letters on whole pixels, which takes a little more than their outlines
        fits = 1.03 * TextPath((0, 0), longer, size=7).get_extents().width < 72 * width
        if fits or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
