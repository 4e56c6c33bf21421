"""What is drawn is what `cf.tl.check` found."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PathCollection

import cellfate as cf
from cellfate import CellfateWarning, DataError
from tests.pl.helpers import assert_legible


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


def dots(ax):
    return [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]


@pytest.mark.parametrize(("family", "n_fates"), [("ordinal", 4), ("categorical", 3), ("categorical", 9)])
def test_several_fates(family, n_fates, tmp_path):
    adata = cf.datasets.simulate(120, family=family, **({"n_fates": n_fates} if family == "categorical" else {}), rng=2)
    held = {f"sd_{name}": ("fixed", 1.0) for name in ("lineage", "spatial")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)
        cf.tl.decompose(adata, "fate", family=family, engine="structured", lengthscale=0.5, priors=held, rng=0)
    cf.tl.check(adata, draws=2, folds=4, n_perm=19, rng=0)
    panels = cf.pl.residuals(adata, show=False, save=tmp_path / "residuals.png")
    assert_legible(panels[0].get_figure())
    table, curves = cf.get.checks(adata), cf.get.calibration(adata)
    quantiles, patterns, shares, *calibration = panels
    drawn = [line.get_ydata() for line in quantiles.lines if line.get_marker() == "o"]
    residuals = (
        adata.obsm["cellfate_residual"].to_numpy().T if family == "categorical" else [adata.obs["cellfate_residual"]]
    )
    np.testing.assert_allclose(drawn, [np.sort(x) for x in residuals])
    np.testing.assert_allclose(
        np.sort(dots(patterns)), np.sort(table[table["over"].isin(["space", "tree"])]["observed"])
    )
    of_shares = table[table["check"] == "share of fates"]
    np.testing.assert_allclose(dots(shares), of_shares["observed"])
    assert [tick.get_text() for tick in shares.get_yticklabels()] == list(of_shares["fate"])
    for ax, (_, rows) in zip(calibration, curves.groupby("left_out", sort=False), strict=True):
        found = np.concatenate([c.get_offsets() for c in ax.collections if isinstance(c, PathCollection)])
        np.testing.assert_allclose(np.sort(found[:, 1]), np.sort(rows.loc[rows["cells"] >= 5, "observed"]))


def test_fates_without_tree_or_tissue():
    adata = cf.datasets.simulate(60, family="categorical", rng=2)
    del adata.obsm["spatial"]
    adata.obs["dish"] = np.arange(60) % 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)
        cf.tl.decompose(adata, "fate", family="categorical", lineage=None, spatial=None, groups=["dish"], rng=0)
    cf.tl.check(adata, draws=2, folds=4, n_perm=19, rng=0)
    quantiles, _, calibration = cf.pl.residuals(adata, show=False)
    assert calibration.get_title() == "single cells left out"
    assert_legible(quantiles.get_figure())
    del adata.obsm["cellfate_residual"]
    with pytest.raises(DataError, match="no 'cellfate_residual' in obs or obsm"):
        cf.pl.residuals(adata, show=False)


def test_without_a_check():
    with pytest.raises(DataError, match="No decomposition"):
        cf.pl.residuals(cf.datasets.simulate(20, rng=0))
