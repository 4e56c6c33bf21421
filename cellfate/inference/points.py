"""What is computed at one point of the hyperparameters, and kept of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cellfate._runtime import logger, out_of_memory, progress
from cellfate.engines.base import Engine, Sites
from cellfate.inference.free_energy import Evaluation, evaluate, likelihood_at, log_evidence
from cellfate.inference.mode import LARGE, Mode, at_once
from cellfate.inference.sites import Laplace, Likelihood, Rule
from cellfate.kernels.base import Term
from cellfate.model.glmm import FIXED, RESIDUAL, Model
from cellfate.model.partition import SHARED

LOOSE, LOOSER = 0.01, 0.03  # of site updates, means in sds and the free energy in nats; with many cells
SLOW = 0.003  # the same where a cell has several fields: with many cells those settle slowly, and couplings between cells with them
# draws of the fields at each point, for realized variances and the spread of effects; of large fields
FIELDS, FEWER = 16, 6
KNOWN = 2  # of the latter, that are divided among the components: over many cells a sample variance hardly differs between draws


@dataclass
class Points:
    """What is kept of each evaluated point."""

    u: np.ndarray
    log_posterior: np.ndarray
    means: dict[str, np.ndarray]  # (points, n)
    spreads: dict[str, np.ndarray]  # (points, n), posterior variance estimated from the draws of the fields
    beta: np.ndarray
    beta_factor: np.ndarray
    realized: dict[str, np.ndarray]  # (points, fields)
    unsettled: int

    @staticmethod
    def join(parts: list[Points]) -> Points:
        first = parts[0]
        return Points(
            np.concatenate([p.u for p in parts]),
            np.concatenate([p.log_posterior for p in parts]),
            {k: np.concatenate([p.means[k] for p in parts]) for k in first.means},
            {k: np.concatenate([p.spreads[k] for p in parts]) for k in first.spreads},
            np.concatenate([p.beta for p in parts]),
            np.concatenate([p.beta_factor for p in parts]),
            {k: np.concatenate([p.realized[k] for p in parts]) for k in first.realized},
            sum(p.unsettled for p in parts),
        )


def predicted_sites(mode: Mode, likelihood: Likelihood, u: Tensor, rule: Rule) -> Sites:
    """Sites at points u (points, d), from the posterior moments extrapolated linearly from the mode."""
    step = u - mode.u
    mean = mode.mean + step @ mode.mean_slope
    log_variance = mode.log_variance + (step @ mode.log_variance_slope).clamp(-3.0, 3.0)
    e = likelihood.at(mean) if isinstance(rule, Laplace) else likelihood.expect(mean, log_variance.exp())
    precision = e.precision.clamp(min=0.0)
    return Sites(precision, precision * mean + e.slope)


@torch.no_grad()
def evaluate_points(
    model: Model, engine: Engine, rule: Rule, mode: Mode, u: np.ndarray, rng: np.random.Generator
) -> Points:
    """Free energy and summaries at points u (points, d), as many at once as memory allows."""
    at = torch.as_tensor(u, dtype=mode.u.dtype, device=mode.u.device)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in rng.integers(2**62, size=len(u))]
    parts, size, done = [], at_once(model, engine), 0
    with progress(total=len(u), desc="hyperposterior", unit="point") as bar:
        while done < len(u):
            chunk = slice(done, done + size)
            try:
                parts.append(_chunk(model, engine, rule, mode, at[chunk], generators[chunk]))
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not out_of_memory(error):
                    raise
                size = max(1, size // 2)  # points do not depend on their company
                logger.info("out of memory: %d hyperparameter points at once from here on", size)
                continue
            bar.update(len(at[chunk]))
            done += size
    return Points.join(parts)


def _chunk(
    model: Model, engine: Engine, rule: Rule, mode: Mode, u: Tensor, generators: list[torch.Generator]
) -> Points:
    theta = model.theta(u)
    start = predicted_sites(mode, likelihood_at(model, theta), u, rule)
    tolerance = LOOSE if model.data.n <= LARGE else SLOW if model.family.dear else LOOSER
    here = evaluate(model, engine, theta, rule, start=start, tolerance=tolerance)
    return _keep(model, engine, u, here, log_evidence(model, here, rule) + model.log_prior(u), generators)


def _keep(
    model: Model, engine: Engine, u: Tensor, here: Evaluation, value: Tensor, generators: list[torch.Generator]
) -> Points:
    posterior, terms = here.posterior, here.terms
    means = {term.name: posterior.component_mean(term) for term in terms}
    count = FEWER if model.data.n > LARGE else FIELDS
    fields = posterior.sample(terms, count, generators)
    spreads = {name: (fields[name] - mean[..., None]).square().mean(-1).cpu().numpy() for name, mean in means.items()}
    beta, factor = _beta(model, here)
    if model.data.n > LARGE:
        fields, count = {name: x[..., :KNOWN] for name, x in fields.items()}, KNOWN
    parts = of_known_field(engine, terms, fields, posterior.prior)
    if here.theta.beta is not None and here.theta.beta.shape[1]:
        parts[FIXED] = (here.theta.beta @ model.data.design.mT)[..., None].expand(-1, -1, count)

    def spread(x: Tensor) -> np.ndarray:
        """Sample variance over the cells, on average over copies."""
        x = x.unflatten(-2, (model.data.copies, -1))
        return x.var(-2).mean(-2).cpu().numpy()

    realized = {name: spread(part) for name, part in parts.items()}
    realized[SHARED] = spread(torch.as_tensor(sum(parts.values()))) - sum(realized.values())
    if model.family.parameter == "variance_residual":
        residual = here.theta.values["sd_residual"].square().cpu().numpy()
        realized[RESIDUAL] = np.repeat(residual[:, None], count, axis=1)
    return Points(
        u=u.cpu().numpy(),
        log_posterior=value.cpu().numpy(),
        means={name: mean.cpu().numpy() for name, mean in means.items()},
        spreads=spreads,
        beta=beta,
        beta_factor=factor,
        realized=realized,
        unsettled=int((here.fit.status != 0).sum()),
    )


def of_known_field(
    engine: Engine, terms: list[Term], fields: dict[str, Tensor], prior: object | None = None
) -> dict[str, Tensor]:
    """What each component is expected to hold of draws (points, n, count) of the whole field, if the field were known.

    K_k K^-1 u. Draws of the components themselves would never show what two of them explain alike: where one has more of it in a
    draw, the other has less. Of a field that is known, two components of one kernel are expected to hold half each.
    """
    whole = torch.as_tensor(sum(fields.values()))
    tiny = torch.finfo(whole.dtype).eps ** 0.5 * whole.var(-2).mean(-1, keepdim=True)
    precision = (1 / tiny.clamp(min=torch.finfo(whole.dtype).tiny ** 0.5)).expand(whole.shape[:-1])
    known = engine.condition(terms, Sites(precision, torch.zeros_like(precision)), prior)
    weights = known.residual(whole)
    parts = {term.name: known.component_times(term, weights) for term in terms if term.name != FIXED}
    if len(parts) < len(terms):
        # all parts are K R u = u - R u / precision; a product with a wide prior would have fewer digits than what the others leave
        parts[FIXED] = whole - weights / precision[..., None] - torch.as_tensor(sum(parts.values()))
    return parts


def _beta(model: Model, here: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Mean (points, p) and lower factor (points, p, p) of the fixed effects at each point; no spread where they are parameters."""
    points, p = here.free_energy.shape[0], model.data.design.shape[1]
    for term in here.terms:
        if term.name == FIXED:
            mean, covariance = here.posterior.coefficients(term)
            sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
            correlation = covariance / (sd[..., :, None] * sd[..., None, :])
            factor, info = torch.linalg.cholesky_ex(correlation)
            factor = torch.where((info != 0)[:, None, None], torch.full_like(factor, torch.nan), factor)
            return mean.cpu().numpy(), (sd[..., None] * factor).cpu().numpy()
    beta = np.zeros((points, p)) if here.theta.beta is None else here.theta.beta.cpu().numpy()
    return beta, np.zeros((points, p, p))
