"""Columns over cells, of which independent sets of cells have only their own.

Specimens with a field each share no column but those of fixed effects and the like, and no two of them ever meet: a matrix of all
columns (n, M) would be zeros for the most part. It is stored side by side, `x` (n, width): a row holds the columns of the cell's own set
first, then those of all cells, and whatever treats columns alike, and sets apart, may work on `x` as it is. Matrices over columns
(M, M) stay whole. Their factors keep the zeros, as long as the columns of sets come first and what is factored is so too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Index = Tensor | slice
ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Set:
    """Cells `rows`, whose columns are `columns` of M and stand at `places` of the width."""

    rows: Index
    places: Index
    columns: Index


@dataclass(frozen=True, eq=False)
class Layout:
    """Which columns a row of `x` (..., n, width) stands for."""

    total: int  # M
    width: int
    sets: tuple[Set, ...]

    @classmethod
    def whole(cls, total: int) -> Layout:
        """All columns of all cells."""
        return cls(total, total, (Set(ALL, ALL, ALL),))

    @property
    def is_whole(self) -> bool:
        return self.sets[0].rows is ALL

    def _of(self, x: Tensor, own: Set) -> Tensor:
        """The rows of a set with its columns (..., n_s, m_s)."""
        return x if own.rows is ALL else x[..., own.rows, :][..., own.places]

    def times(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """X c for c (..., M, k): (..., n, k)."""
        if self.is_whole:
            return x @ coefficients
        batch = torch.broadcast_shapes(x.shape[:-2], coefficients.shape[:-2])
        out = x.new_zeros(*batch, x.shape[-2], coefficients.shape[-1])
        for own in self.sets:
            out[..., own.rows, :] = self._of(x, own) @ coefficients[..., own.columns, :]
        return out

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """X' y for a few y (..., n, k), from the narrow side, which is several times faster: (..., M, k)."""
        if self.is_whole:
            return (y.mT @ x).mT
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        out = x.new_zeros(*batch, self.total, y.shape[-1])
        for own in self.sets:
            out[..., own.columns, :] += (y[..., own.rows, :].mT @ self._of(x, own)).mT
        return out

    def gram(self, x: Tensor, weight: Tensor | None = None, rows: int | None = None) -> Tensor:
        """X' diag(weight) X (..., M, M), with a weighted copy of so many `rows` at a time."""
        if self.is_whole and weight is None:
            return x.mT @ x
        batch = x.shape[:-2] if weight is None else torch.broadcast_shapes(x.shape[:-2], weight.shape[:-1])
        out = x.new_zeros(*batch, self.total, self.total)
        for own in self.sets:
            part = self._of(x, own)
            w = None if weight is None else weight[..., own.rows, None]
            found = out if own.rows is ALL else out[..., own.columns[:, None], own.columns]  # type: ignore[index]
            step = part.shape[-2] if rows is None or w is None else rows
            for first in range(0, part.shape[-2], step):
                some = part[..., first : first + step, :]
                found = found + some.mT @ (some if w is None else w[..., first : first + step, :] * some)
            if own.rows is ALL:
                return found
            out[..., own.columns[:, None], own.columns] = found  # type: ignore[index]
        return out

    def turned(self, x: Tensor, q: Tensor, places: slice) -> Tensor:
        """X Q (..., n, k) for Q (..., M, M), those of its columns that stand at `places`: what other sets would have is left out."""
        if self.is_whole:
            return x @ q[..., places]
        batch = torch.broadcast_shapes(x.shape[:-2], q.shape[:-2])
        out = x.new_zeros(*batch, x.shape[-2], len(range(*places.indices(self.width))))
        for own in self.sets:
            assert isinstance(own.places, Tensor)
            assert isinstance(own.columns, Tensor)
            here = (own.places >= places.start) & (own.places < places.stop)
            if bool(here.any()):
                to, of = own.places[here] - places.start, own.columns[here]
                found = self._of(x, own) @ q[..., own.columns[:, None], of]
                whole = found.new_zeros(*found.shape[:-1], out.shape[-1])
                whole[..., to] = found
                out[..., own.rows, :] = whole
        return out

    def blocks(self, size: int) -> list[slice]:
        """Places, so many at a time."""
        return [slice(first, min(first + size, self.width)) for first in range(0, self.width, size)]

    def bilinear(self, x: Tensor, q: Tensor, other: Layout, y: Tensor, rows: int) -> Tensor:
        """diag(X Q Y') (..., n) for Q (..., M, M'), a few `rows` at a time; `other` has the same sets."""
        batch = torch.broadcast_shapes(x.shape[:-2], q.shape[:-2], y.shape[:-2])
        out = x.new_empty(*batch, x.shape[-2])
        for own, its in zip(self.sets, other.sets, strict=True):
            left, right = self._of(x, own), other._of(y, its)
            middle = q if own.rows is ALL else q[..., own.columns[:, None], its.columns]  # type: ignore[index]
            found = out if own.rows is ALL else out.new_empty(*batch, left.shape[-2])
            for first in range(0, left.shape[-2], rows):
                some = slice(first, first + rows)
                found[..., some] = ((left[..., some, :] @ middle) * right[..., some, :]).sum(-1)
            if own.rows is not ALL:
                out[..., own.rows] = found
        return out

    def squares(self, x: Tensor, q: Tensor, rows: int) -> Tensor:
        """Diagonal (..., n) of X Q Q' X', a few `rows` at a time."""
        batch = torch.broadcast_shapes(x.shape[:-2], q.shape[:-2])
        out = x.new_empty(*batch, x.shape[-2])
        for own in self.sets:
            part = self._of(x, own)
            right = q if own.rows is ALL else q[..., own.columns[:, None], own.columns]  # type: ignore[index]
            found = out if own.rows is ALL else out.new_empty(*batch, part.shape[-2])
            for first in range(0, part.shape[-2], rows):
                some = slice(first, first + rows)
                found[..., some] = (part[..., some, :] @ right).square_().sum(-1)
            if own.rows is not ALL:
                out[..., own.rows] = found
        return out

    def dense(self, x: Tensor) -> Tensor:
        """All columns (n, M), with their zeros."""
        if self.is_whole:
            return x
        out = x.new_zeros(x.shape[-2], self.total)
        for own in self.sets:
            out[own.rows[:, None], own.columns] = self._of(x, own)  # type: ignore[index]
        return out


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns `x` (n, width) of all components with their layout, and of each component where they stand."""

    x: Tensor
    layout: Layout
    slots: dict[str, slice]  # of M
    places: dict[str, slice]  # of the width
    layouts: dict[str, Layout]  # of a component's own columns alone

    def of(self, name: str) -> tuple[Layout, Tensor]:
        """Those of one component."""
        return self.layouts[name], self.x[:, self.places[name]]


@dataclass(frozen=True, eq=False)
class Apart:
    """Columns of a component by sets of cells: `cells` of a block, which has `phi` (n_s, m_s), one after the other in M."""

    cells: tuple[Tensor, ...]
    phi: tuple[Tensor, ...]


def side_by_side(parts: dict[str, Apart], common: dict[str, Tensor], label: np.ndarray, like: Tensor) -> Columns:
    """Columns of components that are apart by the sets `label` (n,), then of those that all cells have.

    Every block of a component that is apart lies in one set.
    """
    n, count = len(label), int(label.max()) + 1
    rows = [torch.as_tensor(np.flatnonzero(label == s), device=like.device) for s in range(count)]
    slots: dict[str, slice] = {}
    places: dict[str, slice] = {}
    total = width = 0
    own: list[dict[str, Tensor]] = [{} for _ in range(count)]  # columns of each set by component, within the component
    for name, part in parts.items():
        ends = np.cumsum([0] + [phi.shape[1] for phi in part.phi])
        for cells, first, last in zip(part.cells, ends[:-1], ends[1:], strict=True):
            s = int(label[int(cells[0])])
            found = torch.arange(first, last, device=like.device)
            own[s][name] = torch.cat([own[s][name], found]) if name in own[s] else found
        widest = max((len(of[name]) for of in own if name in of), default=0)
        slots[name], places[name] = slice(total, total + int(ends[-1])), slice(width, width + widest)
        total, width = total + int(ends[-1]), width + widest
    for name, phi in common.items():
        slots[name], places[name] = (
            slice(total, total + phi.shape[1]),
            slice(width, width + phi.shape[1]),
        )
        total, width = total + phi.shape[1], width + phi.shape[1]
    x = like.new_zeros(n, width)
    for name, part in parts.items():
        taken = np.zeros(count, dtype=np.int64)
        for cells, phi in zip(part.cells, part.phi, strict=True):
            s = int(label[int(cells[0])])
            first = places[name].start + int(taken[s])
            x[cells, first : first + phi.shape[1]] = phi
            taken[s] += phi.shape[1]
    for name, phi in common.items():
        x[:, places[name]] = phi

    def of_set(s: int, names: Sequence[str], base: bool) -> Set:
        columns, where = [], []
        for name in names:
            found = own[s].get(name, torch.arange(0, device=like.device)) if name in parts else None
            length = slots[name].stop - slots[name].start if found is None else len(found)
            found = torch.arange(length, device=like.device) if found is None else found
            columns.append(found + (slots[name].start if base else 0))
            where.append(torch.arange(length, device=like.device) + (places[name].start if base else 0))
        return Set(rows[s], torch.cat(where), torch.cat(columns))

    names = [*parts, *common]
    layout = Layout(total, width, tuple(of_set(s, names, True) for s in range(count)))
    layouts = {}
    for name in names:
        m, w = slots[name].stop - slots[name].start, places[name].stop - places[name].start
        layouts[name] = Layout(m, w, tuple(of_set(s, [name], False) for s in range(count)))
    return Columns(x, layout, slots, places, layouts)


def together(parts: dict[str, Tensor], n: int, like: Tensor) -> Columns:
    """Columns (n, m) of all components, each of all cells."""
    slots, width = {}, 0
    for name, phi in parts.items():
        slots[name] = slice(width, width := width + phi.shape[1])
    found = list(parts.values())
    # a single component's columns are taken as they are: a copy may be gigabytes
    x = found[0] if len(found) == 1 else torch.cat([like.new_zeros(n, 0), *found], -1)
    layouts = {name: Layout.whole(phi.shape[1]) for name, phi in parts.items()}
    return Columns(x, Layout.whole(width), slots, slots, layouts)
