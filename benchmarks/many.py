"""Many gaussian responses at once: seconds and memory, and how far the answers are from fits one by one.

    python benchmarks/many.py --responses 2000 --cells 10000 --rank 256 --check 20
    python benchmarks/many.py --responses 20 --cells 500 --check 5

One embryo (see `problems.py`); each response has fields and variances of its own, some without ancestry or without neighborhood.
Fields are drawn as the problem `both_gaussian` draws them: down the tree, and in space from random Fourier features. The fits one
by one use the same engine and rank; `mode_gap` is what the log posterior of the one is above that of the other, both by the engine
of the fit one by one.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from machine import forget_peak, peak_mib, set_threads, table, write
from problems import EXTENT, Problem, make

FEATURES = 1024  # of a random field


def responses(problem: Problem, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Responses (n, count), and the variances (count, 3) of lineage, space and residual behind them."""
    import torch

    from cellfate.trees.plan import TreePlan
    from cellfate.trees.sweeps import draw

    rng = np.random.default_rng([seed, problem.n, count])
    variances = rng.gamma(1.5, 0.5, size=(count, 3)) + np.array([0.0, 0.0, 0.1])
    variances[rng.random(count) < 0.2, 0] = 0.0
    variances[rng.random(count) < 0.2, 1] = 0.0
    plan = TreePlan(problem.parent, problem.leaf)
    length = torch.as_tensor(problem.branch_length)
    lineage = draw(plan, None, length, torch.as_tensor(rng.standard_normal((len(length), count)))).numpy()
    # a Matern 3/2 field is a sum of waves whose frequencies are Student-t with 3 degrees of freedom
    half = rng.standard_normal((FEATURES, 2)) / np.sqrt(rng.chisquare(3, size=(FEATURES, 1)) / 3) / problem.lengthscale
    waves = problem.coordinates @ half.T
    spatial = np.cos(waves) @ rng.standard_normal((FEATURES, count)) + np.sin(waves) @ rng.standard_normal(
        (FEATURES, count)
    )
    y = rng.standard_normal((problem.n, count)) * np.sqrt(variances[:, 2]) + rng.normal(size=count) * 2
    for field, own in ((lineage, variances[:, 0]), (spatial, variances[:, 1])):
        y += field / field.std(0).mean() * np.sqrt(own)
    return y, variances


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=2000)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--check", type=int, default=20, help="responses that are fitted one by one too")
    parser.add_argument("--extent", type=float, default=EXTENT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the rows as CSV")
    options = parser.parse_args(arguments)
    threads = set_threads(options.threads)

    import cellfate as cf
    from cellfate.inference.gaussian_many import fit_gaussian_many
    from cellfate.kernels.base import Component

    warnings.simplefilter("ignore", cf.CellfateWarning)
    problem = make("both_gaussian", options.cells, extent=options.extent, seed=options.seed)
    components = tuple(Component(name, kernel) for name, kernel in problem.kernels().items())
    y, variances = responses(problem, options.responses, options.seed)
    names = [f"gene{i}" for i in range(options.responses)]
    small = make("both_gaussian", 300, seed=options.seed)  # what Python compiles at a first call is not on the clock
    few = tuple(Component(name, kernel) for name, kernel in small.kernels().items())
    list(fit_gaussian_many(few, small.design, ["Intercept"], small.y[:, None], ["y"], rank=32, device=options.device))

    forget_peak()
    began, cpu, kept = time.perf_counter(), time.process_time(), {}
    shares = np.empty((options.responses, 3))
    statuses: dict[str, int] = {}
    given = {"rank": options.rank, "device": options.device}
    for i, fit in enumerate(fit_gaussian_many(components, problem.design, ["Intercept"], y, names, **given)):
        shares[i] = fit.shares["share"][:3]
        statuses[fit.diagnostics["status"]] = statuses.get(fit.diagnostics["status"], 0) + 1
        if i < options.check:
            kept[i] = fit
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    truth = variances / variances.sum(1, keepdims=True)
    row = {"responses": options.responses, "cells": options.cells, "rank": options.rank, "threads": threads}
    row |= {"device": options.device, "seconds": seconds, "cpu_seconds": cpu, "peak_MiB": peak_mib()}
    row["share_rmse"] = float(np.sqrt(((shares - truth) ** 2).mean()))
    row["converged"] = statuses.get("converged", 0)
    print(table([row]))
    checked = [_compared(problem, components, y[:, i], fit, options) for i, fit in kept.items()]
    if checked:
        print(table(checked, 4))
    if options.out is not None:
        print(write("many.csv", [row], options.out))
    return 0


def _compared(problem: Problem, components: tuple, y: np.ndarray, fit: object, options: argparse.Namespace) -> dict:
    """A fit one by one beside the same response of many; differences in posterior sds unless said otherwise."""
    import cellfate as cf

    glmm = cf.GLMM("gaussian", components, engine="structured", rank=options.rank, device=options.device)
    alone = glmm.fit(y, problem.design, terms=["Intercept"], rng=0)
    row = {"response": fit.shares["response"][0], "seconds": alone.diagnostics["seconds"]}
    row["evidence"] = fit.log_evidence - alone.log_evidence
    model, engine, _ = glmm._problem
    at = [_log_posterior(model, engine, f.mode) for f in (fit, alone)]
    row["mode_gap"] = at[0] - at[1]
    for name in ("variance_lineage", "variance_spatial", "variance_residual", "lengthscale_spatial"):
        a, b = fit.draws[name], alone.draws[name]
        short = name.removeprefix("variance_")
        row |= {f"{short}": (a.mean() - b.mean()) / b.std(), f"{short}_sd": a.std() / b.std()}
    return row


def _log_posterior(model: object, engine: object, mode: dict[str, float]) -> float:
    import torch

    from cellfate.inference.free_energy import evaluate
    from cellfate.inference.sites import Variational

    theta, _ = model.from_natural(mode)
    u = [p.coordinate(float(theta.values[p.name])) for p in model.parameters]
    prior = float(model.log_prior(torch.tensor([u], dtype=torch.float64)))
    return float(evaluate(model, engine, theta, Variational()).free_energy) + prior


if __name__ == "__main__":
    sys.exit(main())
