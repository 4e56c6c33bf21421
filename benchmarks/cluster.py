"""Many responses on workers: how much faster two are than one, what the scheduler costs, and whether the answers are the same.

    python benchmarks/cluster.py --responses 500 --cells 5000 --workers 1 2 --out results
    python benchmarks/cluster.py --scheduler tcp://10.0.0.5:8786 --responses 500 --cells 5000   # a cluster that runs, as it is

A row for this process alone (one thread), and one for each number of workers. `seconds` are of `cf.tl.decompose`, after a run of a few
responses in which workers load what they need. `overhead` is the share of the workers' time in which none of their responses was being
fitted: reading, sending, scheduling, collecting, and waiting for the last chunk. `same` says whether tables are those of this process to
the last bit.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anndata as ad
import pandas as pd
from machine import set_threads, table, write
from many import responses
from problems import make

import cellfate as cf
from cellfate.distributed.clusters import cluster


def data(family: str, count: int, cells: int, seed: int) -> ad.AnnData:
    """An embryo with many responses."""
    problem = make("both_gaussian", cells, seed=seed)
    y, _ = responses(problem, count, seed, family if family != "poisson" else "negative_binomial")
    forest = problem.kernels()["lineage"].forest
    names = [str(name) for name in forest.names[problem.leaf]]
    out = ad.AnnData(y, obs=pd.DataFrame(index=names), obsm={"spatial": problem.coordinates})
    out.var_names = [f"gene{i}" for i in range(count)]
    edges = [
        (str(p), str(i), b)
        for i, (p, b) in enumerate(zip(problem.parent, problem.branch_length, strict=True))
        if p >= 0
    ]
    called = {str(node): name for node, name in zip(problem.leaf.tolist(), names, strict=True)}
    frame = pd.DataFrame([(p, called.get(c, c), b) for p, c, b in edges], columns=["parent", "child", "length"])
    cf.pp.set_tree(out, frame)
    return out


def fitted(adata: ad.AnnData, options: argparse.Namespace, **more: Any) -> tuple[ad.AnnData, float]:
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cf.CellfateWarning)
        out = cf.tl.decompose(
            adata, list(adata.var_names), family=options.family, rank=options.rank, rng=0, copy=True, **more
        )
    return out, time.perf_counter() - began


def same(one: ad.AnnData, other: ad.AnnData) -> bool:
    """Tables, to the last bit, but for the clock."""
    a, b = one.uns["cellfate"], other.uns["cellfate"]
    names = [name for name, value in a.items() if isinstance(value, pd.DataFrame)]
    return all(
        a[n].drop(columns="seconds", errors="ignore").equals(b[n].drop(columns="seconds", errors="ignore"))
        for n in names
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=500)
    parser.add_argument("--cells", type=int, default=5000)
    parser.add_argument("--family", default="poisson")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scheduler", metavar="ADDRESS", help="in place of workers on this machine")
    parser.add_argument("--store", action="store_true", help="keep chunks in a store, as jobs do")
    parser.add_argument("--skip-alone", action="store_true", help="no run of this process alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the rows as CSV")
    options = parser.parse_args(arguments)
    set_threads(1)
    adata = data(options.family, options.responses, options.cells, options.seed)
    rows: list[dict[str, Any]] = []
    first = None
    for workers in [0] * (not options.skip_alone) + options.workers:
        with ExitStack() as stack:
            more: dict[str, Any] = {}
            if workers:
                client = stack.enter_context(cluster(options.scheduler or "local", workers))
                workers = sum(client.nthreads().values())
                more["client"] = client
            fitted(adata[:, : max(4, 2 * workers)].copy(), options, **more, chunk_size=1)
            if options.store:
                more["store"] = Path(stack.enter_context(TemporaryDirectory())) / "results.store"
            found, seconds = fitted(adata, options, **more)
        busy = float(cf.get.responses(found)["seconds"].sum())
        first = found if first is None else first
        row = {"workers": workers, "family": options.family, "responses": options.responses, "cells": options.cells}
        row |= {"store": options.store, "seconds": seconds, "overhead": 1 - busy / (seconds * max(workers, 1))}
        rows.append(row | {"times_faster": rows[0]["seconds"] / seconds if rows else 1.0, "same": same(first, found)})
        print(table(rows[-1:]), flush=True)
    if options.out is not None:
        print(write("cluster.csv", rows, options.out))
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
