"""A small batched GMRES, for the well-conditioned adjoint systems of the free energy's gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gmres(apply: Callable[[Tensor], Tensor], b: Tensor, *, rtol: float = 1e-7, iterations: int = 60) -> Tensor:
    """Solve `apply(x) = b` for rows b (points, n), each to relative residual `rtol`, without restarts (Saad & Schultz 1986).

    A row whose numbers overflow is NaN, and leaves the others alone.
    """
    finite = b.isfinite().all(-1)
    b = torch.where(finite[:, None], b, 0.0)
    scale = b.norm(dim=-1)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    basis = [b / safe[..., None]]
    hessenberg = b.new_zeros(b.shape[0], iterations + 1, iterations)
    unit = b.new_zeros(b.shape[0], iterations + 1, 1)
    unit[:, 0] = 1.0
    y = b.new_zeros(b.shape[0], 0, 1)
    for k in range(iterations):
        w = apply(basis[k])
        finite = finite & w.isfinite().all(-1)
        w = torch.where(finite[:, None], w, 0.0)
        for _ in range(2):  # orthogonalized twice: once is not enough in the last digits
            for j, q in enumerate(basis):
                h = (q * w).sum(-1)
                hessenberg[:, j, k] += h
                w = w - h[..., None] * q
        norm = w.norm(dim=-1)
        hessenberg[:, k + 1, k] = norm
        h = hessenberg[:, : k + 2, : k + 1]
        # on the CPU, whose driver knows a right-hand side of zero
        y = torch.linalg.lstsq(h.cpu(), unit[:, : k + 2].cpu(), driver="gelsd").solution.to(b.device)
        residual = (h @ y - unit[:, : k + 2]).norm(dim=(-2, -1))
        if bool((residual <= rtol).all()):
            break
        basis.append(w / torch.where(norm > 0, norm, torch.ones_like(norm))[..., None])
    x = (torch.stack(basis[: y.shape[1]], -1) @ y)[..., 0]
    return torch.where(finite[:, None], x * scale[..., None], torch.nan)
