"""What the data say where there is no cell: at every node of the tree, and at new positions in the tissue.

With C the prior covariance of what is asked for and the cells, and k its prior variance: mean `C b` and variance `k - diag(C R C')`.
The dense engine takes C entry by entry. Along a tree the structured engine has both from its sweeps, and a field is its columns,
carried to the new positions, with what they miss there as variance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cellfate.errors import DataError
from cellfate.kernels.base import Kernel, Term
from cellfate.kernels.lineage import LineageKernel, TreeSteps
from cellfate.kernels.spatial import Stationary
from cellfate.places.basis import variance_left

if TYPE_CHECKING:
    from cellfate.engines.dense import DensePosterior
    from cellfate.engines.structured_posterior import StructuredPosterior

ENTRIES = 2**23  # of a matrix at a time

Moments = tuple[Tensor, Tensor]  # mean and variance


def steps_of(term: Term) -> TreeSteps:
    """The steps along the tree of a component, which has to have one."""
    if not isinstance(term.structure, TreeSteps):
        raise DataError(f"component {term.name!r} is no ancestry: only a kernel on a tree has values at its nodes.")
    return term.structure


def field_of(term: Term) -> Stationary:
    """The field of a component, which has to have coordinates."""
    if not isinstance(term.structure, Stationary):
        raise DataError(
            f"component {term.name!r} has no value at new positions: only a kernel on coordinates has, not one on a graph, on "
            "features or on groups."
        )
    return term.structure


def dense_ancestors(posterior: DensePosterior, term: Term, kernel: Kernel) -> Moments:
    """A lineage component at every node (..., nodes)."""
    steps = steps_of(term)
    assert isinstance(kernel, LineageKernel)
    forest, leaf = kernel.forest, kernel.leaf
    log_gain, variance = steps.marginals()
    scale = _dense_scale(posterior, term, variance[..., torch.as_tensor(leaf, device=variance.device)].sum(-1))
    prior = (scale[..., None] * variance).expand(*posterior.mean.shape[:-1], -1)
    cells_of = np.split(np.argsort(forest.tree[leaf], kind="stable"), _ends(forest.tree[leaf], forest.n_trees))

    def cross(rows: slice) -> Tensor:
        nodes = np.arange(rows.start, min(rows.stop, forest.n_nodes))
        out = posterior.mean.new_zeros(*posterior.mean.shape, len(nodes))
        for tree in np.unique(forest.tree[nodes]):
            cells, own = cells_of[tree], np.flatnonzero(forest.tree[nodes] == tree)
            if not len(cells):  # all of its leaves are unobserved
                continue
            ancestor = torch.as_tensor(forest.ancestors(nodes[own], leaf[cells]).T, device=out.device)  # (cells, nodes)
            k = variance[..., ancestor]
            if steps.gain is not None:
                at_cell, at_node = log_gain[..., leaf[cells], None], log_gain[..., None, nodes[own]]
                k = k * torch.exp(at_cell + at_node - 2 * log_gain[..., ancestor])
            out[..., cells[:, None], own] = scale[..., None, None] * k
        return out

    return _conditioned(posterior, prior, cross)


def dense_elsewhere(
    posterior: DensePosterior, term: Term, coordinates: np.ndarray, specimen: np.ndarray | None
) -> Moments:
    """A spatial field at positions (k, d): (..., k)."""
    field = field_of(term)
    kernel, like = field.kernel, posterior.mean
    scale = _dense_scale(posterior, term, like.new_full((), float(kernel.n)))
    codes = _codes(coordinates, specimen)
    old, new = (torch.as_tensor(np.asarray(x, dtype=np.float64)).to(like) for x in (kernel.coordinates, coordinates))
    together = torch.as_tensor(kernel.specimens[:, None] == codes, device=like.device)

    def cross(rows: slice) -> Tensor:
        # from differences, as among the cells: the inner-product form loses half the digits for close ones
        distance = torch.cdist(old, new[rows], compute_mode="donot_use_mm_for_euclid_dist")
        k = kernel.correlation(distance / field.lengthscale[..., None, None])
        return scale[..., None, None] * torch.where(together[:, rows], k, 0.0)

    return _conditioned(posterior, scale[..., None].expand(*like.shape[:-1], len(codes)), cross)


def structured_ancestors(posterior: StructuredPosterior, term: Term) -> Moments:
    """A lineage component at every node (..., nodes): what the tree alone leaves open, and what the columns add."""
    steps_of(term)
    walk, marginals = posterior._part(term).walk, posterior._marginals
    assert walk is not None
    assert marginals is not None
    variance = marginals.node_variance
    for _, e in posterior._e():
        variance = variance + walk.field(posterior.sites.precision[..., None] * e).square().sum(-1)
    return walk.field(posterior.weights[..., None])[..., 0], variance


def structured_elsewhere(
    posterior: StructuredPosterior, term: Term, coordinates: np.ndarray, specimen: np.ndarray | None
) -> Moments:
    """A spatial field at positions (k, d): (..., k). What the columns miss of a cell is not carried to its surroundings."""
    lengthscale, field = field_of(term).lengthscale, posterior.engine.field(term.name)
    spectrum, scaled = field.spectrum(lengthscale), posterior._part(term).spectrum
    assert scaled is not None
    scale = _trace(scaled) / _trace(spectrum)
    coefficients, covariance = posterior.coefficients(term)
    codes = _codes(coordinates, specimen)
    means, variances = [], []
    for rows in _slices(len(codes), field.rank):
        phi = field.at(np.asarray(coordinates)[rows], codes[rows])
        means.append((phi @ coefficients[..., None])[..., 0])
        seen = ((phi @ covariance) * phi).sum(-1)
        variances.append(seen + scale[..., None] * variance_left(phi, spectrum))
    return torch.cat(means, -1), torch.cat(variances, -1)


def _conditioned(posterior: DensePosterior, prior: Tensor, cross) -> Moments:  # type: ignore[no-untyped-def]
    """Moments (..., k) from prior variances (..., k) and covariances with the cells, `cross(rows)` (..., n, rows)."""
    mean, variance = torch.zeros_like(prior), prior.clone()
    for rows in _slices(prior.shape[-1], posterior.mean.numel()):
        mean[..., rows], taken = _linked(posterior, cross(rows))
        variance[..., rows] -= taken
    return mean, variance.clamp(min=0)


def _linked(posterior: DensePosterior, cross: Tensor) -> Moments:
    """C b and diag(C R C') for covariances with the cells (..., n, k): R = R_A - V V', V = T E."""
    tau = posterior.sites.precision[..., None]
    taken = posterior._part_whiten(tau.sqrt() * cross).square().sum(-2)
    for _, e in posterior._e():
        taken = taken - (cross.mT @ (tau * e)).square().sum(-1)
    return (cross * posterior.weights[..., None]).sum(-2), taken


def _dense_scale(posterior: DensePosterior, term: Term, trace: Tensor) -> Tensor:
    """What entries (...,) of a kernel are multiplied by: the variance over c(K), from the trace before and after."""
    unit = sum(k.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) for k in posterior._unit(term))
    return term.variance * torch.as_tensor(unit) / trace


def _codes(coordinates: np.ndarray, specimen: np.ndarray | None) -> np.ndarray:
    return np.zeros(len(coordinates), dtype=np.int64) if specimen is None else np.asarray(specimen)


def _ends(labels: np.ndarray, count: int) -> np.ndarray:
    return np.cumsum(np.bincount(labels, minlength=count))[:-1]


def _slices(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, ENTRIES // max(columns, 1))
    for first in range(0, rows, step):
        yield slice(first, first + step)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
