"""Does the model describe these cells? Its residuals, what is left of a pattern, and how often predictions come true."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from cellfate import _keys, get
from cellfate.errors import DataError
from cellfate.pl import _style

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

PANEL, MARGIN = 2.15, 0.35  # inches
LEFT_OUT = {"cell": "#000000", "clade": _style.COLORS["lineage"], "region": _style.COLORS["spatial"]}
OVER = {"space": "spatial", "tree": "lineage"}


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

    table = get.checks(adata, key)
    column = _keys.residual(key)
    if column not in adata.obs:
        raise DataError(f"adata.obs has no {column!r}. Run `cf.tl.check(adata)` again to restore it.")
    x = adata.obs[column].dropna().to_numpy()
    curves = get.calibration(adata, key) if _keys.CALIBRATION in adata.uns[key] else None
    patterns = table[table["over"].isin(OVER)]
    count = 1 + bool(len(patterns)) + (curves is not None)
    with matplotlib.rc_context(_style.STYLE):
        figure, axes = plt.subplots(
            1, count, figsize=(PANEL * count + MARGIN, 2.3), layout="constrained", squeeze=False
        )
        panels = list(axes[0])
        _quantiles(panels[0], x)
        if len(patterns):
            _patterns(panels[1], patterns)
        if curves is not None:
            _calibration(panels[-1], curves)
        _style.finish(figure, given_ax=False, show=show, save=save)
    return panels


def _quantiles(ax: Axes, x: np.ndarray) -> None:
    n = len(x)
    rank = np.arange(1, n + 1)
    expected = stats.norm.ppf((rank - 0.5) / n)
    # the k-th of n uniforms is beta distributed
    low, high = (stats.norm.ppf(stats.beta.ppf(p, rank, n + 1 - rank)) for p in (0.025, 0.975))
    ax.fill_between(expected, low, high, color=_style.ABSENT, linewidth=0, label="95% of samples")
    ax.plot(expected, expected, color=_style.INK, linewidth=0.6)
    ax.plot(expected, np.sort(x), "o", markersize=2, color=_style.COLORS["residual"], markeredgewidth=0)
    ax.set_xlabel("standard normal quantile")
    ax.set_ylabel("residual (standard normal)")
    ax.legend(frameon=False, loc="upper left", handlelength=1.2)


def _patterns(ax: Axes, table: pd.DataFrame) -> None:
    rows = list(table.itertuples())[::-1]
    # a bar without a lower end goes as far as the panel
    least = min(min(row.observed, row.lower if np.isfinite(row.lower) else -row.upper) for row in rows) - 0.05
    ax.set_xlim(least, max(max(row.observed, row.upper) for row in rows) + 0.05)
    for y, row in enumerate(rows):
        color = _style.COLORS[OVER[row.over]]
        ax.hlines(y, max(row.lower, least), row.upper, color=color, alpha=0.35, linewidth=5)
        ax.plot(row.observed, y, "o", markersize=4.5, color=color, markeredgecolor="white", markeredgewidth=0.6)
    names = [f"{'residuals' if 'residuals' in row.check else 'fates'},\n{row.over}" for row in rows]
    ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.axvline(0, color=_style.INK, linewidth=0.4, zorder=0)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("Moran's I (dot: cells, bar: model)")


def _calibration(ax: Axes, table: pd.DataFrame) -> None:
    ax.plot([0, 1], [0, 1], color=_style.INK, linewidth=0.6)
    for name, rows in table.groupby("left_out", sort=False):
        rows = rows.sort_values("predicted")
        color = LEFT_OUT.get(str(name), _style.COLORS["residual"])
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
    ax.legend(title="left out", frameon=False, loc="upper left", handlelength=1.2)
