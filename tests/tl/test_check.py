"""`cf.tl.check`: predictions against dense linear algebra, residuals that are normal where the model is right and not where it is wrong."""

import anndata
import numpy as np
import pytest
from scipy import stats

import cellfate as cf
from cellfate import DataError
from cellfate.io.again import OBJECTS
from cellfate.kernels.base import unit_scale
from cellfate.tl.check import _sets
from cellfate.tl.fitted import fitted
from cellfate.tl.sets import clades, regions
from cellfate.trees.convert import to_forest
from tests.problem import entries, random_newick

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")
HELD = {
    "sd_lineage": ("fixed", 1.0),
    "sd_spatial": ("fixed", 0.8),
    "sd_residual": ("fixed", 0.5),
    "beta": ("normal", 3.0),
}


@pytest.fixture(scope="module")
def linear():
    """A gaussian fit with every hyperparameter held: what is predicted is known in closed form."""
    adata = cf.datasets.simulate(70, family="gaussian", rng=2)
    cf.tl.decompose(adata, "fate", family="gaussian", lengthscale=0.5, priors=HELD, rng=0)
    cf.tl.check(adata, folds=5, rng=0)
    return adata


def covariance(adata):
    fit = fitted(adata, "cellfate", dict.fromkeys(OBJECTS), "cpu")
    kernels = {c.name: c.kernel for c in fit.glmm.components}
    a, s = entries(kernels["lineage"]), entries(kernels["spatial"], lengthscale=0.5)
    fixed = 9.0 * np.ones((70, 70))
    return unit_scale(a).numpy() + 0.64 * unit_scale(s).numpy() + fixed + 0.25 * np.eye(70), fit.cells


def test_each_cell_and_each_set_from_the_others(linear):
    """Log scores and residuals by the conditional normal distribution."""
    k, cells = covariance(linear)
    y, table = cells.response, cf.get.predictions(linear).set_index("left_out")
    sets = {"cell": np.arange(70), **_sets(cells, 5)}
    assert list(table.index) == list(sets)
    for name, label in sets.items():
        assert table.loc[name, "sets"] == len(np.unique(label))
        score = np.empty(70)
        for code in np.unique(label):
            out = label == code
            gain = np.linalg.solve(k[np.ix_(~out, ~out)], k[np.ix_(~out, out)])
            mean = gain.T @ y[~out]
            variance = np.diag(k[np.ix_(out, out)] - k[np.ix_(out, ~out)] @ gain)
            score[out] = stats.norm.logpdf(y[out], mean, np.sqrt(variance))
            if name == "cell":
                residual = linear.obs["cellfate_residual"].to_numpy()[out]
                assert residual == pytest.approx((y[out] - mean) / np.sqrt(variance), abs=1e-3)
        assert table.loc[name, "log_score"] == pytest.approx(score.mean(), abs=1e-5)


def test_tables_survive_the_disk(linear, tmp_path):
    linear.write_h5ad(tmp_path / "checked.h5ad")
    again = anndata.read_h5ad(tmp_path / "checked.h5ad")
    for get in (cf.get.checks, cf.get.predictions):
        assert get(again).equals(get(linear))
    with pytest.raises(DataError, match=r"Run `cf\.tl\.check\(adata\)` first"):
        cf.get.calibration(linear)  # of fates that are yes or no


def test_the_right_model_passes():
    adata = cf.datasets.simulate(250, family="poisson", intercept=1.0, rng=5)
    cf.tl.decompose(adata, "fate", family="poisson", rng=0)
    cf.tl.check(adata, rng=0)
    table = cf.get.checks(adata)
    assert (table["p"].dropna() > 0.01).all()
    residual = adata.obs["cellfate_residual"].to_numpy()
    assert abs(residual.mean()) < 4 / np.sqrt(250)
    assert residual.std() == pytest.approx(1, abs=4 / np.sqrt(500))


