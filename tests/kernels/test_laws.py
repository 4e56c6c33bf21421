"""One list of kernels, one list of laws."""

import inspect

import numpy as np
import pytest
import torch

from cellfate.errors import DataError
from cellfate.kernels.base import Component, Given, Kernel, Term, unit_scale
from cellfate.kernels.fates import Loaded
from cellfate.kernels.graph import Composition, Graph
from cellfate.kernels.groups import CorrelatedSlopes, Intercepts, Slopes
from cellfate.kernels.lineage import LINEAGE_KERNELS
from cellfate.kernels.product import Product
from cellfate.kernels.spatial import SPATIAL_KERNELS
from cellfate.trees.convert import to_forest
from tests.problem import dense_engine, double, entries, random_newick

N = 19
SIZES = (7, 1, 8, 3)
VALUES = {"alpha": [0.2, 1.1], "lambda": [0.1, 0.8], "rate": [0.3, 2.0], "lengthscale": [0.3, 1.4]}
VALUES |= {"sd": [1.0, 1.0], "slope": [0.7, 1.2], "correlation": [-0.6, 0.95]}


def _kernels() -> dict[str, Kernel]:
    rng = np.random.default_rng(3)
    order = rng.permutation(N)
    cells = np.array([f"c{i}" for i in range(N)])
    specimen = np.repeat(np.arange(len(SIZES)), SIZES)
    trees = {
        "tree": to_forest(random_newick(list(cells), rng)),
        "forest": to_forest({str(s): random_newick(list(cells[specimen == s]), rng) for s in range(len(SIZES))}),
    }
    out: dict[str, Kernel] = {}
    for name, kernel in LINEAGE_KERNELS.items():
        for what, forest in trees.items():
            out[f"{name} on a {what}"] = kernel(forest, forest.nodes_of(cells[order]))
    for name, field in SPATIAL_KERNELS.items():
        out[f"{name} in 2-D"] = field(rng.normal(size=(N, 2)))
        out[f"{name} in 3-D, by specimen"] = field(rng.normal(size=(N, 3)), specimen[order])
    out["intercepts"] = Intercepts(order % 5)
    out["slopes"] = Slopes(order % 5, rng.normal(size=N))
    out["an intercept per cell"] = Intercepts(order)
    out["correlated slopes"] = CorrelatedSlopes(order % 5, rng.normal(size=N))
    edges = np.triu(rng.random((N, N)) < 0.4, 1) * rng.exponential(size=(N, N))
    out["graph"] = Graph(edges + edges.T + np.eye(N, k=1))
    apart = np.equal.outer(specimen[order], specimen[order])
    out["graph of a few modes, by specimen"] = Graph(edges * apart, rank=9)  # one specimen is a cell without neighbors
    out["graph seen in some cells"] = Graph(np.eye(40, k=1), lengthscale=None).at(rng.permutation(40)[:N])
    out["composition"] = Composition(rng.dirichlet(np.ones(4), size=N))
    for lineage, spatial in (("ou on a tree", "rbf in 2-D"), ("pagel on a forest", "matern12 in 3-D, by specimen")):
        out[f"product of {lineage} and {spatial}"] = Product(out[lineage], out[spatial])
    out["product of a forest and a graph"] = Product(out["brownian on a forest"], out["graph"])
    root = rng.normal(size=(N, 4)) * (specimen[order] != 1)[:, None]  # four cells' worth of nothing in common
    out["given"] = Given(double(root @ root.T * np.equal.outer(specimen, specimen)[np.ix_(order, order)]))
    return out


KERNELS = _kernels()


@pytest.fixture(params=KERNELS, ids=lambda name: name.replace(" ", "-"))
def kernel(request):
    return KERNELS[request.param]


def values(kernel: Kernel, index: int | None = None) -> dict[str, torch.Tensor]:
    names = [h.name for h in kernel.hyperparameters] + list(kernel.borrowed) + ["sd"] * kernel.holds_variance
    found = {name: VALUES[name.removesuffix("_lineage").removesuffix("_spatial")] for name in names}
    return {name: double(x if index is None else x[index]) for name, x in found.items()}


def promised(kernel: Kernel) -> np.ndarray:
    """What it says to contribute among the cells, at an sd of 1."""
    return kernel.contribution(np.ones(2 if values(kernel) else ()), {k: x.numpy() for k, x in values(kernel).items()})


