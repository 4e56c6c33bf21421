"""Base against head: two tables of `run.py` from one machine, row by row.

    python benchmarks/compare.py base.csv head.csv --threshold 1.2

Exit code 1 if a row of head takes more than `threshold` times the seconds (or memory) of its row in base, has a larger error, or
failed where base did not. A row that is in one table only is listed and judged by nobody. Seconds below `--least` are noise. On a
machine that does other work too, compare `--by cpu_seconds`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from machine import table

KEY = ["problem", "method", "n", "extent", "seed", "device", "threads"]
ERRORS = ("error_truth", "error_dense", "error_field")


def compare(
    base: pd.DataFrame, head: pd.DataFrame, *, by: str, threshold: float, slack: float, least: float
) -> list[dict[str, object]]:
    """A row per common row: ratios, differences of errors, and what is worse, in words."""
    both = base.merge(head, on=KEY, suffixes=("_base", "_head"), how="outer", indicator="where")
    rows = []
    for _, row in both.iterrows():
        out: dict[str, object] = {key: row[key] for key in KEY if key not in ("extent", "seed", "device")}
        if row["where"] != "both":
            rows.append(out | {"worse": "", "note": "only in base" if row["where"] == "left_only" else "only in head"})
            continue
        worse = []
        if pd.notna(row[f"{by}_base"]) and pd.isna(row[f"{by}_head"]):
            worse.append(f"failed ({row['status_head']})")
        for name, floor in ((by, least), ("peak_MiB", 50.0), ("peak_device_MiB", 50.0)):
            if f"{name}_base" not in both:
                continue
            before, after = row[f"{name}_base"], row[f"{name}_head"]
            out[f"{name}_ratio"] = after / before
            if max(before, floor) * threshold < after:
                worse.append(f"{name} {before:.3g} -> {after:.3g}")
        for name in ERRORS:
            if f"{name}_base" not in both:
                continue
            before, after = row[f"{name}_base"], row[f"{name}_head"]
            out[f"{name}_change"] = after - before
            if pd.notna(before) and pd.isna(after):
                worse.append(f"{name} lost")
            if after > before + max(slack, (threshold - 1) * before):
                worse.append(f"{name} {before:.3g} -> {after:.3g}")
        rows.append(out | {"worse": "; ".join(worse), "note": ""})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("head", type=Path)
    parser.add_argument("--threshold", type=float, default=1.2, help="ratio above which a row is worse")
    parser.add_argument("--slack", type=float, default=0.005, help="absolute growth of an error that is no growth")
    parser.add_argument("--least", type=float, default=0.1, help="seconds below which time is noise")
    parser.add_argument("--by", default="seconds", choices=("seconds", "cpu_seconds"))
    options = parser.parse_args(arguments)
    rows = compare(
        pd.read_csv(options.base),
        pd.read_csv(options.head),
        by=options.by,
        threshold=options.threshold,
        slack=options.slack,
        least=options.least,
    )
    print(table(rows))
    worse = [row for row in rows if row["worse"]]
    compared = sum(not row["note"] for row in rows)
    print(f"{len(worse)} of {compared} rows are worse than base beyond a factor of {options.threshold:g}")
    return 1 if worse or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
