"""GMRES against a direct solver."""

import numpy as np
import pytest
import torch

from cellfate.inference.krylov import gmres
from tests.problem import double


def systems(points: int, n: int, seed: int = 0, spread: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices (points, n, n) that are the identity and something that is not symmetric, and right-hand sides."""
    rng = np.random.default_rng(seed)
    matrices = np.eye(n) + spread * rng.normal(size=(points, n, n)) / np.sqrt(n)
    return double(matrices), double(rng.normal(size=(points, n)) * 10.0 ** rng.integers(-6, 7, size=(points, 1)))


class Product:
    """A matrix that counts how often it is used."""

    def __init__(self, matrices: torch.Tensor) -> None:
        self.matrices, self.calls = matrices, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (self.matrices @ x[..., None])[..., 0]


@pytest.mark.parametrize("n", [1, 5, 60])
def test_solution(n):
    a, b = systems(4, n)
    x = gmres(Product(a), b, rtol=1e-12)
    expected = torch.linalg.solve(a, b)
    assert ((x - expected).norm(dim=-1) <= 1e-10 * expected.norm(dim=-1)).all()


def test_every_row_reaches_the_tolerance():
    """Relative to its own size, and not on average."""
    a, b = systems(6, 60)
    for rtol in (1e-3, 1e-6):
        residual = Product(a)(gmres(Product(a), b, rtol=rtol)) - b
        assert (residual.norm(dim=-1) <= 1.0001 * rtol * b.norm(dim=-1)).all()
        assert (residual.norm(dim=-1) > 1e-3 * rtol * b.norm(dim=-1)).any()  # and no further than asked


def test_rows_do_not_touch_each_other():
    a, b = systems(3, 40)
    together = gmres(Product(a), b, rtol=1e-12)
    for i in range(3):
        alone = gmres(Product(a[i : i + 1]), b[i : i + 1], rtol=1e-12)[0]
        assert (alone - together[i]).norm() <= 1e-10 * alone.norm()


def test_nothing_in_nothing_out():
    a, b = systems(3, 10)
    b[1] = 0
    x = gmres(Product(a), b)
    assert (x[1] == 0).all()
    assert x.isfinite().all()
    torch.testing.assert_close(Product(a)(x), b, rtol=1e-6, atol=1e-8 * float(b.abs().max()))


def test_the_space_may_be_exhausted_early():
    """The identity at once; the identity and rank one in two steps; a direction that repeats itself is no direction."""
    n = 30
    rng = np.random.default_rng(0)
    b = double(rng.normal(size=(2, n)))
    identity = Product(torch.eye(n, dtype=torch.float64).expand(2, n, n))
    torch.testing.assert_close(gmres(identity, b), b, rtol=1e-12, atol=1e-12)
    assert identity.calls == 1
    u, v = (double(rng.normal(size=(2, n, 1))) for _ in range(2))
    a = torch.eye(n, dtype=torch.float64) + u @ v.mT / n
    low_rank = Product(a)
    torch.testing.assert_close(gmres(low_rank, b), torch.linalg.solve(a, b), rtol=1e-8, atol=1e-9)
    assert low_rank.calls == 2


def test_iterations_are_bounded_and_the_best_so_far_is_returned():
    a, b = systems(2, 80, spread=0.9)
    few = Product(a)
    x = gmres(few, b, rtol=1e-14, iterations=4)
    assert few.calls == 4
    residual = (Product(a)(x) - b).norm(dim=-1)
    assert (residual < b.norm(dim=-1)).all()
    # no combination of the same Krylov space does better
    basis = [b]
    for _ in range(3):
        basis.append(Product(a)(basis[-1]))
    space = torch.stack(basis, -1)
    best = torch.linalg.lstsq(a @ space, b[..., None]).solution
    torch.testing.assert_close(residual, (a @ space @ best - b[..., None]).norm(dim=(-2, -1)), rtol=1e-6, atol=0)


def test_a_row_that_overflows_leaves_the_others_alone():
    rng = np.random.default_rng(3)
    a = torch.as_tensor(np.eye(6) + 0.2 * rng.normal(size=(3, 6, 6)))
    b = torch.as_tensor(rng.normal(size=(3, 6)))
    whole = gmres(lambda x: (a @ x[..., None])[..., 0], b)
    b[0, 2] = torch.inf
    a[1, 0, 0] = torch.nan
    found = gmres(lambda x: (a @ x[..., None])[..., 0], b)
    assert bool(found[:2].isnan().all())
    torch.testing.assert_close(found[2], whole[2], rtol=1e-10, atol=1e-12)
