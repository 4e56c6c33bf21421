"""`cf.tl.test_components`: what is there is seen, what is not is not, and every question is answered in words."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chi2, false_discovery_control

import cellfate as cf
from cellfate import DataError
from cellfate.engines.choose import choose
from cellfate.inference.bootstrap import draw_fate
from cellfate.inference.mode import find_mode
from cellfate.inference.score import Null
from cellfate.inference.sites import Variational
from cellfate.inference.swaps import swap_test, swaps
from cellfate.io.again import OBJECTS
from cellfate.kernels.base import Component, unit_scale
from cellfate.kernels.groups import Intercepts
from cellfate.model.glmm import Model
from cellfate.tl.fitted import fitted
from cellfate.tl.sets import neighborhoods
from tests.embryo import embryo
from tests.problem import entries, small_problem

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")


@pytest.fixture(scope="module")
def fit():
    """Ancestry strong, no neighborhood."""
    adata = cf.datasets.simulate(150, family="gaussian", variance_spatial=0.0, variance_lineage=2.0, rng=4)
    cf.tl.decompose(adata, "fate", family="gaussian", rng=0)
    return adata


def test_what_is_there_and_what_is_not(fit, tmp_path):
    before = set(fit.uns["cellfate"])
    copy = cf.tl.test_components(fit, copy=True)
    assert set(fit.uns["cellfate"]) == before
    copy.write_h5ad(tmp_path / "fit.h5ad")
    table = cf.get.tests(anndata.read_h5ad(tmp_path / "fit.h5ad")).set_index("component")
    assert table.loc["lineage", "p"] < 1e-4
    assert table.loc["spatial", "p"] > 0.05
    assert table["given"].to_dict() == {"lineage": "spatial", "spatial": "lineage"}
    pd.testing.assert_frame_equal(cf.get.tests(copy), table.reset_index()[list(cf.get.tests(copy))])


def test_the_bootstrap_agrees_with_the_score(fit):
    """Both p-values of an absent component; 40 draws know one of a half to 0.08."""
    copy = cf.tl.test_components(fit, "spatial", method="bootstrap", n_boot=39, rng=0, copy=True)
    (row,) = cf.get.tests(copy).to_dict("records")
    assert row["p"] == pytest.approx(row["p_score"], abs=0.25)
    assert (row["p"] * 40) == pytest.approx(round(row["p"] * 40))


@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "negative_binomial", "binomial", "beta"])
def test_fates_of_the_null_model_are_like_its_data(family):
    """Mean of many drawn fates is that of the model: checked for the linear one against its covariance, for others by range."""
    model, engine = small_problem(family, lineage="brownian", groups=())
    null = Null(model, engine, Variational(), find_mode(model, engine, Variational()))
    rng = np.random.default_rng(0)
    drawn = np.array([draw_fate(null, rng) for _ in range(400 if family == "gaussian" else 5)])
    assert drawn.shape[1] == model.data.n
    assert np.isfinite(drawn).all()
    trials = model.data.outcome.trials
    if family in ("bernoulli", "binomial"):
        assert ((drawn >= 0) & (drawn <= (1 if trials is None else trials.numpy()))).all()
    if family == "gaussian":
        assert isinstance(model, Model)
        values = {
            name: float(x) for name, x in model.theta(find_mode(model, engine, Variational()).u[None]).values.items()
        }
        kernels = {c.name: c.kernel for c in model.components}
        k = values["sd_lineage"] ** 2 * unit_scale(entries(kernels["lineage"]))
        k = k + values["sd_spatial"] ** 2 * unit_scale(
            entries(kernels["spatial"], lengthscale=values["lengthscale_spatial"])
        )
        expected = float(k.diagonal().sum()) + model.data.n * values["sd_residual"] ** 2
        spread = ((drawn - drawn.mean(0)) ** 2).sum(1)
        assert spread.mean() == pytest.approx(expected, abs=5 * spread.std() / 20 + 0.01 * expected)
        assert torch.isfinite(null.b).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"components": "tree"}, DataError, r"components has \['tree'\]; the fit has lineage, spatial"),
        ({"components": []}, DataError, "components has no names"),
        ({"method": "wald"}, DataError, "method"),
        ({"n_boot": 0}, DataError, "n_boot is 0, wanted how many fates"),
        ({"n_perm": 2.5}, DataError, "n_perm is 2.5, wanted how many swaps"),
    ],
)
def test_wrong_questions(fit, arguments, error, message):
    with pytest.raises(error, match=message):
        cf.tl.test_components(fit, **arguments)
    with pytest.raises(DataError, match=r"has no 'tests'. Run `cf.tl.test_components\(adata\)` first"):
        cf.get.tests(fit)


def test_one_component_has_nothing_to_be_held_against():
    adata = embryo()
    cf.tl.decompose(adata, "size", family="gaussian", lineage=None, rng=0)
    with pytest.raises(DataError, match="the fit has one component, 'spatial'"):
        cf.tl.test_components(adata)


def test_groups_and_interactions_are_components_too():
    adata = embryo()
    cf.tl.decompose(adata, "size", family="gaussian", groups="batch", interaction=True, rng=0)
    cf.tl.test_components(adata)
    table = cf.get.tests(adata).set_index("component")
    assert table["p"].between(0, 1).all()
    assert table.loc["batch", "given"] == "lineage + spatial + lineage:spatial"
    assert table.loc["spatial", "given"] == "lineage + batch"  # an interaction goes by its length-scale


def test_the_likelihood_ratio_is_the_gain_from_mode_to_mode(fit):
    """Against the free energies behind the AIC of a comparison of the same models."""
    copy = cf.tl.test_components(fit, method="likelihood_ratio", copy=True)
    cf.tl.compare(copy, draws=4, rng=0)
    table = cf.get.comparison(copy).set_index("model")
    free_energy = table["hyperparameters"] - table["aic"] / 2
    tests = cf.get.tests(copy).set_index("component")
    for name, other in (("lineage", "spatial"), ("spatial", "lineage")):
        gain = 2 * (free_energy["lineage + spatial"] - free_energy[other])
        assert tests.loc[name, "statistic"] == pytest.approx(gain, abs=1e-3)
        expected = 0.5 * chi2.sf(gain, 1) if gain > 0 else 1.0
        assert tests.loc[name, "p"] == pytest.approx(expected, rel=0.01, abs=1e-12)


def test_the_likelihood_ratio_adds_one_component():
    """Not the interaction that goes by it: as of a fit that has none."""
    statistics = []
    for interaction in (True, False):
        adata = embryo()
        cf.tl.decompose(adata, "size", family="gaussian", interaction=interaction, rng=0)
        cf.tl.test_components(adata, "spatial", method="likelihood_ratio")
        statistics.append(cf.get.tests(adata)["statistic"].item())
    assert statistics[0] == pytest.approx(statistics[1], abs=1e-3)


def test_swaps_stay_within_their_sets():
    sets = np.array([0, 1, 0, 2, 1, 0, 3])
    orders = np.concatenate(list(swaps(sets, 4000, np.random.default_rng(0))))
    assert len(orders) == 4001
    assert (orders[0] == np.arange(7)).all()
    assert (np.sort(orders, 1) == np.arange(7)).all()
    assert (sets[orders] == sets).all()
    # each of the three of set 0 comes to each of their places a third of the time
    share = (orders[1:, 0][:, None] == [0, 2, 5]).mean(0)
    assert share == pytest.approx(1 / 3, abs=5 * np.sqrt(2 / 9 / 4000))


def test_swapped_cells_are_those_of_the_covariance_written_out():
    """Against b' K b with rows and columns of K moved, and all orders of the sets."""
    model, engine = small_problem("gaussian", lineage="brownian", groups=())
    names = [c.name for c in model.components]
    null = Null(model, engine, Variational(), find_mode(model, engine, Variational()))
    kernel = Intercepts(np.arange(model.data.n) % 7)
    component = Component("batch", kernel)
    assert "batch" not in names
    own, _ = choose("auto", [component], model.data.n, device=torch.device("cpu"), dtype=torch.float64)
    sets = np.arange(model.data.n) // 5
    p = swap_test(null, own, component, sets, count=199, rng=np.random.default_rng(3))
    k, b = unit_scale(entries(kernel)).numpy(), null.b.numpy()
    found = []
    for order in np.concatenate(list(swaps(sets, 199, np.random.default_rng(3)))):
        back = np.argsort(order)
        found.append(b @ k[np.ix_(back, back)] @ b)
    assert p == pytest.approx((np.array(found) >= found[0] * (1 - 1e-12)).mean(), abs=1e-12)
    alone = np.arange(model.data.n)
    assert swap_test(null, own, component, alone, count=199, rng=np.random.default_rng(0)) == 1.0


