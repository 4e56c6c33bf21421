"""Random intercepts: maximum-likelihood estimates that lme4 and glmmTMB give for two data sets of the textbooks."""

from dataclasses import dataclass, field

import pandas as pd
import pytest
from anndata import AnnData

import cellfate as cf

WITHIN = 0.005


@dataclass(frozen=True)
class Published:
    file: str
    fate: str
    family: str
    formula: str
    groups: list[str]
    levels: list[str]  # columns that are names, though they look like numbers
    mode: dict[str, float]
    log_likelihood: float
    more: dict[str, object] = field(default_factory=dict)


CBPP = Published(
    file="cbpp.csv",
    fate="incidence",
    family="binomial",
    formula="~ 1 + C(period)",
    groups=["herd"],
    levels=["herd", "period"],
    mode={
        "variance_herd": 0.4125,
        "beta[Intercept]": -1.3985,
        "beta[C(period)[T.2]]": -0.9923,
        "beta[C(period)[T.3]]": -1.1287,
        "beta[C(period)[T.4]]": -1.5803,
    },
    log_likelihood=-92.0263,
    more={"trials": "size"},
)
POISSON = Published(
    file="grouseticks.csv",
    fate="TICKS",
    family="poisson",
    formula="~ 1 + C(YEAR) + cHEIGHT",
    groups=["BROOD", "LOCATION", "INDEX"],
    levels=["BROOD", "LOCATION", "INDEX", "YEAR"],
    mode={
        "variance_BROOD": 0.5626,
        "variance_LOCATION": 0.2795,
        "variance_INDEX": 0.2932,
        "beta[Intercept]": 0.3728,
        "beta[C(YEAR)[T.96]]": 1.1804,
        "beta[C(YEAR)[T.97]]": -0.9787,
        "beta[cHEIGHT]": -0.02376,
    },
    log_likelihood=-890.2713,
)
NEGATIVE_BINOMIAL = Published(
    file="grouseticks.csv",
    fate="TICKS",
    family="negative_binomial",
    formula="~ 1 + C(YEAR) + cHEIGHT",
    groups=["BROOD", "LOCATION"],
    levels=["BROOD", "LOCATION", "YEAR"],
    mode={"variance_BROOD": 0.4872, "variance_LOCATION": 0.3521, "dispersion": 1 / 3.293},
    log_likelihood=-888.9084,
)


@pytest.mark.slow
@pytest.mark.parametrize("published", [CBPP, POISSON, NEGATIVE_BINOMIAL], ids=lambda p: p.family)
def test_laplace_is_the_published_maximum_likelihood(published, reference_dir):
    obs = pd.read_csv(reference_dir / published.file, dtype=dict.fromkeys(published.levels, str))
    adata = AnnData(obs=obs.set_axis([f"row{i}" for i in range(len(obs))]))
    estimated = [f"sd_{group}" for group in published.groups] + ["beta"]
    if "dispersion" in published.mode:
        estimated.append("dispersion")
    cf.tl.decompose(
        adata,
        published.fate,
        family=published.family,
        formula=published.formula,
        lineage=None,
        spatial=None,
        groups=published.groups,
        priors=dict.fromkeys(estimated, "flat"),
        reml=False,
        method="laplace",
        rng=0,
        **published.more,
    )
    fit = adata.uns["cellfate"]
    assert {name: fit["mode"][name] for name in published.mode} == pytest.approx(published.mode, rel=WITHIN)
    assert fit["free_energy"] == pytest.approx(published.log_likelihood, abs=1e-3)
