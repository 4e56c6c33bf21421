"""The partition at a glance: what part of the variance is whose, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cellfate import _keys, get
from cellfate._runtime import logger
from cellfate.pl import _style

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

BAR = 0.72  # height of a bar, in rows
GAP = 0.9  # rows between responses
MOST = 24  # responses that a page holds


def variance_shares(
    adata: AnnData,
    key: str = _keys.KEY,
    *,
    scale: str = "latent",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw the mean shares as one stacked bar per response, of many the first 24, and under it each component's mean and 95% interval.

    Needs :func:`cellfate.tl.decompose`. Intervals are equal-tailed, from the 2.5% to the 97.5% quantile of the draws. A
    negative share, which only the realized scale has (of `shared`: what is expected of ancestry and of neighborhood offset each other),
    hangs to the left of zero.

    Parameters
    ----------
    key
        The `key_added` of the fit.
    scale
        As in :func:`cellfate.get.components`.
    ax
        Axes to draw in, instead of a new figure of column width.
    show
        Whether to show the figure; by default only on a screen and if neither `ax` nor `save` is given.
    save
        File to write; its suffix is the format.

    Returns
    -------
    The axes.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    table = get.components(adata, key, scale=scale)
    blocks = list(table.groupby("response", sort=False))
    if len(blocks) > MOST:
        logger.info("the first %d of %d responses are drawn", MOST, len(blocks))
        blocks = blocks[:MOST]
    rows = sum(1 + len(block) for _, block in blocks) + GAP * (len(blocks) - 1)
    with matplotlib.rc_context(_style.STYLE):
        given = ax is not None
        if ax is None:
            _, ax = plt.subplots(figsize=(_style.WIDTH, 0.6 + 0.22 * rows), layout="constrained")
        _draw(ax, blocks, _style.colors(table["component"]))
        ax.set_xlabel(_style.share_label(table["component"], scale))
    _style.finish(_style.figure_of(ax), given_ax=given, show=show, save=save)
    return ax


def _draw(ax: Axes, blocks: list[tuple[str, pd.DataFrame]], colors: dict[str, str]) -> None:
    y = 0.0
    rows: dict[float, str] = {}
    heads: list[float] = []
    edges = [0.0, 1.0]
    for response, block in blocks:
        edges += _stack(ax, y, block, colors)
        heads.append(y)
        rows[y] = str(response)
        _style.note(ax, y, "mean [95%]")
        for row in block.itertuples(index=False):
            y += 1
            rows[y] = row.component
            color = colors[row.component]
            ax.hlines(y, row.share_lower, row.share_upper, color=color, linewidth=1.6)
            ax.plot(row.share, y, "o", markersize=4.5, color=color, markeredgecolor="white", markeredgewidth=0.6)
            _style.note(ax, y, _style.percents(row.share, row.share_lower, row.share_upper))
            edges += [row.share_lower, row.share_upper]
        y += 1 + GAP
    ax.set_xlim(min(edges), max(edges))
    _style.percent_axis(ax.xaxis, min(edges), max(edges))
    if min(edges) < 0:
        ax.axvline(0, color=_style.INK, linewidth=0.6, zorder=0)
    ax.set_ylim(max(rows) + 0.6, -0.6)
    ax.set_yticks(list(rows), list(rows.values()))
    for tick, row_y in zip(ax.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row_y in heads else "normal")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _stack(ax: Axes, y: float, block: pd.DataFrame, colors: dict[str, str]) -> tuple[float, float]:
    """Draw one stacked bar; return where it begins and ends."""
    left = right = 0.0
    for component, share in zip(block["component"], block["share"], strict=True):
        start = right if share >= 0 else left + share
        ax.barh(y, abs(share), left=start, height=BAR, color=colors[component], edgecolor="white", linewidth=0.6)
        left, right = left + min(share, 0.0), right + max(share, 0.0)
    return left, right
