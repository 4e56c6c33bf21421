"""Intercepts that covary with slopes, and interactions: both engines against covariances written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from cellfate.engines.base import Sites
from cellfate.engines.choose import choose
from cellfate.engines.product_columns import product_columns
from cellfate.engines.structured import StructuredEngine
from cellfate.errors import DataError
from cellfate.inference.free_energy import evaluate, evaluate_with_gradient
from cellfate.inference.sites import RULES
from cellfate.kernels.base import Component, Given, Term, unit_scale
from cellfate.kernels.graph import Composition, Graph
from cellfate.kernels.groups import CorrelatedSlopes
from cellfate.kernels.lineage import LINEAGE_KERNELS, OrnsteinUhlenbeck
from cellfate.kernels.product import Product
from cellfate.kernels.spatial import Matern32
from cellfate.model.glmm import Model
from cellfate.trees.convert import to_forest
from tests.engines.test_structured import both, close, compare, points
from tests.problem import dense_engine, double, entries, random_newick, small_problem

CPU = {"device": torch.device("cpu"), "dtype": torch.float64}


def paired(family="poisson", across=True, seed=0, **more) -> Model:
    """A group across specimens, or within them, whose intercepts and slopes covary."""
    model, _ = small_problem(family, seed=seed, **more)
    n, name = model.data.n, "batch" if across else "clutch"
    codes = next(c.kernel.codes for c in model.components if c.name == name)
    kernel = CorrelatedSlopes(codes, np.random.default_rng(seed).normal(0.5, 1.0, size=n), "time")
    return replace(model, components=[*(c for c in model.components if c.name != name), Component(name, kernel)])


def sites(n, points_=3, seed=7) -> Sites:
    rng = np.random.default_rng(seed)
    return Sites(double(rng.gamma(1.0, size=(points_, n))), double(rng.normal(size=(points_, n))))


@pytest.mark.parametrize("across", [True, False], ids=["across", "within"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "poisson"])
def test_pairs_in_both_engines(family, rule, across):
    compare(paired(family, across), rule)


@pytest.mark.parametrize("across", [True, False], ids=["across", "within"])
def test_pairs_as_their_covariance(across):
    """Moments of everything against the dense twin, in both engines, to 1e-8."""
    model = paired(across=across)
    u, name = points(model), "batch" if across else "clutch"
    theta, terms = model.theta(u), model.terms(model.theta(u))
    kernel = next(c.kernel for c in model.components if c.name == name)
    given = [Component(c.name, Given(double(np.eye(model.data.n)))) if c.name == name else c for c in model.components]
    for i in range(len(u)):
        k = entries(
            kernel,
            sd=theta.values[f"sd_{name}"][i],
            slope=theta.values[f"sd_{name}:time"][i],
            correlation=theta.values[f"correlation_{name}"][i],
        )
        twin = [Component(c.name, Given(k, normalized=False)) if c.name == name else c for c in given]
        here = [_at(term, i) for term in terms]
        matrix = next(c.kernel for c in twin if c.name == name).structure({}, k)
        its = [Term(name, matrix, double([1.0]), False) if term.name == name else term for term in here]
        seen = sites(model.data.n, 1)
        wanted = dense_engine(twin, model.data.n).condition(its, seen)
        for engine in both(model):
            found = engine.condition(here, seen)
            for what in ("mean", "variance", "weights", "log_det"):
                close(getattr(found, what), getattr(wanted, what), 1e-9)
            for one, other in zip(here, its, strict=True):
                close(found.component_mean(one), wanted.component_mean(other), 1e-8)
                close(found.component_variance(one), wanted.component_variance(other), 1e-8)


def _at(term: Term, i: int) -> Term:
    """A term at one point of its batch."""
    moved = {
        key: x[i : i + 1]
        for key, x in vars(term.structure).items()
        if (key == "lengthscale" or (key in ("spectrum", "root", "gain", "noise") and x is not None and x.ndim > 1))
    }
    return replace(term, structure=replace(term.structure, **moved), variance=term.variance[i : i + 1])


@pytest.mark.parametrize("engine", [0, 1], ids=["dense", "structured"])
def test_gradient_of_pairs_by_differences(engine):
    model = paired("bernoulli", seed=3)
    use, u = both(model)[engine], points(model, count=1)
    rule = RULES["variational"]()
    found = evaluate_with_gradient(model, use, u, rule, tolerance=1e-12).gradient[0]
    h, eye = 1e-5, torch.eye(u.shape[1])
    value = evaluate(model, use, model.theta(torch.cat([u + h * eye, u - h * eye])), rule, tolerance=1e-12).free_energy
    d = u.shape[1]
    torch.testing.assert_close(found, (value[:d] - value[d:]) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("across", [True, False], ids=["across", "within"])
def test_coefficients_and_draws_of_pairs(across):
    model = paired(across=across)
    u, seen = points(model, count=2), sites(model.data.n, 2)
    terms = model.terms(model.theta(u))
    a, b = (engine.condition(terms, seen) for engine in both(model))
    name = "batch" if across else "clutch"
    (term,) = (t for t in terms if t.name == name)
    for one, other in zip(a.coefficients(term), b.coefficients(term), strict=True):
        close(other, one, 1e-8)
    count = 4000
    for posterior in (a, b):
        drawn = posterior.sample(terms, count, [torch.Generator().manual_seed(i) for i in range(2)])[name]
        mean, variance = posterior.component_mean(term), posterior.component_variance(term)
        assert float(((drawn.mean(-1) - mean) / (variance / count).sqrt()).abs().max()) < 4.5
        assert float((drawn.var(-1) / variance - 1).abs().max()) < 4.5 * np.sqrt(2 / count)


def test_independent_ones_are_pairs_without_correlation():
    """Free energy at a correlation of 0 is that of two components."""
    from cellfate.kernels.groups import Intercepts, Slopes

    model = paired("poisson")
    pair = model.components[-1]
    two = [
        Component("batch", Intercepts(pair.kernel.codes)),
        Component("batch:time", Slopes(pair.kernel.codes, pair.kernel.covariate)),
    ]
    apart = replace(model, components=[*model.components[:-1], *two])
    values = {"sd_lineage": 0.7, "sd_spatial": 1.1, "sd_clutch": 0.4, "sd_batch": 0.9, "sd_batch:time": 0.6}
    values |= {"alpha_lineage": 0.8, "lengthscale_spatial": 0.7}
    found = []
    for one, more in ((model, {"correlation_batch": 0.0}), (apart, {})):
        theta, _ = one.from_natural(values | more)
        engine = dense_engine(one.components, one.data.n)
        found.append(float(evaluate(one, engine, theta, RULES["variational"](), tolerance=1e-12).free_energy))
    assert found[0] == pytest.approx(found[1], abs=1e-9)


def with_interaction(family="bernoulli", **more) -> Model:
    model, _ = small_problem(family, **more)
    kernels = {c.name: c.kernel for c in model.components}
    product = Component("lineage:spatial", Product(kernels["lineage"], kernels["spatial"]))
    return replace(model, components=[*model.components, product])


@pytest.mark.parametrize("lineage", ["brownian", "ou", "pagel"])
def test_an_interaction_is_the_product_of_the_covariances(lineage):
    model = with_interaction(lineage=lineage)
    theta = model.theta(points(model))
    engine = dense_engine(model.components, model.data.n)
    (term,) = (t for t in model.terms(theta) if t.name == "lineage:spatial")
    tree, space = (next(c.kernel for c in model.components if c.name == name) for name in ("lineage", "spatial"))
    shape = {h.name: theta.values[f"{h.name}_lineage"] for h in tree.hyperparameters}
    one, other = entries(tree, **shape), entries(space, lengthscale=theta.values["lengthscale_spatial"])
    wanted = theta.values["sd_lineage:spatial"].square()[:, None, None] * unit_scale(one * other)
    found = wanted.new_zeros(3, model.data.n + 1, model.data.n + 1)
    for stack, blocks in zip(engine.blocks.stacks, engine.covariance(term), strict=True):
        for cells, block in zip(stack, blocks.unbind(-3), strict=True):
            found[:, cells[:, None], cells[None, :]] = block
    found = found[:, :-1, :-1]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-12


def test_gradient_of_an_interaction_by_differences():
    """The length-scale and alpha move two components each."""
    model = with_interaction()
    engine, u = dense_engine(model.components, model.data.n), points(model, count=1)
    rule = RULES["variational"]()
    found = evaluate_with_gradient(model, engine, u, rule, tolerance=1e-12).gradient[0]
    h, d = 1e-5, u.shape[1]
    steps = torch.cat([u + h * torch.eye(d), u - h * torch.eye(d)])
    value = evaluate(model, engine, model.theta(steps), rule, tolerance=1e-12).free_energy
    torch.testing.assert_close(found, (value[:d] - value[d:]) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lineage", LINEAGE_KERNELS)
def test_an_interaction_in_columns_as_dense(lineage):
    """With as many columns as cells; those of a product serve every shape of the tree and every length-scale."""
    compare(with_interaction(lineage=lineage))


@pytest.mark.parametrize("kind", ["graph", "composition"])
def test_an_interaction_of_a_tree_and_other_columns(kind):
    model, _ = small_problem("poisson")
    rng = np.random.default_rng(0)
    n = model.data.n
    near = cdist(rng.random((n, 2)), rng.random((n, 2))) < 0.3
    other = Graph(near | near.T) if kind == "graph" else Composition(rng.random((n, 3)))
    tree = next(c.kernel for c in model.components if c.name == "lineage")
    found = [Component("lineage", tree), Component("niche", other)]
    found.append(Component("both", Product(tree, other, ("lineage", "niche"))))
    compare(replace(model, components=found))


def test_columns_of_an_interaction_are_few():
    """Carried from half of the cells: variances are exact, covariances nearer with more columns."""
    rng, n = np.random.default_rng(1), 500
    forest = to_forest(random_newick([f"c{i}" for i in range(n)], rng))
    leaf = forest.nodes_of([f"c{i}" for i in range(n)])
    tree, field = OrnsteinUhlenbeck(forest, leaf), Matern32(rng.random((n, 2)), rng.integers(2, size=n))
    product = Product(tree, field)
    held = {"alpha_lineage": double([0.3, 2.0]) / forest.depth.max(), "lengthscale_spatial": double([0.4, 0.2])}
    structure = product.structure(held, double(0.0))
    exact = structure.dense(product.geometry(torch.arange(n)[None]))[:, 0]
    errors = []
    for rank in (16, 64, 200):
        columns = product_columns(product, lower=0.1, upper=0.6, rank=rank, landmarks=250, like=double(0.0))
        assert columns.rank == rank
        spectrum, own = columns.parts(structure)
        found = columns.phi @ spectrum @ columns.phi.mT + torch.diag_embed(own)
        variance = exact.diagonal(dim1=-2, dim2=-1)
        excess = found.diagonal(dim1=-2, dim2=-1) - variance
        assert float(excess.min()) > -1e-12
        assert float(excess.mean()) < 0.03 * float(variance.mean())
        trace, total = columns.moments(spectrum, own)
        torch.testing.assert_close(trace, found.diagonal(dim1=-2, dim2=-1).sum(-1))
        torch.testing.assert_close(total, found.sum((-2, -1)))
        off = (found - exact) - torch.diag_embed(excess)
        errors.append(float(off.norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1


def test_which_engine_takes_an_interaction():
    model = with_interaction()
    assert choose("auto", model.components, model.data.n, **CPU)[0].name == "dense"
    assert choose("structured", model.components, model.data.n, **CPU)[0].name == "structured"
    twice = [c for c in model.components if c.name != "lineage:spatial"]
    field = next(c.kernel for c in twice if c.name == "spatial")
    twice.append(Component("squared", Product(field, field, ("spatial", "spatial"))))
    with pytest.raises(NotImplementedError, match=r"'squared'.* not a tree and a field.*Use engine='dense'"):
        choose("structured", twice, model.data.n, **CPU)


def test_what_an_interaction_goes_by_is_in_the_model():
    model = with_interaction()
    with pytest.raises(DataError, match=r"goes by \['alpha_lineage'\], which no other component has"):
        replace(model, components=[c for c in model.components if c.name != "lineage"])


def test_pairs_in_few_columns():
    """Two for each level, in the structured engine too."""
    model = paired()
    engine = StructuredEngine(model.components, model.data.n, **CPU, rank=5)
    slots = engine.columns(model.terms(model.theta(points(model)))).slots
    assert slots["batch"].stop - slots["batch"].start == 2 * 3
