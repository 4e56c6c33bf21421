"""The scale of the fate itself: against QGglmm, closed forms and simulation."""

import numpy as np
import pytest
import torch

import cellfate as cf
from cellfate.model.catalog import get_family
from cellfate.model.categorical import contrasts
from cellfate.model.observation import ADDITIVE, OBSERVATION, observed, observed_levels
from cellfate.model.observation_fates import observed_fates
from tests.problem import double


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


@pytest.mark.parametrize("link", ["logit", "probit"])
def test_an_ordinal_fate_by_simulation(link):
    """Half of how many levels two cells are apart, and how much less it is where they share a component."""
    gaps, variances = (0.8, 1.5), {"lineage": 1.2, "spatial": 0.5}
    parts = {name: double([v]) for name, v in variances.items()}
    family = get_family("ordinal", link)
    found = observed_levels(family, double([[0.6]]), double([1.0]), parts, double([[list(gaps)]]))
    rng, count = np.random.default_rng(1), 400_000

    def draw():
        return {name: rng.normal(size=count) * v**0.5 for name, v in variances.items()}

    def level(fields):
        return family.simulate(0.6 + sum(fields.values()), rng=rng, gaps=gaps)

    one, other = draw(), draw()
    y, stranger = level(one), level(other)
    half = np.abs(y - stranger) / 2
    assert float(found.variance) == pytest.approx(half.mean(), abs=4 * half.std() / count**0.5)
    assert float(found.mean) == pytest.approx(y.mean(), abs=4 * y.std() / count**0.5)
    for name in variances:
        gained = half - np.abs(y - level({**other, name: one[name]})) / 2
        error = gained.std() / count**0.5
        assert float(found.parts[OBSERVATION][name]) == pytest.approx(gained.mean(), abs=4 * error)
    for scale in (OBSERVATION, ADDITIVE):
        assert float(sum(found.parts[scale].values())) == pytest.approx(float(found.variance), rel=1e-12)


def test_two_levels_are_a_yes_or_no():
    parts = {"lineage": double([1.2]), "spatial": double([0.5])}
    one = observed_levels(get_family("ordinal"), double([[0.6]]), double([1.0]), parts)
    other = observed(get_family("bernoulli"), double([[0.6]]), double([1.0]), parts)
    assert one.parts == other.parts


@pytest.mark.parametrize("lineage", [0.0, 1e-3, 0.5, 5.0])
@pytest.mark.parametrize("mu", [0.0, -2.0])
def test_two_fates_are_a_yes_or_no_twice(lineage, mu):
    """Quasi-random points against quadrature: a part is off by up to 0.3% of the variance."""
    fixed, weight = double([[mu, mu + 1]]), double([0.3, 0.7])
    variances = {"lineage": double([lineage]), "spatial": double([0.8]), "fixed": double([0.21])}
    found = observed_fates(2, fixed[..., None], weight, variances)
    known = observed(get_family("bernoulli"), 2**0.5 * fixed, weight, {name: 2 * v for name, v in variances.items()})
    total = 2 * float(known.variance)
    assert float(found.between + found.noise) == pytest.approx(total, rel=3e-3)
    for scale, parts in ((OBSERVATION, found.first), (ADDITIVE, found.additive)):
        for name in variances:
            assert float(parts[name]) == pytest.approx(2 * float(known.parts[scale][name]), abs=3e-3 * total)
    if not lineage:
        assert float(found.first["lineage"]) == 0.0


