"""What the figures of the benchmarks share: intervals, bands, looks; and the figures themselves, each from a table of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from PIL import Image
from ranks import band, cuts

from cellfate.pl._style import COLORS, GROUP_COLORS, INK, STYLE, WIDTH

mpl.use("Agg")
import matplotlib.pyplot as plt

DPI = 200  # a page of print; files stay small
Z95 = 1.959964
GREY, PALE = COLORS["residual"], "#E8E8E8"
NAMES = {
    "lineage": "ancestry", "spatial": "neighborhood", "share_lineage": "share of ancestry", "share_spatial": "share of neighborhood",
    "variance_lineage": "variance of ancestry", "variance_spatial": "variance of neighborhood", "lengthscale_spatial": "length-scale",
    "sd_lineage": "sd of ancestry\n(link scale)", "sd_spatial": "sd of neighborhood\n(link scale)",
    "likelihood_ratio": "likelihood ratio", "range": "truths from a range", "prior": "truths from the prior",
}  # fmt: skip
# Lines that differ in more than color.
LINES = [
    (COLORS["spatial"], "-"), (COLORS["lineage"], (0, (4, 1.5))), (GROUP_COLORS[0], (0, (1, 1))), (INK, (0, (4, 1, 1, 1))),
    (COLORS["shared"], (0, (6, 1))), (COLORS["fixed"], "-"), (GROUP_COLORS[1], (0, (2, 2))), (GREY, "-"),
]  # fmt: skip
ENDS = ("_lower", "_upper")
MARKERS = "osD^vP"


def name_of(key: str) -> str:
    return NAMES.get(key, key.replace("_", " "))


def interval(successes: Any, n: Any) -> tuple[np.ndarray, np.ndarray]:
    """95% interval of a proportion (Wilson 1927): right also where all or none succeeded."""
    successes, n = np.asarray(successes, dtype=float), np.asarray(n, dtype=float)
    middle = (successes + Z95**2 / 2) / (n + Z95**2)
    half = Z95 / (n + Z95**2) * np.sqrt(successes * (1 - successes / n) + Z95**2 / 4)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def save(figure: Any, path: Path) -> Path:
    """Written as its name says; a PNG with as few colors as it needs, a third of the size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    if path.suffix == ".png":
        with Image.open(path) as whole:
            few = whole.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        few.save(path, optimize=True, dpi=(DPI, DPI))
    return path


def unique(values: Any) -> list[Any]:
    """In order of appearance."""
    return list(dict.fromkeys(values))


def mark(
    ax: Any, x: float, y: float, lower: float, upper: float, color: str, marker: str, *, filled: bool = True
) -> None:
    """A point with its horizontal interval."""
    ax.hlines(y, lower, upper, color=color, lw=1)
    ax.plot(x, y, marker, ms=3.5, color=color, mfc=color if filled else "white", mew=0.8, zorder=3, clip_on=False)


def above(figure: Any, handles: Sequence[Any], columns: int) -> None:
    """The legend, over the whole figure."""
    figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, frameon=False, columnspacing=1.2, handlelength=2.4
    )


def percents(share: float, _: object = None) -> str:
    """A tick of an axis of shares."""
    return f"{100 * share:.0f}%"


# --- calibration ----------------------------------------------------------------------------------------------------------


