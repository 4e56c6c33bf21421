"""A covariate within and between clades: the split, and whether confounding is seen."""

import numpy as np
import pytest

import cellfate as cf
from cellfate import DataError
from cellfate.pp.within_between import clades
from cellfate.trees.convert import to_forest
from tests.embryo import N, embryo

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")
NEWICK = "(((a:1,b:1)x:1,c:2)y:1,(d:1,e:1)z:2)r;"


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (0.0, [{"a", "b", "c", "d", "e"}]),
        (1.0, [{"a", "b", "c"}, {"d", "e"}]),
        (1.5, [{"a", "b"}, {"c"}, {"d", "e"}]),
        (2.5, [{"a"}, {"b"}, {"c"}, {"d"}, {"e"}]),
        (9.0, [{"a"}, {"b"}, {"c"}, {"d"}, {"e"}]),
    ],
)
def test_clades_of_a_tree_cut_at_a_depth(depth, expected):
    forest = to_forest(NEWICK)
    leaves = forest.nodes_of("abcde")
    own = clades(forest, depth)[leaves]
    found = [{name for name, clade in zip("abcde", own, strict=True) if clade == other} for other in np.unique(own)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def test_parts_sum_to_the_covariate_and_means_are_those_of_groups():
    adata = embryo()
    cf.pp.within_between(adata, "time", by="clone")
    means = adata.obs.groupby("clone")["time"].mean()
    np.testing.assert_allclose(adata.obs["time_between"], means[adata.obs["clone"]].to_numpy())
    np.testing.assert_allclose(adata.obs["time_between"] + adata.obs["time_within"], adata.obs["time"])
    copy = cf.pp.within_between(adata, "count", by=1.0, copy=True)
    assert "count_within" not in adata.obs
    by_half = copy.obs.groupby("half")["count_between"].nunique()  # the tree divides there first
    assert (by_half < N // 2).all()
    np.testing.assert_allclose(copy.obs["count_between"] + copy.obs["count_within"], copy.obs["count"])


def test_confounding_is_seen_and_its_absence_too():
    """Clades that have more of the covariate for the reason that makes their fate: an effect between that is not one within."""
    adata = cf.datasets.simulate(300, family="gaussian", variance_lineage=0.2, variance_spatial=0.2, rng=3)
    rng = np.random.default_rng(0)
    adata.obs["noise"] = rng.normal(size=300)
    cf.pp.within_between(adata, "noise", by=0.5)
    clade = adata.obs["noise_between"].rank(method="dense").astype(int).to_numpy()
    common = rng.normal(size=clade.max() + 1)[clade]
    adata.obs["x"] = common + rng.normal(size=300)
    adata.obs["free"] = adata.obs["fate"] + 0.5 * adata.obs["x"]
    adata.obs["caught"] = adata.obs["free"] + 1.5 * common
    adata.obs["clade"] = [f"k{c}" for c in clade]
    cf.pp.within_between(adata, "x", by="clade")
    p = {}
    for fate in ("free", "caught"):
        cf.tl.decompose(adata, fate, family="gaussian", formula="~ 1 + x_within + x_between", rng=0)
        table = cf.tl.mundlak(adata, "x")
        p[fate] = table.loc["difference", "p"]
        assert table.loc["within", "estimate"] == pytest.approx(0.5, abs=3.5 * table.loc["within", "sd"])
    assert p["caught"] < 1e-3 < 0.01 < p["free"]


def test_wrong_questions():
    adata = embryo()
    for arguments, message in (
        (("tiem", "clone"), "adata.obs has no 'tiem'"),
        (("stage", "clone"), "a mean is of numbers"),
        (("time", "klone"), "no 'klone' to group by"),
        (("time", -1.0), "wanted a column of obs, or a depth of the tree"),
        (("time", 0.0), "there is nothing between them"),
        (("time", 99.0), "there is nothing within them"),
    ):
        with pytest.raises(DataError, match=message):
            cf.pp.within_between(adata, *arguments)
    assert not [c for c in adata.obs if c.endswith("_within")]
    cf.tl.decompose(adata, "size", family="gaussian", rng=0)
    with pytest.raises(DataError, match=r"cf.pp.within_between\(adata, 'time', by=...\)"):
        cf.tl.mundlak(adata, "time")
