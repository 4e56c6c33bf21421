"""What every test runs under: no screen, no fight over cores, and data only where the environment says it is."""

import os
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the published data sets, one folder each."""
    folder = os.environ.get("CELLFATE_DATA")
    if not folder:
        pytest.skip("needs the published data: set CELLFATE_DATA to their folder")
    path = Path(folder)
    assert path.is_dir(), f"CELLFATE_DATA is {folder}, which is no folder"
    return path


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Folder of the reference numbers: CELLFATE_REFERENCE, or `reference` beside the data."""
    folder = os.environ.get("CELLFATE_REFERENCE")
    if not folder:
        data = os.environ.get("CELLFATE_DATA")
        folder = str(Path(data).resolve().parent / "reference") if data else ""
    if not folder or not (path := Path(folder)).is_dir():
        pytest.skip("needs the reference numbers: set CELLFATE_REFERENCE, or CELLFATE_DATA to the folder beside them")
    return path


@pytest.fixture(autouse=True)
def _as_many_threads():
    """The first compiled loop of numba starts OpenMP, and gives torch as many threads as there are cores: processes then fight over them."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _no_figures_left():
    """Figures that a test leaves open would pile up, and one test would draw into another's."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        import matplotlib.pyplot as plt

        plt.close("all")
