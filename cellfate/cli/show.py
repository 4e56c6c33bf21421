"""What a command prints: tables in columns, and figures into files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cellfate as cf
from cellfate import _keys
from cellfate._runtime import logger

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

FIRST_ASK = "First ask whether there is anything to divide at all"
MOST_ROWS = 40  # of a table of many responses on the screen


def draw(adata: AnnData, path: Path | None, key: str) -> None:
    """A figure of the partition, where a file is named."""
    if path is None:
        return
    cf.pl.variance_shares(adata, key, show=False, save=path)
    logger.info("figure is in %s", path)


def _print_many(adata: AnnData, key: str) -> None:
    """A row per response, the first of many, and what went wrong."""
    table, status = cf.get.components(adata, key), cf.get.responses(adata, key)["status"]
    names = list(dict.fromkeys(table["component"]))
    shares = table.pivot_table(index="response", columns="component", values="share", sort=False)[names]
    rows = [("share of", *names)]
    rows += [
        (str(name), *(f"{share:.2f}" for share in row))
        for name, row in zip(shares.index, shares.to_numpy(), strict=True)
    ]
    print(columns(rows[: 1 + MOST_ROWS]))
    if len(shares) > MOST_ROWS:
        print(f"and {len(shares) - MOST_ROWS} more")
    failed = int(status.str.startswith("failed").sum())
    print(
        f"\n{len(status)} fates: {failed} failed, {len(status) - failed - int((status == 'converged').sum())} in doubt"
    )
    verdicts = cf.get.responses(adata, key).get("verdict")
    if verdicts is not None and (weak := int(verdicts.astype(str).str.startswith("weak").sum())):
        print(f"{weak} with a weak verdict. {FIRST_ASK} with cf.tl.test_components(adata).")


def print_tables(adata: AnnData, key: str) -> None:
    """The partition on its scales, fixed effects and hyperparameters; of many responses a row each."""
    if _keys.RESPONSES in adata.uns[key]:
        _print_many(adata, key)
        return
    params, diagnostics = cf.get.params(adata, key), cf.get.diagnostics(adata, key)
    for scale in ("latent", "link", "realized"):
        table = cf.get.components(adata, key, scale=scale)
        response = table["response"].iloc[0]
        print(f"{response}: {params.get('family')}, {params.get('link')} link; {scale} scale")
        print(columns(_component_rows(table)), end="\n\n")
    fixed = cf.get.fixed_effects(adata, key)
    rows = [("term", "estimate", "sd", "95% interval")]
    rows += [
        (str(r.term), short(r.estimate), short(r.sd), f"[{short(r.lower)}, {short(r.upper)}]")
        for r in fixed.itertuples()
    ]
    print(columns(rows))
    shapes = [
        (str(r.term), short(r.median), f"[{short(r.lower)}, {short(r.upper)}]")
        for r in cf.get.hyperparameters(adata, key).itertuples()
    ]
    if shapes:
        print("\n" + columns([("hyperparameter", "median", "95% interval"), *shapes]))
    print_verdict(diagnostics.get("verdict"))


def print_verdict(verdict: str | None) -> None:
    """And where it is weak, what to ask first."""
    if verdict:
        print(f"\n{verdict}")
    if verdict and verdict.startswith("weak"):
        print(f"{FIRST_ASK} with cf.tl.test_components(adata).")


def _component_rows(table: pd.DataFrame) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("component", "variance", "95% interval", "share", "95% interval")]
    for r in table.itertuples():
        rows.append(
            (
                r.component,
                short(r.variance),
                f"[{short(r.variance_lower)}, {short(r.variance_upper)}]",
                f"{r.share:.3f}",
                f"[{r.share_lower:.3f}, {r.share_upper:.3f}]",
            )
        )
    return rows


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, the first column to the left."""
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(w) if j == 0 else text.rjust(w) for j, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def short(x: float) -> str:
    """Three digits, or all before the point; without a trailing one."""
    if x == 0 or 1e3 <= abs(x) < 1e5:
        return f"{x:.0f}"
    return f"{x:#.3g}".rstrip(".") if 1e-3 <= abs(x) < 1e3 else f"{x:.2e}"
