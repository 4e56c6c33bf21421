"""Ordinal and categorical fates against the frozen NUTS runs of `benchmarks/nuts.py --fates`."""

import json
import math
from pathlib import Path

import pytest

import cellfate as cf

REFERENCE = json.loads((Path(__file__).parent.parent / "reference" / "fates.json").read_text())["cases"]


@pytest.mark.parametrize("name", REFERENCE)
def test_standard_deviations_are_those_of_long_sampling(name):
    case = REFERENCE[name]
    adata = cf.datasets.simulate(**case["simulate"])
    held = case["simulate"]["lengthscale"]
    cf.tl.decompose(adata, "fate", family=name, lengthscale=held, priors={"beta": ("normal", 5.0)}, rng=0)
    draws = cf.get.draws(adata)
    for part in ("lineage", "spatial"):
        known, sd = case[f"sd_{part}"], draws[f"variance_{part}"] ** 0.5
        error = known["sd"] / math.sqrt(known["effective_size"])  # of the sampler's mean
        assert abs(sd.mean() - known["mean"]) < 0.1 * known["mean"] + 2 * error
        assert sd.std(ddof=0) == pytest.approx(known["sd"], rel=0.15)
