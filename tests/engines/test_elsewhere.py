"""At the nodes of the tree and at new positions, against the joint covariance of those and the cells, written down whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellfate.engines.base import Sites
from cellfate.engines.structured import StructuredEngine
from cellfate.errors import DataError
from cellfate.kernels.base import Component, Given, sample_variance
from cellfate.kernels.lineage import LINEAGE_KERNELS, Brownian, Clone
from cellfate.kernels.spatial import Matern32
from cellfate.model.glmm import FIXED, Model
from cellfate.places.basis import field_basis
from tests.problem import dense_engine, double, entries, small_problem

POINTS = 3
BOUND = (0.3, 1.5)


def structured(model: Model, rank=None) -> StructuredEngine:
    n = model.data.n
    options = {"device": "cpu", "dtype": torch.float64, "rank": rank or n, "ranges": {"spatial": BOUND}}
    return StructuredEngine(model.components, n, **options)


def points(model: Model) -> torch.Tensor:
    rng = np.random.default_rng(3)
    u = np.tile(model.start().numpy(), (POINTS, 1)) + 0.3 * rng.normal(size=(POINTS, len(model.parameters)))
    for i, p in enumerate(model.parameters):
        if p.name.startswith("lengthscale"):
            u[:, i] = np.log(rng.uniform(0.5, 1.1, POINTS))
    return double(u)


def sites(n: int) -> Sites:
    rng = np.random.default_rng(5)
    precision = rng.gamma(1.0, size=(POINTS, n))
    return Sites(double(precision), double(precision * rng.normal(size=(POINTS, n))))


def some_observed(model: Model, count=14) -> Model:
    """Cells are lost, their leaves are not."""
    return model.at(np.sort(np.random.default_rng(2).permutation(model.data.n)[:count]))


def among_nodes(kernel, **values) -> np.ndarray:
    """Covariance of all nodes from the steps, each node its parent's row times the gain and a noise of its own."""
    steps = kernel.structure({k: double(v) for k, v in values.items()}, double(0.0))
    parent, noise = kernel.forest.parent, steps.noise.numpy()
    gain = np.ones_like(noise) if steps.gain is None else steps.gain.numpy()
    made_of = np.eye(len(parent))
    for node in reversed(range(len(parent))):
        if parent[node] >= 0:
            made_of[node] += gain[node] * made_of[parent[node]]
    return made_of * noise @ made_of.T


def among_positions(kernel, xyz, codes, lengthscale) -> np.ndarray:
    distance = np.linalg.norm(xyz[:, None] - xyz, axis=-1)
    return kernel.correlation(double(distance / float(lengthscale))).numpy() * (codes[:, None] == codes)


def joint(model: Model, theta, i: int, name: str, whole: np.ndarray, cells: np.ndarray, at: Sites):
    """Moments of a component everywhere, from its covariance `whole` and that of what the cells have besides."""
    k = {c.name: _entries(c, theta, i) for c in model.components}
    k[FIXED] = (model.data.design * model.beta_sd.square() @ model.data.design.T).numpy()
    unit = whole[np.ix_(cells, cells)]
    scale = float(theta.values[f"sd_{name}"][i]) ** 2
    scale /= float(sample_variance(double(np.trace(unit)), double(unit.sum()), len(cells)))
    np.testing.assert_allclose(scale * unit, k[name], atol=1e-12)
    total, tau = sum(k.values()), at.precision[i].numpy()
    inverse = np.linalg.inv(total + np.diag(1 / tau))
    c = scale * whole[:, cells]
    return c @ inverse @ (at.shift[i].numpy() / tau), scale * np.diag(whole) - np.diag(c @ inverse @ c.T)


def _entries(component, theta, i) -> np.ndarray:
    kernel, name = component.kernel, component.name
    k = entries(kernel, **{h.name: theta.values[f"{h.name}_{name}"][i] for h in kernel.hyperparameters})
    if kernel.normalized:
        k = k / sample_variance(k.diagonal().sum(), k.sum(), kernel.n)
    return float(theta.values[f"sd_{name}"][i]) ** 2 * k.numpy()


def kernel_of(model: Model, name: str):
    return next(c.kernel for c in model.components if c.name == name)


def moments(model: Model, engine, name: str, *where):
    """What an engine says at the nodes, or at positions, and what it says of the cells."""
    terms = model.terms(model.theta(points(model)))
    posterior = engine.condition(terms, sites(model.data.n))
    term = next(t for t in terms if t.name == name)
    found = posterior.elsewhere(term, *where) if where else posterior.ancestors(term)
    return found, (posterior.component_mean(term), posterior.component_variance(term))


def close(found, expected, tolerance=1e-9):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, double(other), rtol=0, atol=tolerance * float(double(other).abs().max()))


# --- ancestors ---


