"""Which components does a fate need? The evidence for each model, and how well each predicts cells left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate import _keys, get
from cellfate.pl import _style

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

EVIDENCE, LEFT_OUT = "#000000", "#009E73"  # neither is the color of a component
APART = 0.19  # rows from the name of a model to either of its marks
LONGEST_NAME = 18
DOUBTS = "†‡§¶‖"  # a star would be read as significance


def compare(
    adata: AnnData,
    key: str = _keys.KEY,
    *,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw models with and without ancestry and neighborhood, the one with the most evidence on top.

    Needs :func:`cellfate.tl.compare`; reads `adata.uns[key]["comparison"]`, a row per model, as :func:`cellfate.get.comparison` returns
    it. Each model has two marks, both as differences to the best model by that measure, in nats: further to the left is worse. The
    circle is the log evidence, with the `weight` of the model in the margin: its posterior probability, if all of them are equally
    likely before. The square is the expected log predictive density of cells left out, with a bar of one standard error of the
    difference: a model whose bar reaches zero predicts about as well as the best. Marks of models whose fit has a doubt are
    hollow, and the doubt stands below.

    Parameters
    ----------
    key
        The `key_added` of the fit.
    ax, show, save
        As in :func:`cellfate.pl.variance_shares`.

    Returns
    -------
    The axes.

    Raises
    ------
    DataError
        There is no fit under `key`, or it was not compared yet.

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(80, family="gaussian", rng=0)
    >>> cf.tl.decompose(adata, "fate", family="gaussian", rng=0)
    >>> cf.tl.compare(adata, rng=0)
    >>> cf.pl.compare(adata, show=False).get_xlabel()
    'difference to the best model (nats)'
    """
    import matplotlib
    import matplotlib.pyplot as plt

    table = get.comparison(adata, key)
    doubtful = [status for status in dict.fromkeys(table["status"]) if status != "converged"]
    marks = {status: DOUBTS[i % len(DOUBTS)] * (1 + i // len(DOUBTS)) for i, status in enumerate(doubtful)}
    with matplotlib.rc_context(_style.STYLE):
        given = ax is not None
        if ax is None:
            figsize = (_style.WIDTH, 0.85 + 0.4 * len(table))
            _, ax = plt.subplots(figsize=figsize, layout="constrained")
        _draw(ax, table, marks)
        explained = [(mark, status) for status, mark in marks.items()]
        _style.foot(ax, explained, given_ax=given, indent=0.15)
    _style.finish(_style.figure_of(ax), given_ax=given, show=show, save=save)
    return ax


def _draw(ax: Axes, table: pd.DataFrame, marks: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    evidence = table["log_evidence"] - table["log_evidence"].max()
    elpd, error = table["elpd_difference"], table["elpd_error"]
    best = elpd.idxmax()
    for y, row in enumerate(table.itertuples()):
        face: dict[str, Any] = {"markerfacecolor": "white"} if row.status in marks else {}
        ax.plot(evidence[row.Index], y - APART, **_circle(), **face)
        ax.errorbar(elpd[row.Index], y + APART, xerr=error[row.Index], **_square(), **face)
        _style.note(ax, y - APART, f"weight {weight(row.weight)}")
        _style.note(ax, y + APART, "best" if row.Index == best else plus_minus(elpd[row.Index], error[row.Index]))
    ends = np.concatenate([evidence, elpd - error, elpd + error, [0.0]])
    low, high = np.nanmin(ends), np.nanmax(ends)
    pad = 0.05 * (high - low or 1.0)
    ax.set_xlim(low - pad, high + pad)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.axvline(0, color=_style.INK, linewidth=0.6, zorder=0)
    names = [f"{_name(row.model)} {marks.get(row.status, '')}".strip() for row in table.itertuples()]
    ax.set_yticks(range(len(table)), names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("difference to the best model (nats)")
    left_out = "prediction of cells left out (elpd \N{PLUS-MINUS SIGN} 1 se)"
    keys = [Line2D([], [], **_circle(), label="log evidence"), Line2D([], [], **_square(), label=left_out)]
    ax.legend(handles=keys, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, handlelength=1.6)


def _circle() -> dict[str, Any]:
    return {"marker": "o", "linestyle": "none", "markersize": 4.5, "color": EVIDENCE}


def _square() -> dict[str, Any]:
    return {"marker": "s", "linewidth": 1.4, "markersize": 4.2, "color": LEFT_OUT}


def _name(model: str) -> str:
    """In two lines where it would take the room of what is drawn."""
    if len(model) <= LONGEST_NAME:
        return model
    first, sign, last = model.rpartition(" + ")
    return f"{first}\n{sign.strip()} {last}".strip()


def weight(share: float) -> str:
    """Write a posterior probability: none is exactly zero or one."""
    if not np.isfinite(share):
        return "unknown"
    if 0.005 <= share <= 0.995:
        return _style.percent(share)
    return "<1%" if share < 0.5 else ">99%"


def plus_minus(difference: float, error: float) -> str:
    """Write a difference with its standard error, with a true minus sign."""
    if not np.isfinite(difference):
        return "unknown"
    return f"{difference:.1f} \N{PLUS-MINUS SIGN} {error:.1f}".replace("-", "\N{MINUS SIGN}")
