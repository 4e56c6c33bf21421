"""Do 95% intervals hold the truth 95% of the time? Simulated sets with two effects, each fitted as a user would.

    python benchmarks/calibration.py                 # quick form: 50 sets each of bernoulli and poisson, n = 200
    python benchmarks/calibration.py --sets 200 --families gaussian bernoulli poisson negative_binomial categorical \
        --inheritances 0 0.5 0.9 --workers 2 --out calibration.csv

Of every set the truth is drawn anew. `--truth range` (the default): both standard deviations uniform on 0.3 to 1.8, the
length-scale log-uniform on 0.25 to 1 (positions have unit variance), intercept 0, positions half inherited unless said otherwise;
fitted with the package's default priors. Truths are then not draws from the prior, half-normal(2), so that the coverage expected of a perfect
posterior is near 95%, not equal to it. `--truth prior`: everything is drawn from the very priors of the fit, where a perfect
posterior covers exactly 95%, whatever the data; what is missing is then the approximation's.

The shares are variance_lineage / (variance_lineage + variance_spatial) and its complement, on the latent scale; with two
components they are covered together. The Monte-Carlo error of a coverage x/N is sqrt(p(1-p)/(N+4)), p = (x+2)/(N+4) (Agresti and
Coull 1998). Seeds belong to the sets, so that the result does not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from machine import RESULTS, machine, set_threads, table, write
from tqdm import tqdm

import cellfate as cf

SD, LENGTHSCALE = (0.3, 1.8), (0.25, 1.0)
PRIORS = {
    "sd_lineage": ("half_normal", 1.0),
    "sd_spatial": ("half_normal", 1.0),
    "lengthscale_spatial": ("lognormal", 0.5, 0.4),
    "beta": ("normal", 1.0),
}
QUANTITIES = ("share_lineage", "share_spatial", "variance_lineage", "variance_spatial", "lengthscale_spatial")
LEAST = 2  # cells that the rarest fate must have for a fit to be possible
FATES = 3  # of categorical sets


@dataclass(frozen=True)
class Set:
    """One simulated set: plain data, so that it can be sent to a worker."""

    family: str
    inheritance: float
    index: int
    n: int
    truth: str
    method: str
    seed: np.random.SeedSequence


def draw_truth(how: str, rng: np.random.Generator) -> dict[str, float]:
    """Arguments of `cf.datasets.simulate`."""
    if how == "prior":
        lineage, spatial = np.abs(rng.standard_normal(2)) * PRIORS["sd_lineage"][1]
        lengthscale = PRIORS["lengthscale_spatial"][1] * np.exp(
            PRIORS["lengthscale_spatial"][2] * rng.standard_normal()
        )
        intercept = PRIORS["beta"][1] * rng.standard_normal()
    else:
        lineage, spatial = rng.uniform(*SD, 2)
        lengthscale, intercept = np.exp(rng.uniform(*np.log(LENGTHSCALE))), 0.0
    return {
        "variance_lineage": float(lineage**2),
        "variance_spatial": float(spatial**2),
        "lengthscale": float(lengthscale),
        "intercept": float(intercept),
    }


def fewest(fate: pd.Series, levels: int) -> int:
    """Cells that the rarest of so many fates has."""
    counts = fate.value_counts()
    return int(counts.min()) if len(counts) == levels else 0


def fit(task: Set) -> dict[str, Any]:
    """Simulate a set, fit it, and compare its intervals with the truth."""
    for_data, for_fit = task.seed.spawn(2)
    rng, redrawn = np.random.default_rng(for_data), 0
    while True:
        truth = draw_truth(task.truth, rng)
        adata = cf.datasets.simulate(task.n, family=task.family, inheritance=task.inheritance, rng=rng, **truth)
        levels = {"bernoulli": 2, "categorical": FATES}.get(task.family)
        if levels is None or fewest(adata.obs["fate"], levels) >= LEAST:
            break
        redrawn += 1
    began, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cf.CellfateWarning)  # the status keeps them
        cf.tl.decompose(
            adata,
            "fate",
            family=task.family,
            method=task.method,
            priors=PRIORS if task.truth == "prior" else None,
            rng=np.random.default_rng(for_fit),
        )
    row: dict[str, Any] = {
        "family": task.family,
        "inheritance": task.inheritance,
        "set": task.index,
        "redrawn": redrawn,
    }
    row |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    total = truth["variance_lineage"] + truth["variance_spatial"]
    true = {
        "share_lineage": truth["variance_lineage"] / total,
        "share_spatial": truth["variance_spatial"] / total,
        "variance_lineage": truth["variance_lineage"],
        "variance_spatial": truth["variance_spatial"],
        "lengthscale_spatial": truth["lengthscale"],
    }
    draws = cf.get.draws(adata)
    for name in QUANTITIES:
        x = draws[name].to_numpy()
        lower, upper = np.quantile(x, [0.025, 0.975])
        row |= {f"{name}_truth": true[name], f"{name}_mean": x.mean(), f"{name}_lower": lower, f"{name}_upper": upper}
        row[f"{name}_rank"] = float((x < true[name]).mean())
    diagnostics = adata.uns["cellfate"]["diagnostics"]
    return row | {"pareto_k": diagnostics["pareto_k"], "status": diagnostics["status"]}


def summarize(sets: pd.DataFrame) -> list[Mapping[str, object]]:
    """A row per family, inheritance and quantity."""
    rows = []
    for (family, inheritance), of_family in sets.groupby(["family", "inheritance"], sort=False):
        for name in QUANTITIES:
            true, mean = of_family[f"{name}_truth"], of_family[f"{name}_mean"]
            lower, upper = of_family[f"{name}_lower"], of_family[f"{name}_upper"]
            inside, n = int(((lower <= true) & (true <= upper)).sum()), len(of_family)
            p = (inside + 2) / (n + 4)
            rows.append(
                {
                    "family": family,
                    "inheritance": inheritance,
                    "quantity": name,
                    "sets": n,
                    "coverage": inside / n,
                    "its_error": np.sqrt(p * (1 - p) / (n + 4)),
                    "truth_below": int((true < lower).sum()),
                    "truth_above": int((true > upper).sum()),
                    "mean_truth": true.mean(),
                    "bias": (mean - true).mean(),
                    "bias_error": (mean - true).std() / np.sqrt(n),
                    "rmse": np.sqrt(((mean - true) ** 2).mean()),
                    "width": (upper - lower).mean(),
                    "seconds": of_family["seconds"].mean(),
                    "cpu_seconds": of_family["cpu_seconds"].mean(),
                    "warned": int((of_family["status"] != "converged").sum()),
                }
            )
    return rows


def tasks(options: argparse.Namespace) -> list[Set]:
    """Every set with a seed of its own: by family and number, whatever else is run."""
    out = []
    for family in options.families:
        name = np.frombuffer(family.encode(), np.uint8).tolist()
        for inheritance in options.inheritances:
            seeds = np.random.SeedSequence([options.seed, *name]).spawn(
                options.sets
            )  # the same trees for each inheritance
            out += [
                Set(family, inheritance, i, options.n, options.truth, options.method, seed)
                for i, seed in enumerate(seeds)
            ]
    return out


def run(todo: Sequence[Set], workers: int, threads: int) -> list[dict[str, Any]]:
    """Results in the order of the sets; each worker computes with its own threads."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=partial(_begin, threads)) as pool:
        return list(tqdm(pool.map(fit, todo), total=len(todo), unit="set", mininterval=10))


