"""What sites of single contrasts cost a fate out of several, against a full block of sites for each cell (all pairs of fates).

    python benchmarks/site_blocks.py
    python benchmarks/site_blocks.py --fates 5 --n 120 --sets 3

Exact matrices of one block take sites of all pairs; larger problems and the structured engine take a site for each contrast, and put
back by a correction what that leaves out of a cell. Both are fitted to the same cells. Printed: posterior mean and sd of the standard
deviations of ancestry and neighborhood, seconds, and, for the three fates of the frozen NUTS run, which are the data without
arguments, its values.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from machine import set_threads, table, write

REFERENCE = Path(__file__).parent.parent / "tests" / "reference" / "fates.json"
PARTS = ("lineage", "spatial")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fates", type=int, help="in place of the frozen problem")
    parser.add_argument("--n", type=int, default=150)
    parser.add_argument("--variance", type=float, default=1.5, help="of ancestry and of neighborhood")
    parser.add_argument("--sets", type=int, default=1, help="seeds from 0 on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the rows as CSV")
    options = parser.parse_args(arguments)
    set_threads(options.threads)

    import cellfate as cf
    from cellfate.inference import fates

    warnings.simplefilter("ignore", cf.CellfateWarning)
    logging.getLogger("cellfate").setLevel(logging.ERROR)
    known = json.loads(REFERENCE.read_text())["cases"]["categorical"]
    variances = {"variance_lineage": options.variance, "variance_spatial": options.variance, "lengthscale": 0.5}
    calls = [known["simulate"]]
    if options.fates is not None:
        own = {"family": "categorical", "n": options.n, "n_fates": options.fates, **variances}
        calls = [own | {"rng": seed} for seed in range(options.sets)]
    rows, most = [], fates.WHOLE
    for call in calls:
        adata = cf.datasets.simulate(**call)
        of = {"fates": int(adata.uns["truth"]["n_fates"]), "n": adata.n_obs, "seed": call["rng"]}
        arguments_ = {"lengthscale": call["lengthscale"], "priors": {"beta": ("normal", 5.0)}, "engine": "dense"}
        for sites, limit in (("pairs", sys.maxsize), ("contrasts", 0)):
            fates.WHOLE = limit
            cf.tl.decompose(adata, "fate", family="categorical", rng=0, **arguments_)
            draws, found = cf.get.draws(adata), cf.get.diagnostics(adata)
            row = {**of, "sites": sites, "seconds": found["seconds"]}
            for part in PARTS:
                sd = draws[f"variance_{part}"] ** 0.5
                row |= {f"sd_{part}": sd.mean(), f"sd_{part}_sd": sd.std()}
            rows.append(row)
        if options.fates is None:
            row = {**of, "sites": "NUTS", "seconds": known["seconds"]}
            for part in PARTS:
                row |= {f"sd_{part}": known[f"sd_{part}"]["mean"], f"sd_{part}_sd": known[f"sd_{part}"]["sd"]}
            rows.append(row)
    fates.WHOLE = most
    print(table(rows, 3))
    if options.out is not None:
        print(write("site_blocks.csv", rows, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
