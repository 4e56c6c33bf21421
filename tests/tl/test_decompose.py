"""What `decompose` adds to its parts: the specimen as a group, warnings of what cannot work, names that files can hold."""

import importlib
import logging
import warnings

import anndata
import numpy as np
import pytest

import cellfate as cf
from cellfate import CellfateWarning, DataError
from tests.embryo import N, embryo, half_tree, one_tree

MODULE = "cellfate.tl.decompose"  # `cellfate.tl.decompose` is the function
BERNOULLI = {"fate": "fate", "family": "bernoulli"}


class Stopped(Exception):
    pass


@pytest.fixture
def components(monkeypatch):
    """Names of the components that would be fitted; nothing is."""

    def find(adata, **arguments):
        found = []

        def stop(family, components, **_):
            found.extend(component.name for component in components)
            raise Stopped

        monkeypatch.setattr(importlib.import_module(MODULE), "GLMM", stop)
        with pytest.raises(Stopped):
            cf.tl.decompose(adata, **BERNOULLI | arguments)
        return found

    return find


def sections(adata, levels=("s1", "s2", "s3")):
    adata.obs["section"] = np.resize(levels, N)
    return adata


def test_three_specimens_get_an_intercept_each_and_the_log_says_so(components, caplog):
    with caplog.at_level(logging.INFO, logger="cellfate"):
        assert components(sections(embryo()), library_key="section") == ["lineage", "spatial", "section"]
    (line,) = (r.getMessage() for r in caplog.records if "intercept" in r.getMessage())
    assert line.startswith("each of the 3 specimens of obs['section']")
    assert "groups=[] leaves it out" in line


@pytest.mark.parametrize(
    "arguments",
    [
        {"groups": []},
        {"formula": "~ 1 + section"},
        {"spatial": None},
        {"library_key": "half"},  # two of them
    ],
    ids=str,
)
def test_specimens_without_an_intercept(components, arguments):
    found = components(sections(embryo()), **{"library_key": "section"} | arguments)
    assert set(found) <= {"lineage", "spatial"}


def test_specimens_are_counted_among_the_cells_that_are_kept(components):
    """The third one has no leaf in the tree: of two, there is no variance."""
    adata = embryo(tree=False)
    adata.obs["section"] = ["s1"] * 10 + ["s2"] * 10 + ["s3"] * 4
    cf.pp.set_tree(adata, half_tree(0, 20) + ";", missing="drop")
    with pytest.warns(CellfateWarning, match="have no leaf"):
        assert components(adata, library_key="section") == ["lineage", "spatial"]


def test_a_reserved_name_and_clones_are_skipped(components):
    adata = sections(embryo())
    adata.obs["residual"] = adata.obs["section"]
    assert components(adata, library_key="residual") == ["lineage", "spatial"]
    found = components(adata, library_key="section", lineage="section", lineage_kernel="clone")
    assert found == ["lineage", "spatial"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"formula": None, "library_key": "half"}, "formula is None"),
        ({"formula": "~ 1 + (1|batch)"}, r"has random intercepts.*give groups=\['batch'\]"),
        ({"formula": "~ 1 + (1 | batch) + (1|half)"}, r"groups=\['batch', 'half'\]"),
        (
            {"formula": "~ 1 + (1|half) + (1 + time | batch)"},
            r"groups=\{'half': '~ 1', 'batch': '\(1 \+ time \| batch\)'\}",
        ),
        ({"spatial_kernel": "composition"}, "give niche="),
        ({"spatial_kernel": "grph"}, "unknown spatial_kernel 'grph'; did you mean 'graph'"),
        ({"lineage_kernel": "browniam"}, "unknown lineage_kernel 'browniam'; did you mean 'brownian'"),
        ({"spatial_kernel": "matern23"}, "unknown spatial_kernel 'matern23'; did you mean 'matern"),
        ({"family": "poison"}, "unknown family 'poison'; did you mean 'poisson'"),
        ({"method": "laplce"}, "unknown method 'laplce'; did you mean 'laplace'"),
    ],
)
def test_what_cannot_be_meant_is_said_at_the_door(arguments, text):
    with pytest.raises(DataError, match=text):
        cf.tl.decompose(embryo(), **BERNOULLI | arguments)


