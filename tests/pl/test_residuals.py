"""What is drawn is what `cf.tl.check` found."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PathCollection

import cellfate as cf
from cellfate import CellfateWarning, DataError


@pytest.fixture(scope="module")
def checked():
    adata = cf.datasets.simulate(80, family="binomial", rng=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)
        cf.tl.decompose(adata, "fate", family="binomial", trials="trials", lengthscale=0.5, rng=0)
    cf.tl.check(adata, draws=4, folds=4, n_perm=19, rng=0)
    return adata


def test_points_are_those_of_the_tables(checked, tmp_path):
    panels = cf.pl.residuals(checked, show=False, save=tmp_path / "residuals.png")
    assert (tmp_path / "residuals.png").stat().st_size > 10_000
    quantiles, patterns, calibration = panels
    drawn = quantiles.lines[-1].get_ydata()
    np.testing.assert_allclose(drawn, np.sort(checked.obs["cellfate_residual"]))
    table = cf.get.checks(checked)
    table = table[table["over"].isin(["space", "tree"])]
    dots = [line.get_xdata()[0] for line in patterns.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots, table["observed"][::-1])
    found = np.concatenate([c.get_offsets() for c in calibration.collections if isinstance(c, PathCollection)])
    assert set(np.round(found[:, 1], 9)) == set(np.round(cf.get.calibration(checked)["observed"], 9))
    plt.close("all")


def test_without_a_check():
    with pytest.raises(DataError, match="No decomposition"):
        cf.pl.residuals(cf.datasets.simulate(20, rng=0))
