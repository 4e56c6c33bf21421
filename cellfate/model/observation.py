r"""The partition on the scale of the fate itself: what part of Var(y) each component makes.

A nonlinear link mixes what is a sum on its own scale. Two answers, and their names say which is which. *Observation*: first-order
shares, the variance of :math:`E[y \mid \text{component}]` with all else integrated out; what components make together only is a row
of its own, `interaction` (Sobol's decomposition). *Additive*: each component as far as a line through the link function follows
it, :math:`(E\,dg^{-1}/d\eta)^2 v_k`, which for ancestry is the additive variance of quantitative genetics (de Villemereuil, Schielzeth,
Nakagawa & Morrissey 2016); the bend of the link is the row `nonlinear`. The rest of Var(y) is `distribution`.

An ordinal fate has no scale, but cut points: its variance is the sum of those of being above each, :math:`\sum_j F_j (1 - F_j)`, what the
ranked probability score measures (Epstein 1969), and half of how many levels two cells are apart on average. It is the same whatever
numbers the levels are given, and of two levels that of a yes or no. Each cut point is a binary fate of its own, and parts are sums over
them. Fates without an order are in :mod:`cellfate.model.observation_fates`.

Every cell counts with the variances that are expected among the cells, and the fixed part with its distribution over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cellfate.kernels.fates import Loaded
from cellfate.model.catalog import get_family
from cellfate.model.categorical import Categorical
from cellfate.model.families import Family, quadrature
from cellfate.model.glmm import FIXED, Model, Theta
from cellfate.model.observation_fates import observed_fates
from cellfate.model.ordinal import Ordinal

OBSERVATION, ADDITIVE = "observation", "additive"
INTERACTION, NONLINEAR, DISTRIBUTION = "interaction", "nonlinear", "distribution"
DRAWS = 200
POINTS = 24  # that stand for the fixed part over the cells, where more are different
CELLS = 2000  # that these are taken from
NARROW, NODES, MANY = 9.0, 40, 120  # total variance up to which few nodes are enough
ENTRIES = 2**22  # at once


@dataclass(frozen=True)
class Observed:
    """Of a fate given draws: mean (s,), Var(y) (s,), and parts (s,) of it by scale and component; they sum to it.

    The mean of an ordinal fate is that of the number of its level.
    """

    mean: Tensor
    variance: Tensor
    parts: dict[str, dict[str, Tensor]]


def observed(
    family: Family,
    fixed: Tensor,
    weight: Tensor,
    variances: Mapping[str, Tensor],
    phi: Tensor | None = None,
    trials: float = 1.0,
) -> Observed:
    """Moments of the response for draws (s,) of the component `variances`.

    fixed: values (s, p) of the fixed part, with `weight` (p,). phi: (s, 1) hyperparameter of the family. Binomial fates are
    proportions of `trials`.
    """
    if FIXED in variances:
        random = {name: v for name, v in variances.items() if name != FIXED}
    else:
        random = dict(variances)
    total = sum(random.values(), start=torch.zeros_like(fixed[:, 0]))
    x, w = quadrature(fixed, NODES if float(total.max()) <= NARROW else MANY)

    def average(m: Tensor, v: Tensor) -> Tensor:
        """E g^-1 under N(m, v) for m (s, p, j) and v (s,)."""
        return family.inverse_link(m[..., None] + v.clamp(min=0.0).sqrt()[:, None, None, None] * x) @ w

    sd = total.sqrt()
    eta = fixed[..., None] + sd[:, None, None] * x  # (s, p, nodes)
    mu = family.inverse_link(eta)
    of_fixed = mu @ w  # (s, p)
    mean = of_fixed @ weight
    between = (mu.square() @ w) @ weight - mean.square()
    of_one = family.noise(mu, None if phi is None else phi[..., None])
    assert of_one is not None
    noise = (of_one @ w) @ weight / trials
    # the average slope of the link, by Stein's identity
    slope = ((mu * x) @ w) @ weight / sd.clamp(min=1e-12)

    first: dict[str, Tensor] = {}
    for name, v in random.items():
        h = torch.empty(len(v), len(x), dtype=fixed.dtype, device=fixed.device)
        step = max(1, ENTRIES // (fixed.shape[1] * len(x) ** 2))
        for rows in torch.arange(len(v), device=fixed.device).split(step):
            m = fixed[rows, :, None] + v[rows].sqrt()[:, None, None] * x
            h[rows] = torch.einsum("spj,p->sj", average(m, (total - v)[rows]), weight)
        first[name] = h.square() @ w - (h @ w).square()
    if FIXED in variances:
        first[FIXED] = of_fixed.square() @ weight - mean.square()
    additive = {name: slope.square() * v for name, v in variances.items()}
    parts = {
        OBSERVATION: first | {INTERACTION: between - sum(first.values()), DISTRIBUTION: noise},
        ADDITIVE: additive | {NONLINEAR: between - sum(additive.values()), DISTRIBUTION: noise},
    }
    return Observed(mean, between + noise, parts)


def observed_levels(
    family: Ordinal, fixed: Tensor, weight: Tensor, variances: Mapping[str, Tensor], phi: Tensor | None = None
) -> Observed:
    """The same of an ordinal fate, as the sum over its cut points; phi (s, 1, K - 2) are the gaps between them."""
    binary = get_family("bernoulli", family.link)
    cuts = torch.zeros_like(fixed[:, :1])
    if phi is not None:
        cuts = torch.cat([cuts, phi[:, 0].cumsum(-1).expand(len(fixed), -1)], -1)
    each = [observed(binary, fixed - cut[:, None], weight, variances) for cut in cuts.unbind(-1)]

    def total(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts)).sum(0)

    parts = {
        scale: {name: total([one.parts[scale][name] for one in each]) for name in each[0].parts[scale]}
        for scale in each[0].parts
    }
    return Observed(total([one.mean for one in each]), total([one.variance for one in each]), parts)


def on_observation_scale(
    model: Model, values: Mapping[str, np.ndarray], beta: np.ndarray, latent: Mapping[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Both scales for the first draws, or none where the fate itself is the latent scale."""
    like, some = model.data.offset.cpu(), slice(0, DRAWS)
    variances = {name: torch.as_tensor(x[some]).to(like) for name, x in latent.items()}
    trials = model.data.outcome.trials
    number = 1.0 if trials is None else 1 / float((1 / trials.cpu()).mean())
    beta_ = torch.as_tensor(beta[some]).to(like)
    if isinstance(model.family, Categorical):
        scales = _of_fates(model, beta_, variances, number)
        return {scale: {name: x.numpy() for name, x in parts.items()} for scale, parts in scales.items()}
    if not isinstance(model.family, Ordinal) and model.family.noise(torch.zeros(1), torch.ones(1, 1)) is None:
        return {}
    own = {name: torch.as_tensor(values[name][some]).to(like) for name in model.own}
    (fixed, weight), phi = _fixed_part(model, beta_), model.phi(Theta(own, None))
    if isinstance(model.family, Ordinal):
        found = observed_levels(model.family, fixed, weight, variances, phi)
    else:
        found = observed(model.family, fixed, weight, variances, phi, number)
    return {scale: {name: x.numpy() for name, x in parts.items()} for scale, parts in found.parts.items()}


