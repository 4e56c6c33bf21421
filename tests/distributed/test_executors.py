"""The same answers from one process, from workers, and from workers that die."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

import cellfate as cf
from cellfate.distributed.executors import Dask, Serial, ordered
from cellfate.distributed.store import found_at
from cellfate.distributed.tasks import Lost
from cellfate.errors import DataError, Interrupted
from tests.distributed.conftest import local_cluster
from tests.distributed.helpers import ROOT, assert_same, decomposed, embryo, wait_for
from tests.distributed.quick import Hash, digests, numbered

distributed = pytest.importorskip("distributed")

pytestmark = pytest.mark.filterwarnings("ignore:.*in doubt:cellfate.CellfateWarning")


def answers(executor, job, tasks):
    found = list(executor.run(job, tasks))
    assert len({task.index for task, _ in found}) == len(found)  # each once
    return {task.index: answer for task, answer in found}


# -- to the last bit ---------------------------------------------------------------------------------------------------


def test_one_two_and_four_workers_and_one_process_agree(genes, alone, tmp_path):
    with local_cluster(1) as cluster, distributed.Client(cluster) as client:
        for workers in (1, 2, 4):
            cluster.scale(workers)
            client.wait_for_workers(workers)
            assert_same(decomposed(genes, client=client, chunk_size=1), alone)


def test_shared_tables_agree(client):
    adata = embryo("gaussian", genes=24)
    alone = decomposed(adata, "gaussian")
    assert_same(decomposed(adata, "gaussian", client=client, chunk_size=7), alone)


def test_the_trend_of_the_dispersion_agrees(client, tmp_path, monkeypatch):
    from cellfate.inference import dispersion, many

    monkeypatch.setattr(dispersion, "FEWEST", 4)
    monkeypatch.setattr(many, "FEWEST", 4)
    adata = embryo(genes=4)
    alone = decomposed(adata, "negative_binomial")
    assert "dispersion_trend" in cf.get.responses(alone)
    stored = tmp_path / "s"
    assert_same(decomposed(adata, "negative_binomial", client=client, store=stored, chunk_size=1), alone)
    (stored / "chunks" / "00001.zarr.zip").unlink()
    monkeypatch.setattr(dispersion, "_through", None)  # it is not worked out again
    assert_same(decomposed(adata, "negative_binomial", store=stored, chunk_size=1), alone)


def test_one_response_of_many_is_on_one_thread(genes, alone):
    """Factorizations on two threads have other last digits: a chunk of one would differ from one of many."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same(decomposed(genes, chunk_size=5), alone)
        assert_same(decomposed(genes, chunk_size=1), alone)
    finally:
        torch.set_num_threads(before)


def test_a_store_of_shared_tables_keeps_its_threads(tmp_path):
    adata, seen = embryo("gaussian", genes=24), []
    decomposed(adata, "gaussian", store=tmp_path / "s", chunk_size=12)
    (tmp_path / "s" / "chunks" / "00001.zarr.zip").unlink()
    before = torch.get_num_threads()
    from cellfate.inference.gaussian_many import Together

    fits = Together.fits
    torch.set_num_threads(before + 1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Together, "fits", lambda *a: seen.append(torch.get_num_threads()) or fits(*a))
            decomposed(adata, "gaussian", store=tmp_path / "s", chunk_size=12)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert seen == [before]


def test_answers_can_be_put_in_order():
    tasks = list(numbered(4))
    found = [(tasks[i], i) for i in (2, 0, 3, 1)]
    assert [answer for _, answer in ordered(found, range(4))] == [0, 1, 2, 3]


def test_serial_and_dask_answer_alike(client):
    expected = {i: digests(3 * i, 3 * i + 3) for i in range(5)}
    assert answers(Serial(), Hash(), numbered(5, of=3)) == expected
    assert answers(Dask(client), Hash(), numbered(5, of=3)) == expected


def test_few_tasks_are_read_ahead(client):
    read = []

    def source():
        for task in numbered(40):
            read.append(task.index)
            yield task

    done = 0
    for _ in Dask(client).run(Hash(0.02), source()):
        done += 1
        assert len(read) <= done + 4  # two for each of two workers
    assert done == 40


def test_what_is_let_go_leaves_nothing_behind(client):
    run = Dask(client).run(Hash(0.05), numbered(30))
    next(run)
    run.close()
    wait_for(
        lambda: not client.run_on_scheduler(lambda dask_scheduler: [t for t in dask_scheduler.tasks if "cellfate" in t])
    )
    assert not client.run_on_scheduler(
        lambda dask_scheduler: [p for p in dask_scheduler.worker_plugins if "cellfate" in p]
    )


def test_an_error_of_a_task_is_the_error(client):
    class Broken(Hash):
        def prepare(self):
            raise ZeroDivisionError("of the job")

    with pytest.raises(ZeroDivisionError, match="of the job"):
        list(Dask(client).run(Broken(), numbered(3)))
    assert answers(Dask(client), Hash(), numbered(2)) == {0: digests(0, 1), 1: digests(1, 2)}


def test_workers_of_another_version_are_refused(client, monkeypatch):
    from cellfate.distributed import worker

    monkeypatch.setattr(worker, "__version__", "0.0.1")  # here, not there
    with pytest.raises(DataError, match=r"the worker at tcp://.* has cellfate .*, and the client 0\.0\.1"):
        list(Dask(client).run(Hash(), numbered(2)))


