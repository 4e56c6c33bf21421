"""What is drawn is what the tables say: bars, whiskers, colors, scales, and nothing printed small."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb

import cellfate as cf
from cellfate.pl import _style
from cellfate.pl.posterior import density
from tests.synthetic import synthetic_result


def two_responses():
    first, second = synthetic_result(), synthetic_result(response="marker", seed=1)
    for table in ("components", "shares"):
        both = [adata.uns["cellfate"][table] for adata in (first, second)]
        first.uns["cellfate"][table] = pd.concat(both, ignore_index=True)
    return first


def whiskers(ax):
    """Ends of every horizontal line, from top to bottom."""
    lines = [line for c in ax.collections if isinstance(c, LineCollection) for line in c.get_segments()]
    return np.array([[line[0][0], line[1][0]] for line in sorted(lines, key=lambda line: line[0][1])])


def texts(ax):
    return [text.get_text() for text in ax.texts]


# --- variance_shares ------------------------------------------------------------------------------------------------------


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
    assert texts(ax)[1] == f"{100 * row.share:.0f}% [{100 * row.share_lower:.0f}, {100 * row.share_upper:.0f}]"


# --- posterior ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("link", "units"), [("logit", "log-odds"), ("log", "log units"), ("identity", "units of fate")]
)
def test_labels_have_units(link, units):
    adata = synthetic_result(link=link)
    assert cf.pl.posterior(adata).get_xlabel() == f"standard deviation ({units})"
    axes = cf.pl.effects(adata)
    bar = axes[0].figure.axes[-1]
    assert bar.get_xlabel() == f"posterior mean effect ({units})"


# --- effects --------------------------------------------------------------------------------------------------------------


def cells_of(ax):
    return ax.collections[-1]


def test_effects_are_the_colors_of_their_cells():
    adata = synthetic_result(n=200)
    table = cf.get.effects(adata)
    kept = table["lineage_mean"].notna().to_numpy()
    axes = cf.pl.effects(adata)
    assert [ax.get_title() for ax in axes] == ["lineage", "spatial"]
    for ax, component in zip(axes, ["lineage", "spatial"], strict=True):
        np.testing.assert_array_equal(cells_of(ax).get_array(), table[f"{component}_mean"][kept])
        np.testing.assert_array_equal(cells_of(ax).get_offsets(), adata.obsm["spatial"][kept])
        np.testing.assert_array_equal(ax.collections[0].get_offsets(), adata.obsm["spatial"][~kept])
        assert to_rgb(_style.ABSENT) == tuple(ax.collections[0].get_facecolor()[0][:3])


def test_one_symmetric_color_scale_for_all_panels():
    axes = cf.pl.effects(synthetic_result(specimens=3))
    limits = {cells_of(ax).get_clim() for ax in axes}
    assert len(limits) == 1
    low, high = limits.pop()
    assert low == -high < 0
    table = cf.get.effects(synthetic_result(specimens=3)).filter(like="_mean")
    assert high == pytest.approx(np.nanquantile(table.abs(), 0.99))


def test_one_map_scale_for_all_panels():
    adata = synthetic_result(specimens=2)
    small = (adata.obs["embryo"] == "embryo 2").to_numpy()
    adata.obsm["spatial"][small] /= 10
    spans = {round(np.ptp(ax.get_xlim()), 6) for ax in cf.pl.effects(adata)}
    assert len(spans) == 1
    assert spans.pop() > np.ptp(adata.obsm["spatial"][:, 0])


def test_the_scale_bar_is_as_long_as_it_says():
    axes = cf.pl.effects(synthetic_result(), units="µm")
    (bar,) = axes[0].lines
    assert axes[0].get_xlabel() == f"spatial 1  (bar: {np.ptp(bar.get_xdata()):g} µm)"


def test_specimens_are_small_multiples():
    adata = synthetic_result(n=400, specimens=5)
    titles = [ax.get_title() for ax in cf.pl.effects(adata)]
    assert titles == [f"{c}: embryo {i}" for c in ("lineage", "spatial") for i in range(1, 6)]
    ax = cf.pl.effects(adata, "spatial", specimen="embryo 2")
    assert ax.get_title() == "spatial: embryo 2"
    in_it = (adata.obs["embryo"] == "embryo 2") & cf.get.effects(adata)["spatial_mean"].notna()
    assert len(cells_of(ax).get_array()) == in_it.sum()


def test_of_many_specimens_the_largest_are_drawn(caplog):
    adata = synthetic_result(n=900, specimens=15)
    with caplog.at_level("INFO", logger="cellfate"):
        axes = cf.pl.effects(adata, "lineage")
    counts = adata.obs["embryo"].value_counts()
    shown = {ax.get_title().removeprefix("lineage: ") for ax in axes}
    assert len(shown) == 12
    assert counts[list(shown)].min() >= counts.drop(list(shown)).max()
    assert "the 12 largest of 15 specimens" in caplog.text


def test_three_dimensions_and_two_of_them():
    adata = synthetic_result(dims=3)
    assert all(ax.name == "3d" for ax in cf.pl.effects(adata))
    axes = cf.pl.effects(adata, dims=(0, 2))
    kept = cf.get.effects(adata)["lineage_mean"].notna().to_numpy()
    xyz = adata.obsm["spatial"][kept]
    xyz = xyz[np.argsort(xyz[:, 1])]  # from back to front
    np.testing.assert_array_equal(cells_of(axes[0]).get_offsets(), xyz[:, [0, 2]])
    assert (axes[0].get_xlabel().split("  ")[0], axes[0].get_ylabel()) == ("spatial 1", "spatial 3")


# --- all ------------------------------------------------------------------------------------------------------------------

FIGURES = {
    "variance_shares": (cf.pl.variance_shares, {}),
    "posterior": (cf.pl.posterior, {}),
    "effects": (cf.pl.effects, {"components": "lineage"}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_given_axes_are_drawn_in_and_not_shown(name, monkeypatch):
    function, options = FIGURES[name]
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("shown"))
    figure, ax = plt.subplots()
    assert function(synthetic_result(), ax=ax, **options) is ax
    assert ax.has_data()
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("name", FIGURES)
def test_show_is_obeyed(name, monkeypatch):
    function, options = FIGURES[name]
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(1))
    function(synthetic_result(), **options)
    assert shown == []  # no screen
    function(synthetic_result(), show=True, **options)
    assert shown == [1]
    monkeypatch.setattr(_style, "_has_screen", lambda: True)
    function(synthetic_result(), **options)
    assert shown == [1, 1]
    function(synthetic_result(), show=False, **options)
    assert shown == [1, 1]


@pytest.mark.parametrize("suffix", ["png", "pdf"])
@pytest.mark.parametrize("name", FIGURES)
def test_save_writes_what_the_suffix_says(name, suffix, tmp_path):
    function, options = FIGURES[name]
    path = tmp_path / "new folder" / f"{name}.{suffix}"
    function(synthetic_result(), save=path, **options)
    assert path.read_bytes()[:4] == {"png": b"\x89PNG", "pdf": b"%PDF"}[suffix]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", FIGURES)
def test_print_is_legible_and_inside_the_page(name, dims, tmp_path):
    function, options = FIGURES[name]
    axes = function(synthetic_result(dims=dims, groups=("batch",)), save=tmp_path / "f.png", **options)
    figure = axes.figure
    assert figure.get_figwidth() == _style.WIDTH
    renderer = figure.canvas.get_renderer()
    page = figure.bbox
    words = [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text()]
    assert words
    for word in words:
        assert word.get_fontsize() >= 7, word.get_text()
        box = word.get_window_extent(renderer)
        if word.get_window_extent(renderer).width and box.overlaps(page):
            assert box.x0 >= -1, word.get_text()
            assert box.x1 <= page.x1 + 1, word.get_text()


def test_the_style_stays_in_the_figure():
    before = dict(matplotlib.rcParams)
    cf.pl.variance_shares(synthetic_result())
    assert dict(matplotlib.rcParams) == before


def test_colors_differ_and_stay():
    found = _style.colors(["lineage", "batch", "spatial", "herd", "lineage"])
    assert len(set(found.values())) == 4
    assert found["lineage"] == _style.COLORS["lineage"]


def no_kept_cell(adata):
    adata.obsm["cellfate_effects"][:] = np.nan


def nothing(adata):
    """The result as it is."""


def fixed_lengthscale(adata):
    adata.uns["cellfate"]["draws"] = cf.get.draws(adata).drop(columns="lengthscale_spatial")


def constant_draws(adata):
    adata.uns["cellfate"]["draws"]["lengthscale_spatial"] = 0.5


@pytest.mark.parametrize(
    ("change", "call", "message"),
    [
        (nothing, lambda a: cf.pl.posterior(a, quantity="sigma"), "'sigma' is unknown: use one of"),
        (nothing, lambda a: cf.pl.posterior(a, components=["clone"]), r"sd of \['clone'\]: use some of \['lineage'"),
        (fixed_lengthscale, lambda a: cf.pl.posterior(a, quantity="lengthscale"), "no lengthscale, found"),
        (constant_draws, lambda a: cf.pl.posterior(a, quantity="lengthscale"), "All draws are 0.5"),
        (nothing, lambda a: cf.pl.effects(a, "clone"), r"no effects of \['clone'\]: use some of"),
        (nothing, lambda a: cf.pl.effects(a, basis="umap"), r"no 'umap', found \['cellfate_effects', 'spatial'\]"),
        (nothing, lambda a: cf.pl.effects(a, dims=(0, 2)), r"dims is \[0, 2\]: use two or three of 0 to 1"),
        (nothing, lambda a: cf.pl.effects(a, specimen="embryo 1"), "`library_key`, which tells specimens apart"),
        (nothing, lambda a: cf.pl.effects(a, library_key="section"), "no column 'section'"),
        (
            nothing,
            lambda a: cf.pl.effects(a, library_key="embryo", specimen="embryo 9"),
            r"no specimen \['embryo 9'\]: use some of \['embryo 1'\]",
        ),
        (nothing, lambda a: cf.pl.effects(a, ax=plt.subplots()[1]), "1 axes for 2 panels"),
        (
            nothing,
            lambda a: cf.pl.effects(a, "lineage", ax=plt.subplots(subplot_kw={"projection": "3d"})[1]),
            "differ in dimension",
        ),
        (no_kept_cell, lambda a: cf.pl.effects(a), "all were left out of the fit"),
    ],
)
def test_errors_say_what_to_do(change, call, message):
    adata = synthetic_result()
    change(adata)
    with pytest.raises(ValueError, match=message):
        call(adata)