def _begin(threads: int) -> None:
    set_threads(threads)
    cf.verbosity("warning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=50, help="per family and inheritance")
    parser.add_argument("--n", type=int, default=200, help="cells of a set")
    parser.add_argument("--families", nargs="+", default=["bernoulli", "poisson"])
    parser.add_argument("--inheritances", nargs="+", type=float, default=[0.5], help="of positions, 0 to 1")
    parser.add_argument("--truth", choices=("range", "prior"), default="range")
    parser.add_argument("--method", default="variational", help="variational, laplace or ep")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration_quick.csv")
    options = parser.parse_args()
    set_threads(options.threads)  # before the workers start, which inherit it
    sets = pd.DataFrame(run(tasks(options), options.workers, options.threads))
    settings = {"n": options.n, "truth": options.truth, "method": options.method, "threads": options.threads}
    rows = summarize(sets)
    print(table(rows), end="\n\n")
    print(f"{settings}, {', '.join(f'{k} {v}' for k, v in machine().items())}")
    path = write(options.out.name, [{**settings, **row} for row in rows], options.out.parent)
    each = path.with_name(f"{path.stem}_sets.csv")
    sets.to_csv(each, index=False, float_format="%.6g")
    print(f"written: {path}, {each}")


if __name__ == "__main__":
    main()
