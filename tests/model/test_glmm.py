"""How a parameter vector becomes a prior over cells."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from cellfate.errors import DataError
from cellfate.kernels.base import Basis, Component
from cellfate.kernels.groups import Intercepts
from cellfate.kernels.lineage import Brownian, OrnsteinUhlenbeck, Pagel
from cellfate.kernels.spatial import Matern32
from cellfate.model.catalog import get_family
from cellfate.model.families import Outcome
from cellfate.model.glmm import FIXED, Data, Model
from cellfate.trees.convert import to_forest
from tests.problem import double

FOREST = to_forest("((a:1,b:1):1,(c:1,d:2):3,e:4);")
LEAF = FOREST.nodes_of(["c", "a", "e", "d", "b"])
POSITIONS = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [2.0, 2.0]])
BATCH = np.array([0, 1, 0, 1, 1])
X = np.array([[1.0, 3.0], [1.0, -1.0], [1.0, 2.0], [1.0, 0.5], [1.0, 0.5]])
Y = np.array([2.0, 0.0, 1.0, 5.0, 3.0])
OFFSET = np.array([0.1, -0.2, 0.0, 0.4, 0.3])


def model(family="poisson", *, components=None, x=X, y=Y, **options) -> Model:
    if components is None:
        components = [
            Component("lineage", OrnsteinUhlenbeck(FOREST, LEAF)),
            Component("spatial", Matern32(POSITIONS)),
            Component("batch", Intercepts(BATCH)),
        ]
    terms = ("Intercept", "time")[: x.shape[1]]
    return Model(get_family(family), components, Data(Outcome(double(y)), double(x), terms, double(OFFSET)), **options)


def names(m: Model) -> list[str]:
    return [p.name for p in m.parameters]


# --- the vector ---


@pytest.mark.parametrize(
    ("family", "own"),
    [("poisson", []), ("bernoulli", []), ("gaussian", ["sd_residual"]), ("negative_binomial", ["dispersion"])],
)
@pytest.mark.parametrize("reml", [True, False])
def test_the_entries_in_order(family, own, reml):
    expected = ["sd_lineage", "sd_spatial", "sd_batch", *own, "alpha_lineage", "lengthscale_spatial"]
    expected += [] if reml else ["beta[Intercept]", "beta[time]"]
    assert names(model(family, reml=reml)) == expected


@pytest.mark.parametrize("reml", [True, False])
def test_each_entry_reaches_the_value_of_its_name(reml):
    m = model("negative_binomial", reml=reml)
    rng = np.random.default_rng(0)
    u = double(rng.normal(size=(4, len(m.parameters))))
    theta = m.theta(u)
    for i, name in enumerate(names(m)[:6]):
        expected = u[:, i].abs() if name.startswith("sd_") else torch.exp(u[:, i])
        torch.testing.assert_close(theta.values[name], expected, rtol=1e-15, atol=0)
    if reml:
        assert theta.beta is None
    else:
        torch.testing.assert_close(theta.beta, u[:, 6:], rtol=0, atol=0)
    torch.testing.assert_close(m.phi(theta), torch.exp(u[:, 3:4]), rtol=1e-15, atol=0)


def test_the_start_is_the_coordinate_of_the_starting_values():
    m = model("gaussian", reml=False)
    theta = m.theta(m.start()[None])
    spread = float(np.std(Y))
    assert theta.values["sd_lineage"].item() == pytest.approx(0.7 * spread)
    assert theta.values["sd_residual"].item() == pytest.approx(0.5 * spread)
    (low, high) = Matern32(POSITIONS).bounds
    assert low < theta.values["lengthscale_spatial"].item() < high
    assert theta.beta.tolist() == [[0.0, 0.0]]


def test_log_prior_is_the_sum_over_the_entries():
    m = model(
        "negative_binomial",
        reml=False,
        priors={
            "sd_lineage": ("half_normal", 1.5),
            "sd_spatial": "flat",
            "dispersion": ("lognormal", 0.3, 0.8),
            "lengthscale_spatial": ("lognormal", 1.0, 0.5),
            "alpha_lineage": "flat",
            "beta": ("normal", 4.0),
        },
    )
    u = double([0.8, -0.4, 1.2, -0.9, 0.2, 0.6, 0.5, -1.5])
    # a lognormal value has a normal logarithm
    expected = (
        stats.halfnorm(scale=1.5).logpdf(0.8)
        + stats.halfnorm(scale=2.0).logpdf(1.2)
        + stats.norm(math.log(0.3), 0.8).logpdf(-0.9)
        + stats.norm(0.0, 0.5).logpdf(0.6)
        + stats.norm(0, 4).logpdf([0.5, -1.5]).sum()
    )
    found = m.log_prior(torch.stack([u, u.abs()]))
    assert found.shape == (2,)
    assert found[0].item() == pytest.approx(expected, rel=1e-12)


def test_default_priors_are_in_the_units_of_the_response():
    """A gaussian response in other units gives the same posterior, in those units: the prior's scale moves along."""
    one, other = model("gaussian"), model("gaussian", y=1000 * Y)
    u = double([[0.3, 0.5, 0.1, -0.7, 0.2, 0.4]])
    scaled = u.clone()
    scaled[:, :3] *= 1000
    scaled[:, 3] += math.log(1000)
    # three densities of an sd, per unit of the sd; the residual's is per unit of its logarithm
    assert other.log_prior(scaled).item() == pytest.approx(one.log_prior(u).item() - 3 * math.log(1000), rel=1e-9)


