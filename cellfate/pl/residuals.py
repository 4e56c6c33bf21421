"""Does the model describe these cells? Its residuals, what is left of a pattern, and how often predictions come true."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from cellfate import _keys, get
from cellfate.errors import DataError
from cellfate.pl import _style

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL, MARGIN = 2.15, 0.35  # inches
LEFT_OUT = {"cell": "#000000", "clade": _style.COLORS["lineage"], "region": _style.COLORS["spatial"]}
OVER = {"space": "spatial", "tree": "lineage"}
HEIGHT = 2.3  # of a panel
FEWEST = 5  # cells of a point of one fate out of several: with fewer, curves cross for no reason
ROW = 0.085  # inches of a bar, where there is one for each fate


def residuals(
    adata: AnnData, key: str = _keys.KEY, *, show: bool | None = None, save: str | Path | None = None
) -> list[Axes]:
    """Draw what :func:`cellfate.tl.check` found.

    First the quantiles of the residuals against those of a standard normal, with the band in which 95% of samples of this size lie at
    each place. Then Moran's I over space and over the tree, of the residuals (with what random orders of the cells give) and of the
    fates (with what fates drawn again from the fit give): a point beyond its bar is a pattern that the model does not have. What is left in residuals
    can only be too much: those of cells that are predicted from each other are a little opposed. For
    fates that are yes or no, last, how often what was predicted with some probability came true, for single cells, clades and regions
    that were left out.

    Of ordinal and categorical fates there is a color for each: a panel with the share of each, and in a second row a panel for each kind
    of cells that were left out, every fate against the rest, without points of fewer than five cells. Categorical fates also have
    quantiles and patterns of their own.

    Parameters
    ----------
    key
        The `key_added` of the fit.
    show, save
        As in :func:`cellfate.pl.variance_shares`.

    Returns
    -------
    The axes of the panels.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    table, x = get.checks(adata, key), _residuals(adata, key)
    curves = get.calibration(adata, key) if _keys.CALIBRATION in adata.uns[key] else None
    patterns = table[table["over"].isin(OVER)]
    with matplotlib.rc_context(_style.STYLE):
        if "fate" in table and curves is not None:
            figure, panels = _several(x, table, patterns, curves)
        else:
            count = 1 + bool(len(patterns)) + (curves is not None)
            figure, axes = plt.subplots(
                1, count, figsize=(PANEL * count + MARGIN, HEIGHT), layout="constrained", squeeze=False
            )
            panels = list(axes[0])
            _quantiles(panels[0], {"": x.to_numpy()[:, 0]}, {"": _style.COLORS["residual"]})
            if len(patterns):
                _patterns(panels[1], patterns)
            if curves is not None:
                _calibration(panels[-1], curves)
        _style.finish(figure, given_ax=False, show=show, save=save)
    return panels


def _residuals(adata: AnnData, key: str) -> pd.DataFrame:
    """A column of residuals, or one for each fate, of the cells of the fit."""
    name = _keys.residual(key)
    if name in adata.obsm:
        return adata.obsm[name].dropna()
    if name not in adata.obs:
        raise DataError(f"adata has no {name!r} in obs or obsm. Run `cf.tl.check(adata)` again to restore it.")
    return adata.obs[[name]].dropna()


