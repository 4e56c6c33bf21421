"""Points are those of the table, verdicts stand where their length-scales are, and in words."""

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb

import cellfate as cf
from cellfate import DataError
from cellfate.inference.report import told_apart
from cellfate.pl import _style
from cellfate.pl.identifiability import VERDICTS, round_ticks, stretches
from tests.pl.helpers import assert_legible, texts

KEY = "cellfate_identifiability"
ALL = [(-0.9, 0.9), (0.0, 0.9), (0.0, 0.5), (0.0, 0.1)]  # correlation and width, for each verdict the worst first


@pytest.fixture(scope="module")
def real():
    adata = cf.datasets.simulate(80, inheritance=0.9, rng=0)
    scales = [2.0, 0.1, 0.5]  # in any order
    cf.pp.identifiability(adata, variances={"lineage": 2.0, "spatial": 0.5}, lengthscales=scales)
    return adata


def synthetic(verdicts, lengthscale=None):
    """A table with these verdicts."""
    n, rng = len(verdicts), np.random.default_rng(0)
    adata = cf.datasets.simulate(20, rng=0)
    columns = ["alignment", "error_lineage", "error_spatial", "error_share", "power_lineage", "power_spatial"]
    table = {"lengthscale": np.geomspace(3, 300, n) if lengthscale is None else lengthscale}
    table |= dict(zip(columns, rng.uniform(0.1, 0.9, (len(columns), n)), strict=True))
    table |= {"variance_lineage": 1.0, "variance_spatial": 1.0, "share": 0.5, "verdict": verdicts}
    adata.uns[KEY] = pd.DataFrame(table)
    return adata


def curves(ax):
    """What is drawn in each color, dashes apart."""
    lines = [line for line in ax.lines if line.get_marker() not in ("None", None, "")]
    return {to_hex(line.get_color()).upper(): np.column_stack(line.get_data()) for line in lines}


def assert_drawn(panels, table):
    table = table.sort_values("lengthscale")
    x = table["lengthscale"]
    _, shares, alignment, errors, power = panels
    lineage, spatial = (_style.COLORS[name] for name in ("lineage", "spatial"))
    np.testing.assert_allclose(curves(alignment)[_style.INK], np.column_stack([x, table["alignment"]]))
    for name, color in (("lineage", lineage), ("spatial", spatial)):
        relative = table[f"error_{name}"] / table[f"variance_{name}"]
        np.testing.assert_allclose(curves(errors)[color], np.column_stack([x, relative]))
        np.testing.assert_allclose(curves(power)[color], np.column_stack([x, table[f"power_{name}"]]))
    np.testing.assert_allclose(curves(shares)[lineage], np.column_stack([x, table["share"]]))
    (bars,) = (c for c in shares.collections if isinstance(c, LineCollection))
    ends = table["share"].to_numpy() + np.outer([-1.96, 1.96], table["error_share"])
    np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], np.clip(ends, 0, 1).T)
    np.testing.assert_allclose([s[0, 0] for s in bars.get_segments()], x)


def test_points_are_those_of_the_table(real):
    panels = cf.pl.identifiability(real)
    assert_drawn(panels, real.uns[KEY])
    for ax in panels:
        assert ax.get_xscale() == "log"
    errors = panels[3]
    assert errors.get_ylim()[1] > max(1.0, max(curve[:, 1].max() for curve in curves(errors).values()))
    assert [t.get_text() for t in errors.get_legend().get_texts()] == ["lineage", "spatial"]


def test_the_dashed_lines_are_no_knowledge_and_the_usual_power(real):
    *_, errors, power = cf.pl.identifiability(real)
    dashed = [[line.get_ydata()[0] for line in ax.lines if line.is_dashed()] for ax in (errors, power)]
    assert dashed == [[1], [0.8]]
    for ax, (y,) in zip((errors, power), dashed, strict=True):
        assert dict(zip(ax.get_yticks(), (t.get_text() for t in ax.get_yticklabels()), strict=True))[y] == f"{y:.0%}"


def test_from_disk(real, tmp_path):
    real.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_frame_equal(cf.get.identifiability(back), cf.get.identifiability(real), check_dtype=False)
    assert_drawn(cf.pl.identifiability(back), real.uns[KEY])