def test_lengthscales_are_expected_between_the_bounds_of_the_data():
    m = model()
    (parameter,) = (p for p in m.parameters if p.name == "lengthscale_spatial")
    low, high = Matern32(POSITIONS).bounds
    assert parameter.lower < low < high < parameter.upper
    inside = stats.norm(math.log(parameter.prior.median), parameter.prior.sd)
    assert inside.cdf(math.log(high)) - inside.cdf(math.log(low)) == pytest.approx(0.9545, abs=1e-4)


# --- held values ---


def test_what_is_held_is_not_estimated():
    m = model(
        "negative_binomial",
        components=[
            Component("lineage", Pagel(FOREST, LEAF, lam=0.8)),
            Component("spatial", Matern32(POSITIONS, lengthscale=1.7)),
        ],
        priors={"sd_spatial": ("fixed", 0.9), "dispersion": ("fixed", 0.25)},
    )
    assert names(m) == ["sd_lineage"]
    theta = m.theta(double([[0.4], [1.0]]))
    held = {"lambda_lineage": 0.8, "lengthscale_spatial": 1.7, "sd_spatial": 0.9, "dispersion": 0.25}
    for name, value in held.items():
        assert theta.values[name].tolist() == [value, value]
    assert m.phi(theta).tolist() == [[0.25], [0.25]]
    again, points = m.from_natural({"variance_lineage": [0.16, 1.0]})
    assert points == 2
    assert {name: value.tolist() for name, value in again.values.items()} == {
        "sd_lineage": [0.4, 1.0],
        **{name: [value, value] for name, value in held.items()},
    }


def test_a_hyperparameter_of_a_kernel_can_be_held_by_its_prior():
    m = model(priors={"lengthscale_spatial": ("fixed", 1.1)})
    assert "lengthscale_spatial" not in names(m)
    assert m.theta(m.start()[None]).values["lengthscale_spatial"].tolist() == [1.1]


def test_unknown_priors_are_named_with_the_known():
    with pytest.raises(
        DataError,
        match=r"priors name \['sd_clone', 'sd_space'\], which this model does not have; it has "
        r"\['sd_lineage', 'sd_spatial', 'sd_batch', 'alpha_lineage', 'lengthscale_spatial', 'beta'\]",
    ):
        model(priors={"sd_space": "flat", "sd_clone": "flat", "sd_batch": "flat"})


def test_components_are_over_the_same_cells():
    with pytest.raises(DataError, match="component 'batch' is over 4 cells, not 5"):
        model(components=[Component("batch", Intercepts(BATCH[:4]))])


# --- values by name ---


def test_variances_or_standard_deviations_by_name():
    m = model("gaussian")
    given = {"variance_lineage": 0.25, "sd_spatial": 0.3, "sd_batch": 1.0, "alpha_lineage": 0.2}
    one, points = m.from_natural(given | {"lengthscale_spatial": 2.0, "variance_residual": [0.49, 0.81]})
    assert points == 2
    assert {name: [round(x, 12) for x in value.tolist()] for name, value in one.values.items()} == {
        "sd_lineage": [0.5, 0.5],
        "sd_spatial": [0.3, 0.3],
        "sd_batch": [1.0, 1.0],
        "alpha_lineage": [0.2, 0.2],
        "lengthscale_spatial": [2.0, 2.0],
        "sd_residual": [0.7, 0.9],
    }
    torch.testing.assert_close(m.phi(one), double([[0.49], [0.81]]))


def test_missing_and_unknown_values_are_named():
    with pytest.raises(DataError, match=r"theta lacks \['sd_lineage', 'sd_spatial'\] and has unknown \['sd_space'\]"):
        model().from_natural({"sd_batch": 1.0, "alpha_lineage": 0.2, "lengthscale_spatial": 2.0, "variance_space": 1.0})


def test_fixed_effects_are_given_where_they_are_parameters():
    given = {"sd_lineage": [0.5, 0.6]}
    components = [Component("lineage", Brownian(FOREST, LEAF))]
    with pytest.raises(DataError, match="theta gives 'beta', but reml=True integrates the fixed effects out"):
        model(components=components).from_natural(given | {"beta": [0.0, 1.0]})
    m = model(components=components, reml=False)
    theta, _ = m.from_natural(given | {"beta": [0.5, -1.0]})
    expected = OFFSET + X @ [0.5, -1.0]
    np.testing.assert_allclose(m.shift(theta), [expected, expected], rtol=1e-14)


