"""Tables come back as they were stored, before and after a trip to disk."""

import anndata
import numpy as np
import pandas as pd
import pytest

import cellfate as cf
from cellfate import _keys
from cellfate.errors import DataError
from tests.synthetic import synthetic_result

COLUMNS = ["response", "component", "variance", "variance_sd", "variance_lower", "variance_upper"]
COLUMNS += ["share", "share_sd", "share_lower", "share_upper"]


@pytest.mark.parametrize(
    ("scale", "components"),
    [
        ("latent", ["lineage", "spatial", "fixed"]),
        ("link", ["lineage", "spatial", "fixed", "distribution"]),
        ("realized", ["lineage", "spatial", "fixed", "shared"]),
    ],
)
def test_components_join_variances_and_shares(scale, components):
    adata = synthetic_result()
    table = cf.get.components(adata, scale=scale)
    assert list(table.columns) == COLUMNS
    assert list(table["component"]) == components
    np.testing.assert_allclose(table["share"].sum(), 1.0)
    stored = adata.uns["cellfate"]["components"].query("scale == @scale")
    np.testing.assert_array_equal(table["variance_upper"], stored["variance_upper"])


def test_components_agree_with_the_draws():
    adata = synthetic_result()
    table = cf.get.components(adata).set_index("component")
    draws = cf.get.draws(adata)
    for component in ("lineage", "spatial"):
        lower, upper = draws[f"share_{component}"].quantile([0.025, 0.975])
        assert table.loc[component, "share_lower"] == pytest.approx(lower)
        assert table.loc[component, "share_upper"] == pytest.approx(upper)
        assert table.loc[component, "variance"] == pytest.approx(draws[f"variance_{component}"].mean())


@pytest.mark.parametrize(
    "getter",
    [cf.get.components, cf.get.draws, cf.get.fixed_effects, cf.get.hyperparameters, cf.get.effects, cf.get.params],
)
def test_what_comes_back_is_a_copy(getter):
    adata = synthetic_result()
    first = getter(adata)
    changed = getter(adata)
    if isinstance(changed, dict):
        changed["link"] = "changed"
        assert getter(adata) == first
    else:
        changed.iloc[:, -1] = -1.0
        pd.testing.assert_frame_equal(getter(adata), first)


def test_hyperparameters_are_what_is_no_variance_share_or_coefficient():
    adata = synthetic_result()
    draws = adata.uns["cellfate"]["draws"]
    draws["alpha_lineage"] = np.linspace(0.5, 2.0, len(draws))
    draws["dispersion"] = 0.25
    table = cf.get.hyperparameters(adata)
    assert list(table.columns) == ["term", "median", "mean", "sd", "lower", "upper"]
    assert list(table["term"]) == ["lengthscale_spatial", "alpha_lineage", "half_life_lineage", "dispersion"]
    table = table.set_index("term")
    assert table.loc["alpha_lineage", "median"] == pytest.approx(1.25)
    assert table.loc["half_life_lineage", "median"] == pytest.approx(np.log(2) / 1.25, rel=1e-3)
    assert table.loc["half_life_lineage", "upper"] == pytest.approx(
        np.log(2) / table.loc["alpha_lineage", "lower"], rel=1e-2
    )
    assert table.loc["dispersion", ["median", "sd", "lower", "upper"]].tolist() == [0.25, 0.0, 0.25, 0.25]
    assert table.loc["lengthscale_spatial", "lower"] == pytest.approx(draws["lengthscale_spatial"].quantile(0.025))


def test_a_model_without_hyperparameters_has_an_empty_table():
    adata = synthetic_result()
    del adata.uns["cellfate"]["draws"]["lengthscale_spatial"]
    table = cf.get.hyperparameters(adata)
    assert table.shape == (0, 6)
    assert table["median"].dtype == float


def test_effects_are_rows_of_cells():
    adata = synthetic_result(n=40, groups=("batch",))
    table = cf.get.effects(adata)
    assert list(table.index) == list(adata.obs_names)
    assert list(table.columns) == [f"{c}_{w}" for c in ("lineage", "spatial", "batch") for w in ("mean", "sd")]
    assert table.isna().all(axis=1).sum() == 10


def test_effects_follow_a_subset():
    adata = synthetic_result(n=40)[5:20].copy()
    assert list(cf.get.effects(adata).index) == list(adata.obs_names)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_tables_survive_a_trip_to_disk(tmp_path, suffix):
    adata = synthetic_result(n=40, groups=("batch",))
    path = tmp_path / f"result.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = getattr(anndata, f"read_{suffix}")(path)
    for getter in (cf.get.components, cf.get.draws, cf.get.fixed_effects, cf.get.hyperparameters):
        pd.testing.assert_frame_equal(getter(back), getter(adata), check_dtype=False)
    pd.testing.assert_frame_equal(cf.get.effects(back), cf.get.effects(adata), check_names=False)
    assert cf.get.params(back)["link"] == "logit"


def without_effects(adata):
    del adata.obsm[_keys.effects("cellfate")]


def without_shares(adata):
    del adata.uns["cellfate"]["shares"]


def other_key(adata):
    adata.uns["fate_colors"] = ["#000000"]


def two_fits(adata):
    adata.uns["second"] = adata.uns["cellfate"]


def nothing(adata):
    """The result as it is."""


def no_fit(adata):
    del adata.uns["cellfate"]


@pytest.mark.parametrize(
    ("change", "call", "message"),
    [
        (
            no_fit,
            lambda a: cf.get.components(a),
            r"nothing in adata.uns by that name. Run `cf.tl.decompose\(adata, ...\)`",
        ),
        (no_fit, lambda a: cf.get.draws(a, "mine"), r"Run `cf.tl.decompose\(adata, ..., key_added='mine'\)` first"),
        (other_key, lambda a: cf.get.draws(a, "fate_colors"), "'fate_colors': adata.uns holds something else"),
        (other_key, lambda a: cf.get.effects(a, "mine"), "Either use key='cellfate', or run"),
        (two_fits, lambda a: cf.get.params(a, "mine"), r"use one of the keys \['cellfate', 'second'\]"),
        (
            other_key,
            lambda a: cf.get.components(a, scale="log"),
            "unknown scale 'log'; choose from latent, link, realized",
        ),
        (nothing, lambda a: cf.get.components(a, scale="additive"), r"no rows of scale 'additive'. Use one of \['lat"),
        (without_effects, lambda a: cf.get.effects(a), r"no 'cellfate_effects'.*found \['spatial'\]"),
        (without_shares, lambda a: cf.get.components(a), r"no 'shares', found \['components', 'diagnostics'"),
    ],
)
def test_errors_say_what_to_do(change, call, message):
    adata = synthetic_result(n=40)
    change(adata)
    with pytest.raises(DataError, match=message):
        call(adata)
