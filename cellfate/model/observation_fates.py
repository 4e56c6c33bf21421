r"""The partition on the scale of the fate, where a fate is one of several without an order.

The variance of such a fate is that of its indicators, :math:`\sum_k \mathrm{Var}\,1[y = k] = 1 - \sum_k p_k^2`, Gini's index, and its parts are
sums over the fates (Light & Margolin 1971; first-order indices of several outputs: Gamboa, Janon, Klein & Lagnoux 2014). It is what the
Brier score measures, so a share is by how much of its reference knowing that component would lower it. The additive scale is the same
by a plane through the softmax, :math:`\mathrm{tr}\,\Psi G \Psi'` (de Villemereuil et al. 2016, several traits).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.stats import norm, qmc
from torch import Tensor

from cellfate.model.categorical import contrasts
from cellfate.model.glmm import FIXED

POINTS = 2**12  # of a quasi-random rule: parts are off by up to 0.3% of the variance
ENTRIES = 2**21  # numbers at once


@lru_cache
def _points(axes: int) -> np.ndarray:
    """Sobol points (points, 4 axes + 2): four standard normal vectors, and two numbers in 0 to 1."""
    u = qmc.Sobol(4 * axes + 2, seed=0).random(POINTS)
    return np.column_stack([norm.ppf(u[:, :-2].clip(1e-12, 1 - 1e-12)), u[:, -2:]])


@dataclass(frozen=True)
class ObservedFates:
    """Mean (s, K) of the indicators of the fates; summed over them, each (s,), their variance between conditional means and that given these
    (`noise`), and parts of the first by component, `first`-order and `additive`.
    """

    mean: Tensor
    between: Tensor
    noise: Tensor
    first: dict[str, Tensor]
    additive: dict[str, Tensor]


def observed_fates(
    levels: int,
    fixed: Tensor,
    weight: Tensor,
    variances: Mapping[str, Tensor],
    fate_of: Mapping[str, int] | None = None,
    trials: float = 1.0,
) -> ObservedFates:
    """Moments of a fate for draws (s,) of the component `variances`.

    fixed: contrasts (s, p, J) of the fixed part, with `weight` (p,). variances: of every contrast alike, or of the one fate that
    `fate_of` has of the component. Fates that are counts are shares of `trials`.
    """
    h = torch.as_tensor(contrasts(levels)).to(fixed)
    axes, like = levels - 1, fixed[:, 0]
    roots = {}
    for name, v in variances.items():
        if name != FIXED:
            loading = (
                torch.eye(axes).to(h) if name not in (fate_of or {}) else levels**0.5 * h[[(fate_of or {})[name]]].T
            )
            roots[name] = v.clamp(min=0).sqrt()[:, None, None] * loading
    covariances = {name: root @ root.mT for name, root in roots.items()}
    whole = sum(covariances.values(), start=like.new_zeros(len(like), axes, axes))
    z = torch.as_tensor(_points(axes)).to(h)
    own, own_too, rest, rest_too = z[:, :-2].split(axes, -1)
    which = torch.searchsorted(weight.cumsum(0) / weight.sum(), z[:, -2:].contiguous()).clamp(max=len(weight) - 1)

    def p(eta: Tensor) -> Tensor:
        return torch.softmax(eta @ h.mT, -1)

    first: dict[str, Tensor] = {}
    mean, second = like.new_zeros(len(like), levels), like.new_zeros(len(like), levels, levels)
    step = max(1, ENTRIES // (POINTS * levels))
    names = [*roots, *([FIXED] if FIXED in variances or not roots else [])]
    for name in names:
        found = []
        others = _root(whole - covariances[name]) if name in roots else _root(whole)
        for rows in torch.arange(len(like)).split(step):
            at, at_too = fixed[rows][:, which[:, 0]], fixed[rows][:, which[:, 1]]
            if name in roots:
                root = roots[name][rows].mT
                along, along_too, back = own[:, : root.shape[1]] @ root, own_too[:, : root.shape[1]] @ root, at_too
            else:
                along, along_too, back = torch.zeros_like(at), torch.zeros_like(at), at
            left, right = rest @ others[rows].mT, rest_too @ others[rows].mT
            one, same, another = p(at + along + left), p(back + along + right), p(at_too + along_too + right)
            centre = (one + another).mean(1, keepdim=True) / 2
            # what the two share is the component; of the difference nothing is left where that has no variance (Saltelli et al. 2010)
            found.append(((one - centre) * (same - another)).sum(-1).mean(-1))
            mean[rows] += centre[:, 0] / len(names)
            second[rows] += (one.mT @ one + another.mT @ another) / (2 * POINTS * len(names))
        first[name] = torch.cat(found)
    slope = (torch.diag_embed(mean) - second) @ h  # E of the derivatives of the softmax, (s, K, J)
    if FIXED in variances:
        away = fixed - (weight @ fixed / weight.sum())[:, None]
        covariances[FIXED] = away.mT @ (weight[:, None] / weight.sum() * away)
    additive = {name: ((slope @ covariances[name]) * slope).sum((-2, -1)) for name in variances}
    squares = second.diagonal(dim1=-2, dim2=-1).sum(-1)
    between, noise = squares - mean.square().sum(-1), (1 - squares) / trials
    return ObservedFates(mean, between, noise, {name: first[name] for name in variances}, additive)


def _root(covariance: Tensor) -> Tensor:
    """A factor of covariances that may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]
