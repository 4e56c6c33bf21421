"""Do 95% intervals hold the truth 95% of the time? Simulated sets with two effects, each fitted as a user would.

    python benchmarks/calibration.py                 # quick form: 50 sets each of bernoulli and poisson, n = 200
    python benchmarks/calibration.py --sets 200 --families gaussian bernoulli poisson negative_binomial categorical \
        --inheritances 0 0.5 0.9 --workers 2 --out calibration.csv --figure calibration.png
    python benchmarks/calibration.py --from bernoulli_sets.csv poisson_sets.csv --out joint.csv --figure joint.png   # runs nothing

Of every set the truth is drawn anew. `--truth range` (the default): both standard deviations uniform on 0.3 to 1.8, the length-scale
log-uniform on 0.25 to 1 (positions have unit variance), intercept 0, positions half inherited unless said otherwise; fitted with the
package's default priors. Truths are then not draws from the prior, half-normal(2), so that the coverage expected of a perfect
posterior is near 95%, not equal to it. `--truth prior`: everything is drawn from the very priors of the fit, where a perfect posterior
covers exactly 95%, whatever the data; what is missing is then the approximation's. Sets without two cells of each fate are drawn
again, truth included, which leaves that so. Simulated categorical sets have no intercepts, and get a prior that says so. The rank of
the truth among the draws is then uniform, too (`ranks.py`): `rank_p` is a p of that, `rank_mean` is 0.5 and `rank_spread` 1 if it is.
With truths from a range ranks mean nothing and are left out.

The shares are variance_lineage / (variance_lineage + variance_spatial) and its complement, on the latent scale, so that they are
covered together; of a gaussian response the residual is in the sum, too. The Monte-Carlo error of a coverage x/N is
sqrt(p(1-p)/(N+4)), p = (x+2)/(N+4) (Agresti and Coull 1998). Seeds belong to the sets, so that the result does not depend on the
number of workers. These are processes of this machine, or with `--scheduler tcp://...` those of a Dask cluster, which need cellfate.

Beside FILE.csv, FILE_sets.csv holds a row per set, begun anew by a run and written as sets finish. With `--resume` a run that was
stopped goes on from there: sets that the file has with the same settings are not fitted again, and the table is of all that it holds.
A set that cannot be fitted is a row whose status says why, and is counted as `failed` in the table.
`--figure` draws the coverage of shares, and beside it, as NAME_ranks, the distribution of ranks where truths are from the prior.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from figures import coverage, rank_differences
from machine import RESULTS, machine, set_threads, table
from ranks import uniformity
from workers import add_options, workers

import cellfate as cf

SD, LENGTHSCALE = (0.3, 1.8), (0.25, 1.0)
PRIORS = {
    "sd_lineage": ("half_normal", 1.0),
    "sd_spatial": ("half_normal", 1.0),
    "lengthscale_spatial": ("lognormal", 0.5, 0.4),
    "beta": ("normal", 1.0),
}
OWN_PRIORS: dict[str, dict[str, tuple[Any, ...]]] = {  # what a family has of its own, with truths from the prior
    "gaussian": {"sd_residual": ("lognormal", 0.7, 0.4)},
    "negative_binomial": {"dispersion": ("lognormal", 0.5, 0.5)},
    "beta": {"precision": ("lognormal", 10.0, 0.5)},
    "ordinal": {"gap_1": ("lognormal", 1.0, 0.4), "gap_2": ("lognormal", 1.0, 0.4)},
    "categorical": {"beta": ("normal", 0.01)},  # simulated sets have no intercepts
}
QUANTITIES = ("share_lineage", "share_spatial", "variance_lineage", "variance_spatial", "lengthscale_spatial")
RANKED = QUANTITIES[:1] + QUANTITIES[2:]  # the ranks of two shares mirror each other
KEYS = ("n", "truth", "method", "seed", "family", "inheritance", "set")  # what a set is
LEAST = 2  # cells that the rarest fate must have for a fit to be possible
LEVELS = {"bernoulli": 2, "categorical": 3, "ordinal": 4}  # fates of a set
FAILED = "failed"  # how the status of a set without a fit begins


@dataclass(frozen=True)
class Set:
    """One simulated set: plain data, so that it can be sent to a worker."""

    family: str
    inheritance: float
    index: int
    n: int
    truth: str
    method: str
    seed: int  # of the whole run
    stream: np.random.SeedSequence

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.n, self.truth, self.method, self.seed, self.family, self.inheritance, self.index)


def draw_truth(how: str, family: str, rng: np.random.Generator) -> dict[str, Any]:
    """Arguments of `cf.datasets.simulate`."""
    own: dict[str, Any] = {}
    if how == "prior":
        lineage, spatial = np.abs(rng.standard_normal(2)) * PRIORS["sd_lineage"][1]
        lengthscale = lognormal(PRIORS["lengthscale_spatial"], rng)
        intercept = PRIORS["beta"][1] * rng.standard_normal()
        drawn = {name: lognormal(prior, rng) for name, prior in OWN_PRIORS.get(family, {}).items() if name != "beta"}
        own = {name: drawn[name] for name in ("dispersion", "precision") if name in drawn}
        if family == "gaussian":
            own["variance_residual"] = drawn["sd_residual"] ** 2
        if family == "ordinal":
            own["cut_points"] = (0.0, *np.cumsum(list(drawn.values())).tolist())
    else:
        lineage, spatial = rng.uniform(*SD, 2)
        lengthscale, intercept = np.exp(rng.uniform(*np.log(LENGTHSCALE))), 0.0
    return {
        "variance_lineage": float(lineage**2),
        "variance_spatial": float(spatial**2),
        "lengthscale": float(lengthscale),
        "intercept": float(intercept),
        **own,
    }


def lognormal(prior: tuple[Any, ...], rng: np.random.Generator) -> float:
    _, median, sd = prior
    return float(median * np.exp(sd * rng.standard_normal()))


def fewest(fate: pd.Series, levels: int) -> int:
    """Cells that the rarest of so many fates has."""
    counts = fate.value_counts()
    return int(counts.min()) if len(counts) == levels else 0


def columns() -> list[str]:
    """Those of the table of sets."""
    of_each = [f"{name}_{what}" for name in QUANTITIES for what in ("truth", "mean", "lower", "upper", "rank")]
    timed = ("redrawn", "seconds", "cpu_seconds")
    return [*KEYS, *timed, *of_each, "draws", "pareto_k", "status", "threads", *machine()]


def fit_or_say(task: Set) -> dict[str, Any]:
    """The row of a set; one that cannot be fitted has the reason as its status, and the others go on."""
    try:
        row = fit(task)
    except Exception as error:
        row = dict(zip(KEYS, task.key, strict=True)) | {"status": f"{FAILED}: {type(error).__name__}: {error}"}
        row |= {"threads": torch.get_num_threads(), **machine()}
    return {name: row.get(name) for name in columns()}


def fit(task: Set) -> dict[str, Any]:
    """Simulate a set, fit it, and compare its intervals with the truth."""
    for_data, for_fit = task.stream.spawn(2)
    rng, redrawn = np.random.default_rng(for_data), 0
    while True:
        truth = draw_truth(task.truth, task.family, rng)
        adata = cf.datasets.simulate(task.n, family=task.family, inheritance=task.inheritance, rng=rng, **truth)
        levels = LEVELS.get(task.family)
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
            priors=PRIORS | OWN_PRIORS.get(task.family, {}) if task.truth == "prior" else None,
            rng=np.random.default_rng(for_fit),
        )
    row: dict[str, Any] = dict(zip(KEYS, task.key, strict=True))
    row |= {"redrawn": redrawn, "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    # of a gaussian response the residual is a part of what divides
    total = truth["variance_lineage"] + truth["variance_spatial"] + adata.uns["truth"].get("variance_residual", 0.0)
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
    row |= {"draws": len(draws), "pareto_k": diagnostics["pareto_k"], "status": diagnostics["status"]}
    return row | {"threads": torch.get_num_threads(), **machine()}


def summarize(sets: pd.DataFrame) -> list[Mapping[str, object]]:
    """A row per setting, family, inheritance and quantity, and on what it was made."""
    rows = []
    groups = ["n", "truth", "method", "family", "inheritance"]
    failed = sets["status"].astype(str).str.startswith(FAILED)
    for group, of_family in sets[~failed].groupby(groups, sort=False):
        without = int((sets.loc[failed, groups] == list(group)).all(axis=1).sum())
        made = {name: " and ".join(dict.fromkeys(of_family[name].astype(str))) for name in ("threads", *machine())}
        for name in QUANTITIES:
            true, mean = of_family[f"{name}_truth"], of_family[f"{name}_mean"]
            lower, upper = of_family[f"{name}_lower"], of_family[f"{name}_upper"]
            inside, n = int(((lower <= true) & (true <= upper)).sum()), len(of_family)
            p = (inside + 2) / (n + 4)
            ranks = {}
            if "prior" in group and name in RANKED:
                found = uniformity(of_family[f"{name}_rank"].to_numpy())
                ranks = {"rank_p": found.p, "rank_mean": found.mean, "rank_spread": found.spread}
            rows.append(
                {
                    **dict(zip(groups, group, strict=True)),
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
                    "failed": without,
                    "warned": int((of_family["status"] != "converged").sum()),
                    **ranks,
                    **made,
                }
            )
    return rows


def tasks(options: argparse.Namespace) -> list[Set]:
    """Every set with a seed of its own: by family and number, whatever else is run."""
    out = []
    for family in options.families:
        name = np.frombuffer(family.encode(), np.uint8).tolist()
        for inheritance in options.inheritances:
            streams = np.random.SeedSequence([options.seed, *name]).spawn(
                options.sets
            )  # the same trees for each inheritance
            settings = (options.n, options.truth, options.method, options.seed)
            out += [Set(family, inheritance, i, *settings, stream) for i, stream in enumerate(streams)]
    return out


def keep(rows: Iterator[dict[str, Any]], path: Path) -> None:
    """Append each row to a table when it is there, so that a run that is stopped has lost what it was at, and no more."""
    for row in rows:
        row = row | {name: repr(row[name]) for name in KEYS if isinstance(row[name], float)}  # found again by it
        pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False, float_format="%.6g")


def finished(path: Path) -> set[tuple[Any, ...]]:
    """The sets that a table has; a row that was being written when the run was stopped is taken out."""
    text = path.read_text()
    path.write_text(text[: text.rfind("\n") + 1])
    if not path.stat().st_size:
        path.unlink()
        return set()
    return set(read_sets([path])[list(KEYS)].itertuples(index=False, name=None))


def read_sets(paths: Sequence[Path]) -> pd.DataFrame:
    """Rows of sets of one or several runs, each set once."""
    tables = {path: pd.read_csv(path, float_precision="round_trip") for path in paths}
    for path, of in tables.items():
        if missing := [key for key in KEYS if key not in of]:
            raise SystemExit(
                f"{path} has no columns {', '.join(missing)}: name a file of sets, FILE_sets.csv, of this version."
            )
    return pd.concat(tables.values(), ignore_index=True).drop_duplicates(list(KEYS))


def report(sets: pd.DataFrame, out: Path | None, figure: Path | None) -> None:
    """Print the table of sets, write it and draw it."""
    rows = summarize(sets)
    for row in sets[sets["status"].astype(str).str.startswith(FAILED)].to_dict("records"):
        print(f"{row['family']}, inheritance {row['inheritance']}, set {row['set']}: {row['status']}")
    print(table([{k: v for k, v in row.items() if k not in machine()} for row in rows]), end="\n\n")
    p = [row["rank_p"] for row in rows if "rank_p" in row]
    if p:
        print(f"smallest rank_p of {len(p)}: {min(p):.4f}, times {len(p)} {min(1.0, min(p) * len(p)):.3f}")
    print(", ".join(f"{k} {' and '.join(dict.fromkeys(str(row[k]) for row in rows))}" for k in machine()))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(out, index=False, float_format="%.6g")
        print(f"written: {out}")
    if figure is not None:
        print(f"figure: {coverage(pd.DataFrame(rows), figure)}")
        from_prior = sets[sets["truth"] == "prior"]
        for (n, method), of in from_prior.groupby(["n", "method"], sort=False):
            more = f"_{method}_{n}" if len(from_prior[["n", "method"]].drop_duplicates()) > 1 else ""
            path = figure.with_name(f"{figure.stem}_ranks{more}{figure.suffix}")
            print(f"figure: {rank_differences(of, RANKED, path)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=50, help="per family and inheritance")
    parser.add_argument("--n", type=int, default=200, help="cells of a set")
    parser.add_argument("--families", nargs="+", default=["bernoulli", "poisson"])
    parser.add_argument("--inheritances", nargs="+", type=float, default=[0.5], help="of positions, 0 to 1")
    parser.add_argument("--truth", choices=("range", "prior"), default="range")
    parser.add_argument("--method", default="variational", help="variational, laplace or ep")
    add_options(parser)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--out", type=Path, help="the table; results/calibration_quick.csv, or with --from none")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--resume", action="store_true", help="skip sets that the file of sets already has")
    parser.add_argument(
        "--from", dest="tables", nargs="+", type=Path, metavar="FILE_sets.csv", help="join these, run nothing"
    )
    options = parser.parse_args()
    if options.tables:
        report(read_sets(options.tables), options.out, options.figure)
        return
    out = options.out or RESULTS / "calibration_quick.csv"
    each = out.with_name(f"{out.stem}_sets.csv")
    each.parent.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        each.unlink(missing_ok=True)
    have = finished(each) if each.exists() else set()
    set_threads(options.threads)  # before the workers start, which inherit it
    todo = [task for task in tasks(options) if task.key not in have]
    if todo:
        with workers(options) as results:
            keep(results(fit_or_say, todo), each)
    report(read_sets([each]), out, options.figure)


if __name__ == "__main__":
    main()