def _several(
    x: pd.DataFrame, table: pd.DataFrame, patterns: pd.DataFrame, curves: pd.DataFrame
) -> tuple[Figure, list[Axes]]:
    """Two rows of panels: what is of all cells, and how predictions came true by what was left out."""
    import matplotlib.pyplot as plt

    of_each = len(x.columns) > 1
    shares = table[table["check"] == "share of fates"]
    colors = _style.fate_colors(list(shares["fate"]), ordered=not of_each)
    left_out = list(dict.fromkeys(curves["left_out"]))
    above = 2 + bool(len(patterns))
    columns = max(above, len(left_out))
    bars = len(patterns) if of_each else 0
    heights = [max(HEIGHT, ROW * bars + 0.8), HEIGHT]
    figure = plt.figure(figsize=(PANEL * columns + MARGIN + 0.6, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(2, columns, height_ratios=heights)
    panels = [figure.add_subplot(grid[0, i]) for i in range(above)]
    panels += [figure.add_subplot(grid[1, i]) for i in range(len(left_out))]
    if of_each:
        _quantiles(panels[0], {fate: x[fate].to_numpy() for fate in colors}, colors)
    else:
        _quantiles(panels[0], {"": x.to_numpy()[:, 0]}, {"": _style.COLORS["residual"]})
    if len(patterns):
        _patterns(panels[1], patterns, colors if of_each else None)
    _shares(panels[above - 1], shares, colors)
    for ax, name in zip(panels[above:], left_out, strict=True):
        _calibration(ax, curves[curves["left_out"] == name], colors)
        ax.set_title(f"{'single cells' if name == 'cell' else f'{name}s'} left out")
    for ax in panels[above + 1 :]:
        ax.set_ylabel("")
    marks = [plt.Line2D([], [], color=color, marker="o", markersize=4, linewidth=0.8) for color in colors.values()]
    figure.legend(marks, list(colors), title="fate", frameon=False, loc="outside right center", handlelength=1.2)
    return figure, panels


def _quantiles(ax: Axes, columns: Mapping[str, np.ndarray], colors: Mapping[str, str]) -> None:
    n = len(next(iter(columns.values())))
    rank = np.arange(1, n + 1)
    expected = stats.norm.ppf((rank - 0.5) / n)
    # the k-th of n uniforms is beta distributed
    low, high = (stats.norm.ppf(stats.beta.ppf(p, rank, n + 1 - rank)) for p in (0.025, 0.975))
    ax.fill_between(expected, low, high, color=_style.ABSENT, linewidth=0, label="95% of samples")
    ax.plot(expected, expected, color=_style.INK, linewidth=0.6)
    for name, x in columns.items():
        ax.plot(expected, np.sort(x), "o", markersize=2, color=colors[name], markeredgewidth=0)
    ax.set_xlabel("standard normal quantile")
    ax.set_ylabel("residual (standard normal)")
    ax.legend(frameon=False, loc="upper left", handlelength=1.2)


def _patterns(ax: Axes, table: pd.DataFrame, colors: Mapping[str, str] | None = None) -> None:
    """A bar for each row, or, with a color for each fate, one for each fate of a row."""
    kinds = [
        f"{'residuals' if 'residuals' in check else 'fates'},\n{over}"
        for check, over in table[["check", "over"]].to_numpy()
    ]
    order = list(dict.fromkeys(kinds))
    of_each = 1 if colors is None else len(colors)
    # a bar without a lower end goes as far as the panel
    least = (
        min(table["observed"].min(), table["lower"].where(np.isfinite(table["lower"]), -table["upper"]).min()) - 0.05
    )
    ax.set_xlim(least, max(table["observed"].max(), table["upper"].max()) + 0.05)
    within = dict(zip(colors or [""], np.linspace(0.29, -0.29, of_each) if of_each > 1 else [0.0], strict=True))
    for kind, row in reversed(list(zip(kinds, table.itertuples(), strict=True))):
        fate = "" if colors is None else row.fate
        color = _style.COLORS[OVER[row.over]] if colors is None else colors[fate]
        y = len(order) - 1 - order.index(kind) + within[fate]
        _bar(ax, y, row, color, least, 5 if of_each == 1 else min(4, 14 / of_each))
    ax.set_yticks(range(len(order)), order[::-1])
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.axvline(0, color=_style.INK, linewidth=0.4, zorder=0)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("Moran's I (dot: cells, bar: model)")


def _bar(ax: Axes, y: float, row: Any, color: str, least: float, width: float) -> None:
    """What the model gives as a bar, what the cells are as a dot."""
    ax.hlines(y, max(row.lower, least), row.upper, color=color, alpha=0.35, linewidth=width)
    dot = max(2.5, 0.9 * width)
    ax.plot(row.observed, y, "o", markersize=dot, color=color, markeredgecolor="white", markeredgewidth=0.6)


def _shares(ax: Axes, table: pd.DataFrame, colors: Mapping[str, str]) -> None:
    for y, row in enumerate(table.itertuples()):
        _bar(ax, y, row, colors[row.fate], 0.0, 5)
    ax.set_yticks(range(len(table)), list(table["fate"]))
    ax.set_ylim(len(table) - 0.4, -0.6)  # the first on top
    ax.set_xlim(left=0)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("share (dot: cells, bar: model)")


def _calibration(ax: Axes, table: pd.DataFrame, colors: Mapping[str, str] | None = None) -> None:
    """A curve for each kind of cells left out, or, with colors, for each fate."""
    ax.plot([0, 1], [0, 1], color=_style.INK, linewidth=0.6)
    if colors is not None:
        table = table[table["cells"] >= FEWEST]
    for name, rows in table.groupby("left_out" if colors is None else "fate", sort=False):
        rows = rows.sort_values("predicted")
        color = LEFT_OUT.get(str(name), _style.COLORS["residual"]) if colors is None else colors[str(name)]
        spread = np.sqrt(rows["predicted"] * (1 - rows["predicted"]) / rows["trials"])
        ax.errorbar(
            rows["predicted"],
            rows["observed"],
            yerr=spread,
            color=color,
            fmt="-",
            linewidth=0.8,
            elinewidth=0.6,
            label=str(name),
        )
        ax.scatter(
            rows["predicted"],
            rows["observed"],
            s=4 + 30 * rows["cells"] / rows["cells"].sum(),
            color=color,
            linewidth=0,
        )
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.set_xlabel("predicted probability")
    ax.set_ylabel("observed share (\N{PLUS-MINUS SIGN} 1 se)")
    if colors is None:
        ax.legend(title="left out", frameon=False, loc="upper left", handlelength=1.2)
