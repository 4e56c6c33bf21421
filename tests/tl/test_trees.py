"""Several trees of the same cells: against fits under each of them, the law of total variance and closed forms."""

import itertools
import logging
import warnings
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.stats import multivariate_normal

import cellfate as cf
from cellfate import CellfateWarning, DataError
from cellfate.inference.fit import GLMM
from cellfate.inference.hyperposterior import DRAWS, Hyperposterior
from cellfate.inference.pooled import _mixture
from cellfate.io.anndata import read_cells
from cellfate.kernels.base import unit_scale
from cellfate.tl.components import components_of, under_tree
from cellfate.tl.fitted import fitted
from cellfate.trees.convert import to_forest, to_graph, to_newick
from tests.embryo import N, embryo, half_tree, one_tree, shared_path, trees
from tests.tl.test_decompose import star

KEYS = ["tree", "near", "far"]
WEIGHTS = np.array([0.5, 0.3, 0.2])


def shuffled(text, seed, count=None):
    """The tree with the names of its leaves, or of some of them, exchanged."""
    forest, rng = to_forest(text), np.random.default_rng(seed)
    names = forest.names.copy()
    where = forest.leaves if count is None else rng.choice(forest.leaves, count, replace=False)
    names[where] = rng.permutation(names[where])
    return to_newick(replace(forest, names=names))


def related(n=60, seed=3):
    """Cells whose fate is ancestry for the most part, the true tree, and two that are wrong, one in a few leaves."""
    adata = cf.datasets.simulate(n, family="gaussian", variance_lineage=2.0, variance_spatial=0.5, rng=seed)
    adata.uns["near"] = shuffled(adata.uns["tree"], 0, 6)
    adata.uns["far"] = shuffled(adata.uns["tree"], 1)
    return adata


def fit(adata, lineage, **more):
    cf.tl.decompose(adata, "fate", family="gaussian", lineage=lineage, rng=0, copy=False, **more)
    return adata


@pytest.fixture(scope="module")
def fits():
    """A fit under each tree, and under all of them with given weights, by evidence and alike."""
    adata = related()
    for key in KEYS:
        fit(adata, key, key_added=f"alone_{key}")
    fit(adata, KEYS, tree_weights=WEIGHTS, key_added="given")
    fit(adata, KEYS, key_added="evidence")
    fit(adata, KEYS, tree_weights="equal", key_added="equal")
    return adata


def share(adata, key, component="lineage"):
    return cf.get.draws(adata, key)[f"share_{component}"].to_numpy()


def width(adata, key):
    row = cf.get.components(adata, key).set_index("component").loc["lineage"]
    return row["share_upper"] - row["share_lower"]


# --- copies and mixtures --------------------------------------------------------------------------------------------------


def test_two_copies_of_a_tree_give_what_one_gives():
    adata = related()
    text = adata.uns["tree"]
    fit(adata, "tree", key_added="one")
    fit(adata, [text, to_graph(to_forest(text))], key_added="two")
    one, two = adata.uns["one"], adata.uns["two"]
    table = cf.get.trees(adata, "two")
    assert table["tree"].tolist() == ["tree 1", "tree 2"]
    np.testing.assert_allclose(table["weight"], 0.5, rtol=1e-9)
    np.testing.assert_allclose(table["log_evidence"], one["log_evidence"], rtol=1e-9)
    assert two["log_evidence"] == pytest.approx(one["log_evidence"], rel=1e-9)
    assert two["mode"] == pytest.approx(one["mode"], rel=1e-6)
    np.testing.assert_allclose(cf.get.effects(adata, "two"), cf.get.effects(adata, "one"), atol=1e-8)
    draws = {key: cf.get.draws(adata, key).sort_values("beta[Intercept]").to_numpy() for key in ("one", "two")}
    names = list(cf.get.draws(adata, "one"))
    own = names.index("beta[Intercept]")  # no two draws have the same
    at = np.searchsorted(draws["one"][:, own] + 1e-9, draws["two"][:, own])
    np.testing.assert_allclose(draws["two"], draws["one"][at], rtol=1e-6)  # whole draws, and no others
    # halves drawn without replacement: sd of their mean is sigma / sqrt(2 DRAWS)
    error = draws["one"].std(0) / np.sqrt(2 * DRAWS)
    assert (np.abs(draws["two"].mean(0) - draws["one"].mean(0)) < 4 * error).all()
    diagnostics = cf.get.diagnostics(adata, "two")
    assert diagnostics["effective_trees"] == pytest.approx(2)
    assert diagnostics["share_lineage_variance_between_trees"] == pytest.approx(0, abs=1e-12)
    assert diagnostics["share_lineage_variance_within_trees"] == pytest.approx(
        draws["one"].var(0)[names.index("share_lineage")]
    )


