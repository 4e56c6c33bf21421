"""Colors are effects, places are coordinates, one scale serves all panels, and nothing is printed over another."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

import cellfate as cf
from cellfate.pl import _style
from tests.pl.helpers import assert_legible, texts, words_of
from tests.synthetic import synthetic_result


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


@pytest.mark.parametrize(("units", "after"), [("µm", " µm"), (None, "")])
@pytest.mark.parametrize("components", [None, "lineage"])
def test_the_scale_bar_is_as_long_as_it_says(components, units, after):
    axes = np.ravel(cf.pl.effects(synthetic_result(), components=components, **({"units": units} if units else {})))
    (bar,) = axes[-1].lines
    assert texts(axes[-1]) == [f"{np.ptp(bar.get_xdata()):g}{after}"]
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("spatial 1", "spatial 2")


@pytest.mark.parametrize("stretch", [(1, 1), (1, 0.1), (0.2, 1)])
@pytest.mark.parametrize("components", [None, "lineage"])
def test_no_marker_is_cut_at_the_edge_of_its_panel(stretch, components):
    adata = synthetic_result()
    adata.obsm["spatial"] = adata.obsm["spatial"] * stretch
    for ax in np.ravel(cf.pl.effects(adata, components=components)):
        ax.figure.canvas.draw()
        radius = np.sqrt(cells_of(ax).get_sizes().max()) / 2 / 72 * ax.figure.dpi
        places = ax.transData.transform(adata.obsm["spatial"])
        assert (places - radius >= ax.bbox.min).all()
        assert (places + radius <= ax.bbox.max).all()


def test_no_panel_is_too_tall():
    adata = synthetic_result()
    adata.obsm["spatial"] = adata.obsm["spatial"] * [0.1, 1]
    assert cf.pl.effects(adata, components="lineage").figure.get_figheight() < 4.3
    assert cf.pl.effects(adata)[0].figure.get_figheight() < 4.3


def with_embryo_effect(adata):
    """A random intercept per specimen, as a fit with a library_key has unasked."""
    adata.obsm["cellfate_effects"]["embryo_mean"] = adata.obs["embryo"].cat.codes.to_numpy() / 3
    adata.obsm["cellfate_effects"]["embryo_sd"] = 0.1
    return adata


def test_what_is_constant_within_specimens_is_no_map(caplog):
    adata = with_embryo_effect(synthetic_result(specimens=3))
    with caplog.at_level("INFO", logger="cellfate"):
        titles = [ax.get_title() for ax in cf.pl.effects(adata)]
    assert "embryo: the same in all cells of a specimen" in caplog.text
    assert titles == [f"{c}: embryo {i}" for c in ("lineage", "spatial") for i in (1, 2, 3)]
    assert [ax.get_title() for ax in cf.pl.effects(adata, components="embryo")] == [
        f"embryo: embryo {i}" for i in (1, 2, 3)
    ]
    # without specimens it is a map like any other
    del adata.uns["cellfate"]["params"]["library_key"]
    assert [ax.get_title() for ax in cf.pl.effects(adata)] == ["lineage", "spatial", "embryo"]


@pytest.mark.parametrize("specimens", [1, 3])
def test_each_component_can_have_its_own_color_scale(specimens):
    adata = synthetic_result(specimens=specimens)
    axes = cf.pl.effects(adata, common_scale=False)
    table = cf.get.effects(adata)
    ends = {ax.get_title().split(":")[0]: cells_of(ax).get_clim()[1] for ax in axes}
    assert ends == {c: pytest.approx(np.nanquantile(table[f"{c}_mean"].abs(), 0.99)) for c in ("lineage", "spatial")}
    assert len(axes[0].figure.axes) == len(axes) + 2
    assert "posterior mean effect (log-odds)" in [t.get_text() for t in axes[0].figure.texts]


def test_specimens_are_small_multiples():
    adata = synthetic_result(n=400, specimens=5)
    titles = [ax.get_title() for ax in cf.pl.effects(adata)]
    assert titles == [f"{c}: embryo {i}" for c in ("lineage", "spatial") for i in range(1, 6)]
    ax = cf.pl.effects(adata, components="spatial", specimen="embryo 2")
    assert ax.get_title() == "spatial: embryo 2"
    in_it = (adata.obs["embryo"] == "embryo 2") & cf.get.effects(adata)["spatial_mean"].notna()
    assert len(cells_of(ax).get_array()) == in_it.sum()


def test_with_many_components_fewer_specimens_are_drawn(caplog):
    """As of several fates: panels of all components, and no page of yards."""
    adata = synthetic_result(n=400, specimens=5)
    table = adata.obsm["cellfate_effects"]
    for k in range(1, 9):
        table[f"lineage[{k}]_mean"], table[f"lineage[{k}]_sd"] = table["lineage_mean"] * k, table["lineage_sd"]
    with caplog.at_level("INFO", logger="cellfate"):
        assert len(cf.pl.effects(adata)) == 10 * 3
    assert "the 3 largest of 5 specimens" in caplog.text
    assert len(cf.pl.effects(adata, specimen=[f"embryo {i}" for i in range(1, 5)])) == 10 * 4


def test_of_many_specimens_the_largest_are_drawn(caplog):
    adata = synthetic_result(n=900, specimens=15)
    with caplog.at_level("INFO", logger="cellfate"):
        axes = cf.pl.effects(adata, components="lineage")
    counts = adata.obs["embryo"].value_counts()
    shown = {ax.get_title().removeprefix("lineage: ") for ax in axes}
    assert len(shown) == 12
    assert counts[list(shown)].min() >= counts.drop(list(shown)).max()
    assert "the 12 largest of 15 specimens" in caplog.text
    numbers = [int(ax.get_title().rsplit(" ", 1)[1]) for ax in axes]
    assert numbers == sorted(numbers)  # 2 before 10


def test_three_dimensions_and_two_of_them():
    adata = synthetic_result(dims=3)
    assert all(ax.name == "3d" for ax in cf.pl.effects(adata))
    axes = cf.pl.effects(adata, dims=(0, 2))
    kept = cf.get.effects(adata)["lineage_mean"].notna().to_numpy()
    xyz = adata.obsm["spatial"][kept]
    xyz = xyz[np.argsort(xyz[:, 1])]  # from back to front
    np.testing.assert_array_equal(cells_of(axes[0]).get_offsets(), xyz[:, [0, 2]])
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("spatial 1", "spatial 3")


@pytest.mark.parametrize("common_scale", [True, False])
@pytest.mark.parametrize("specimens", [1, 5])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("groups", [(), ("batch", "herd", "farm")])
def test_no_words_are_printed_over_others(dims, specimens, groups, common_scale):
    adata = synthetic_result(dims=dims, specimens=specimens, groups=groups)
    axes = cf.pl.effects(adata, units="µm", common_scale=common_scale)
    seen = {id(t) for ax in axes for t in ax.texts}
    assert seen
    figure = axes[0].figure
    words = [(text, box) for text, box in words_of(figure) if box.x1 > 0 and box.x0 < figure.bbox.x1]
    for i, (text, box) in enumerate(words):
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        for other, place in words[:i]:
            assert not box.overlaps(place), (text, other)


def test_three_dimensions_say_what_axes_and_bar_are():
    axes = cf.pl.effects(synthetic_result(dims=3), units="µm")
    assert [t.strip() for t in texts(axes[0])] == ["1", "2", "3", "axes: spatial 1, 2, 3; bar: 20 µm"]
    assert texts(axes[1]) == []


def test_fates_are_columns_and_each_component_and_specimen_a_row():
    adata = synthetic_result(n=400, specimens=2, family="categorical", link="softmax")
    table = adata.obsm["cellfate_effects"]
    for component in ("lineage", "spatial"):
        mean, sd = table.pop(f"{component}_mean"), table.pop(f"{component}_sd")
        for k, fate in enumerate(("ICM", "PE", "TE")):
            table[f"{component}[{fate}]_mean"], table[f"{component}[{fate}]_sd"] = mean * (k - 1), sd
    axes = cf.pl.effects(adata)
    titles = [ax.get_title().replace("\n", ": ") for ax in axes]
    rows = [(c, s) for c in ("lineage", "spatial") for s in ("embryo 1", "embryo 2")]
    assert titles == [f"{c}[{fate}]: {s}" for c, s in rows for fate in ("ICM", "PE", "TE")]
    left = np.array([ax.get_position().x0 for ax in axes]).reshape(4, 3)
    low = np.array([ax.get_position().y0 for ax in axes]).reshape(4, 3)
    np.testing.assert_allclose(left, np.tile(left[0], (4, 1)))
    np.testing.assert_allclose(low, np.tile(low[:, :1], (1, 3)))
    assert axes[0].figure.axes[-1].get_xlabel().endswith("red: towards that fate)")
    assert len(cf.pl.effects(adata, components="lineage")) == 6
    axes = cf.pl.effects(adata, common_scale=False)
    assert len(axes[0].figure.axes) == len(axes) + 2


def test_a_fate_of_two_words_says_which_is_red():
    adata = synthetic_result()
    adata.uns["cellfate"]["params"]["levels"] = np.array(["ICM", "trophectoderm cells of day 4"], dtype=object)
    axes = cf.pl.effects(adata)
    label = axes[0].figure.axes[-1].get_xlabel()
    assert label == "mean effect (log-odds; red: towards trophectoderm c…)"
    assert_legible(axes[0].figure)
