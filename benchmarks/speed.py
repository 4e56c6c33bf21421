"""Seconds and memory of one full fit with intervals, and what it got wrong: one embryo, binary fate, tree and space.

    python benchmarks/speed.py                       # n = 2,000, 2 threads, length-scale estimated

The fit runs in a process of its own, so that its peak memory is its own; what Python loads once is loaded before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings

import numpy as np
from machine import machine, peak_mib, set_threads, table, warm_up, write

import cellfate as cf

VARIANCE_LINEAGE, VARIANCE_SPATIAL, LENGTHSCALE = 1.0, 1.5, 0.6


def fit(options: argparse.Namespace) -> dict[str, object]:
    """One fit: seconds, memory, and the estimates with their intervals beside the truth."""
    threads = set_threads(options.threads)
    adata = cf.datasets.simulate(
        options.n,
        family=options.family,
        variance_lineage=VARIANCE_LINEAGE,
        variance_spatial=VARIANCE_SPATIAL,
        lengthscale=LENGTHSCALE,
        inheritance=0.5,
        rng=options.seed,
    )
    warm_up()
    before, began, cpu = peak_mib(), time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cf.CellfateWarning)  # the status keeps them
        cf.tl.decompose(adata, "fate", family=options.family, method=options.method, rng=0)
    row: dict[str, object] = {
        "problem": f"{options.family}, one embryo, tree and space",
        "method": options.method,
        "n": options.n,
        "device": "cpu",
        "threads": threads,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_MiB": peak_mib(),
        "peak_MiB_before": before,
    }
    draws = cf.get.draws(adata)
    total = VARIANCE_LINEAGE + VARIANCE_SPATIAL
    for name, x, true in (
        ("sd_lineage", draws["variance_lineage"] ** 0.5, VARIANCE_LINEAGE**0.5),
        ("sd_spatial", draws["variance_spatial"] ** 0.5, VARIANCE_SPATIAL**0.5),
        ("lengthscale", draws["lengthscale_spatial"], LENGTHSCALE),
        ("share_lineage", draws["share_lineage"], VARIANCE_LINEAGE / total),
    ):
        lower, upper = np.quantile(x, [0.025, 0.975])
        row |= {name: x.mean(), f"{name}_lower": lower, f"{name}_upper": upper, f"{name}_truth": true}
        row[f"{name}_error"] = x.mean() - true
    diagnostics = adata.uns["cellfate"]["diagnostics"]
    return row | {name: diagnostics[name] for name in ("engine", "evaluations", "pareto_k", "status")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--family", default="bernoulli", help="bernoulli or poisson")
    parser.add_argument("--method", default="variational", help="variational, laplace or ep")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", action="store_true", help="in this process; prints the row as JSON on its last line")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(fit(options), default=float))
        return
    command = [sys.executable, __file__, "--here", *sys.argv[1:]]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row = json.loads(done.stdout.splitlines()[-1])
    estimates = [
        {"quantity": name}
        | {of or "mean": row[f"{name}{'_' if of else ''}{of}"] for of in ("truth", "", "lower", "upper", "error")}
        for name in ("sd_lineage", "sd_spatial", "lengthscale", "share_lineage")
    ]
    spent = {k: v for k, v in row.items() if not any(k.startswith(e["quantity"]) for e in estimates)}
    print(table([spent], digits=2), end="\n\n")
    print(table(estimates), end="\n\n")
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    print(f"written: {write(f'speed_n{options.n}.csv', [row])}")


if __name__ == "__main__":
    main()
