"""What is finished is kept as a whole; what is damaged is seen; what is of another job is refused."""

import json
import os
import resource
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest

import cellfate as cf
from cellfate.distributed.digest import digest
from cellfate.distributed.records import pack, unpack
from cellfate.distributed.store import Plan, Store, StoreError, found_at
from cellfate.errors import DataError, Failure
from cellfate.inference.fit import GLMMFit
from tests.distributed.helpers import ROOT, assert_same, command, decomposed, embryo, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:.*in doubt:cellfate.CellfateWarning")


@pytest.fixture(scope="module")
def finished(genes, tmp_path_factory):
    """A store that is complete, and what came out."""
    folder = tmp_path_factory.mktemp("store") / "results.store"
    return folder, decomposed(genes, store=folder, chunk_size=2)


@pytest.fixture
def copied(finished, tmp_path):
    import shutil

    return shutil.copytree(finished[0], tmp_path / "results.store")


def plan(**changes):
    default = {
        "inputs": {"design": "a"},
        "settings": {"family": "poisson"},
        "names": ["x", "y"],
        "chunks": [(0, 2)],
        "responses": ["r"],
    }
    return Plan(**default | changes)


# -- files -------------------------------------------------------------------------------------------------------------


def test_answers_come_back_to_the_last_bit(tmp_path):
    draws = {"share": np.array([0.1 + 0.2, np.nan, -0.0, 1e-310]), "x": np.float32([1 / 3]).astype(np.float32)}
    fit = GLMMFit({"variance": [np.float64(1 / 3), float("inf")]}, {"response": ["x/y", "ü"]}, {"term": []}, draws, {}, {"sd": 0.1}, -1.5, float("nan"), {"n": np.int64(3), "ok": np.bool_(True), "none": None})  # fmt: skip
    store = Store.open(tmp_path / "s", plan())
    store.write(0, [fit, Failure("y", "why")])
    one, other = store.read(0)
    assert other == Failure("y", "why")
    for name, x in draws.items():
        assert one.draws[name].dtype == x.dtype
        assert one.draws[name].tobytes() == x.tobytes()
    assert one.components == {"variance": [1 / 3, float("inf")]}
    assert one.shares == fit.shares
    assert one.diagnostics == {"n": 3, "ok": True, "none": None}
    assert np.isnan(one.log_evidence)


def test_only_known_things_are_kept():
    with pytest.raises(TypeError, match="a set cannot be kept"):
        pack([{"a": {1, 2}}])
    with pytest.raises(TypeError, match="is no float64"):
        pack([np.array(["text"])])
    assert unpack(*pack([])) == []


@pytest.mark.parametrize("part", [0.0, 0.1, 0.9, 0.9999])
def test_a_file_that_is_cut_short_is_seen_and_computed_again(genes, finished, copied, part):
    path = copied / "chunks" / "00001.zarr.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.warns(cf.CellfateWarning, match=r"00001.zarr.zip is damaged or cut short .* computed again") as said:
        again = decomposed(genes, store=copied, chunk_size=2)
    assert sum("damaged" in str(one.message) for one in said) == 1
    assert_same(finished[1], again)
    assert found_at(copied).read(1) is not None


def test_a_bit_that_changed_is_seen(tmp_path):
    store = Store.open(tmp_path / "s", plan())
    answers = [{"x": np.arange(500.0)}, Failure("y", "why")]
    store.write(0, answers)
    path, rng = store.path(0), np.random.default_rng(0)
    whole = path.read_bytes()
    seen = 0
    for place in rng.integers(len(whole), size=60):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(broken))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = store.read(0)
        seen += found is None
        # a date in a header is nobody's answer
        assert found is None or (found[1] == answers[1] and (found[0]["x"] == answers[0]["x"]).all())
    assert seen > 40


def test_a_chunk_of_another_job_is_not_taken(tmp_path):
    one, other = Store.open(tmp_path / "a", plan()), Store.open(tmp_path / "b", plan(settings={"family": "gaussian"}))
    one.write(0, [Failure("x", "."), Failure("y", ".")])
    os.replace(one.path(0), other.path(0))
    with pytest.warns(cf.CellfateWarning, match="of another job"):
        assert other.read(0) is None


