r"""Several trees of the same cells: the posterior under each of them, pooled as a mixture.

The tree is one more unknown. With :math:`w_t` the weight of tree *t*,
:math:`p(\theta, \eta \mid y) = \sum_t w_t\, p(\theta, \eta \mid y, t)`; where trees are equally likely before,
:math:`w_t \propto p(y \mid t)`, the evidence (Bayesian model averaging, Hoeting, Madigan, Raftery & Volinsky 1999; over the trees
of a comparative analysis, Huelsenbeck, Rannala & Masly 2000). Weights that are all the same take the trees for draws of what is
known of the tree without this fate, as de Villemereuil, Wells, Edwards & Blomberg (2012) and, by Rubin's rules, Nakagawa & de
Villemereuil (2019) do. Draws are taken from those under each tree, not averaged, so that a mixture of two peaks has two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import logsumexp

from cellfate.inference.hyperposterior import DRAWS, Hyperposterior
from cellfate.inference.importance import systematic
from cellfate.inference.report import Integrated, doubts_of
from cellfate.model.partition import divided, latent

FEW_TREES = 1.5  # effective ones, below which one tree has it all
SHARES = ("lineage", "spatial")  # of which each tree tells its own


@dataclass(frozen=True)
class Told:
    """What one tree says by itself: mean and sd of the shares of ancestry and neighborhood, and what is in doubt."""

    log_evidence: float
    shares: dict[str, tuple[float, float]]
    status: str


def told_by(found: Integrated) -> Told:
    """What there is to say of the fit under one tree."""
    posterior = found.posterior
    parts = latent(found.model, posterior.values, posterior.beta)
    each, shares = divided(parts), {}
    for base in SHARES:
        own = [x for name, x in each.items() if name.split("[")[0] == base]  # of every fate, where each has its own
        if own:
            share = np.sum(own, axis=0)
            shares[base] = float(share.mean()), float(share.std())
    doubts = doubts_of(found.mode, posterior, parts, found.approximate)
    return Told(posterior.log_evidence, shares, "; ".join(doubts) or "converged")


def evidence_weights(log_evidence: np.ndarray) -> np.ndarray:
    """Posterior probabilities of trees that are equally likely before."""
    return np.exp(log_evidence - logsumexp(log_evidence))


def effective_trees(weight: np.ndarray) -> float:
    """How many trees of equal weight would be as good as these."""
    return float(1 / (weight**2).sum())


def between_and_within(told: Sequence[Told], weight: np.ndarray, component: str) -> tuple[float, float]:
    """Variance of a share that comes from the tree, and the rest of it: the law of total variance."""
    mean, sd = np.array([one.shares[component] for one in told]).T
    return float(weight @ (mean - weight @ mean) ** 2), float(weight @ sd**2)


def pool(found: Sequence[Integrated], weight: np.ndarray, prior: np.ndarray, rng: np.random.Generator) -> Integrated:
    """The mixture over trees, with the model and the mode of the tree that has the most evidence.

    weight: (trees,) of each in the mixture; prior: (trees,) its probability before, for the evidence. Both sum to one. The model
    is that of one tree, but nothing that is reported depends on which: kernels of trees are scaled alike.
    """
    # by what was found, not by how they came: the order of the trees does not change a digit
    order = np.lexsort((weight, np.array([one.mode.free_energy for one in found])))
    ranked = [found[i] for i in order]
    posterior = _mixture([one.posterior for one in ranked], weight[order], prior[order], rng)
    best = max(ranked, key=lambda one: np.nan_to_num(one.posterior.log_evidence, nan=one.mode.free_energy))
    evaluations = sum(one.mode.evaluations + one.posterior.evaluations for one in found)
    return replace(best, posterior=posterior, facts=best.facts | {"evaluations": evaluations})


def _mixture(
    posteriors: Sequence[Hyperposterior], weight: np.ndarray, prior: np.ndarray, rng: np.random.Generator
) -> Hyperposterior:
    size = [len(p.beta) for p in posteriors]
    along = systematic(np.repeat(weight / size, size), DRAWS, rng)  # of each tree its part, to within one draw
    ends = np.cumsum(size)
    # draws in one place under two trees are alike: each tree leaves out others
    shuffled = np.concatenate([end - s + rng.permutation(s) for end, s in zip(ends, size, strict=True)])
    order = rng.permutation(DRAWS)
    chosen, even = shuffled[along][order], along[order]  # realized variances lie point by point, and are thinned evenly

    def by_name(parts: Sequence[Mapping[str, np.ndarray]], rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.concatenate([part[name] for part in parts])[rows] for name in parts[0]}

    effects = {}
    for name in posteriors[0].effects:
        means, sds = (np.stack([p.effects[name][i] for p in posteriors]) for i in (0, 1))
        mean = weight @ means
        effects[name] = mean, np.sqrt(weight @ (sds**2 + (means - mean) ** 2))
    used = weight > 0
    drawn = [
        p for p, w in zip(posteriors, weight, strict=True) if w * DRAWS >= 0.5
    ] or posteriors  # of others there is no draw
    independent = np.array([p.effective_draws for p in posteriors])[used]
    return Hyperposterior(
        values=by_name([p.values for p in posteriors], chosen),
        beta=np.concatenate([p.beta for p in posteriors])[chosen],
        effects=effects,
        realized=by_name([p.realized for p in posteriors], even),
        log_evidence=float(logsumexp([p.log_evidence for p in posteriors], b=prior)),
        pareto_k=max(p.pareto_k for p in drawn),
        interpolation_error=max(p.interpolation_error for p in drawn),
        effective_draws=min(float(DRAWS), float(1 / (weight[used] ** 2 / independent).sum())),
        evaluations=sum(p.evaluations for p in posteriors),
        unsettled=sum(p.unsettled for p in posteriors),
    )