# --- the prior over cells ---


def covariance(m: Model, theta) -> np.ndarray:
    """Sum of the components' covariances, unscaled, of the first point."""
    total = np.zeros((5, 5))
    for term in m.terms(theta):
        if isinstance(term.structure, Basis):
            spectrum = term.structure.spectrum.reshape(-1, term.structure.phi.shape[1])[0]
            k = (term.structure.phi * spectrum) @ term.structure.phi.T
        else:
            kernel = next(c.kernel for c in m.components if c.name == term.name)
            k = term.structure.dense(kernel.geometry(torch.arange(5)[None])).reshape(-1, 5, 5)[0]
        total += float(term.variance[0]) * k.numpy()
    return total


def test_terms_are_variances_times_structures():
    m = model(priors={"beta": ("normal", 3.0)})
    u = double([[0.8, -0.4, 1.2, math.log(0.3), math.log(1.4)]])
    theta = m.theta(u)
    assert [(term.name, term.normalized) for term in m.terms(theta)] == [
        ("lineage", True),
        ("spatial", True),
        ("batch", False),
        (FIXED, False),
    ]
    shared = FOREST.depth[FOREST.mrca(LEAF)]
    depth = FOREST.depth[LEAF]
    distance = depth[:, None] + depth - 2 * shared
    s = math.sqrt(3) * np.linalg.norm(POSITIONS[:, None] - POSITIONS, axis=-1) / 1.4
    expected = 0.64 * np.exp(-0.3 * distance) + 0.16 * (1 + s) * np.exp(-s)
    expected += 1.44 * np.equal.outer(BATCH, BATCH) + 9.0 * X @ X.T
    np.testing.assert_allclose(covariance(m, theta), expected, rtol=1e-12)


@pytest.mark.parametrize(("reml", "x"), [(False, X), (True, X[:, :0])])
def test_fixed_effects_are_no_component_where_they_are_parameters_or_none(reml, x):
    m = model(reml=reml, x=x)
    theta = m.theta(m.start()[None])
    assert FIXED not in [term.name for term in m.terms(theta)]
    np.testing.assert_allclose(m.shift(theta), OFFSET[None])


def test_values_are_differentiable_in_the_vector():
    m = model("negative_binomial", reml=False)

    def flat(u):
        theta = m.theta(u)
        return (*theta.values.values(), m.phi(theta), m.shift(theta), m.log_prior(u))

    u = m.start()[None] + double([[0.1] * 8, [-0.2] * 8])
    assert torch.autograd.gradcheck(flat, u.requires_grad_(True))


# --- the prior of the fixed effects ---


def test_fixed_effects_are_wide_on_the_scale_of_the_data():
    spread = X[:, 1].std()
    found = model().beta_sd
    np.testing.assert_allclose(found[1], 10 / spread)
    # the intercept also answers for the mean of the covariate at a slope of one per standard deviation
    np.testing.assert_allclose(found[0], 10 * (1 + abs(X[:, 1].mean()) / spread))
    gaussian = model("gaussian").beta_sd
    np.testing.assert_allclose(gaussian[1], 10 * Y.std() / spread)
    np.testing.assert_allclose(gaussian[0], 10 * (Y.std() * (1 + abs(X[:, 1].mean()) / spread) + Y.mean()))


@pytest.mark.parametrize("family", ["poisson", "gaussian"])
def test_units_of_a_covariate_do_not_matter(family):
    """Years or days, from year 0 or from year 2000: the slope's prior keeps its width, and the intercept's reaches."""
    base = model(family).beta_sd
    days = model(family, x=X * [1.0, 365.0]).beta_sd
    np.testing.assert_allclose(days, base / double([1.0, 365.0]), rtol=1e-12)
    era = model(family, x=X + np.array([0.0, 2000.0])).beta_sd
    np.testing.assert_allclose(era[1], base[1], rtol=1e-9)
    assert era[0] > 2000 * float(base[1])


def test_units_of_a_gaussian_response_do_not_matter():
    np.testing.assert_allclose(model("gaussian", y=7 * Y).beta_sd, 7 * model("gaussian").beta_sd, rtol=1e-6)


def test_a_given_prior_of_the_fixed_effects():
    assert model(priors={"beta": ("normal", 5.0)}).beta_sd.tolist() == [5.0, 5.0]
    for spec in ("flat", ("half_normal", 1.0)):
        with pytest.raises(DataError, match=r"the prior of 'beta' is \('normal', sd\); 'flat' goes with reml=False"):
            _ = model(priors={"beta": spec}).beta_sd
    m = model(reml=False, priors={"beta": "flat"})
    u = m.start()[None]
    shifted = u + double([0, 0, 0, 0, 0, 3.0, -40.0])
    assert m.log_prior(shifted).item() == m.log_prior(u).item()
