"""What a decomposition found, as tidy tables."""

from cellfate.get.tables import (
    ancestors,
    components,
    correlations,
    diagnostics,
    draws,
    effects,
    fixed_effects,
    hyperparameters,
    params,
    responses,
)

__all__ = [
    "ancestors",
    "components",
    "correlations",
    "diagnostics",
    "draws",
    "effects",
    "fixed_effects",
    "hyperparameters",
    "params",
    "responses",
]
