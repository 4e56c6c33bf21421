"""Fates of several fields: from what is observed of each cell to a model over copies of the cells, and back to fates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cellfate.errors import DataError
from cellfate.inference.arrays import array
from cellfate.inference.hyperposterior import Hyperposterior
from cellfate.kernels.base import Component
from cellfate.kernels.fates import OwnField, own_fields
from cellfate.model.categorical import Categorical, contrasts
from cellfate.model.checks import check_finite, check_levels
from cellfate.model.glmm import Model

KIND = "fates"  # of a family
NEAR_ONE = 1e-6  # that probabilities sum to


def weights_of(response: str, y: Any) -> np.ndarray:
    """One-hot fates, counts or probabilities (n, K) from codes (n,) or from the matrix itself."""
    found = array(response, y)
    rows = np.arange(len(found))
    if found.ndim == 1:
        check_finite(found, rows, response, "Leave those cells out.")
        codes = found.astype(np.int64)
        if (codes != found).any() or codes.min() < 0:
            raise DataError(
                f"{response} holds {found[(codes != found) | (found < 0)][0]:g}: number the fates 0, 1, 2, ..."
            )
        levels = int(codes.max()) + 1
        check_levels(codes, rows, response, [str(k) for k in range(levels)])
        return np.eye(levels)[codes]
    if found.ndim != 2 or found.shape[1] < 2:
        raise DataError(f"{response} has shape {found.shape}, wanted codes (n,) or a column per fate (n, 2 or more).")
    check_finite(found, rows, response, "Leave those cells out.")
    total = found.sum(1)
    if (found < 0).any():
        cell = rows[(found < 0).any(1)][0]
        raise DataError(
            f"{response} is negative in {int((found < 0).any(1).sum())} cells, the first {cell!r}. Give counts or probabilities."
        )
    whole = (found == np.round(found)).all()
    if not whole and (np.abs(total - 1) > NEAR_ONE).any():
        off = np.abs(total - 1) > NEAR_ONE
        raise DataError(
            f"{response}: the rows of {int(off.sum())} of {len(total)} cells do not sum to one, the first {rows[off][0]!r} to "
            f"{total[off][0]:g}. Probabilities have to (divide by the sum); counts have to be whole numbers."
        )
    if (total == 0).any():
        raise DataError(f"{response} is zero for every fate in {int((total == 0).sum())} cells. Leave those cells out.")
    empty = np.flatnonzero(found.sum(0) == 0)
    if empty.size:
        raise DataError(f"{response}: no cell has fate {', '.join(map(str, empty))}. Leave that column out.")
    return found.astype(np.float64)


def outcome_of(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the family takes: data and totals ((K - 1) n,)."""
    return Categorical.outcome(weights)


def block_design(design: np.ndarray, terms: Sequence[str], copies: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """A design (n, p) for each copy of the cells, and what its columns are called inside the model."""
    return np.kron(np.eye(copies), design), tuple(f"{term}[contrast {j}]" for j in range(copies) for term in terms)


def fields_of(
    components: Sequence[Component],
    copies: int,
    names: Sequence[str] | None,
    priors: Mapping[str, object],
    per_fate: bool,
) -> tuple[tuple[Component, ...], dict[str, object]]:
    """Components over the copies, with one variance each or one for every fate, and the priors by what they are called there."""
    if not per_fate:
        return tuple(Component(c.name, c.kernel.copied(copies)) for c in components), dict(priors)
    called, found = _called(names, copies + 1), dict(priors)
    for c in components:
        if (key := f"sd_{c.name}") in found:
            shared = found.pop(key)
            found = {f"{key}[{name}]": shared for name in called} | found
    return own_fields(components, contrasts(copies + 1), called), found


def _called(names: Sequence[str] | None, levels: int) -> list[str]:
    return [str(k) for k in range(levels)] if names is None else [str(name).replace("/", "_") for name in names]


def by_fate(x: np.ndarray, levels: int) -> np.ndarray:  # (..., (K - 1) n) -> (..., n, K)
    """Latent values of the fates from those of their contrasts."""
    u = np.moveaxis(x.reshape(*x.shape[:-1], levels - 1, -1), -2, -1)
    return u @ contrasts(levels).T


def variances_by_fate(x: np.ndarray, levels: int) -> np.ndarray:
    """The same of variances, contrasts being independent a posteriori."""
    u = np.moveaxis(x.reshape(*x.shape[:-1], levels - 1, -1), -2, -1)
    return u @ (contrasts(levels).T ** 2)


def told_by_fate(
    model: Model, posterior: Hyperposterior, terms: Sequence[str], names: Sequence[str] | None
) -> tuple[Hyperposterior, tuple[str, ...]]:
    """Effects and fixed effects of each fate in place of those of contrasts, and what the latter are called."""
    levels = model.data.copies + 1
    names = _called(names, levels)
    own = {c.name: c.kernel for c in model.components if isinstance(c.kernel, OwnField)}
    effects: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for component, (mean, sd) in posterior.effects.items():
        if component in own:  # one field, of which each contrast has its part
            place = own[component].loading / np.sqrt(levels)
            means = place @ mean.reshape(levels - 1, -1)
            effects[component] = means, np.sqrt((place @ place) * (sd.reshape(levels - 1, -1) ** 2).sum(0))
            continue
        means, sds = by_fate(mean, levels), np.sqrt(variances_by_fate(sd**2, levels))
        effects |= {f"{component}[{name}]": (means[:, k], sds[:, k]) for k, name in enumerate(names)}
    beta = np.einsum(
        "scp,kc->spk", posterior.beta.reshape(len(posterior.beta), levels - 1, len(terms)), contrasts(levels)
    )
    told = replace(posterior, effects=effects, beta=beta.reshape(len(beta), -1))
    return told, tuple(f"{term}[{name}]" for term in terms for name in names)
