"""`cf.tl.by_condition`: levels as fits of their own, differences that are there and that are not, evidence against quadrature."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.special import logsumexp

import cellfate as cf
from cellfate import CellfateWarning, DataError
from cellfate._runtime import named_generator
from cellfate.inference.levels import independent_columns
from cellfate.io.anndata import read_cells
from cellfate.kernels.base import unit_scale
from cellfate.kernels.lineage import Brownian
from cellfate.tl.by_condition import tail, verdict
from tests.embryo import contents, embryo, unchanged
from tests.problem import entries

# that a pilot or the interpolant is unsure of 40 cells is what `status` says, and no concern here
pytestmark = pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")

LEVELS = ("mutant", "wild type")
GAUSSIAN = {
    "sd_lineage": ("half_normal", 2.0),
    "sd_spatial": ("half_normal", 2.0),
    "sd_specimen": ("half_normal", 2.0),
    "sd_residual": ("half_normal", 2.0),
    "beta": ("normal", 10.0),
}


def populations(variances, *, seed=0, n=120, specimens=4, levels=LEVELS, **more):
    """Cells of several levels of a condition, each of specimens of its own, by the variance of ancestry in each."""
    parts, trees = [], {}
    for i, (level, variance) in enumerate(zip(levels, variances, strict=True)):
        rng = np.random.default_rng([seed, i])
        one = cf.datasets.simulate(n, variance_lineage=variance, n_specimens=specimens, rng=rng, **more)
        one.obs_names = [f"{level[0]}{name}" for name in one.obs_names]
        one.obs["specimen"] = [f"{level[0]}{name}" for name in one.obs["specimen"]]
        one.obs["genotype"] = level
        trees |= {f"{level[0]}{k}": tree.replace("cell", f"{level[0]}cell") for k, tree in one.uns["tree"].items()}
        parts.append(one)
    adata = anndata.concat(parts)
    adata.uns["tree"] = trees
    return adata


def only(adata, level):
    some = adata[adata.obs["genotype"] == level].copy()
    some.uns["tree"] = {k: tree for k, tree in adata.uns["tree"].items() if k in set(some.obs["specimen"])}
    return some


def of(adata, level):
    table = cf.get.conditions(adata)
    return table[table["condition"] == level].set_index("component")


def seeds(rng, level):
    """The numbers by which a level is fitted."""
    return named_generator(int(np.random.default_rng(rng).integers(2**62)), level)


NUMBERS = [f"{x}{y}" for x in ("variance", "share") for y in ("", "_sd", "_lower", "_upper")]


# --- each level ---


@pytest.mark.parametrize("family", ["poisson", "binomial"])
def test_a_level_is_the_fit_of_its_cells(family):
    """To rounding, where the scale of a fate is fixed by its family and the length-scale held."""
    adata = populations((1.0, 0.2), n=60, specimens=3, family=family)
    arguments = {"family": family, "library_key": "specimen", "lengthscale": 0.5}
    arguments |= {"trials": "trials"} if family == "binomial" else {}
    cf.tl.decompose(adata, "fate", rng=1, **arguments)
    cf.tl.by_condition(adata, "genotype", rng=7)
    for level in LEVELS:
        alone = only(adata, level)
        cf.tl.decompose(alone, "fate", rng=seeds(7, level), **arguments)
        expected = cf.get.components(alone).set_index("component")
        found = of(adata, level)
        assert list(found.index) == list(expected.index)
        assert found["n_cells"].unique().tolist() == [60]
        np.testing.assert_allclose(found[NUMBERS], expected[NUMBERS], rtol=1e-6)


def test_a_level_goes_by_the_units_of_all_cells():
    """Default priors of measurements are those of the sd of all; given by hand, the fit of the cells alone is the same."""
    adata = populations((3.0, 0.1), n=80, family="gaussian")
    arguments = {"family": "gaussian", "library_key": "specimen", "lengthscale": 0.5}
    cf.tl.decompose(adata, "fate", rng=1, **arguments)
    cf.tl.by_condition(adata, "genotype", rng=7)
    scale = 2 * adata.obs["fate"].std(ddof=0)
    priors = {name: ("half_normal", scale) for name in GAUSSIAN if name != "beta"}
    for level in LEVELS:
        alone = only(adata, level)
        cf.tl.decompose(alone, "fate", rng=seeds(7, level), priors=priors, **arguments)
        expected = cf.get.components(alone).set_index("component")
        # the search ends elsewhere by a thousandth of an sd, and so do the points that are drawn
        for quantity in ("variance", "share"):
            apart = (of(adata, level)[quantity] - expected[quantity]).abs()
            assert (apart <= 0.05 * expected[f"{quantity}_sd"]).all()


def test_what_says_nothing_in_a_level_is_left_out_of_it(caplog):
    adata = populations((1.0, 1.0), n=60, specimens=2, family="gaussian")
    adata.obs["batch"] = [f"b{i % 3}" if g == "mutant" else "w" for i, g in enumerate(adata.obs["genotype"])]
    adata.obs["dose"] = np.random.default_rng(0).normal(size=adata.n_obs)
    cf.tl.decompose(
        adata, "fate", family="gaussian", formula="~ 0 + genotype + dose", groups="batch", library_key="specimen", rng=0
    )
    with caplog.at_level("INFO", logger="cellfate"):
        cf.tl.by_condition(adata, "genotype", rng=0)
    assert "level 'wild type': component 'batch' is left out, it has one level there" in caplog.text
    assert "level 'mutant': fixed effects that say nothing there are left out: genotype[wild type]" in caplog.text
    assert list(of(adata, "mutant").index) == ["lineage", "spatial", "batch", "fixed", "residual"]
    assert list(of(adata, "wild type").index) == ["lineage", "spatial", "fixed", "residual"]
    table = cf.get.condition_differences(adata)
    assert set(table["component"]) == {"lineage", "spatial", "fixed", "residual"}
    # alike, the variance of batches is known by one level only, and that says nothing against it
    assert np.isfinite(cf.get.condition_evidence(adata)["log_bayes_factor"]).all()


def test_columns_that_follow_from_others():
    one, x = np.ones(6), np.arange(6.0)
    design = np.column_stack([0 * one, one, 2 * one, x, x + one, x**2])
    assert independent_columns(design).tolist() == [False, True, False, True, False, True]


def test_slopes_stay_in_their_unit_and_go_where_their_covariate_is_one_number(caplog):
    adata = populations((1.0, 1.0), n=60, specimens=3, family="gaussian")
    time = np.random.default_rng(0).normal(size=adata.n_obs)
    adata.obs["time"] = np.where(adata.obs["genotype"] == "mutant", 1.0, time)
    arguments = {"family": "gaussian", "library_key": "specimen", "lengthscale": 0.5, "rng": 0}
    cf.tl.decompose(adata, "fate", groups={"specimen": "~ 1 + time"}, **arguments)
    with caplog.at_level("INFO", logger="cellfate"):
        cf.tl.by_condition(adata, "genotype", rng=0)
    assert "level 'mutant': component 'specimen:time' is left out, its covariate is one number there" in caplog.text
    assert "specimen:time" in of(adata, "wild type").index
    cf.tl.decompose(adata, "fate", groups={"specimen": "(1 + time | specimen)"}, **arguments)
    with pytest.raises(
        DataError, match=r"level 'mutant' of obs\['genotype'\], 60 cells, cannot be fitted by itself: the cov"
    ):
        cf.tl.by_condition(adata, "genotype", rng=0)


# --- differences ---


@pytest.mark.parametrize("seed", range(3))
def test_what_differs_is_found(seed):
    """Ancestry of sd 2 against 0.3."""
    adata = populations((4.0, 0.09), seed=seed, family="gaussian")
    cf.tl.decompose(adata, "fate", family="gaussian", library_key="specimen", rng=0)
    cf.tl.by_condition(adata, "genotype", rng=0)
    (row,) = cf.get.condition_evidence(adata).to_dict("records")
    assert row["log_bayes_factor"] > 5
    assert row["verdict"] == "very strong evidence that the levels differ"
    table = cf.get.condition_differences(adata).set_index(["component", "quantity"])
    for quantity in ("share", "log_variance"):
        lineage = table.loc[("lineage", quantity)]
        assert (lineage["condition"], lineage["other"]) == LEVELS
        assert lineage["lower"] > 0
        assert lineage["q"] < 0.05
    truth = np.log(4.0 / 0.09)
    assert table.loc[("lineage", "log_variance"), "lower"] < truth < table.loc[("lineage", "log_variance"), "upper"]


@pytest.mark.parametrize("seed", range(3))
def test_what_does_not_differ_is_not(seed):
    """Means that differ are no difference of hyperparameters. Where nothing differs, one data set in a hundred has a q below 0.01."""
    adata = populations((1.0, 1.0), seed=seed, family="gaussian")
    adata.obs["fate"] += 5.0 * (adata.obs["genotype"] == "mutant")
    cf.tl.decompose(adata, "fate", family="gaussian", formula="~ 1 + genotype", library_key="specimen", rng=0)
    cf.tl.by_condition(adata, "genotype", rng=0)
    assert cf.get.condition_evidence(adata)["log_bayes_factor"].item() < 0
    assert (cf.get.condition_differences(adata)["q"] > 0.01).all()


def test_adjusted_p_values_are_those_of_benjamini_and_hochberg():
    adata = populations((2.0, 0.5, 0.5), levels=("early", "late", "middle"), n=40, specimens=2, family="gaussian")
    cf.tl.decompose(adata, "fate", family="gaussian", library_key="specimen", lengthscale=0.5, groups=[], rng=0)
    cf.tl.by_condition(adata, "genotype", rng=0)
    table = cf.get.condition_differences(adata)
    assert len(table) == 3 * 3 * 2
    for _, rows in table.groupby("quantity"):
        p = rows["p"].to_numpy()
        order = np.argsort(p)[::-1]
        expected = np.empty(len(p))
        expected[order] = np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1))
        np.testing.assert_allclose(rows["q"], expected.clip(max=1))


def test_tails():
    x = np.arange(-1.0, 999.0)  # two of a thousand are at or below zero
    assert tail(x) == pytest.approx(2 * 3 / 1001)
    assert tail(-x) == tail(x)
    assert tail(np.zeros(10)) == 1.0


# --- evidence ---


@pytest.mark.parametrize("variances", [(2.0, 2.0), (4.0, 0.05)], ids=str)
def test_evidence_is_that_of_quadrature(variances):
    """Measurements with ancestry alone: both integrals over a grid of the two sds."""
    adata = populations(variances, n=40, specimens=2, family="gaussian", variance_spatial=0.0)
    arguments = {"family": "gaussian", "library_key": "specimen", "spatial": None}
    cf.tl.decompose(
        adata, "fate", priors={k: GAUSSIAN[k] for k in ("sd_lineage", "sd_residual", "beta")}, rng=0, **arguments
    )
    cf.tl.by_condition(adata, "genotype", rng=0)
    cells = read_cells(adata, "fate", **arguments)
    sds = np.linspace(1e-3, 6.0, 150)
    log_prior = 2 * (np.log(2) - 0.5 * np.log(2 * np.pi * 4)) - 0.5 * (sds[:, None] ** 2 + sds**2) / 4
    likelihoods = []
    for level in LEVELS:
        here = np.flatnonzero(adata.obs["genotype"] == level)
        k = unit_scale(entries(Brownian(cells.forest, cells.leaf).at(here))).numpy()
        y = cells.response[here]
        grid = np.empty((150, 150))
        for i, of_lineage in enumerate(sds):
            # one decomposition for all residual sds; the intercept, of prior sd 10, goes in by the matrix determinant lemma
            values, vectors = np.linalg.eigh(of_lineage**2 * k)
            v = values[:, None] + sds**2
            own, ones = (vectors.T @ x for x in (y, np.ones(len(y))))
            weight = 1 / 100 + (ones[:, None] ** 2 / v).sum(0)
            quadratic = (own[:, None] ** 2 / v).sum(0) - ((own * ones)[:, None] / v).sum(0) ** 2 / weight
            log_det = np.log(v).sum(0) + np.log(100 * weight)
            grid[i] = -0.5 * (len(y) * np.log(2 * np.pi) + log_det + quadratic)
        likelihoods.append(grid)

    def integral(log_likelihood):
        return logsumexp(log_likelihood + log_prior) + 2 * np.log(sds[1] - sds[0])

    (row,) = cf.get.condition_evidence(adata).to_dict("records")
    assert row["log_evidence_apart"] == pytest.approx(sum(map(integral, likelihoods)), abs=0.1)
    assert row["log_evidence_alike"] == pytest.approx(integral(sum(likelihoods)), abs=0.1)
    assert row["log_bayes_factor"] == pytest.approx(row["log_evidence_apart"] - row["log_evidence_alike"])
    assert row["error"] < 0.1


def test_the_engines_agree():
    adata = populations((1.0, 1.0), n=80, specimens=2, family="gaussian")
    found = {}
    for engine in ("dense", "structured"):
        cf.tl.decompose(
            adata, "fate", family="gaussian", library_key="specimen", engine=engine, groups=[], key_added=engine, rng=0
        )
        cf.tl.by_condition(adata, "genotype", key=engine, rng=0)
        found[engine] = cf.get.condition_evidence(adata, engine).iloc[0]
    for column in ("log_evidence_apart", "log_evidence_alike", "log_bayes_factor"):
        assert found["structured"][column] == pytest.approx(found["dense"][column], abs=0.5)


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (6.0, "very strong evidence that the levels differ"),
        (-3.5, "strong evidence for one set of hyperparameters in all levels"),
        (1.5, "positive evidence that the levels differ"),
        (-0.2, "undecided"),
        (np.nan, "not known"),
    ],
)
def test_verdicts(factor, said):
    assert verdict(factor).startswith(said)


def test_levels_that_share_a_tree_have_no_bayes_factor():
    adata = cf.datasets.simulate(80, family="gaussian", rng=0)
    adata.obs["genotype"] = np.resize(LEVELS, 80)
    cf.tl.decompose(adata, "fate", family="gaussian", lengthscale=0.5, rng=0)
    with pytest.warns(
        CellfateWarning, match=r"not independent: they share one tree \(lineage\), one field \(spatial\)"
    ):
        cf.tl.by_condition(adata, "genotype", rng=0)
    (row,) = cf.get.condition_evidence(adata).to_dict("records")
    assert np.isnan(row["log_bayes_factor"])
    assert row["verdict"] == "not known"
    for table in (cf.get.conditions(adata), cf.get.condition_differences(adata), cf.get.condition_evidence(adata)):
        assert table["status"].str.contains("levels share one tree").all()
    assert cf.get.condition_differences(adata)["p"].between(0, 1).all()


def test_what_levels_share_is_counted():
    """A batch that crosses levels, and a specimen with cells of both."""
    adata = populations((1.0, 1.0), n=60, specimens=3, family="gaussian")
    adata.obs["batch"] = np.resize(["a", "b", "c", "d"], adata.n_obs)
    arguments = {"family": "gaussian", "library_key": "specimen", "lengthscale": 0.5, "rng": 0}
    cf.tl.decompose(adata, "fate", groups="batch", **arguments)
    with pytest.warns(CellfateWarning, match=r"they share 4 of 4 levels \(batch\)\. There"):
        cf.tl.by_condition(adata, "genotype", rng=0)
    cf.tl.decompose(adata, "fate", groups=[], **arguments)
    some = adata.obs["genotype"].to_numpy(dtype=object)
    some[np.flatnonzero(adata.obs["specimen"] == "wspecimen0")[:10]] = "mutant"
    adata.obs["mosaic"] = some
    with pytest.warns(CellfateWarning, match=r"they share 1 of 6 trees \(lineage\), 1 of 6 fields \(spatial\)\. There"):
        cf.tl.by_condition(adata, "mosaic", rng=0)


# --- the door ---


def test_results_are_added_and_nothing_else_is_touched(tmp_path):
    adata = populations((1.0, 1.0), n=40, specimens=2, family="gaussian")
    adata.uns["colors"] = ["red", "blue"]
    cf.tl.decompose(adata, "fate", family="gaussian", library_key="specimen", lengthscale=0.5, rng=0)
    with unchanged(adata):
        copy = cf.tl.by_condition(adata, "genotype", rng=0, copy=True)
    assert cf.tl.by_condition(adata, "genotype", rng=0) is None
    assert contents(adata) == contents(copy)
    adata.write_h5ad(tmp_path / "fit.h5ad")
    back = anndata.read_h5ad(tmp_path / "fit.h5ad")
    for getter in (cf.get.conditions, cf.get.condition_differences, cf.get.condition_evidence):
        pd.testing.assert_frame_equal(getter(back), getter(copy))
    new = {"conditions", "condition_differences", "condition_evidence"}
    cf.tl.decompose(adata, "fate", family="gaussian", library_key="specimen", lengthscale=0.5, rng=0)
    assert not new & set(adata.uns["cellfate"])
    with pytest.raises(DataError, match=r"has no 'conditions'. Run `cf.tl.by_condition\(adata, <column>\)` first"):
        cf.get.conditions(adata)


@pytest.fixture(scope="module")
def fit():
    big = cf.datasets.simulate(60, family="bernoulli", rng=3)
    big.obs["few"] = np.where(np.arange(60) < 8, "rare", "common")
    big.obs["gone"] = pd.Series(np.resize(["a", "b"], 60), index=big.obs_names).where(np.arange(60) > 2)
    big.obs["one"] = "all"
    big.obs["same"] = np.where(big.obs["fate"] == 1, "yes", "no")
    big.obs["x"] = np.random.default_rng(0).normal(size=60)
    cf.tl.decompose(big, "fate", family="bernoulli", lengthscale=0.5, rng=0)
    return big


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("genotyp", "condition: there is no obs column 'genotyp'"),
        (3, "condition is of type int, wanted the name of an obs column"),
        ("fate", r"condition obs\['fate'\] is the fate itself"),
        ("gone", r"condition obs\['gone'\] is NaN in 3 of 60 cells: 'cell0', 'cell1', 'cell2'"),
        ("one", r"condition obs\['one'\] has one level: all 60 cells of the fit are 'all'"),
        ("few", r"condition obs\['few'\] has 1 of 2 levels with fewer than 20 cells of the fit: 'rare: 8'"),
        ("x", "has 60 of 60 levels with fewer than 20 cells"),
    ],
)
def test_conditions_that_are_none(fit, condition, message):
    with unchanged(fit), pytest.raises(DataError, match=message):
        cf.tl.by_condition(fit, condition)


def test_a_level_in_which_the_fate_does_not_vary(fit):
    with (
        unchanged(fit),
        pytest.raises(DataError, match=r"level 'no' of obs\['same'\], \d+ cells, cannot be fitted by itself"),
    ):
        cf.tl.by_condition(fit, "same")


@pytest.mark.parametrize("more", [{"reml": False}, {"family": "categorical"}], ids=str)
def test_fits_that_cannot_be_compared(more):
    adata = embryo()
    adata.obs["kind"] = np.resize(["a", "b", "c"], adata.n_obs)
    family = more.pop("family", "gaussian")
    fate = "kind" if family == "categorical" else "size"
    cf.tl.decompose(adata, fate, family=family, spatial=None, key_added="mine", rng=0, **more)
    with pytest.raises(
        NotImplementedError,
        match="family='categorical', which" if family == "categorical" else "with reml=False, as this one",
    ):
        cf.tl.by_condition(adata, "half", key="mine")


def test_the_log_says_what_is_replaced_and_where_a_level_is_one_specimen(caplog):
    adata = cf.datasets.simulate(80, family="gaussian", n_specimens=2, rng=0)
    adata.obs["genotype"] = np.where(adata.obs["specimen"] == "specimen0", "mutant", "wild type")
    cf.tl.decompose(adata, "fate", family="gaussian", library_key="specimen", lengthscale=0.5, rng=0)
    with caplog.at_level("INFO", logger="cellfate"):
        cf.tl.by_condition(adata, "genotype", rng=0)
        assert "each level of obs['genotype'] is one specimen" in caplog.text
        assert "is replaced" not in caplog.text
        adata.obs["same"] = adata.obs["genotype"].str.upper()
        cf.tl.by_condition(adata, "same", rng=0)
    assert "the comparison by 'genotype' under 'cellfate' is replaced" in caplog.text
