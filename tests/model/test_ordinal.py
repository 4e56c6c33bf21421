"""Ordered fates and probabilities, where they meet families that are known, or the door."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import cellfate as cf
from cellfate.errors import DataError
from cellfate.model.catalog import get_family
from cellfate.model.families import Outcome
from tests.problem import double

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.CellfateWarning")


@pytest.mark.parametrize("link", ["logit", "probit"])
def test_two_levels_are_a_yes_or_no(link):
    adata = cf.datasets.simulate(80, family="bernoulli", rng=2)
    y, X = adata.obs["fate"].to_numpy(), np.ones((80, 1))
    clone = {"clone": cf.kernels.Intercepts(np.arange(80) % 12)}
    theta = {"sd_clone": [0.3, 1.4]}
    one, other = (cf.GLMM(name, clone, link=link).evaluate(theta, y, X) for name in ("ordinal", "bernoulli"))
    np.testing.assert_allclose(one.free_energy, other.free_energy, atol=1e-10)
    np.testing.assert_allclose(one.mean, other.mean, atol=1e-8)


@pytest.mark.parametrize("link", ["logit", "probit"])
def test_merged_levels_have_the_sum_of_their_probabilities(link):
    family, eta = get_family("ordinal", link), double([-3.0, 0.2, 4.0])
    four, three = double([[0.5, 0.7]]), double([[1.2]])

    def p(y, phi):
        return torch.exp(family.log_prob(Outcome(torch.full_like(eta, y)), eta, phi))

    torch.testing.assert_close(p(1.0, four) + p(2.0, four), p(1.0, three))
    torch.testing.assert_close(p(3.0, four), p(2.0, three))


@pytest.mark.parametrize("link", ["logit", "probit"])
def test_gradient_in_the_gaps(link):
    family = get_family("ordinal", link)
    y, eta = double([0.0, 1.0, 2.0, 3.0] * 3), double(np.repeat([-6.0, 0.4, 7.0], 4))
    gaps = double([[0.3, 1.1]]).requires_grad_(True)

    def all_of(g):
        return (family.log_prob(Outcome(y), eta, g), *family.derivatives(Outcome(y), eta, g))

    assert torch.autograd.gradcheck(all_of, [gaps], atol=1e-6, rtol=1e-5)


def test_distribution_variances():
    like = torch.zeros(2, 1, dtype=torch.float64)
    assert get_family("ordinal").distribution_variance(like, like).tolist() == [[math.pi**2 / 3]] * 2
    assert get_family("ordinal", "probit").distribution_variance(like, like).tolist() == [[1.0]] * 2
    rng, phi, eta = np.random.default_rng(0), 6.0, 0.7
    y = get_family("beta").simulate(np.full(200_000, eta), rng=rng, precision=phi)
    logit = np.log(y) - np.log1p(-y)
    found = get_family("beta").distribution_variance(double([[eta]]), double([[1.0]]), double([[phi]]))
    spread = ((logit - logit.mean()) ** 2).std() / math.sqrt(len(y))
    assert abs(float(found) - logit.var()) < 4 * spread


def ordered(adata):
    names = ["early", "middle", "late", "never", "last"]
    codes = adata.obs["fate"].to_numpy()
    return pd.Categorical(np.array(["early", "middle", "late", "last"])[codes], categories=names, ordered=True)


def test_stages_keep_their_order_and_name():
    adata = cf.datasets.simulate(120, family="ordinal", rng=1)
    adata.obs["stage"] = ordered(adata)
    arguments = {"family": "ordinal", "lengthscale": 0.5, "rng": 0, "copy": True}
    by_name, by_number = (cf.tl.decompose(adata, name, **arguments) for name in ("stage", "fate"))
    pd.testing.assert_frame_equal(
        cf.get.components(by_name).drop(columns="response"), cf.get.components(by_number).drop(columns="response")
    )
    assert list(cf.get.params(by_name)["levels"]) == ["early", "middle", "late", "last"]
    cuts = cf.get.hyperparameters(by_name).set_index("term")
    assert list(cuts.index[:2]) == ["gap_1", "gap_2"]
    assert (cuts["lower"] > 0).all()
    predicted = cf.tl.predict(by_name, "ancestors")
    assert predicted is None or len(predicted)


@pytest.mark.parametrize(
    ("fate", "family", "text"),
    [
        (lambda a: ordered(a).as_unordered(), "ordinal", "a categorical without an order"),
        (lambda a: np.asarray(ordered(a)).astype(str), "ordinal", "is text .* Make it an ordered categorical"),
        (lambda a: np.arange(len(a)) / 7, "ordinal", "different values .* use family='gaussian'"),
        (lambda a: np.zeros(len(a)), "ordinal", "has one level"),
        (lambda a: np.r_[9, np.arange(len(a) - 1) % 3], "ordinal", "fewer than 2 cells, '9: 1'"),
        (lambda a: np.r_[np.nan, np.arange(len(a) - 1) % 3], "ordinal", "NaN"),
        (lambda a: np.linspace(0, 0.9, len(a)), "beta", r"exactly 0 or 1 in 1 of 120 cells.*Smithson"),
        (lambda a: np.linspace(1, 99, len(a)), "beta", "divide percentages by 100"),
        (lambda a: np.full(len(a), 0.4), "beta", "no variation"),
    ],
)
def test_wrong_fates_are_named(fate, family, text):
    adata = cf.datasets.simulate(120, family="ordinal", rng=1)
    adata.obs["it"] = fate(adata)
    with pytest.raises(DataError, match=text):
        cf.tl.decompose(adata, "it", family=family)


def test_probabilities_end_to_end():
    adata = cf.datasets.simulate(150, family="beta", precision=20.0, variance_spatial=0.0, rng=4)
    cf.tl.decompose(adata, "fate", family="beta", lengthscale=0.5, rng=0)
    table = cf.get.hyperparameters(adata).set_index("term")
    assert table.loc["precision", "lower"] < 20 < table.loc["precision", "upper"]
    shares = cf.get.components(adata).set_index("component")["share"]
    assert shares["lineage"] > shares["spatial"]
