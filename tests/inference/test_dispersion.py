"""Dispersions of many count responses: the trend that made them is found, and estimates come nearer to the truth with it."""

import math

import numpy as np
import pytest

import cellfate as cf
from cellfate.errors import DataError
from cellfate.inference.dispersion import FEWEST, dispersion_trend, mean_count
from cellfate.inference.many import Responses, chunks, fit_many

N, GENES = 90, 24
A0, A1, SPREAD = 0.3, 0.6, 0.3

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.CellfateWarning")


@pytest.fixture(scope="module")
def genes():
    """Counts (n, genes) in 30 clones, whose variance an estimate from counts alone would take for dispersion."""
    rng = np.random.default_rng(11)
    clone = np.arange(N) % 30
    mean = np.exp(rng.uniform(math.log(0.4), math.log(8.0), GENES))
    dispersion = (A0 + A1 / mean) * np.exp(SPREAD * rng.standard_normal(GENES))
    effect = 0.8 * rng.standard_normal((30, GENES))
    rate = mean * np.exp(effect[clone] - 0.32)
    counts = rng.poisson(rate * rng.gamma(1 / dispersion, dispersion, size=(N, GENES))).astype(float)
    return clone, counts, mean, dispersion, [f"g{i}" for i in range(GENES)]


@pytest.fixture(scope="module")
def glmm(genes):
    return cf.GLMM("negative_binomial", {"clone": cf.kernels.Intercepts(genes[0])})


def reader(counts):
    return lambda part: [counts[:, i] for i in range(*part.indices(counts.shape[1]))]


def test_trend_is_found(glmm, genes):
    _, counts, mean, _, names = genes
    ready = Responses(glmm, GENES, N, np.ones((N, 1))).ready()
    trend = dispersion_trend(names, reader(counts), chunks(GENES, N, "auto"), ready.estimates)
    for at in (mean.min(), np.median(mean), mean.max()):
        # 24 genes, each with a spread of 0.3 and an error of about 0.6: known to 0.7 / sqrt(24) in the middle and twice that at
        # the ends; three of these
        error = math.log(trend.a0 + trend.a1 / at) - math.log(A0 + A1 / at)
        assert abs(error) < 3 * 0.14 * (1 if at == np.median(mean) else 2)
    assert 0.5 <= trend.sd < 1.0


@pytest.fixture(scope="module")
def shrunken(glmm, genes):
    return list(fit_many(glmm, genes[4], reader(genes[1]), np.ones((N, 1)), n=N, seed=1))


def test_estimates_come_nearer_to_the_truth(shrunken, glmm, genes):
    _, counts, _, dispersion, names = genes
    X = np.ones((N, 1))
    shrunk = np.array([f.mode["dispersion"] for f in shrunken])
    halves = (slice(0, FEWEST - 8), slice(FEWEST - 8, GENES))  # each too few for a trend
    alone = [f for part in halves for f in fit_many(glmm, names[part], reader(counts[:, part]), X, n=N, seed=1)]
    free = np.array([f.mode["dispersion"] for f in alone])
    assert "dispersion_trend" not in alone[0].diagnostics

    def error(x):
        return np.sqrt(np.mean(np.log(x / dispersion) ** 2))

    assert error(shrunk) < 0.9 * error(free)


def test_order_and_chunks_change_nothing(shrunken, glmm, genes):
    _, counts, _, _, names = genes
    one = {f.components["response"][0]: f for f in shrunken}
    for fit in fit_many(glmm, names[::-1], reader(counts[:, ::-1]), np.ones((N, 1)), n=N, seed=1, chunk_size=5):
        mine = one[fit.components["response"][0]]
        assert fit.mode == mine.mode
        assert fit.components == mine.components


def test_own_prior_stands(genes):
    clone, counts, _, _, names = genes
    held = cf.GLMM("negative_binomial", {"clone": cf.kernels.Intercepts(clone)}, priors={"dispersion": ("fixed", 0.4)})
    fit = next(fit_many(held, names[:21], reader(counts), np.ones((N, 1)), n=N, seed=1))
    assert "dispersion_trend" not in fit.diagnostics


def test_mean_of_a_silent_response_is_not_zero():
    counts = np.array([2.0, 4.0, 0.0])
    assert mean_count(counts) == pytest.approx(6 / 3)
    assert mean_count(np.zeros(4)) == pytest.approx(0.5 / 4)


def test_a_response_that_cannot_be_read_has_no_part_in_it(glmm, genes):
    _, counts, _, _, names = genes

    def read(part):
        return [DataError("no") if i == 3 else counts[:, i] for i in range(*part.indices(GENES))]

    ready = Responses(glmm, GENES, N, np.ones((N, 1))).ready()
    trend = dispersion_trend(names, read, chunks(GENES, N, 7), ready.estimates)
    assert trend is not None
