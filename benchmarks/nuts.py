"""The same model by Hamiltonian Monte Carlo: NumPyro's No-U-Turn sampler on a simulated AnnData.

Nothing here comes from the package but the reading of the tree: covariances are built from path lengths and distances, the
prior is sd ~ half-normal(2), beta ~ N(0, 5^2), the kernels' own hyperparameters are held at the truth. As a script it makes the
frozen reference for components that are absent:

    python benchmarks/nuts.py tests/reference/absent.json
    python benchmarks/nuts.py tests/reference/fates.json --fates
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from anndata import AnnData
from numpyro.diagnostics import effective_sample_size, gelman_rubin
from numpyro.infer import MCMC, NUTS, init_to_value

import cellfate as cf
from cellfate.trees.convert import to_forest

GAPS = 2  # between the cut points of an ordinal fate
QUANTILES = (2.5, 25.0, 50.0, 75.0, 97.5)
SD_SCALE, BETA_SD = 2.0, 5.0


def lineage_covariance(adata: AnnData) -> np.ndarray:
    """Covariance (n, n) of the lineage kernel that `adata` was simulated with, from path lengths; not scaled."""
    truth = adata.uns["truth"]
    forest = to_forest(adata.uns["tree"])
    leaf = forest.nodes_of(adata.obs_names)
    ancestor = forest.mrca(leaf)
    shared = np.where(ancestor >= 0, forest.depth[ancestor], 0.0)
    depth = forest.depth[leaf]
    kernel = truth["lineage_kernel"]
    if kernel == "brownian":
        return shared
    if kernel == "ou":
        return np.where(ancestor >= 0, np.exp(-truth["alpha"] * (depth[:, None] + depth - 2 * shared)), 0.0)
    if kernel == "pagel":
        return truth["lambda"] * shared + (1 - truth["lambda"]) * np.diag(depth)
    return (forest.tree[leaf][:, None] == forest.tree[leaf]).astype(float)  # clone


def spatial_covariance(adata: AnnData) -> np.ndarray:
    """Covariance (n, n) of the spatial kernel that `adata` was simulated with; not scaled."""
    truth, xyz = adata.uns["truth"], adata.obsm["spatial"]
    ratio = np.linalg.norm(xyz[:, None] - xyz, axis=-1) / truth["lengthscale"]
    s = {"matern12": 1.0, "matern32": 3.0, "matern52": 5.0}.get(truth["spatial_kernel"], 1.0) ** 0.5 * ratio
    k = {
        "matern12": lambda: np.exp(-s),
        "matern32": lambda: (1 + s) * np.exp(-s),
        "matern52": lambda: (1 + s + s**2 / 3) * np.exp(-s),
        "rbf": lambda: np.exp(-(s**2) / 2),
    }[truth["spatial_kernel"]]()
    if "specimen" in adata.obs:
        code = adata.obs["specimen"].cat.codes.to_numpy()
        k *= code[:, None] == code
    return k


def unit_scale(k: np.ndarray) -> np.ndarray:
    """Divided by c(K) = tr(PKP)/(n - 1), the expected sample variance of a draw."""
    n = len(k)
    return k / ((np.trace(k) - k.sum() / n) / (n - 1))


def factor(k: np.ndarray) -> np.ndarray:
    """Lower factor of a covariance; a millionth of a millionth on the diagonal for cells that share a position."""
    return np.linalg.cholesky(k + 1e-12 * np.trace(k) / len(k) * np.eye(len(k)))


def glmm(
    y: jax.Array,
    design: jax.Array,
    factors: Mapping[str, jax.Array],
    family: str,
    link: str,
    trials: jax.Array | None,
) -> None:
    """Non-centered: effects are sd times the factor times standard normals, so that an sd of zero is an ordinary point."""
    beta = numpyro.sample("beta", dist.Normal(0.0, BETA_SD).expand([design.shape[1]]).to_event(1))
    eta = design @ beta
    for name, lower in factors.items():
        sd = numpyro.sample(f"sd_{name}", dist.HalfNormal(SD_SCALE))
        z = numpyro.sample(f"z_{name}", dist.Normal().expand([lower.shape[0]]).to_event(1))
        eta = eta + sd * (lower @ z)
    if family == "bernoulli" and link == "logit":
        likelihood: dist.Distribution = dist.BernoulliLogits(eta)
    elif family == "binomial" and link == "logit":
        likelihood = dist.BinomialLogits(eta, total_count=trials)
    elif family == "poisson":
        likelihood = dist.Poisson(jnp.exp(eta))
    elif family == "ordinal":
        gaps = numpyro.sample("gaps", dist.LogNormal(0.0, 1.0).expand([GAPS]).to_event(1))
        likelihood = dist.OrderedLogistic(eta, jnp.concatenate([jnp.zeros(1), jnp.cumsum(gaps)]))
    else:
        raise NotImplementedError(f"{family} with link {link} is not written here; use bernoulli, binomial or poisson.")
    numpyro.sample("y", likelihood, obs=y)


def several(y: jax.Array, factors: Mapping[str, jax.Array], fates: int) -> None:
    """A fate out of several: orthonormal contrasts, each with an intercept and effects of its own and the same variances."""
    h = np.linalg.svd(np.eye(fates) - 1 / fates)[0][:, : fates - 1]
    u = numpyro.sample("beta", dist.Normal(0.0, BETA_SD).expand([fates - 1]).to_event(1))[None]
    for name, lower in factors.items():
        sd = numpyro.sample(f"sd_{name}", dist.HalfNormal(SD_SCALE))
        z = numpyro.sample(f"z_{name}", dist.Normal().expand([lower.shape[0], fates - 1]).to_event(2))
        u = u + sd * (lower @ z)
    numpyro.sample("y", dist.CategoricalLogits(u @ h.T), obs=y)


def sample(
    adata: AnnData, *, draws: int = 10_000, warmup: int = 1_500, chains: int = 2, seed: int = 0, accept: float = 0.9
) -> dict[str, Any]:
    """Posterior draws of the standard deviations and fixed effects of a simulated AnnData, with their diagnostics."""
    jax.config.update("jax_enable_x64", True)
    truth = adata.uns["truth"]
    columns = [np.ones(adata.n_obs), *(adata.obs[name].to_numpy() for name in truth["coefficients"])]
    factors = {
        "lineage": jnp.asarray(factor(unit_scale(lineage_covariance(adata)))),
        "spatial": jnp.asarray(factor(unit_scale(spatial_covariance(adata)))),
    }
    trials = jnp.asarray(adata.obs["trials"].to_numpy()) if "trials" in adata.obs else None
    arguments = (jnp.asarray(adata.obs["fate"].to_numpy()), jnp.asarray(np.column_stack(columns)), factors)
    start = {"sd_lineage": 0.5, "sd_spatial": 0.5, "beta": np.zeros(len(columns))}
    fates = truth.get("n_fates")
    if fates is not None:
        start["beta"] = np.zeros(fates - 1)
        arguments = (arguments[0], factors, int(fates))
    if truth["family"] == "ordinal":
        start["gaps"] = np.ones(GAPS)
    kernel = NUTS(
        glmm if fates is None else several, target_accept_prob=accept, init_strategy=init_to_value(values=start)
    )
    mcmc = MCMC(
        kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method="vectorized", progress_bar=False
    )
    began = time.perf_counter()
    rest = (truth["family"], truth["link"], trials) if fates is None else ()
    mcmc.run(jax.random.PRNGKey(seed), *arguments, *rest, extra_fields=("num_steps",))
    found = {k: np.asarray(v) for k, v in mcmc.get_samples(group_by_chain=True).items() if not k.startswith("z_")}
    extra = mcmc.get_extra_fields()
    return {
        "draws": found,
        "seconds": time.perf_counter() - began,
        "divergences": int(np.asarray(extra["diverging"]).sum()),
        "mean_steps": float(np.asarray(extra["num_steps"]).mean()),
    }


def summarize(result: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, sd, quantiles, effective size and split R-hat of each standard deviation."""
    out = {}
    for name in ("sd_lineage", "sd_spatial"):
        x = result["draws"][name]
        out[name] = {
            "mean": float(x.mean()),
            "sd": float(x.std()),
            "quantiles": [float(q) for q in np.percentile(x, QUANTILES)],
            "effective_size": float(effective_sample_size(x)),
            "r_hat": float(gelman_rubin(x)),
        }
    return out


