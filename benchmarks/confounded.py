"""Where relatives stay together, is it said, and do intervals stay honest? Cells in territories of their clades, more and more of it inherited.

    python benchmarks/confounded.py --sets 40 --n 200 --families gaussian bernoulli --workers 2 --out results

The truth is one half each: both variances are 1. `alignment` is that of the two kernels at the true length-scale. Of the fits: the share of
sets whose verdict is each word, the mean of the rows of the realized scale (own, own, shared), the coverage of the 95% interval of the share
of ancestry with its Monte-Carlo error (Agresti and Coull 1998), and the mean width of that interval.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from machine import table, write
from workers import add_options, workers

WORDS = ("clear", "partial", "weak", "confounded")
LENGTHSCALE = 1.0  # of positions with unit variance: as far as the largest clades reach


def fit(task: tuple[str, str, float, int, int]) -> dict[str, float]:
    """One set."""
    family, layout, inheritance, n, seed = task
    import cellfate as cf

    warnings.simplefilter("ignore")
    logging.getLogger("cellfate").setLevel(logging.ERROR)
    adata = cf.datasets.simulate(
        n, family=family, inheritance=inheritance, layout=layout, lengthscale=LENGTHSCALE, rng=seed
    )
    if adata.obs["fate"].nunique() < 2:
        return {}
    cf.pp.identifiability(adata, lengthscales=[LENGTHSCALE])
    cf.tl.decompose(adata, "fate", family=family, rng=seed)
    word = cf.get.diagnostics(adata)["verdict"].split(":")[0]
    row = {"alignment": adata.uns["cellfate_identifiability"]["alignment"].item()}
    row |= {w: float(w == word) for w in WORDS}
    realized = cf.get.components(adata, scale="realized").set_index("component")["share"]
    row |= {f"realized_{name}": float(realized[name]) for name in ("lineage", "spatial", "shared")}
    row["shared_largest"] = float(realized["shared"] > max(realized["lineage"], realized["spatial"]))
    draws = cf.get.draws(adata)
    a, s = draws["variance_lineage"], draws["variance_spatial"]
    low, high = np.quantile(a / (a + s), [0.025, 0.975])
    return row | {"covered": float(low <= 0.5 <= high), "width": float(high - low)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=40)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--families", nargs="+", default=["gaussian", "bernoulli"])
    parser.add_argument("--layouts", nargs="+", default=["territories"], choices=["drift", "territories"])
    parser.add_argument("--inheritances", nargs="+", type=float, default=[0.0, 0.5, 0.95, 1.0])
    add_options(parser, count=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the rows as CSV")
    options = parser.parse_args(arguments)
    rows = []
    with workers(options) as each:
        for family in options.families:
            for layout in options.layouts:
                for inheritance in options.inheritances:
                    began = time.perf_counter()
                    seeds = range(1000 * options.seed, 1000 * options.seed + options.sets)
                    found = list(each(fit, [(family, layout, inheritance, options.n, seed) for seed in seeds]))
                    found = [one for one in found if one]
                    if not found:
                        print(f"{family}, {layout}, {inheritance}: no set with two fates", flush=True)
                        continue
                    row = {"family": family, "layout": layout, "inheritance": inheritance, "sets": len(found)}
                    row |= {name: float(np.mean([one[name] for one in found])) for name in found[0]}
                    p = (sum(one["covered"] for one in found) + 2) / (len(found) + 4)
                    row["coverage_error"] = float(np.sqrt(p * (1 - p) / (len(found) + 4)))
                    row["seconds"] = (time.perf_counter() - began) / options.sets
                    rows.append(row)
                    print(table(rows[-1:], 3), flush=True)
    print(table(rows, 3))
    if options.out is not None:
        print(write("confounded.csv", rows, options.out))


if __name__ == "__main__":
    main()
