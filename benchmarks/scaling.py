"""Cost as cells grow, at a fixed number of basis columns: seconds from 1,000 to 1,000,000 cells, and their slope on log-log axes.

    python benchmarks/scaling.py --piece evaluate --rank 256 --figure scaling.png
    python benchmarks/scaling.py --piece fit --sizes 1000 10000 100000

Pieces, on the problem `both` (binary fate, tree and space):

    fit        a whole fit with intervals
    evaluate   one free energy at the true hyperparameters, site updates until they settle
    update     one update: the Gaussian posterior given sites (mean, variances, log-determinant) at the true hyperparameters; `error`
               is how far its mean is from the equations that it solves, m = K b and b = tau (ytilde - m), relative
    gram       the product of the whitened columns with themselves, most of an update: its rate, and what part it is of the machine's
               own in a product of square matrices, in float64

Each size in a process of its own. The first evaluation, which builds the basis and compiles, is not on the clock; of an evaluation
and an update the least of `--repeats` counts. The slope is the least-squares line through log seconds over log cells.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from machine import forget_peak, machine, peak_mib, set_threads, table, thread_environment
from problems import EXTENT, make

PIECES = ("fit", "evaluate", "update", "gram")
SQUARE = 4096  # of the product that tells the machine's rate
SIZES = (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
COLOR = "#0072B2"


def least(run: Callable[[], object], repeats: int, device: str) -> tuple[float, float]:
    """Least seconds of several runs, with the processor's seconds of that run."""
    import torch

    spent = []
    for _ in range(repeats):
        began, cpu = time.perf_counter(), time.process_time()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        spent.append((time.perf_counter() - began, time.process_time() - cpu))
    return min(spent)