@pytest.mark.parametrize("per_fate", [False, True])
@pytest.mark.parametrize("levels", [3, 6])
def test_a_fate_out_of_several_by_simulation(levels, per_fate):
    """Parts as how much more often two cells that share a component have one fate."""
    rng, count, h = np.random.default_rng(levels), 300_000, contrasts(levels)
    mu, weight = rng.normal(size=(2, levels - 1)), np.array([0.4, 0.6])
    loading = {"lineage": np.eye(levels - 1), "spatial": np.eye(levels - 1)}
    fate_of, variances = {}, {"lineage": 1.5, "spatial": 0.6}
    if per_fate:
        loading = {f"lineage[{k}]": levels**0.5 * h[[k]].T for k in range(levels)}
        fate_of = {name: k for k, name in enumerate(loading)}
        variances = {name: 0.1 + 0.3 * k for k, name in enumerate(loading)}
    parts = {name: double([v]) for name, v in variances.items()} | {"fixed": double([1.0])}
    found = observed_fates(levels, double(mu)[None], double(weight), parts, fate_of)

    def draw():
        fields = {
            name: rng.normal(size=(count, a.shape[1])) * variances[name] ** 0.5 @ a.T for name, a in loading.items()
        }
        return {**fields, "fixed": mu[rng.choice(2, p=weight, size=count)]}

    def fate(fields):
        return get_family("categorical").simulate(sum(fields.values()) @ h.T, rng=rng)

    one, other = draw(), draw()
    y, stranger = fate(one), fate(other)
    alike = (y == stranger).astype(float)
    rough = 3e-3 * float(found.between + found.noise)
    assert float(found.between + found.noise) == pytest.approx(
        1 - alike.mean(), abs=4 * alike.std() / count**0.5 + rough
    )
    np.testing.assert_allclose(found.mean[0], np.bincount(y.astype(int), minlength=levels) / count, atol=0.005)
    for name in parts:
        gained = (y == fate({**other, name: one[name]})) - alike
        error = gained.std() / count**0.5
        assert float(found.first[name]) == pytest.approx(gained.mean(), abs=4 * error + rough), name


@pytest.mark.parametrize(
    ("family", "options"), [("ordinal", {}), ("categorical", {}), ("categorical", {"per_fate": True})]
)
@pytest.mark.filterwarnings("ignore::cellfate.CellfateWarning")
def test_shares_of_a_fit(family, options):
    """They sum to one, and the variance is what the fates show."""
    adata = cf.datasets.simulate(120, family=family, variance_lineage=0.5, variance_spatial=0.5, rng=0)
    adata.obs["x"] = np.random.default_rng(0).normal(size=120)
    priors = {f"sd_{name}": ("fixed", 0.5) for name in ("lineage", "spatial")}
    cf.tl.decompose(adata, "fate", family=family, formula="~ 1 + x", lengthscale=0.5, priors=priors, rng=0, **options)
    share = np.bincount(adata.obs["fate"]) / 120
    shown = 1 - (share**2).sum() if family == "categorical" else (share.cumsum() * (1 - share.cumsum())).sum()
    for scale in (OBSERVATION, ADDITIVE):
        table = cf.get.components(adata, scale=scale)
        assert table["share"].sum() == pytest.approx(1)
        assert table["variance"].sum() == pytest.approx(shown, rel=0.1)
        assert "fixed" in set(table["component"])
        assert (table.loc[table["component"].str.match("lineage|spatial"), "share"] > 0).all()


@pytest.mark.parametrize("per_fate", [False, True])
@pytest.mark.filterwarnings("ignore::cellfate.CellfateWarning")
def test_fates_without_an_intercept(per_fate):
    """All fates are alike: without a variance to speak of each has a third."""
    clone = {"clone": cf.kernels.Intercepts(np.arange(60) % 12)}
    names = [f"sd_clone[{k}]" for k in range(3)] if per_fate else ["sd_clone"]
    priors = dict.fromkeys(names, ("fixed", 0.001))
    fit = cf.GLMM("categorical", clone, priors=priors, per_fate=per_fate).fit(np.arange(60) % 3, rng=0)
    table = fit.components
    found = [v for scale, v in zip(table["scale"], table["variance"], strict=True) if scale == OBSERVATION]
    assert sum(found) == pytest.approx(2 / 3, rel=1e-5)
    assert max(found) == pytest.approx(2 / 3, rel=1e-5)
