"""Is the truth found? Estimates of both variances over simulated sets of one family, all of one truth.

    python benchmarks/recovery.py --family ordinal --sets 50 --n 500
    python benchmarks/recovery.py --family poisson_olre --sets 50 --n 500
    python benchmarks/recovery.py --family categorical_per_fate --sets 50 --n 500
    python benchmarks/recovery.py --family bernoulli --sets 50 --n 1000 --methods variational laplace

`poisson_olre`: counts whose cells differ by an effect of their own, too. `categorical_per_fate`: three fates, whose variances differ
and are estimated one by one.

Sets differ in tree, positions and chance. Printed for each component: the true variance, mean over sets of the posterior median and
of the mode, their bias relative to the truth with its Monte-Carlo error, and how often the 95% interval holds the truth. The
length-scale is held at the truth, priors are the package's own, half-normal(2) on standard deviations. A posterior median of a
skewed posterior is not unbiased: with few cells that say little it lies towards the prior.
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
from machine import set_threads, table, write

TRUTH = {"lineage": 1.0, "spatial": 1.0}
LENGTHSCALE = 0.5
OLRE = 0.5
PER_FATE = {
    "lineage": (3.0, 1.5, 1.5),
    "spatial": (1.5, 3.0, 1.5),
}  # of the fates' own effects, a third of which is reported
MORE = {
    "binomial": {"trials": "trials"},
    "poisson_olre": {"olre": True},
    "categorical_per_fate": {"per_fate": True},
}  # arguments of the fit that a family needs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="ordinal")
    parser.add_argument("--sets", type=int, default=50)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--methods", nargs="+", default=["variational"], help="of `cf.tl.decompose`, on the same sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the rows as CSV")
    options = parser.parse_args(arguments)
    set_threads(options.threads)

    import cellfate as cf

    warnings.simplefilter("ignore", cf.CellfateWarning)
    logging.getLogger("cellfate").setLevel(logging.ERROR)
    family = options.family.removesuffix("_olre").removesuffix("_per_fate")
    olre, own = options.family.endswith("_olre"), options.family.endswith("_per_fate")
    truth = TRUTH | ({"olre": OLRE} if olre else {})
    if own:
        truth = {f"{name}[{k}]": v / len(of) for name, of in PER_FATE.items() for k, v in enumerate(of)}
    found: dict[tuple[str, str], list[tuple[float, float, bool]]] = {
        (method, name): [] for method in options.methods for name in truth
    }
    seconds = dict.fromkeys(options.methods, 0.0)
    for k in range(options.sets):
        seed = np.random.SeedSequence([options.seed, k, options.n])
        variances = {f"variance_{name}": value for name, value in (PER_FATE if own else TRUTH).items()}
        of = {"family": "gaussian", "variance_residual": OLRE} if olre else {"family": family}
        rng = np.random.default_rng(seed)
        adata = cf.datasets.simulate(options.n, **of, **variances, lengthscale=LENGTHSCALE, rng=rng)
        if olre:  # what was measured is the log rate
            adata.obs["fate"] = rng.poisson(np.exp(adata.obs["fate"]))
        for method in options.methods:
            began = time.perf_counter()
            more = MORE.get(options.family, {})
            cf.tl.decompose(adata, "fate", family=family, method=method, lengthscale=LENGTHSCALE, rng=k, **more)
            draws, mode = cf.get.draws(adata), adata.uns["cellfate"]["mode"]
            for name, value in truth.items():
                low, middle, high = np.quantile(draws[f"variance_{name}"], [0.025, 0.5, 0.975])
                found[method, name].append((middle, mode[f"variance_{name}"], low <= value <= high))
            seconds[method] += (time.perf_counter() - began) / options.sets
        print(f"{k + 1} of {options.sets}", end="\r", file=sys.stderr)
    rows = []
    for (method, name), values in found.items():
        median, mode, inside = np.array(values, dtype=float).T
        row = {"family": options.family, "method": method, "n": options.n, "sets": options.sets}
        row |= {"component": name, "truth": truth[name]}
        for label, x in (("median", median), ("mode", mode)):
            row |= {label: x.mean(), f"bias_{label}": x.mean() / truth[name] - 1}
            row[f"error_{label}"] = x.std(ddof=1) / np.sqrt(len(x)) / truth[name]
        row |= {"coverage": inside.mean(), "seconds": seconds[method]}
        rows.append(row)
    print(table(rows, 3))
    if options.out is not None:
        print(write(f"recovery_{options.family}.csv", rows, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
