"""Is the truth found? Estimates of both variances over simulated sets of one family, all of one truth.

    python benchmarks/recovery.py --family ordinal --sets 50 --n 500
    python benchmarks/recovery.py --family poisson_olre --sets 50 --n 500
    python benchmarks/recovery.py --family categorical_per_fate --sets 50 --n 500
    python benchmarks/recovery.py --family bernoulli --sets 50 --n 1000 --methods variational laplace
    python benchmarks/recovery.py --family bernoulli --sets 25 --n 1000 --peer-sets 2 --limit 7200 --methods variational laplace \
        cellfate:estimate=maximum,method=laplace,lengthscale=given glmmTMB lme4 glimix-core

`poisson_olre`: counts whose cells differ by an effect of their own, too. `categorical_per_fate`: three fates, whose variances differ
and are estimated one by one.

Sets differ in tree, positions and chance. Printed for each component: the true variance, mean over sets of the posterior median and
of the mode, their bias relative to the truth with its Monte-Carlo error, and how often the 95% interval holds the truth. The
length-scale is held at the truth, priors are the package's own, half-normal(2) on standard deviations. A posterior median of a
skewed posterior is not unbiased: with few cells that say little it lies towards the prior.

Peers, the methods of `methods.py`, are asked for the first `--peer-sets` of the very same sets, each in a process of its own for at most
`--limit` seconds, with both kernels handed over as dense matrices at the true length-scale. They give a maximum of a likelihood, which
stands in the columns of the mode; the same maximum by this package is `cellfate:estimate=maximum,method=laplace,lengthscale=given`. As
few sets have a mean of their own by chance, `beside_first` is the mean difference from the mode by the first method on the sets that
both answered, relative to the truth, with its error: chance that is common to both is not in it. A peer that is absent, or cannot, or
takes too long, is not asked again, and its row says so.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import set_threads, table, warm_up, write
from methods import METHODS, clock, measure, parse, took
from problems import Problem
from run import peers

import cellfate as cf
from cellfate.io.anndata import read_cells

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
OURS = ("variational", "laplace", "ep")  # of `cf.tl.decompose`; any other name is one of `methods.py`
PROBLEM = {"bernoulli": "both", "gaussian": "both_gaussian"}  # what peers can be asked, by family
SPENT = ("seconds", "cpu_seconds")
FINAL = ("absent", "cannot", "stopped")  # how a status begins that the next set would only repeat


def truth_of(family: str) -> dict[str, float]:
    """The variance of each component that is estimated."""
    if family.endswith("_per_fate"):
        return {f"{name}[{k}]": v / len(of) for name, of in PER_FATE.items() for k, v in enumerate(of)}
    return TRUTH | ({"olre": OLRE} if family.endswith("_olre") else {})


def simulated(family: str, n: int, seed: Sequence[int]) -> Any:
    """One set as AnnData."""
    olre, own = family.endswith("_olre"), family.endswith("_per_fate")
    variances: dict[str, Any] = {f"variance_{name}": value for name, value in (PER_FATE if own else TRUTH).items()}
    of = {"family": "gaussian", "variance_residual": OLRE} if olre else {"family": likelihood(family)}
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    adata = cf.datasets.simulate(n, **of, **variances, lengthscale=LENGTHSCALE, rng=rng)
    if olre:  # what was measured is the log rate
        adata.obs["fate"] = rng.poisson(np.exp(adata.obs["fate"]))
    return adata


def likelihood(family: str) -> str:
    return family.removesuffix("_olre").removesuffix("_per_fate")


def ours(adata: Any, family: str, method: str, k: int) -> dict[str, Any]:
    """A fit as a user would make it."""
    began = clock()
    of = {"family": likelihood(family), "method": method, **MORE.get(family, {})}
    cf.tl.decompose(adata, "fate", lengthscale=LENGTHSCALE, rng=k, **of)
    found: dict[str, Any] = took(began)
    draws, mode = cf.get.draws(adata), adata.uns["cellfate"]["mode"]
    for name, value in truth_of(family).items():
        low, middle, high = np.quantile(draws[f"variance_{name}"], [0.025, 0.5, 0.975])
        found[name] = {"median": middle, "mode": mode[f"variance_{name}"], "inside": low <= value <= high}
    return found | {"status": adata.uns["cellfate"]["diagnostics"]["status"]}


def peer(problem: Path, family: str, method: str, threads: int, limit: float) -> dict[str, Any]:
    """A method of `methods.py` on the same cells; the maximum of its likelihood counts as a mode."""
    answer = measure(method, problem, threads, limit)
    found = {key: answer.get(key, np.nan) for key in SPENT} | {"status": answer["status"]}
    estimates = answer.get("estimates", {})
    return found | {
        name: {"mode": estimates[f"variance_{name}"]["estimate"]}
        for name in truth_of(family)
        if f"variance_{name}" in estimates
    }


def as_problem(adata: Any, family: str, k: int) -> Problem:
    """The cells as `methods.py` takes them. Of what a problem knows of its truth, fields and length-scale are these cells'."""
    cells = read_cells(adata, "fate", family=family)
    return Problem(
        name=PROBLEM[family],
        extent=float(np.ptp(cells.coordinates, axis=0).max()) / LENGTHSCALE,
        seed=k,
        parent=cells.forest.parent,
        branch_length=cells.forest.branch_length,
        leaf=cells.leaf,
        coordinates=cells.coordinates,
        y=cells.response,
        effect=adata.obsm["truth_effects"].to_numpy().sum(1),
        lengthscale=LENGTHSCALE,
    )


