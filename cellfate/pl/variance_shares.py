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
FEW, MOST = 3, 24  # responses that are drawn with numbers, and that a page holds
ROW = 0.115  # inches of a bar on a sheet; of a line under it half as much
UNTOLD = ("weak", "confounded")  # verdicts


def variance_shares(
    adata: AnnData,
    key: str = _keys.KEY,
    *,
    scale: str = "latent",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw the mean shares as one stacked bar per response, and under it each component's mean and 95% interval.

    Of more than three responses, the first 24 are drawn on one sheet: under each bar a dot and a line for each component, without numbers.
    Bars are pale where the verdict is weak or confounded: how ancestry and neighborhood divide is not known there.

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
    doubts = _doubts(adata, key)
    colors = _style.colors(table["component"])
    if sheet := len(blocks) > FEW:
        least = ROW * (1 + len(colors) / 2)
        height = 0.75 + least * len(blocks)
    else:
        rows = sum(1 + len(block) for _, block in blocks) + GAP * (len(blocks) - 1)
        height = 0.6 + 0.22 * rows
    with matplotlib.rc_context(_style.STYLE):
        given = ax is not None
        if ax is None:
            _, ax = plt.subplots(figsize=(_style.WIDTH, height), layout="constrained")
        (_draw_sheet if sheet else _draw)(ax, blocks, colors, doubts)
        ax.set_xlabel(_style.share_label(table["component"], scale))
        said = sorted({doubts[name] for name, _ in blocks if name in doubts}, reverse=True)
        if said:
            meaning = (
                f"Pale bars: the verdict is {' or '.join(said)}, how ancestry and neighborhood divide is not known."
            )
            _style.foot(ax, [("", meaning)], given_ax=given, indent=0.0)
    _style.finish(_style.figure_of(ax), given_ax=given, show=show, save=save)
    return ax


def _doubts(adata: AnnData, key: str) -> dict[str, str]:
    """Responses that do not tell how ancestry and neighborhood divide: the first word of their verdict."""
    table = get.responses(adata, key)
    if "verdict" not in table:
        return {}
    first = table["verdict"].astype(str).str.partition(":")[0]
    return {str(name): word for name, word in zip(table["response"], first, strict=True) if word in UNTOLD}


def _draw_sheet(
    ax: Axes, blocks: list[tuple[str, pd.DataFrame]], colors: dict[str, str], doubts: dict[str, str]
) -> None:
    """A bar for each response, and close under it a dot and a line for each component."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    down = 1 / (2 + len(colors))  # from one mark to the next, the bar being two of them
    edges = [0.0, 1.0]
    for y, (response, block) in enumerate(blocks):
        edges += _stack(ax, y - 0.5 + down, block, colors, height=1.4 * down, faded=response in doubts)
        for k, row in enumerate(block.itertuples(index=False)):
            at, color = y - 0.5 + (2.2 + 0.8 * k) * down, colors[row.component]
            ax.hlines(at, row.share_lower, row.share_upper, color=color, linewidth=1)
            ax.plot(row.share, at, "o", markersize=2.6, color=color, markeredgewidth=0)
            edges += [row.share_lower, row.share_upper]
    _share_axis(ax, edges)
    ax.set_ylim(len(blocks) - 0.4, -0.6)
    ax.set_yticks(range(len(blocks)), [str(name) for name, _ in blocks], fontsize=7)
    marks: list[Patch | Line2D] = [Patch(color=color, label=name) for name, color in colors.items()]
    marks.append(Line2D([], [], color=_style.INK, linewidth=1, marker="o", markersize=2.6, label="mean, 95% interval"))
    widths = [0.3 + 0.055 * len(str(mark.get_label())) for mark in marks]  # inches
    ax.legend(
        handles=marks,
        ncols=len(marks) if sum(widths) < _style.WIDTH else max(1, int(_style.WIDTH / max(widths))),
        loc="lower right",
        bbox_to_anchor=(1, 1),
        frameon=False,
        handlelength=1.2,
        columnspacing=1,
        borderpad=0.2,
    )


def _share_axis(ax: Axes, edges: list[float]) -> None:
    ax.set_xlim(min(edges), max(edges))
    _style.percent_axis(ax.xaxis, min(edges), max(edges))
    if min(edges) < 0:
        ax.axvline(0, color=_style.INK, linewidth=0.6, zorder=0)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _draw(ax: Axes, blocks: list[tuple[str, pd.DataFrame]], colors: dict[str, str], doubts: dict[str, str]) -> None:
    y = 0.0
    rows: dict[float, str] = {}
    heads: list[float] = []
    edges = [0.0, 1.0]
    for response, block in blocks:
        edges += _stack(ax, y, block, colors, height=BAR, faded=response in doubts)
        heads.append(y)
        rows[y] = str(response)
        if y == 0:
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
    _share_axis(ax, edges)
    ax.set_ylim(max(rows) + 0.6, -0.6)
    ax.set_yticks(list(rows), list(rows.values()))
    for tick, row_y in zip(ax.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row_y in heads else "normal")


def _stack(
    ax: Axes, y: float, block: pd.DataFrame, colors: dict[str, str], *, height: float, faded: bool
) -> tuple[float, float]:
    """Draw one stacked bar; return where it begins and ends."""
    left = right = 0.0
    for component, share in zip(block["component"], block["share"], strict=True):
        start = right if share >= 0 else left + share
        color = _style.pale(colors[component]) if faded else colors[component]
        ax.barh(y, abs(share), left=start, height=height, color=color, edgecolor="white", linewidth=0.6)
        left, right = left + min(share, 0.0), right + max(share, 0.0)
    return left, right