def test_the_pooled_fit_is_the_mixture_of_the_single_ones(fits):
    """Mean and variance of every number; a tree's part is drawn without replacement, so that the mean is off by

    sum_t w_t (1 - w_t) var_t / DRAWS, and the mean square in the same way.
    """
    pooled = cf.get.draws(fits, "given")
    single = [cf.get.draws(fits, f"alone_{key}") for key in KEYS]
    assert list(pooled) == list(single[0])
    part = WEIGHTS * (1 - WEIGHTS) / DRAWS
    for name in pooled:
        each = np.stack([one[name] for one in single])
        mean = WEIGHTS @ each.mean(1)
        variance = WEIGHTS @ (each.var(1) + (each.mean(1) - mean) ** 2)
        error = np.sqrt(part @ each.var(1))
        assert abs(pooled[name].mean() - mean) < 4 * error + 1e-12, name
        error = np.sqrt(part @ ((each - mean) ** 2).var(1))
        assert abs(pooled[name].var(ddof=0) - variance) < 4 * error + 1e-12, name


def test_tables_are_made_of_the_pooled_draws(fits):
    table = cf.get.components(fits, "given").set_index("component")
    for component in ("lineage", "spatial", "residual"):
        draws = share(fits, "given", component)
        assert table.loc[component, "share"] == pytest.approx(draws.mean())
        assert table.loc[component, ["share_lower", "share_upper"]].tolist() == pytest.approx(
            np.quantile(draws, [0.025, 0.975]).tolist()
        )
    # realized shares have draws of their own, which are not kept: their mean is that of single fits, to a few of its errors
    realized = cf.get.components(fits, "given", scale="realized").set_index("component")
    each = [cf.get.components(fits, f"alone_{key}", scale="realized").set_index("component") for key in KEYS]
    assert "shared" in realized.index
    mean = sum(w * one["share"] for w, one in zip(WEIGHTS, each, strict=True))
    error = np.sqrt(sum(w * (1 - w) * one["share_sd"] ** 2 for w, one in zip(WEIGHTS, each, strict=True)) / DRAWS)
    assert ((realized["share"] - mean).abs() < 4 * error).all()


def test_effects_follow_the_law_of_total_variance(fits):
    each = [cf.get.effects(fits, f"alone_{key}") for key in KEYS]
    pooled = cf.get.effects(fits, "given")
    for component in ("lineage", "spatial"):
        mean, sd = (np.stack([one[f"{component}_{what}"] for one in each]) for what in ("mean", "sd"))
        np.testing.assert_allclose(pooled[f"{component}_mean"], WEIGHTS @ mean, atol=1e-10)
        variance = WEIGHTS @ (sd**2 + mean**2) - (WEIGHTS @ mean) ** 2
        np.testing.assert_allclose(pooled[f"{component}_sd"], np.sqrt(variance), atol=1e-10)


