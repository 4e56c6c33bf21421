"""What is reported of a fit: mode, draws, fixed effects, and what should be known about the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from cellfate._runtime import warn
from cellfate.inference.hyperposterior import LARGEST_K, USELESS, Hyperposterior
from cellfate.inference.mode import Mode
from cellfate.model.glmm import Model
from cellfate.model.partition import summary

MUST_SETTLE = 0.95  # of the points' site updates, or a warning
FEW_DRAWS = 200
DOUBTFUL_ERROR = 0.5  # of the interpolated log posterior, in nats


def _natural(name: str, value: Any) -> tuple[str, Any]:
    """A standard deviation is reported as a variance."""
    return (f"variance_{name.removeprefix('sd_')}", value**2) if name.startswith("sd_") else (name, value)


def mode_values(model: Model, mode: Mode) -> dict[str, float]:
    """Hyperparameters at the mode by natural name, and fixed effects that were maximized."""
    theta = model.theta(mode.u[None])
    out = dict(_natural(name, float(value)) for name, value in theta.values.items())
    if theta.beta is not None:
        out |= {f"beta[{term}]": float(b) for term, b in zip(model.data.terms, theta.beta[0], strict=True)}
    return out


def all_draws(
    posterior: Hyperposterior, terms: Sequence[str], parts: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Draws of hyperparameters, fixed effects `terms` and shares; `parts` are variance draws on the latent scale."""
    out = dict(_natural(name, value) for name, value in posterior.values.items())
    out |= {f"beta[{term}]": posterior.beta[:, i] for i, term in enumerate(terms)}
    total = sum(parts.values())
    return out | {f"share_{name}": x / total for name, x in parts.items()}


def fixed_effects(posterior: Hyperposterior, terms: Sequence[str]) -> dict[str, list]:
    """Columns of a table of the fixed effects, a row per term."""
    found = [summary(posterior.beta[:, i]) for i in range(len(terms))]
    columns = ("estimate", "sd", "lower", "upper")
    return {"term": list(terms)} | {c: [f[i] for f in found] for i, c in enumerate(columns)}


def diagnose(
    model: Model, mode: Mode, posterior: Hyperposterior, parts: Mapping[str, np.ndarray], approximate: list[str]
) -> dict[str, Any]:
    """What should be known about the answer; each doubt is one warning and is kept."""
    doubts = list(approximate)
    if not mode.converged:
        doubts.append(f"the search for the mode stopped early ({mode.message})")
    if posterior.pareto_k > LARGEST_K:
        doubts.append(
            f"k-hat is {posterior.pareto_k:.2f}, above {LARGEST_K}: the intervals rest on few of the evaluated points"
        )
    if posterior.interpolation_error > USELESS:
        doubts.append(
            f"the log posterior is too rough to be interpolated between {posterior.evaluations} points, which are used alone"
        )
    elif posterior.interpolation_error > DOUBTFUL_ERROR:
        doubts.append(
            f"between evaluated points the log posterior is known to {posterior.interpolation_error:.2f} only: the intervals are "
            "rough"
        )
    if posterior.effective_draws < FEW_DRAWS:
        doubts.append(f"the intervals rest on {posterior.effective_draws:.0f} effective draws")
    if posterior.unsettled > (1 - MUST_SETTLE) * posterior.evaluations:
        doubts.append(f"site updates did not settle at {posterior.unsettled} of {posterior.evaluations} points")
    if mode.at_bound:
        doubts.append(f"the mode of {', '.join(mode.at_bound)} is at the bound of what the data can tell")
    if not np.isfinite(mode.free_energy) or not all(np.isfinite(x).all() for x in parts.values()):
        doubts.append("a result is not finite: do not use this fit")
    for doubt in doubts:
        warn(doubt + ".", stacklevel=4)
    correlation, verdict = _verdict(parts)
    return {
        "status": "; ".join(doubts) or "converged",
        "pareto_k": posterior.pareto_k,
        "interpolation_error": posterior.interpolation_error,
        "effective_draws": posterior.effective_draws,
        "evaluations": mode.evaluations + posterior.evaluations,
        "correlation_variances": correlation,
        "verdict": verdict,
    }


def _verdict(parts: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """Rank correlation of the two variances a posteriori, and in words whether this data tells them apart."""
    found = [[x for name, x in parts.items() if name.split("[")[0] == base] for base in ("lineage", "spatial")]
    if not all(found):
        return float("nan"), "ancestry and neighborhood are not both in the model"
    lineage, spatial = (np.sum(own, axis=0) for own in found)  # of every fate, where each has its own
    correlation = float("nan")
    if np.ptp(lineage) and np.ptp(spatial):
        correlation = float(np.corrcoef(rankdata(np.stack([lineage, spatial]), axis=1))[0, 1])  # Spearman's
    share = lineage / (lineage + spatial)
    width = float(np.subtract(*np.quantile(share, [0.975, 0.025])))
    return correlation, told_apart(correlation, width)


def told_apart(correlation: float, width: float) -> str:
    """In words, from the correlation of both variances and the width of the interval of how ancestry and neighborhood divide."""
    if correlation < -0.6 and width > 0.5:
        return "confounded: this data knows the sum of ancestry and neighborhood better than either"
    if width > 0.7:
        return "weak: this data says little about how ancestry and neighborhood divide what they explain"
    if width > 0.4:
        return "partial: ancestry and neighborhood are told apart roughly, the interval of how they divide is wide"
    return "clear: this data tells ancestry and neighborhood apart"
