r"""Correlation of two responses through each component: the mixed-model form of phylogenetic correlation.

Each response is fitted by itself. At its mode its sites are pseudo-observations with known noise, so that a pair is a gaussian model
with covariance :math:`\sum_c \sqrt{v_{rc} v_{sc}}\,\rho_c K_{rc}^{1/2} K_{sc}^{1/2}` between the two, in which only the correlations
are unknown (Lynch 1991 for the gaussian case; Felsenstein's (1985) contrasts are the one of a brownian tree alone). Symmetric roots
let each response keep its own length-scale; where these are equal the product is the kernel. What two gaussian responses share
within a cell is a correlation of residuals beside them, or it would be called ancestry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from cellfate.errors import DataError
from cellfate.inference.fit import GLMM
from cellfate.inference.locate import locate
from cellfate.kernels.base import Basis, Dense, Term, unit_scale
from cellfate.model.glmm import RESIDUAL, Model

MOST_CELLS = 3000  # of which exact matrices are made
ABSENT = 1e-3  # of a response's latent variance, below which a component has no correlation with anything
LEAST_SEEN = 1e-8  # of the most informed cell


@dataclass(frozen=True, eq=False)
class Marginal:
    """A response at its mode: pseudo-observations less fixed effects, their noise, each (n,), and roots of its covariances."""

    name: str
    seen: Tensor
    noise: Tensor
    roots: dict[str, Tensor]  # component -> symmetric root (n, n) of variance times kernel
    residual: float | None  # variance of a gaussian one
    doubts: tuple[str, ...]

    @property
    def covariance(self) -> Tensor:
        return torch.diag(self.noise) + torch.stack([root @ root for root in self.roots.values()]).sum(0)


@dataclass(frozen=True)
class Correlation:
    """Of one pair through one component; NaN where one of the two has none of it."""

    component: str
    estimate: float
    se: float  # NaN where the search found no maximum
    status: str


def marginal(
    glmm: GLMM,
    name: str,
    y: np.ndarray,
    X: np.ndarray,
    offset: np.ndarray,
    terms: Sequence[str],
    trials: np.ndarray | None = None,
) -> Marginal:
    """Fit a response up to its mode."""
    glmm.on(y, X, offset, trials=trials, terms=terms, response=name)
    model, engine, _ = glmm.problem
    if model.data.n > MOST_CELLS:
        raise NotImplementedError(
            f"correlations are there for up to {MOST_CELLS} cells, these are {model.data.n}: take some of them, or one specimen at a time."
        )
    model, engine, mode = locate(model, engine, glmm.rule)
    theta = model.theta(mode.u[None])
    terms_ = {term.name: term for term in model.terms(theta)}
    posterior = engine.condition(list(terms_.values()), mode.sites)
    fixed = sum(
        (posterior.component_mean(t)[0] for n, t in terms_.items() if n not in {c.name for c in model.components}), 0.0
    )
    precision = mode.sites.precision[0]
    precision = precision.clamp(min=LEAST_SEEN * float(precision.max()))
    seen = mode.sites.shift[0] / precision - fixed
    roots = {c.name: _root(model, terms_[c.name], c.name) for c in model.components}
    residual = float(theta.values["sd_residual"]) ** 2 if "sd_residual" in model.own else None
    doubts = [] if mode.converged else [f"the search for the mode of {name!r} stopped early ({mode.message})"]
    if mode.at_bound:
        doubts.append(f"the mode of {', '.join(mode.at_bound)} of {name!r} is at the bound of what the data can tell")
    return Marginal(name, seen, 1 / precision, roots, residual, tuple(doubts))


def _root(model: Model, term: Term, name: str) -> Tensor:
    """Symmetric root of the component's covariance."""
    kernel = next(c.kernel for c in model.components if c.name == name)
    like, structure = model.data.offset, term.structure
    if isinstance(structure, Basis):
        matrix = structure.among(structure.phi)
    else:
        assert isinstance(structure, Dense)
        matrix = structure.dense(kernel.geometry(torch.arange(kernel.n, device=like.device)[None]))
    matrix = matrix.to(like).reshape(-1, kernel.n, kernel.n)[0]
    matrix = float(term.variance) * (unit_scale(matrix) if term.normalized else matrix)
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def correlations(one: Marginal, other: Marginal) -> list[Correlation]:
    """Of a pair, through every component of both; at the mode under a uniform prior, in Fisher's z, with its curvature."""
    shared = {name: one.roots[name] @ other.roots[name] for name in one.roots if name in other.roots}
    if one.residual is not None and other.residual is not None:
        shared[RESIDUAL] = torch.diag(torch.full_like(one.noise, math.sqrt(one.residual * other.residual)))
    total = [float(m.covariance.trace()) for m in (one, other)]
    absent = {
        name for name in shared if name != RESIDUAL
        and any(float(m.roots[name].square().sum()) < ABSENT * whole for m, whole in zip((one, other), total, strict=True))
    }  # fmt: skip
    names = [name for name in shared if name not in absent]
    found = dict.fromkeys(shared, (math.nan, math.nan))
    doubts = [*one.doubts, *other.doubts]
    if names:
        z = torch.cat([one.seen, other.seen])
        n, first, second = len(one.seen), one.covariance, other.covariance

        def negative(a: np.ndarray) -> tuple[float, np.ndarray]:
            at = torch.tensor(a, dtype=z.dtype, device=z.device, requires_grad=True)
            rho = torch.tanh(at)
            cross = torch.stack([rho[i] * shared[name] for i, name in enumerate(names)]).sum(0)
            whole = torch.cat([torch.cat([first, cross], 1), torch.cat([cross.mT, second], 1)])
            lower, info = torch.linalg.cholesky_ex(whole)
            if int(info):  # both residuals and fields at a correlation of one
                return math.inf, np.zeros_like(a)
            half = torch.linalg.solve_triangular(lower, z[:, None], upper=False)
            value = 0.5 * half.square().sum() + lower.diagonal().log().sum() + n * math.log(2 * math.pi)
            value = value - torch.log1p(-rho.square()).sum()
            (slope,) = torch.autograd.grad(value, at)
            return float(value.detach()), slope.cpu().numpy()

        best = minimize(negative, np.zeros(len(names)), jac=True, method="BFGS", options={"gtol": 1e-5})
        step = 1e-4
        bend = np.array(
            [(negative(best.x + step * e)[1] - negative(best.x - step * e)[1]) / (2 * step) for e in np.eye(len(names))]
        )
        values, vectors = np.linalg.eigh((bend + bend.T) / 2)
        if values[0] > 0 and np.isfinite(best.fun):
            spread = np.sqrt((vectors**2 / values).sum(1))
        else:
            spread = np.full(len(names), math.nan)
            doubts.append("the search ended where the posterior has no maximum")
        for name, a, sd in zip(names, best.x, spread, strict=True):
            found[name] = (math.tanh(a), float(sd * (1 - math.tanh(a) ** 2)))
    said = "; ".join(doubts) or "converged"
    return [
        Correlation(name, *pair, f"{name!r} is absent from one of the two" if name in absent else said)
        for name, pair in found.items()
    ]


def check_names(names: Sequence[str]) -> None:
    """At least two responses, each once."""
    if isinstance(names, str) or len(names) < 2 or len(set(names)) < len(names):
        raise DataError(f"fates are {names!r}, wanted a list of two or more names, each once.")


def table_of(found: Mapping[tuple[str, str], Sequence[Correlation]]) -> dict[str, list]:
    """Columns of a tidy table, a row per pair and component."""
    rows = [(*pair, c.component, c.estimate, c.se, c.status) for pair, some in found.items() for c in some]
    columns = ("response", "other", "component", "correlation", "se", "status")
    return {column: [row[i] for row in rows] for i, column in enumerate(columns)}