def test_threads_of_a_process_are_put_back_when_the_last_task_ends():
    from cellfate.distributed.worker import PINNED

    before = torch.get_num_threads()
    one, other = PINNED.on(before + 2), PINNED.on(before + 2)
    with one:
        other.__enter__()
    assert torch.get_num_threads() == before + 2
    other.__exit__(None, None, None)
    assert torch.get_num_threads() == before


def test_what_is_no_client_is_refused(genes, client):
    with pytest.raises(DataError, match=r"client is a str, wanted a dask\.distributed\.Client"):
        decomposed(genes, client="tcp://127.0.0.1:8786")
    if not torch.cuda.is_available():
        with pytest.raises(DataError, match="2 of 2 workers find no CUDA device"):
            decomposed(genes, client=client, device="cuda")


# -- workers that die --------------------------------------------------------------------------------------------------


def pids(client):
    try:
        return list(client.run(os.getpid, on_error="ignore").values())
    except OSError:  # a worker that is going away
        return []


def test_ten_workers_are_killed_and_nothing_is_lost_or_wrong():
    count, killed, over = 150, [], threading.Event()
    with local_cluster(2) as cluster, distributed.Client(cluster) as client:

        def kill():
            chance = random.Random(0)
            while len(killed) < 10 and not over.is_set():
                time.sleep(chance.uniform(0.3, 1.5))
                alive = [pid for pid in pids(client) if isinstance(pid, int) and pid not in killed]
                if alive:
                    killed.append(chance.choice(alive))
                    os.kill(killed[-1], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        job = Hash(0.2)

        def source():
            """As many as it takes for all ten to die with work at hand."""
            for task in numbered(100_000):
                if task.index >= count and len(killed) == 10:
                    return
                yield task

        try:
            found = answers(Dask(client), job, source())
        finally:
            over.set()
            killer.join()
    assert len(killed) == 10
    assert len(found) >= count
    assert all(answer == digests(i, i + 1) for i, answer in found.items())


def test_a_fit_whose_workers_are_killed_is_the_same(genes, alone, tmp_path):
    from distributed import Client

    with local_cluster(2) as cluster, Client(cluster) as client:

        def kill():
            for chunks in (1, 3):
                wait_for(lambda chunks=chunks: len(list((tmp_path / "s" / "chunks").glob("*.zip"))) >= chunks)
                os.kill(pids(client)[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        found = decomposed(genes, client=client, store=tmp_path / "s", chunk_size=1)
        killer.join()
    assert_same(found, alone)


def test_the_piece_that_ends_its_workers_is_found(caplog):
    import dask

    caplog.set_level("WARNING", "cellfate")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        local_cluster(2) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = answers(Dask(client), Hash(poison=7), numbered(6, of=3))
    assert {i: found[i] for i in found if i != 2} == {i: digests(3 * i, 3 * i + 3) for i in (0, 1, 3, 4, 5)}
    first, lost, last = found[2]
    assert [first, last] == [*digests(6, 7), *digests(8, 9)]
    assert isinstance(lost, Lost)
    assert lost.label == "number 7"
    assert "workers died" in lost.reason
    assert "memory is short" in lost.reason
    assert "number 7: its workers died" in caplog.text


def test_a_fate_on_which_workers_die_is_a_failure(genes, alone, tmp_path, monkeypatch):
    """The reason is in the store, and in what is written."""

    class Deadly:
        threads = 1

        def __init__(self, executor):
            self.executor = executor

        def device(self, device):
            return torch.device("cpu")

        def run(self, job, tasks):
            for task, answer in self.executor.run(job, tasks):
                if "gene3" in task.data.names:
                    answer[task.data.names.index("gene3")] = Lost("'gene3'", "its workers died, several times in a row")
                yield task, answer

    from cellfate.tl import decompose as door

    monkeypatch.setattr(sys.modules["cellfate.tl.decompose"] if not hasattr(door, "executor") else door, "executor", lambda client: Deadly(Serial()))  # fmt: skip
    with pytest.warns(cf.CellfateWarning, match="1 of 6 fates could not be fitted: 'gene3'"):
        found = decomposed(genes, store=tmp_path / "s", chunk_size=2)
    status = cf.get.responses(found).set_index("response")["status"]
    assert status["gene3"] == "failed: its workers died, several times in a row"
    assert set(cf.get.components(found)["response"]) == set(genes.var_names) - {"gene3"}


# -- a scheduler that dies ---------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_scheduler_is_killed_and_the_job_goes_on_from_its_store(genes, alone, tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(*words):
        out = subprocess.DEVNULL
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *words], env=environment, stdout=out, stderr=out, cwd=ROOT
        )

    scheduler = start("scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard")
    worker = start("worker", address, "--nworkers", "1", "--nthreads", "1", "--no-dashboard", "--death-timeout", "5")
    try:
        with distributed.Client(address, timeout=60) as client:
            client.wait_for_workers(1, timeout=60)

            def kill():
                wait_for(lambda: len(list((tmp_path / "s" / "chunks").glob("*.zip"))) >= 2)
                scheduler.kill()

            killer = threading.Thread(target=kill)
            killer.start()
            with pytest.raises(
                Interrupted, match=r"the scheduler at tcp://.* is gone: \d of 6 chunks are in .*Run the same again"
            ):
                decomposed(genes, client=client, store=tmp_path / "s", chunk_size=1)
            killer.join()
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()
    assert 2 <= len(found_at(tmp_path / "s").done()) < 6
    assert_same(decomposed(genes, store=tmp_path / "s", chunk_size=1), alone)
