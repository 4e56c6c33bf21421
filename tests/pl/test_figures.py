"""What holds for every figure: given axes, showing, saving, style, units, and errors that say what to do."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

import cellfate as cf
from cellfate.pl import _style
from tests.pl.helpers import two_responses, with_comparison
from tests.synthetic import synthetic_result


def compare(adata, **options):
    return cf.pl.compare(with_comparison(adata), **options)


FIGURES = {
    "compare": (compare, {}),
    "variance_shares": (cf.pl.variance_shares, {}),
    "posterior": (cf.pl.posterior, {}),
    "effects": (cf.pl.effects, {"components": "lineage"}),
}


@pytest.mark.parametrize(
    ("link", "units"), [("logit", "log-odds"), ("log", "log units"), ("identity", "units of fate")]
)
def test_labels_have_units(link, units):
    adata = synthetic_result(link=link)
    assert cf.pl.posterior(adata).get_xlabel() == f"standard deviation ({units})"
    axes = cf.pl.effects(adata)
    bar = axes[0].figure.axes[-1]
    assert bar.get_xlabel() == f"posterior mean effect ({units})"


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


def two_names(adata):
    adata.uns["cellfate"] |= {name: two_responses().uns["cellfate"][name] for name in ("components", "shares")}


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
        (nothing, lambda a: cf.pl.effects(a, components="clone"), r"no effects of \['clone'\]: use some of"),
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
            lambda a: cf.pl.effects(a, components="lineage", ax=plt.subplots(subplot_kw={"projection": "3d"})[1]),
            "differ in dimension",
        ),
        (nothing, lambda a: cf.pl.posterior(a, save="p.foo"), r"save is 'p.foo': a figure ends in one of \..*\.png"),
        (two_names, lambda a: cf.pl.posterior(a), "name one of the 2 responses of the fit, such as response='fate'"),
        (
            two_names,
            lambda a: cf.pl.posterior(a, response="gene"),
            "there is no response 'gene': name one of the 2 responses",
        ),
        (no_kept_cell, lambda a: cf.pl.effects(a), "all were left out of the fit"),
    ],
)
def test_errors_say_what_to_do(change, call, message):
    adata = synthetic_result()
    change(adata)
    with pytest.raises(ValueError, match=message):
        call(adata)