def test_the_table_of_trees_and_the_evidence_are_those_of_single_fits(fits):
    log_evidence = np.array([fits.uns[f"alone_{key}"]["log_evidence"] for key in KEYS])
    for key in ("given", "evidence", "equal"):
        table = cf.get.trees(fits, key)
        assert table["tree"].tolist() == KEYS
        np.testing.assert_allclose(table["log_evidence"], log_evidence, rtol=1e-9)
        for component in ("lineage", "spatial"):
            draws = [share(fits, f"alone_{one}", component) for one in KEYS]
            np.testing.assert_allclose(table[f"share_{component}"], np.mean(draws, 1), rtol=1e-9)
            np.testing.assert_allclose(table[f"share_{component}_sd"], np.std(draws, 1), rtol=1e-9)
    probability = np.exp(log_evidence - log_evidence.max())
    np.testing.assert_allclose(cf.get.trees(fits, "evidence")["weight"], probability / probability.sum(), rtol=1e-9)
    mean = log_evidence.max() + np.log(probability.mean())
    assert fits.uns["evidence"]["log_evidence"] == pytest.approx(mean)
    assert fits.uns["equal"]["log_evidence"] == pytest.approx(mean)
    assert fits.uns["given"]["log_evidence"] == pytest.approx(log_evidence.max() + np.log(WEIGHTS @ probability))
    best = f"alone_{KEYS[int(log_evidence.argmax())]}"
    for key in ("given", "evidence", "equal"):
        assert fits.uns[key]["mode"] == pytest.approx(fits.uns[best]["mode"])
        assert fits.uns[key]["free_energy"] == pytest.approx(fits.uns[best]["free_energy"])


def test_between_and_within_add_up_to_the_variance(fits):
    table, diagnostics = cf.get.trees(fits, "equal"), cf.get.diagnostics(fits, "equal")
    between = diagnostics["share_lineage_variance_between_trees"]
    within = diagnostics["share_lineage_variance_within_trees"]
    assert between == pytest.approx(table["share_lineage"].var(ddof=0))
    assert within == pytest.approx((table["share_lineage_sd"] ** 2).mean())
    assert diagnostics["n_trees"] == 3
    assert diagnostics["effective_trees"] == pytest.approx(3)
    whole = cf.get.components(fits, "equal").set_index("component").loc["lineage", "share_sd"] ** 2
    assert between + within == pytest.approx(whole, rel=0.1)
    assert between > 0.5 * within  # one of three trees is of other cells altogether


def posterior(mean, sd, seed, log_evidence=0.0):
    """One whose draws are normal, in an order that says nothing."""
    draws = mean + sd * np.random.default_rng(seed).standard_normal(DRAWS)
    return Hyperposterior({"x": draws}, draws[:, None], {}, {"x": draws}, log_evidence, 0.1, 0.0, 3000.0, 10, 0)


def test_what_resampling_adds_is_as_large_as_it_should_be():
    """z-scores of the pooled mean over many seeds have mean 0 and spread 1."""
    parts = [posterior(m, s, i) for i, (m, s) in enumerate([(0.0, 1.0), (3.0, 0.5), (1.0, 2.0)])]
    each = np.stack([p.values["x"] for p in parts])
    error = np.sqrt(WEIGHTS * (1 - WEIGHTS) / DRAWS @ each.var(1))
    count, z = 1500, []
    for seed in range(count):
        mixed = _mixture(parts, WEIGHTS, WEIGHTS, np.random.default_rng(seed))
        z.append((mixed.values["x"].mean() - WEIGHTS @ each.mean(1)) / error)
    assert abs(np.mean(z)) < 4 / np.sqrt(count)
    assert np.std(z) == pytest.approx(1, abs=4 / np.sqrt(2 * count))
    mixed = _mixture(parts, WEIGHTS, WEIGHTS, np.random.default_rng(0))
    of_tree = [np.isin(mixed.values["x"], x).sum() for x in each]
    np.testing.assert_allclose(of_tree, WEIGHTS * DRAWS, atol=1)
    np.testing.assert_array_equal(mixed.values["x"], mixed.beta[:, 0])  # a draw stays whole
    assert mixed.evaluations == 30


