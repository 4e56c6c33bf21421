"""The structured engine against the dense one: with as many columns as cells both have the same kernel."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import cellfate as cf
from cellfate.engines import lowrank
from cellfate.engines.base import Sites
from cellfate.engines.columns import Apart, side_by_side, together
from cellfate.engines.structured import StructuredEngine
from cellfate.errors import DataError
from cellfate.inference.free_energy import evaluate, evaluate_with_gradient
from cellfate.inference.sites import RULES
from cellfate.kernels.base import Component, Given
from cellfate.kernels.groups import Intercepts
from cellfate.kernels.lineage import LINEAGE_KERNELS, Brownian
from cellfate.kernels.spatial import Matern32
from cellfate.model.catalog import concrete, get_family
from cellfate.model.families import Outcome
from cellfate.model.glmm import Data, Model
from cellfate.trees.convert import to_forest
from tests.problem import dense_engine, double, random_newick, small_problem

CLOSE = 1e-8
EXACT = 1e-12  # of site updates
BOUND = (0.4, 1.2)  # of length-scales, about where the tests look


def structured(components, n, rank=None, bound=BOUND) -> StructuredEngine:
    ranges = {c.name: bound for c in components if isinstance(c.kernel, Matern32) and c.kernel.lengthscale is None}
    return StructuredEngine(components, n, device="cpu", dtype=torch.float64, rank=rank or n, ranges=ranges)


def both(model: Model, rank=None):
    return dense_engine(model.components, model.data.n), structured(model.components, model.data.n, rank)


def points(model: Model, count=3, seed=0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    u = np.tile(model.start().numpy(), (count, 1)) + 0.3 * rng.normal(size=(count, len(model.parameters)))
    for i, p in enumerate(model.parameters):
        if p.name.startswith("lengthscale"):
            u[:, i] = np.log(rng.uniform(0.5, 1.1, count))
    return double(u)


def close(found, expected, tolerance=CLOSE):
    scale = max(float(expected.abs().max()), 1e-300)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def compare(model: Model, rule: str = "variational", tolerance=CLOSE) -> None:
    """Free energy, gradient, moments of the field and of every component."""
    dense, fast = both(model)
    u = points(model)
    one = evaluate_with_gradient(model, dense, u, RULES[rule](), tolerance=EXACT)
    two = evaluate_with_gradient(model, fast, u, RULES[rule](), tolerance=EXACT)
    close(two.free_energy, one.free_energy, tolerance)
    close(two.gradient, one.gradient, 10 * tolerance)
    a, b = one.posterior, two.posterior
    for what in ("mean", "variance", "weights", "log_det"):
        close(getattr(b, what), getattr(a, what), tolerance)
    for s, t in zip(one.terms, two.terms, strict=True):
        close(b.component_mean(t), a.component_mean(s), tolerance)
        close(b.component_variance(t), a.component_variance(s), tolerance)


FATES = [(family.name, link) for family in concrete() if family.kind != "fates" for link in family.links]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("family", "link"), FATES, ids=lambda x: str(x))
def test_every_family_and_rule_as_dense(family, link, rule):
    model, _ = small_problem(family, link=link)
    compare(model, rule)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("lineage", LINEAGE_KERNELS)
def test_every_lineage_kernel_as_dense(lineage, reml):
    model, _ = small_problem("bernoulli", lineage=lineage, reml=reml, seed=2)
    compare(model)


def caterpillar(names):
    text = f"({names[0]}:0.3,{names[1]}:0.2)"
    for name in names[2:]:
        text = f"({text}:0.1,{name}:0.4)"
    return text + ";"


TREES = {
    "star": lambda c: f"({','.join(f'{x}:{0.5 + i % 3}' for i, x in enumerate(c))});",
    "caterpillar": caterpillar,
    "zero lengths": lambda c: f"(({','.join(f'{x}:0' for x in c[:9])}):1,({','.join(f'{x}:0.5' for x in c[9:])}):0);",
    "polytomies": lambda c: random_newick(list(c), np.random.default_rng(5)),
    "forest": lambda c: {
        "a": caterpillar(c[:8]),
        "b": f"({c[8]}:1);",
        "d": random_newick(list(c[9:]), np.random.default_rng(1)),
    },
    "unary": lambda c: (
        f"((({','.join(f'{x}:1' for x in c[:5])}):0.5):0.5,(({','.join(f'{x}:1' for x in c[5:])}):2):0);"
    ),
}


@pytest.mark.parametrize("observed", [18, 12], ids=["all-leaves", "some-leaves"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("lineage", ["brownian", "ou", "pagel"])
def test_awkward_trees_as_dense(tree, lineage, observed):
    rng = np.random.default_rng(3)
    names = np.array([f"c{i}" for i in range(18)])
    forest = to_forest(TREES[tree](names))
    names = rng.permutation(names)[:observed]
    components = [
        Component("lineage", LINEAGE_KERNELS[lineage](forest, forest.nodes_of(names))),
        Component("spatial", Matern32(rng.normal(size=(observed, 3)))),
    ]
    y = (rng.random(observed) < 0.5).astype(float)
    design = double(np.ones((observed, 1)))
    model = Model(get_family("bernoulli"), components, Data(Outcome(double(y), None), design, ("one",), design[:, 0]))
    compare(model)


def test_effects_of_single_cells_and_groups_as_dense():
    model, _ = small_problem("poisson")
    n = model.data.n
    components = [*model.components, Component("cell", Intercepts(np.random.default_rng(0).permutation(n)))]
    engine = structured(components, n)
    model = replace(model, components=components)
    compare(model)
    assert engine.columns(model.terms(model.theta(points(model)))).slots.keys() == {
        "spatial",
        "clutch",
        "batch",
        "fixed",
    }


def test_without_a_tree_and_without_a_field():
    model, _ = small_problem("bernoulli", seed=4)
    for keep in ({"spatial"}, {"lineage"}, {"lineage", "batch"}, {"batch"}):
        compare(replace(model, components=[c for c in model.components if c.name in keep]))


def sites_of(kind: str, shape, rng) -> Sites:
    precision = rng.gamma(1.0, size=shape)
    if kind == "none":
        precision[rng.random(shape) < 0.4] = 0.0
        precision[1] = 0.0
    elif kind == "uneven":
        precision = 10 ** rng.uniform(-9, 3, size=shape)
    elif kind == "strong":
        precision = 1e8 * precision
    shift = (precision + np.sqrt(precision)) * rng.normal(size=shape) + (0.3 if kind == "none" else 0.0)
    return Sites(double(precision), double(shift))


@pytest.mark.parametrize(("kind", "tolerance"), [("usual", 1e-9), ("none", 1e-9), ("uneven", 1e-5), ("strong", 1e-7)])
def test_products_as_dense(kind, tolerance):
    model, _ = small_problem("bernoulli", seed=1)
    dense, fast = both(model)
    u, rng = points(model), np.random.default_rng(7)
    sites, terms = sites_of(kind, (3, model.data.n), rng), model.terms(model.theta(u))
    a, b = dense.condition(terms, sites), fast.condition(terms, sites)
    for what in ("mean", "variance", "weights", "log_det"):
        close(getattr(b, what), getattr(a, what), tolerance)
    x = double(rng.normal(size=(3, model.data.n, 2)))
    for what in ("smooth", "residual", "prior_times"):
        close(getattr(b, what)(x), getattr(a, what)(x), tolerance)
    for term in terms:
        close(b.component_times(term, x), a.component_times(term, x), tolerance)
    close(sum(a.component_times(term, x) for term in terms), a.prior_times(x), tolerance)
    seen = (sites.precision > 1e-6)[..., None]  # the dense engine leaves the others out of this product
    close(seen * b.smooth_squared(seen * x), seen * a.smooth_squared(seen * x), tolerance)
    for term in terms[-2:]:
        for one, two in zip(a.coefficients(term), b.coefficients(term), strict=True):
            close(two, one, tolerance)


def test_gradient_of_a_truncated_basis_is_that_of_its_own_free_energy():
    model, _ = small_problem("bernoulli", lineage="ou", seed=6)
    engine = structured(model.components, model.data.n, rank=12)
    u = points(model, count=1)
    rule = RULES["variational"]()
    found = evaluate_with_gradient(model, engine, u, rule, tolerance=EXACT).gradient[0]
    h = 1e-5
    steps = torch.cat([u + h * torch.eye(u.shape[1]), u - h * torch.eye(u.shape[1])])
    value = evaluate(model, engine, model.theta(steps), rule, tolerance=EXACT).free_energy
    by_difference = (value[: u.shape[1]] - value[u.shape[1] :]) / (2 * h)
    torch.testing.assert_close(found, by_difference, rtol=1e-6, atol=1e-6)
    assert engine.report({})[0]["truncated_share_spatial"] > 1e-3  # there is something to give back


def test_draws_have_the_posterior_moments():
    model, _ = small_problem("bernoulli", seed=3)
    engine = structured(model.components, model.data.n, rank=10)
    u = points(model, count=2)
    posterior = evaluate(model, engine, model.theta(u), RULES["variational"](), tolerance=1e-6).posterior
    terms, count = model.terms(model.theta(u)), 4000
    posterior = engine.condition(terms, posterior.sites)
    drawn = posterior.sample(terms, count, [torch.Generator().manual_seed(i) for i in range(2)])
    for term in terms:
        mean, variance = posterior.component_mean(term), posterior.component_variance(term)
        z = (drawn[term.name].mean(-1) - mean) / (variance / count).sqrt()
        ratio = drawn[term.name].var(-1) / variance
        # largest of a few hundred, correlated, standard normal numbers
        assert float(z.abs().max()) < 4.5
        assert float((ratio - 1).abs().max()) < 4.5 * np.sqrt(2 / count)
    whole = sum(drawn.values())
    ratio = whole.var(-1) / posterior.variance
    assert float((ratio - 1).abs().max()) < 4.5 * np.sqrt(2 / count)


def test_batch_is_one_by_one():
    model, _ = small_problem("bernoulli", seed=5)
    engine = structured(model.components, model.data.n, rank=16)
    u, rule = points(model), RULES["variational"]()
    together = evaluate_with_gradient(model, engine, u, rule)
    for i in range(len(u)):
        alone = evaluate_with_gradient(model, engine, u[i : i + 1], rule)
        torch.testing.assert_close(together.free_energy[i], alone.free_energy[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.gradient[i], alone.gradient[0], rtol=1e-8, atol=1e-8)


def test_what_it_cannot_take_is_said():
    forest = to_forest("((a:1,b:1):1,c:2);")
    from cellfate.engines.choose import choose

    leaf = forest.nodes_of(["a", "b", "c"])
    two = [Component("one", Brownian(forest, leaf)), Component("two", Brownian(forest, leaf))]
    given = [Component("kinship", Given(torch.eye(3, dtype=torch.float64)))]
    for components, text in ((two, "are trees"), (given, "covariance matrices")):
        with pytest.raises(DataError, match=text):
            choose("structured", components, 3, device=torch.device("cpu"), dtype=torch.float64)


def test_what_a_basis_misses_is_reported():
    model, _ = small_problem("bernoulli", seed=6)
    for rank, doubtful in ((4, True), (model.data.n, False)):
        engine = structured(model.components, model.data.n, rank=rank)
        engine.prepare(model.terms(model.theta(points(model))))
        found, doubts = engine.report({"lengthscale_spatial": 0.7})
        assert found["rank_spatial"] <= rank
        assert (found["truncated_share_spatial"] > 0.06) == doubtful
        assert bool(doubts) == doubtful or rank > 4


def test_another_design_over_the_same_cells_is_seen():
    """What a first response left in the engine is not what a second one is fitted with."""
    rng = np.random.default_rng(2)
    forest = to_forest(random_newick([f"c{i}" for i in range(30)], rng))
    kernels = {"lineage": Brownian(forest, forest.nodes_of(np.array([f"c{i}" for i in range(30)])))}
    y, designs = rng.normal(size=30), [np.column_stack([np.ones(30), rng.normal(size=30)]) for _ in range(2)]
    theta = {"variance_lineage": 0.7, "variance_residual": 0.4}
    kept = cf.GLMM("gaussian", kernels, engine="structured")
    for x in (*designs, designs[0][:, :1]):
        again = cf.GLMM("gaussian", kernels, engine="dense").evaluate(theta, y, x).free_energy
        assert kept.evaluate(theta, y, x).free_energy == pytest.approx(again, rel=1e-10)


def test_columns_of_specimens_stand_side_by_side():
    """As wide as those of one specimen, and the same answers as with zeros in between."""
    model, _ = small_problem("poisson", seed=4)
    engine = structured(model.components, model.data.n, rank=30)
    terms = model.terms(model.theta(points(model)))
    columns = engine.columns(terms)
    field = engine.field("spatial")
    assert len(field.blocks) > 1
    assert not columns.layout.is_whole
    common = sum(columns.slots[name].stop - columns.slots[name].start for name in columns.slots if name != "spatial")
    assert columns.x.shape[1] == max(block.phi.shape[1] for block in field.blocks) + common
    assert columns.layout.total == field.rank + common
    dense = columns.layout.dense(columns.x)
    torch.testing.assert_close(dense[:, columns.slots["spatial"]], field.phi)

    plain = structured(model.components, model.data.n, rank=30)
    plain._columns[tuple(t.name for t in terms)] = together(
        {name: dense[:, slot] for name, slot in columns.slots.items()}, model.data.n, engine.like
    )
    found, wanted = (
        evaluate_with_gradient(model, e, points(model), RULES["variational"](), tolerance=EXACT)
        for e in (engine, plain)
    )
    close(found.free_energy, wanted.free_energy, 1e-11)
    close(found.gradient, wanted.gradient, 1e-10)
    a, b = found.posterior, wanted.posterior
    close(a.variance, b.variance, 1e-11)
    weight = double(np.random.default_rng(0).normal(size=(3, model.data.n, 1)))
    close(a.smooth_squared(weight), b.smooth_squared(weight), 1e-11)
    for s, t in zip(found.terms, wanted.terms, strict=True):
        close(a.component_variance(s), b.component_variance(t), 1e-11)
        close(a.component_mean(s), b.component_mean(t), 1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_layouts_against_the_columns_with_their_zeros(seed):
    rng = np.random.default_rng(seed)
    n, label = 40, rng.permutation(np.repeat(np.arange(4), 10))
    cells = [torch.as_tensor(np.flatnonzero(label == s)) for s in (0, 2, 3)]  # one set has no columns of its own
    phi = [double(rng.normal(size=(10, m))) for m in (3, 5, 1)]
    field = Apart(tuple(cells), tuple(phi))
    common = {"batch": double(rng.normal(size=(n, 2))), "fixed": double(rng.normal(size=(n, 1)))}
    columns = side_by_side({"field": field}, common, label, double(0.0))
    layout, x, whole = columns.layout, columns.x, columns.layout.dense(columns.x)
    assert (layout.total, layout.width) == (12, 8)
    y = double(
        rng.normal(size=(2, n, 8))
    )  # what is computed from the columns has a batch, and nothing where they have no place
    for own in layout.sets:
        gone = torch.ones(8, dtype=torch.bool)
        gone[own.places] = False
        y[:, own.rows[:, None], torch.nonzero(gone)[:, 0]] = 0
    wide = torch.stack([layout.dense(part) for part in y])
    q = double(rng.normal(size=(2, 12, 12)))
    weight = double(rng.normal(size=(2, n)))
    close(layout.times(y, q), wide @ q, 1e-13)
    close(layout.inner(y, q[:, :1].mT.repeat(1, 4, 1)[:, :n]), wide.mT @ q[:, :1].mT.repeat(1, 4, 1)[:, :n], 1e-13)
    close(layout.gram(x), whole.mT @ whole, 1e-13)
    close(layout.gram(y, weight, 7), wide.mT @ (weight[..., None] * wide), 1e-13)
    close(layout.bilinear(y, q, layout, x, 7), ((wide @ q) * whole).sum(-1), 1e-13)
    own, part = columns.of("field")
    close(own.bilinear(part, q[:, :9, :9], own, part, 7), ((whole[:, :9] @ q[:, :9, :9]) * whole[:, :9]).sum(-1), 1e-13)
    turned = torch.cat([layout.turned(x, q, block) for block in layout.blocks(3)], -1)
    for s in range(4):
        here = layout.sets[s]
        close(turned[:, here.rows][..., here.places], (whole @ q)[:, here.rows][..., here.columns], 1e-13)


@pytest.mark.parametrize("lengthscale", [0.05, 30.0])
@pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")
def test_a_lengthscale_that_a_prior_holds(lengthscale):
    """Outside of what the data say of length-scales, too: columns are made for it."""
    rng = np.random.default_rng(0)
    field, y = Matern32(rng.random((60, 2)) * 5), rng.normal(size=60)
    found = []
    for engine in ("dense", "structured"):
        held = {"lengthscale_spatial": ("fixed", lengthscale)}
        glmm = cf.GLMM(
            "gaussian", {"spatial": field}, priors=held, engine=engine, rank=60 if engine == "structured" else None
        )
        found.append(glmm.fit(y, np.ones((60, 1)), rng=0).free_energy)
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_gradients_with_squares_that_are_estimated(monkeypatch):
    """By a few random vectors where cells are many: without bias, and near for sums over cells."""
    model, _ = small_problem("bernoulli", seed=5)
    engine, u = structured(model.components, model.data.n), points(model, count=1)
    exact = evaluate_with_gradient(model, engine, u, RULES["variational"](), tolerance=EXACT)
    monkeypatch.setattr(lowrank, "ESTIMATE", 10)
    found = evaluate_with_gradient(model, engine, u, RULES["variational"](), tolerance=EXACT)
    close(found.free_energy, exact.free_energy, 1e-12)
    assert float((found.gradient - exact.gradient).abs().max()) > 0  # it is an estimate
    close(found.gradient, exact.gradient, 0.02)
    x = double(np.random.default_rng(0).normal(size=(1, model.data.n, 1)))
    monkeypatch.setattr(lowrank, "ESTIMATE", 10**9)
    wanted = exact.posterior.smooth_squared(x)
    monkeypatch.setattr(lowrank, "ESTIMATE", 10)
    monkeypatch.setattr(lowrank, "PROBES", 4000)
    many = engine.condition(exact.terms, exact.fit.sites).smooth_squared(x)
    spread = float((many - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    assert spread < 0.1  # 1 / sqrt(4000) times a few: products of entries that are no larger than variances


def test_responses_share_the_columns_of_a_window():
    model, _ = small_problem("poisson")
    shared = structured(model.components, model.data.n, rank=8).shared()
    one, two = (shared.focus({"spatial": BOUND}) for _ in range(2))
    assert one.field("spatial") is two.field("spatial")
    assert shared.focus({"spatial": (0.4, 1.3)}).field("spatial") is not one.field("spatial")
    alone = structured(model.components, model.data.n, rank=8)
    torch.testing.assert_close(alone.field("spatial").phi, one.field("spatial").phi, rtol=0, atol=0)
