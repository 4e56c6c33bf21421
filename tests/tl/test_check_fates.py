"""`cf.tl.check` of ordinal and categorical fates: quiet where the model is right, and not where it is wrong."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax

import cellfate as cf
from cellfate.inference.checks import Predicted
from cellfate.tl.check_tables import Observed, calibration_table, predictions_table

pytestmark = pytest.mark.filterwarnings("ignore::cellfate.errors.CellfateWarning")


def held(lineage, spatial, **more):
    """Hyperparameters at the truth, so that what is checked is the check."""
    found = {"sd_lineage": ("fixed", lineage**0.5), "sd_spatial": ("fixed", spatial**0.5), **more}
    return {"priors": {name: prior for name, prior in found.items() if prior[1] > 0}, "lengthscale": 0.5}


def checked(adata, fate="fate", family="categorical", draws=8, **options):
    cf.tl.decompose(adata, fate, family=family, rng=0, **options)
    cf.tl.check(adata, draws=draws, folds=6, n_perm=199, rng=0)
    return adata


def normal(x):
    x = np.asarray(x)
    assert abs(x.mean()) < 4 / len(x) ** 0.5
    assert x.std() == pytest.approx(1, abs=4 / (2 * len(x)) ** 0.5)


def counts_of(adata, tries, concentration, rng):
    """Fates of several cells of a clone, drawn anew from the simulated latent values; scattered the more, the smaller the concentration."""
    effects = adata.obsm["truth_effects"]
    p = softmax([effects[[c for c in effects if c.endswith(f"[{k}]")]].sum(axis=1) for k in range(3)], axis=0).T
    p = np.array([rng.dirichlet(concentration * row) for row in p]) if np.isfinite(concentration) else p
    return pd.DataFrame(rng.multinomial(tries, p), index=adata.obs_names, columns=["a", "b", "c"]).astype(float)


def test_ordinal_where_the_model_is_right():
    adata = cf.datasets.simulate(400, family="ordinal", rng=1)
    gaps = {f"gap_{k}": ("fixed", 1.0) for k in (1, 2)}
    checked(adata, family="ordinal", **held(1.0, 1.0, **gaps))
    table = cf.get.checks(adata)
    normal(adata.obs["cellfate_residual"])
    assert (table["p"].dropna() > 0.01).all()
    assert list(table.loc[table["fate"] != "", "fate"]) == ["0", "1", "2", "3"]
    shares = table.loc[table["fate"] != "", "observed"]
    np.testing.assert_allclose(shares, np.bincount(adata.obs["fate"]) / 400)
    scores = cf.get.predictions(adata).set_index("left_out")
    assert (scores["rps"] < scores["rps_reference"]).all()
    assert scores.loc["cell", "log_score"] > scores.loc["clade", "log_score"]


@pytest.mark.parametrize(("n", "engine"), [(150, "dense"), (400, "structured")])
def test_categorical_where_the_model_is_right(n, engine):
    adata = cf.datasets.simulate(n, family="categorical", variance_lineage=2.0, variance_spatial=2.0, rng=3)
    adata.obs["fate"] = adata.obs["fate"].map(dict(enumerate(["gut", "heart", "skin/nerve"])))
    checked(adata, engine=engine, **held(2.0, 2.0))
    table, residuals = cf.get.checks(adata), adata.obsm["cellfate_residual"]
    assert list(residuals.columns) == ["gut", "heart", "skin_nerve"]
    for name in residuals:
        normal(residuals[name])
    assert (table["p"].dropna() > 0.01).all()
    shares = table[table["check"] == "share of fates"].set_index("fate")["observed"]
    np.testing.assert_allclose(shares, adata.obs["fate"].value_counts(normalize=True).sort_index())
    scores = cf.get.predictions(adata).set_index("left_out")
    assert scores.loc["cell", "brier"] < scores.loc["cell", "brier_reference"]
    calibration = cf.get.calibration(adata)
    for (_, fate), rows in calibration.groupby(["left_out", "fate"]):
        assert rows["cells"].sum() == n
        assert rows["observed"] @ rows["trials"] == pytest.approx(n * shares[fate])


@pytest.mark.parametrize("family", ["ordinal", "categorical"])
def test_a_neighborhood_that_the_model_lacks_is_found(family):
    adata = cf.datasets.simulate(200, family=family, variance_lineage=0.3, variance_spatial=4.0, rng=6)

    def pattern():
        table = cf.get.checks(adata)
        return table[(table["check"] == "Moran's I of residuals") & (table["over"] == "space")]["p"]

    known = held(0.3, 4.0)
    checked(adata, family=family, **known)
    assert pattern().min() > 0.05
    without = {"sd_lineage": known["priors"]["sd_lineage"]}
    checked(adata, family=family, spatial=None, priors=without)
    assert pattern().min() < 0.01
    fates = cf.get.checks(adata)
    fates = fates[(fates["check"] == "Moran's I of fates") & (fates["over"] == "space")]
    assert fates["p"].min() < 0.1
    assert (fates["observed"] > fates["upper"]).any()


def test_counts_that_scatter_more_than_a_multinomial():
    rng = np.random.default_rng(0)
    adata = cf.datasets.simulate(150, family="categorical", rng=4)
    for name, concentration, ok in (("right", np.inf, True), ("scattered", 1.0, False)):
        adata.obsm[name] = counts_of(adata, rng.integers(5, 20, 150), concentration, rng)
        checked(adata, name, draws=32, **held(1.0, 1.0))
        table = cf.get.checks(adata)
        for check in ("residuals are normal", "standard deviation of fates"):
            p = table.loc[table["check"] == check, "p"]
            assert len(p) == 3
            assert (p.min() > 0.02) == ok
        if ok:
            for k in "abc":
                normal(adata.obsm["cellfate_residual"][k])
        assert cf.get.predictions(adata)["brier"].iloc[0] < cf.get.predictions(adata)["brier_reference"].iloc[0]


def test_variances_by_fate():
    adata = cf.datasets.simulate(60, family="categorical", rng=3)
    checked(adata, per_fate=True, draws=2, **held(0.4, 0.4))
    assert cf.get.checks(adata)["p"].dropna().min() > 0.005
    assert list(cf.get.predictions(adata)["left_out"]) == ["cell", "clade", "region"]


def test_probabilities_of_fates_have_no_check():
    adata = cf.datasets.simulate(50, family="categorical", rng=3)
    soft = 0.8 * np.eye(3)[adata.obs["fate"]] + 0.2 / 3
    adata.obsm["soft"] = pd.DataFrame(soft, index=adata.obs_names, columns=["a", "b", "c"])
    cf.tl.decompose(adata, "soft", family="categorical", rng=0, **held(1.0, 1.0))
    with pytest.raises(NotImplementedError, match=r"most probable fate of each cell"):
        cf.tl.check(adata)


def test_residuals_of_all_fates_come_and_go(tmp_path):
    adata = cf.datasets.simulate(50, family="categorical", rng=0)
    adata.obs["fate"] = pd.Categorical.from_codes(adata.obs["fate"], ["x", "y", "z"])
    adata.obs.loc[adata.obs_names[3], "fate"] = np.nan
    part = adata[adata.obs["fate"].notna()].copy()
    checked(part, draws=2, **held(1.0, 1.0))
    assert part.obsm["cellfate_residual"].shape == (49, 3)
    part.write_h5ad(tmp_path / "checked.h5ad")
    again = anndata.read_h5ad(tmp_path / "checked.h5ad")
    for get in (cf.get.checks, cf.get.predictions, cf.get.calibration):
        pd.testing.assert_frame_equal(get(again), get(part))
    pd.testing.assert_frame_equal(again.obsm["cellfate_residual"], part.obsm["cellfate_residual"])
    part.obs["number"] = part.obs["fate"].cat.codes.astype(float)
    checked(part, "number", family="poisson", draws=2, **held(1.0, 1.0))
    assert "cellfate_residual" not in part.obsm
    assert "cellfate_residual" in part.obs
    checked(part, draws=2, **held(1.0, 1.0))
    assert "cellfate_residual" not in part.obs


def predictions(kind, rng, n=40, levels=4):
    p = rng.dirichlet(np.ones(levels), n)
    y = np.array([rng.choice(levels, p=row) for row in p])
    seen = Observed(kind, np.eye(levels)[y] if kind == "fates" else y, np.ones(n) if kind == "fates" else None, "abcd")
    return p, y, seen, {"cell": Predicted(np.log(p[np.arange(n), y]), p, p, p)}


def test_ranked_probability_score():
    """As the energy of a distribution: E|Y - y| - E|Y - Y'| / 2 (Gneiting & Raftery 2007, eq. 21)."""
    p, y, seen, predicted = predictions("levels", np.random.default_rng(0))
    away = np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    energy = (p * away[y]).sum(1) - np.einsum("ni,ij,nj->n", p, away, p) / 2
    (row,) = predictions_table(predicted, {}, seen).to_dict("records")
    assert row["rps"] == pytest.approx(energy.mean())
    share = np.bincount(y, minlength=4) / len(y)
    assert row["rps_reference"] == pytest.approx(share @ away @ share / 2)


def test_brier_score_of_all_fates():
    p, y, seen, predicted = predictions("fates", np.random.default_rng(1))
    (row,) = predictions_table(predicted, {}, seen).to_dict("records")
    assert row["brier"] == pytest.approx(np.mean(1 - 2 * p[np.arange(40), y] + (p**2).sum(1)))
    share = np.bincount(y, minlength=4) / 40
    assert row["brier_reference"] == pytest.approx(1 - (share**2).sum())  # Gini's index
    table = calibration_table(predicted, seen)
    assert set(table["fate"]) == set("abcd")
    assert table["observed"] @ table["trials"] == pytest.approx(40)
    for k, name in enumerate("abcd"):
        rows = table[table["fate"] == name]
        assert rows["predicted"] @ rows["trials"] == pytest.approx(p[:, k].sum())
