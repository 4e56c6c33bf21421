"""Bars and whiskers are what the tables say, in percent."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

import cellfate as cf
from cellfate.pl import _style
from tests.pl.helpers import assert_legible, gaussian, texts, two_responses, whiskers
from tests.synthetic import synthetic_result


@pytest.mark.parametrize("scale", ["latent", "link", "realized"])
def test_bars_are_mean_shares_and_whiskers_intervals(scale):
    adata = synthetic_result()
    table = cf.get.components(adata, scale=scale)
    ax = cf.pl.variance_shares(adata, scale=scale)
    bars = ax.patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], table["share"].abs())
    assert [to_hex(bar.get_facecolor()).upper() for bar in bars] == [_style.COLORS[c] for c in table["component"]]
    np.testing.assert_allclose(whiskers(ax), table[["share_lower", "share_upper"]])
    edges = table[["share_lower", "share_upper"]].to_numpy()
    assert ax.get_xlim()[0] <= edges.min()
    assert ax.get_xlim()[1] >= max(1, edges.max())


def test_bars_touch_and_a_negative_share_hangs_left_of_zero():
    adata = synthetic_result()
    ax = cf.pl.variance_shares(adata, scale="realized")
    shares = cf.get.components(adata, scale="realized").set_index("component")["share"]
    assert shares["shared"] < 0
    *positive, shared = ax.patches
    starts = [bar.get_x() for bar in positive]
    np.testing.assert_allclose(starts, np.r_[0, np.cumsum([bar.get_width() for bar in positive])[:-1]])
    assert shared.get_x() == pytest.approx(shares["shared"])
    assert shared.get_x() + shared.get_width() == pytest.approx(0)


def test_one_bar_for_each_response():
    ax = cf.pl.variance_shares(two_responses())
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == ["fate", "lineage", "spatial", "fixed", "marker", "lineage", "spatial", "fixed"]
    bold = [t.get_text() for t in ax.get_yticklabels() if t.get_fontweight() == "bold"]
    assert bold == ["fate", "marker"]


def test_the_margin_says_the_numbers():
    adata = synthetic_result()
    row = cf.get.components(adata).iloc[0]
    ax = cf.pl.variance_shares(adata)
    assert texts(ax)[0] == "mean [95%]"
    assert texts(ax)[1] == f"{100 * row.share:.0f}% [{100 * row.share_lower:.0f}%, {100 * row.share_upper:.0f}%]"
    realized = cf.get.components(adata, scale="realized")
    assert realized["component"].iloc[-1] == "shared"
    ax = cf.pl.variance_shares(adata, scale="realized")
    assert texts(ax)[-1].startswith(f"\N{MINUS SIGN}{-100 * realized['share'].iloc[-1]:.0f}% [\N{MINUS SIGN}")
    assert "-" not in "".join(texts(ax))


@pytest.mark.parametrize(("share", "text"), [(0.537, "54%"), (-0.02, "\N{MINUS SIGN}2%"), (-0.001, "0%"), (1, "100%")])
def test_percent(share, text):
    assert _style.percent(share) == text


@pytest.mark.parametrize("scale", ["latent", "link", "realized"])
def test_axes_of_shares_have_the_same_steps_in_percent(scale):
    for ax in (cf.pl.variance_shares(synthetic_result(), scale=scale), cf.pl.posterior(gaussian(), quantity="share")):
        ax.figure.canvas.draw()
        assert [t.get_text() for t in ax.get_xticklabels()][-5:] == ["0%", "25%", "50%", "75%", "100%"]


def test_a_residual_is_no_part_of_the_linear_predictor():
    assert cf.pl.variance_shares(synthetic_result()).get_xlabel() == "share of the variance of the linear predictor"
    assert cf.pl.variance_shares(gaussian()).get_xlabel() == "share of the total variance"
    assert cf.pl.posterior(gaussian(), quantity="share").get_xlabel() == "share of the total variance"


def many_responses(count=24):
    parts = [synthetic_result(response=f"gene{i}", seed=i) for i in range(count)]
    first = parts[0]
    for table in ("components", "shares"):
        first.uns["cellfate"][table] = pd.concat([a.uns["cellfate"][table] for a in parts], ignore_index=True)
    verdicts = ["weak: little is known"] + ["clear: told apart"] * (count - 1)
    names = [f"gene{i}" for i in range(count)]
    first.uns["cellfate"]["responses"] = pd.DataFrame({"response": names, "verdict": verdicts})
    return first


def test_many_responses_are_a_sheet_on_which_a_weak_verdict_is_pale():
    adata = many_responses()
    table = cf.get.components(adata)
    ax = cf.pl.variance_shares(adata)
    width, height = ax.figure.get_size_inches()
    assert (width, height < 9) == (_style.WIDTH, True)
    assert_legible(ax.figure)
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], table["share"].abs())
    np.testing.assert_allclose(whiskers(ax), table[["share_lower", "share_upper"]])
    colors = [to_hex(bar.get_facecolor()).upper() for bar in ax.patches]
    solid = [_style.COLORS[c] for c in table["component"]]
    assert colors[:3] == [_style.pale(c).upper() for c in solid[:3]]
    assert colors[3:] == solid[3:]
    said = " ".join(t.get_text() for t in ax.figure.texts).replace("\n", " ")
    assert said.strip().startswith("Pale bars: the verdict is weak")


def test_one_weak_response_is_pale():
    adata = synthetic_result()
    adata.uns["cellfate"]["diagnostics"]["verdict"] = "confounded: only the sum"
    ax = cf.pl.variance_shares(adata)
    assert to_hex(ax.patches[0].get_facecolor()) == _style.pale(_style.COLORS["lineage"])
    assert_legible(ax.figure)
