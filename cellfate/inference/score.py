r"""Is a component there at all, given the others? Score tests from the fit without it.

The score of a variance at zero is :math:`(b'Kb - tr(RK)) / 2`, with `b` what the sites of the null fit leave unexplained, b ~ N(0, R).
So b'Kb is a sum of chi-squares weighted by the eigenvalues of R K, and its tail is no mixture of 0 and 1 degrees of freedom: with one
tree, or one field, all cells are one dependent cluster. The variances of the null model are estimated: the score is less variable by
what its efficient information says (Zhang & Lin 2003), and the distribution is narrowed about its mean by as much. Where the component
has a shape (a length-scale), which the null model does not know, a grid of them is tested and the p-values are combined by Cauchy's
rule (Liu & Xie 2020), which holds under any dependence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import chi2, norm
from torch import Tensor

from cellfate.engines.base import Engine
from cellfate.inference.free_energy import evaluate
from cellfate.inference.identifiability import Operator, prior_times, slopes
from cellfate.inference.mode import Mode
from cellfate.inference.report import mode_values
from cellfate.inference.sites import Rule
from cellfate.kernels.base import Component, Term
from cellfate.model.glmm import RESIDUAL, Model

EXACT, PROBES = 2000, 128  # cells up to which all eigenvalues are taken, and random vectors for their moments beyond
SETTLED = 1e-6  # of the sites of the null fit
HIGHEST = 0.99  # p-value that is combined with others
BETWEEN = (0.15, 0.4, 0.65, 0.9)  # the bounds of a shape, where it is looked at


@dataclass(frozen=True)
class Score:
    """p-value of one component given the others, and at each shape that was looked at."""

    p: float
    each: tuple[float, ...]
    shapes: tuple[dict[str, float], ...]


class Null:
    """A fit without the component in question, ready to be asked: at its mode, with settled sites."""

    def __init__(self, model: Model, engine: Engine, rule: Rule, mode: Mode) -> None:
        theta = model.theta(mode.u[None])
        here = evaluate(model, engine, theta, rule, start=mode.sites, tolerance=SETTLED)
        self.model, self.engine, self.posterior, self.terms = model, engine, here.posterior, here.terms
        self.b = here.posterior.weights[0]
        values = self.values = mode_values(model, mode)
        own = [f"variance_{RESIDUAL}" if name == f"sd_{RESIDUAL}" else name for name in model.own]
        self.own = {name: values[name] for name in own}  # hyperparameters of the family
        names = [f"variance_{c.name}" for c in model.components]
        shapes = [h.parameter(c.name) for c in model.components for h in c.kernel.hyperparameters if h.fixed is None]
        at = {name: values[name] for name in (*names, *shapes)} | self.own
        self.nuisance = list(slopes(model, engine, at).values())

    def residual(self, x: Tensor) -> Tensor:
        """R x for columns x (n, k)."""
        return self.posterior.residual(x[None])[0]


@torch.no_grad()
def score_test(null: Null, engine: Engine, component: Component) -> Score:
    """Test a component that the null fit does not have; `engine` answers for it alone."""
    shapes, operators = tested(null, engine, component)
    each = [_p_value(null, k) for k in operators]
    return Score(cauchy(each), tuple(each), tuple(shapes))


def tested(null: Null, engine: Engine, component: Component) -> tuple[list[dict[str, float]], list[Operator]]:
    """The shapes of a component that are looked at, and its covariance at a variance of one and each of them."""
    shapes, operators = _shapes(component), []
    for shape in shapes:
        like = null.b
        lent = {name: null.values[name] for name in component.kernel.borrowed}  # shapes of components of the null model
        values = {name: like.new_tensor([value]) for name, value in {**shape, **lent}.items()}
        term = Term(
            component.name, component.kernel.structure(values, like), like.new_ones(1), component.kernel.normalized
        )
        operators.append(prior_times(engine, term, like))
    return shapes, operators


def _shapes(component: Component) -> list[dict[str, float]]:
    """Values of the hyperparameters of a kernel that are looked at."""
    axes = []
    for h in component.kernel.hyperparameters:
        if h.fixed is not None:
            axes.append([(h.name, h.fixed)])
        elif h.scale == "log":
            axes.append([(h.name, h.lower * (h.upper / h.lower) ** share) for share in BETWEEN])
        else:
            axes.append([(h.name, h.lower + (h.upper - h.lower) * share) for share in BETWEEN])
    return [dict(point) for point in product(*axes)]


def _p_value(null: Null, k: Operator) -> float:
    n, like = len(null.b), null.b
    q = float(null.b @ k(null.b[:, None])[:, 0])
    exact = n <= EXACT
    x, scale = torch.eye(n).to(like), 1.0
    if not exact:
        signs = torch.randint(2, (n, PROBES), generator=torch.Generator().manual_seed(0))
        x, scale = (2.0 * signs - 1.0).to(like), 1 / PROBES
    rx = null.residual(x)
    krx = k(rx)
    own = float((krx * null.residual(k(x))).sum()) * scale  # tr(K R K R)
    mean = float((x * krx).sum()) * scale
    taken = 0.0
    if null.nuisance:
        first, second = [d(rx) for d in null.nuisance], [null.residual(d(x)) for d in null.nuisance]
        kr = null.residual(k(x))
        cross = np.array([float((d * kr).sum()) * scale for d in first])
        between = np.array([[float((a * b).sum()) * scale for b in second] for a in first])
        taken = float(cross @ np.linalg.lstsq((between + between.T) / 2, cross, rcond=None)[0])
    # what estimating the others takes from the spread of the score
    narrower = np.sqrt(np.clip(1 - taken / own, 1e-6, 1.0))
    q = mean + (q - mean) / narrower
    if exact:
        return chi_square_mixture(_eigenvalues(rx, krx), q)
    second_moment, third = own, float((krx * null.residual(k(null.residual(krx)))).sum()) * scale
    return three_moments(mean, 2 * second_moment, 8 * third, q)


def _eigenvalues(r: Tensor, kr: Tensor) -> np.ndarray:
    """Of R K, from R and K R (n, n)."""
    lower, info = torch.linalg.cholesky_ex((r + r.mT) / 2 + 1e-12 * r.diagonal().mean() * torch.eye(len(r)).to(r))
    if bool(info):
        return torch.linalg.eigvals(kr).real.cpu().numpy()
    middle = torch.linalg.solve_triangular(lower, r @ kr, upper=False)  # L^-1 R K R L^-T = L' K L
    middle = torch.linalg.solve_triangular(lower, middle.mT, upper=False)
    return torch.linalg.eigvalsh((middle + middle.mT) / 2).cpu().numpy()


def chi_square_mixture(weights: np.ndarray, q: float) -> float:
    """P(sum of weights times chi-squares of one degree > q), by a saddlepoint (Kuonen 1999)."""
    weights = weights[np.abs(weights) > 1e-9 * np.abs(weights).max()]
    mean, sd = weights.sum(), np.sqrt(2 * (weights**2).sum())
    if abs(q - mean) < 1e-4 * sd:  # there the formula is 0 / 0, and the normal approximation with its skewness exact
        skew = 8 * (weights**3).sum() / sd**3
        return float(norm.sf((q - mean) / sd) - skew / 6 * norm.pdf(0.0))

    def slope(t: float) -> float:
        return float((weights / (1 - 2 * t * weights)).sum()) - q

    top, bottom = weights.max(), weights.min()
    high = (1 - 1e-10) / (2 * top) if top > 0 else 1e10 / sd
    low = (1 - 1e-10) / (2 * bottom) if bottom < 0 else -len(weights) / max(q, 1e-10 * sd)
    if slope(high) < 0:
        return 0.0
    if slope(low) > 0:
        return 1.0
    t = brentq(slope, low, high, xtol=1e-14 / sd)
    w = np.sign(t) * np.sqrt(max(2 * t * q + np.log1p(-2 * t * weights).sum(), 1e-300))
    v = t * np.sqrt(2 * ((weights / (1 - 2 * t * weights)) ** 2).sum())
    return float(np.clip(norm.sf(w + np.log(v / w) / w), 0.0, 1.0))


def three_moments(mean: float, variance: float, third: float, q: float) -> float:
    """The same from mean, variance and third central moment, by a chi-square that is scaled and moved."""
    skew = third / variance**1.5
    if skew < 1e-4:
        return float(norm.sf((q - mean) / np.sqrt(variance)))
    degrees = 8 / skew**2
    return float(chi2.sf(degrees + (q - mean) / np.sqrt(variance) * np.sqrt(2 * degrees), degrees))


def cauchy(p: Sequence[float]) -> float:
    """One p-value from several of any dependence; one near 1 does not outweigh one near 0."""
    clipped = np.clip(np.asarray(p), 1e-300, HIGHEST) if len(p) > 1 else np.clip(np.asarray(p), 1e-300, 1.0)
    small = clipped < 1e-15
    terms = np.where(small, 1 / (np.pi * clipped), np.tan(np.pi * (0.5 - clipped)))
    total = float(terms.mean())
    return float(1 / (np.pi * total)) if total > 1e15 else float(np.clip(0.5 - np.arctan(total) / np.pi, 0.0, 1.0))
