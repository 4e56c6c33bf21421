"""Sets of the calibration: what is drawn again, what fails, what a run that goes on finds, and the same whatever works on them."""

import numpy as np
import pandas as pd
import pytest


def task(script, family="gaussian", inheritance=0.5, n=40, index=0):
    one = script("calibration").Set
    return one(family, inheritance, index, n, "prior", "laplace", 1, np.random.SeedSequence(index))


def row(script, **more):
    calibration = script("calibration")
    found = dict.fromkeys(calibration.columns(), 1.0) | dict(zip(calibration.KEYS, task(script).key, strict=True))
    return found | {"status": "converged"} | more


def test_levels_that_hardly_a_cell_has_are_drawn_again(script, monkeypatch):
    calibration, drawn = script("calibration"), []
    simulate = calibration.cf.datasets.simulate
    few = pd.Categorical(np.r_[np.repeat([0, 1, 3], 13), 2], ordered=True)

    def some(*arguments, **options):
        adata = simulate(*arguments, **options)
        if len(drawn) < 2:
            adata.obs["fate"] = few if drawn else few.codes % 3
        drawn.append(adata)
        return adata

    monkeypatch.setattr(calibration.cf.datasets, "simulate", some)
    monkeypatch.setattr(calibration.cf.tl, "decompose", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibration.fit(task(script, "ordinal"))
    assert len(drawn) > 2
    assert calibration.fewest(drawn[-1].obs["fate"], 4) >= 2


def test_a_set_that_fails_is_a_row(script, tmp_path, capsys, monkeypatch):
    calibration = script("calibration")
    monkeypatch.setattr(calibration.cf.tl, "decompose", lambda *_, **__: 1 / 0)
    failed = calibration.fit_or_say(task(script, index=1))
    monkeypatch.undo()
    assert set(calibration.fit(task(script))) == set(failed)
    assert failed["status"] == "failed: ZeroDivisionError: division by zero"
    # first in the file, too
    calibration.keep(iter([failed, row(script), row(script, set=2)]), tmp_path / "sets.csv")
    sets = calibration.read_sets([tmp_path / "sets.csv"])
    assert list(sets["set"]) == [1, 0, 2]
    monkeypatch.setattr(calibration, "RANKED", ())
    found = calibration.summarize(sets)
    assert {(r["sets"], r["failed"], r["warned"]) for r in found} == {(2, 1, 0)}
    calibration.report(sets, None, None)
    assert "set 1: failed: ZeroDivisionError" in capsys.readouterr().out


def test_sets_are_found_again(script, tmp_path):
    calibration, path = script("calibration"), tmp_path / "sets.csv"
    inheritances = [0.1, 1 / 3, 0.123456789, 0.5]
    calibration.keep((row(script, inheritance=x) for x in inheritances), path)
    have = calibration.finished(path)
    assert have == {task(script, inheritance=x).key for x in inheritances}


SPENT = ["seconds", "cpu_seconds"]


def sets(script, monkeypatch, folder, *words):
    out = folder / "table.csv"
    arguments = ["--sets", "3", "--n", "40", "--families", "poisson", "--out", out, *words]
    monkeypatch.setattr("sys.argv", ["calibration.py", *map(str, arguments)])
    script("calibration").main()
    return pd.read_csv(folder / "table_sets.csv").drop(columns=SPENT)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_workers_change_nothing_and_a_run_goes_on(script, monkeypatch, tmp_path, capsys):
    pytest.importorskip("distributed")
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
