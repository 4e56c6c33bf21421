"""The door for arrays: what it refuses, what it takes, what it gives back."""

import doctest

import numpy as np
import pandas as pd
import pytest
import torch

import cellfate as cf
from cellfate import CellfateWarning, DataError
from cellfate.inference import fit as fit_module
from cellfate.inference.mode import find_mode
from cellfate.inference.sites import Variational
from cellfate.kernels import Given, Intercepts, Matern32, OrnsteinUhlenbeck, Pagel
from cellfate.kernels.base import Component
from cellfate.trees.convert import to_forest
from tests.embryo import one_tree

N = 24
RNG = np.random.default_rng(0)
K = np.kron(np.eye(6), np.ones((4, 4)))
XY = RNG.normal(size=(N, 2))
Y = {
    "gaussian": RNG.normal(size=N),
    "bernoulli": np.resize([0.0, 1.0], N),
    "binomial": np.resize([1.0, 4.0, 2.0], N),
    "poisson": np.resize([0.0, 3.0, 1.0], N),
    "negative_binomial": np.resize([0.0, 3.0, 1.0], N),
}
ONES = np.ones((N, 1))
FOREST = to_forest(one_tree())
LEAF = FOREST.leaves


def changed(family, value, cells=0):
    y = Y[family].copy()
    y[cells] = value
    return y


def with_entry(value, at=(0, 1)):
    k = K.copy()
    k[at] = value
    return k


# fmt: off
DATA = [  # family, what is given to `fit`, what the error has to say
    ("bernoulli", {"y": changed("bernoulli", 2)}, "y is neither 0 nor 1 in 1 of 24 cells: '0: 2'"),
    ("bernoulli", {"y": np.ones(N)}, "y has one level: it is 1 in all 24"),
    ("bernoulli", {"y": np.eye(N)[3]}, "1 cell of level '1' .'3'. against 23"),
    ("bernoulli", {"y": ["yes", "no"] * 12}, "y cannot be read as numbers .*0 and 1"),
    ("gaussian", {"y": np.ones(N)}, "y has one level"),
    ("gaussian", {"y": changed("gaussian", np.nan)}, "y has 1 values that are NaN or infinite"),
    ("gaussian", {"y": []}, r"y has shape \(0,\)"),
    ("gaussian", {"y": Y["gaussian"][:5]}, "over 24 cells, not 5"),
    ("poisson", {"y": changed("poisson", -1)}, "y is negative in 1 of 24"),
    ("negative_binomial", {"y": changed("poisson", 0.5)}, "y is not a whole number in 1 of 24.*raw counts"),
    ("poisson", {"y": Y["poisson"], "offset": np.full(N, 1e4)}, "offset goes up to 10000.*logarithm"),
    ("poisson", {"y": Y["poisson"], "trials": 3}, "trials was given, but family 'poisson' has none"),
    ("binomial", {"y": Y["binomial"]}, "needs `trials`"),
    ("binomial", {"y": Y["binomial"], "trials": 3}, "trials is fewer than the successes in 8 of 24"),
    ("binomial", {"y": Y["binomial"], "trials": 4.5}, "trials is not a whole number"),
    ("gaussian", {"y": Y["gaussian"], "X": np.ones((N, 2))}, "X: 2 of 2 columns are collinear"),
    ("gaussian", {"y": Y["gaussian"], "X": np.zeros((N, 1))}, "X: 1 of 1 columns are zero"),
    ("gaussian", {"y": Y["gaussian"], "X": np.ones(N)}, r"X has shape \(24,\), wanted 2 dimensions"),
    ("gaussian", {"y": Y["gaussian"], "X": RNG.normal(size=(N, N))}, "X makes 24 columns for 24 cells"),
    ("gaussian", {"y": Y["gaussian"], "X": ONES, "terms": ["a", "b"]}, r"terms are \['a', 'b'\], wanted 1"),
    ("gaussian", {"y": Y["gaussian"], "X": RNG.normal(size=(N, 3)), "terms": "abc"}, r"terms are \['abc'\], wanted 3"),
]
COMPONENTS = [
    (K, "components are a ndarray with no names"),
    (pd.DataFrame(K), "components are a DataFrame with no names"),
    (Matern32(XY), "components are a Matern32 with no names"),
    ([K, K], "components are a list with no names .of ndarray.*'lineage'"),
    ({"a": K[:5]}, r"component 'a' has shape \(5, 24\). Give a square"),
    ({"a": 3.0}, r"component 'a' has shape \(1,\)"),
    ({"a": "K"}, "component 'a' cannot be read as numbers"),
    ({"a": with_entry(np.nan)}, "component 'a' has 1 entries that are NaN"),
    ({"a": with_entry(0.2)}, "component 'a' is not symmetric: .* by up to 0.8"),
    ({"a": with_entry(-2.0, (0, 0))}, "component 'a' is not a covariance: its eigenvalues go from -"),
    ({"a": 0 * K}, "component 'a' has a trace of 0"),
    ([Component("a", Given(torch.as_tensor(with_entry(-2.0, (0, 0)))))], "component 'a' is not a covariance"),
    ({}, "there are no components"),
    *(({name: K}, "are rows of the tables") for name in ("fixed", "residual", "shared", "distribution", "")),
]
PRIORS = [
    ({"beta": ("fixed", 0.5)}, "'beta': fixed effects are not held"),
    ({"beta": ("lognormal", 1, 1)}, r"does not suit 'beta', which is any real number; write 'flat', \('normal', sd\)\."),
    ({"lambda_lineage": ("fixed", 2)}, "holds it at 2, outside 0 to 1"),
    ({"lambda_lineage": ("half_normal", 2)}, "does not suit 'lambda_lineage', which is between 0 and 1"),
    ({"sd_lineage": ("uniform",)}, "does not suit 'sd_lineage', which is a positive standard deviation"),
    ({"sd_lineage": ("normal", 1)}, r"does not suit 'sd_lineage'.*\('half_normal', scale\)"),
    ({"dispersion": ("uniform",)}, "does not suit 'dispersion', which is a positive number"),
    ({"sd_lineage": 1}, "prior 1 of 'sd_lineage' is not understood"),
    ({"sd_lineage": ()}, "is not understood"),
    ({"sd_lineage": ("fixed", np.inf)}, "is not understood"),
    ({"lengthscale_spatial": "flat"}, "which is held at 0.5: a prior would do nothing"),
    ([("sd_lineage", "flat")], "priors are a list, wanted a dict"),
]
# fmt: on