def test_a_tree_without_weight_has_no_draws():
    parts = [posterior(0.0, 1.0, 0), posterior(50.0, 1.0, 1, -np.inf)]
    mixed = _mixture(parts, np.array([1.0, 0.0]), np.array([0.5, 0.5]), np.random.default_rng(0))
    assert mixed.values["x"].max() < 10
    assert mixed.effective_draws == 3000
    assert mixed.log_evidence == pytest.approx(np.log(0.5))


# --- evidence -------------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_likelihood_in_closed_form():
    """With all hyperparameters held, the fate is a normal vector under each tree."""
    adata = related(40)
    held = {"sd_lineage": ("fixed", 1.2), "sd_residual": ("fixed", 0.8)}
    fit(adata, KEYS, spatial=None, priors=held)
    y = adata.obs["fate"].to_numpy()
    log_p = []
    for key in KEYS:
        cells = read_cells(adata, "fate", family="gaussian", lineage=key, spatial=None)
        glmm = GLMM("gaussian", components_of(cells, "brownian", "matern32", None, None)).on(y, cells.design)
        tau = float(glmm.problem[0].beta_sd[0])
        path = unit_scale(glmm.problem[0].data.offset.new_tensor(shared_path(cells))).numpy()
        covariance = 1.2**2 * path + 0.8**2 * np.eye(40) + tau**2
        log_p.append(multivariate_normal(np.zeros(40), covariance).logpdf(y))
    table = cf.get.trees(adata)
    np.testing.assert_allclose(table["log_evidence"], log_p, atol=1e-6)
    probability = np.exp(log_p - np.max(log_p))
    np.testing.assert_allclose(table["weight"], probability / probability.sum(), atol=1e-6)


def test_evidence_goes_to_the_true_tree_and_the_log_says_so(caplog):
    adata = related(80, seed=5)
    wrong = [shuffled(adata.uns["tree"], seed) for seed in range(10, 13)]
    with caplog.at_level(logging.INFO, logger="cellfate"):
        fit(adata, [wrong[0], adata.uns["tree"], *wrong[1:]])
    table = cf.get.trees(adata)
    assert table["weight"].idxmax() == 1
    assert table.loc[1, "weight"] > 0.99
    assert cf.get.diagnostics(adata)["effective_trees"] < 1.05
    (line,) = (r.getMessage() for r in caplog.records if "the evidence is for one" in r.getMessage())
    assert line.startswith("the evidence is for one of 4 trees, 'tree 2'")
    assert "tree_weights='equal'" in line


def test_equal_weights_widen_the_interval(fits):
    assert width(fits, "equal") > 1.15 * width(fits, "evidence")
    assert width(fits, "equal") > 1.15 * width(fits, "alone_tree")


def test_the_order_of_the_trees_changes_nothing(fits):
    for names in itertools.islice(itertools.permutations(KEYS), 3, None, 2):
        fit(fits, list(names), key_added="again")
        for getter in (cf.get.components, cf.get.draws, cf.get.effects, cf.get.fixed_effects):
            pd.testing.assert_frame_equal(getter(fits, "again"), getter(fits, "evidence"), check_exact=True)
        there, here = (cf.get.trees(fits, key).set_index("tree") for key in ("evidence", "again"))
        assert list(here.index) == list(names)
        pd.testing.assert_frame_equal(here.loc[KEYS], there)


# --- what a list means ----------------------------------------------------------------------------------------------------