def checksum(adata: AnnData) -> str:
    """Of fates and of positions, which follow from the tree: whether a data set that was rebuilt is the same."""
    digest = hashlib.sha256(adata.obs["fate"].to_numpy().astype("<i8").tobytes())
    digest.update(np.round(1e6 * adata.obsm["spatial"]).astype("<i8").tobytes())
    return digest.hexdigest()


def piles_up(x: np.ndarray) -> bool:
    """Whether the density of a standard deviation is highest next to zero: its histogram falls over the bulk."""
    counts, _ = np.histogram(x, np.linspace(0, np.quantile(x, 0.9), 5))
    return bool((np.diff(counts) < 0).all())


def scan(family: str, absent: str, n: int, seeds: range) -> None:
    """Short chains over seeds, to choose the cases from."""
    for seed in seeds:
        adata = cf.datasets.simulate(**call(family, absent, n, seed))
        x = {k: v.ravel() for k, v in sample(adata, draws=800, warmup=400, chains=2)["draws"].items()}
        other = "lineage" if absent == "spatial" else "spatial"
        print(
            f"{family} without {absent}, n = {n}, seed {seed}: piles up {piles_up(x[f'sd_{absent}'])}, quantiles",
            np.percentile(x[f"sd_{absent}"], QUANTILES).round(3),
            f"{other}",
            np.percentile(x[f"sd_{other}"], QUANTILES).round(3),
            flush=True,
        )


