"""Anderson acceleration of a batch of fixed-point iterations (Walker & Ni 2011, type II)."""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY = 5  # past steps that are combined
RIDGE = 1e-10  # relative; keeps the least squares defined where past steps are alike or forgotten


class Anderson:
    """Remembers steps x and residuals g(x) - x, both (points, k), and proposes the next x of each point."""

    def __init__(self) -> None:
        self._x: list[Tensor] = []
        self._f: list[Tensor] = []
        self._last: tuple[Tensor, Tensor] | None = None

    def propose(self, x: Tensor, f: Tensor) -> Tensor:
        """The change of x that the past suggests; the plain one, `f`, where there is no past."""
        if self._last is not None:
            self._x = [*self._x, x - self._last[0]][-MEMORY:]
            self._f = [*self._f, f - self._last[1]][-MEMORY:]
        self._last = (x, f)
        if not self._f:
            return f
        df, dx = torch.stack(self._f, -1), torch.stack(self._x, -1)  # (points, k, h)
        gram = df.mT @ df
        ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.finfo(x.dtype).tiny
        eye = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
        gamma = torch.linalg.solve(gram + ridge[:, None, None] * eye, df.mT @ f[..., None])
        return f - ((dx + df) @ gamma)[..., 0]

    def forget(self, points: Tensor) -> None:
        """Drop the past of some points (points,) bool: a step of theirs was refused."""
        keep = (~points).to(self._last[0].dtype)[:, None] if self._last is not None else None
        if keep is not None:
            self._x = [x * keep for x in self._x]
            self._f = [f * keep for f in self._f]

    def select(self, index: Tensor) -> None:
        """Go on with some of the points."""
        self._x, self._f = [x[index] for x in self._x], [f[index] for f in self._f]
        if self._last is not None:
            self._last = (self._last[0][index], self._last[1][index])
