"""Densities keep their mass and show no bumps that are not there; medians and intervals are those of the draws."""

import numpy as np
import pandas as pd
import pytest

import cellfate as cf
from cellfate.pl import _style
from cellfate.pl.posterior import density
from tests.pl.helpers import two_responses, whiskers
from tests.synthetic import synthetic_result


@pytest.mark.parametrize("quantity", ["sd", "variance", "share"])
def test_posterior_marks_median_and_interval(quantity):
    adata = synthetic_result(groups=("batch",))
    draws = cf.get.draws(adata)
    names = ["lineage", "spatial", "batch"] + (["fixed"] if quantity == "share" else [])
    x = draws[[f"{'share' if quantity == 'share' else 'variance'}_{name}" for name in names]].to_numpy()
    x = np.sqrt(x) if quantity == "sd" else x
    ax = cf.pl.posterior(adata, quantity=quantity)
    assert [t.get_text() for t in ax.get_yticklabels()] == names[::-1]
    np.testing.assert_allclose(whiskers(ax)[::-1], np.quantile(x, [0.025, 0.975], axis=0).T)
    medians = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1]
    np.testing.assert_allclose(medians[::-1], np.median(x, axis=0))


def test_posterior_of_chosen_components():
    ax = cf.pl.posterior(synthetic_result(), quantity="lengthscale")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["spatial"]
    assert ax.get_xlabel() == "length-scale (units of the coordinates)"
    ax = cf.pl.posterior(synthetic_result(), components=["spatial"])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["spatial"]


def test_density_keeps_its_mass_at_a_bound():
    x = np.abs(np.random.default_rng(0).normal(size=20_000))
    grid = np.linspace(0, 5, 301)
    curve = density(x, grid, lower=0, upper=np.inf)
    assert np.trapezoid(curve, grid) == pytest.approx(1, abs=1e-3)
    # Without folding, half of the density would be missing at zero; 0.06 is the noise of 20,000 draws.
    half_normal = np.sqrt(2 / np.pi) * np.exp(-(grid**2) / 2)
    assert np.abs(curve - half_normal).max() < 0.06


def test_density_between_two_bounds():
    x = np.random.default_rng(0).random(20_000)
    curve = density(x, np.linspace(0, 1, 101), lower=0, upper=1)
    np.testing.assert_allclose(curve, 1, atol=0.06)


def modes(curve):
    return int((np.diff(np.sign(np.diff(curve))) < 0).sum())


@pytest.mark.parametrize("seed", range(5))
def test_repeated_draws_make_no_bumps(seed):
    rng = np.random.default_rng(seed)
    value = rng.normal(5, 1, 400)
    grid = np.linspace(1, 9, 400)
    few = np.repeat(value[:20], 20)  # 400 draws, 20 of them distinct
    alone = density(value[:20], grid, lower=0, upper=np.inf)
    np.testing.assert_allclose(density(few, grid, lower=0, upper=np.inf), alone, rtol=0.05, atol=1e-3)
    # One half of the draws is one value: its bandwidth is that of four values, not of 201.
    heavy = np.r_[value[:200], np.full(200, 5.0)]
    assert modes(density(heavy, grid, lower=0, upper=np.inf)) == 1


def test_a_long_tail_is_cut_but_never_the_interval():
    adata = synthetic_result()
    draws = cf.get.draws(adata)
    draws.loc[:3, "variance_lineage"] = 1e4
    adata.uns["cellfate"]["draws"] = draws
    ax = cf.pl.posterior(adata)
    assert whiskers(ax).max() < ax.get_xlim()[1] < 4


def test_no_curve_runs_into_the_heading():
    for components in (None, ["lineage"]):
        ax = cf.pl.posterior(synthetic_result(groups=("batch",)), components=components)
        renderer = ax.figure.canvas.get_renderer()
        ax.figure.draw(renderer)
        (heading,) = [t for t in ax.texts if t.get_text() == "median [95%]"]
        tops = [line.get_window_extent(renderer).y1 for line in ax.lines]
        assert heading.get_window_extent(renderer).y0 > max(tops)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.98, 0.32, 1.64), "0.98 [0.32, 1.64]"),
        ((7.21, 3.21, 16.13), "7.2 [3.2, 16.1]"),
        ((812.3, 455.1, 1604.9), "812 [455, 1605]"),
        ((0.0121, 0.0012, 0.042), "0.012 [0.001, 0.042]"),
        ((0.0, 0.0, 0.0), "0.00 [0.00, 0.00]"),
    ],
)
def test_intervals_have_as_many_decimals_as_they_need(numbers, text):
    assert _style.interval(*numbers) == text


def test_of_many_responses_one_has_to_be_named():
    adata = two_responses()
    draws = cf.get.draws(adata)
    names = list(dict.fromkeys(cf.get.components(adata)["response"]))
    adata.uns["cellfate"]["draws"] = pd.concat([draws.assign(response=n) for n in names], ignore_index=True)
    with pytest.raises(ValueError, match="name one of the 2 responses"):
        cf.pl.posterior(adata, show=False)
    assert cf.pl.posterior(adata, response=names[1], show=False) is not None
