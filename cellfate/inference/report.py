"""What is reported of a fit: mode, draws, fixed effects, and what should be known about the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from cellfate._runtime import warn
from cellfate.inference import fates
from cellfate.inference.arrays import term_names
from cellfate.inference.hyperposterior import LARGEST_K, USELESS, Hyperposterior, too_large
from cellfate.inference.mode import Mode
from cellfate.model.glmm import FIXED, Model
from cellfate.model.partition import LATENT, divided, partition, rows, summary

MUST_SETTLE = 0.95  # of the points' site updates, or a warning
FEW_DRAWS = 200
DOUBTFUL_ERROR = 0.5  # of the interpolated log posterior, in nats


@dataclass(frozen=True, repr=False)
class GLMMFit:
    """A fitted model: what is reported, as plain arrays and columns of tables.

    components, shares: columns of tidy tables, a row per scale ("latent", "link", "realized", ...) and component: posterior mean,
    sd and 95% interval. fixed_effects: a row per column of X, on link scale. draws: posterior draws by name, such as
    `variance_lineage`, `lengthscale_spatial`, `share_lineage`, `beta[x0]`. effects: component -> posterior mean and sd (n,).
    mode: hyperparameters at their posterior mode, with the `free_energy` there. log_evidence: of the whole model.
    diagnostics: see :func:`cellfate.get.diagnostics`.
    """

    components: dict[str, list]
    shares: dict[str, list]
    fixed_effects: dict[str, list]
    draws: dict[str, np.ndarray]
    effects: dict[str, tuple[np.ndarray, np.ndarray]]  # component -> posterior mean and sd (n,)
    mode: dict[str, float]
    free_energy: float
    log_evidence: float
    diagnostics: dict[str, Any]

    def __repr__(self) -> str:
        columns = (self.shares[c] for c in ("scale", "component", "share", "share_lower", "share_upper"))
        shares = [
            f"{name} {share:.2f} [{low:.2f}, {high:.2f}]"
            for scale, name, share, low, high in zip(*columns, strict=True)
            if scale == LATENT
        ]
        return f"GLMMFit({', '.join(shares)}; {self.diagnostics['status']})"


@dataclass(frozen=True, eq=False)
class Integrated:
    """A model with its data, and its posterior: all that :func:`report` needs to make a fit of it."""

    model: Model
    mode: Mode
    posterior: Hyperposterior
    terms: Sequence[str] | None  # names of the fixed effects and of the fates, where they have some
    levels: Sequence[str] | None
    approximate: list[str]  # what the engine doubts of its own answers
    facts: dict[str, Any]  # what is known besides, for the diagnostics


def report(found: Integrated, response: str, doubts: Sequence[str] | None = None) -> GLMMFit:
    """The fit that a posterior makes; its `doubts`, where others than its own are to be told."""
    model, mode, posterior = found.model, found.mode, found.posterior
    scales = partition(model, posterior.values, posterior.beta, posterior.realized)
    told, names = posterior, model.data.terms
    if model.family.kind == fates.KIND:
        names = term_names(found.terms, model.data.own_design.shape[1])
        told, names = fates.told_by_fate(model, posterior, names, found.levels)
    components, shares = rows(model, response, scales, posterior.values)
    if doubts is None:
        doubts = doubts_of(mode, posterior, scales[LATENT], found.approximate)
    return GLMMFit(
        components=components,
        shares=shares,
        fixed_effects=fixed_effects(told, names),
        draws=all_draws(told, names, scales[LATENT]),
        effects={name: x for name, x in told.effects.items() if name.split("[")[0] != FIXED},
        mode=mode_values(model, mode),
        free_energy=mode.free_energy,
        log_evidence=posterior.log_evidence,
        diagnostics=diagnose(mode, posterior, scales[LATENT], doubts) | found.facts,
    )


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
    return out | {f"share_{name}": x for name, x in divided(parts).items()}


def fixed_effects(posterior: Hyperposterior, terms: Sequence[str]) -> dict[str, list]:
    """Columns of a table of the fixed effects, a row per term."""
    found = [summary(posterior.beta[:, i]) for i in range(len(terms))]
    columns = ("estimate", "sd", "lower", "upper")
    return {"term": list(terms)} | {c: [f[i] for f in found] for i, c in enumerate(columns)}


def doubts_of(
    mode: Mode, posterior: Hyperposterior, parts: Mapping[str, np.ndarray], approximate: Sequence[str]
) -> list[str]:
    """What speaks against trusting the answer."""
    doubts = list(approximate)
    if not mode.converged:
        doubts.append(f"the search for the mode stopped early ({mode.message})")
    if posterior.pareto_k > LARGEST_K:
        doubts.append(f"k-hat is {too_large(posterior.pareto_k)}: the intervals rest on few of the evaluated points")
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
    results = [np.asarray(mode.free_energy), *parts.values(), *divided(parts).values()]
    if not all(np.isfinite(x).all() for x in results):
        doubts.append("a result is not finite: do not use this fit")
    return doubts


def diagnose(
    mode: Mode, posterior: Hyperposterior, parts: Mapping[str, np.ndarray], doubts: Sequence[str]
) -> dict[str, Any]:
    """What should be known about the answer; each doubt is one warning and is kept."""
    for doubt in doubts:
        warn(doubt + ".", stacklevel=5)
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
    share = divided({"lineage": lineage, "spatial": spatial})["lineage"]
    if not np.isfinite(share).all():
        return correlation, "ancestry and neighborhood explain nothing that could be divided"
    width = float(np.subtract(*np.quantile(share, [0.975, 0.025])))
    return correlation, told_apart(correlation, width)


def told_apart(correlation: float, width: float) -> str:
    """In words, from the correlation of both variances and the width of the interval of how ancestry and neighborhood divide."""
    if correlation < -0.6 and width > 0.5:
        return (
            "confounded: ancestry and neighborhood cannot be told apart, this data knows their sum better than either"
        )
    if width > 0.7:
        return "weak: ancestry and neighborhood cannot be told apart, this data says little about how they divide what they explain"
    if width > 0.4:
        return "partial: ancestry and neighborhood are told apart roughly, the interval of how they divide is wide"
    return "clear: this data tells ancestry and neighborhood apart"
