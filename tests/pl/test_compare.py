"""Marks and bars are what the table says, and every doubt about a fit is told."""

import warnings

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import cellfate as cf
from cellfate import CellfateWarning, DataError
from cellfate.pl.compare import plus_minus, weight
from tests.pl.helpers import AT_BOUND, ROUGH, assert_legible, texts, whiskers, with_comparison, words_of
from tests.synthetic import synthetic_result


def marks(ax, marker):
    """Lines of a marker, from top to bottom."""
    return sorted((line for line in ax.lines if line.get_marker() == marker), key=lambda line: line.get_ydata()[0])


def places(ax, marker):
    return np.array([line.get_xdata()[0] for line in marks(ax, marker)])


def assert_drawn(ax, table):
    np.testing.assert_allclose(places(ax, "o"), table["log_evidence"] - table["log_evidence"].max())
    np.testing.assert_allclose(places(ax, "s"), table["elpd_difference"])
    bars = table["elpd_difference"].to_numpy()[:, None] + np.outer(table["elpd_error"], [-1, 1])
    np.testing.assert_allclose(whiskers(ax), bars)
    left, right = ax.get_xlim()
    assert left < min(bars.min(), places(ax, "o").min())
    assert right > max(bars.max(), 0)


def test_marks_and_bars_are_those_of_the_table():
    adata = with_comparison(synthetic_result())
    ax = cf.pl.compare(adata)
    assert_drawn(ax, cf.get.comparison(adata))
    assert ax.get_xlabel() == "difference to the best model (nats)"
    rows = np.concatenate([line.get_ydata() for line in marks(ax, "o")])
    assert (np.diff(rows) > 0).all()
    assert ax.yaxis_inverted()  # and so the first, which is the best, is on top


def test_of_a_real_comparison_and_from_disk(tmp_path):
    adata = cf.datasets.simulate(60, family="gaussian", rng=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)
        cf.tl.decompose(adata, "fate", family="gaussian", lengthscale=0.5, rng=0)
        cf.tl.compare(adata, rng=0)
    adata.write_h5ad(tmp_path / "compared.h5ad")
    ax = cf.pl.compare(anndata.read_h5ad(tmp_path / "compared.h5ad"))
    table = cf.get.comparison(adata)
    assert_drawn(ax, table)
    assert [t.get_text().split(" †")[0].split(" ‡")[0] for t in ax.get_yticklabels()] == list(table["model"])
    best = table["elpd_loo"].idxmax()
    assert texts(ax)[2 * best + 1] == "best"
    assert places(ax, "o")[0] == 0.0
    assert_legible(ax.figure)


def test_the_margin_says_the_numbers():
    notes = texts(cf.pl.compare(with_comparison(synthetic_result())))
    assert notes[::2] == ["weight 82%", "weight 18%", "weight <1%", "weight <1%", "weight <1%"]
    assert notes[1::2] == ["−0.2 ± 1.2", "best", "−21.1 ± 8.3", "−23.6 ± 6.6", "−39.0 ± 8.9"]


def test_doubts_are_marked_and_told():
    ax = cf.pl.compare(with_comparison(synthetic_result()))
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == ["lineage + spatial", "lineage + spatial\n+ lineage:spatial †", "lineage", "spatial ‡", "none ‡"]
    for marker in "os":
        hollow = [line.get_markerfacecolor() == "white" for line in marks(ax, marker)]
        assert hollow == [False, True, False, True, True]
    below = [" ".join(t.get_text().split()) for t in ax.figure.texts]
    assert below == ["†", AT_BOUND, "‡", ROUGH]


def test_nothing_is_below_where_all_converged():
    adata = with_comparison(synthetic_result())
    doubtful = cf.pl.compare(adata).figure
    adata.uns["cellfate"]["comparison"]["status"] = "converged"
    ax = cf.pl.compare(adata)
    assert ax.figure.texts == []
    assert ax.figure.get_figheight() < doubtful.get_figheight()
    assert not any(t.get_text().endswith(("†", "‡")) for t in ax.get_yticklabels())


def test_words_have_their_places():
    assert_legible(cf.pl.compare(with_comparison(synthetic_result())).figure)


def test_in_given_axes_doubts_are_told_below_the_label():
    figure, ax = plt.subplots(figsize=(4.5, 4), layout="constrained")
    cf.pl.compare(with_comparison(synthetic_result()), ax=ax)
    assert_legible(figure)
    words = {" ".join(text.split()): box for text, box in words_of(figure)}
    assert max(words[AT_BOUND].y1, words[ROUGH].y1) < words[ax.get_xlabel()].y0


def test_a_fit_that_gave_no_number_keeps_its_row():
    adata = with_comparison(synthetic_result())
    table = adata.uns["cellfate"]["comparison"]
    table.loc[4, ["log_evidence", "weight", "elpd_loo", "elpd_difference", "elpd_error"]] = np.nan
    table.loc[4, "status"] = "a result is not finite: do not use this fit"
    ax = cf.pl.compare(adata)
    assert texts(ax)[-2:] == ["weight unknown", "unknown"]
    np.testing.assert_allclose(places(ax, "o")[:4], table["log_evidence"][:4] - table["log_evidence"].max())
    assert np.isfinite(ax.get_xlim()).all()


def test_of_one_model_there_is_an_axis():
    adata = with_comparison(synthetic_result())
    adata.uns["cellfate"]["comparison"] = cf.get.comparison(adata).iloc[[1]].reset_index(drop=True)
    left, right = cf.pl.compare(adata).get_xlim()
    assert left < 0 < right


@pytest.mark.parametrize(
    ("share", "text"), [(0.534, "53%"), (1e-9, "<1%"), (0.006, "1%"), (1 - 1e-9, ">99%"), (np.nan, "unknown")]
)
def test_weight(share, text):
    assert weight(share) == text


@pytest.mark.parametrize(("numbers", "text"), [((-0.04, 0.3), "−0.0 ± 0.3"), ((np.nan, np.nan), "unknown")])
def test_plus_minus(numbers, text):
    assert plus_minus(*numbers) == text


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("cellfate", r"no 'comparison'. Run `cf.tl.compare\(adata\)` first"),
        ("mine", r"no 'comparison'. Run `cf.tl.compare\(adata, key='mine'\)` first"),
        (
            "other",
            r"No decomposition under 'other'.*Either .* or run `cf.tl.decompose\(adata, ..., key_added='other'\)`",
        ),
    ],
)
def test_without_a_comparison_the_error_names_the_call(key, message):
    adata = synthetic_result(n=40)
    adata.uns["mine"] = adata.uns["cellfate"]
    with pytest.raises(DataError, match=message.replace("Either .* or", "use one of .*")):
        cf.pl.compare(adata, key)
    assert plt.get_fignums() == []  # nothing half drawn


def test_nothing_is_changed():
    adata = with_comparison(synthetic_result(n=40))
    before = adata.uns["cellfate"]["comparison"].copy()
    cf.pl.compare(adata)
    pd.testing.assert_frame_equal(adata.uns["cellfate"]["comparison"], before)
