"""Fates of several fields: from what is observed of each cell to a model over copies of the cells, and back to fates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cellfate.errors import DataError
from cellfate.inference.arrays import array
from cellfate.inference.hyperposterior import Hyperposterior
from cellfate.kernels.base import Component, Kernel
from cellfate.kernels.fates import Loaded, can_be_loaded, own_fields
from cellfate.model.categorical import Categorical, contrasts
from cellfate.model.checks import check_finite, check_levels
from cellfate.model.families import Family
from cellfate.model.glmm import Model
from cellfate.model.pairs import Pairs, differences, loadings, variances_of_fates

KIND = "fates"  # of a family
NEAR_ONE = 1e-6  # that probabilities sum to
# pairs of fates times cells of a block, and entries of all blocks, up to which sites of all pairs are taken where contrasts would do
WHOLE, ENTRIES = 1_500, 10 * 1_500**2


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
            f"{response} is negative in {int((found < 0).any(1).sum())} cells, the first in row {cell}. Give counts or probabilities."
        )
    whole = (found == np.round(found)).all()
    if not whole and (np.abs(total - 1) > NEAR_ONE).any():
        off = np.abs(total - 1) > NEAR_ONE
        raise DataError(
            f"{response}: the rows of {int(off.sum())} of {len(total)} cells do not sum to one, the first, row {rows[off][0]}, to "
            f"{total[off][0]:g}. Probabilities have to (divide by the sum); counts have to be whole numbers."
        )
    if (total == 0).any():
        raise DataError(
            f"{response} is zero for every fate in {int((total == 0).sum())} cells, the first in row {rows[total == 0][0]}. Leave those "
            "cells out."
        )
    empty = np.flatnonzero(found.sum(0) == 0)
    if empty.size:
        raise DataError(f"{response}: no cell has fate {', '.join(map(str, empty))}. Leave that column out.")
    return found.astype(np.float64)


@dataclass(frozen=True)
class Form:
    """How fates become copies of the cells: K - 1 contrasts with a site each, or all pairs, whose sites are a block of a cell.

    Fields of pairs depend on each other, which exact matrices can hold; with variances by fate those of contrasts do too, and a
    product over contrasts is then no approximation of the posterior.
    """

    levels: int
    paired: bool = False

    @classmethod
    def of(cls, model: Model) -> Form:
        assert model.data.outcome.levels is not None
        return cls(model.data.outcome.levels, isinstance(model.family, Pairs))

    @property
    def copies(self) -> int:
        return self.levels * (self.levels - 1) // 2 if self.paired else self.levels - 1

    @property
    def family(self) -> Family:
        return Pairs() if self.paired else Categorical()

    @property
    def _of_contrasts(self) -> np.ndarray:  # (copies, J)
        return loadings(self.levels) if self.paired else np.eye(self.levels - 1)

    @property
    def _of_fates(self) -> np.ndarray:  # (copies, K)
        return differences(self.levels) if self.paired else contrasts(self.levels).T

    def outcome(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the family takes: data and totals (copies * n,)."""
        return (Pairs if self.paired else Categorical).outcome(weights)

    def design(self, design: np.ndarray, terms: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
        """A design (n, p) for each copy of the cells, and what its columns, p of each contrast, are called inside the model."""
        names = tuple(f"{term}[contrast {j}]" for j in range(self.levels - 1) for term in terms)
        return np.kron(self._of_contrasts, design), names

    def components(self, components: Sequence[Component], each: Sequence[str] | None) -> tuple[Component, ...]:
        """Components over the copies, with one variance, or one for `each` of the fates by name."""
        if each is not None:
            return own_fields(components, self._of_fates, each)
        if self.paired:
            return tuple(Component(c.name, Loaded(c.kernel, self._of_contrasts, c.name)) for c in components)
        return tuple(Component(c.name, c.kernel.copied(self.copies)) for c in components)

    def by_fate(self, x: np.ndarray) -> np.ndarray:  # (..., copies * n) -> (..., n, K)
        """Latent values of the fates."""
        return self._apart(x) @ self._of_fates * (2 / self.levels if self.paired else 1.0)

    def variances_by_fate(self, x: np.ndarray) -> np.ndarray:
        """The same of variances; contrasts are independent a posteriori, and pairs say all about each other."""
        found = self._apart(x) @ (variances_of_fates(self.levels) if self.paired else self._of_fates**2)
        return found.clip(min=0)  # of rounding

    def variance_of_field(self, x: np.ndarray) -> np.ndarray:  # (copies * n) -> (n,)
        """Variance of a fate's latent value that comes from its own field, of which each copy has its part."""
        of_contrasts = self._apart(x).sum(-1) * (2 / self.levels if self.paired else 1.0)
        return of_contrasts * (1 - 1 / self.levels)

    def _apart(self, x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x.reshape(*x.shape[:-1], self.copies, -1), -2, -1)


def only_paired(components: Sequence[Component]) -> bool:
    """Whether one of them has no independent copies of its cells, and all can do without."""
    without = [c for c in components if type(c.kernel).copied is Kernel.copied]
    return bool(without) and all(can_be_loaded(c.kernel) for c in components)


def can_be_paired(components: Sequence[Component], levels: int) -> bool:
    """Whether sites of all pairs are there for these components, and another thing than those of contrasts."""
    return levels > 2 and all(can_be_loaded(c.kernel) for c in components)


def fate_names(names: Sequence[str] | None, levels: int) -> list[str]:
    """The fates by what they are called in tables, each by a name of its own: a file takes "/" for a folder."""
    if names is None:
        return [str(k) for k in range(levels)]
    taken, found = {str(name) for name in names if "/" not in str(name)}, []
    for name in map(str, names):
        plain = name.replace("/", "_")
        while "/" in name and plain in taken:
            plain += "_"
        taken.add(plain)
        found.append(plain)
    return found


def priors_by_fate(
    components: Sequence[Component], each: Sequence[str], priors: Mapping[str, object]
) -> dict[str, object]:
    """Priors where every fate has a variance of its own: one that was given for all is that of each."""
    found = dict(priors)
    for c in components:
        if (key := f"sd_{c.name}") in found:
            shared = found.pop(key)
            found = {f"{key}[{name}]": shared for name in each} | found
    return found


def told_by_fate(
    model: Model, posterior: Hyperposterior, terms: Sequence[str], names: Sequence[str] | None
) -> tuple[Hyperposterior, tuple[str, ...]]:
    """Effects and fixed effects of each fate in place of those of copies, and what the latter are called."""
    form = Form.of(model)
    levels, names = form.levels, fate_names(names, form.levels)
    own = {c.name: k.fate for c in model.components if isinstance(k := c.kernel, Loaded) and k.fate is not None}
    effects: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for component, (mean, sd) in posterior.effects.items():
        means = form.by_fate(mean)
        if component in own:
            effects[component] = means[:, own[component]], np.sqrt(form.variance_of_field(sd**2))
            continue
        sds = np.sqrt(form.variances_by_fate(sd**2))
        effects |= {f"{component}[{name}]": (means[:, k], sds[:, k]) for k, name in enumerate(names)}
    beta = np.einsum(
        "scp,kc->spk", posterior.beta.reshape(len(posterior.beta), levels - 1, len(terms)), contrasts(levels)
    )
    told = replace(posterior, effects=effects, beta=beta.reshape(len(beta), -1))
    return told, tuple(f"{term}[{name}]" for term in terms for name in names)
