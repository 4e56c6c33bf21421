"""The calibration benchmark: the same sets whatever works on them, and a run that was stopped goes on."""

import pandas as pd
import pytest

pytest.importorskip("distributed")

SPENT = ["seconds", "cpu_seconds"]


def sets(script, monkeypatch, folder, *words):
    out = folder / "table.csv"
    arguments = ["--sets", "3", "--n", "40", "--families", "poisson", "--out", out, *words]
    monkeypatch.setattr("sys.argv", ["calibration.py", *map(str, arguments)])
    script("calibration").main()
    return pd.read_csv(folder / "table_sets.csv").drop(columns=SPENT)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_workers_change_nothing_and_a_run_goes_on(script, monkeypatch, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = sets(script, monkeypatch, one)
    pd.testing.assert_frame_equal(sets(script, monkeypatch, two, "--workers", "2"), alone)
    path = one / "table_sets.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]) + "40,range,vari")  # stopped while it wrote
    kept = path.read_text().splitlines()[1]
    again = sets(script, monkeypatch, one, "--resume")
    assert path.read_text().splitlines()[1] == kept
    pd.testing.assert_frame_equal(again, alone)
    assert "share_lineage" in capsys.readouterr().out
