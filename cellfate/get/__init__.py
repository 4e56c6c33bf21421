"""What a decomposition found, as tidy tables."""

from cellfate.get.tables import (
    ancestors,
    associations,
    calibration,
    checks,
    comparison,
    components,
    condition_differences,
    condition_evidence,
    conditions,
    correlations,
    diagnostics,
    draws,
    effects,
    fixed_effects,
    hyperparameters,
    identifiability,
    marginal_effects,
    params,
    predictions,
    prior_sensitivity,
    responses,
    tests,
    trees,
)

__all__ = [
    "ancestors",
    "associations",
    "calibration",
    "checks",
    "comparison",
    "components",
    "condition_differences",
    "condition_evidence",
    "conditions",
    "correlations",
    "diagnostics",
    "draws",
    "effects",
    "fixed_effects",
    "hyperparameters",
    "identifiability",
    "marginal_effects",
    "params",
    "predictions",
    "prior_sensitivity",
    "responses",
    "tests",
    "trees",
]


def __dir__() -> list[str]:
    return __all__
