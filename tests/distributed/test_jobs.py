"""Jobs from the shell: begun, stopped, looked at, gone on with, merged."""

import json
import signal

import anndata
import pandas as pd
import pytest

import cellfate as cf
from cellfate import cli
from cellfate.distributed.clusters import cluster
from cellfate.distributed.store import found_at
from cellfate.errors import DataError
from tests.distributed.helpers import command, embryo, wait_for

GENES = [f"gene{i}" for i in range(6)]
WORDS = ["--family", "poisson", "--lengthscale", "0.7", "--rng", "3", "--chunk-size", "1", "--genes", *GENES]


@pytest.fixture(scope="module")
def source(genes, tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / "in.h5ad"
    genes.write_h5ad(path)
    return path


def run(capsys, *words):
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


def assert_merged(path, alone):
    found = anndata.read_h5ad(path)
    for name in ("components", "shares", "fixed_effects", "draws"):
        a, b = found.uns["cellfate"][name], alone.uns["cellfate"][name]
        assert list(a.columns) == list(b.columns)
        for column in a:
            assert a[column].tolist() == b[column].tolist(), (name, column)
    shares = found.varm["cellfate_shares"]
    pd.testing.assert_frame_equal(shares, alone.varm["cellfate_shares"], check_exact=True, check_names=False)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_leaves_a_store_that_is_gone_on_with(source, alone, tmp_path, capsys, number, code, word):
    store = tmp_path / "results.store"
    job = command("decompose", source, *WORDS, "--store", store)
    wait_for(lambda: len(list((store / "chunks").glob("*.zip"))) >= 2)
    job.send_signal(number)
    out, err = job.communicate(timeout=30)
    done = len(found_at(store).done())
    assert job.returncode == code, err
    assert 2 <= done < 6
    assert (
        f"cellfate: {word}: {done} of 6 chunks are in {store}. Run the same again: only what is missing is computed."
        in err
    )
    assert "Traceback" not in err
    assert out == ""
    assert f"{done} of 6 chunks are in {store}. Run the same again" in (store / "log.txt").read_text().splitlines()[-1]
    if number == signal.SIGINT:
        return

    code, out, err = run(capsys, "status", store)
    assert code == 3
    assert out.startswith(f"{store}: {done} of 6 chunks, {done} of 6 responses\n")
    assert "not complete: the command of the job, given again" in out
    code, out, err = run(capsys, "merge", store)
    assert (code, out) == (3, "")
    assert f"cellfate: {done} of 6 chunks are in" in err

    code, out, err = run(capsys, "decompose", source, *WORDS, "--store", store)
    assert code == 0, err
    assert "6 fates: 0 failed" in out
    assert run(capsys, "status", store)[0] == 0
    code, out, err = run(capsys, "merge", store, "--out", tmp_path / "merged.h5ad")
    assert code == 0, err
    assert_merged(tmp_path / "merged.h5ad", alone)
    code, out, err = run(capsys, "merge", store, "--out", tmp_path / "merged.h5ad")
    assert code == 2
    assert "is there already: name another file, or give --overwrite" in err


def test_workers_and_a_termination(source, alone, tmp_path, capsys):
    store = tmp_path / "results.store"
    words = ["decompose", source, *WORDS, "--store", store, "--scheduler", "local", "--workers", "2"]
    job = command(*words)
    wait_for(lambda: len(list((store / "chunks").glob("*.zip"))) >= 1)
    job.terminate()
    _, err = job.communicate(timeout=30)
    assert job.returncode == 143, err
    assert "Traceback" not in err
    done = len(found_at(store).done())
    assert f"terminated: {done} of 6 chunks are in" in err
    log = (store / "log.txt").read_text()
    assert "workers: 2, scheduler tcp://127.0.0.1" in log
    code, _, err = run(capsys, "decompose", source, *WORDS, "--store", store, "--out", tmp_path / "out.h5ad")
    assert code == 0, err
    assert_merged(tmp_path / "out.h5ad", alone)


def test_a_scheduler_that_runs(source, alone, tmp_path, capsys, client):
    address = client.scheduler.address
    out = tmp_path / "out.h5ad"
    code, _, err = run(capsys, "decompose", source, *WORDS, "--scheduler", address, "--out", out)
    assert code == 0, err
    assert_merged(out, alone)


def test_status_tells_of_failed_and_damaged_chunks(source, tmp_path, capsys):
    store = tmp_path / "s"
    adata = embryo(genes=3)
    adata.X[:, 1] = 0.0
    adata.write_h5ad(tmp_path / "in.h5ad")
    words = ["--family", "poisson", "--lengthscale", "0.7", "--genes", *GENES[:3], "--store", store]
    code, out, err = run(capsys, "decompose", tmp_path / "in.h5ad", *words)
    assert code == 0, err
    assert "3 fates: 1 failed" in out
    path = store / "chunks" / "00002.zarr.zip"
    path.write_bytes(path.read_bytes()[:100])
    code, out, _ = run(capsys, "status", store)
    assert code == 3
    assert "2 of 3 chunks, 2 of 3 responses" in out
    assert "1 failed, 0 in doubt" in out
    assert "failed: gene1: " in out
    assert "00002.zarr.zip is damaged or cut short (100 bytes" in out
    assert "It will be computed again." in out
    code, _, err = run(capsys, "merge", store)
    assert code == 3
    assert "2 of 3 chunks are in" in err
    assert "1 are damaged" in err


def test_a_configuration_has_options_and_the_command_line_goes_before(source, tmp_path, capsys, monkeypatch):
    config = tmp_path / "job.toml"
    config.write_text(
        'family = "poisson"\nlengthscale = 0.5\nchunk-size = 2\ngenes = ["gene0", "gene1"]\nworkers = 3\nolre = false\nreml = false\n'
        'scheduler = "slurm"\ngpus-per-worker = 1\n[slurm]\nmemory = "4GB"\n'
    )
    calls, clusters = [], []
    monkeypatch.setattr(cf.tl, "decompose", lambda adata, fate, **options: calls.append((fate, options)))
    from contextlib import contextmanager

    from cellfate.cli import fit
    from cellfate.distributed import clusters as module

    @contextmanager
    def fake(*arguments):
        clusters.append(arguments)
        yield "a client"

    monkeypatch.setattr(module, "cluster", fake)
    monkeypatch.setattr(fit, "print_tables", lambda adata, key: None)
    words = ["decompose", source, "--config", config, "--lengthscale", "0.7", "--store", tmp_path / "s"]
    code, _, err = run(capsys, *words)
    assert code == 0, err
    ((fate, options),) = calls
    assert fate == ["gene0", "gene1"]
    expected = {"family": "poisson", "lengthscale": 0.7, "chunk_size": 2, "reml": False, "client": "a client", "rng": 0}
    assert {name: options[name] for name in expected} == expected
    assert "olre" not in options
    assert clusters == [("slurm", 3, 1, {"memory": "4GB"})]
    code, _, err = run(capsys, *words, "--family", "gaussian", "--workers", "1")
    assert calls[1][1]["family"] == "gaussian"
    assert clusters[1][1] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family = poisson", "is no TOML"),
        ("[cluster]\nworkers = 3", r"has a table \[cluster\]; there are \[slurm\] and \[local\]"),
        ('speed = "high"\nfamily = "poisson"', "unrecognized arguments: --speed=high"),
    ],
)
def test_a_configuration_that_cannot_be_meant(source, tmp_path, capsys, text, message):
    import re

    config = tmp_path / "job.toml"
    config.write_text(text)
    code, out, err = run(capsys, "decompose", source, "--config", config, "--store", tmp_path / "s")
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "{}/nothing"], "nothing is no store of results: it has no manifest.json"),
        (["merge", "{}/nothing"], "nothing is no store of results: it has no manifest.json"),
        (["--scheduler", "abacus"], "scheduler is 'abacus': give 'local', 'slurm', or the address"),
        (["--workers", "0"], "workers is 0, wanted 1 or more"),
        (["--gpus-per-worker", "2", "--workers", "1"], "a fit runs on one GPU"),
        (["--genes", "gene99"], "'gene99'"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_store(source, tmp_path, capsys, words, message):
    words = [word.replace("{}", str(tmp_path)) for word in words]
    if words[0] not in ("status", "merge"):
        words = [
            "decompose",
            source,
            *WORDS[:-7],
            *(["--genes", *GENES] if "--genes" not in words else []),
            "--store",
            tmp_path / "s",
            *words,
        ]
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "s").exists()


