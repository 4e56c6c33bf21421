"""Are components that are not there called there, and those that are there seen? Tests over simulated fates.

    python benchmarks/false_positives.py --sets 500 --n 200 --families gaussian bernoulli --figure false_positives.png
    python benchmarks/false_positives.py --from results/false_positives.csv --figure false_positives.png   # runs nothing

Every set has a tree, positions half inherited and fields of its own. The tested component has variance 0 (false positives), or more
(power); the other has variance 1, its length-scale is estimated. Methods are those of `cf.tl.test_components` that cost one null fit: the
score test, cells swapped within small sets, and the likelihood ratio with its 50:50 mixture. Printed: the share of sets with p < 0.05 and
p < 0.01, with its Monte-Carlo error, and the mean p, which is 0.5 where there is nothing (not of the mixture, half of which is 1).
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from figures import rejections
from machine import table, write
from workers import add_options, workers

OTHER = {"lineage": "spatial", "spatial": "lineage"}
METHODS = ("score", "permutation", "likelihood_ratio")
LENGTHSCALE = 0.5


def p_values(task: tuple[str, str, float, int, int, float, tuple[str, ...]]) -> list[float]:
    """Of one set, by each method."""
    family, tested, variance, n, seed, inheritance, methods = task
    import torch

    import cellfate as cf
    from cellfate.engines.choose import choose
    from cellfate.inference.locate import locate
    from cellfate.inference.score import Null, score_test
    from cellfate.inference.swaps import swap_test
    from cellfate.io.anndata import read_cells
    from cellfate.kernels import Brownian, Matern32
    from cellfate.kernels.base import Component
    from cellfate.tl.component_tests import MOST_SWAPPED, SWAPPED
    from cellfate.tl.sets import clades, neighborhoods
    from cellfate.tl.tested import half_chi_square

    warnings.simplefilter("ignore")
    logging.getLogger("cellfate").setLevel(logging.ERROR)
    rng = np.random.default_rng([seed, n, list(OTHER).index(tested)])
    variances = {f"variance_{tested}": variance, f"variance_{OTHER[tested]}": 1.0}
    adata = cf.datasets.simulate(
        n, family=family, **variances, lengthscale=LENGTHSCALE, inheritance=inheritance, rng=rng
    )
    try:
        cells = read_cells(adata, "fate", family=family)
    except cf.DataError:  # a fate that is the same in all cells
        return [np.nan] * len(methods)
    kernels = {"lineage": Brownian(cells.forest, cells.leaf), "spatial": Matern32(cells.coordinates)}

    def located(names: Sequence[str]) -> tuple:
        glmm = cf.GLMM(family, {name: kernels[name] for name in names}).on(cells.response, np.ones((cells.n, 1)))
        return *locate(*glmm.problem[:2], glmm.rule), glmm.rule

    model, engine, mode, rule = located([OTHER[tested]])
    own = Component(tested, kernels[tested])
    alone, _ = choose("auto", [own], cells.n, device=torch.device("cpu"), dtype=torch.float64)
    null = Null(model, engine, rule, mode)
    found = []
    for method in methods:
        if method == "score":
            found.append(score_test(null, alone, own).p)
        elif method == "permutation":
            near = neighborhoods(cells.coordinates, cells.specimen, MOST_SWAPPED)
            sets = clades(cells.forest, cells.leaf, cells.n // SWAPPED) if tested == "spatial" else near
            found.append(swap_test(null, alone, own, sets, count=499, rng=np.random.default_rng(seed)))
        else:
            gain = 2 * (located(list(OTHER))[2].free_energy - mode.free_energy)
            found.append(half_chi_square(gain))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=500)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--families", nargs="+", default=["gaussian", "bernoulli"])
    parser.add_argument("--variances", nargs="+", type=float, default=[0.0, 0.25, 0.5, 1.0, 2.0])
    parser.add_argument("--power-sets", type=int, default=100, help="sets where the component is there")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["score"])
    parser.add_argument("--inheritance", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser, count=2)
    parser.add_argument("--out", type=Path, help="folder for the rows as CSV")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--from", dest="tables", nargs="+", type=Path, help="draw these tables, run nothing")
    options = parser.parse_args(arguments)
    if options.tables:
        if options.figure is None:
            parser.error("--from draws: name the file with --figure.")
        found = pd.concat([pd.read_csv(path) for path in options.tables], ignore_index=True)
        print(f"figure: {rejections(found, options.figure)}")
        return 0
    rows = []
    with workers(options) as each:
        for family in options.families:
            for tested in OTHER:
                for variance in options.variances:
                    began = time.perf_counter()
                    sets = options.power_sets if variance else options.sets
                    seeds = range(options.seed * 10_000, options.seed * 10_000 + sets)
                    methods = tuple(options.methods)
                    tasks = [
                        (family, tested, variance, options.n, seed, options.inheritance, methods) for seed in seeds
                    ]
                    found = np.array(list(each(p_values, tasks)))
                    seconds = (time.perf_counter() - began) / sets  # of all methods
                    for method, p in zip(methods, found.T, strict=True):
                        usable = p[np.isfinite(p)]
                        row = {
                            "family": family,
                            "tested": tested,
                            "method": method,
                            "n": options.n,
                            "inheritance": options.inheritance,
                            "variance": variance,
                            "sets": len(usable),
                        }
                        for level in (0.05, 0.01):
                            row[f"below_{level}"] = (usable < level).mean()
                        row["error"] = np.sqrt(max(row["below_0.05"] * (1 - row["below_0.05"]), 1e-4) / len(usable))
                        rows.append(row | {"mean_p": usable.mean(), "seconds": seconds})
                    print(table(rows[-len(methods) :], 3), flush=True)
    print(table(rows, 3))
    if options.out is not None:
        print(write("false_positives.csv", rows, options.out))
    if options.figure is not None:
        print(f"figure: {rejections(pd.DataFrame(rows), options.figure)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
