"""The free energy of a model at hyperparameter points, and its gradient.

The gradient at fixed sites is exact for stationary bounds; what the correction and the Laplace rule add through their sites comes
from one adjoint solve (see :mod:`cellfate.inference.sites`). Kernels are differentiated by autograd, so that a new kernel needs no
derivative of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cellfate.engines.base import Engine, Posterior, Sites
from cellfate.inference.sites import Laplace, Likelihood, Rule
from cellfate.inference.variational_laplace import Fit, fit_sites
from cellfate.kernels.base import Term
from cellfate.model.glmm import Model, Theta

NEAR = 0.1  # of Laplace's updates, which only have to come near


@dataclass(frozen=True)
class Evaluation:
    """Free energy (points,) with what it was computed from; `gradient` (points, d) where it was asked for."""

    free_energy: Tensor
    fit: Fit
    terms: list[Term]
    theta: Theta
    gradient: Tensor | None = None

    @property
    def posterior(self) -> Posterior:
        return self.fit.posterior


def likelihood_at(model: Model, theta: Theta) -> Likelihood:
    """The model's likelihood at a batch of points."""
    return Likelihood(model.family, model.data.outcome, model.shift(theta), model.phi(theta))


def evaluate(
    model: Model, engine: Engine, theta: Theta, rule: Rule, *, start: Sites | None = None, tolerance: float = 1e-7
) -> Evaluation:
    """Free energy at `theta`. Without `start` the updates begin from each cell alone, by way of Laplace's mode."""
    with torch.no_grad():
        terms, likelihood = model.terms(theta), likelihood_at(model, theta)
        points = max([t.variance.shape[0] for t in terms], default=1)
        if model.family.quadratic:  # sites are what they are
            start = likelihood.start(points)
        elif start is not None:
            start = Sites(start.precision.expand(points, -1), start.shift.expand(points, -1))
        else:
            start = likelihood.start(points)
            if not isinstance(
                rule, Laplace
            ):  # a mode on the way: expectations over a far too wide posterior lead astray
                start = fit_sites(engine, terms, likelihood, Laplace(), start, tolerance=NEAR).sites
        fit = fit_sites(engine, terms, likelihood, rule, start, tolerance=tolerance)
        # the free energy of settled sites, up to what could not be foreseen
        return Evaluation(rule.free_energy(likelihood, fit.posterior) + fit.drift, fit, terms, theta)


def log_evidence(model: Model, here: Evaluation, rule: Rule) -> Tensor:
    """The free energy (points,) with what the search for the mode, which goes by gradients, leaves out: couplings between cells."""
    return here.free_energy + rule.between(likelihood_at(model, here.theta), here.posterior)


def evaluate_with_gradient(
    model: Model, engine: Engine, u: Tensor, rule: Rule, *, start: Sites | None = None, tolerance: float = 1e-7
) -> Evaluation:
    """The same at coordinates u (points, d), with the gradient in them."""
    here = evaluate(model, engine, model.theta(u.detach()), rule, start=start, tolerance=tolerance)
    u = u.detach().requires_grad_(True)
    with torch.enable_grad():
        theta = model.theta(u)
        part, pair, omega = rule.parameter_part(likelihood_at(model, theta), here.posterior, max(tolerance, 1e-7))
        total = part.sum() + here.posterior.surrogate(model.terms(theta), pair, omega).sum()
        (gradient,) = torch.autograd.grad(total, u, allow_unused=True)
    if gradient is None:
        gradient = torch.zeros_like(u)
    return Evaluation(here.free_energy, here.fit, here.terms, here.theta, gradient.detach())
