"""Accuracy on a stored problem of 300 cells with both effects: truth, long MCMC, this package, and its peers.

    CELLFATE_REFERENCE=.../reference python benchmarks/accuracy.py --figure accuracy.png
    python benchmarks/accuracy.py --from results/accuracy.csv --figure accuracy.png   # runs nothing

MCMC and the three methods share one model: sd ~ half-normal(2), beta ~ N(0, 5^2), length-scale held at the truth, so their
posterior means and sds are to agree. Peers give a maximum of a likelihood instead, which has to be compared with ours of the same
kind ("ML": flat priors, fixed effects maximized). The peers' numbers are stored, not run here; their seconds are of another
machine. Then the free energy at given variances beside the exact log evidence.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from figures import side_by_side
from machine import machine, set_threads, table, warm_up, write

import cellfate as cf
from cellfate.kernels.lineage import Brownian
from cellfate.kernels.spatial import Matern32
from cellfate.trees.convert import to_forest

TRUTH = {"lineage": 1.0, "spatial": 1.5}
LENGTHSCALE = 0.6
PRIORS = {"sd_lineage": ("half_normal", 2.0), "sd_spatial": ("half_normal", 2.0), "beta": ("normal", 5.0)}
FLAT = {"sd_lineage": "flat", "sd_spatial": "flat", "beta": "flat"}
METHODS = ("variational", "ep", "laplace")
QUANTITIES = ("sd_lineage", "sd_spatial", "share_lineage")
FAMILIES = ("bernoulli", "poisson")
# How each peer was asked to fit both kernels; none of them gives an interval for the share.
PEERS = {
    "glmmtmb": "glmmTMB, ML by Laplace",
    "spamm": "spaMM, ML by Laplace",
    "lme4": "lme4, ML by Laplace",
    "phyr": "phyr, PQL",
}


def reference_folder(given: Path | None) -> Path:
    """The folder of stored numbers: an argument, CELLFATE_REFERENCE, or `reference` beside CELLFATE_DATA."""
    if given is None and "CELLFATE_REFERENCE" in os.environ:
        given = Path(os.environ["CELLFATE_REFERENCE"])
    if given is None and "CELLFATE_DATA" in os.environ:
        given = Path(os.environ["CELLFATE_DATA"]).resolve().parent / "reference"
    if given is None or not (given / "problem_n300.csv").is_file():
        raise SystemExit(f"no stored problem in {given}: give --reference, or set CELLFATE_REFERENCE to its folder.")
    return given


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def problem(folder: Path) -> AnnData:
    """The stored cells, tree and positions."""
    obs = pd.read_csv(folder / "problem_n300.csv", index_col="id")
    adata = AnnData(obs=obs.drop(columns=["px", "py"]))
    adata.obsm["spatial"] = obs[["px", "py"]].to_numpy()
    cf.pp.set_tree(adata, (folder / "problem_n300.nwk").read_text())
    return adata


def decompose(adata: AnnData, family: str, threads: int, **settings: Any) -> dict[str, float]:
    """Fit the stored problem; what the whole call took. On a busy machine the processor's seconds say more."""
    began, cpu = time.perf_counter(), time.process_time()
    cf.tl.decompose(
        adata,
        f"{family}_both",
        family=family,
        formula="~ 1 + x",
        offset="offset" if family == "poisson" else None,
        lengthscale=LENGTHSCALE,
        rng=0,
        **settings,
    )
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "threads": threads}


def point(lineage: float, spatial: float) -> dict[str, float]:
    """Columns of a row that has variances and nothing else."""
    return {"sd_lineage": lineage**0.5, "sd_spatial": spatial**0.5, "share_lineage": lineage / (lineage + spatial)}


def posterior(draws: pd.DataFrame) -> dict[str, float]:
    """Columns of a row that has posterior draws: mean, sd and 95% interval of each sd and of the share of ancestry."""
    lineage, spatial = draws["variance_lineage"], draws["variance_spatial"]
    columns = (lineage**0.5, spatial**0.5, lineage / (lineage + spatial))
    return with_spread((x.mean(), x.std(), *np.quantile(x, [0.025, 0.975])) for x in columns)


def with_spread(found: Iterable[tuple[float, ...]]) -> dict[str, float]:
    """Columns of mean, sd and bounds, side by side."""
    return {
        f"{name}{of}": x
        for name, numbers in zip(QUANTITIES, found, strict=True)
        for of, x in zip(("", "_+-", "_lower", "_upper"), numbers, strict=True)
    }


def stored(folder: Path, family: str) -> Iterator[Mapping[str, object]]:
    """Rows of truth and MCMC."""
    truth = point(TRUTH["lineage"], TRUTH["spatial"])
    yield {"family": family, "what": "truth", **with_spread((truth[name], *3 * [np.nan]) for name in QUANTITIES)}
    mcmc = read_json(folder / f"mcmc_{family}_n300.json")
    share = mcmc["lineage_share"]
    # the file's own "2.5%" are ends of the shortest interval; quantiles of variances are those of sds, squared
    ends = {
        sd: [mcmc[v]["q"][q] ** 0.5 for q in ("2.5", "97.5")] for sd, v in (("sd_lin", "v_lin"), ("sd_spa", "v_spa"))
    }
    yield {
        "family": family,
        "what": f"MCMC, {mcmc['meta']['chains']} x {mcmc['meta']['keep']} draws (stored)",
        **with_spread(
            [
                *((mcmc[sd]["mean"], mcmc[sd]["std"], *of) for sd, of in ends.items()),
                (share["mean"], share["sd"], share["q"][0], share["q"][-1]),
            ]
        ),
    }


