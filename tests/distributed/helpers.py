"""Embryos that are small, what two results have to have in common, and the command in a process of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

import cellfate as cf

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
