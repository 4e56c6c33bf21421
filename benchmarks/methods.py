"""Methods: each takes a problem and says what it estimated, in which time and memory.

A method runs in a process of its own, with its threads set before anything is loaded, so that its peak memory is its own and its
failure a row. What is on the clock is the fit, with standard errors where the method has them; not on it: loading libraries, a first
small fit of ours that warms up what Python compiles, making the kernels for those that need them handed over, and predicting the
field afterwards.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import forget_peak, peak_mib, set_threads, thread_environment
from problems import Problem, make

LARGEST_DENSE = 5000  # cells up to which a covariance matrix is handed over
MOST_ITERATIONS = 1000  # of GPBoost, its default
NEIGHBORS = 20


class CannotError(Exception):
    """A method has no answer to this problem, with the reason in words."""


@dataclass(frozen=True)
class Method:
    """`run` answers a problem; `can` says what part of it, in words, and `fields` what it has a kernel for.

    dense: which dense fit of ours it is to agree with, as options of :func:`cellfate`; maxima of a likelihood are compared with
    the maximum of the same one.
    """

    run: Callable[..., dict[str, Any]]
    can: str
    dense: Mapping[str, str]
    fields: tuple[str, ...] = ("lineage", "spatial")


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def took(since: tuple[float, float]) -> dict[str, float]:
    now = clock()
    return {"seconds": now[0] - since[0], "cpu_seconds": now[1] - since[1]}


# --- ours -----------------------------------------------------------------------------------------------------------------


def cellfate(
    problem: Problem,
    threads: int,
    *,
    engine: str = "auto",
    rank: str | None = None,
    method: str = "variational",
    device: str = "cpu",
    estimate: str = "posterior",
    lengthscale: str = "estimated",
) -> dict[str, Any]:
    """estimate: "posterior" (default priors, intervals from draws) or "maximum" of the likelihood; lengthscale: "given" or not."""
    import torch

    import cellfate as cf

    settings: dict[str, Any] = {"engine": engine, "method": method, "device": device}
    if rank is not None:
        settings["rank"] = int(rank)
    if estimate == "maximum":
        settings |= {"reml": False}

    def fit(this: Problem) -> tuple[Any, dict[str, float]]:
        kernels = this.kernels(lengthscale=this.lengthscale if lengthscale == "given" else None)
        if estimate == "maximum":
            flat = ["beta", *(f"sd_{name}" for name in kernels)]
            flat += ["sd_residual"] if this.family == "gaussian" else []
            flat += ["lengthscale_spatial"] if "spatial" in kernels and lengthscale != "given" else []
            settings["priors"] = dict.fromkeys(flat, "flat")
        began = clock()
        found = cf.GLMM(this.family, kernels, **settings).fit(this.y, this.design, rng=0)
        if device != "cpu":
            torch.cuda.synchronize()
        return found, took(began)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cf.CellfateWarning)  # the status keeps them
        fit(make(problem.name, min(problem.n, 100), seed=problem.seed + 1))
        before = start_memory()
        found, spent = fit(problem)
    if estimate == "maximum":
        estimates = {name: {"estimate": value} for name, value in found.mode.items()}
    else:
        estimates = {name: summary(x) for name, x in found.draws.items()}
    peak = {"peak_MiB": peak_mib(), "before_MiB": before}
    if device != "cpu":
        peak["peak_device_MiB"] = torch.cuda.max_memory_allocated() / 2**20
    told = {name: x for name, x in found.diagnostics.items() if name not in ("status", "seconds")}
    field = sum(mean for mean, _ in found.effects.values())
    status = found.diagnostics["status"]
    return spent | peak | {"estimates": estimates, "field": field, "status": status, "details": told}


def summary(draws: np.ndarray) -> dict[str, float]:
    lower, upper = np.quantile(draws, [0.025, 0.975])
    return {"estimate": draws.mean(), "sd": draws.std(), "lower": lower, "upper": upper}


def start_memory() -> float:
    """What the process holds before a fit; the peak is counted from here."""
    forget_peak()
    return peak_mib()


# --- peers ----------------------------------------------------------------------------------------------------------------


def gpboost(problem: Problem, threads: int, *, neighbors: str = str(NEIGHBORS)) -> dict[str, Any]:
    """Vecchia-Laplace with Cholesky factors. Its variance is the field's own: times c(K) it is the one among these cells."""
    import gpboost as gpb

    before, began = start_memory(), clock()
    model = gpb.GPModel(
        gp_coords=problem.coordinates,
        cov_function="matern",
        cov_fct_shape=1.5,
        likelihood="bernoulli_logit" if problem.family == "bernoulli" else "gaussian",
        gp_approx="vecchia",
        num_neighbors=int(neighbors),
        matrix_inversion_method="cholesky",
        num_parallel_threads=threads,
        seed=0,
    )
    model.set_optim_params(params={"maxit": MOST_ITERATIONS})
    model.fit(y=problem.y, X=problem.design)
    found = model.get_cov_pars(std_err=True, format_pandas=False)  # errors are computed here, so this is on the clock
    spent = took(began)
    peak = {"peak_MiB": peak_mib(), "before_MiB": before}
    field = np.asarray(model.predict_training_data_random_effects()).ravel()
    (variance, lengthscale), (variance_sd, lengthscale_sd) = found[:, -2:]
    scale = problem.spatial_scale(lengthscale, np.random.default_rng(0))
    estimates = {
        "variance_spatial": {"estimate": scale * variance, "sd": scale * variance_sd},
        "lengthscale_spatial": {"estimate": lengthscale, "sd": lengthscale_sd},
    }
    if problem.family == "gaussian":
        estimates["variance_residual"] = {"estimate": found[0, 0], "sd": found[1, 0]}
    details = {"iterations": model._get_num_optim_iter(), "variance_of_field": variance, "scale": scale}
    status = "converged" if details["iterations"] < MOST_ITERATIONS else "stopped after the most iterations"
    return spent | peak | {"estimates": estimates, "field": field, "status": status, "details": details}


