"""What a decomposition found, as tidy tables."""

from cellfate.get.tables import components, diagnostics, draws, effects, fixed_effects, hyperparameters, params

__all__ = ["components", "diagnostics", "draws", "effects", "fixed_effects", "hyperparameters", "params"]