def summarize(found: Mapping[str, Mapping[int, dict[str, Any]]], family: str, n: int) -> list[dict[str, Any]]:
    """A row per method and component, over the sets that the method answered."""
    rows = []
    first = next(iter(found.values()))
    for method, sets in found.items():
        for name, true in truth_of(family).items():
            of = {k: answer[name] for k, answer in sets.items() if name in answer}
            row: dict[str, Any] = {"family": family, "method": method, "n": n, "sets": len(of)}
            row |= {"component": name, "truth": true}
            for label in ("median", "mode"):
                x = np.array([value.get(label, np.nan) for value in of.values()])
                row |= {label: mean(x), f"bias_{label}": mean(x) / true - 1, f"error_{label}": error(x) / true}
            apart = np.array([of[k]["mode"] - first[k][name]["mode"] for k in of if name in first.get(k, {})])
            if sets is not first:
                row |= {"beside_first": mean(apart) / true, "beside_first_error": error(apart) / true}
            row["coverage"] = mean(np.array([value.get("inside", np.nan) for value in of.values()], dtype=float))
            row |= {key: mean(np.array([answer[key] for answer in sets.values() if name in answer])) for key in SPENT}
            told = Counter(answer["status"] for answer in sets.values())
            row["status"] = "; ".join(what if len(told) == 1 else f"{m} {what}" for what, m in told.most_common())
            rows.append(row)
    return rows


def mean(x: np.ndarray) -> float:
    return float(x.mean()) if len(x) else np.nan


def error(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else np.nan


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="ordinal")
    parser.add_argument("--sets", type=int, default=50)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["variational"],
        help=f"{', '.join(OURS)}, or of methods.py: {', '.join(METHODS)}",
    )
    parser.add_argument("--peer-sets", type=int, default=5, help="sets that the methods of methods.py are asked for")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that such a method may take for a set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the rows as CSV, written anew after every set")
    options = parser.parse_args(arguments)
    family = options.family
    others = [method for method in options.methods if method not in OURS]
    for method in others:
        name, of = parse(method)  # a misspelt one is to be known now, not hours later
        if name == "cellfate" and of.get("estimate") != "maximum":
            parser.error(
                f"{method!r} is a posterior: name its rule, one of {', '.join(OURS)}, or add estimate=maximum."
            )
    if others and family not in PROBLEM:
        parser.error(f"{', '.join(others)} can be asked about {' and '.join(PROBLEM)} fates, not about {family}.")
    set_threads(options.threads)

    warnings.simplefilter("ignore", cf.CellfateWarning)
    logging.getLogger("cellfate").setLevel(logging.ERROR)
    warm_up()
    found: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in options.methods}
    asked, versions = set(others), peers() if others else {}
    rows: list[dict[str, Any]] = []
    for k in range(options.sets):
        adata = simulated(family, options.n, [options.seed, k, options.n])
        with tempfile.TemporaryDirectory() as folder:
            problem = Path(folder) / "problem.npz"
            if asked and k < options.peer_sets:
                as_problem(adata, family, k).save(problem)
            for method in options.methods:
                if method in OURS:
                    found[method][k] = ours(adata, family, method, k)
                elif method in asked and k < options.peer_sets:
                    found[method][k] = peer(problem, family, method, options.threads, options.limit)
                    if found[method][k]["status"].startswith(FINAL):
                        asked.remove(method)
                    said = f"{found[method][k]['seconds']:.1f} s, {found[method][k]['status']}"
                    print(f"set {k + 1}, {method}: {said}", file=sys.stderr, flush=True)
        rows = summarize(found, family, options.n)
        rows = [row | {"version": versions.get(row["method"], "")} for row in rows] if others else rows
        if options.out is not None:
            write(f"recovery_{family}.csv", rows, options.out)
        print(f"{k + 1} of {options.sets}", end="\r", file=sys.stderr)
    print(table([row | {"status": row["status"][:60]} for row in rows], 3))
    if versions:
        print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if options.out is not None:
        print(f"written: {options.out / f'recovery_{family}.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