@pytest.mark.parametrize(
    ("lengthscale", "text"),
    [
        (1e4, r"lengthscale is 1e\+04, far beyond the extent of the tissue, 1\d\d: the field is all but constant"),
        (1e-3, r"lengthscale is 0.001, far below the distance of nearest neighbors, [\d.]+: no cell"),
    ],
)
def test_a_lengthscale_in_other_units_is_a_warning(components, lengthscale, text):
    with pytest.warns(CellfateWarning, match=text):
        components(embryo(), lengthscale=lengthscale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        components(embryo(), lengthscale=20.0)


def star(first, last, length=1.0):
    return "(" + ",".join(f"c{i}:{length}" for i in range(first, last)) + ");"


@pytest.mark.parametrize("kernel", ["brownian", "ou", "pagel", "early_burst"])
def test_a_star_is_a_warning(components, kernel):
    with pytest.warns(CellfateWarning, match="the tree is a star: its 24 leaves.*confounded with the residual"):
        components(embryo(), lineage=star(0, N), lineage_kernel=kernel)


def test_what_is_no_star_is_none(components):
    components(embryo(), lineage=one_tree())
    components(embryo(), lineage=star(0, N).replace("c0:1.0", "c0:2.0"))
    components(embryo(), lineage=[star(0, 12), star(12, N)], lineage_kernel="ou")  # two clones
    components(embryo(), lineage="clone", lineage_kernel="clone")


def test_counts_that_are_a_yes_or_no_are_one_warning():
    with pytest.warns(CellfateWarning) as caught:
        cf.tl.decompose(embryo(), "on", family="poisson", spatial=None, rng=0)
    assert sum("on holds only 0 and 1" in str(w.message) for w in caught) == 1


@pytest.fixture(scope="module")
def slashed(tmp_path_factory):
    """A fit whose group and covariate levels, and priors, have a slash; a view went in."""
    whole = embryo()
    whole.obs["stage"] = np.resize(["a/b", "a_b", "c"], N)
    whole.obs["dish/well"] = np.resize([1, 2, 3, 4], N)
    view = whole[::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", anndata.ImplicitModificationWarning)
        warnings.simplefilter("ignore", CellfateWarning)
        cf.tl.decompose(
            view,
            "size",
            family="gaussian",
            formula="~ 1 + stage",
            lineage=None,
            lengthscale=20.0,
            groups="dish/well",
            priors={"sd_dish/well": ("half_normal", 2.0)},
            rng=0,
        )
    assert "cellfate" not in whole.uns
    assert not view.is_view
    del view.obs["dish/well"]  # anndata itself does not write such a column
    return view


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_names_with_a_slash_survive_files(slashed, tmp_path, suffix):
    path = tmp_path / f"result.{suffix}"
    getattr(slashed, f"write_{suffix}")(path)
    back = getattr(anndata, f"read_{suffix}")(path)
    for adata in (slashed, back):
        components = list(cf.get.components(adata)["component"])
        assert components == ["spatial", "dish_well", "fixed", "residual"]
        assert {f"share_{name}" for name in components} <= set(cf.get.draws(adata))
        assert "dish_well_mean" in cf.get.effects(adata)
        terms = list(cf.get.fixed_effects(adata)["term"])
        assert terms == ["Intercept", "stage[T.a_b]", "stage[T.c]"]
        assert {f"beta[{term}]" for term in terms} <= set(cf.get.draws(adata))
        assert "variance_dish_well" in adata.uns["cellfate"]["mode"]
    assert set(back.uns["cellfate"]["mode"]) == set(slashed.uns["cellfate"]["mode"])