def piece(options: argparse.Namespace, n: int) -> dict[str, Any]:
    """One size, in this process."""
    import torch

    import cellfate as cf
    from cellfate.engines.base import Sites
    from cellfate.engines.columns import Layout

    threads = set_threads(options.threads)
    rank = {} if options.rank is None else {"rank": options.rank}
    problem = make(options.problem, n, extent=options.extent, seed=options.seed)

    def glmm(this: Any) -> Any:
        kernels = this.kernels(lengthscale=None)
        return cf.GLMM(this.family, kernels, engine=options.engine, device=options.device, **rank)

    warnings.simplefilter("ignore", cf.CellfateWarning)
    row: dict[str, Any] = {"problem": problem.name, "piece": options.piece, "n": n, "engine": options.engine}
    row |= {"rank": options.rank, "device": options.device, "threads": threads}
    if options.piece == "fit":
        small = make(problem.name, 300, extent=options.extent, seed=options.seed)
        glmm(small).fit(small.y, small.design, rng=0)
        forget_peak()
        found: list[Any] = []
        spent = least(lambda: found.append(glmm(problem).fit(problem.y, problem.design, rng=0)), 1, options.device)
        row |= {"evaluations": found[0].diagnostics["evaluations"], "status": found[0].diagnostics["status"]}
        row |= {
            f"{name}_error": float(found[0].draws[name].mean() / true - 1)
            for name, true in problem.truth.items()
            if name.startswith("variance_")
        }
    else:
        model = glmm(problem)
        if options.piece == "evaluate":
            row["status"] = model.evaluate(problem.truth, problem.y, problem.design).status  # builds; data is kept
            forget_peak()
            spent = least(lambda: model.evaluate(problem.truth), options.repeats, options.device)
        elif options.piece == "gram":
            device = cf.GLMM(problem.family, problem.kernels(), device=options.device).device
            columns = torch.randn(n, options.rank or 256, dtype=torch.float64, device=device)
            square = torch.randn(SQUARE, SQUARE, dtype=torch.float64, device=device)
            layout = Layout.whole(columns.shape[1])
            forget_peak()
            spent = least(lambda: layout.gram(columns), options.repeats, options.device)
            whole, _ = least(lambda: square @ square, options.repeats, options.device)
            row["gflops"] = 2e-9 * n * columns.shape[1] ** 2 / spent[0]
            row["status"] = "measured"
            row["share_of_machine"] = row["gflops"] / (2e-9 * SQUARE**3 / whole)
        else:
            inner, engine, _ = model._build(problem.y, problem.design, None, None, None)
            terms = inner.terms(inner.from_natural(problem.truth)[0])
            mean = torch.as_tensor(problem.effect, device=inner.data.offset.device)[None]
            precision = torch.sigmoid(mean) * torch.sigmoid(-mean)
            sites = Sites(precision, precision * mean + inner.data.outcome.y - torch.sigmoid(mean))
            prior = engine.prepare(terms)

            def update() -> None:
                posterior = engine.condition(terms, sites, prior)
                _ = posterior.mean, posterior.variance, posterior.log_det, posterior.weights

            update()
            forget_peak()
            spent = least(update, options.repeats, options.device)
            posterior = engine.condition(terms, sites, prior)
            b = posterior.weights
            wrong = posterior.prior_times(b[..., None])[..., 0] - posterior.mean
            other = b - sites.shift + sites.precision * posterior.mean
            row["error"] = float(max(wrong.norm() / posterior.mean.norm(), other.norm() / b.norm()))
            row["status"] = "converged"
    row |= {"seconds": spent[0], "cpu_seconds": spent[1], "peak_MiB": peak_mib()}
    if options.device != "cpu":
        row["peak_device_MiB"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def slope(rows: Sequence[dict[str, Any]], by: str) -> tuple[float, float]:
    """Exponent and factor of `seconds = factor * n ** exponent`, by least squares of the logarithms."""
    exponent, level = np.polyfit(np.log([row["n"] for row in rows]), np.log([row[by] for row in rows]), 1)
    return float(exponent), float(np.exp(level))


def draw(rows: Sequence[dict[str, Any]], by: str, title: str, path: Path) -> None:
    """Points, their line, and a line of slope 1 for the eye."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from cellfate.pl._style import DPI, INK, STYLE, WIDTH

    n, seconds = np.array([row["n"] for row in rows], dtype=float), np.array([row[by] for row in rows])
    exponent, factor = slope(rows, by)
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(WIDTH, 0.8 * WIDTH), layout="constrained")
        linear = seconds[-1] * n / n[-1]
        ax.plot(n, linear, color=INK, lw=0.6, ls=(0, (4, 3)), zorder=1, label="linear")
        ax.plot(n, factor * n**exponent, color=COLOR, lw=1, zorder=2, label=f"slope {exponent:.2f}")
        ax.plot(n, seconds, "o", color=COLOR, ms=4, mec="white", mew=0.5, zorder=3)
        ax.set(
            xscale="log", yscale="log", xlabel="cells", ylabel="processor seconds" if by == "cpu_seconds" else "seconds"
        )
        ax.set_title(title, loc="left")
        ax.legend(frameon=False, loc="upper left", handlelength=1.8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piece", choices=PIECES, default="fit")
    parser.add_argument("--problem", default="both")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--engine", default="structured")
    parser.add_argument("--rank", type=int, help="basis columns; left to the engine if not given")
    parser.add_argument("--extent", type=float, default=EXTENT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--by", default="seconds", choices=("seconds", "cpu_seconds"), help="what the slope is of")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for one size")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--out", type=Path, help="the rows as CSV")
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)  # one size, in this process
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.here is not None:
        print(json.dumps(piece(options, options.here), default=float))
        return 0
    rows, failed = [], []
    for n in sorted(options.sizes):
        command = [sys.executable, __file__, *given, "--here", str(n)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=options.limit, env=thread_environment(options.threads)
            )
        except subprocess.TimeoutExpired:
            failed.append(f"{n} cells: stopped after {options.limit:g} s")
            continue
        if done.returncode:
            failed.append(f"{n} cells: {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}")
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{n} cells: {rows[-1]['seconds']:.3g} s, {rows[-1]['peak_MiB']:.0f} MiB", file=sys.stderr, flush=True)
    if rows:
        print(table([row | {"status": row["status"][:60]} for row in rows]))
    for line in failed:
        print(line)
    if len(rows) > 1:
        exponent, _ = slope(rows, options.by)
        last = slope(rows[-2:], options.by)[0]
        print(f"slope of {options.by} on log-log axes: {exponent:.3f} (between the two largest: {last:.3f})")
        if options.figure is not None:
            columns = "" if options.rank is None else f", {options.rank} columns"
            what = {"fit": "whole fit", "evaluate": "one free energy", "update": "one update"}[options.piece]
            draw(
                rows,
                options.by,
                f"{what}, {options.engine}{columns}, {options.threads} thread{'s' * (options.threads > 1)}",
                options.figure,
            )
            print(f"figure: {options.figure}")
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    if options.out is not None and rows:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([{**row, **machine()} for row in rows]).to_csv(options.out, index=False, float_format="%.6g")
    return 1 if failed or len(rows) < 2 else 0


if __name__ == "__main__":
    sys.exit(main())
