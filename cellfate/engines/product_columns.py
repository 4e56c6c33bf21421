"""The interaction of ancestry and neighborhood in few columns.

What relatives share only where they are neighbors, :math:`k^{tree}_{ij} k^{space}_{ij}`, is neither a walk along the tree nor a
stationary field. What a last branch gives a cell is the cell's own in the product as in the tree, and is kept exact. The rest is
smooth over the tree *and* the tissue: it enters by the leading eigenvectors of a blend of such products over what the shapes may be,
found among landmark cells and carried to the others by the Nyström formula (Williams & Seeger 2001, eq. 8). They never change;
hyperparameters move a small matrix, and what the columns miss of a cell's variance is given back to the cell (Snelson & Ghahramani
2006).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cellfate.kernels.base import Basis, Hyperparameter, Kernel
from cellfate.kernels.lineage import LineageKernel, TreeSteps
from cellfate.kernels.product import Hadamard, Product
from cellfate.kernels.spatial import SpatialKernel, Stationary
from cellfate.places.drafts import RESOLVED, STEP, Blend
from cellfate.trees.plan import TreePlan
from cellfate.trees.sweeps import tree_times

LANDMARKS = 2000  # cells up to which the product is decomposed as it is
TOLERANCE = 0.005  # of the variance, that columns may leave out beside what last branches have
MOST = 512  # columns
BLENDED = 4  # values of a shape of the tree's that are blended
ENTRIES = 2**24  # of a covariance at a time


def has_columns(kernel: Product) -> bool:
    """Whether a product has columns: one of a tree and a field does."""
    field = kernel.other
    return isinstance(kernel.one, LineageKernel) and not (
        field.holds_variance or isinstance(field, LineageKernel | Product)
    )


@dataclass(frozen=True, eq=False)
class ProductColumns:
    """A product among n cells as `phi S phi' + diag(own)`; made by :func:`product_columns`."""

    kernel: Product
    phi: Tensor  # (n, m)
    landmarks: Tensor  # (u,), cells
    vectors: Tensor  # (u, m), orthonormal: phi of the landmarks

    @property
    def n(self) -> int:
        return len(self.phi)

    @property
    def rank(self) -> int:
        return self.phi.shape[1]

    def parts(self, structure: Hadamard) -> tuple[Tensor, Tensor]:
        """S (..., m, m), and what a cell has for itself (..., n)."""
        among = _among(structure, self.kernel, self.landmarks)
        private, whole = self.variances(structure)
        spectrum = self.vectors.mT @ ((among - torch.diag_embed(private[..., self.landmarks])) @ self.vectors)
        spectrum = (spectrum + spectrum.mT) / 2
        captured = ((self.phi @ spectrum) * self.phi).sum(-1)
        return spectrum, private + (whole - private - captured).clamp(min=0)

    def variances(self, structure: Hadamard) -> tuple[Tensor, Tensor]:
        """Variance (..., n) that the last branch has in the product, and the whole of it."""
        steps, field = _factors(structure)
        leaf = torch.as_tensor(self.kernel.one.leaf, device=self.phi.device)  # type: ignore[attr-defined]
        of_field = _diagonal(field, self.phi)
        return steps.noise[..., leaf] * of_field, steps.marginals()[1][..., leaf] * of_field

    @cached_property
    def _gram(self) -> Tensor:
        return self.phi.mT @ self.phi

    def moments(self, spectrum: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Tr K and 1' K 1, each (...,)."""
        sums, left = self.phi.sum(0), own.sum(-1)
        return (spectrum * self._gram).sum((-2, -1)) + left, (spectrum @ sums) @ sums + left

    def truncated_share(self, structure: Hadamard) -> float:
        """What the columns leave to the cells beside their last branches, as a part of the whole variance."""
        private, whole = self.variances(structure)
        return float((self.parts(structure)[1] - private).sum() / whole.sum())


def product_columns(
    kernel: Product, *, lower: float, upper: float, rank: int | None, landmarks: int = LANDMARKS, like: Tensor
) -> ProductColumns:
    """Columns for a product whose field has a length-scale within `lower` and `upper`.

    As many as `rank`, or the smallest multiple of 32, at most :data:`MOST`, that leaves out no more than :data:`TOLERANCE`.
    """
    n, given = kernel.n, like
    like = like.double()
    some = np.sort(np.random.default_rng(0).permutation(n)[:landmarks])
    cells = torch.as_tensor(some, device=like.device)
    steps, field = _blended(kernel, lower, upper, like)
    private = (steps.noise.mean(0)[torch.as_tensor(kernel.one.leaf, device=like.device)]) * _diagonal(field, like)  # type: ignore[attr-defined]
    tree = steps.dense(kernel.one.geometry(cells[None])).mean(0)[0]
    among = tree * _field_between(field, kernel.other, cells, cells, like)
    among.diagonal().sub_(private[cells])
    values, vectors = torch.linalg.eigh(among)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    whole = float(values.sum() + private[cells].sum())
    if rank is None:
        missed = float(values.sum()) - values.cumsum(0)
        rank = min(STEP * math.ceil((int((missed > TOLERANCE * whole).sum()) + 1) / STEP), MOST)
    rank = min(rank, int((values > RESOLVED * values[0]).sum()), len(cells))  # none, where every branch is a last one
    values, vectors = values[:rank], vectors[:, :rank].contiguous()
    phi = vectors if len(cells) == n else _carried(kernel, steps, field, cells, vectors / values, like)
    if len(cells) < n:
        phi[cells] = vectors
    return ProductColumns(kernel, phi.to(given), cells, vectors.to(given))


