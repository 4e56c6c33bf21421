"""Intercepts that covary with slopes, through the whole of it: lme4's numbers, and from AnnData to a file and back."""

import json
from pathlib import Path

import anndata
import numpy as np
import pytest

import cellfate as cf
from cellfate import DataError
from cellfate.cli import fit as command
from cellfate.io.anndata import read_cells
from cellfate.kernels import CorrelatedSlopes
from tests.embryo import embryo

SLEEP = json.loads((Path(__file__).parents[1] / "reference" / "sleepstudy.json").read_text())
FLAT = dict.fromkeys(["sd_subject", "sd_subject:slope", "sd_residual", "correlation_subject"], "flat")
CALL = {"family": "gaussian", "spatial": None, "rng": 0}
ROUGH = pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")


def sleep(centered, **options):
    y, days, codes = (np.array(SLEEP[name]) for name in ("reaction", "days", "subject"))
    x = days - days.mean() if centered else days.astype(float)
    glmm = cf.GLMM("gaussian", {"subject": CorrelatedSlopes(codes, x)}, **options)
    return glmm, (y, np.column_stack([np.ones(len(y)), x]))


@pytest.mark.parametrize("engine", ["dense", "structured"])
@pytest.mark.parametrize("centered", [False, True], ids=["days", "centered"])
def test_the_likelihood_is_that_of_lme4(centered, engine):
    """At lme4's maximum of the likelihood, and the maximum is there: every step away is lower."""
    glmm, data = sleep(centered, engine=engine, reml=False, priors=FLAT)
    its = SLEEP["lme4"]["centered_ml" if centered else "Days_ml"]
    at = {"sd_subject": its["sd"], "sd_subject:slope": its["slope"], "correlation_subject": its["correlation"]}
    at |= {"sd_residual": its["residual"], "beta": [its["b0"], its["b1"]]}
    assert glmm.evaluate(at, *data).free_energy == pytest.approx(its["loglik"], abs=1e-6)
    for name in ("sd_subject", "sd_subject:slope", "correlation_subject", "sd_residual"):
        for factor in (0.98, 1.02):
            assert glmm.evaluate(at | {name: factor * at[name]}).free_energy < its["loglik"]


@ROUGH
@pytest.mark.parametrize("centered", [False, True], ids=["days", "centered"])
def test_estimates_are_those_of_lme4(centered):
    """REML and, under flat priors, the mode; under the usual priors lme4's estimates are well inside the intervals."""
    its = SLEEP["lme4"]["centered_reml" if centered else "Days_reml"]
    glmm, data = sleep(centered, priors=FLAT)
    fit = glmm.fit(*data, rng=0)
    assert fit.mode["variance_subject"] ** 0.5 == pytest.approx(its["sd"], rel=0.01)
    assert fit.mode["variance_subject:slope"] ** 0.5 == pytest.approx(its["slope"], rel=0.01)
    assert fit.mode["variance_residual"] ** 0.5 == pytest.approx(its["residual"], rel=0.002)
    assert fit.mode["correlation_subject"] == pytest.approx(its["correlation"], abs=0.01)
    glmm, data = sleep(centered)
    draws = glmm.fit(*data, rng=0).draws
    found = {"sd": draws["variance_subject"] ** 0.5, "slope": draws["variance_subject:slope"] ** 0.5}
    found |= {"residual": draws["variance_residual"] ** 0.5, "correlation": draws["correlation_subject"]}
    for name, x in found.items():
        assert np.quantile(x, 0.1) < its[name] < np.quantile(x, 0.9)


@pytest.fixture(scope="module")
def two_forms():
    out = embryo()
    rng = np.random.default_rng(0)
    out.obs["dish"] = np.arange(out.n_obs) % 6
    out.obs["hours"] = rng.normal(50.0, 3.0, out.n_obs)
    level = rng.normal(size=6)
    out.obs["size"] = level[out.obs["dish"]] * (1 + 0.3 * (out.obs["hours"] - 50)) + 0.3 * rng.normal(size=out.n_obs)
    return out