def quick(adata, lineage, **more):
    """A fit of the small embryo, whose doubts are not looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)
        cf.tl.decompose(adata, "size", family="gaussian", spatial=None, lineage=lineage, rng=0, **more)
    return adata


def other_tree():
    return shuffled(one_tree(), 4)


def test_trees_without_a_cell_in_common_are_a_forest_and_a_list_of_one_key_is_that_key():
    adata = quick(embryo(), list(trees().values()))
    with pytest.raises(DataError, match=r"has no 'trees': the fit is not one under several trees.*lineage=\["):
        cf.get.trees(adata)
    quick(adata, ["tree"])
    assert cf.get.params(adata)["lineage"] == "tree"
    assert "n_trees" not in cf.get.params(adata)


def test_forests_by_specimen_and_clone_labels_may_be_several():
    adata = embryo(tree=False)
    crossed = {half: shuffled(text, 1) for half, text in trees().items()}
    quick(adata, [trees(), crossed], library_key="half")
    assert cf.get.trees(adata)["tree"].tolist() == ["tree 1", "tree 2"]
    adata.obs["other"] = np.random.default_rng(0).permutation(adata.obs["clone"])
    quick(adata, ["clone", "other"], lineage_kernel="clone")
    assert cf.get.trees(adata)["tree"].tolist() == ["clone", "other"]
    assert cf.get.params(adata)["lineage"].tolist() == ["clone", "other"]
    quick(adata, ["clone", "other", "clone"], lineage_kernel="clone")
    assert cf.get.trees(adata)["tree"].tolist() == ["clone", "other", "clone (2)"]


def test_cells_are_those_that_all_trees_hold():
    adata = embryo()
    cf.pp.set_tree(adata, f"({half_tree(0, 12)},{half_tree(12, 20)});", key_added="a", missing="drop")
    cf.pp.set_tree(adata, shuffled(f"({half_tree(4, 12)},{half_tree(12, N)});", 2), key_added="b", missing="drop")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cf.tl.decompose(adata, "size", family="gaussian", spatial=None, lineage=["tree", "a", "b"], rng=0)
    text = "8 of 24 cells have no leaf in one or more of the 3 trees and are left out"
    assert sum(text in str(w.message) for w in caught) == 1
    kept = cf.get.effects(adata)["lineage_mean"].notna()
    assert list(adata.obs_names[kept]) == [f"c{i}" for i in range(4, 20)]
    assert cf.get.params(adata)["n_cells"] == 16
    # the same as under each tree of these cells alone
    part = quick(adata[kept].copy(), "tree")
    there = cf.get.trees(adata).set_index("tree").loc["tree", "log_evidence"]
    assert there == pytest.approx(part.uns["cellfate"]["log_evidence"], rel=1e-9)


def test_an_isolated_cell_is_in_every_tree():
    adata = embryo()
    cf.pp.set_tree(adata, half_tree(0, 20) + ";", key_added="a", missing="isolate")
    quick(adata, ["tree", "a"])
    assert cf.get.params(adata)["n_cells"] == N


def test_only_ancestry_is_made_anew():
    adata = related(30)
    cells, other = (read_cells(adata, "fate", family="gaussian", lineage=key) for key in ("tree", "far"))
    components = components_of(cells, "ou", "matern32", None, None, interaction=True)
    found = {c.name: c.kernel for c in under_tree(components, other, "ou", "tree")}
    before = {c.name: c.kernel for c in components}
    assert list(found) == list(before) == ["lineage", "spatial", "lineage:spatial"]
    assert found["lineage"].forest is other.forest
    assert found["spatial"] is before["spatial"]
    assert found["lineage:spatial"].one is found["lineage"]
    assert found["lineage:spatial"].other is before["spatial"]


def test_a_specimen_gets_its_intercept_and_fates_their_effects_under_several_trees():
    adata = embryo()
    adata.obs["section"] = np.resize(["s1", "s2", "s3"], N)
    adata.uns["other"] = other_tree()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)
        cf.tl.decompose(adata, "fate", family="categorical", lineage=["tree", "other"], library_key="section", rng=0)
    assert {"lineage[skin]_mean", "section[neuron]_sd"} <= set(cf.get.effects(adata))
    assert {"beta[Intercept[skin]]"} <= set(cf.get.draws(adata))
    assert np.isfinite(cf.get.trees(adata)["share_lineage"]).all()


# --- errors, doubts, files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lineage", "arguments", "text"),
    [
        (["tree", "treee"], {}, "tree 2 of the list: lineage: there is no tree 'treee' in adata.uns; similar: 'tree'"),
        (["tree", "other"], {"tree_weights": "evidance"}, "unknown tree_weights 'evidance'; did you mean 'evidence'"),
        (["tree", "other"], {"tree_weights": [1.0]}, r"tree_weights is \[1.0\], wanted .* or 2 numbers of 0 or more"),
        (["tree", "other"], {"tree_weights": [1.0, -1.0]}, "2 numbers of 0 or more"),
        (["tree", "other"], {"tree_weights": [0.0, 0.0]}, "2 numbers of 0 or more"),
        (["tree", "other"], {"tree_weights": [1.0, np.nan]}, "2 numbers of 0 or more"),
        (["tree", "other"], {"tree_weights": None}, "2 numbers of 0 or more"),
        ("tree", {"tree_weights": "equal"}, "tree_weights is 'equal', but lineage is one tree"),
        ("tree", {"tree_weights": [1.0]}, "tree_weights is given, but lineage is one tree"),
        ([one_tree(), half_tree(0, 12) + ";"], {}, r"12 of 24 cells have no leaf in the tree 2 of the list.*means as many"),
        (["tree", "half_only"], {}, r"12 of 24 cells have no leaf in the tree uns\['half_only'\]"),
        ([one_tree(), one_tree().replace("(c0", "((c0")], {}, "tree 2 of the list: .* not readable as Newick"),
        ([one_tree(), 3.0], {}, "tree 2 of the list: .* cannot be read from float"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_with_a_list_is_said(lineage, arguments, text):
    adata = embryo()
    adata.uns |= {"other": other_tree(), "half_only": half_tree(0, 12) + ";"}
    with pytest.raises(DataError, match=text):
        cf.tl.decompose(adata, "size", family="gaussian", lineage=lineage, **arguments)
    assert "cellfate" not in adata.uns


def test_many_fates_under_several_trees_are_refused():
    adata = embryo()
    with pytest.raises(NotImplementedError, match="Fit one fate at a time"):
        cf.tl.decompose(adata, ["size", "time"], family="gaussian", lineage=[one_tree(), other_tree()])


def test_trees_of_different_cells_have_none_in_common():
    adata = embryo(tree=False)
    cf.pp.set_tree(adata, half_tree(0, 12) + ";", key_added="a", missing="drop")
    cf.pp.set_tree(adata, half_tree(12, N) + ";", key_added="b", missing="drop")
    with pytest.raises(DataError, match=r"no cell is in all 2 trees.*one tree per clone is a list of trees"):
        cf.tl.decompose(adata, "size", family="gaussian", lineage=["a", "b"])


def test_a_fit_that_fails_is_told_with_its_tree(monkeypatch):
    adata, made, original = embryo(), [], GLMM.posterior

    def fail(error):
        def posterior(self, *data, **more):
            made.append(self)
            if len(made) == 2:
                raise error
            return original(self, *data, **more)

        return posterior

    adata.uns["other"] = other_tree()
    monkeypatch.setattr(GLMM, "posterior", fail(DataError("it cannot be")))
    with pytest.raises(DataError, match=r"tree uns\['other'\]: it cannot be"):
        quick(adata, ["tree", "other"])
    assert "cellfate" not in adata.uns
    made.clear()
    monkeypatch.setattr(GLMM, "posterior", fail(ZeroDivisionError("by zero")))
    with pytest.raises(ZeroDivisionError) as caught:
        quick(adata, [one_tree(), other_tree()])
    assert caught.value.__notes__ == ["This happened in the fit under tree 2 of the list."]


def test_a_star_is_told_with_its_tree():
    adata = embryo()
    with pytest.warns(CellfateWarning) as caught:
        cf.tl.decompose(adata, "size", family="gaussian", spatial=None, lineage=[one_tree(), star(0, N)], rng=0)
    assert sum(str(w.message).startswith("tree 2 of the list is a star: its 24 leaves") for w in caught) == 1


def test_status_names_the_trees_in_doubt():
    adata = quick(embryo(), [one_tree(), other_tree(), star(0, N)], tree_weights="equal")
    table, status = cf.get.trees(adata), cf.get.diagnostics(adata)["status"]
    doubtful = table.loc[table["status"] != "converged", "tree"].tolist()
    assert doubtful  # of 24 cells, and with a star, there are some
    if len(doubtful) == 1:
        assert status.startswith(f"in the fit under tree {doubtful[0]!r}, of weight 0.333, ")
    else:
        assert status.startswith(
            f"the fits under {len(doubtful)} of 3 trees, with {len(doubtful) / 3:.3f} of the weight, are"
        )
    assert all(repr(name) in status for name in doubtful)


def test_a_flat_prior_has_no_evidence():
    adata = embryo()
    flat = {"sd_lineage": "flat"}
    with pytest.raises(DataError, match=r"tree_weights='evidence' needs evidence.*tree_weights='equal'"):
        quick(adata, [one_tree(), other_tree()], priors=flat)
    quick(adata, [one_tree(), other_tree()], priors=flat, tree_weights="equal")
    assert np.isnan(cf.get.trees(adata)["log_evidence"]).all()
    np.testing.assert_allclose(cf.get.trees(adata)["weight"], 0.5)


@pytest.mark.parametrize(
    "ask",
    [
        cf.tl.test_components,
        cf.tl.compare,
        cf.tl.check,
        cf.tl.prior_sensitivity,
        lambda adata, key: cf.tl.marginal_effects(adata, "x", [0, 1], key=key),
        lambda adata, key: cf.tl.associate(adata, ["x"], key=key),
        lambda adata, key: cf.tl.predict(adata, "ancestors", key=key),
        lambda adata, key: cf.tl.predict(adata, "grid", key=key),
        lambda adata, key: fitted(adata, key, {}, "cpu"),
    ],
)
def test_what_takes_up_a_fit_again_wants_one_tree(fits, ask):
    fits.obs["x"] = np.arange(fits.n_obs) / fits.n_obs
    with pytest.raises(NotImplementedError, match=r"the fit pools over 3 trees.*Fit with one tree.*cf.get.trees"):
        ask(fits, key="equal")


def test_it_survives_files(fits, tmp_path):
    path = tmp_path / "result.h5ad"
    fits.write_h5ad(path)
    back = anndata.read_h5ad(path)
    for key in ("given", "evidence"):
        for getter in (cf.get.trees, cf.get.components, cf.get.draws, cf.get.effects):
            pd.testing.assert_frame_equal(getter(back, key), getter(fits, key), check_dtype=False)
        there, here = cf.get.diagnostics(back, key), cf.get.diagnostics(fits, key)
        assert there.keys() == here.keys()
        assert there["effective_trees"] == pytest.approx(here["effective_trees"])
    params = cf.get.params(back, "given")
    assert params["lineage"].tolist() == KEYS
    assert params["tree_weights"] == "given"
    assert params["n_trees"] == 3
    with pytest.raises(NotImplementedError, match="Fit with one tree"):
        cf.tl.compare(back, key="given")
    fit(back, "tree", key_added="given")  # of an earlier fit nothing is left
    assert "trees" not in back.uns["given"]


def test_a_copy_is_returned_and_nothing_written():
    adata = embryo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)
        copy = cf.tl.decompose(
            adata, "size", family="gaussian", spatial=None, lineage=[one_tree(), other_tree()], rng=0, copy=True
        )
    assert "cellfate" not in adata.uns
    assert len(cf.get.trees(copy)) == 2
    assert cf.get.params(copy)["lineage"] == "given"