@pytest.mark.parametrize(("family", "data", "text"), DATA, ids=[row[2] for row in DATA])
def test_wrong_arrays_are_named(family, data, text):
    with pytest.raises(DataError, match=text):
        cf.GLMM(family, {"lineage": K}).fit(**data)


@pytest.mark.parametrize(("components", "text"), COMPONENTS, ids=[row[1] for row in COMPONENTS])
def test_wrong_components_are_named(components, text):
    with pytest.raises(DataError, match=text):
        cf.GLMM("gaussian", components)


@pytest.mark.parametrize(("priors", "text"), PRIORS, ids=[row[1] for row in PRIORS])
def test_wrong_priors_are_named(priors, text):
    components = {"lineage": Pagel(FOREST, LEAF), "spatial": Matern32(XY, lengthscale=0.5)}
    with pytest.raises(DataError, match=text):
        cf.GLMM("negative_binomial", components, priors=priors, reml=False)


def test_priors_that_suit_are_taken():
    components = {"lineage": OrnsteinUhlenbeck(FOREST, LEAF), "batch": Intercepts(np.resize([0, 1, 2], N))}
    priors = {"sd_lineage": ("lognormal", 1, 1), "alpha_lineage": ("half_normal", 1), "sd_batch": "flat"}
    assert cf.GLMM("poisson", components, priors=priors | {"beta": ("normal", 5)}).priors.keys() > priors.keys()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"family": "bernouli"}, "unknown family 'bernouli'; did you mean 'bernoulli'"),
        ({"link": "logti"}, "unknown link of family 'bernoulli' 'logti'; did you mean 'logit'"),
        ({"method": "variatonal"}, "unknown method 'variatonal'; did you mean 'variational'"),
        ({"engine": "dnse"}, "unknown engine 'dnse'; did you mean 'dense'"),
        ({"engine": "magic"}, "unknown engine 'magic'; choose from auto, dense"),
    ],
)
def test_misspelled_options_are_answered_with_the_similar_one(settings, text):
    with pytest.raises(DataError, match=text):
        cf.GLMM(**{"family": "bernoulli", "components": {"lineage": K}} | settings)