def coverage(rows: pd.DataFrame, path: Path) -> Path:
    """Coverage of the shares: a group of marks per family, one for each inheritance, a panel per way of drawing truths."""
    shares = [q for q in ("share_lineage", "share_spatial") if q in set(rows["quantity"])]
    rows = rows[rows["quantity"].isin(shares)]
    by = ["truth", "method", "n"]
    panels = list(rows.groupby(by, sort=False))
    families, inheritances = unique(rows["family"]), sorted(rows["inheritance"].unique())
    each = len(inheritances) * len(shares)
    lines = len(families) * (0.11 * each + 0.12)
    with plt.rc_context(STYLE):
        width = max(WIDTH, 0.9 + 2.3 * len(panels))
        height = lines + 1.35 + 0.2 * (len(inheritances) > 1)
        figure, axes = plt.subplots(
            1, len(panels), figsize=(width, height), sharey=True, squeeze=False, layout="constrained"
        )
        for ax, (setting, of) in zip(axes[0], panels, strict=True):
            ax.axvspan(0.92, 0.98, color=PALE, lw=0, zorder=0)
            ax.axvline(0.95, color=GREY, lw=0.8, zorder=1)
            lower, upper = interval(of["coverage"] * of["sets"], of["sets"])
            for row, low, high in zip(of.itertuples(), lower, upper, strict=True):
                i, component = inheritances.index(row.inheritance), row.quantity.removeprefix("share_")
                place = i * len(shares) + shares.index(row.quantity) - (each - 1) / 2
                y = families.index(row.family) + 0.8 * place / max(each, 3)
                mark(ax, row.coverage, y, low, high, COLORS[component], MARKERS[i % len(MARKERS)])
            least = min(0.9, lower.min())
            ax.set(xlim=(0.05 * np.floor(20 * least) - 0.005, 1.008), ylim=(len(families) - 0.5, -0.5))
            ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
            ax.xaxis.set_major_formatter(percents)
            named = dict(zip(by, setting, strict=True))
            sets = " to ".join(map(str, sorted({of["sets"].min(), of["sets"].max()})))
            ax.set_title(
                f"{name_of(named['truth'])}, {named['n']} cells,\n{named['method']}, {sets} sets each", loc="left"
            )
        figure.supxlabel("95% intervals that hold the true share", fontsize=8)
        axes[0, 0].set_yticks(range(len(families)), [name_of(f) for f in families])
        legend = [
            ax.plot([], [], color=COLORS[q.removeprefix("share_")], lw=1, marker="o", ms=3.5, label=name_of(q))[0]
            for q in shares
        ]
        if len(inheritances) > 1:
            legend += [
                ax.plot(
                    [], [], ls="none", marker=MARKERS[i % len(MARKERS)], color=GREY, ms=3.5, label=f"inheritance {h:g}"
                )[0]
                for i, h in enumerate(inheritances)
            ]
        above(figure, legend, 2 if len(panels) == 1 else 3)
        return save(figure, path)