def glimix(problem: Problem, threads: int) -> dict[str, Any]:
    """Expectation propagation over given covariances; for a gaussian response exact."""
    from glimix_core.cov import EyeCov, GivenCov, SumCov
    from glimix_core.ggp import ExpFamGP
    from glimix_core.gp import GP
    from glimix_core.mean import OffsetMean

    given = covariances(problem)
    before, began = start_memory(), clock()
    terms = {name: GivenCov(k) for name, k in given.items()}
    offset = OffsetMean(problem.n)
    if problem.family == "gaussian":
        terms["residual"] = EyeCov(problem.n)
        model = GP(problem.y, offset, SumCov(list(terms.values())))
    else:
        model = ExpFamGP(problem.y, "bernoulli", offset, SumCov(list(terms.values())))
    model.fit(verbose=False)
    spent = took(began)
    peak = {"peak_MiB": peak_mib(), "before_MiB": before}
    estimates = {f"variance_{name}": {"estimate": term.scale} for name, term in terms.items()}
    return spent | peak | {"estimates": estimates, "field": None, "status": "converged", "details": {}}


def through_r(package: str) -> Callable[[Problem, int], dict[str, Any]]:
    """A package of R, in `peers.R`."""

    def run(problem: Problem, threads: int) -> dict[str, Any]:
        if shutil.which("Rscript") is None:
            raise ModuleNotFoundError("there is no Rscript here")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for kernel, matrix in covariances(problem).items():
                matrix.tofile(folder / f"{kernel}.bin")
            problem.y.tofile(folder / "y.bin")
            (folder / "names.txt").write_text("\n".join(problem.fields) + "\n")
            command = ["Rscript", "--vanilla", str(Path(__file__).with_name("peers.R"))]
            done = subprocess.run(
                [*command, package, name, problem.family], capture_output=True, text=True, check=False
            )
            if done.returncode:
                if "there is no package" in done.stderr:
                    raise ModuleNotFoundError(f"R has no package {package}")
                raise RuntimeError(" ".join(done.stderr.split())[-300:])
            said = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
            field = np.fromfile(folder / "field.bin")
        numbers = {name: float(value) for name, value in said.items()}
        estimates = {
            name: {"estimate": value} | ({"sd": numbers[f"{name}_sd"]} if f"{name}_sd" in numbers else {})
            for name, value in numbers.items()
            if name.startswith("variance_") and not name.endswith("_sd")
        }
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
        spent = {"seconds": numbers["seconds"], "cpu_seconds": numbers["cpu_seconds"], "peak_MiB": peak}
        status = "converged" if numbers["converged"] == 1 else "not converged, by its own account"
        return spent | {"estimates": estimates, "field": field, "status": status, "details": {}}

    return run


