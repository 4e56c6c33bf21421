"""What the structured engine's columns cost in accuracy: beside the exact field, by length-scale, rank and family.

    python benchmarks/approximation.py                                   # n = 1,000, extent / length-scale 5, 10, 20
    python benchmarks/approximation.py --sizes 2000 --extents 10 --ranks 0 128 256 512

Both engines fit the same cells. `error_*` is the difference of the posterior means of a variance, relative; `error_F` that of the
free energy in nats, at the exact fit's mode; rank 0 is the default, as many columns as the tolerance asks for.
"""

from __future__ import annotations

import argparse
import time
import warnings

from machine import machine, set_threads, table, warm_up, write
from problems import make

import cellfate as cf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["both", "both_gaussian"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000])
    parser.add_argument("--extents", nargs="+", type=float, default=[5, 10, 20])
    parser.add_argument("--ranks", nargs="+", type=int, default=[0], help="0 for the default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="approximation.csv")
    options = parser.parse_args()
    threads = set_threads(options.threads)
    warnings.simplefilter("ignore", cf.CellfateWarning)  # the status keeps them
    warm_up()
    rows = []
    for n in options.sizes:
        for extent in options.extents:
            for name in options.problems:
                problem = make(name, n, extent=extent, seed=options.seed)
                exact, glmm, seconds = fit(problem, "dense", None)
                base = {"problem": name, "n": n, "extent": extent, "threads": threads}
                rows.append(base | {"engine": "dense", "seconds": seconds, "status": exact.diagnostics["status"]})
                at = exact.mode
                reference = glmm.evaluate(at, problem.y, problem.design).free_energy
                for rank in options.ranks:
                    found, approximate, seconds = fit(problem, "structured", rank or None)
                    row = base | {"engine": "structured", "rank": found.diagnostics["rank_spatial"], "seconds": seconds}
                    row["truncated_share"] = found.diagnostics["truncated_share_spatial"]
                    for component in problem.fields:
                        key = f"variance_{component}"
                        row[f"error_{component}"] = found.draws[key].mean() / exact.draws[key].mean() - 1
                    row["error_F"] = approximate.evaluate(at).free_energy - reference
                    rows.append(row | {"status": found.diagnostics["status"]})
                print(table(rows[-1 - len(options.ranks) :]), flush=True)
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    print(f"written: {write(options.out, rows)}")


def fit(problem, engine: str, rank: int | None):
    """A fit, the model for more questions, and its seconds."""
    glmm = cf.GLMM(problem.family, problem.kernels(), engine=engine, rank=rank)
    began = time.perf_counter()
    found = glmm.fit(problem.y, problem.design, terms=["Intercept"], rng=0)
    return found, glmm, time.perf_counter() - began


if __name__ == "__main__":
    main()
