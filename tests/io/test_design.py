"""Formulas become design matrices; what separates a fate perfectly is named."""

import warnings

import numpy as np
import pandas as pd
import pytest

from cellfate import CellfateWarning
from cellfate.io.anndata import read_cells
from cellfate.io.design import columns_of
from tests.embryo import N, embryo

FATE = {"fate": "fate", "family": "bernoulli"}


FORMULAS = {
    "~ 1": lambda o: [np.ones(N)],
    "1": lambda o: [np.ones(N)],
    "~ 0 + time": lambda o: [o["time"]],
    "~ time": lambda o: [np.ones(N), o["time"]],
    "~ 1 + stage": lambda o: [np.ones(N), o["stage"] == "late", o["stage"] == "mid"],
    "~ 0 + half": lambda o: [o["half"] == "left", o["half"] == "right"],
    "~ 1 + np.log(np.abs(time))": lambda o: [np.ones(N), np.log(np.abs(o["time"]))],
    "~ 1 + time:size": lambda o: [np.ones(N), o["time"] * o["size"]],
    "~ 1 + `cell size`": lambda o: [np.ones(N), o["cell size"]],
    "~ 1 + center(time)": lambda o: [np.ones(N), o["time"] - o["time"].mean()],
    "~ 1 + C(batch)": lambda o: [np.ones(N), *(o["batch"] == level for level in (2, 3, 4))],
    "~ 1 + C(stage, contr.treatment('mid'))": lambda o: [np.ones(N), o["stage"] == "early", o["stage"] == "late"],
    "~ 1 + {time > 0}": lambda o: [np.ones(N), o["time"] > 0],
    "~ 1 + alive": lambda o: [np.ones(N), o["alive"]],
    "~ 1 + text": lambda o: [np.ones(N), o["text"] == "v"],
    "~ 1 + numbers": lambda o: [np.ones(N), o["numbers"]],
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_designs(formula):
    adata = embryo()
    adata.obs["cell size"] = adata.obs["size"]
    adata.obs["alive"] = pd.array(np.resize([True, True, False], N), dtype="boolean")
    adata.obs["text"] = pd.array(np.resize(["u", "v", "u", "u", "v"], N), dtype="string")
    adata.obs["numbers"] = np.resize([0.5, 2, 3.0, 7], N).astype(
        object
    )  # numbers, though pandas would call them objects
    cells = read_cells(adata, **FATE, formula=formula)
    wanted = np.column_stack([np.asarray(column, dtype=float) for column in FORMULAS[formula](adata.obs)])
    np.testing.assert_allclose(cells.design, wanted)
    assert len(cells.terms) == wanted.shape[1]


def test_no_fixed_effects_at_all():
    assert read_cells(embryo(), **FATE, formula="~ 0").design.shape == (N, 0)


def test_unused_levels_make_no_columns():
    adata = embryo()
    adata.obs["stage"] = pd.Categorical(adata.obs["stage"], categories=["early", "never", "mid", "late"])
    assert read_cells(adata, **FATE, formula="~ 1 + stage").terms == ("Intercept", "stage[T.mid]", "stage[T.late]")


def test_columns_of_a_formula():
    assert columns_of("~ 1 + a*b + np.log(c) + C(d, contr.treatment(base='e')) + `f g` - h:a + I(i**2)") == [
        *"abcd",
        "f g",
        "h",
        "i",
    ]


SEPARATION = {
    "number": ("~ 1 + time", lambda obs: obs["on"] + 0.1 * np.tanh(obs["time"]), "1 columns of the design: 'time'"),
    "number, downwards": ("~ 1 + time", lambda obs: -obs["on"] + 0.1 * np.tanh(obs["time"]), "'time'"),
    "level": (
        "~ 1 + stage",
        lambda obs: np.where((np.arange(N) < 14) & (obs["on"] == 1), "z", obs["stage"]),
        r"'stage\[T.z\]'",
    ),
    "reference level": (
        "~ 1 + stage",
        lambda obs: np.where((np.arange(N) < 14) & (obs["on"] == 1), "a", obs["stage"]),
        r"'stage\[a\]'",
    ),
}


@pytest.mark.parametrize(("formula", "values", "named"), SEPARATION.values(), ids=SEPARATION)
def test_separation_is_named(formula, values, named):
    adata = embryo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_cells(adata, "on", family="bernoulli", formula=formula)  # before: none
    adata.obs[columns_of(formula)[0]] = values(adata.obs)
    with pytest.warns(CellfateWarning, match=f"fate 'on' is separated perfectly by .*{named}"):
        read_cells(adata, "on", family="bernoulli", formula=formula)


def test_separation_of_successes():
    adata = embryo()
    adata.obs["edited"] = np.where(np.arange(N) < 6, 0, adata.obs["edited"].clip(lower=1))
    adata.obs["stage"] = np.where(np.arange(N) < 6, "early", "late")
    with pytest.warns(CellfateWarning, match="separated perfectly"):
        read_cells(adata, "edited", family="binomial", trials="sites", formula="~ 1 + stage")