def test_verdicts_stand_where_their_length_scales_are():
    strip = cf.pl.identifiability(synthetic([told_apart(*x) for x in np.repeat(ALL, [3, 3, 3, 3], axis=0)]))[0]
    assert texts(strip) == ["confounded", "weak", "partial", "clear"]
    bars = zip(texts(strip), strip.patches, strict=True)
    assert {word: to_hex(bar.get_facecolor()).upper() for word, bar in bars} == VERDICTS
    x = np.geomspace(3, 300, 12)
    for i, bar in enumerate(strip.patches):
        left, right = bar.get_x(), bar.get_x() + bar.get_width()
        assert [left < value < right for value in x] == [i == j // 3 for j in range(12)]
        if i:
            assert left == pytest.approx(np.sqrt(x[3 * i - 1] * x[3 * i]))
    assert (strip.patches[0].get_x(), right) == pytest.approx(strip.get_xlim())


def test_verdicts_differ_in_black_and_white_and_words_on_them_are_read():
    def luminance(color):  # WCAG 2, relative
        rgb = np.array(to_rgb(color))
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    shades = sorted(luminance(color) for color in VERDICTS.values())
    contrasts = (np.array(shades[1:]) + 0.05) / (np.array(shades[:-1]) + 0.05)
    assert contrasts.min() > 1.3
    assert (shades[0] + 0.05) / (luminance(_style.INK) + 0.05) >= 4.5


def test_a_verdict_that_comes_back_has_two_bars_and_one_explanation():
    weak, clear = told_apart(0, 0.9), told_apart(0, 0.1)
    panels = cf.pl.identifiability(synthetic([weak, clear, weak]))
    assert texts(panels[0]) == ["weak", "clear", "weak"]
    below = [" ".join(t.get_text().split()) for t in panels[0].figure.texts]
    assert [f"{a}: {b}" for a, b in zip(below[::2], below[1::2], strict=True)] == [clear, weak]


def test_a_word_without_room_stands_below_alone():
    verdicts = [told_apart(*ALL[i]) for i in [0] * 10 + [2] + [3] * 10]
    panels = cf.pl.identifiability(synthetic(verdicts))
    assert [t.get_text() for t in panels[0].texts if t.get_visible()] == ["confounded", "clear"]
    figure = panels[0].figure
    fills = {t.get_text(): to_hex(t.get_bbox_patch().get_facecolor()).upper() for t in figure.texts[::2]}
    assert fills == {word: VERDICTS[word] for word in ("clear", "partial", "confounded")}
    assert_legible(figure)


@pytest.mark.parametrize("units", ["µm", ""])
@pytest.mark.parametrize("n", [1, 2, 4, 12])
def test_words_have_their_places(n, units):
    panels = cf.pl.identifiability(synthetic([told_apart(*ALL[i * 4 // n]) for i in range(n)]), units=units)
    figure = panels[0].figure
    assert figure.get_figwidth() == _style.WIDTH
    assert_legible(figure)
    assert min(t.get_fontsize() for ax in panels for t in ax.texts) >= 7
    assert panels[-1].get_xlabel() == f"length-scale ({units or 'units of the coordinates'})"
    assert len([t for t in panels[-1].get_xticklabels() if t.get_text()]) >= 2


def test_length_scales_given_twice_or_nearly():
    verdict = told_apart(0, 0.5)
    panels = cf.pl.identifiability(synthetic([verdict] * 2, [7.0, 7.0]))
    assert [len(curve) for curve in curves(panels[2]).values()] == [1]
    panels = cf.pl.identifiability(synthetic([verdict] * 2, [7.0, 7.2]))
    assert_legible(panels[0].figure)


def test_a_stretch_ends_halfway_to_the_next():
    np.testing.assert_allclose(stretches(np.array([1.0, 4.0, 64.0])), [0.5, 2.0, 16.0, 256.0])
    np.testing.assert_allclose(stretches(np.array([3.0])), [2.0, 4.5])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.2, 5.0, [0.2, 0.5, 1, 2, 5]),
        (2.5, 500, [3, 10, 30, 100, 300]),
        (0.5, 1e4, [1, 10, 100, 1e3, 1e4]),
        (6.6, 7.6, [6.6, 6.8, 7.0, 7.2, 7.4, 7.6]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    found = round_ticks(low, high)
    assert set(np.round(found, 9)) <= set(ticks)
    assert len(found) >= 3


def test_show_and_save(real, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(1))
    cf.pl.identifiability(real)
    assert shown == []  # no screen
    cf.pl.identifiability(real, show=True, save=tmp_path / "new" / "f.pdf")
    assert shown == [1]
    assert (tmp_path / "new" / "f.pdf").read_bytes()[:4] == b"%PDF"


def nothing(adata):
    del adata.uns[KEY]


def something_else(adata):
    adata.uns[KEY] = {"lengthscale": 1.0}


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (nothing, KEY, rf"no '{KEY}', wanted .* Run `cf.pp.identifiability\(adata\)` first"),
        (nothing, "mine", r"no 'mine', wanted .* Run `cf.pp.identifiability\(adata, key_added='mine'\)` first"),
        (something_else, KEY, "holds something else"),
    ],
)
def test_without_a_table_the_error_names_the_call(change, key, message):
    adata = synthetic([told_apart(0, 0.5)])
    change(adata)
    with pytest.raises(DataError, match=message):
        cf.pl.identifiability(adata, key)
    assert plt.get_fignums() == []