def rank_differences(sets: pd.DataFrame, quantities: Sequence[str], path: Path) -> Path:
    """Distribution function of ranks less the uniform one, with the band that holds 95% of uniform curves from end to end."""
    inheritances, families = sorted(sets["inheritance"].unique()), unique(sets["family"])
    single = len(inheritances) == 1
    grid = (-(-len(quantities) // 2), 2) if single else (len(quantities), len(inheritances))
    cells = [(q, h) for q in quantities for h in inheritances]
    width = WIDTH if grid[1] <= 2 else 1.6 * WIDTH
    columns = 3 if width == WIDTH else 5
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            *grid, figsize=(width, 1.2 * grid[0] + 0.5 + 0.17 * -(-len(families) // columns)), sharex=True, sharey=True,
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for k, (ax, (quantity, inheritance)) in enumerate(zip(axes.flat, cells, strict=False)):
            of = sets[sets["inheritance"] == inheritance]
            counts = of["family"].value_counts()
            z, lower, upper = band(int(counts.min()))  # where families differ in sets, the widest of their bands
            ends = [0, *z, 1]
            ax.fill_between(ends, [0, *(lower - z), 0], [0, *(upper - z), 0], color=PALE, lw=0)
            ax.axhline(0, color=GREY, lw=0.6)
            for i, family in enumerate(families):
                ranks = of.loc[of["family"] == family, f"{quantity}_rank"].to_numpy()
                if len(ranks):
                    own = cuts(len(ranks))
                    apart = (ranks[:, None] <= own).mean(0) - own
                    color, style = LINES[i % len(LINES)]
                    ax.plot([0, *own, 1], [0, *apart, 0], color=color, ls=style, lw=1)
            title = [f"inheritance {inheritance:g}"] if not single and k < len(inheritances) else []
            title += [name_of(quantity)] if single or k % len(inheritances) == 0 else [" "]
            ax.set_title("\n".join(title), loc="left")
            ax.set(xlim=(0, 1), xticks=(0, 0.5, 1), xticklabels=("0", "0.5", "1"))
        for ax in axes.flat[len(cells) :]:
            ax.set_visible(False)
        figure.supxlabel("rank of the truth among posterior draws (fraction)", fontsize=8)
        figure.supylabel("share of sets with a lower rank, less uniform", fontsize=8)
        legend = [
            axes[0, 0].plot([], [], color=color, ls=style, lw=1, label=name_of(family))[0]
            for family, (color, style) in zip(families, LINES * (1 + len(families) // len(LINES)), strict=False)
        ]
        above(figure, legend, columns)
        return save(figure, path)


# --- false positives ------------------------------------------------------------------------------------------------------


def rejections(rows: pd.DataFrame, path: Path) -> Path:
    """Above, what is called where nothing is; below, by how much is there. A column per family, a color per tested component."""
    rows = rows.rename(columns={"below_0.05": "below_05"})
    families, methods = unique(rows["family"]), unique(rows["method"])
    if "score" in methods:  # the default first, whatever the order of the rows
        methods.insert(0, methods.pop(methods.index("score")))
    tested = unique(rows["tested"])
    null, there = rows[rows["variance"] == 0], rows[rows["variance"] > 0]
    heights = [0.35 + 0.3 * len(methods), 1.7] if len(there) else [0.35 + 0.3 * len(methods)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(heights), len(families), figsize=(max(WIDTH, 1.75 * len(families)), sum(heights) + 1.2), sharey="row",
            squeeze=False, layout="constrained", gridspec_kw={"height_ratios": heights},
        )  # fmt: skip
        for column, family in enumerate(families):
            ax, of = axes[0, column], null[null["family"] == family]
            ax.axvspan(0.03, 0.07, color=PALE, lw=0, zorder=0)
            ax.axvline(0.05, color=GREY, lw=0.8, zorder=1)
            most = 0.1
            for row in of.itertuples():
                lower, upper = interval(row.below_05 * row.sets, row.sets)
                k = methods.index(row.method)
                y = k + 0.3 * (tested.index(row.tested) - (len(tested) - 1) / 2)
                mark(ax, row.below_05, y, lower, upper, COLORS.get(row.tested, INK), MARKERS[k], filled=k == 0)
                most = max(most, upper)
            ax.set(xlim=(0, 1.05 * most), ylim=(len(methods) - 0.5, -0.5))
            ax.xaxis.set_major_formatter(percents)
            cells = unique(rows.loc[rows["family"] == family, "n"])
            ax.set_title(f"{name_of(family)},\n{', '.join(map(str, cells))} cells", loc="left")
            ax.set_xlabel("called if absent")
            if len(heights) == 1:
                continue
            ax, of = axes[1, column], rows[rows["family"] == family]
            for k, method in enumerate(methods):
                for component in tested:
                    own = of[(of["method"] == method) & (of["tested"] == component)].sort_values("variance")
                    if not (own["variance"] > 0).any():
                        continue
                    x, rate = own["variance"].to_numpy(), own["below_05"].to_numpy()
                    lower, upper = interval(rate * own["sets"], own["sets"])
                    color = COLORS.get(component, INK)
                    shift = 0.012 * (2 * k + tested.index(component) - 1)  # so that intervals do not hide each other
                    ax.vlines(x + shift, lower, upper, color=color, lw=0.7)
                    ax.plot(
                        x + shift, rate, color=color, lw=1, ls=LINES[k][1], marker=MARKERS[k], ms=3.5, mec=color, mew=0.8,
                        mfc="white" if k else color,
                    )  # fmt: skip
            ax.axhline(0.05, color=GREY, lw=0.6)
            ax.set(ylim=(0, 1.02), xlim=(-0.1, None), xlabel="variance (link scale)")
            ax.yaxis.set_major_formatter(percents)
        axes[0, 0].set_yticks(range(len(methods)), [name_of(m) for m in methods])
        if len(heights) > 1:
            axes[1, 0].set_ylabel("called at p < 0.05")
        legend = [
            axes[0, 0].plot([], [], color=COLORS.get(component, INK), lw=2, label=name_of(component))[0]
            for component in tested
        ]
        for k, method in enumerate(methods):
            look = {"marker": MARKERS[k], "ms": 3.5, "mfc": "white" if k else INK, "mew": 0.8, "ls": LINES[k][1]}
            legend += axes[0, 0].plot([], [], color=INK, lw=1, label=name_of(method), **look)
        above(figure, legend, 3 if len(families) <= 2 else 5)
        return save(figure, path)


# --- accuracy -------------------------------------------------------------------------------------------------------------


def side_by_side(rows: pd.DataFrame, quantities: Sequence[str], path: Path) -> Path:
    """Estimates of one problem by everyone: posteriors with their intervals above, maxima of a likelihood below."""
    short = rows["what"].str.replace(r" \(stored\)$", "", regex=True).str.replace(r" [0-9.]+$", "", regex=True)
    rows = rows.assign(what=short)
    rows = rows.assign(**{f"{q}{end}": np.nan for q in quantities for end in ENDS if f"{q}{end}" not in rows})
    families = unique(rows["family"])
    told = {family: rows[(rows["family"] == family) & (rows["what"] != "truth")] for family in families}
    heights = [len(of) + 1 for of in told.values()]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(families), len(quantities), figsize=(1.5 * WIDTH, 0.16 * sum(heights) + 0.45 * len(families) + 0.7),
            sharex="col", squeeze=False, layout="constrained", gridspec_kw={"height_ratios": heights},
        )  # fmt: skip
        for line, (family, of) in enumerate(told.items()):
            truth = rows[(rows["family"] == family) & (rows["what"] == "truth")]
            mcmc = of[of["what"].str.startswith("MCMC")]
            for ax, quantity in zip(axes[line], quantities, strict=True):
                for y, (_, row) in enumerate(of.iterrows()):
                    what, posterior = str(row["what"]), np.isfinite(row.get(f"{quantity}_+-", np.nan))
                    color = (
                        INK
                        if what.startswith("MCMC")
                        else COLORS["spatial" if what.startswith("cellfate") else "lineage"]
                    )
                    ends = row[f"{quantity}_lower"], row[f"{quantity}_upper"]
                    mark(ax, row[quantity], y, *ends, color, "o" if posterior else "D", filled=posterior)
                for _, row in mcmc.iterrows():
                    ax.axvline(row[quantity], color=INK, lw=0.6, ls=(0, (1, 1.5)), zorder=0)
                for x in truth[quantity]:
                    ax.axvline(x, color=GREY, lw=2, alpha=0.5, zorder=0)
                ax.set(ylim=(len(of) - 0.4, -0.6), yticks=[])
                ax.set_xlim(0, 1 if quantity.startswith("share") else None)
                ax.xaxis.set_major_locator(mpl.ticker.MultipleLocator(0.5))
                if line == len(families) - 1:
                    ax.set_xlabel(name_of(quantity))
            axes[line, 0].set_yticks(range(len(of)), of["what"], fontsize=7)
            axes[line, 0].set_title(f"{family}, 300 cells", loc="left")
        ax, grey = axes[0, 0], {"color": INK, "ms": 3.5, "mew": 0.8}
        legend = [
            ax.plot([], [], color=GREY, lw=2, alpha=0.5, label="truth")[0],
            ax.plot([], [], color=INK, lw=0.6, ls=(0, (1, 1.5)), label="mean by MCMC")[0],
            ax.plot([], [], "o-", lw=1, **grey, label="posterior mean, 95% interval")[0],
            ax.plot([], [], "D", mfc="white", **grey, label="maximum of the likelihood")[0],
        ]
        above(figure, legend, 2)
        return save(figure, path)
