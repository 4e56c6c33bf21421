"""A small embryo of two halves with everything that a fit may ask for, and a way to say that nobody touched it."""

from collections.abc import Mapping
from contextlib import contextmanager
from copy import deepcopy

import networkx as nx
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from cellfate.cells import Cells

N = 24
HALVES = ("left", "right")


def half_tree(first, last, length=1.0):
    """Newick of a balanced tree over cells `first`..`last - 1`, internal nodes named."""
    level = [f"c{i}:{length}" for i in range(first, last)]
    generation = 0
    while len(level) > 1:
        generation += 1
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [f"({','.join(pair)})g{generation}_{first + i}:{length}" for i, pair in enumerate(pairs)]
    return level[0]


def one_tree():
    return f"({half_tree(0, N // 2)},{half_tree(N // 2, N)})zygote;"


def trees():
    """One tree per half."""
    return {"left": half_tree(0, N // 2) + ";", "right": half_tree(N // 2, N) + ";"}


def embryo(*, tree=True):
    rng = np.random.default_rng(7)
    obs = pd.DataFrame(index=[f"c{i}" for i in range(N)])
    obs["fate"] = pd.Categorical(rng.permutation(["skin", "neuron"] * (N // 2)), categories=["skin", "neuron"])
    obs["on"] = rng.permutation([0, 1] * (N // 2))
    obs["count"] = rng.poisson(3, N)
    obs["size"] = rng.normal(10, 2, N)
    obs["sites"] = 10
    obs["edited"] = rng.binomial(10, 0.4, N)
    obs["time"] = rng.normal(size=N)
    obs["stage"] = np.resize(["early", "mid", "late"], N)
    obs["batch"] = np.resize([1, 2, 3, 4], N)
    obs["half"] = np.repeat(HALVES, N // 2)
    obs["clone"] = np.repeat([f"k{i}" for i in range(N // 3)], 3)
    obs["log_size"] = rng.normal(0, 0.1, N)
    x = sparse.csr_matrix(rng.poisson(1.0, (N, 3)).astype(np.float32))
    adata = AnnData(x, obs=obs, var=pd.DataFrame(index=["elt-2", "pha-4", "hlh-1"]))
    adata.obsm["spatial"] = rng.uniform(0, 100, (N, 2))
    adata.uns["colors"] = ["red", "blue"]
    if tree:
        adata.uns["tree"] = one_tree()
    return adata


def _plain(value):
    """Something that compares by value."""
    if isinstance(value, nx.Graph):
        return sorted(map(str, value.nodes(data=True))), sorted(map(str, value.edges(data=True)))
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, pd.DataFrame):
        dtypes = {key: str(dtype) for key, dtype in value.dtypes.items()}
        return dtypes, [str(name) for name in value.index], {key: value[key].tolist() for key in value}
    if sparse.issparse(value):
        return type(value).__name__, str(value.dtype), value.toarray().tolist()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    return value


def contents(adata):
    slots = (
        "obs",
        "var",
        "obsm",
        "varm",
        "obsp",
        "varp",
        "layers",
        "uns",
        *(("obst", "vart") * hasattr(adata, "obst")),
    )
    found = {
        slot: _plain(dict(getattr(adata, slot)) if slot not in ("obs", "var") else getattr(adata, slot))
        for slot in slots
    }
    return repr(deepcopy(found | {"X": _plain(adata.X), "view": adata.is_view}))


@contextmanager
def unchanged(adata):
    before = contents(adata)
    yield
    assert contents(adata) == before


def shared_path(cells: Cells) -> np.ndarray:
    """Depth of the most recent common ancestor of every two cells."""
    mrca = cells.forest.mrca(cells.leaf)
    return np.where(mrca >= 0, cells.forest.depth[mrca], 0.0)


def same(one: Cells, other: Cells) -> None:
    """The same cells, up to the order in which the forest keeps its trees."""
    for field in ("names", "response", "design", "offset", "coordinates", "specimen", "kept"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)
    for field in ("response_name", "terms", "specimens", "group_levels", "levels"):
        assert getattr(one, field) == getattr(other, field)
    assert one.groups.keys() == other.groups.keys()
    np.testing.assert_allclose(shared_path(one), shared_path(other))
