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


@pytest.mark.parametrize("link", ["logit", "probit"])
@pytest.mark.parametrize("gaps", [(), (0.5,), (0.5, 1.3)])
def test_ordinal(link, gaps):
    family, eta, last = get_family("ordinal", link), double([-2.0, ETA]), len(gaps) + 1
    phi = double([gaps]) if gaps else None

    def p(k):
        return torch.exp(family.log_prob(Outcome(torch.full_like(eta, float(k)), levels=last + 1), eta, phi)).numpy()

    levels = family.probabilities(eta, phi).numpy()
    np.testing.assert_allclose(levels, np.stack([p(k) for k in range(last + 1)], -1), atol=1e-12)
    for k in range(last + 1):
        below, upto = cumulative("ordinal", levels, np.full(2, float(k)), None, {})
        np.testing.assert_allclose(below, sum((p(j) for j in range(k)), start=np.zeros(2)), atol=1e-12)
        np.testing.assert_allclose(upto, sum(p(j) for j in range(k + 1)), atol=1e-12)


def test_others_are_refused():
    with pytest.raises(DataError, match="'categorical' has no distribution function"):
        cumulative("categorical", np.ones(1), np.ones(1), None, {})
