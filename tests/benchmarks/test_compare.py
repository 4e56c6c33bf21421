"""Base against head: what counts as worse, and the exit code that says so."""

import pandas as pd
import pytest

ROW = {
    "problem": "both", "method": "cellfate", "n": 1000, "extent": 9.0, "seed": 0, "device": "cpu", "threads": 2,
    "seconds": 10.0, "cpu_seconds": 18.0, "peak_MiB": 800.0, "error_truth": 0.3, "error_dense": 0.01, "error_field": 0.5,
    "status": "converged",
}  # fmt: skip


def exit_code(script, folder, head, *arguments, base=(ROW,)):
    paths = [folder / "base.csv", folder / "head.csv"]
    for path, rows in zip(paths, (base, head), strict=True):
        pd.DataFrame(rows).to_csv(path, index=False)
    return script("compare").main([*map(str, paths), *arguments])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"seconds": 11.9}, 0),
        ({"seconds": 12.1}, 1),
        ({"seconds": 5.0}, 0),
        ({"peak_MiB": 1200.0}, 1),
        ({"error_dense": 0.014}, 0),
        ({"error_dense": 0.02}, 1),
        ({"error_field": 0.7}, 1),
        ({"error_truth": 0.1}, 0),
        ({"seconds": None, "status": "died with code -9"}, 1),
    ],
    ids=str,
)
def test_exit_code(script, tmp_path, change, code):
    assert exit_code(script, tmp_path, [{**ROW, **change}]) == code


def test_threshold_and_clock_can_be_set(script, tmp_path):
    slower = [{**ROW, "seconds": 15.0}]
    assert exit_code(script, tmp_path, slower, "--threshold", "2") == 0
    assert exit_code(script, tmp_path, slower, "--by", "cpu_seconds") == 0


def test_rows_without_a_partner_are_listed_and_not_judged(script, tmp_path, capsys):
    other = {**ROW, "method": "gpboost", "seconds": 100.0}
    assert exit_code(script, tmp_path, [ROW, other]) == 0
    assert "only in head" in capsys.readouterr().out


def test_nothing_in_common_is_no_success(script, tmp_path):
    assert exit_code(script, tmp_path, [{**ROW, "n": 7}]) == 1


def test_what_failed_in_both_is_no_news(script, tmp_path):
    failed = {**ROW, "seconds": None, "peak_MiB": None, "error_truth": None, "error_dense": None, "error_field": None}
    assert exit_code(script, tmp_path, [failed], base=[failed]) == 0