def test_what_is_missing_is_seen():
    """Overdispersion, and a neighborhood that the model does not have."""
    rng = np.random.default_rng(0)
    adata = cf.datasets.simulate(
        250, family="poisson", variance_lineage=0.3, variance_spatial=2.0, intercept=1.0, rng=6
    )
    adata.obs["noisy"] = rng.negative_binomial(0.4, 0.4 / (0.4 + np.exp(1.0)), size=250).astype(float)
    for fate, options, check in (
        ("fate", {"spatial": None, "olre": True}, ("Moran's I of residuals", None)),
        (
            "noisy",
            {"priors": {"sd_lineage": ("fixed", 0.1), "sd_spatial": ("fixed", 0.1)}},
            ("residuals are normal", "cells"),
        ),
    ):
        cf.tl.decompose(adata, fate, family="poisson", rng=0, key_added=fate, **options)
        cf.tl.check(adata, key=fate, rng=0)
        table = cf.get.checks(adata, fate)
        found = table[(table["check"] == check[0]) & ((table["over"] == check[1]) | (check[1] is None))]
        assert found["p"].min() < 0.02
    noisy = cf.get.checks(adata, "noisy").set_index("check")
    assert noisy.loc["standard deviation of fates", "p"] < 0.05


def test_probabilities_are_held_against_what_happened():
    adata = cf.datasets.simulate(200, family="binomial", rng=3)
    cf.tl.decompose(adata, "fate", family="binomial", trials="trials", rng=0)
    cf.tl.check(adata, rng=0)
    table, scores = cf.get.calibration(adata), cf.get.predictions(adata).set_index("left_out")
    assert set(table["left_out"]) == {"cell", "clade", "region"}
    for _, rows in table.groupby("left_out"):
        assert rows["cells"].sum() == 200
        assert rows["observed"] @ rows["trials"] == pytest.approx(adata.obs["fate"].sum())
    assert (scores["brier"] < scores["brier_reference"]).all()
    assert scores.loc["cell", "log_score"] > scores.loc["clade", "log_score"]


def test_sets_of_cells():
    rng = np.random.default_rng(0)
    names = [f"c{i}" for i in range(50)]
    forest = to_forest({"a": random_newick(names[:30], rng), "b": random_newick(names[30:], rng)})
    leaf = forest.nodes_of(names)
    label = clades(forest, leaf, 6)
    assert 6 <= len(np.unique(label)) <= 12
    for code in np.unique(label):
        inside = np.flatnonzero(label == code)
        top = forest.mrca(leaf[inside]).max()
        below = (leaf >= forest.start[top]) & (leaf <= top)
        assert (np.flatnonzero(below) == inside).all()
    clones = to_forest({"a": "((c0,c1,c2,c3)x,(c4,c5)y,c6)r;", "b": "(c7,c8,c9)z;"})
    stay = clades(clones, clones.nodes_of(names[:10]), 10)  # more than can be had: no clone is divided
    assert [len(set(stay[i])) for i in ([0, 1, 2, 3], [4, 5], [6], [7, 8, 9])] == [1, 1, 1, 1]
    assert len(np.unique(stay)) == 4
    specimen = np.repeat([0, 1], [40, 10])
    found = regions(rng.random((50, 2)), specimen, 5)
    assert len(np.unique(found)) == 5
    assert not set(found[:40]) & set(found[40:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"draws": 1}, "draws is 1"), ({"folds": 1.5}, r"folds is 1\.5"), ({"n_perm": 3}, "n_perm is 3")],
)
def test_wrong_numbers(linear, wrong, message):
    with pytest.raises(DataError, match=message):
        cf.tl.check(linear, **wrong)


def test_a_new_fit_takes_the_checks_of_the_old_one_away(caplog):
    adata = cf.datasets.simulate(50, family="poisson", rng=0)
    adata.obs["fit_residual"] = 1.0  # the user's own, of no check
    cf.tl.decompose(adata, "fate", family="poisson", lengthscale=0.5, rng=0)
    cf.tl.check(adata, draws=2, folds=2, n_perm=19, rng=0)
    assert "cellfate_residual" in adata.obs
    caplog.clear()
    with caplog.at_level("INFO", logger="cellfate"):
        cf.tl.decompose(adata, "fate", family="poisson", lengthscale=0.5, rng=0)
        cf.tl.decompose(adata, "fate", family="poisson", lengthscale=0.5, rng=0, key_added="fit")
        cf.tl.decompose(adata, "fate", family="poisson", lengthscale=0.5, rng=0, key_added="fit")
    said = [r.getMessage() for r in caplog.records if "is replaced" in r.getMessage()]
    assert said == [
        "the fit under 'cellfate' is replaced, and with it its checks, predictions; another key_added keeps both"
    ]
    assert "cellfate_residual" not in adata.obs
    assert (adata.obs["fit_residual"] == 1.0).all()