@pytest.mark.parametrize("observed", [21, 14], ids=["all-leaves", "some-leaves"])
@pytest.mark.parametrize("lineage", LINEAGE_KERNELS)
def test_ancestors_as_the_joint_covariance_has_them(lineage, observed):
    model = some_observed(small_problem(lineage=lineage)[0], observed)
    kernel, theta = kernel_of(model, "lineage"), model.theta(points(model))
    found, _ = moments(model, dense_engine(model.components, model.data.n), "lineage")
    assert found[0].shape == found[1].shape == (POINTS, kernel.forest.n_nodes)
    assert kernel.forest.n_trees == 5
    for i in range(POINTS):
        held = {h.name: theta.values[f"{h.name}_lineage"][i] for h in kernel.hyperparameters}
        expected = joint(model, theta, i, "lineage", among_nodes(kernel, **held), kernel.leaf, sites(model.data.n))
        close([x[i] for x in found], expected)


@pytest.mark.parametrize("observed", [21, 14], ids=["all-leaves", "some-leaves"])
@pytest.mark.parametrize("lineage", LINEAGE_KERNELS)
def test_ancestors_of_both_engines(lineage, observed):
    model = some_observed(small_problem(lineage=lineage, seed=1)[0], observed)
    dense, _ = moments(model, dense_engine(model.components, model.data.n), "lineage")
    fast, _ = moments(model, structured(model), "lineage")
    close(fast, dense, 1e-8)


@pytest.mark.parametrize("make", [lambda m: dense_engine(m.components, m.data.n), structured], ids=["dense", "sweeps"])
def test_leaves_with_cells_are_the_component(make):
    model = some_observed(small_problem(lineage="pagel")[0])
    (mean, variance), component = moments(model, make(model), "lineage")
    leaf = kernel_of(model, "lineage").leaf
    close([mean[:, leaf], variance[:, leaf]], component)


def test_a_tree_without_cells_is_as_before_the_data():
    model = small_problem(lineage="ou")[0]
    kernel = kernel_of(model, "lineage")
    tree = kernel.forest.tree[kernel.leaf]
    seen = np.flatnonzero(tree != 3)  # the largest one is lost, while the forest keeps it
    whole = replace(kernel, leaf=kernel.leaf[seen])
    components = [Component(c.name, whole if c.name == "lineage" else c.kernel.at(seen)) for c in model.components]
    model = replace(model.at(seen), components=components)
    unseen = kernel.forest.tree == 3
    scales = []
    for engine in (dense_engine(model.components, model.data.n), structured(model)):
        (mean, variance), _ = moments(model, engine, "lineage")
        np.testing.assert_allclose(mean[:, unseen], 0.0, atol=1e-12)
        np.testing.assert_allclose(variance[:, unseen], variance[:, unseen][:, :1].expand(-1, int(unseen.sum())))
        scales.append(variance[:, unseen][:, 0])
    theta, some = model.theta(points(model)), kernel_of(model, "lineage")
    for i, alpha in enumerate(theta.values["alpha_lineage"]):
        k = entries(some, alpha=alpha)
        expected = theta.values["sd_lineage"][i].square() / sample_variance(k.diagonal().sum(), k.sum(), some.n)
        assert float(scales[0][i]) == pytest.approx(float(expected)) == float(scales[1][i])


def test_the_root_of_a_single_tree_of_clones_has_no_effect():
    model = small_problem(sizes=(12,), lineage="clone", groups=())[0]
    assert isinstance(kernel_of(model, "lineage"), Clone)
    for engine in (dense_engine(model.components, 12), structured(model)):
        (mean, variance), _ = moments(model, engine, "lineage")
        np.testing.assert_allclose(mean[:, -1], 0.0, atol=1e-12)
        np.testing.assert_allclose(variance[:, -1], 0.0, atol=1e-12)


def test_a_piece_at_a_time(monkeypatch):
    model = some_observed(small_problem(lineage="ou")[0])
    where = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 6
    for engine in (dense_engine(model.components, model.data.n), structured(model)):
        whole = [moments(model, engine, name, *at)[0] for name, at in (("lineage", ()), ("spatial", where))]
        monkeypatch.setattr("cellfate.engines.elsewhere.ENTRIES", 7 * POINTS * model.data.n)
        parts = [moments(model, engine, name, *at)[0] for name, at in (("lineage", ()), ("spatial", where))]
        monkeypatch.undo()
        for one, other in zip(parts, whole, strict=True):
            close(one, other, 1e-12)


# --- new positions ---