def test_permutation_sees_what_is_there(fit):
    copy = cf.tl.test_components(fit, method="permutation", n_perm=399, rng=0, copy=True)
    table = cf.get.tests(copy).set_index("component")
    assert table.loc["lineage", "p"] == pytest.approx(1 / 400)
    assert table.loc["spatial", "p"] > 0.05
    again = cf.tl.test_components(fit, "spatial", method="permutation", n_perm=399, rng=0, copy=True)
    assert cf.get.tests(again)["p"].item() == table.loc["spatial", "p"]  # whatever else is tested


def test_what_cannot_be_swapped_is_said():
    adata = embryo()
    cf.tl.decompose(adata, "size", family="gaussian", groups="batch", rng=0)
    with pytest.raises(NotImplementedError, match="not for 'batch' given lineage, spatial"):
        cf.tl.test_components(adata, method="permutation")
    cf.tl.test_components(adata, ["lineage", "spatial"], method="permutation", n_perm=19, rng=0)
    assert (cf.get.tests(adata)["p"] * 20).round(9).isin(range(1, 21)).all()


def test_many_fates_are_tested_like_each_of_them(fit, tmp_path):
    """Score and swaps of each are those of a fit of one; q is theirs over the fates of a component, whatever the order."""
    adata = fit.copy()
    rng = np.random.default_rng(0)
    for i in range(4):
        adata.obs[f"g{i}"] = adata.obs["fate"].to_numpy() * (i < 2) + rng.normal(size=adata.n_obs)
    adata.obs["constant"] = 1.0
    names = ["g0", "g1", "constant", "g2", "g3"]
    cf.tl.decompose(adata, names, family="gaussian", rng=0, key_added="many")
    cf.tl.test_components(adata, key="many")
    adata.write_h5ad(tmp_path / "many.h5ad")
    table = cf.get.tests(anndata.read_h5ad(tmp_path / "many.h5ad"), "many")
    assert table["response"].tolist() == names * 2
    failed = table["response"] == "constant"
    assert table.loc[failed, "status"].str.startswith("failed").all()
    assert table.loc[failed, ["p", "q"]].isna().all(axis=None)
    for component in ("lineage", "spatial"):
        own = table[(table["component"] == component) & ~failed]
        np.testing.assert_allclose(own["q"], false_discovery_control(own["p"]))
    cf.tl.decompose(adata, "g1", family="gaussian", rng=0, key_added="one")
    cf.tl.test_components(adata, key="one")
    np.testing.assert_allclose(cf.get.tests(adata, "one")["p"], table.loc[table["response"] == "g1", "p"], rtol=1e-4)
    cf.tl.decompose(adata, ["g3", "g1"], family="gaussian", rng=0, key_added="other")
    for key in ("many", "other"):
        cf.tl.test_components(adata, "spatial", key=key, method="permutation", n_perm=99, rng=0)
    many, other = (cf.get.tests(adata, key).set_index("response")["p"] for key in ("many", "other"))
    assert other["g1"] == many["g1"]
    assert other["g3"] == many["g3"]