def identity(kernel: Product) -> tuple[tuple[Hashable, ...], tuple[np.ndarray, ...]] | None:
    """What tells one product of a tree and coordinates from another; None of other products, whose columns are not kept."""
    tree, field = kernel.one, kernel.other
    if not (isinstance(tree, LineageKernel) and isinstance(field, SpatialKernel)):
        return None
    shapes = tuple((h.name, h.lower, h.upper) for h in tree.hyperparameters)
    arrays = tree.forest.parent, tree.forest.branch_length, tree.leaf, field.coordinates, field.specimens
    return (Product, type(tree), type(field), shapes), arrays


def _factors(structure: Hadamard) -> tuple[TreeSteps, Basis | Stationary]:
    steps, field = structure.factors
    assert isinstance(steps, TreeSteps)
    assert isinstance(field, Basis | Stationary)
    return steps, field


def _among(structure: Hadamard, kernel: Product, cells: Tensor) -> Tensor:
    """Entries (..., u, u) among some cells, in the dtype of the hyperparameters."""
    return structure.dense(kernel.geometry(cells[None]))[..., 0, :, :].to(structure.factors[0].noise)  # type: ignore[attr-defined]


def _diagonal(field: Basis | Stationary | Blend, like: Tensor) -> Tensor:
    """Variance (..., n) that the field gives each cell; a stationary one's is 1."""
    if not isinstance(field, Basis):
        return like.new_ones(1)
    return (field.phi.square() * field.spectrum[..., None, :]).sum(-1) if field.diagonal else _quadratic(field)


def _quadratic(field: Basis) -> Tensor:
    return ((field.phi @ field.matrix()) * field.phi).sum(-1)


def _blended(kernel: Product, lower: float, upper: float, like: Tensor) -> tuple[TreeSteps, Basis | Blend]:
    """The tree's steps at several values (values, nodes) of its shape, and a field that blends those at several length-scales."""
    tree, field = kernel.one, kernel.other
    shapes = {h.name: _spread(h, like) for h in tree.hyperparameters}
    steps = tree.structure(shapes, like)
    assert isinstance(steps, TreeSteps)
    if steps.noise.ndim == 1:
        steps = TreeSteps(steps.parent, steps.gain, steps.noise[None])
    if isinstance(field, SpatialKernel):
        return steps, Blend(field.correlation, lower, upper)
    within = {h.name: _spread(h, like) for h in field.hyperparameters}
    columns = field.structure(within, like)
    assert isinstance(columns, Basis)
    if columns.spectrum.ndim > (1 if columns.diagonal else 2):
        columns = Basis(columns.phi, columns.spectrum.mean(0))
    return steps, columns


def _spread(h: Hyperparameter, like: Tensor) -> Tensor:
    """Values that cover what a hyperparameter may be."""
    if h.fixed is not None:
        return like.new_full((1,), h.fixed)
    part = (torch.arange(BLENDED, dtype=torch.float64) + 0.5) / BLENDED
    if h.scale == "log":
        return (h.lower * (h.upper / h.lower) ** part).to(like)
    return (h.lower + (h.upper - h.lower) * part).to(like)


def _field_between(field: Basis | Blend, kernel: Kernel, rows: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    """Covariance (r, c) that the blended field has between cells."""
    if isinstance(field, Basis):
        return field.phi[rows] @ field.times(field.phi[columns].mT)
    assert isinstance(kernel, SpatialKernel)
    xyz, codes = (torch.as_tensor(x, device=like.device) for x in (kernel.coordinates, kernel.specimens))
    a, b = (xyz[cells].to(torch.float64) for cells in (rows, columns))
    apart = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return (field(apart) * (codes[rows][:, None] == codes[columns])).to(like)


def _carried(
    kernel: Product, steps: TreeSteps, field: Basis | Blend, cells: Tensor, lift: Tensor, like: Tensor
) -> Tensor:
    """Columns (n, m) of all cells from their covariance with the landmarks, some landmarks at a time."""
    tree = kernel.one
    assert isinstance(tree, LineageKernel)
    plan, everyone = TreePlan(tree.forest.parent, tree.leaf, like.device), torch.arange(kernel.n, device=like.device)
    phi = like.new_zeros(kernel.n, lift.shape[1])
    for some in torch.arange(len(cells), device=like.device).split(max(1, ENTRIES // kernel.n)):
        unit = like.new_zeros(kernel.n, len(some))
        unit[cells[some], torch.arange(len(some), device=like.device)] = 1
        related = like.new_zeros(())
        for at in range(len(steps.noise)):
            gain = None if steps.gain is None else steps.gain[at]
            related = related + tree_times(plan, gain, steps.noise[at], unit) / len(steps.noise)
        phi += (related * _field_between(field, kernel.other, everyone, cells[some], like)) @ lift[some]
    return phi
