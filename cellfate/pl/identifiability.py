"""Which length-scales of neighborhood can be told from ancestry in these cells, before any fate is looked at?"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate import _keys, get
from cellfate.pl import _style

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

PAIR = {"lineage": ("o", 5.8), "spatial": ("s", 3.2)}  # markers and their size: one seen where it lies under the other
# Green can be told, grey cannot; four shades that differ in black and white too, pale enough for the words that stand on them.
VERDICTS = {"clear": "#6FC6AE", "partial": "#EAF7F3", "weak": "#D0D0D0", "confounded": "#9C9C9C"}
USUAL_POWER = 0.8  # what studies are planned for
ALONE = 1.5  # to either side of a length-scale without a neighbor
HEIGHTS = (0.22, 0.72, 0.55, 0.9, 0.9)  # inches: verdicts, shares, alignment, errors, power
NORMAL = 1.96  # standard errors to either side, for 95%


def identifiability(
    adata: AnnData,
    key: str = _keys.IDENTIFIABILITY,
    *,
    units: str = "",
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes]:
    """Draw at which length-scales ancestry and neighborhood can be told apart, and at which they cannot.

    Needs :func:`cellfate.pp.identifiability`; reads `adata.uns[key]`, a row per length-scale, as :func:`cellfate.get.identifiability`
    returns it. Five panels share an axis, the length-scale of neighborhood:

    The verdict on each length-scale and the stretch around it, in words that are explained below. What it goes by: the 95% interval that
    can be expected of the share of ancestry in what both explain, around the share that was assumed. The alignment of both kernels: at
    0 they make different cells alike, at 1 the same. The expected standard errors of both variances, in percent of the variance that was
    assumed: from 100% on (dashed) the data do not know it. The power of a test at 5% for each component given the other, and the 80%
    that studies are planned for (dashed).

    Parameters
    ----------
    key
        The `key_added` of :func:`cellfate.pp.identifiability`.
    units
        What one unit of the coordinates is: ``"µm"``.
    show, save
        As in :func:`cellfate.pl.variance_shares`.

    Returns
    -------
    The axes of the panels, from top to bottom.

    Raises
    ------
    DataError
        There is no such table under `key`.

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(100, inheritance=0.9, rng=0)
    >>> cf.pp.identifiability(adata)
    >>> cf.pl.identifiability(adata, units="µm", show=False)[-1].get_xlabel()
    'length-scale (µm)'
    """
    import matplotlib
    import matplotlib.pyplot as plt

    table = get.identifiability(adata, key).drop_duplicates("lengthscale").sort_values("lengthscale", ignore_index=True)
    with matplotlib.rc_context(_style.STYLE):
        figure, axes = plt.subplots(
            len(HEIGHTS),
            1,
            sharex=True,
            figsize=(_style.WIDTH, sum(HEIGHTS) + 1.1),
            height_ratios=HEIGHTS,
            layout="constrained",
        )
        verdicts, shares, alignment, errors, power = panels = list(axes)
        edges = stretches(table["lengthscale"].to_numpy())
        words = _verdicts(verdicts, table["verdict"], edges)
        _shares(shares, table)
        _alignment(alignment, table)
        _errors(errors, table)
        _power(power, table)
        _lengthscales(power, edges, units)
        _style.foot(verdicts, words, given_ax=False, indent=0.7, fills=VERDICTS)
        _fit_words(verdicts)
        _style.finish(figure, given_ax=False, show=show, save=save)
    return panels


def stretches(lengthscale: np.ndarray) -> np.ndarray:
    """Ends (k + 1,) of what each of k length-scales stands for: halfway to the next, in logs."""
    x = np.log(lengthscale)
    half = np.diff(x) / 2
    outer = (half[0], half[-1]) if len(half) else (np.log(ALONE),) * 2
    return np.exp(np.concatenate([[x[0] - outer[0]], x[:-1] + half, [x[-1] + outer[1]]]))


def _verdicts(ax: Axes, verdicts: pd.Series, edges: np.ndarray) -> list[tuple[str, str]]:
    """Draw one bar per run of equal verdicts; return each word with what it means, the best first."""
    split = [str(verdict).partition(": ") for verdict in verdicts]
    start = 0
    for word, run in groupby(word for word, _, _ in split):
        stop = start + len(list(run))
        left, right = edges[start], edges[stop]
        color = VERDICTS.get(word, _style.ABSENT)
        ax.barh(0, right - left, left=left, height=1, color=color, edgecolor="white", linewidth=0.8)
        ax.text(np.sqrt(left * right), 0, word, ha="center", va="center_baseline", fontsize=7)
        start = stop
    ax.set_ylim(-0.5, 0.5)
    ax.set_yticks([0], ["told apart?"])
    ax.tick_params(length=0, labelbottom=False)
    ax.spines[:].set_visible(False)
    order = [*VERDICTS]
    found = {word: meaning for word, _, meaning in split}
    return sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))


def _fit_words(ax: Axes) -> None:
    """Take words off bars that are too short for them; below, they stand on the same color."""
    figure = _style.figure_of(ax)
    figure.draw_without_rendering()
    for bar, text in zip(ax.patches, ax.texts, strict=True):
        text.set_visible(text.get_window_extent().width < bar.get_window_extent().width)


def _shares(ax: Axes, table: pd.DataFrame) -> None:
    share, reach = table["share"], NORMAL * table["error_share"]
    color = _style.COLORS["lineage"]
    low, high = (share - reach).clip(lower=0), (share + reach).clip(upper=1)
    ax.vlines(table["lengthscale"], low, high, color=color, linewidth=1.6, label="expected 95% interval")
    ax.plot(table["lengthscale"], share, **_line("o", 4.0, color) | {"linestyle": "none"})
    ax.set_ylim(-0.05, 1.05)
    ax.set_yticks([0, 0.5, 1], [_style.percent(x) for x in (0, 0.5, 1)])
    ax.set_ylabel("share of\nlineage")
    _legend(ax)


def _alignment(ax: Axes, table: pd.DataFrame) -> None:
    ax.plot(table["lengthscale"], table["alignment"], **_line("D", 4.0, _style.INK))
    ax.set_ylim(-0.05, 1.05)
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_ylabel("alignment")


def _errors(ax: Axes, table: pd.DataFrame) -> None:
    for name, marker in PAIR.items():
        relative = table[f"error_{name}"] / table[f"variance_{name}"]
        ax.plot(table["lengthscale"], relative, **_line(*marker, _style.COLORS[name]), label=name)
    ax.axhline(1, **_dashes())
    ax.set_ylim(0, max(1.1, 1.05 * ax.dataLim.y1))
    top = ax.get_ylim()[1]
    ticks = np.arange(0, top, 0.5 * max(1, np.ceil(top / 2)))  # few of them, where nothing is known
    ax.set_yticks(ticks, [_style.percent(tick) for tick in ticks])
    ax.set_ylabel("standard error\n(% of variance)")
    _legend(ax)


def _power(ax: Axes, table: pd.DataFrame) -> None:
    for name, marker in PAIR.items():
        ax.plot(table["lengthscale"], table[f"power_{name}"], **_line(*marker, _style.COLORS[name]))
    ax.axhline(USUAL_POWER, **_dashes())
    ax.set_ylim(-0.05, 1.05)
    ax.set_yticks([0, 0.5, USUAL_POWER, 1], [_style.percent(x) for x in (0, 0.5, USUAL_POWER, 1)])
    ax.set_ylabel("power of\na 5% test")


def _lengthscales(ax: Axes, edges: np.ndarray, units: str) -> None:
    from matplotlib.ticker import NullLocator

    ax.set_xscale("log")
    ax.set_xlim(edges[0], edges[-1])
    ax.xaxis.set_minor_locator(NullLocator())
    ticks = round_ticks(edges[0], edges[-1])
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlabel(f"length-scale ({units or 'units of the coordinates'})")


def round_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a log axis, as dense as there is room for."""
    from matplotlib.ticker import MaxNLocator

    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    width = np.log10(high / low)
    within = [1, 2, 5] if width < 2 else [1, 3] if width < 3 else [1]
    ticks = [k * 10.0**d for d in decades for k in within if low <= k * 10.0**d <= high]
    if len(ticks) > 1:
        return ticks
    return [tick for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]


def _legend(ax: Axes) -> None:
    """Name what is drawn above its panel, where nothing is."""
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0, handlelength=1.6)


def _line(marker: str, size: float, color: str) -> dict[str, Any]:
    return {
        "marker": marker,
        "markersize": size,
        "markeredgewidth": 0,
        "linewidth": 1.0,
        "color": color,
        "clip_on": False,
        "zorder": 3,
    }


def _dashes() -> dict[str, Any]:
    return {"color": _style.INK, "linewidth": 0.6, "linestyle": (0, (4, 3)), "zorder": 0}