@ROUGH
def test_from_anndata_to_a_file_and_back(two_forms, tmp_path):
    fit = cf.tl.decompose(two_forms, "size", groups={"dish": "(1 + hours | dish)"}, copy=True, **CALL)
    fit.write_h5ad(tmp_path / "out.h5ad")
    back = anndata.read_h5ad(tmp_path / "out.h5ad")
    table = cf.get.components(back).set_index("component")
    assert list(table.index) == ["lineage", "dish", "residual"]
    draws = cf.get.draws(back)
    # the variance is that of the intercepts, the share holds what both contribute
    assert table.loc["dish", "variance"] == pytest.approx(draws["variance_dish"].mean())
    assert table["share"].sum() == pytest.approx(1.0)
    share = draws["variance_dish"] / draws[["variance_lineage", "variance_dish", "variance_residual"]].sum(axis=1)
    assert draws["share_dish"].mean() > share.mean()
    shapes = cf.get.hyperparameters(back).set_index("term")
    assert list(shapes.index) == ["sd_dish", "sd_dish:hours", "correlation_dish"]
    assert -1 < shapes.loc["correlation_dish", "lower"] < shapes.loc["correlation_dish", "upper"] < 1
    assert shapes.loc["correlation_dish", "median"] > 0.3  # it is 1
    assert shapes.loc["sd_dish:hours", "lower"] > 0
    cf.tl.predict(back, "ancestors", draws=4, rng=0)  # reads the group again
    assert np.isfinite(cf.get.ancestors(back)["mean"]).all()


def test_how_it_is_read(two_forms):
    def read(formula):
        return read_cells(two_forms, "size", family="gaussian", groups={"dish": formula})

    pair, same, apart, alone = (
        read(f) for f in ("(1 + hours | dish)", "(hours|`dish`)", "(1 + hours || dish)", "(0 + hours | dish)")
    )
    assert pair.correlated == same.correlated == {"dish": "dish:hours"}
    assert apart.correlated == alone.correlated == {}
    assert list(apart.groups) == ["dish"]
    assert list(alone.groups) == []
    np.testing.assert_array_equal(pair.slopes["dish:hours"][1], apart.slopes["dish:hours"][1])
    assert abs(pair.slopes["dish:hours"][1].mean()) < 1e-12
    assert read("(1 | dish)").slopes == {}


@pytest.mark.parametrize(
    ("formula", "said"),
    [
        (
            "(1 + hours + time | dish)",
            "makes 3 columns, Intercept, hours, time. Only an intercept and the slopes of one",
        ),
        ("(0 + hours + time | dish)", "makes 2 columns, hours, time. Only an intercept"),
        ("(1 + hours | plate)", r"behind its bar, but its key is 'dish'. Write '\(1 \+ hours \| dish\)'"),
        ("~ 1 + hours | dish", r"or '\(1 \+ time \| dish\)', in brackets, for those that covary"),
    ],
)
def test_what_cannot_covary(two_forms, formula, said):
    with pytest.raises(DataError, match=said):
        read_cells(two_forms, "size", family="gaussian", groups={"dish": formula})


def test_a_formula_with_a_bar_is_sent_to_groups(two_forms):
    with pytest.raises(DataError, match=r"give groups=\{'dish': '\(1 \+ hours \| dish\)'\}"):
        read_cells(two_forms, "size", family="gaussian", formula="~ 1 + (1 + hours | dish)")


def test_on_the_command_line():
    assert command._groups(["batch", "dish=(1 + hours | dish)"]) == {"batch": "~ 1", "dish": "(1 + hours | dish)"}


@pytest.mark.parametrize(
    ("priors", "said"),
    [
        ({"correlation_subject": ("half_normal", 1)}, r"does not suit 'correlation_subject', which is a correlation"),
        ({"correlation_subject": ("fixed", 1.0)}, "a correlation is below 1"),
        ({"sd_subject": ("fixed", -0.5)}, "is not understood"),
        ({"sd_subject:time": "flat"}, "which this model does not have"),
    ],
)
def test_priors_that_do_not_suit(priors, said):
    def build():
        glmm, data = sleep(True, priors=priors)
        return glmm.on(*data)

    with pytest.raises(DataError, match=said):
        build()


def test_a_correlation_can_be_held():
    glmm, data = sleep(True, priors={"correlation_subject": ("fixed", -0.5)})
    assert glmm.fit(*data, rng=0).mode["correlation_subject"] == -0.5
