"""The observation-level random effect: overdispersion as a component, where data can show it."""

import warnings

import numpy as np
import pytest
import torch

import cellfate as cf
from cellfate import CellfateWarning, DataError, cli
from cellfate.kernels import Component, Given, Intercepts
from tests.embryo import embryo

CLONES, SIZE, OWN, AMONG = 40, 8, 0.5, 0.4
N = CLONES * SIZE


def counts(seed=0):
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(CLONES), SIZE)
    eta = 1.5 + rng.normal(0, AMONG**0.5, CLONES)[codes] + rng.normal(0, OWN**0.5, N)
    return codes, rng.poisson(np.exp(eta)).astype(float), rng


@pytest.mark.parametrize("engine", ["dense", "structured"])
def test_overdispersion_is_found(engine):
    """Within 3 of its standard errors, the spread of 320 squares; a poisson mean of 4.5 adds about 1 / 4.5 to each."""
    codes, y, _ = counts()
    components = {"clone": Intercepts(codes), "olre": Intercepts(np.arange(N))}
    fit = cf.GLMM("poisson", components, engine=engine).fit(y, np.ones((N, 1)), rng=0)
    assert abs(fit.mode["variance_olre"] - OWN) < 3 * (OWN + 1 / 4.5) * np.sqrt(2 / N)
    assert abs(fit.mode["variance_clone"] - AMONG) < 3 * (AMONG + (OWN + 1 / 4.5) / SIZE) * np.sqrt(2 / CLONES)
    without = cf.GLMM("poisson", {"clone": Intercepts(codes)}, engine=engine).fit(y, np.ones((N, 1)), rng=0)
    assert fit.log_evidence > without.log_evidence + 20


def test_it_is_the_identity():
    """The same fit as with the covariance given: nothing comes from its being stored as a diagonal."""
    codes, y, rng = counts(1)
    some = np.sort(rng.permutation(N)[:80])
    codes = np.unique(codes[some], return_inverse=True)[1]
    for family, trials in (("poisson", None), ("binomial", 12)):
        seen = y[some] if trials is None else np.minimum(y[some], trials)
        found = [
            cf.GLMM(family, [Component("clone", Intercepts(codes)), Component("olre", kernel)], engine="dense").fit(
                seen, np.ones((80, 1)), trials=trials, rng=0
            )
            for kernel in (Intercepts(np.arange(80)), Given(torch.eye(80, dtype=torch.float64)))
        ]
        assert found[0].free_energy == pytest.approx(found[1].free_energy, abs=1e-7)
        assert found[0].mode == pytest.approx(found[1].mode, rel=1e-5)
        np.testing.assert_allclose(found[0].effects["olre"], found[1].effects["olre"], atol=1e-4)


def test_it_needs_no_column():
    """A hundred thousand cells: as columns these would be 80 GB."""
    n = 100_000
    structure = Intercepts(np.arange(n)).structure({}, torch.zeros(0, dtype=torch.float64))
    assert structure.variances.shape == (n,)
    assert Intercepts(np.arange(n)).expected_variance == pytest.approx(1.0)


def test_from_anndata():
    adata = embryo()
    cf.tl.decompose(adata, "count", family="poisson", olre=True, spatial=None, rng=0)
    assert list(cf.get.components(adata)["component"]) == ["lineage", "olre"]
    assert cf.get.params(adata)["olre"]
    assert {"olre_mean", "olre_sd"} <= set(cf.get.effects(adata))
    assert "variance_olre" in cf.get.draws(adata)


@pytest.mark.parametrize(
    ("fate", "arguments", "said"),
    [
        ("size", {"family": "gaussian"}, "'olre' is an effect of its own for every cell, which is what the residual"),
        ("on", {"family": "bernoulli"}, "one yes or no per cell cannot show one"),
        ("on", {"family": "binomial", "trials": 1}, "one yes or no per cell cannot show one"),
    ],
)
def test_where_it_cannot_be_told(fate, arguments, said):
    with pytest.raises(DataError, match=said):
        cf.tl.decompose(embryo(), fate, olre=True, **arguments)


def test_two_names_of_one_thing():
    n, y = 40, np.arange(40.0) % 7
    twice = {"cell": Intercepts(np.arange(n)), "olre": Intercepts(np.arange(n)[::-1].copy())}
    with pytest.raises(DataError, match=r"components \['cell', 'olre'\] are each an effect of its own"):
        cf.GLMM("poisson", twice).fit(y)
    with pytest.warns(CellfateWarning, match="same variation as the dispersion of the negative binomial") as said:
        cf.GLMM("negative_binomial", {"olre": Intercepts(np.arange(n))}).on(y)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", CellfateWarning)
        cf.GLMM("poisson", {"olre": Intercepts(np.arange(n))}).on(y)
    with pytest.warns(CellfateWarning, match="lineage_kernel='pagel' with olre=True"):
        cf.tl.decompose(embryo(), "count", family="poisson", olre=True, lineage_kernel="pagel", spatial=None, rng=0)


def test_on_the_command_line():
    start = ["decompose", "in.h5ad", "--fate", "count", "--family", "poisson", "--out", "out.h5ad"]
    assert vars(cli.parser().parse_args([*start, "--olre"]))["olre"] is True
    assert "olre" not in vars(cli.parser().parse_args(start))
