"""What the draws say: a density, a median and an interval per hyperparameter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cellfate import _keys, get
from cellfate.pl import _style

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

QUANTITIES = ("sd", "variance", "share", "lengthscale")
GRID = 400


def posterior(
    adata: AnnData,
    key: str = _keys.KEY,
    *,
    quantity: str = "sd",
    components: Sequence[str] | None = None,
    response: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw the posterior density of each component's standard deviation or share, with median and 95% interval.

    Needs :func:`cellfate.tl.decompose`. Every curve is drawn to its own height, and a long tail is cut a little
    beyond the widest interval. The bar under a curve is the equal-tailed 95% interval, from the 2.5% to the 97.5% quantile of the draws.
    A density that leans on zero says that the data do not rule the component out and do not show it either.

    Parameters
    ----------
    key
        The `key_added` of the fit.
    quantity
        ``"sd"`` (default) or ``"variance"`` on link scale, ``"share"`` of the latent variance, ``"lengthscale"``.
    components
        Which components; all that have draws by default.
    response
        Which of many responses; needed where there is more than one.
    ax, show, save
        As in :func:`cellfate.pl.variance_shares`.

    Returns
    -------
    The axes.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    table = get.components(adata, key)
    response = _style.one_response(table["response"], response)
    table, draws = table[table["response"] == response], get.draws(adata, key)
    if "response" in draws:
        draws = draws[draws["response"] == response].drop(columns="response").dropna(axis=1, how="all")
    draws = _pick(draws, quantity, components)
    units = _style.link_units(get.params(adata, key), response)
    label = {
        "sd": f"standard deviation ({units})",
        "variance": f"variance ({units}, squared)",
        "share": _style.share_label(table["component"]),
        "lengthscale": "length-scale (units of the coordinates)",
    }[quantity]
    with matplotlib.rc_context(_style.STYLE):
        given = ax is not None
        if ax is None:
            height = 0.72 + 0.42 * draws.shape[1]
            _, ax = plt.subplots(figsize=(_style.WIDTH, height), layout="constrained")
        _draw(ax, draws, upper=1.0 if quantity == "share" else np.inf)
        ax.set_xlabel(label)
    _style.finish(_style.figure_of(ax), given_ax=given, show=show, save=save)
    return ax


def _pick(draws: pd.DataFrame, quantity: str, components: Sequence[str] | None) -> pd.DataFrame:
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity {quantity!r} is unknown: use one of {list(QUANTITIES)}.")
    prefix = "variance_" if quantity == "sd" else f"{quantity}_"
    found = [c.removeprefix(prefix) for c in draws.columns if c.startswith(prefix)]
    if not found:
        raise ValueError(f"The draws have no {quantity}, found {list(draws.columns)}: was it held fixed in the fit?")
    wanted = found if components is None else list(components)
    if unknown := [c for c in wanted if c not in found]:
        raise ValueError(f"There are no draws of the {quantity} of {unknown}: use some of {found}.")
    picked = draws[[f"{prefix}{c}" for c in wanted]].set_axis(wanted, axis=1)
    return np.sqrt(picked) if quantity == "sd" else picked


def _draw(ax: Axes, draws: pd.DataFrame, *, upper: float) -> None:
    # A little beyond the widest interval, and no further than draws reach: a long tail would press everything else together.
    high = min(draws.quantile(0.99).max() * 1.02, draws.quantile(0.975).max() * 1.2)
    low = draws.quantile(0.01).min() * 0.9
    grid = np.linspace(0.0 if low < 0.3 * high else low, upper if high > 0.7 * upper else high, GRID)
    names = list(draws)
    colors = _style.colors(names)
    for y, name in enumerate(reversed(names)):
        curve = density(draws[name].to_numpy(), grid, lower=0.0, upper=upper)
        curve = y + 0.8 * curve / curve.max()
        lower, median, higher = draws[name].quantile([0.025, 0.5, 0.975])
        ax.fill_between(grid, y, curve, color=colors[name], alpha=0.35, linewidth=0)
        ax.plot(grid, curve, color=colors[name], linewidth=0.8)
        ax.hlines(y, lower, higher, color=colors[name], linewidth=2.2)
        ax.plot(median, y, "o", markersize=4.5, color=colors[name], markeredgecolor="white", markeredgewidth=0.6)
        numbers = _style.percents if np.isfinite(upper) else _style.interval  # what is bounded is a share
        _style.note(ax, y, numbers(median, lower, higher))
    _style.note(ax, len(names), "median [95%]")
    ax.set_xlim(grid[0], grid[-1])
    ax.set_ylim(-0.25, len(names) + 0.2)
    if np.isfinite(upper):
        _style.percent_axis(ax.xaxis, grid[0], grid[-1])
    ax.set_yticks(range(len(names)), names[::-1])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def density(x: np.ndarray, grid: np.ndarray, *, lower: float, upper: float) -> np.ndarray:
    """Kernel density of draws that live between two bounds: mass that would leak out is folded back.

    Draws repeat where a few points carry much of the weight. They are then so many distinct values with weights w, and
    the bandwidth is for 1 / sum(w^2) of them, so that a repeated draw makes no bump.
    """
    value, count = np.unique(x, return_counts=True)
    if len(value) < 2:
        raise ValueError(f"All draws are {x[0]:.4g}: there is no density to draw. Was it held fixed in the fit?")
    weight = count / len(x)
    effective = 1 / np.square(weight).sum()
    low, high = np.quantile(value, [0.25, 0.75])  # of distinct values: one heavy draw can be a quarter of all
    spread = min(x.std(), (high - low) / 1.349)
    bandwidth = 0.9 * spread * effective**-0.2  # Silverman (1986), eq. 3.31
    total = np.zeros(len(grid))
    for center in (value, 2 * lower - value, 2 * upper - value):
        z = (grid[:, None] - center) / bandwidth  # (grid, values); infinitely far for a bound that is not there
        total += np.exp(-0.5 * z**2) @ weight
    return total / (bandwidth * np.sqrt(2 * np.pi))