def test_one_number_of_trials_is_that_of_every_cell():
    glmm = cf.GLMM("binomial", {"lineage": K})
    at = {"variance_lineage": 1.0}
    one, each = (glmm.evaluate(at, Y["binomial"], ONES, trials=trials).free_energy for trials in (10, np.full(N, 10)))
    assert one == each


@pytest.mark.parametrize("family", ["poisson", "negative_binomial"])
def test_counts_that_are_a_yes_or_no_are_a_warning(family):
    theta = {"variance_lineage": 1.0} | ({"dispersion": 0.5} if family == "negative_binomial" else {})
    with pytest.warns(CellfateWarning, match="y holds only 0 and 1.*family='bernoulli'") as caught:
        cf.GLMM(family, {"lineage": K}).evaluate(theta, Y["bernoulli"], ONES)
    assert len(caught) == 1


def test_arrays_come_in_many_kinds():
    """Tensors (with gradients), frames, sparse matrices, booleans: the same numbers."""
    from scipy.sparse import csr_matrix

    at = {"variance_lineage": 1.0}
    y = Y["bernoulli"]
    plain = cf.GLMM("bernoulli", {"lineage": K}, device="cpu").evaluate(at, y, ONES).free_energy
    for k, response, x in (
        (torch.as_tensor(K).requires_grad_(True), torch.as_tensor(y), torch.as_tensor(ONES)),
        (pd.DataFrame(K), pd.Series(y), pd.DataFrame(ONES)),
        (csr_matrix(K), y.astype(bool), ONES.tolist()),
    ):
        assert cf.GLMM("bernoulli", {"lineage": k}, device="cpu").evaluate(at, response, x).free_energy == plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu_are_taken():
    at, y = {"variance_lineage": 1.0}, torch.as_tensor(Y["bernoulli"], device="cuda")
    k = torch.as_tensor(K, device="cuda")
    values = [cf.GLMM("bernoulli", {"lineage": k}, device=d).evaluate(at, y).free_energy for d in ("cpu", "cuda")]
    assert values[0] == pytest.approx(values[1])


def test_the_example_runs_and_a_fit_is_one_line():
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(fit_module.GLMM, "GLMM", globs={})
    outcome = doctest.DocTestRunner().run(example, clear_globs=False)
    assert outcome.attempted > 5
    assert outcome.failed == 0
    text = repr(example.globs["fit"])
    assert text.startswith("GLMMFit(lineage 0.")
    assert text.endswith("; converged)")
    assert "\n" not in text
    assert len(text) < 150
    documented = cf.get.diagnostics.__doc__
    assert {f"`{name}`" for name in example.globs["fit"].diagnostics if f"`{name}`" not in documented} == set()


def test_a_lengthscale_at_its_bound_stays_there():
    """A trend across the tissue wants a longer one; beyond the bound a basis holds nothing."""
    rng = np.random.default_rng(2)
    x = rng.uniform(size=(150, 2))
    y = x[:, 0] + 0.1 * rng.normal(size=150)
    glmm = cf.GLMM("gaussian", {"spatial": Matern32(x)}, engine="structured", rank=20).on(y, np.ones((150, 1)))
    model, engine, _ = glmm.problem
    mode = find_mode(
        model.within({"lengthscale_spatial": (0.2, 0.6)}), engine.focus({"spatial": (0.2, 0.6)}), Variational()
    )
    assert mode.at_bound == ("lengthscale_spatial",)
    assert torch.isfinite(mode.curvature).all()
