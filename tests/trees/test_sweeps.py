"""Sweeps against dense matrices: the covariance is built from gains and noises, then everything follows by inverses."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cellfate.trees.plan import TreePlan
from cellfate.trees.sweeps import TreeFactor, draw, paired_up_sums, path_sums, tree_times, up_sums
from tests.trees.test_plan import caterpillar, random_forest, star

TWINS = ["compiled", "batched", "chains"]
double = torch.float64


@dataclass
class Problem:
    parent: np.ndarray
    leaf: np.ndarray
    gain: Tensor | None
    noise: Tensor
    own: Tensor
    precision: Tensor

    @property
    def plan(self) -> TreePlan:
        return TreePlan(self.parent, self.leaf)

    def factor(self, twin: str = "compiled") -> TreeFactor:
        return TreeFactor(self.plan, self.gain, self.noise, self.own, self.precision, twin=twin)

    @property
    def gains(self) -> Tensor:  # (..., nodes, nodes), from a node (column) to one below it
        gain = torch.ones_like(self.noise) if self.gain is None else self.gain
        size = len(self.parent)
        out = torch.eye(size, dtype=gain.dtype).expand(*gain.shape[:-1], size, size).clone()
        for v in range(size - 1, -1, -1):
            p = self.parent[v]
            if p >= 0:
                out[..., v, :] += gain[..., v, None] * out[..., p, :]
        return out

    @property
    def field(self) -> Tensor:  # (..., nodes, nodes)
        g = self.gains
        return g @ torch.diag_embed(self.noise) @ g.mT

    @property
    def covariance(self) -> Tensor:  # (..., n, n)
        return self.field[..., self.leaf, :][..., :, self.leaf] + torch.diag_embed(self.own)

    @property
    def b(self) -> Tensor:
        w = self.precision.sqrt()
        return torch.eye(len(self.leaf), dtype=w.dtype) + w[..., :, None] * self.covariance * w[..., None, :]

    @property
    def residual(self) -> Tensor:  # R = (A + T^-1)^-1, also where a precision is zero
        w = self.precision.sqrt()
        return w[..., :, None] * torch.linalg.inv(self.b) * w[..., None, :]


def problem(seed: int, n: int = 24, *, trees: int = 1, batch: tuple[int, ...] = (), gains: bool = True) -> Problem:
    rng = np.random.default_rng(seed)
    parent, leaves = random_forest(rng, n, trees=trees)
    return on(parent, rng.permutation(leaves), seed, batch=batch, gains=gains)


def on(parent, leaf, seed: int = 0, *, batch: tuple[int, ...] = (), gains: bool = True) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=double)

    nodes, n = len(parent), len(leaf)
    gain = 0.3 + 0.8 * uniform(*batch, nodes) if gains else None
    return Problem(parent, leaf, gain, uniform(*batch, nodes), uniform(n), 0.1 + 3 * uniform(*batch, n))


def zero_subtree() -> Problem:
    p = problem(3)
    noise = p.noise.clone()
    inside = np.zeros(len(p.parent), dtype=bool)
    top = int(p.parent[p.parent[p.leaf[5]]])
    for v in range(len(p.parent) - 1, -1, -1):
        inside[v] = v == top or (p.parent[v] >= 0 and inside[p.parent[v]])
    inside[top] = False
    noise[torch.as_tensor(inside)] = 0.0
    return replace(p, noise=noise)


def some(x: Tensor, value: float) -> Tensor:
    return torch.where(torch.arange(x.shape[-1]) % 3 == 1, value, x)


PROBLEMS = {
    **{f"random {seed}": problem(seed) for seed in range(4)},
    "one tree, no gains": problem(4, gains=False),
    "caterpillar": on(*caterpillar(30)),
    "star": on(*star(37)),
    "forest": problem(5, trees=6),
    "single cells": on(np.full(7, -1), np.arange(7)[::-1].copy()),
    "one cell": on(np.array([1, 2, -1]), np.array([0])),
    "unobserved leaves": (lambda p: replace(p, leaf=p.leaf[:9], own=p.own[:9], precision=p.precision[:9]))(
        problem(6, trees=3)
    ),
    "unobserved star": on(star(30)[0], star(30)[1][3::4]),
    "no branch lengths": zero_subtree(),
    "some branches of length zero": (lambda p: replace(p, noise=some(p.noise, 0.0)))(problem(7)),
    "no noise anywhere": (lambda p: replace(p, noise=torch.zeros_like(p.noise)))(problem(8)),
    "some unseen": (lambda p: replace(p, precision=some(p.precision, 0.0)))(problem(9)),
    "all unseen": (lambda p: replace(p, precision=torch.zeros_like(p.precision)))(problem(10)),
    "own zero": (lambda p: replace(p, own=torch.zeros_like(p.own)))(problem(11)),
    "some barely seen": (lambda p: replace(p, precision=some(p.precision, 1e-14)))(problem(12)),
    "all barely seen": (lambda p: replace(p, precision=p.precision * 1e-14))(problem(13)),
    "batch": problem(14, batch=(3,)),
    "batch of two dimensions": problem(15, batch=(2, 3)),
}


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS.keys())
def p(request) -> Problem:
    return request.param


@pytest.fixture(params=TWINS)
def twin(request, monkeypatch) -> str:
    if request.param == "chains":  # the batched twin, made to scan where it would go level by level
        monkeypatch.setattr("cellfate.trees.plan.LEVELS", 0)
        return "batched"
    return request.param


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-10, atol: float = 1e-13) -> None:
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def columns(rows: int, k: int = 5, seed: int = 1, batch: tuple[int, ...] = ()) -> Tensor:
    return torch.randn(*batch, rows, k, generator=torch.Generator().manual_seed(seed), dtype=double)


def test_whitening(p, twin):
    f, x, b = p.factor(twin), columns(len(p.leaf)), p.b
    inverse = torch.linalg.inv(b)
    white = f.whiten(x)
    assert white.shape == (*b.shape[:-2], *x.shape)
    close(white.mT @ white, x.mT @ inverse @ x)
    close(f.whiten_t(white), inverse @ x)
    back = f.whiten_t(x)
    close((x * white).sum((-2, -1)), (back * x).sum((-2, -1)))


def test_log_det(p, twin):
    # relative to what is there: log|B| of cells that are barely seen is 1e-13, and so is that of the dense twin's trace
    log_det = p.factor(twin).log_det
    if float(p.precision.max()) < 1e-10:
        wanted = (p.precision * p.covariance.diagonal(dim1=-2, dim2=-1)).sum(-1)
        close(log_det, wanted, atol=0.0)
    else:
        close(log_det, torch.logdet(p.b))


def dense_marginals(p: Problem) -> dict[str, Tensor]:
    """By conditioning on one set of cells after the other."""
    parent, leaf, field, gains = p.parent, p.leaf, p.field, p.gains
    nodes, n = len(parent), len(leaf)
    below = (gains != 0)[..., leaf, :].reshape(-1, n, nodes)[0].T  # (nodes, n)
    tau = p.precision.expand(*p.noise.shape[:-1], n)

    def variance(at: Tensor, cross: Tensor, cells: Tensor) -> Tensor:
        """Var(x | cells) with prior variance `at` and covariance `cross` (..., n) with the u."""
        seen = tau * cells
        w = seen.sqrt()
        b = torch.eye(n, dtype=double) + w[..., :, None] * p.covariance * w[..., None, :]
        y = cross * w
        return at - (y * torch.linalg.solve(b, y[..., None])[..., 0]).sum(-1)

    out: dict[str, list[Tensor]] = {
        "cavity": [],
        "parent_cavity": [],
        "node_variance": [],
        "prior_cavity": [],
        "variance": [],
    }
    for v in range(nodes):
        outside = ~below[v]
        out["cavity"].append(variance(field[..., v, v], field[..., v, leaf], outside))
        up = int(parent[v])
        zero = torch.zeros_like(field[..., 0, 0])
        out["parent_cavity"].append(zero if up < 0 else variance(field[..., up, up], field[..., up, leaf], outside))
        out["node_variance"].append(variance(field[..., v, v], field[..., v, leaf], torch.ones(n)))
    a = p.covariance
    for i in range(n):
        out["prior_cavity"].append(variance(a[..., i, i], a[..., i, :], torch.arange(n) != i))
        out["variance"].append(variance(a[..., i, i], a[..., i, :], torch.ones(n)))
    stacked = {name: torch.stack(values, -1) for name, values in out.items()}
    g = gains[..., leaf, :]
    stacked["rho"] = (g * (p.residual @ g)).sum(-2)
    return stacked


def test_marginals(p, twin):
    found = p.factor(twin).marginals()
    for name, wanted in dense_marginals(p).items():
        # differences of the dense twin cancel where zero is left
        close(getattr(found, name), wanted.expand(getattr(found, name).shape), atol=1e-12)
    close(found.rho, found.up / (1 + found.up * found.cavity))


def test_gain_moves_the_covariance_as_the_marginals_say(p, twin):
    found, g, field = p.factor(twin).marginals(), p.gains[..., p.leaf, :], p.field
    edge = np.flatnonzero(p.parent >= 0)
    if edge.size == 0:
        assert (found.parent_cavity == 0).all()
        return
    k = field[..., p.parent[edge], :][..., p.leaf]
    wanted = (k * (p.residual @ g[..., edge]).mT).sum(-1)
    gain = torch.ones_like(p.noise) if p.gain is None else p.gain
    close((gain * found.parent_cavity * found.rho)[..., edge], wanted)


def test_slopes(p, twin):
    n = len(p.leaf)
    f = p.factor(twin)
    found, at = f.marginals_slope(omega := columns(n, 1)[:, 0]), f.marginals()
    # v: dv_i/dtau_j = -Sigma_ij^2
    root = p.precision.sqrt()
    a = p.covariance
    sigma = a - a * root[..., None, :] @ torch.linalg.solve(p.b, root[..., :, None] * a)
    close(found.variance, -(sigma.square() @ omega), atol=1e-12)
    # rho: dR = dtau / tau^2 between two R; R/tau by the factor, so that a precision may be zero
    g = p.gains[..., p.leaf, :]
    per_tau = g - a @ (p.residual @ g)  # T^-1 R g
    close(found.rho, (omega[:, None] * per_tau.square()).sum(-2), atol=1e-12)
    # all of them by central differences
    if float(p.precision.min()) > 1e-3:
        step = 1e-6
        ends = [replace(p, precision=p.precision + s * step * omega).factor(twin).marginals() for s in (1, -1)]
        for name in ("rho", "parent_cavity", "prior_cavity", "variance"):
            difference = (getattr(ends[0], name) - getattr(ends[1], name)) / (2 * step)
            close(getattr(found, name), difference, rtol=1e-6, atol=1e-8)
    assert found.parent_cavity.shape == at.parent_cavity.shape


def test_sums(p, twin):
    x, y, plan = columns(len(p.leaf)), columns(len(p.leaf), seed=2), p.plan
    g = p.gains
    at = g[..., p.leaf, :]
    sums = up_sums(plan, p.gain, x, twin=twin)
    close(sums, (at.mT @ x).expand_as(sums))
    paired = paired_up_sums(plan, p.gain, x, y, twin=twin)
    close(paired, ((at.mT @ x) * (at.mT @ y)).sum(-1).expand_as(paired))
    wanted = p.field[..., p.leaf] @ x
    close(path_sums(plan, p.gain, p.noise, x, twin=twin), wanted)
    close(tree_times(plan, p.gain, p.noise, x, twin=twin), wanted[..., p.leaf, :])
    z = columns(len(p.parent))
    wanted = g @ (p.noise.sqrt()[..., None] * z)
    close(draw(plan, p.gain, p.noise, z, nodes=True, twin=twin), wanted)
    close(draw(plan, p.gain, p.noise, z, twin=twin), wanted[..., p.leaf, :])


@pytest.mark.parametrize("seed", range(3))
def test_huge_precision(seed, twin):
    # A is then what counts: R is A^-1 to twelve digits, and v is 1/tau
    p = problem(seed)
    p = replace(p, precision=torch.full_like(p.precision, 1e12))
    f, x = p.factor(twin), columns(len(p.leaf))
    white = f.whiten(1e6 * x)
    close(white.mT @ white, x.mT @ torch.linalg.solve(p.covariance, x), rtol=1e-9)
    marginals = f.marginals()
    close(marginals.variance, torch.full_like(marginals.variance, 1e-12), rtol=1e-10, atol=0.0)
    close(marginals.prior_cavity, 1 / torch.linalg.inv(p.covariance).diagonal(), rtol=1e-9)
    close(f.log_det, torch.logdet(p.covariance) + len(p.leaf) * np.log(1e12), rtol=1e-12)
    # mixed with cells that are hardly seen, against elimination in extended precision
    p = replace(p, precision=some(some(p.precision, 1e-14).flip(0), 1.0))
    white = p.factor(twin).whiten(x)
    inverse = extended_inverse(p)
    close(white.mT @ white, x.mT @ inverse @ x, rtol=1e-9)


def extended_inverse(p: Problem) -> Tensor:
    """B^-1 by Gauss-Jordan elimination in long double."""
    w = np.sqrt(p.precision.numpy().astype(np.longdouble))
    b = np.eye(len(w), dtype=np.longdouble) + w[:, None] * p.covariance.numpy().astype(np.longdouble) * w
    out = np.eye(len(w), dtype=np.longdouble)
    for i in range(len(w)):
        out[i], b[i] = out[i] / b[i, i], b[i] / b[i, i]
        for j in range(len(w)):
            if j != i:
                out[j], b[j] = out[j] - b[j, i] * out[i], b[j] - b[j, i] * b[i]
    return torch.as_tensor(out.astype(np.float64))


def test_batches_broadcast(twin):
    p = problem(20, batch=(3,))
    plan, x = p.plan, columns(len(p.leaf), batch=(4, 3))
    f = p.factor(twin)
    together = f.whiten(x)
    assert together.shape == x.shape
    slope = f.marginals_slope(x[..., 0]).rho
    for s in range(3):
        one = TreeFactor(plan, p.gain[s], p.noise[s], p.own, p.precision[s], twin=twin)
        close(one.log_det, f.log_det[s])
        close(one.whiten(x[1, s]), together[1, s])
        close(one.whiten_t(x[1, s]), f.whiten_t(x)[1, s])
        close(one.marginals_slope(x[1, s, :, 0]).rho, slope[1, s])
    # noise differs, cells do not
    f = TreeFactor(plan, None, p.noise, p.own, p.precision[0], twin=twin)
    close(f.whiten(x[0, 0])[2], TreeFactor(plan, None, p.noise[2], p.own, p.precision[0], twin=twin).whiten(x[0, 0]))


def test_single_precision(twin):
    p = problem(21)
    single = Problem(p.parent, p.leaf, p.gain.float(), p.noise.float(), p.own.float(), p.precision.float())
    x = columns(len(p.leaf))
    f, exact = single.factor(twin), p.factor(twin)
    white = f.whiten(x.float())
    assert white.dtype == torch.float32
    close(white.double(), exact.whiten(x), rtol=1e-4, atol=1e-4)
    close(f.whiten_t(white).double(), exact.whiten_t(exact.whiten(x)), rtol=1e-4, atol=1e-4)
    close(f.marginals().variance.double(), exact.marginals().variance, rtol=1e-4, atol=1e-5)
    close(f.log_det.double(), exact.log_det, rtol=1e-5)
    close(
        tree_times(p.plan, single.gain, single.noise, x.float(), twin=twin).double(),
        tree_times(p.plan, p.gain, p.noise, x),
        1e-4,
        1e-4,
    )


def test_out(twin):
    p = problem(22, batch=(2,))
    f, x = p.factor(twin), columns(len(p.leaf), k=19, batch=(2,))
    white, back = f.whiten(x), f.whiten_t(x)
    for way, wanted in ((f.whiten, white), (f.whiten_t, back)):
        into = torch.empty_like(x)
        assert way(x, out=into) is into
        close(into, wanted, 0, 0)
        place = x.clone()
        way(place, out=place)
        close(place, wanted, 0, 0)
    with pytest.raises(ValueError, match="contiguous"):
        f.whiten(x, out=torch.empty(2, 19, len(p.leaf), dtype=double).mT)


def test_columns_are_taken_in_any_layout(twin):
    p = problem(23)
    f, x = p.factor(twin), columns(len(p.leaf), k=12)
    close(f.whiten(x.mT.contiguous().mT), f.whiten(x), 0, 0)
    close(f.whiten(x[:, ::2]), f.whiten(x)[:, ::2], 1e-14, 1e-14)


def test_results_do_not_depend_on_threads():
    rng = np.random.default_rng(0)
    parent, leaves = random_forest(rng, 3000)
    p = on(parent, rng.permutation(leaves), batch=(2,))
    x = columns(3000, k=100)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            f, plan = p.factor(), p.plan
            white = f.whiten(x)
            results.append(
                [
                    f.log_det,
                    white,
                    f.whiten_t(white),
                    f.marginals().rho,
                    f.marginals_slope(x[:, 0]).rho,
                    path_sums(plan, p.gain, p.noise, x),
                    tree_times(plan, p.gain, p.noise, x),
                    paired_up_sums(plan, p.gain, x, x),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("make", [lambda: caterpillar(50_000), lambda: star(100_000)], ids=["caterpillar", "star"])
def test_extreme_trees(make, twin):
    p = on(*make(), gains=False)
    x = columns(len(p.leaf), k=2)
    f = p.factor(twin)
    again = f.whiten_t(f.whiten(x))
    # B B^-1 x = x, B by the other sweeps
    w = p.precision.sqrt()[:, None]
    y = w * again
    close(again + w * (tree_times(p.plan, None, p.noise, y, twin=twin) + p.own[:, None] * y), x, rtol=1e-7, atol=1e-7)
    assert bool(torch.isfinite(f.marginals_slope(x[:, 0]).variance).all())


def test_a_factor_without_gradients_says_so():
    p = problem(0)
    with pytest.raises(ValueError, match="no gradients"):
        p.factor().whiten(columns(len(p.leaf)).requires_grad_())


def test_the_twins_agree_row_by_row(p, monkeypatch):
    x = columns(len(p.leaf))
    one = p.factor("compiled")
    for levels in (200, 0):
        monkeypatch.setattr("cellfate.trees.plan.LEVELS", levels)
        other = p.factor("batched")
        close(other.whiten(x), one.whiten(x))
        close(other.whiten_t(x), one.whiten_t(x))


@pytest.mark.parametrize("levels", [200, 0])
def test_the_batched_twin_has_gradients(levels, monkeypatch):
    monkeypatch.setattr("cellfate.trees.plan.LEVELS", levels)
    p = problem(24)
    noise, gain = p.noise.clone().requires_grad_(), p.gain.clone().requires_grad_()
    f = TreeFactor(p.plan, gain, noise, p.own, p.precision)
    known = p.factor().marginals()
    by_noise, by_gain = torch.autograd.grad(f.log_det, (noise, gain), retain_graph=True)
    close(by_noise, known.rho)  # d log|B| = tr R dA
    close(by_gain, 2 * p.gain * known.parent_cavity * known.rho)
    x = columns(len(p.leaf))
    (found,) = torch.autograd.grad(f.whiten(x).square().sum(), noise)
    b = replace(p, noise=noise, gain=p.gain).b
    (wanted,) = torch.autograd.grad((x * torch.linalg.solve(b, x)).sum(), noise)
    close(found, wanted)


def test_deep_trees_take_few_steps():
    plan = TreePlan(*caterpillar(50_000))
    assert len(plan.rounds) <= 2
    assert plan.steps <= 20  # log2 of 100,000 segments
    assert TreePlan(*star(100_000)).steps <= 20
    rng = np.random.default_rng(0)
    chain, leaf = np.append(np.arange(1, 50_000), -1), np.zeros(1, dtype=np.int64)
    assert TreePlan(chain, leaf).steps <= 18
    parent, leaves = random_forest(rng, 2000)
    assert TreePlan(parent, leaves).steps <= 200


def test_tensors_and_plan_are_in_one_place():
    p = problem(0)
    with pytest.raises(ValueError, match="Build the plan where they are"):
        up_sums(p.plan, None, columns(len(p.leaf)).to("meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same(p):
    def there(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.cuda()

    plan, x = TreePlan(p.parent, p.leaf, "cuda"), columns(len(p.leaf))
    f = TreeFactor(plan, there(p.gain), p.noise.cuda(), p.own.cuda(), p.precision.cuda())
    one = p.factor()
    close(f.log_det.cpu(), one.log_det)
    close(f.whiten(x.cuda()).cpu(), one.whiten(x))
    close(f.whiten_t(x.cuda()).cpu(), one.whiten_t(x))
    close(f.marginals().rho.cpu(), one.marginals().rho)
    close(f.marginals_slope(x[:, 0].cuda()).variance.cpu(), one.marginals_slope(x[:, 0]).variance, atol=1e-12)
    wanted = tree_times(p.plan, p.gain, p.noise, x)
    close(tree_times(plan, there(p.gain), p.noise.cuda(), x.cuda()).cpu(), wanted)
