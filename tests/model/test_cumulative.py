"""Distribution functions against sums and integrals of the families' own densities."""

import numpy as np
import pytest
import torch
from scipy import integrate

from cellfate.errors import DataError
from cellfate.model.catalog import get_family
from cellfate.model.cumulative import cumulative
from cellfate.model.families import Outcome
from tests.problem import double

ETA = 0.4
DISCRETE = {
    "bernoulli": ({}, None, 1),
    "binomial": ({}, 7.0, 5),
    "poisson": ({}, None, 4),
    "negative_binomial": ({"dispersion": 0.7}, None, 4),
}
CONTINUOUS = {"gaussian": ({"variance_residual": 1.7}, -40.0, 1.1), "beta": ({"precision": 6.0}, 0.0, 0.35)}


def density(family, y, trials, own):
    found = get_family(family)
    phi = double([next(iter(own.values()))]) if own else None
    outcome = Outcome(double([y]), None if trials is None else double([trials]))
    return float(torch.exp(found.log_prob(outcome, double([ETA]), phi))), float(found.inverse_link(double([ETA])))


@pytest.mark.parametrize("family", DISCRETE)
def test_discrete(family):
    own, trials, y = DISCRETE[family]
    parts = [density(family, k, trials, own) for k in range(y + 1)]
    mean = np.array([parts[0][1]])
    arrays = {name: np.asarray(value) for name, value in own.items()}
    for k in range(y + 1):
        below, upto = cumulative(
            family, mean, np.array([float(k)]), None if trials is None else np.array([trials]), arrays
        )
        assert below[0] == pytest.approx(sum(p for p, _ in parts[:k]), abs=1e-12)
        assert upto[0] == pytest.approx(sum(p for p, _ in parts[: k + 1]), abs=1e-12)


@pytest.mark.parametrize("family", CONTINUOUS)
def test_continuous(family):
    own, lowest, y = CONTINUOUS[family]
    wanted = integrate.quad(lambda x: density(family, x, None, own)[0], lowest, y, points=None)[0]
    mean = np.array([density(family, y, None, own)[1]])
    below, upto = cumulative(family, mean, np.array([y]), None, {name: np.asarray(x) for name, x in own.items()})
    assert below[0] == upto[0] == pytest.approx(wanted, abs=1e-7)


def test_others_are_refused():
    with pytest.raises(DataError, match="'ordinal' has no distribution function"):
        cumulative("ordinal", np.ones(1), np.ones(1), None, {})