def test_a_store_begun_from_python_is_merged_there(genes, tmp_path, capsys):
    cf.tl.decompose(genes[:, :1].copy(), ["gene0"], family="poisson", lengthscale=0.7, rng=0, store=tmp_path / "s")
    code, _, err = run(capsys, "merge", tmp_path / "s")
    assert code == 2
    assert "it was begun from Python, where the same call of cf.tl.decompose gives the data" in err


def test_an_input_that_changed_is_not_merged(genes, tmp_path, capsys):
    adata = genes[:, :2].copy()
    adata.write_h5ad(tmp_path / "in.h5ad")
    words = ["--family", "poisson", "--lengthscale", "0.7", "--genes", *GENES[:2], "--store", tmp_path / "s"]
    assert run(capsys, "decompose", tmp_path / "in.h5ad", *words)[0] == 0
    note = json.loads((tmp_path / "s" / "command.json").read_text())
    assert note["input"] == str(tmp_path / "in.h5ad")
    adata.X[0, 0] += 1
    adata.write_h5ad(tmp_path / "in.h5ad")
    code, _, err = run(capsys, "merge", tmp_path / "s")
    assert code == 2
    assert "other values of the responses: 1 of 2 chunks differ, the first holds 'gene0'" in err
    (tmp_path / "in.h5ad").unlink()
    code, _, err = run(capsys, "merge", tmp_path / "s")
    assert code == 2
    assert "is not there. Give --input FILE." in err


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of dask-jobqueue, for one that was not begun
def test_what_slurm_is_asked_for():
    """The script of a worker's job; whether Slurm takes it is for a machine that has Slurm."""
    pytest.importorskip("dask_jobqueue")
    import warnings

    from cellfate.distributed import clusters

    options = {"memory": "4GB", "queue": "long", "walltime": "02:00:00", "job_extra_directives": ["--constraint=a100"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = clusters._slurm(None, 1, options | {"scheduler_options": {"dashboard_address": "127.0.0.1:0"}, "n_workers": 0})  # fmt: skip
        try:
            script = started.job_script()
        finally:
            started.scale(0)
            started.close()
    for line in ("-p long", "--mem=4G", "-t 02:00:00", "--constraint=a100", "--gres=gpu:1", "--cpus-per-task=1"):
        assert f"#SBATCH {line}" in script
    assert "--nthreads 1" in script
    with pytest.raises(DataError, match=r"Give what they need in a table \[slurm\] of --config"), cluster("slurm", 1):
        pass


def test_without_dask_it_is_said_what_to_install(source, genes, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "distributed", None)
    code, out, err = run(capsys, "decompose", source, *WORDS, "--out", tmp_path / "out.h5ad", "--workers", "2")
    assert (code, out) == (2, "")
    assert 'Running on a cluster needs Dask: pip install "cellfate[cluster]".' in err
    with pytest.raises(ModuleNotFoundError, match=r"cellfate\[cluster\]"):
        cf.tl.decompose(genes, GENES, family="poisson", client="a client")
    one = genes[:, :1].copy()
    cf.tl.decompose(one, ["gene0"], family="poisson", lengthscale=0.7, store=tmp_path / "s")  # needs none
