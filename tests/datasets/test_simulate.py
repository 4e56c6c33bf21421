"""The simulator against what it claims: the law of the tree, of the fields, of the fates."""

import time

import anndata
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit

import cellfate as cf
from cellfate.datasets.growth import birth_death, territories, walk
from cellfate.datasets.simulate import (
    EXACT,
    _lineage_field,
    _spatial_field,
    fourier_field,
    simulate,
)
from cellfate.errors import DataError
from cellfate.trees.convert import to_forest
from cellfate.trees.forest import Forest

# --- trees ---


@pytest.mark.parametrize("n", [2, 3, 17, 1000])
@pytest.mark.parametrize("death", [0.0, 0.2, 0.95])
def test_the_tree_is_binary_ultrametric_and_has_the_cells_as_leaves(n, death):
    adata = simulate(n, death=death, rng=n)
    forest = to_forest(adata.uns["tree"])
    assert (forest.n_trees, forest.n_leaves, forest.n_nodes) == (1, n, 2 * n - 1)
    assert set(forest.n_children) == {0, 2}
    assert sorted(forest.names[forest.leaves]) == sorted(adata.obs_names)
    np.testing.assert_allclose(forest.depth[forest.leaves], 1, rtol=1e-12)
    assert forest.branch_length[-1] == 0


def test_cells_do_not_stand_in_the_order_of_the_leaves():
    adata = simulate(100, rng=0)
    forest = to_forest(adata.uns["tree"])
    assert list(forest.names[forest.leaves]) != list(adata.obs_names)


def forward(n: int, death: float, rng: np.random.Generator) -> list[float] | None:
    """The slow twin: births and deaths in time; branching ages of the survivors, oldest first, and the smaller side of the
    root, if n are alive when the age is reached at which n are expected.
    """
    rate, now = 1.0 - death, 0.0
    end = np.log(1 + (n - 1) * rate) / rate
    alive, parent, born = [0], {0: -1}, {0: 0.0}
    while alive:
        now += rng.exponential(1 / ((1 + death) * len(alive)))
        if now > end:
            break
        node = alive.pop(rng.integers(len(alive)))
        if rng.random() < 1 / (1 + death):
            for _ in range(2):
                child = len(parent)
                parent[child], born[child] = node, now
                alive.append(child)
    if len(alive) != n:
        return None
    below: dict[int, list[int]] = {}
    for leaf in alive:
        node = leaf
        while node >= 0:
            below.setdefault(node, []).append(leaf)
            node = parent[node]
    children: dict[int, list[int]] = {}
    for node in below:
        children.setdefault(parent[node], []).append(node)
    splits = [pair for pair in children.values() if len(pair) == 2]  # both sides have survivors
    ages = sorted(((end - born[pair[0]], min(len(below[child]) for child in pair)) for pair in splits), reverse=True)
    return [ages[1][0] / ages[0][0], ages[2][0] / ages[0][0], ages[0][1]]


