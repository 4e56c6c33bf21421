"""The runner end to end: rows of what worked, and rows of what did not."""

import json

import numpy as np
import pandas as pd
import pytest


def test_dense_fit_of_sixty_cells(script, tmp_path, capsys):
    out = tmp_path / "table.csv"
    method = "cellfate:engine=dense,method=laplace"
    script("run").main(
        ["--problems", "both", "--sizes", "60", "--methods", method, "gpboost", "--threads", "1", "--out", str(out)]
    )
    ours, peer = pd.read_csv(out).to_dict("records")
    assert ours["status"]  # a doubt about so few cells is allowed, silence is not
    for name in ("seconds", "cpu_seconds", "peak_MiB", "error_truth", "error_field"):
        assert np.isfinite(ours[name])
        assert ours[name] > 0
    assert ours["engine"] == "dense"
    assert ours["variance_lineage_lower"] < ours["variance_lineage_estimate"] < ours["variance_lineage_upper"]
    assert peer["status"] == "cannot: has no kernel for lineage"
    assert np.isnan(peer["seconds"])
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["machine"]["processor"]
    assert "gpboost" in about["peers"]
    assert "cannot: has no kernel" in capsys.readouterr().out


def test_what_is_absent_or_fails_is_a_row(script, monkeypatch):
    methods, problem = script("methods"), script("problems").make("both", 60)
    monkeypatch.setenv("PATH", "")
    assert methods.answer("lme4", problem, 1) == {"status": "absent: there is no Rscript here"}
    assert methods.answer("cellfate:engine=wooden", problem, 1)["status"].startswith("failed: ")


def test_a_method_has_its_time(script, tmp_path):
    stored = tmp_path / "problem.npz"
    script("problems").make("both", 60).save(stored)
    assert script("methods").measure("cellfate", stored, 1, 0.05) == {"status": "stopped after 0.05 s"}


def test_a_misspelt_method_is_known_at_once(script):
    with pytest.raises(SystemExit, match="unknown method 'celfate'"):
        script("run").main(["--methods", "celfate"])


def test_errors_are_of_variances_and_relative(script):
    largest_error = script("run").largest_error
    estimates = {
        "variance_lineage": {"estimate": 1.2},
        "variance_spatial": {"estimate": 1.5},
        "lengthscale": {"estimate": 9},
    }
    truth = {"variance_lineage": 1.0, "variance_spatial": 2.0}
    assert largest_error(estimates, truth, truth) == pytest.approx(0.25)
    assert largest_error(estimates, {"variance_lineage": 0.0}, truth) == pytest.approx(24.0)
    assert largest_error({}, truth, truth) is None


def test_slope_is_that_of_a_power(script):
    rows = [{"n": n, "seconds": 2e-6 * n**1.07} for n in (1000, 10_000, 200_000)]
    exponent, factor = script("scaling").slope(rows, "seconds")
    assert exponent == pytest.approx(1.07)
    assert factor == pytest.approx(2e-6)


def test_scaling_of_a_dense_evaluation(script, tmp_path, capsys):
    figure = tmp_path / "scaling.png"
    arguments = ["--piece", "update", "--engine", "dense", "--sizes", "60", "120", "--threads", "1", "--repeats", "1"]
    assert script("scaling").main([*arguments, "--figure", str(figure)]) == 0
    assert "slope of seconds on log-log axes" in capsys.readouterr().out
    assert figure.stat().st_size > 1000
