"""Many genes of real data, end to end: a summary of all, the extremes by name, and the seconds.

Needs CELLFATE_DATA. `python benchmarks/real_genes.py [--only atlas larry] [--threads 2]`

atlas: 62 reporters of C. elegans as log(1 + intensity), tree and space. larry: genes counted in blood progenitors with clonal barcodes,
clones and no tissue; the day of culture is a fixed effect, total counts are the exposure.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

import cellfate as cf

KNOWN = {  # what each data set's README says of some of them
    "atlas": ("elt-2", "elt-7", "tbx-35", "pha-4", "hlh-1", "ceh-43", "nhr-25", "lin-26", "mab-5"),
    "larry": (),
}


def atlas() -> tuple[Any, dict[str, Any]]:
    adata = cf.datasets.celegans_gene_atlas()
    adata.layers["log"] = np.log1p(np.asarray(adata.X, dtype=float))
    return adata, {"layer": "log", "family": "gaussian"}


def larry() -> tuple[Any, dict[str, Any]]:
    adata = cf.datasets.larry_clones_expression()
    adata.obs["log_total"] = np.log(adata.obs["total_counts_all_genes"] / adata.obs["total_counts_all_genes"].mean())
    adata.obs["day"] = adata.obs["day"].astype(str)
    clones = {"lineage": "clone", "lineage_kernel": "clone", "spatial": None}
    return adata, {
        "family": "negative_binomial",
        "formula": "~ 1 + day",
        "offset": "log_total",
        "min_cells": 40,
        **clones,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = {"atlas": atlas, "larry": larry}
    parser.add_argument("--only", choices=runs, nargs="*", default=list(runs))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.only:
        adata, arguments = runs[name]()
        began = time.perf_counter()
        cf.tl.decompose(adata, None, rng=0, **arguments)
        seconds = time.perf_counter() - began
        status = cf.get.responses(adata)["status"]
        failed = status.str.startswith("failed").sum()
        print(
            f"{name}: {len(status)} genes in {seconds:.0f} s, {failed} failed, {(status == 'converged').sum()} converged"
        )
        scale = "latent" if name == "atlas" else "observation"
        shares = cf.get.components(adata, scale=scale).pivot_table(
            index="response", columns="component", values="share", observed=True
        )
        print(f"share of the variance, {scale} scale")
        print(shares.quantile([0.05, 0.25, 0.5, 0.75, 0.95]).round(3).to_string())
        named = [gene for gene in KNOWN[name] if gene in shares.index]
        if named:
            print(shares.loc[named].round(3).to_string())
        for column in ("lineage", "spatial"):
            if column in shares:
                print(f"most {column}:")
                print(shares.sort_values(column, ascending=False).head(8).round(3).to_string())


if __name__ == "__main__":
    main()
