"""What a decomposition found, as tidy tables."""

from cellfate.get.tables import (
    ancestors,
    associations,
    comparison,
    components,
    correlations,
    diagnostics,
    draws,
    effects,
    fixed_effects,
    hyperparameters,
    marginal_effects,
    params,
    responses,
    tests,
)

__all__ = [
    "ancestors",
    "associations",
    "comparison",
    "components",
    "correlations",
    "diagnostics",
    "draws",
    "effects",
    "fixed_effects",
    "hyperparameters",
    "marginal_effects",
    "params",
    "responses",
    "tests",
]
