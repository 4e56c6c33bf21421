"""The scale of the fate itself: against QGglmm, closed forms and simulation."""

import numpy as np
import pytest
import torch

from cellfate.model.catalog import get_family
from cellfate.model.observation import ADDITIVE, OBSERVATION, observed


def of(family, mu, variances, phi=None, weight=None):
    fixed = torch.as_tensor(np.atleast_2d(mu), dtype=torch.float64)
    weight = torch.ones(1, dtype=torch.float64) if weight is None else torch.as_tensor(weight)
    parts = {name: torch.tensor([v], dtype=torch.float64) for name, v in variances.items()}
    return observed(get_family(family, None), fixed, weight, parts, None if phi is None else torch.tensor([[phi]]))


@pytest.mark.parametrize(
    ("family", "mu", "additive", "total", "mean", "variance", "share"),
    [
        ("poisson", 0.89, 0.54, 1.05, 4.116486, 35.59524, 0.2570723),
        ("bernoulli", 0.5, 0.5, 1.0, 0.6020271, 0.2395905, 0.08263184),
    ],
)
def test_against_qgglmm(family, mu, additive, total, mean, variance, share):
    """Numbers of the R package QGglmm (de Villemereuil et al. 2016), to the digits that they are stored with."""
    found = of(family, mu, {"lineage": additive, "spatial": total - additive})
    assert float(found.mean) == pytest.approx(mean, rel=1e-6)
    assert float(found.variance) == pytest.approx(variance, rel=1e-6)
    assert float(found.parts[ADDITIVE]["lineage"] / found.variance) == pytest.approx(share, rel=1e-6)


def test_intraclass_correlation_of_counts():
    found = of("poisson", 1.0, {"lineage": 0.8, "spatial": 0.2})
    assert float(found.parts[OBSERVATION]["lineage"] / found.variance) == pytest.approx(0.6312627, rel=1e-6)


@pytest.mark.parametrize(("family", "phi"), [("bernoulli", None), ("negative_binomial", 0.7), ("beta", 6.0)])
def test_against_simulation(family, phi):
    """First-order parts as half the squared difference between responses that share one component, and nothing else."""
    mu, weight = np.array([-0.6, 0.4]), np.array([0.3, 0.7])
    variances = {"lineage": 0.8, "spatial": 0.4, "fixed": float(weight @ (mu - weight @ mu) ** 2)}
    found = of(family, mu, variances, phi, weight)
    rng, count = np.random.default_rng(0), 400_000
    own = {"dispersion": phi} if family == "negative_binomial" else {"precision": phi}
    fate = get_family(family, None)

    def draw():
        return (
            rng.choice(mu, p=weight, size=count),
            rng.normal(size=count) * variances["lineage"] ** 0.5,
            rng.normal(size=count) * variances["spatial"] ** 0.5,
        )

    one, other = draw(), draw()
    y = fate.simulate(sum(one), rng=rng, **own)
    assert float(found.mean) == pytest.approx(y.mean(), abs=4 * y.std() / count**0.5)
    square = (y - y.mean()) ** 2
    assert float(found.variance) == pytest.approx(y.var(), abs=4 * square.std() / count**0.5)
    for i, name in enumerate(["fixed", "lineage", "spatial"]):
        mixed = [a if i == j else b for j, (a, b) in enumerate(zip(one, other, strict=True))]
        product = (y - y.mean()) * (fate.simulate(sum(mixed), rng=rng, **own) - y.mean())
        error = product.std() / count**0.5
        assert float(found.parts[OBSERVATION][name]) == pytest.approx(product.mean(), abs=4 * error), name


@pytest.mark.parametrize("scale", [OBSERVATION, ADDITIVE])
def test_parts_sum_to_the_variance_and_none_is_negative(scale):
    for family, phi in (("bernoulli", None), ("poisson", None), ("beta", 2.0)):
        found = of(family, 0.3, {"lineage": 2.0, "spatial": 1e-9, "clone": 0.5}, phi)
        parts = found.parts[scale]
        assert float(sum(parts.values())) == pytest.approx(float(found.variance), rel=1e-12)
        assert min(float(x) for x in parts.values()) > -1e-9