@pytest.mark.parametrize("death", [0.0, 0.6])
def test_branchings_follow_the_process_run_forward(death):
    rng = np.random.default_rng(1)
    slow = []
    while len(slow) < 800:
        drawn = forward(4, death, rng)
        if drawn is not None:
            slow.append(drawn)
    fast = []
    for _ in range(4000):
        parent, age = birth_death(4, death, rng)
        first, second, third = np.sort(age)[::-1][:3]
        sizes = Forest(parent, np.zeros(7), [str(i) for i in range(7)], ("0",))._size
        fast.append([second / first, third / first, min(sizes[parent == 6] + 1) // 2])
    slow, fast = np.array(slow), np.array(fast)
    for column in (0, 1):
        assert stats.ks_2samp(slow[:, column], fast[:, column]).pvalue > 0.01
    # Two cells beside two in a third of the trees, whatever the rates.
    for drawn in (slow, fast):
        assert abs((drawn[:, 2] == 2).mean() - 1 / 3) < 4 * np.sqrt(2 / 9 / len(drawn))


def test_specimens_are_trees_of_their_own():
    adata = simulate(50, n_specimens=4, rng=3)
    assert adata.obs["specimen"].value_counts().to_dict() == {
        "specimen0": 13, "specimen1": 13, "specimen2": 12, "specimen3": 12
    }  # fmt: skip
    for name, text in adata.uns["tree"].items():
        forest = to_forest(text)
        assert set(forest.names[forest.leaves]) == set(adata.obs_names[adata.obs["specimen"] == name])
        np.testing.assert_allclose(forest.depth[forest.leaves], 1, rtol=1e-12)


def test_clones_are_trees_and_share_their_effect():
    adata = simulate(400, lineage_kernel="clone", rng=0)
    forest = to_forest(adata.uns["tree"])
    assert forest.n_trees == 20
    np.testing.assert_allclose(forest.depth[forest.leaves], 1, rtol=1e-12)
    clone = forest.tree[forest.nodes_of(adata.obs_names)]
    effect = adata.obsm["truth_effects"]["lineage"].groupby(clone)
    assert (effect.nunique() == 1).all()
    assert effect.first().nunique() == 20
    pooled = simulate(100, lineage_kernel="clone", n_specimens=4, rng=0)
    assert [to_forest(text).n_trees for text in pooled.uns["tree"].values()] == [5, 5, 5, 5]


# --- positions ---


def sisters(adata) -> np.ndarray:
    """Rows of the two cells of every cherry."""
    forest = to_forest(adata.uns["tree"])
    row = np.full(forest.n_nodes, -1)
    row[forest.nodes_of(adata.obs_names)] = np.arange(adata.n_obs)
    order = np.argsort(forest.parent[forest.leaves], kind="stable")
    leaves = forest.leaves[order]
    above = forest.parent[leaves]
    first = np.flatnonzero(above[:-1] == above[1:])
    return np.stack([row[leaves[first]], row[leaves[first + 1]]])


@pytest.mark.parametrize(("inheritance", "low", "high"), [(0.0, -0.13, 0.13), (0.5, 0.3, 0.65), (0.9, 0.75, 1.0)])
def test_positions_are_inherited_as_far_as_asked(inheritance, low, high):
    adata = simulate(3000, inheritance=inheritance, dimensions=3, rng=5)
    one, other = sisters(adata)
    assert one.size > 800  # so that 0.13 is four standard errors
    for axis in adata.obsm["spatial"].T:
        assert low < np.corrcoef(axis[one], axis[other])[0, 1] < high


@pytest.mark.parametrize("inheritance", [0.0, 1.0])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_positions_have_unit_variance(inheritance, dimensions):
    adata = simulate(200, inheritance=inheritance, dimensions=dimensions, n_specimens=2, rng=0)
    for _, rows in adata.obs.groupby("specimen", observed=True).indices.items():
        xyz = adata.obsm["spatial"][rows]
        assert xyz.shape == (100, dimensions)
        np.testing.assert_allclose(xyz.var(axis=0, ddof=1), 1, rtol=1e-12)


# --- fields ---


def test_walk_is_the_recursion_along_the_tree():
    rng = np.random.default_rng(0)
    parent, _ = birth_death(30, 0.3, rng)
    gain, noise, z = rng.uniform(0.1, 1, 59), rng.exponential(size=59), rng.standard_normal((59, 3))
    expected = np.sqrt(noise)[:, None] * z
    for node in range(57, -1, -1):
        expected[node] += gain[node] * expected[parent[node]]
    np.testing.assert_allclose(walk(parent, gain, noise, z), expected, rtol=1e-12)


def sample_forest(trees: int = 1) -> Forest:
    rng = np.random.default_rng(2)
    parts = []
    for tree in range(trees):
        parent, age = birth_death(12 // trees, 0.3, rng)
        length = np.where(parent >= 0, age[parent] - age, 0.3)  # a root with a length of its own
        parts.append(Forest(parent, length, [f"t{tree}n{i}" for i in range(len(parent))], ("0",)))
    return Forest.join(parts)


def lineage_covariance(forest: Forest, kernel: str) -> np.ndarray:
    """The formulas of the kernels, by path lengths."""
    shared = forest.mrca(forest.leaves)
    depth = np.append(forest.depth, 0.0)
    path, own = depth[shared], forest.depth[forest.leaves]
    distance = own[:, None] + own - 2 * path
    if kernel == "brownian":
        return path
    if kernel == "ou":
        return np.exp(-1.5 * distance) * (shared >= 0)
    if kernel == "pagel":
        return np.where(np.eye(len(own), dtype=bool), path, 0.6 * path)
    if kernel == "early_burst":
        return (1 - np.exp(-2.5 * path)) / 2.5
    return (shared >= 0).astype(float)


def unit(k: np.ndarray) -> tuple[np.ndarray, float]:
    n = len(k)
    center = np.eye(n) - 1 / n
    scale = np.trace(center @ k @ center) / (n - 1)
    return k / scale, scale


def assert_covariance(fields: np.ndarray, k: np.ndarray) -> None:
    """Every entry, and the size of all of it, within the Monte-Carlo error of draws (draws, n) with mean zero."""
    draws, upper = len(fields), np.triu_indices(len(k))
    error = np.sqrt((np.outer(k.diagonal(), k.diagonal()) + k**2) / draws)
    assert np.abs((fields.T @ fields / draws - k)[upper] / error[upper]).max() < 4.5
    rank = np.linalg.matrix_rank(k, tol=1e-6)
    squares = np.einsum("si,ij,sj->s", fields, np.linalg.pinv(k, rcond=1e-6, hermitian=True), fields)  # chi-square
    assert abs(squares.mean() - rank) < 4 * np.sqrt(2 * rank / draws)


LINEAGE = {"brownian": {}, "ou": {"alpha": 1.5}, "pagel": {"lambda": 0.6}, "early_burst": {"rate": 2.5}, "clone": {}}


@pytest.mark.parametrize(("kernel", "trees"), [*((k, 2) for k in LINEAGE), ("brownian", 1), ("ou", 1), ("pagel", 1)])
def test_lineage_fields_have_the_covariance_of_their_kernel(kernel, trees):
    rng = np.random.default_rng(4)
    forest = sample_forest(trees)
    leaf = forest.leaves[::-1].copy()
    k, scale = unit(lineage_covariance(forest, kernel)[::-1, ::-1])
    drawn = [_lineage_field(forest, leaf, kernel, LINEAGE[kernel], rng) for _ in range(3000)]
    assert drawn[0][1] == pytest.approx(scale, rel=1e-12)
    assert_covariance(np.array([field for field, _ in drawn]) / np.sqrt(scale), k)


def spatial_covariance(distance: np.ndarray, kernel: str, lengthscale: float) -> np.ndarray:
    s = distance / lengthscale
    if kernel == "rbf":
        return np.exp(-(s**2) / 2)
    nu = {"matern12": 1, "matern32": 3, "matern52": 5}[kernel]
    s = np.sqrt(nu) * s
    return {1: 1.0, 3: 1 + s, 5: 1 + s + s**2 / 3}[nu] * np.exp(-s)


@pytest.mark.parametrize("road", ["exact", "fourier"])
@pytest.mark.parametrize(
    ("kernel", "dimensions"), [("matern12", 2), ("matern32", 2), ("matern32", 3), ("matern52", 3), ("rbf", 2)]
)
def test_spatial_fields_have_the_covariance_of_their_kernel(kernel, dimensions, road):
    rng = np.random.default_rng(6)
    xyz = rng.standard_normal((9, dimensions))
    specimen = np.repeat([0, 1], [5, 4])
    distance = np.linalg.norm(xyz[:, None] - xyz, axis=-1)
    k = spatial_covariance(distance, kernel, 0.8)
    if road == "fourier":
        fields = np.array([fourier_field(xyz, kernel, 0.8, rng) for _ in range(1500)])
    else:
        k, scale = unit(k * (specimen[:, None] == specimen))
        drawn = [_spatial_field(xyz, specimen, kernel, 0.8, rng) for _ in range(3000)]
        assert drawn[0][1] == pytest.approx(scale, rel=1e-12)
        fields = np.array([field for field, _ in drawn]) / np.sqrt(scale)
    assert_covariance(fields, k)


def test_scale_of_a_large_specimen_is_that_of_its_exact_kernel():
    rng = np.random.default_rng(0)
    sizes = [EXACT + 300, 200]
    xyz, specimen = rng.standard_normal((sum(sizes), 2)), np.repeat([0, 1], sizes)
    k = spatial_covariance(np.linalg.norm(xyz[:, None] - xyz, axis=-1), "matern32", 0.5)
    scale = unit(k * (specimen[:, None] == specimen))[1]
    assert _spatial_field(xyz, specimen, "matern32", 0.5, rng)[1] == pytest.approx(scale, abs=1e-3)


@pytest.mark.parametrize("settings", [{}, {"n_specimens": 4, "lineage_kernel": "ou", "spatial_kernel": "rbf"}])
def test_a_variance_is_the_expected_variance_among_the_cells(settings):
    rng = np.random.default_rng(8)
    realized = [
        simulate(40, variance_lineage=2.0, variance_spatial=0.5, rng=rng, **settings).uns["truth"]["realized"]
        for _ in range(400)
    ]
    for name, variance in (("lineage", 2.0), ("spatial", 0.5)):
        drawn = np.array([one[name] for one in realized])
        assert abs(drawn.mean() - variance) < 4 * drawn.std(ddof=1) / np.sqrt(len(drawn))


def test_fields_scale_with_their_sd_and_nothing_else():
    one, four = simulate(100, rng=1), simulate(100, variance_lineage=4.0, variance_spatial=0.0, rng=1)
    np.testing.assert_allclose(
        four.obsm["truth_effects"]["lineage"], 2 * one.obsm["truth_effects"]["lineage"], rtol=1e-12
    )
    assert (four.obsm["truth_effects"]["spatial"] == 0).all()
    realized = four.uns["truth"]["realized"]["lineage"]
    assert realized == pytest.approx(np.var(four.obsm["truth_effects"]["lineage"], ddof=1), rel=1e-12)


# --- fates ---

MEAN = {
    "logit": expit,
    "probit": stats.norm.cdf,
    "cloglog": lambda eta: -np.expm1(-np.exp(eta)),
    "log": np.exp,
    "identity": lambda eta: eta,
}
VARIANCE = {
    "gaussian": lambda mean: 0.5,
    "bernoulli": lambda mean: mean * (1 - mean),
    "binomial": lambda mean: 7 * mean * (1 - mean),
    "poisson": lambda mean: mean,
    "negative_binomial": lambda mean: mean + 0.3 * mean**2,
}


@pytest.mark.parametrize(
    ("family", "link"),
    [
        ("gaussian", "identity"),
        ("bernoulli", "logit"),
        ("bernoulli", "probit"),
        ("binomial", "cloglog"),
        ("poisson", "log"),
        ("negative_binomial", "log"),
    ],
)
def test_fates_have_the_mean_and_variance_that_the_truth_gives_them(family, link):
    n = 4000
    adata = simulate(
        n, family=family, link=link, intercept=-1.0, coefficients={"dose": -0.7}, groups={"batch": (5, 0.4)}, trials=7,
        dispersion=0.3, variance_residual=0.5, variance_lineage=0.3, variance_spatial=0.2, rng=9,
    )  # fmt: skip
    truth, effects = adata.uns["truth"], adata.obsm["truth_effects"]
    assert list(effects) == ["lineage", "spatial", "batch"]
    assert (truth["family"], truth["link"], truth["coefficients"]) == (family, link, {"dose": -0.7})
    eta = -1.0 - 0.7 * adata.obs["dose"] + effects.sum(axis=1)
    mean = MEAN[link](eta.to_numpy())
    z = (adata.obs["fate"] - mean * (7 if family == "binomial" else 1)) / np.sqrt(VARIANCE[family](mean))
    assert abs(z.mean()) < 4 / np.sqrt(n)
    assert abs(np.mean(z**2) - 1) < 4 * (z**2).std() / np.sqrt(n)
    assert abs(np.corrcoef(z, eta)[0, 1]) < 4 / np.sqrt(n)
    assert adata.obs["fate"].dtype.kind == ("f" if family == "gaussian" else "i")
    assert ("trials" in adata.obs) == (family == "binomial")
    if family == "binomial":
        assert adata.obs["fate"].between(0, adata.obs["trials"]).all()


def test_groups_are_random_intercepts():
    adata = simulate(300, groups={"batch": (200, 2.0), "plate": (3, 0.1)}, rng=0)
    effects = adata.obsm["truth_effects"]
    for name in ("batch", "plate"):
        assert (effects[name].groupby(adata.obs[name], observed=True).nunique() == 1).all()
    levels = effects.groupby(adata.obs["batch"], observed=True)["batch"].first()
    assert 1.4 < levels.var() < 2.8  # chi-square, about 150 levels seen
    assert adata.uns["truth"]["variance_groups"] == {"batch": 2.0, "plate": 0.1}


def test_trials_may_differ_by_cell():
    trials = np.arange(1, 51)
    adata = simulate(50, family="binomial", trials=trials, intercept=20.0, rng=0)
    np.testing.assert_array_equal(adata.obs["trials"], trials)
    np.testing.assert_array_equal(adata.obs["fate"], trials)  # certain success


# --- seeds, size, errors ---


def assert_equal(one, other):
    assert one.obs.equals(other.obs)
    np.testing.assert_array_equal(one.obsm["spatial"], other.obsm["spatial"])
    assert one.obsm["truth_effects"].equals(other.obsm["truth_effects"])
    assert (one.uns["tree"], one.uns["truth"]) == (other.uns["tree"], other.uns["truth"])


def test_a_seed_gives_one_answer_and_leaves_the_global_state_alone():
    before, torch_before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    one = simulate(80, n_specimens=2, groups={"batch": (3, 1.0)}, rng=11)
    assert_equal(one, simulate(80, n_specimens=2, groups={"batch": (3, 1.0)}, rng=11))
    assert_equal(simulate(80, rng=11), simulate(80, rng=np.random.default_rng(11)))
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    moving = np.random.default_rng(11)
    first, second = simulate(80, rng=moving), simulate(80, rng=moving)
    assert not np.array_equal(first.obsm["spatial"], second.obsm["spatial"])


def test_a_large_seed_does_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        drawn = []
        for count in (1, 2):
            torch.set_num_threads(count)
            drawn.append(simulate(2000, rng=0).obsm["truth_effects"]["spatial"])
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(drawn[0], drawn[1], rtol=1e-9, atol=1e-12)


def test_tree_and_positions_do_not_depend_on_what_is_built_on_them():
    one = simulate(60, rng=2)
    other = simulate(60, family="poisson", variance_lineage=0.1, lengthscale=2.0, intercept=1.0, rng=2)
    assert one.uns["tree"] == other.uns["tree"]
    np.testing.assert_array_equal(one.obsm["spatial"], other.obsm["spatial"])


@pytest.mark.parametrize("n_specimens", [1, 3])
def test_it_survives_the_disk(tmp_path, n_specimens):
    adata = simulate(40, n_specimens=n_specimens, family="binomial", lineage_kernel="ou", groups={"b": (3, 1.0)}, rng=0)
    adata.write_h5ad(tmp_path / "a.h5ad")
    read = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert_equal(adata, read)
    assert read.uns["truth"]["alpha"] == 2.0


def test_specimens_of_one_cell():
    adata = simulate(5, n_specimens=5, rng=0)
    assert [to_forest(text).n_nodes for text in adata.uns["tree"].values()] == [1] * 5
    np.testing.assert_allclose([to_forest(text).height for text in adata.uns["tree"].values()], 1)


@pytest.mark.slow
def test_a_hundred_thousand_cells_take_seconds():
    begin = time.perf_counter()
    adata = cf.datasets.simulate(100_000, rng=0)
    assert time.perf_counter() - begin < 60  # about 4 alone on one core
    assert adata.shape == (100_000, 0)
    assert adata.uns["tree"].count(",") == 99_999


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 1}, "n is 1: it has to be 2 cells or more"),
        ({"n_specimens": 21}, "n_specimens is 21: it has to be between 1 and n = 20"),
        ({"n_specimens": 0}, "n_specimens is 0"),
        ({"dimensions": 4}, "dimensions is 4: it has to be 2 or 3"),
        ({"inheritance": 1.2}, "inheritance is 1.2: it has to be between 0 and 1"),
        ({"death": 1.0}, "death is 1.0: it has to be at least 0 and below 1"),
        ({"lengthscale": 0.0}, "lengthscale is 0.0: it has to be positive"),
        ({"dispersion": float("nan")}, "dispersion is nan: it has to be positive"),
        ({"variance_lineage": -1.0}, "variance_lineage is -1.0: it has to be a variance"),
        ({"variance_spatial": float("inf")}, "variance_spatial is inf: it has to be a variance"),
        ({"groups": {"b": (3, -1.0)}}, r"groups\['b'\] is -1.0: it has to be a variance"),
        ({"groups": {"b": (1, 1.0)}}, r"groups\['b'\] is 1: it has to be 2 levels or more"),
        ({"groups": {"fate": (2, 1.0)}}, "name of a covariate or group is 'fate': it has to be another one"),
        ({"coefficients": {"b": 1.0}, "groups": {"b": (2, 1.0)}}, "name of a covariate or group is 'b'"),
        (
            {"lineage_kernel": "brown"},
            "lineage_kernel is 'brown': it has to be one of brownian, ou, pagel, early_burst, clone",
        ),
        ({"spatial_kernel": "matern"}, "spatial_kernel is 'matern': it has to be one of matern12"),
        ({"alpha": 1.0}, "alpha is 1.0: it has to be left out unless lineage_kernel='ou'"),
        ({"alpha": -1.0, "lineage_kernel": "ou"}, "alpha is -1.0: it has to be positive"),
        ({"pagel_lambda": 0.5}, "pagel_lambda is 0.5: it has to be left out"),
        ({"pagel_lambda": 1.5, "lineage_kernel": "pagel"}, "pagel_lambda is 1.5: it has to be between 0 and 1"),
        ({"burst_rate": 2.0}, "burst_rate is 2.0: it has to be left out"),
        ({"burst_rate": 0.0, "lineage_kernel": "early_burst"}, "burst_rate is 0.0: it has to be positive"),
        ({"family": "binomial", "trials": [1, 2]}, r"shape of trials is \(2,\): it has to be \(\) or \(20,\)"),
        ({"family": "binomial", "trials": 0}, "smallest of trials is 0: it has to be 1 or more"),
        ({"family": "normal"}, "unknown family 'normal'"),
        ({"lengthscale": 1e9}, "the spatial kernel is the same for all 20 cells"),
    ],
)
def test_what_cannot_be_simulated(settings, message):
    with pytest.raises(DataError, match=message):
        simulate(**({"n": 20, "rng": 0} | settings))


