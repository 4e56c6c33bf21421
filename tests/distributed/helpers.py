"""Jobs that are quick, embryos that are small, and what two results have to have in common. Workers import this file, too."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

import cellfate as cf
from cellfate.distributed.tasks import Job, Task

N = 40
SETTINGS = {"lengthscale": 0.7, "rng": 3}
ROOT = Path(cf.__file__).parents[1]


def embryo(family="poisson", genes=6, n=N):
    """Cells with a tree and positions, and counts or measurements that know of neither."""
    adata = cf.datasets.simulate(n, family="poisson", rng=4)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(n, genes)) if family == "gaussian" else rng.poisson(rng.uniform(0.5, 3, (n, genes)))
    out = ad.AnnData(x.astype(float), obs=adata.obs, obsm=dict(adata.obsm), uns={"tree": adata.uns["tree"]})
    out.var_names = [f"gene{i}" for i in range(genes)]
    return out


def decomposed(adata, family="poisson", **options):
    return cf.tl.decompose(adata, list(adata.var_names), family=family, **SETTINGS | options, copy=True)


def assert_same(one, other):
    """To the last bit, but for the clock."""
    a, b = one.uns["cellfate"], other.uns["cellfate"]
    assert set(a) == set(b)
    for name, table in a.items():
        if isinstance(table, pd.DataFrame):
            without = [t.drop(columns="seconds", errors="ignore") for t in (table, b[name])]
            pd.testing.assert_frame_equal(*without, check_exact=True)
    pd.testing.assert_frame_equal(one.varm["cellfate_shares"], other.varm["cellfate_shares"], check_exact=True)


@dataclass(frozen=True, eq=False)
class Hash(Job):
    """Answers a number with its digest, after a while; `poison` is a number that ends the process it is in."""

    seconds: float = 0.0
    poison: int | None = None
    threads: int = 1

    def prepare(self):
        def work(numbers):
            time.sleep(self.seconds)
            if self.poison in numbers:
                os.kill(os.getpid(), signal.SIGKILL)
            return [hashlib.sha256(str(x).encode()).hexdigest() for x in numbers]

        return work


def numbered(count, of=1):
    """Tasks of `of` numbers each."""
    for i in range(count):
        numbers = list(range(i * of, (i + 1) * of))
        parts = [Task(i, f"number {x}", [x]) for x in numbers] if of > 1 else None
        yield Task(i, f"task {i}", numbers, parts)


def digests(first, last):
    return [hashlib.sha256(str(x).encode()).hexdigest() for x in range(first, last)]


def command(*words, **options):
    """`cellfate` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "cellfate.cli", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(what, seconds=60):
    """Until `what()` is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