def test_what_was_never_finished_is_no_chunk_and_goes_in_time(tmp_path):
    store = Store.open(tmp_path / "s", plan())
    old, new = (store.folder / "chunks" / f".00000.zarr.zip.{name}.part" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert Store.open(tmp_path / "s", plan()).done() == []
    assert not old.exists()
    assert new.exists()  # it may be under way


# -- which job ---------------------------------------------------------------------------------------------------------


def test_a_store_begun_is_gone_on_with(genes, finished, copied, alone, monkeypatch):
    (copied / "chunks" / "00002.zarr.zip").unlink()
    asked = []
    from cellfate.inference import many

    fit_one = many._fit_one
    monkeypatch.setattr(many, "_fit_one", lambda glmm, trend, name, *rest: asked.append(name) or fit_one(glmm, trend, name, *rest))  # fmt: skip
    again = decomposed(genes, store=copied, chunk_size=2)
    assert asked == ["gene4", "gene5"]
    assert_same(again, finished[1])
    assert_same(again, alone)


def changed_counts(adata):
    adata.X[7, 3] += 1


def changed_place(adata):
    adata.obsm["spatial"][0] += 0.1


def changed_tree(adata):
    adata.uns["tree"] = adata.uns["tree"].replace("cell7:", "x:").replace("cell9:", "cell7:").replace("x:", "cell9:")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"rng": 4}, "begun with seed=3, and now seed is 4"),
        (None, {"lengthscale": 0.6}, "begun with lengthscale=0.7, and now lengthscale is 0.6"),
        (None, {"method": "laplace"}, "begun with method='variational', and now method is 'laplace'"),
        (None, {"dtype": "float32"}, "begun with dtype='float64', and now dtype is 'float32'"),
        (None, {"chunk_size": 3}, "begun with chunk_size=2, and now chunk_size is 3"),
        (None, {"priors": {"sd_lineage": ("half_normal", 1.0)}}, "begun with priors=None, and now"),
        (changed_counts, {}, "other values of the responses: 1 of 3 chunks differ, the first holds 'gene2', 'gene3'"),
        (changed_place, {}, "begun with another component 'spatial' than there is now"),
        (changed_tree, {}, "begun with another component 'lineage' than there is now"),
    ],
)  # fmt: skip
def test_another_job_is_refused(genes, copied, change, options, message):
    adata = genes.copy()
    if change is not None:
        change(adata)
    with pytest.raises(StoreError, match=message):
        decomposed(adata, store=copied, **{"chunk_size": 2} | options)


def test_other_fates_are_refused(genes, copied):
    with pytest.raises(StoreError, match=r"begun for 6 responses, now there are 5: 1 are not asked for now \(gene5\)"):
        decomposed(genes[:, :5].copy(), store=copied, chunk_size=2)
    with pytest.raises(StoreError, match="in another order"):
        decomposed(genes[:, ::-1].copy(), store=copied, chunk_size=2)


def test_another_cellfate_is_refused_and_another_torch_is_told(genes, copied):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"versions": manifest["versions"] | {"torch": "1.0"}}))
    with pytest.warns(cf.CellfateWarning, match=r"begun with torch 1\.0, and this is"):
        decomposed(genes, store=copied, chunk_size=2)
    path.write_text(json.dumps(manifest | {"cellfate": "0.0.1"}))
    with pytest.raises(StoreError, match=r"begun by cellfate 0\.0\.1.* Finish it with cellfate 0\.0\.1"):
        decomposed(genes, store=copied, chunk_size=2)


