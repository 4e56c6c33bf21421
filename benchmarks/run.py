"""Methods on problems at sizes, each run in a process of its own: seconds, memory and error in one table.

    python benchmarks/run.py --problems space both --sizes 500 1000 --methods cellfate gpboost glmmTMB --threads 2 --out peers.csv
    python benchmarks/run.py --problems both --sizes 100000 --methods cellfate:engine=structured,rank=256 --out large.csv

Columns of error, all relative:

    error_truth   the largest |estimate / truth - 1| over the variances of tree and space (with one field, chance is in it)
    error_dense   the largest |estimate / dense - 1| over the same, dense being our exact fit of the same kind: posterior means
                  beside posterior means, maxima of a likelihood beside the maximum of the same one. `dense` says which. Where
                  it is next to zero, below a twentieth of the truth, that twentieth is what is divided by
    error_field   sd of (estimated - true) linear predictor over the sd of the true one; fixed effects apart

What did not work is a row whose status says why. Beside FILE.csv a FILE.json holds hardware, versions and every estimate.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from machine import machine, table
from methods import METHODS, measure, parse
from problems import EXTENT, PROBLEMS, make

SMALL = 0.05
KINDS = ("method", "estimate", "lengthscale")  # options of ours that say what is estimated; the others say how
SHOWN = (
    "problem", "method", "n", "threads", "seconds", "cpu_seconds", "peak_MiB", "error_truth", "error_dense", "error_field",
    "status",
)  # fmt: skip


def peers() -> dict[str, str]:
    """Versions of the peers that are here, and the linear algebra under R."""
    found = {}
    for name in ("gpboost", "glimix-core"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    if shutil.which("Rscript") is None:
        return found | {"R": "absent"}
    code = (
        'cat("R", as.character(getRversion()), "\\n"); cat("BLAS_of_R", sub(".*/([^/]*/[^/]*)$", "\\\\1", extSoftVersion()[["BLAS"]]), "\\n");'
        'for (p in c("lme4", "glmmTMB", "spaMM")) cat(p, tryCatch(as.character(packageVersion(p)),'
        ' error = function(e) "absent"), "\\n")'
    )
    done = subprocess.run(["Rscript", "--vanilla", "-e", code], capture_output=True, text=True, check=False)
    return found | dict(line.split()[:2] for line in done.stdout.splitlines() if len(line.split()) >= 2)


def largest_error(
    estimates: Mapping[str, Mapping[str, float]], against: Mapping[str, float], truth: Mapping[str, float]
) -> float | None:
    """Over the variances of tree and space, NaN where one is no number; None where neither was estimated."""
    names = [name for name in ("variance_lineage", "variance_spatial") if name in estimates and name in against]
    unit = {name: max(against[name], SMALL * truth[name]) for name in names}
    errors = [abs(estimates[name]["estimate"] - against[name]) / unit[name] for name in names]
    return float(np.max(errors)) if errors else None


def dense_name(options: Mapping[str, str]) -> str:
    return "cellfate:" + ",".join(f"{name}={value}" for name, value in {"engine": "dense", **options}.items())


def rows_of(
    problem: str,
    n: int,
    names: Sequence[str],
    *,
    extent: float,
    seed: int,
    threads: int,
    limit: float,
    dense_up_to: int,
) -> list[dict[str, Any]]:
    """All methods on one problem, with the dense fits that they are compared with made once each."""
    this = make(problem, n, extent=extent, seed=seed)
    done: dict[str, dict[str, Any]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "problem.npz"
        this.save(stored)

        def run(name: str) -> dict[str, Any]:
            if name not in done:
                print(f"{problem}, {n} cells: {name} ...", file=sys.stderr, flush=True)
                done[name] = measure(name, stored, threads, limit)
            return done[name]

        for name in names:
            method, options = parse(name)
            found = run(name)
            estimates = found.get("estimates", {})
            row = {"problem": problem, "method": name, "n": n, "extent": extent, "seed": seed}
            row |= {"device": options.get("device", "cpu"), "threads": threads}
            row |= {
                key: found.get(key) for key in ("seconds", "cpu_seconds", "peak_MiB", "before_MiB", "peak_device_MiB")
            }
            row["error_truth"] = largest_error(estimates, this.truth, this.truth)
            row |= {"error_dense": None, "dense": None, "error_field": found.get("error_field")}
            reference = dense_name({**METHODS[method].dense, **{k: options[k] for k in KINDS if k in options}})
            if n <= dense_up_to and estimates and options.get("engine") != "dense":
                exact = {key: value["estimate"] for key, value in run(reference).get("estimates", {}).items()}
                row |= {"error_dense": largest_error(estimates, exact, this.truth), "dense": reference.split(":")[1]}
            for key, true in this.truth.items():
                row |= {f"{key}_{part}": value for part, value in estimates.get(key, {}).items()}
                row[f"{key}_truth"] = true
            row |= {
                key: value for key, value in found.get("details", {}).items() if value is not None and key not in row
            }
            rows.append(row | {"status": found["status"], "can": METHODS[method].can})
    return rows


def write(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], out: Path) -> None:
    """The table, and beside it what it was made on."""
    out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(out, index=False, float_format="%.6g")
    out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["both"], choices=sorted(PROBLEMS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[500])
    parser.add_argument(
        "--methods", nargs="+", default=["cellfate"], help=f"{', '.join(METHODS)}; options after a colon"
    )
    parser.add_argument("--extent", type=float, default=EXTENT, help="longest side of the tissue over the length-scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a method may take, start included")
    parser.add_argument("--dense-up-to", type=int, default=1000, help="cells up to which the exact fit is run beside")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    for name in options.methods:
        parse(name)  # a misspelt one is to be known now, not hours later
    about = {"machine": machine(), "peers": peers(), "load_before": os.getloadavg()[0]}
    about |= {"command": " ".join(arguments if arguments is not None else sys.argv[1:])}
    rows: list[dict[str, Any]] = []
    for problem in options.problems:
        for n in options.sizes:
            rows += rows_of(
                problem,
                n,
                options.methods,
                extent=options.extent,
                seed=options.seed,
                threads=options.threads,
                limit=options.limit,
                dense_up_to=options.dense_up_to,
            )
            if options.out is not None:
                write(rows, about, options.out)  # after each problem, so that a long run leaves what it has
    print(table([{key: row[key] for key in SHOWN} | {"status": row["status"][:60]} for row in rows]), end="\n\n")
    print(", ".join(f"{k} {v}" for k, v in {**about["machine"], **about["peers"]}.items()))
    for method in dict.fromkeys(parse(name)[0] for name in options.methods):
        print(f"{method}: {METHODS[method].can}")
    if options.out is not None:
        print(f"written: {options.out}")


if __name__ == "__main__":
    main()