def test_fates_can_have_variances_of_their_own():
    adata = simulate(
        400, family="categorical", n_fates=3, variance_lineage=(6.0, 0.0, 1.5), variance_spatial=1.0, rng=0
    )
    effects = adata.obsm["truth_effects"]
    own = effects[[f"lineage[{k}]" for k in range(3)]].to_numpy()
    np.testing.assert_allclose(own.sum(1), 0, atol=1e-12)
    # fate 1 has no effect of its own: less the mean of the three it is that of the others, halved
    equal = simulate(400, family="categorical", n_fates=3, variance_lineage=1.5, variance_spatial=1.0, rng=0)
    same = equal.obsm["truth_effects"][[f"lineage[{k}]" for k in range(3)]].to_numpy()
    fields = np.linalg.lstsq(np.eye(3) - 1 / 3, same.T, rcond=None)[0].T  # up to one that all share
    free = own[:, [0, 2]] - own[:, [1]]  # the fields of fates 0 and 2
    shared = free[:, 1] - (fields[:, 2] - fields[:, 1])  # minus the field of fate 1, which here is none
    np.testing.assert_allclose(free[:, 0] / 2, fields[:, 0] - fields[:, 1] + shared, atol=1e-10)
    np.testing.assert_array_equal(adata.uns["truth"]["variance_lineage"], [6.0, 0.0, 1.5])
    assert adata.uns["truth"]["variance_spatial"] == 1.0
    assert own[:, 0].var() > 3 * own[:, 1].var()
    with pytest.raises(DataError, match="one for each of 3 fates"):
        simulate(20, family="categorical", variance_lineage=(1.0, 2.0))
    with pytest.raises(DataError, match="variance_spatial"):
        simulate(20, variance_spatial=(1.0, 2.0))
    for wrong in (-2.0, np.nan, np.inf):
        with pytest.raises(DataError, match="variance_lineage"):
            simulate(20, family="categorical", variance_lineage=(1.0, wrong, 1.0))


