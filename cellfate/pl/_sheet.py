"""Where panels lie on a page, in inches: rows of equal boxes, and under each group of them its color bar.

An automatic layout would take the empty margins of a box in perspective for contents, and could not say beforehand how
large a marker is in units of the coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cellfate.pl import _style

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

PAGE = 7.2  # all columns of a journal
LEAST = 1.3  # a column with its gap
TALLEST = 3.0  # panel, without its title
SHORTEST, NARROWEST = 0.5, 0.9  # axis names have to fit
MARGIN, GAP = 0.2, 0.15
LINE = 0.16  # of text
LETTER = 0.062  # mean width of one in a title
BAR = 0.08  # thickness of a color bar
BAR_STRIP = 0.42  # a color bar with the space around it and its ticks

Box = tuple[float, float, float, float]  # left, bottom, width, height


@dataclass(frozen=True)
class Sheet:
    """A page, and the boxes on it."""

    width: float
    height: float
    panels: list[Box]
    bars: list[Box]  # one per group
    foot: float  # top of what is written below the last row of panels

    def fraction(self, box: Box) -> Box:
        """A box as parts of the page."""
        left, bottom, width, height = box
        return left / self.width, bottom / self.height, width / self.width, height / self.height


def arrange(
    titles: Sequence[str], groups: Sequence[int], *, per_block: int, ncols: int, aspect: float, foot: float
) -> Sheet:
    """Lay out panels of one aspect (height by width), blocks below each other.

    `groups` says for each panel which color bar is its own; `foot` is the height of what stands below the last row.
    """
    lines = [title.split("\n") for title in titles]
    column = max(LEAST, GAP + LETTER * max(len(line) for title in lines for line in title))
    ncols = max(1, min(ncols, per_block, int(PAGE / column)))
    rows_per_block = -(-per_block // ncols)
    ncols = -(-per_block // rows_per_block)  # rows of even length
    width = max(_style.WIDTH, column * ncols)
    column = (width - 2 * MARGIN + GAP) / ncols
    height = min((column - GAP) * min(aspect, 1.6), TALLEST)
    wide = min(column - GAP, max(height / aspect, NARROWEST))
    height = max(height, SHORTEST)

    i = np.arange(len(titles))
    row = i // per_block * rows_per_block + i % per_block // ncols
    left = MARGIN + (i % per_block % ncols) * column + (column - GAP - wide) / 2
    head = LINE * max(map(len, lines)) + 0.04
    ends = {int(row[np.asarray(groups) == g].max()) for g in groups}  # rows with color bars under them
    top, y = {}, 0.02  # from the upper edge of the page
    under = {}
    for r in range(int(row.max()) + 1):
        y += 0.1 if r and r % rows_per_block == 0 else 0.0  # between blocks
        top[r] = y + head
        y = top[r] + height + (foot if r == row.max() else 0.06)
        if r in ends:
            under[r] = y + 0.06
            y += BAR_STRIP
    page = y + LINE  # the label of the color bars

    bars = []
    for g in dict.fromkeys(groups):
        own = np.asarray(groups) == g
        start, stop = left[own].min(), left[own].max() + wide
        length = min(0.85 * (stop - start), 2.6) if len(set(groups)) > 1 else min(0.8 * width, 2.6)
        center = (start + stop) / 2 if len(set(groups)) > 1 else width / 2
        bars.append((center - length / 2, page - under[int(row[own].max())] - BAR, length, BAR))
    panels = [(float(x), page - top[int(r)] - height, wide, height) for x, r in zip(left, row, strict=True)]
    return Sheet(width, page, panels, bars, foot=page - top[int(row.max())] - height)


def color_bars(
    figure: Figure, sheet: Sheet, drawn: Sequence[ScalarMappable], beyond: Sequence[bool], label: str
) -> None:
    """Draw one color bar per group; their label stands once."""
    for box, mappable, over in zip(sheet.bars, drawn, beyond, strict=True):
        place = figure.add_axes(sheet.fraction(box))
        bar = figure.colorbar(
            mappable,
            cax=place,
            orientation="horizontal",
            extend="both" if over else "neither",
            ticks=_ticks(mappable.get_clim()[1], box[2]),
        )
        bar.outline.set_linewidth(0.5)
        bar.ax.tick_params(labelsize=7, pad=2)
        if len(sheet.bars) == 1:
            bar.set_label(label, labelpad=2)
    if len(sheet.bars) > 1:
        figure.text(0.5, 0.04 / sheet.height, label, ha="center", va="bottom", fontsize=8)


def _ticks(end: float, length: float) -> np.ndarray:
    """Round numbers from -end to end; zero and one near each end is what a short color bar has room for."""
    from matplotlib.ticker import MaxNLocator

    if length < 1.5:
        step = 10.0 ** np.floor(np.log10(end))
        return step * (end // step) * np.array([-1.0, 0.0, 1.0])
    ticks = MaxNLocator(int(length / 0.42), steps=[1, 2, 5, 10]).tick_values(-end, end)
    return np.array([tick for tick in ticks if abs(tick) <= end])
