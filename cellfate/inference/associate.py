"""Many covariates, one at a time, as fixed effects beside a model that is fitted once.

As in mixed-model association (Chen et al. 2016, GMMAT): with b what the null model leaves unexplained and R the inverse covariance of
its working data, fixed effects projected out, a covariate x has the score x'b with variance x'R x, and a one-step estimate x'b / x'Rx.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy.stats import chi2

from cellfate.engines.base import Engine
from cellfate.inference.free_energy import evaluate
from cellfate.inference.predict import focused
from cellfate.inference.sites import Rule
from cellfate.model.glmm import Model

SETTLED = 1e-6  # of site updates
EXPLAINED = 1e-8  # of a covariate's variance, below which the fixed effects hold all of it
MEDIAN = float(chi2.median(1))


class Associations:
    """The null model at its mode, ready to be asked about covariates."""

    @torch.no_grad()
    def __init__(self, model: Model, engine: Engine, rule: Rule, mode: Mapping[str, float]) -> None:
        theta, _ = model.from_natural(model.from_draws({name: np.array([value]) for name, value in mode.items()}))
        self._posterior = evaluate(model, focused(engine, theta), theta, rule, tolerance=SETTLED).posterior
        self._like, design = model.data.offset, model.data.design
        self._basis = torch.linalg.qr(design)[0] if design.shape[1] else design

    @torch.no_grad()
    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Estimates and standard errors (k,) of covariates (n, k), on link scale; NaN for one that the fixed effects hold."""
        columns = torch.as_tensor(x).to(self._like)
        # what the fixed effects hold is taken out first: R takes it out too, as far as their prior is wide
        left = columns - self._basis @ (self._basis.mT @ columns)
        information = (left * self._posterior.residual(left[None])[0]).sum(0)
        score = left.mT @ self._posterior.weights[0]
        whole = (columns - columns.mean(0)).square().sum(0)
        gone = left.square().sum(0) <= EXPLAINED * torch.maximum(whole, torch.ones_like(whole) * 1e-300)
        information = torch.where(gone, torch.full_like(information, torch.nan), information)
        return (score / information).cpu().numpy(), information.rsqrt().cpu().numpy()


def inflation(z: np.ndarray) -> float:
    """Genomic control's lambda: the median of the squares over that of a chi-square; 1 where nothing is associated."""
    return float(np.nanmedian(z**2) / MEDIAN)