def test_a_folder_of_something_else_is_left_alone(genes, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"is no store of results, and holds thesis\.tex"):
        decomposed(genes, store=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(StoreError, match="is a file, wanted a folder"):
        decomposed(genes, store=tmp_path / "thesis.tex")


def test_without_a_seed_the_store_has_one(genes, tmp_path):
    one, other = (decomposed(genes[:, :1].copy(), store=tmp_path / "s", rng=None) for _ in range(2))
    assert_same(one, other)


def test_a_store_is_a_folder(genes):
    with pytest.raises(DataError, match="store is a int, wanted the name of a folder"):
        cf.tl.decompose(genes, ["gene0"], family="poisson", store=3)


def test_digests_tell_what_differs():
    x = np.arange(6.0)
    values = [x, x[:5], x.reshape(2, 3), x.astype("f4"), x.astype(int), [1, 2], [12], ["1", 2], ["ab", "c"], ["a", "bc"], {"a": 1}, {"a": 1.0}, None, "None", True, 1, b"a", "a"]  # fmt: skip
    found = [digest(v) for v in values]
    assert len(set(found)) == len(found)
    assert digest(np.asfortranarray(x.reshape(2, 3))) == digest(x.reshape(2, 3))
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    with pytest.raises(TypeError, match="a object has no digest"):
        digest(object())


def test_every_kernel_has_a_digest():
    from scipy.sparse import csr_array

    from cellfate import kernels
    from cellfate.kernels.base import Kernel

    adata = embryo()
    from cellfate.io.anndata import read_cells

    cells = read_cells(adata, None, family="poisson")
    codes, x = np.arange(N := cells.n) % 4, np.linspace(0, 1, cells.n)
    ring = csr_array((np.ones(N), (np.arange(N), (np.arange(N) + 1) % N)), shape=(N, N))
    tree = (cells.forest, cells.leaf)
    made = [
        *(getattr(kernels, name)(*tree) for name in ("Brownian", "OrnsteinUhlenbeck", "Pagel", "EarlyBurst", "Clone"))
    ]
    made += [
        kernels.Matern32(cells.coordinates),
        kernels.Rbf(cells.coordinates) if hasattr(kernels, "Rbf") else kernels.Matern12(cells.coordinates),
    ]
    made += [
        kernels.Graph(ring + ring.T),
        kernels.Composition(np.eye(N)[:, :3]),
        kernels.Slopes(codes, x),
        kernels.CorrelatedSlopes(codes, x, "x"),
    ]
    made += [kernels.Product(made[0], made[5])]
    assert all(isinstance(k, Kernel) for k in made)
    before = [digest(k) for k in made]
    for kernel in made:
        _ = kernel.hyperparameters  # what is worked out of a kernel is no part of it
    assert [digest(k) for k in made] == before
    assert len(set(before)) == len(before)


# -- what can go wrong -------------------------------------------------------------------------------------------------

FULL = """
import os, resource, sys, warnings
from tests.distributed.helpers import decomposed, embryo
folder, limit = sys.argv[1], int(sys.argv[2])
if limit:
    from cellfate.distributed import store
    write, written = store.Store.write, []
    def small(self, index, answers):
        if len(written) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        written.append(index)
        return write(self, index, answers)
    store.Store.write = small
warnings.simplefilter("ignore")
try:
    decomposed(embryo(), store=folder, chunk_size=1)
except ValueError as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_is_said_and_nothing_is_lost(genes, alone, tmp_path):
    disk, limit = tmp_path / "disk", 0
    disk.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode == 0
    )
    if not mounted:
        limit = 2000  # bytes of a file: the next best thing to a small disk
        if not hasattr(resource, "RLIMIT_FSIZE"):
            pytest.skip("neither a small file system nor a limit on the size of files can be had here")
    try:
        store = disk / "results.store"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        out = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(FULL), store, str(limit)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert out.stdout.startswith("StoreError chunk "), out.stderr
        assert ("No space left on device" if mounted else "File too large") in out.stdout
        done = found_at(store).done()
        assert 0 < len(done) < 6
        assert f"{len(done)} of 6 chunks are in {store}, and stay good. Make room and run the same again" in out.stdout
        assert not list((store / "chunks").glob(".*"))  # no half of a chunk
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert_same(decomposed(genes, store=store, chunk_size=1), alone)
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


def test_two_jobs_on_one_store(genes, alone, tmp_path):
    genes.write_h5ad(tmp_path / "in.h5ad")
    words = [
        *["--family", "poisson", "--lengthscale", "0.7", "--rng", "3", "--chunk-size", "1", "--genes"],
        *genes.var_names,
    ]
    jobs = [command("decompose", tmp_path / "in.h5ad", *words, "--store", tmp_path / "s", "--out", tmp_path / f"{i}.h5ad") for i in (0, 1)]  # fmt: skip
    said = [job.communicate() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    import anndata

    for i in (0, 1):
        found = anndata.read_h5ad(tmp_path / f"{i}.h5ad")
        for name in ("components", "draws"):
            a, b = found.uns["cellfate"][name], alone.uns["cellfate"][name]
            assert list(a.select_dtypes("number").columns) == list(b.select_dtypes("number").columns)
            np.testing.assert_array_equal(a.select_dtypes("number"), b.select_dtypes("number"))
    assert len(found_at(tmp_path / "s").done()) == 6
    assert not list((tmp_path / "s" / "chunks").glob(".*"))
    wait_for(lambda: all(job.poll() is not None for job in jobs))