def ours(adata: AnnData, family: str, threads: int) -> Iterator[Mapping[str, object]]:
    """Rows of this package: a posterior and a maximum of the likelihood by each method."""
    for method in METHODS:
        took = decompose(adata, family, threads, method=method, priors=PRIORS)
        yield {"family": family, "what": f"cellfate, {method}", **posterior(cf.get.draws(adata)), **took}
    for method in ("variational", "laplace"):
        took = decompose(adata, family, threads, method=method, priors=FLAT, reml=False)
        mode = adata.uns["cellfate"]["mode"]
        maximum = point(mode["variance_lineage"], mode["variance_spatial"])
        yield {"family": family, "what": f"cellfate, ML by {method}", **maximum, **took}


def peers(folder: Path, family: str) -> Iterator[Mapping[str, object]]:
    """Rows of the peers. The file also holds fits of other problems; those of this one reach its maximum."""
    (best,) = (
        fit["logml_ml"]
        for fit in read_json(folder / "laplace_n300.json")
        if (fit["family"], fit["scenario"], fit["fit_ell"], len(fit["kernels"])) == (family, "both", False, 2)
    )
    for fit in read_json(folder / "peers_n300.json"):
        if fit["family"] == family and abs(fit["logml"] - best) < 1:
            row = {"family": family, "what": f"{PEERS[fit['tool']]} {fit['version']} (stored)"}
            yield {**row, **point(fit["v"]["lin"], fit["v"]["spa"]), "seconds": fit["sec"]}


def evidence(folder: Path, adata: AnnData) -> Iterator[Mapping[str, object]]:
    """Rows of log evidence at given variances, and what each method is off by."""
    forest = to_forest(adata.uns["tree"])
    components = {
        "lineage": Brownian(forest, forest.nodes_of(adata.obs_names)),
        "spatial": Matern32(adata.obsm["spatial"], lengthscale=LENGTHSCALE),
    }
    glmm = cf.GLMM("bernoulli", components, priors=PRIORS)
    y, design = adata.obs["bernoulli_both"].to_numpy(), np.column_stack([np.ones(adata.n_obs), adata.obs["x"]])
    for at in read_json(folder / "evidence_bernoulli_n300.json"):
        theta = {"variance_lineage": at["v_lin"], "variance_spatial": at["v_spa"]}
        row = {**theta, "exact": at["exact_is"], "its_error": at["mc_se"]}
        for method in METHODS:
            row[f"{method} - exact"] = glmm.evaluate(theta, y, design, method=method).free_energy - at["exact_is"]
        yield {**row, "stored laplace - exact": at["laplace"] - at["exact_is"]}


def attenuation(rows: list[Mapping[str, Any]]) -> str:
    """The variance that plain Laplace loses, against MCMC under the same priors, in a sentence."""

    def total(what: str) -> float:
        row = next(r for r in rows if r["family"] == "bernoulli" and str(r["what"]).startswith(what))
        return row["sd_lineage"] ** 2 + row["sd_spatial"] ** 2

    lost = {method: 1 - total(f"cellfate, {method}") / total("MCMC") for method in METHODS}
    return "bernoulli, sum of squared mean sds against MCMC: " + ", ".join(
        f"{method} {-100 * share:+.0f}%" for method, share in lost.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="folder of the stored problem and numbers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path, help="estimates and intervals side by side")
    parser.add_argument("--from", dest="table", type=Path, help="draw this table of an earlier run, run nothing")
    options = parser.parse_args()
    if options.table:
        if options.figure is None:
            parser.error("--from draws: name the file with --figure.")
        print(f"figure: {side_by_side(pd.read_csv(options.table), QUANTITIES, options.figure)}")
        return
    folder = reference_folder(options.reference)
    threads = set_threads(options.threads)
    cf.verbosity("warning")
    adata = problem(folder)
    warm_up()

    rows: list[Mapping[str, Any]] = []
    for family in FAMILIES:
        rows += [*stored(folder, family), *ours(adata, family, threads), *peers(folder, family)]
    proof = list(evidence(folder, adata))
    print("n = 300, tree and space, length-scale held; posterior mean +- sd, or a maximum of the likelihood\n")
    print(table([{k: x for k, x in row.items() if not k.endswith(("_lower", "_upper"))} for row in rows]), end="\n\n")
    print(attenuation(rows), end="\n\n")
    print("bernoulli, log evidence at given variances (fixed effects integrated out)\n")
    print(table(proof), end="\n\n")
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    print(f"written: {write('accuracy.csv', rows)}, {write('accuracy_evidence.csv', proof)}")
    if options.figure is not None:
        print(f"figure: {side_by_side(pd.DataFrame(rows), QUANTITIES, options.figure)}")


if __name__ == "__main__":
    main()