def covariances(problem: Problem) -> dict[str, np.ndarray]:
    if problem.n > LARGEST_DENSE:
        raise CannotError(f"needs dense covariance matrices; not tried above {LARGEST_DENSE} cells")
    return problem.covariances()


MAXIMUM = {"estimate": "maximum", "method": "laplace"}
GIVEN = {**MAXIMUM, "lengthscale": "given"}
HANDED = "both kernels handed over as matrices, length-scale held at the truth; "
METHODS = {
    "cellfate": Method(cellfate, "tree and space, length-scale estimated, posterior with intervals", {}),
    "gpboost": Method(
        gpboost,
        "space only, length-scale estimated, ML by Vecchia-Laplace, standard errors",
        MAXIMUM,
        ("spatial",),
    ),
    "glmmTMB": Method(through_r("glmmTMB"), HANDED + "ML by Laplace, standard errors", GIVEN),
    "lme4": Method(through_r("lme4"), HANDED + "ML by Laplace, no standard errors of variances", GIVEN),
    "spaMM": Method(through_r("spaMM"), HANDED + "ML by Laplace, no standard errors of variances", GIVEN),
    "glimix-core": Method(
        glimix, HANDED + "ML by expectation propagation, no standard errors", {**GIVEN, "method": "ep"}
    ),
}


# --- one run in a process of its own --------------------------------------------------------------------------------------


def parse(name: str) -> tuple[str, dict[str, str]]:
    """A method and its options from "cellfate:engine=dense,rank=256"."""
    method, _, options = name.partition(":")
    if method not in METHODS:
        raise SystemExit(f"unknown method {method!r}; known: {', '.join(METHODS)}.")
    return method, dict(option.split("=", 1) for option in options.split(",") if option)


def measure(name: str, problem: Path, threads: int, limit: float) -> dict[str, Any]:
    """Run a method on a stored problem; whatever goes wrong is in the status, with no seconds."""
    parse(name)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, __file__, name, str(problem), str(threads), str(out)]
        process = subprocess.Popen(
            command,
            env=thread_environment(threads),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,
            text=True,
        )
        try:
            _, said = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"status": f"stopped after {limit:g} s"}
        finally:
            if process.poll() is None:  # out of time, or interrupted
                os.killpg(process.pid, signal.SIGKILL)  # its own group, so what it started goes with it
                process.communicate()
        if not out.exists():
            last = (said.strip().splitlines() or ["no message"])[-1]
            return {"status": f"died with code {process.returncode}: {last[-200:]}"}
        return json.loads(out.read_text())


def answer(name: str, problem: Problem, threads: int) -> dict[str, Any]:
    """Run a method here, and compare its field with the true one."""
    method, options = parse(name)
    try:
        lacking = [field for field in problem.fields if field not in METHODS[method].fields]
        if lacking:
            raise CannotError(f"has no kernel for {', '.join(lacking)}")
        result = METHODS[method].run(problem, threads, **options)
    except CannotError as why:
        return {"status": f"cannot: {why}"}
    except Exception as why:  # a peer may fail in any way; the row says how
        if isinstance(why, ModuleNotFoundError) and method != "cellfate":
            return {"status": f"absent: {why}"}
        return {"status": f"failed: {type(why).__name__}: {' '.join(str(why).split())[:300]}"}
    field = result.pop("field")
    if field is not None:
        apart = np.asarray(field) - problem.effect
        result["error_field"] = float(apart.std() / problem.effect.std())
    return result


def main() -> None:
    name, problem, threads, out = sys.argv[1:]
    result = answer(name, Problem.load(Path(problem)), set_threads(int(threads)))
    Path(out).write_text(json.dumps(result, default=float))


if __name__ == "__main__":
    main()