def test_new_positions_as_the_joint_covariance_has_them():
    model = small_problem(seed=3)[0]
    kernel, theta, n = kernel_of(model, "spatial"), model.theta(points(model)), model.data.n
    rng = np.random.default_rng(1)
    new, codes = rng.normal(size=(25, 2)), rng.integers(5, size=25)
    found, _ = moments(model, dense_engine(model.components, n), "spatial", new, codes)
    fast, _ = moments(model, structured(model), "spatial", new, codes)
    xyz, specimens = np.concatenate([kernel.coordinates, new]), np.concatenate([kernel.specimens, codes])
    for i in range(POINTS):
        whole = among_positions(kernel, xyz, specimens, theta.values["lengthscale_spatial"][i])
        mean, variance = joint(model, theta, i, "spatial", whole, np.arange(n), sites(n))
        close([x[i] for x in found], (mean[n:], variance[n:]))
    # columns of as many functions as cells are exact among the cells; in between they are as good as Nyström's formula is,
    # and that is made for a blend of length-scales, of which these points are but some
    inside = codes > 0  # a specimen of one cell has no columns
    assert float((fast[0] - found[0])[:, inside].abs().max()) < 0.1 * float(found[1].max().sqrt())
    assert float((fast[1] - found[1])[:, inside].abs().max()) < 0.05 * float(found[1].max())


@pytest.mark.parametrize("make", [lambda m: dense_engine(m.components, m.data.n), structured], ids=["dense", "columns"])
def test_positions_of_cells_are_the_component(make):
    model = small_problem(sizes=(5, 2, 9, 4))[0]
    kernel = kernel_of(model, "spatial")
    found, component = moments(model, make(model), "spatial", kernel.coordinates, kernel.specimens)
    close(found, component, 1e-7)


def test_a_truncated_field_is_itself_without_what_is_left_to_the_cells():
    model = small_problem(sizes=(40,), groups=(), seed=4)[0]
    kernel, rank = kernel_of(model, "spatial"), 12
    found, _ = moments(model, structured(model, rank), "spatial", kernel.coordinates, kernel.specimens)
    exact, _ = moments(model, dense_engine(model.components, 40), "spatial", kernel.coordinates, kernel.specimens)
    basis = field_basis(kernel.coordinates, kernel.correlation, *BOUND, rank=rank)
    left = float(basis.left_out(double([0.5])).mean())
    assert 0.01 < left < 0.6
    assert float((found[1] - exact[1]).abs().mean()) < 2 * left * float(exact[1].max())


def test_far_away_and_in_an_unknown_specimen_it_is_as_before_the_data():
    model = small_problem(sizes=(12, 9))[0]
    kernel = kernel_of(model, "spatial")
    where = np.array([[1e4, 0.0], [0.0, 0.0]]), np.array([1, 7])
    theta = model.theta(points(model))
    for engine in (dense_engine(model.components, model.data.n), structured(model)):
        (mean, variance), _ = moments(model, engine, "spatial", *where)
        np.testing.assert_allclose(mean, 0.0, atol=1e-12)
        for i, lengthscale in enumerate(theta.values["lengthscale_spatial"]):
            k = entries(kernel, lengthscale=lengthscale)
            c = sample_variance(k.diagonal().sum(), k.sum(), kernel.n)
            np.testing.assert_allclose(variance[i], theta.values["sd_spatial"][i].square() / c, rtol=1e-6)


def test_positions_without_specimens_and_in_three_dimensions():
    rng = np.random.default_rng(0)
    model = small_problem(sizes=(15,), groups=())[0]
    xyz = rng.normal(size=(15, 3))
    components = [Component("spatial", Matern32(xyz))]
    model = replace(model, components=components)
    for engine in (dense_engine(components, 15), structured(model)):
        found, component = moments(model, engine, "spatial", xyz)
        close(found, component, 1e-7)


def test_what_has_no_nodes_and_no_positions():
    model = small_problem()[0]
    n = model.data.n
    dense, fast = dense_engine(model.components, n), structured(model)
    for engine in (dense, fast):
        with pytest.raises(DataError, match="component 'batch' is no ancestry"):
            moments(model, engine, "batch")
        with pytest.raises(DataError, match="component 'lineage' has no value at new positions"):
            moments(model, engine, "lineage", np.zeros((1, 2)))
    components = [Component("lineage", Given(torch.eye(n)))]
    with pytest.raises(DataError, match="component 'lineage' is no ancestry"):
        moments(replace(model, components=components), dense_engine(components, n), "lineage")


def test_constants_of_a_held_kernel_are_shared_by_the_points():
    """The dense engine keeps one copy of a covariance that no hyperparameter moves."""
    model = small_problem(lineage="brownian", lengthscale=0.7)[0]
    assert isinstance(kernel_of(model, "lineage"), Brownian)
    where = np.random.default_rng(0).normal(size=(6, 2)), np.arange(6) % 5
    for name, at in (("lineage", ()), ("spatial", where)):
        whole, _ = moments(model, dense_engine(model.components, model.data.n), name, *at)
        theta = model.theta(points(model))
        for i in range(POINTS):
            values = {k: v[i : i + 1] for k, v in theta.values.items()}
            terms = model.terms(replace(theta, values=values))
            engine = dense_engine(model.components, model.data.n)
            here = sites(model.data.n)
            posterior = engine.condition(terms, Sites(here.precision[i : i + 1], here.shift[i : i + 1]))
            term = next(t for t in terms if t.name == name)
            single = posterior.elsewhere(term, *at) if at else posterior.ancestors(term)
            close([x[0] for x in single], [x[i] for x in whole], 1e-12)
