"""Figures of a decomposition and of what comes before and after, drawn only from what `cf.get` returns: a cluster fits, a laptop plots."""

from cellfate.pl.compare import compare
from cellfate.pl.effects import effects
from cellfate.pl.identifiability import identifiability
from cellfate.pl.posterior import posterior
from cellfate.pl.residuals import residuals
from cellfate.pl.variance_shares import variance_shares

__all__ = ["compare", "effects", "identifiability", "posterior", "residuals", "variance_shares"]


def __dir__() -> list[str]:
    return __all__