def covariance(kernel: Kernel) -> torch.Tensor:
    """As it enters the model at variance 1, (..., n, n), put together from the blocks of an engine."""
    engine = dense_engine([Component("k", kernel)], N)
    variance = double([1.0, 1.0]) if values(kernel) else double(1.0)
    term = Term("k", kernel.structure(values(kernel), double(0.0)), variance, kernel.normalized)
    out = variance.new_zeros(*variance.shape, N + 1, N + 1)
    for stack, blocks in zip(engine.blocks.stacks, engine.covariance(term), strict=True):
        for cells, block in zip(stack, blocks.unbind(-3), strict=True):
            out[..., cells[:, None], cells[None, :]] = block
    return out[..., :N, :N]


def test_every_kernel_is_on_the_list():
    def concrete(base):
        below = [kernel for child in base.__subclasses__() for kernel in concrete(child)]
        return below if inspect.isabstract(base) or base.__subclasses__() else [base, *below]

    # the field of one fate is over copies of the cells, and its law is that of all fates together: tests/inference/test_per_fate.py
    assert set(concrete(Kernel)) - {Loaded} == {type(kernel) for kernel in KERNELS.values()}


def test_symmetric_and_positive_semi_definite(kernel):
    k = covariance(kernel)
    torch.testing.assert_close(k, k.mT, rtol=0, atol=1e-14)
    eigenvalues = torch.linalg.eigvalsh(k)
    assert float(eigenvalues.min()) > -1e-12 * float(eigenvalues.max())
    assert float(eigenvalues.max()) > 0


def test_unit_scale(kernel):
    """The expected sample variance of a draw over the cells is 1, or what the kernel says it is."""
    p = torch.eye(N, dtype=torch.float64) - 1 / N
    c = (p @ covariance(kernel) @ p).diagonal(dim1=-2, dim2=-1).sum(-1) / (N - 1)
    torch.testing.assert_close(c, double(promised(kernel)), rtol=1e-13, atol=0)


def test_the_sample_variance_of_draws_is_what_the_scale_promises(kernel):
    """The law behind c(K), without its formula: numpy's variance of draws."""
    k = covariance(kernel).reshape(-1, N, N)[0]
    values, vectors = np.linalg.eigh(k.numpy())
    z = np.random.default_rng(0).standard_normal((20_000, N))
    variances = (z @ (vectors * np.sqrt(np.maximum(values, 0))).T).var(axis=1, ddof=1)
    error = variances.std(ddof=1) / np.sqrt(len(variances))
    assert abs(variances.mean() - promised(kernel).reshape(-1)[0]) < 4 * error


def test_scaling_is_all_that_blocks_change(kernel):
    k = entries(kernel, **values(kernel))
    expected = unit_scale(k) if kernel.normalized else k
    torch.testing.assert_close(covariance(kernel), expected, rtol=1e-12, atol=1e-14)


def test_cells_said_to_be_independent_are(kernel):
    labels = kernel.independent()
    if labels is not None:
        apart = np.not_equal.outer(labels, labels)
        assert (entries(kernel, **values(kernel)).numpy()[..., apart] == 0).all()


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if values(kernel)])
def test_scaled_entries_are_differentiable(name):
    """c(K) moves with the hyperparameters, and so is part of the slope."""
    kernel = KERNELS[name]
    engine = dense_engine([Component("k", kernel)], N)
    names = list(values(kernel))

    def scaled(variance, *shapes):
        term = Term("k", kernel.structure(dict(zip(names, shapes, strict=True)), variance), variance, kernel.normalized)
        return tuple(engine.covariance(term))

    at = [x.requires_grad_(True) for x in (double([0.7, 1.9]), *values(kernel).values())]
    assert torch.autograd.gradcheck(scaled, at)


def test_what_is_constant_over_the_cells_cannot_be_scaled():
    for kernel in (Given(torch.ones(4, 4, dtype=torch.float64)), Given(torch.zeros(4, 4, dtype=torch.float64))):
        engine = dense_engine([Component("niche", kernel)], 4)
        term = Term("niche", kernel.structure({}, double(0.0)), double(1.0), True)
        with pytest.raises(DataError, match="component 'niche' is constant over the cells"):
            engine.covariance(term)


def test_a_given_covariance_may_keep_its_scale():
    k = double(np.diag([4.0, 1.0, 2.0]))
    kernel = Given(k, normalized=False)
    term = Term("k", kernel.structure({}, double(0.0)), double(2.0), kernel.normalized)
    blocks = dense_engine([Component("k", kernel)], 3).covariance(term)
    np.testing.assert_array_equal(sorted(float(x) for block in blocks for x in block.flatten()), [2, 4, 8])
