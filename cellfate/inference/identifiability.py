"""What a design can tell, before any fate is looked at: from the kernels, the information that data of this kind would hold.

With sites of precision tau the marginal covariance of the (pseudo-)data is V = sum v_k K_k + 1/tau. The expected information on its
parameters, fixed effects integrated out, is tr(R D_j R D_k) / 2 with R the inverse of V and D_j its derivatives. Other shapes, such as
a length-scale, are nuisance parameters: what they take is not counted as known. Traces are exact for some cells and estimated by
random probes for many.

Power is that of the score test of a component given the other: its statistic, the derivative of the log-likelihood along the component
less what nuisance parameters can mimic of it, in draws of gaussian (pseudo-)data with the component and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from cellfate.engines.base import Engine, Sites
from cellfate.inference.report import told_apart
from cellfate.kernels.base import Term
from cellfate.model.glmm import FIXED, RESIDUAL, Model

EXACT, PROBES = 1500, 64  # cells up to which traces are exact, and random vectors beyond
DRAWS, FEWER = 2000, 512  # for power, to about 0.015 and 0.03; of more cells
STEP = 1e-3  # of a shape's coordinate, where it is differentiated
LEVEL = 0.05  # of the one-sided test whose power is told
Operator = Callable[[Tensor], Tensor]
PAIR = ("lineage", "spatial")


@dataclass(frozen=True)
class Expected:
    """Expected of a fit: `alignment` of the two kernels (1: one cannot be told from the other), standard errors of both variances and
    of the share of ancestry in what the two explain, correlation of the errors, power of a 5% test for each given the other.
    """

    alignment: float
    errors: dict[str, float]
    share: float
    error_share: float
    correlation: float
    power: dict[str, float]
    verdict: str


@torch.no_grad()
def expected(model: Model, engine: Engine, values: Mapping[str, float], precision: float) -> Expected:
    """At natural `values` of all hyperparameters by name, the residual variance apart, with sites of this `precision`.

    Where the model is gaussian the residual variance is estimated too.
    """
    n, like = model.data.n, model.data.offset
    x, scale = torch.eye(n).to(like), 1.0
    if n > EXACT:
        signs = torch.randint(2, (n, PROBES), generator=torch.Generator().manual_seed(0))
        x, scale = (2.0 * signs - 1.0).to(like), 1 / PROBES
    own = {"variance_residual": 1 / precision} if model.family.parameter == "variance_residual" else {}
    derivatives = slopes(model, engine, {**values, **own})

    def residual_at(changed: Mapping[str, float]) -> Operator:
        sites = Sites(like.new_full((1, n), precision), like.new_zeros(1, n))
        posterior = engine.condition(model.terms(model.from_natural({**values, **own, **changed})[0]), sites)
        return lambda y: posterior.residual(y[None])[0]

    def information(changed: Mapping[str, float]) -> np.ndarray:
        residual = residual_at(changed)
        first = [d(residual(x)) for d in derivatives.values()]
        second = [residual(d(x)) for d in derivatives.values()]
        traces = scale * torch.stack([torch.stack([(a * b).sum() for b in second]) for a in first])
        return ((traces + traces.mT) / 4).cpu().numpy()

    order = list(derivatives)
    places = [order.index(f"variance_{name}") for name in PAIR]
    weak = _weak(order, values)
    covariance = np.linalg.inv(information({}) + np.diag(weak))
    pair = covariance[np.ix_(places, places)]
    errors = dict(zip(PAIR, np.sqrt(np.diag(pair)).tolist(), strict=True))
    correlation = float(pair[0, 1] / np.sqrt(pair[0, 0] * pair[1, 1]))
    a, s = (values[f"variance_{name}"] for name in PAIR)
    slope = np.array([s, -a]) / (a + s) ** 2
    error_share = float(np.sqrt(slope @ pair @ slope))
    power, draws = {}, DRAWS if n <= EXACT else FEWER
    seeded, terms = torch.Generator().manual_seed(0), model.terms(model.from_natural({**values, **own})[0])
    nothing = Sites(like.new_zeros(1, n), like.new_zeros(1, n))
    drawn = engine.condition(terms, nothing).sample(terms, draws, [seeded])
    fields = {name: drawn[name][0] for name in PAIR}
    noise = torch.randn(n, draws, generator=seeded, dtype=torch.float64).to(like) / precision**0.5
    for name, place in zip(PAIR, places, strict=True):
        absent = {f"variance_{name}": 1e-8 * values[f"variance_{name}"]}
        part = information(absent)
        # a component that is absent has no shape to be estimated
        nuisance = [i for i, parameter in enumerate(order) if not parameter.endswith(f"_{name}")]
        known = part + np.diag(weak)
        mimic = np.linalg.solve(known[np.ix_(nuisance, nuisance)], part[nuisance, place])
        weight = {order[place]: 1.0} | dict(zip((order[i] for i in nuisance), -mimic, strict=True))
        others = sum((fields[one] for one in PAIR if one != name), start=noise)
        power[name] = _power(residual_at(absent), derivatives, weight, others, fields[name])
    centered = [derivatives[f"variance_{name}"](x - x.mean(0)) for name in PAIR]
    one, other = (k - k.mean(0) for k in centered)
    alignment = float((one * other).sum() / (one.norm() * other.norm()))
    width = 2 * norm.ppf(0.975) * error_share
    return Expected(
        alignment, errors, a / (a + s), error_share, correlation, power, told_apart(correlation, min(width, 1.0))
    )


def slopes(model: Model, engine: Engine, values: Mapping[str, float]) -> dict[str, Operator]:
    """Derivatives of the covariance of the data in its parameters, as operators on columns (n, k), at natural `values`.

    By name: variances, shapes of kernels in their logarithms, and `variance_residual` where there is one.
    """
    names = [c.name for c in model.components]

    def unit(changed: Mapping[str, float]) -> dict[str, Operator]:
        ones = {f"variance_{name}": 1.0 for name in names}
        terms = model.terms(model.from_natural({**values, **ones, **changed})[0])
        return {term.name: prior_times(engine, term, model.data.offset) for term in terms if term.name != FIXED}

    out: dict[str, Operator] = {f"variance_{name}": k for name, k in unit({}).items()}
    for component in model.components:
        for h in component.kernel.hyperparameters:
            parameter = h.parameter(component.name)
            if h.fixed is not None or parameter not in values:
                continue
            up, down = (
                unit({parameter: values[parameter] * np.exp(sign * STEP)})[component.name] for sign in (1.0, -1.0)
            )
            size = values[f"variance_{component.name}"] / (2 * STEP)
            out[parameter] = partial(_difference, up, down, size)
    if model.family.parameter == "variance_residual":
        out[f"variance_{RESIDUAL}"] = lambda y: y
    return out


def _difference(up: Operator, down: Operator, size: float, y: Tensor) -> Tensor:
    return size * (up(y) - down(y))


def prior_times(engine: Engine, term: Term, like: Tensor) -> Operator:
    """The covariance of one component, as an operator."""
    nothing = like.new_zeros(1, engine.n)
    prior = engine.condition([term], Sites(nothing, nothing))
    return lambda y: prior.prior_times(y[None])[0]


def _power(
    residual: Operator, derivatives: Mapping[str, Operator], weight: Mapping[str, float], others: Tensor, own: Tensor
) -> float:
    """How often the score along sum(weight D) calls at :data:`LEVEL`, in draws (n, draws) of (pseudo-)data without a component, `others`, and
    with its `own` added; residual: R without the component.
    """

    def score(y: Tensor) -> Tensor:
        found = []
        for part in y.split(PROBES, -1):
            z = residual(part)
            along = torch.stack([w * derivatives[name](z) for name, w in weight.items()]).sum(0)
            found.append((z * along).sum(0))
        return torch.cat(found)

    return float((score(others + own) > torch.quantile(score(others), 1 - LEVEL)).double().mean())


def _weak(order: list[str], values: Mapping[str, float]) -> np.ndarray:
    """Information without any data: a variance is known to ten times what there is in all, another parameter to a factor of ten."""
    total = sum(values[name] for name in order if name.startswith("variance_") and name in values)
    return np.array([1 / (10 * total) ** 2 if name.startswith("variance_") else 1 / np.log(10) ** 2 for name in order])
