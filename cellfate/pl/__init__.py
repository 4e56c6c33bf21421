"""Figures of a decomposition, drawn only from what `cf.get` returns: a cluster fits, a laptop plots."""

from cellfate.pl.effects import effects
from cellfate.pl.posterior import posterior
from cellfate.pl.residuals import residuals
from cellfate.pl.variance_shares import variance_shares

__all__ = ["effects", "posterior", "residuals", "variance_shares"]