# --- territories ---


@pytest.mark.parametrize("dimensions", [2, 3])
def test_territories_are_apart_and_as_large_as_clades(dimensions):
    """Of every clade: no cell of another lies within the box of its cells, whose volume is near its share of all."""
    rng = np.random.default_rng(0)
    parent, age = birth_death(64, 0.0, rng)
    xyz = territories(parent, age == 0, dimensions)
    members = [{i} if age[i] == 0 else set() for i in range(len(parent))]
    for i, above in enumerate(parent):
        if above >= 0:
            members[above] |= members[i]
    leaves = np.flatnonzero(age == 0)
    assert ((xyz > 0) & (xyz < 1)).all()
    assert len(np.unique(xyz[leaves], axis=0)) == 64
    for clade in members:
        inside = np.array(sorted(clade))
        low, high = xyz[inside].min(0), xyz[inside].max(0)
        others = np.setdiff1d(leaves, inside)
        assert not ((xyz[others] >= low) & (xyz[others] <= high)).all(1).any()
        assert np.prod(high - low) < len(inside) / 64
    root = int(np.flatnonzero(parent < 0)[0])
    for child in np.flatnonzero(parent == root):
        weighted = xyz[sorted(members[child])].mean(0)
        assert np.abs(weighted - xyz[child]).max() < 0.25


def test_territories_confound_more_than_drift():
    """Kernel alignment at the same inheritance, on three trees: clades that drift lie across each other."""
    for seed in range(3):
        found = {}
        for layout in ("drift", "territories"):
            adata = simulate(150, inheritance=0.95, layout=layout, rng=seed)
            cf.pp.identifiability(adata, lengthscales=[0.6])
            found[layout] = adata.uns["cellfate_identifiability"]["alignment"].item()
        assert found["territories"] > found["drift"] + 0.1
    with pytest.raises(DataError, match="layout"):
        simulate(20, layout="grid", rng=0)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_few_cells_have_places_too(n, dimensions):
    adata = simulate(2 * n, n_specimens=2, dimensions=dimensions, layout="territories", inheritance=0.9, rng=n)
    assert np.isfinite(adata.obsm["spatial"]).all()
