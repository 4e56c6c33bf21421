"""The tables of :func:`cellfate.tl.check`: checks, predictions and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import kstest

from cellfate.inference import checks
from cellfate.inference.fates import KIND
from cellfate.inference.moran import Vicinity, permuted

BINS = 10  # of predicted probabilities
PROBABILITIES = ("binary", "successes")  # kinds of fates that have one
LEVELS = "levels"  # the kind that has several, in an order
COLUMNS = ("check", "over", "observed", "expected", "lower", "upper", "p")


@dataclass(frozen=True)
class Observed:
    """What became of the cells: `y` (n,), or of fates without an order how often each (n, K), out of `trials`; `names` of the fates."""

    kind: str
    y: np.ndarray
    trials: np.ndarray | None
    names: Sequence[str] = ()

    @property
    def weight(self) -> np.ndarray:
        return np.ones(len(self.y)) if self.trials is None else self.trials

    @property
    def several(self) -> bool:
        """Whether there are several fates, each with a probability."""
        return self.kind in (KIND, LEVELS)

    @property
    def shares(self) -> np.ndarray:
        """Of the trials of each cell what was each fate (n, K), with a single column where there is only one."""
        if self.kind == LEVELS:
            return np.eye(len(self.names))[self.y.astype(np.int64)]
        return (self.y if self.kind == KIND else self.y[:, None]) / self.weight[:, None]


def checks_table(
    residuals: np.ndarray,
    seen: Observed,
    replicates: np.ndarray,
    vicinities: Mapping[str, Vicinity],
    n_perm: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Residuals (n,) or (n, K), and fates against their replicates; several fates one after the other, with a column `fate`."""
    if seen.kind == KIND:
        parts = []
        share, again = seen.shares, replicates / seen.weight[:, None, None]
        for k, name in enumerate(seen.names):
            rows = _of_residuals(residuals[:, k], vicinities, n_perm, rng)
            found = {"share": (share[:, k].mean(), again[..., k].mean(0), "cells")}
            if seen.weight.max() > 1:  # of a yes or no it goes by the share
                found["standard deviation"] = share[:, k].std(), again[..., k].std(0), "cells"
            found |= _patterns(share[:, k], again[..., k], vicinities)
            parts.append(pd.DataFrame([*rows, *_of_fates(found)], columns=list(COLUMNS)).assign(fate=name))
        return pd.concat(parts, ignore_index=True)
    y = seen.y
    found = {
        "mean": (y.mean(), replicates.mean(0), "cells"),
        "standard deviation": (y.std(), replicates.std(0), "cells"),
    }
    if seen.kind != LEVELS and ((y == 0).any() or (replicates == 0).any()):
        found["share of zeros"] = (y == 0).mean(), (replicates == 0).mean(0), "cells"
    found |= _patterns(y, replicates, vicinities)
    rows = [*_of_residuals(residuals, vicinities, n_perm, rng), *_of_fates(found)]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    if seen.kind != LEVELS:
        return table
    of_levels = {k: {"share": ((y == k).mean(), (replicates == k).mean(0), "cells")} for k in range(len(seen.names))}
    each = [pd.DataFrame(_of_fates(x), columns=list(COLUMNS)).assign(fate=seen.names[k]) for k, x in of_levels.items()]
    return pd.concat([table.assign(fate=""), *each], ignore_index=True)


def _of_residuals(
    residuals: np.ndarray, vicinities: Mapping[str, Vicinity], n_perm: int, rng: np.random.Generator
) -> list[tuple[object, ...]]:
    distance, p = kstest(residuals, "norm")
    rows: list[tuple[object, ...]] = [("residuals are normal", "cells", distance, 0.0, 0.0, np.nan, p)]
    for name, vicinity in vicinities.items():
        found, drawn, p = permuted(vicinity, residuals, n_perm, rng)
        # below is no pattern: cells that are predicted from each other have residuals that are a little opposed
        rows.append(("Moran's I of residuals", name, found, drawn.mean(), -np.inf, np.quantile(drawn, 0.95), p))
    return rows


Found = dict[str, tuple[float, np.ndarray, str]]  # what was observed, the same of replicates, over what


def _patterns(y: np.ndarray, replicates: np.ndarray, vicinities: Mapping[str, Vicinity]) -> Found:
    return {
        f"Moran's I ({name})": (vicinity.moran(y[:, None])[0], vicinity.moran(replicates), name)
        for name, vicinity in vicinities.items()
    }


def _of_fates(found: Found) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for name, (observed, drawn, over) in found.items():
        lower, upper = np.quantile(drawn, [0.025, 0.975])
        tail = min((1 + (drawn >= observed).sum()), (1 + (drawn <= observed).sum())) / (len(drawn) + 1)
        label = f"{name.split(' (')[0]} of fates"
        rows.append((label, over, observed, drawn.mean(), lower, upper, min(1.0, 2 * tail)))
    return rows


def predictions_table(
    predicted: Mapping[str, checks.Predicted], sets: Mapping[str, np.ndarray], seen: Observed
) -> pd.DataFrame:
    """Proper scores of what was predicted for cells that were left out, and what frequencies alone would score."""
    rows = []
    for name, found in predicted.items():
        row: dict[str, object] = {
            "left_out": name,
            "sets": len(seen.y) if name == checks.CELL else len(np.unique(sets[name])),
        }
        row["log_score"] = found.log_p.mean()
        if seen.kind in PROBABILITIES or seen.several:
            weight, share = seen.weight, seen.shares
            whole, mean = np.average(share, axis=0, weights=weight), found.mean.reshape(share.shape)
            score = "brier"
            if seen.kind == LEVELS:
                score = "rps"
                share, whole, mean = (x.cumsum(-1) for x in (share, whole, mean))
            row[score] = np.average(((share - mean) ** 2).sum(-1), weights=weight)
            row[f"{score}_reference"] = np.average(((share - whole) ** 2).sum(-1), weights=weight)
        rows.append(row)
    return pd.DataFrame(rows)


def calibration_table(predicted: Mapping[str, checks.Predicted], seen: Observed) -> pd.DataFrame:
    """How often it came true, by what was predicted; of several fates each against the rest."""
    rows = []
    weight, share = seen.weight, seen.shares
    for name, found in predicted.items():
        mean = found.mean.reshape(share.shape)
        for fate in range(share.shape[1]):
            bins = np.minimum((mean[:, fate] * BINS).astype(int), BINS - 1)
            for k in np.unique(bins):
                here = bins == k
                total = weight[here].sum()
                row: dict[str, object] = {"left_out": name}
                if seen.several:
                    row["fate"] = seen.names[fate]
                row["predicted"] = np.average(mean[here, fate], weights=weight[here])
                row["observed"] = (share[here, fate] @ weight[here]) / total
                rows.append(row | {"cells": int(here.sum()), "trials": float(total)})
    return pd.DataFrame(rows)
