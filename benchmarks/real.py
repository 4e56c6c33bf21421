"""Real data, end to end: every run prints its table and the seconds it took, and saves its figures.

Needs CELLFATE_DATA. `python benchmarks/real.py [--only NAME] [--figures FOLDER] [--threads 2]`; with `--questions` also what these
cells could tell before any fate is looked at, tests of the components, the comparison of models and the checks of the fit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

import cellfate as cf

STAGES = ("32_64", "64_90", "90_120", "120_150", ">150")  # cells of the embryo
RUNS: dict[str, tuple[str, str, dict]] = {
    "celegans_reporter_on": (
        "celegans_reporter_embryos",
        "reporter_on",
        {"family": "bernoulli", "library_key": "sample"},
    ),
    "ascidian_radius": ("ascidian_embryos", "radius", {"family": "gaussian", "library_key": "sample"}),
    "ascidian_is_neural": ("ascidian_embryos", "is_neural", {"family": "bernoulli", "library_key": "sample"}),
    "intmemoir_n_edited": (
        "intmemoir_colonies",
        "n_edited",
        {"family": "binomial", "trials": 10, "library_key": "sample"},
    ),
    "hemibrain_log2_post_pre": ("fly_hemibrain_hemilineages", "log2_post_pre", {"family": "gaussian"}),
    "ascidian_tissue": ("ascidian_embryos", "tissue", {"family": "categorical", "library_key": "sample"}),
    "celegans_tissue": (
        "celegans_reporter_embryos",
        "predicted_tissue",
        {"family": "categorical", "library_key": "sample"},
    ),
    "blastocysts_fate": (
        "mouse_blastocysts",
        "fate",
        {"family": "categorical", "lineage": None, "library_key": "sample", "groups": ["sample", "litter"]},
    ),
    "kp_tracer_is_metastasis": ("kp_tracer_large_tree", "is_metastasis", {"family": "bernoulli", "spatial": None}),
} | {
    f"blastocysts_{stage}_is_EPI": (
        "mouse_blastocysts",
        "is_EPI_in_ICM",
        {"family": "bernoulli", "lineage": None, "library_key": "sample", "groups": ["sample", "litter"]},
    )
    for stage in STAGES
}


def ask(adata: AnnData, options: dict, figures: Path | None) -> None:
    """What else a user would ask of a fit, with the seconds of each answer."""
    design = {k: options[k] for k in ("family", "library_key", "trials") if k in options}
    questions: dict[str, tuple[Callable[[], object], Callable[[], pd.DataFrame]]] = {
        "identifiability": (
            lambda: cf.pp.identifiability(adata, **design),
            lambda: cf.get.identifiability(adata),
        ),
        "tests": (lambda: cf.tl.test_components(adata, rng=0), lambda: cf.get.tests(adata)),
        "comparison": (lambda: cf.tl.compare(adata, rng=0), lambda: cf.get.comparison(adata)),
        "checks": (lambda: cf.tl.check(adata, rng=0), lambda: cf.get.checks(adata)),
    }
    for name, (answer, read) in questions.items():
        began = time.perf_counter()
        answer()
        print(f"\n{name}, {time.perf_counter() - began:.1f} s\n{read().round(3).to_string(index=False)}", flush=True)
    print(f"\npredictions\n{cf.get.predictions(adata).round(3).to_string(index=False)}", flush=True)
    if figures is not None:
        for plot in (cf.pl.identifiability, cf.pl.compare, cf.pl.residuals):
            plot(adata, show=False, save=figures.with_name(f"{figures.name}_{plot.__name__}.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=RUNS, nargs="*", default=list(RUNS))
    parser.add_argument("--figures", type=Path)
    parser.add_argument(
        "--questions", action="store_true", help="identifiability, tests, comparison and checks as well"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for name in args.only:
        loader, fate, options = RUNS[name]
        adata = getattr(cf.datasets, loader)()
        adata = adata[adata.obs[fate].notna().to_numpy()].copy()
        stage = name.removeprefix("blastocysts_").removesuffix("_is_EPI")
        if stage in STAGES:
            adata = adata[adata.obs["stage"].astype(str) == stage].copy()
        began = time.perf_counter()
        cf.tl.decompose(adata, fate, rng=0, **options)
        seconds = time.perf_counter() - began
        found = cf.get.diagnostics(adata)
        print(f"\n## {name}: {adata.n_obs} cells, {seconds:.1f} s, {found['engine_reason']}")
        for scale in ("latent", "realized"):
            print(
                f"\n{scale}\n{cf.get.components(adata, scale=scale).drop(columns='response').round(3).to_string(index=False)}"
            )
        draws = cf.get.draws(adata)
        if "lengthscale_spatial" in draws:
            print("length-scale", np.round(np.quantile(draws["lengthscale_spatial"], [0.025, 0.5, 0.975]), 2))
        print({k: found[k] for k in ("status", "pareto_k", "interpolation_error", "verdict")}, flush=True)
        if args.questions:
            ask(adata, options, None if args.figures is None else args.figures / name)
        if args.figures:
            cf.pl.variance_shares(adata, show=False, save=args.figures / f"{name}_shares.png")
            cf.pl.posterior(adata, show=False, save=args.figures / f"{name}_posterior.png")
            if "spatial" in adata.obsm:
                cf.pl.effects(adata, show=False, save=args.figures / f"{name}_effects.png")


if __name__ == "__main__":
    main()
