"""Many responses at once: seconds and memory, and how far the answers are from fits one by one.

    python benchmarks/many.py --responses 2000 --cells 10000 --rank 256 --check 20
    python benchmarks/many.py --family negative_binomial --responses 200 --cells 10000 --rank 128 --check 3

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
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from machine import forget_peak, peak_mib, set_threads, table, write
from problems import EXTENT, Problem, make

FEATURES = 1024  # of a random field


def responses(problem: Problem, count: int, seed: int, family: str) -> tuple[np.ndarray, np.ndarray]:
    """Responses (n, count), and (count, 3) the variances of lineage and space and the residual one, or dispersion, behind them."""
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
    y = np.zeros((problem.n, count))
    if family == "gaussian":
        y += rng.standard_normal((problem.n, count)) * np.sqrt(variances[:, 2]) + rng.normal(size=count) * 2
    for field, own in ((lineage, variances[:, 0]), (spatial, variances[:, 1])):
        y += field / field.std(0).mean() * np.sqrt(own)
    if family == "negative_binomial":  # genes of 0.2 to 20 counts per cell, dispersion higher where they are few
        mean = np.exp(rng.uniform(np.log(0.2), np.log(20), size=count))
        dispersion = (0.1 + 0.3 / mean) * np.exp(0.5 * rng.normal(size=count))
        rate = mean * np.exp(y - variances[:, :2].sum(1) / 2)
        y = rng.poisson(rate * rng.gamma(1 / dispersion, dispersion, size=y.shape)).astype(float)
        variances[:, 2] = dispersion
    return y, variances


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=2000)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--family", choices=["gaussian", "negative_binomial"], default="gaussian")
    parser.add_argument("--check", type=int, default=20, help="responses that are fitted one by one too")
    parser.add_argument("--extent", type=float, default=EXTENT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the rows as CSV")
    options = parser.parse_args(arguments)
    threads = set_threads(options.threads)

    import cellfate as cf
    from cellfate.inference.many import fit_many
    from cellfate.kernels.base import Component

    warnings.simplefilter("ignore", cf.CellfateWarning)
    problem = make("both_gaussian", options.cells, extent=options.extent, seed=options.seed)
    components = tuple(Component(name, kernel) for name, kernel in problem.kernels().items())
    y, variances = responses(problem, options.responses, options.seed, options.family)
    names = [f"gene{i}" for i in range(options.responses)]
    small = make("both_gaussian", 300, seed=options.seed)  # what Python compiles at a first call is not on the clock
    few = tuple(Component(name, kernel) for name, kernel in small.kernels().items())

    def all_of(components: tuple, problem: Problem, columns: np.ndarray, names: list[str], rank: int) -> Iterator:
        glmm = cf.GLMM(options.family, components, engine="structured", rank=rank, device=options.device)

        def read(part: slice) -> list[np.ndarray]:
            return [np.ascontiguousarray(column) for column in columns[:, part].T]

        return fit_many(glmm, names, read, problem.design, n=problem.n, terms=["Intercept"])

    warm = np.random.default_rng(0).poisson(3.0, (300, 1)).astype(float)
    list(all_of(few, small, warm, ["y"], 32))

    forget_peak()
    began, cpu, kept = time.perf_counter(), time.process_time(), {}
    shares = np.empty((options.responses, 3))
    statuses: dict[str, int] = {}
    for i, fit in enumerate(all_of(components, problem, y, names, options.rank)):
        if isinstance(fit, cf.errors.Failure):
            statuses["failed"] = statuses.get("failed", 0) + 1
            shares[i] = np.nan
            continue
        shares[i] = (*fit.shares["share"][:2], 1 - sum(fit.shares["share"][:2]))
        statuses[fit.diagnostics["status"]] = statuses.get(fit.diagnostics["status"], 0) + 1
        if i < options.check:
            kept[i] = fit
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    if options.family != "gaussian":
        variances[:, 2] = 0.0  # a share of counts has no dispersion in it
    truth = variances / variances.sum(1, keepdims=True)
    row = {
        "family": options.family,
        "responses": options.responses,
        "cells": options.cells,
        "rank": options.rank,
        "threads": threads,
    }
    row |= {"device": options.device, "seconds": seconds, "cpu_seconds": cpu, "peak_MiB": peak_mib()}
    row["share_rmse"] = float(np.sqrt(np.nanmean((shares - truth) ** 2)))
    row["failed"] = statuses.get("failed", 0)
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

    glmm = cf.GLMM(options.family, components, engine="structured", rank=options.rank, device=options.device)
    alone = glmm.fit(y, problem.design, terms=["Intercept"], rng=0)
    row = {"response": fit.shares["response"][0], "seconds": alone.diagnostics["seconds"]}
    row["evidence"] = fit.log_evidence - alone.log_evidence
    model, engine, _ = glmm._problem
    at = [_log_posterior(model, engine, f.mode) for f in (fit, alone)]
    row["mode_gap"] = at[0] - at[1]
    last = "variance_residual" if options.family == "gaussian" else "dispersion"
    for name in ("variance_lineage", "variance_spatial", last, "lengthscale_spatial"):
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