def call(family: str, absent: str, n: int, seed: int) -> dict[str, Any]:
    """Arguments of `cf.datasets.simulate`."""
    variances = {"variance_lineage": 1.5, "variance_spatial": 1.5, f"variance_{absent}": 0.0}
    intercept = -1.0 if family == "poisson" else 0.0  # few counts: what is absent is then not sure to be
    return {"n": n, "family": family, **variances, "lengthscale": 0.5, "intercept": intercept, "rng": seed}


# Fates of other kinds, with both components there.
COMMON = {"n": 300, "variance_lineage": 1.5, "variance_spatial": 1.0, "lengthscale": 0.5}
FATES = {
    "ordinal": {"family": "ordinal", **COMMON, "intercept": 1.0, "rng": 1},
    "categorical": {"family": "categorical", **COMMON, "rng": 2},
}
# Seeds at which the posterior of the absent standard deviation is highest at zero, as short chains over seeds (`--scan`) found.
CASES = {
    "bernoulli without spatial": call("bernoulli", "spatial", 250, 0),
    "bernoulli without lineage": call("bernoulli", "lineage", 250, 1),
    "poisson without spatial": call("poisson", "spatial", 200, 0),
    "poisson without lineage": call("poisson", "lineage", 200, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--draws", type=int, default=15_000, help="per chain, after warm-up")
    parser.add_argument("--warmup", type=int, default=2_000)
    parser.add_argument("--chains", type=int, default=2)
    parser.add_argument("--scan", nargs=3, metavar=("FAMILY", "ABSENT", "N"), help="try four seeds with short chains")
    parser.add_argument(
        "--fates", action="store_true", help="ordinal and categorical fates in place of absent components"
    )
    options = parser.parse_args()
    if options.scan:
        family, absent, n = options.scan
        scan(family, absent, int(n), range(4))
        return
    cases = {}
    for name, arguments in (FATES if options.fates else CASES).items():
        adata = cf.datasets.simulate(**arguments)
        result = sample(adata, draws=options.draws, warmup=options.warmup, chains=options.chains)
        absent = next((part for part in ("lineage", "spatial") if arguments[f"variance_{part}"] == 0), None)
        cases[name] = {
            "simulate": arguments,
            "checksum": checksum(adata),
            **(
                {}
                if absent is None
                else {"absent": absent, "piles_up": piles_up(result["draws"][f"sd_{absent}"].ravel())}
            ),
            **summarize(result),
            "divergences": result["divergences"],
            "mean_steps": result["mean_steps"],
            "seconds": round(result["seconds"], 1),
        }
        print(name, json.dumps(cases[name], indent=1), flush=True)
    document = {
        "command": f"python benchmarks/nuts.py {options.out} --draws {options.draws} --warmup {options.warmup}"
        f" --chains {options.chains}",
        "model": f"sd ~ half-normal({SD_SCALE:g}), beta ~ normal(0, {BETA_SD:g}^2), length-scale held at the truth",
        "versions": {"numpyro": numpyro.__version__, "jax": jax.__version__, "python": platform.python_version()},
        "percentiles": list(QUANTILES),
        "cases": cases,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
