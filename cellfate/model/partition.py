"""From posterior draws of variances to a partition: each component's variance and its share of the total.

Several scales, none hidden in another. *Latent*: the random components and the variance of the fixed part among these cells.
*Link*: the same, with the variance that the family's own distribution adds (Nakagawa, Johnson & Schielzeth 2017). *Realized*:
of the sample variance in these very cells what is each component's own, and as `shared` what two of them explain alike, which could not
be assigned even if the field were known without error. *Observation* and *additive*: what part of the variance of the fate itself, see :mod:`cellfate.model.observation`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from cellfate.model.glmm import FIXED, RESIDUAL, Model, Theta
from cellfate.model.observation import DISTRIBUTION, on_observation_scale

SHARED = "shared"
LATENT, LINK, REALIZED = "latent", "link", "realized"
CHUNK = 2**19  # entries of cells x draws at once


def summary(x: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, sd and 95% interval of draws."""
    return summaries(x[None])[0]


def summaries(x: np.ndarray) -> list[tuple[float, float, float, float]]:
    """Those of each row of x (k, draws)."""
    lower, upper = np.quantile(x, [0.025, 0.975], axis=1)
    spread = np.where(np.ptp(x, axis=1) == 0, 0.0, x.std(1))  # of a constant not what rounding makes of it
    return list(zip(*(part.tolist() for part in (x.mean(1), spread, lower, upper)), strict=True))


def latent(model: Model, values: Mapping[str, np.ndarray], beta: np.ndarray) -> dict[str, np.ndarray]:
    """Variance draws of each component on the latent scale, where there are copies of a copy."""
    out = {}
    for c in model.components:
        shape = {h.name: values[h.parameter(c.name)] for h in c.kernel.hyperparameters}
        out[c.name] = c.kernel.contribution(values[f"sd_{c.name}"], shape)
    if has_covariates(model):
        design, sets = model.data.own_design, model.data.sets
        covariance = np.atleast_2d(np.cov(design.cpu().numpy(), rowvar=False))
        of_set = beta.reshape(len(beta), sets, -1)
        out[FIXED] = np.einsum("scp,pq,scq->s", of_set, covariance, of_set) / sets
    if model.family.parameter == "variance_residual":
        out[RESIDUAL] = values["sd_residual"] ** 2
    return out


def has_covariates(model: Model) -> bool:
    """Whether the fixed part varies over the cells."""
    design = model.data.own_design
    return bool(design.shape[1]) and bool((design.amax(0) > design.amin(0)).any())


def distribution_variance(
    model: Model, values: Mapping[str, np.ndarray], beta: np.ndarray, parts: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Draws of the variance that the family's distribution adds on the link scale."""
    design, offset = model.data.design.cpu(), model.data.offset.cpu()
    random = torch.as_tensor(sum(parts[c.name] for c in model.components)).to(offset)[:, None]
    b = torch.as_tensor(beta).to(offset)
    own = {name: torch.as_tensor(values[name]).to(offset) for name in model.own}
    phi = model.phi(Theta(own, None))
    out, step = [], max(1, CHUNK // model.data.n)
    room = offset.new_empty(step, model.data.n)  # one for all: freed pieces of this size may not be handed back
    for i in range(0, len(b), step):
        eta = torch.addmm(offset, b[i : i + step], design.mT, out=room[: len(b[i : i + step])])
        held = None if phi is None else phi[i : i + step]
        out.append(model.family.distribution_variance(eta, random[i : i + step], held)[:, 0])
    return torch.cat(out).numpy()


def partition(
    model: Model, values: Mapping[str, np.ndarray], beta: np.ndarray, realized: Mapping[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Variance draws by scale and component."""
    parts = latent(model, values, beta)
    link = dict(parts)
    if model.family.name != "gaussian":
        link[DISTRIBUTION] = distribution_variance(model, values, beta, parts)
    order = [*parts, SHARED]
    seen = {name: realized[name] for name in order if name in realized}
    if len(set(seen) - {SHARED, RESIDUAL}) <= 1:
        seen.pop(SHARED, None)  # a single component shares nothing
    return {LATENT: parts, LINK: link, REALIZED: seen} | on_observation_scale(model, values, beta, parts)


def rows(
    model: Model,
    response: str,
    scales: Mapping[str, Mapping[str, np.ndarray]],
    values: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, list], dict[str, list]]:
    """Columns of the two tidy tables: variances and shares, one row per scale and component.

    The variance of a grouping factor is that of its intercepts, as draws and mode have it; what it contributes among these cells,
    a little less, makes its share. Where slopes belong to it, their contribution is in the share, and its variance has to be taken
    from the draws, `values`.
    """
    intercepts: dict[str, float | np.ndarray] = {}
    for c in model.components:
        intercepts[c.name] = c.kernel.expected_variance
        if c.kernel.holds_variance:
            assert values is not None
            own = values[f"sd_{c.name}"] ** 2
            intercepts[c.name] = scales[LATENT][c.name] / np.maximum(own, np.finfo(float).tiny)
    tables: tuple[dict[str, list], dict[str, list]] = ({}, {})
    for scale, parts in scales.items():
        total = sum(parts.values())
        of_intercepts = intercepts if scale in (LATENT, LINK) else {}
        kept = [draws / of_intercepts.get(c, 1.0) for c, draws in parts.items()]
        found = summaries(np.stack([*kept, *(draws / total for draws in parts.values())])) if parts else []
        for component, *both in zip(parts, found[: len(parts)], found[len(parts) :], strict=True):
            for table, name, (mean, sd, lower, upper) in zip(tables, ("variance", "share"), both, strict=True):
                row = {"scale": scale, "response": response, "component": component, name: mean}
                row |= {f"{name}_sd": sd, f"{name}_lower": lower, f"{name}_upper": upper}
                for column, value in row.items():
                    table.setdefault(column, []).append(value)
    return tables
