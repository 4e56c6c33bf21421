"""A result in the documented layout, made without a fit: draws first, then every table as a summary of those draws."""

import numpy as np
import pandas as pd
from anndata import AnnData

from cellfate import _keys


def summary(x, name):
    lower, upper = np.quantile(x, [0.025, 0.975])
    return {name: x.mean(), f"{name}_sd": x.std(ddof=1), f"{name}_lower": lower, f"{name}_upper": upper}


def partition(variances, response, scale):
    """Rows of `components` and `shares` from draws of each component's variance."""
    total = sum(variances.values())
    components = [
        {"scale": scale, "response": response, "component": c} | summary(v, "variance") for c, v in variances.items()
    ]
    shares = [
        {"scale": scale, "response": response, "component": c} | summary(v / total, "share")
        for c, v in variances.items()
    ]
    return components, shares


def synthetic_result(
    n=300, *, dims=2, specimens=1, response="fate", family="bernoulli", link="logit", groups=(), key="cellfate", seed=0
):
    rng = np.random.default_rng(seed)
    s = 400
    latent = {
        "lineage": np.abs(rng.normal(1.0, 0.35, s)) ** 2,
        "spatial": np.abs(rng.normal(0.0, 0.5, s)) ** 2,  # piles up at zero, as an absent component does
        **{g: np.abs(rng.normal(0.6, 0.2, s)) ** 2 for g in groups},
        "fixed": rng.gamma(20, 0.01, s),
    }
    distribution = {"distribution": np.full(s, np.pi**2 / 3)}
    shared = {"shared": -0.25 * np.minimum(latent["lineage"], latent["spatial"])}
    rows = [
        partition(latent, response, "latent"),
        partition(latent | distribution, response, "link"),
        partition({k: v * rng.normal(1, 0.05, s) for k, v in latent.items()} | shared, response, "realized"),
    ]
    total = sum(latent.values())
    beta = {"Intercept": rng.normal(-0.3, 0.5, s), "x": rng.normal(0.45, 0.1, s)}

    names = [f"cell{i}" for i in range(n)]
    angle = rng.normal(size=(n, 3))
    coordinates = (angle / np.linalg.norm(angle, axis=1, keepdims=True) * rng.random((n, 1)) ** (1 / 3))[:, :dims]
    coordinates = coordinates * np.array([60.0, 40.0, 35.0])[:dims]
    embryo = rng.integers(specimens, size=n)
    fields = {
        "lineage": 1.5 * np.sign(coordinates[:, 0]) * rng.random(n),
        "spatial": np.sin(coordinates[:, 0] / 20) * np.cos(coordinates[:, 1] / 15),
    }
    fields |= {g: rng.normal(size=4)[rng.integers(4, size=n)] for g in groups}
    effects = pd.DataFrame(
        {f"{c}_{what}": v if what == "mean" else np.full(n, 0.4) for c, v in fields.items() for what in ("mean", "sd")},
        index=names,
    )
    effects.iloc[:: max(2, n // 10)] = np.nan  # cells left out of the fit

    adata = AnnData(obs=pd.DataFrame({"embryo": [f"embryo {e + 1}" for e in embryo]}, index=names).astype("category"))
    adata.obsm["spatial"] = coordinates
    adata.obsm[_keys.effects(key)] = effects
    adata.uns[key] = {
        _keys.PARAMS: {"fate": response, "family": family, "link": link}
        | ({"library_key": "embryo"} if specimens > 1 else {}),
        _keys.COMPONENTS: pd.DataFrame([row for components, _ in rows for row in components]),
        _keys.SHARES: pd.DataFrame([row for _, shares in rows for row in shares]),
        _keys.FIXED_EFFECTS: pd.DataFrame(
            {
                "term": list(beta),
                "estimate": [b.mean() for b in beta.values()],
                "sd": [b.std(ddof=1) for b in beta.values()],
                "lower": [np.quantile(b, 0.025) for b in beta.values()],
                "upper": [np.quantile(b, 0.975) for b in beta.values()],
            }
        ),
        _keys.DRAWS: pd.DataFrame(
            {f"variance_{c}": v for c, v in latent.items() if c != "fixed"}
            | {"lengthscale_spatial": rng.lognormal(2, 0.4, s)}
            | {f"beta[{t}]": b for t, b in beta.items()}
            | {f"share_{c}": v / total for c, v in latent.items()}
        ),
        _keys.MODE: {"variance_lineage": 0.9, "variance_spatial": 0.01},
        _keys.FREE_ENERGY: -180.3,
        _keys.LOG_EVIDENCE: -182.9,
        _keys.DIAGNOSTICS: {"status": "converged", "pareto_k": 0.21, "engine": "dense", "seconds": 1.5},
    }
    return adata