def test_priors_stay_with_the_components_that_stay():
    adata = embryo()
    adata.obs["other_batch"] = np.random.default_rng(0).choice(list("abc"), adata.n_obs)
    held = {
        "sd_batch": ("half_normal", 0.5),
        "sd_other_batch": ("half_normal", 0.7),
        "lengthscale_spatial": ("fixed", 1.0),
    }
    cf.tl.decompose(adata, "size", family="gaussian", groups=["batch", "other_batch"], priors=held, rng=0)
    fit = fitted(adata, "cellfate", dict.fromkeys(OBJECTS), "cpu")
    names = {c.name for c in fit.glmm.components}
    for gone, prior in (("batch", "sd_batch"), ("other_batch", "sd_other_batch"), ("spatial", "lengthscale_spatial")):
        assert set(held) - set(fit.priors_among(sorted(names - {gone}))) == {prior}
    priors = {"sd_lineage:spatial": ("half_normal", 0.5)}
    cf.tl.decompose(adata, "size", family="gaussian", interaction=True, priors=priors, rng=0)
    fit = fitted(adata, "cellfate", dict.fromkeys(OBJECTS), "cpu")
    assert "sd_lineage:spatial" in fit.priors_among(["spatial", "lineage:spatial"])
    assert "sd_lineage:spatial" not in fit.priors_among(["spatial"])


def test_neighborhoods_are_small_and_of_one_specimen():
    rng = np.random.default_rng(0)
    xyz, specimen = rng.normal(size=(1000, 2)) * [3.0, 1.0], rng.integers(3, size=1000)
    label = neighborhoods(xyz, specimen, 8)
    sizes = np.bincount(label)
    assert sizes.max() <= 8
    assert sizes.min() >= 4
    assert all(len(np.unique(specimen[label == k])) == 1 for k in range(len(sizes)))
    within = np.mean([xyz[label == k].var(axis=0).sum() for k in range(len(sizes))])
    assert within < 0.05 * xyz.var(axis=0).sum()