def _of_fates(
    model: Model, beta: Tensor, variances: Mapping[str, Tensor], trials: float
) -> dict[str, dict[str, Tensor]]:
    """Of a fate out of several; the fixed part is that of some cells, where these are many."""
    levels, design = model.data.outcome.levels, model.data.own_design.cpu()
    assert levels is not None
    some = design[model.data.some(CELLS)[: min(CELLS, len(design))]]
    beside = torch.cat([some, some.new_ones(len(some), 1)], -1)  # a design without columns has rows, too
    different, count = torch.unique(beside, dim=0, return_counts=True)
    of_contrasts = beta.reshape(len(beta), model.data.sets, design.shape[1])
    fixed = torch.einsum("sjp,np->snj", of_contrasts, different[:, :-1])
    fate_of = {c.name: k.fate for c in model.components if isinstance(k := c.kernel, Loaded) and k.fate is not None}
    found = observed_fates(levels, fixed, count.to(beta) / count.sum(), variances, fate_of, trials)
    return {
        OBSERVATION: found.first | {INTERACTION: found.between - _sum(found.first), DISTRIBUTION: found.noise},
        ADDITIVE: found.additive | {NONLINEAR: found.between - _sum(found.additive), DISTRIBUTION: found.noise},
    }


def _sum(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum(0)


def _fixed_part(model: Model, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Values (s, p) of the fixed part and the offset, and how many of the cells each stands for, as a share (p,)."""
    cells = model.data.some(CELLS)
    rows = torch.cat([model.data.design, model.data.offset[:, None]], -1).cpu()
    different, count = torch.unique(rows, dim=0, return_counts=True)
    if len(different) > POINTS:
        eta = beta @ rows[cells, :-1].mT + rows[cells, -1]
        points = (torch.arange(POINTS).to(beta) + 0.5) / POINTS
        return torch.quantile(eta, points, dim=1).mT.contiguous(), torch.full_like(points, 1 / POINTS)
    return beta @ different[:, :-1].mT + different[:, -1], count.to(beta) / len(rows)
