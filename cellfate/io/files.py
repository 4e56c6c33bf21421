"""Files in and out: AnnData and TreeData read with one clear error, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cellfate.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

SUFFIXES = (".h5ad", ".h5td")  # AnnData, TreeData


def check_suffix(path: Path) -> None:
    """Refuse a file whose name does not say that it is AnnData or TreeData."""
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'!r}: use .h5ad (AnnData) or .h5td (TreeData).")


def read(path: Path) -> AnnData:
    """Read a .h5ad or .h5td file into memory."""
    check_suffix(path)
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    try:
        if path.suffix == ".h5td":
            from treedata import read_h5td

            return read_h5td(path)
        from anndata import read_h5ad

        return read_h5ad(path)
    except Exception as e:  # h5py and anndata raise whatever a broken file makes them trip over
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DataError(f"{path} cannot be read as {path.suffix}: {reason}") from e


def write(adata: AnnData, path: Path) -> None:
    """Write a .h5ad or .h5td file; a file of that name is replaced only when the new one is complete."""
    check_suffix(path)
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    try:
        if path.suffix == ".h5td":
            adata.write_h5td(name)
        else:
            adata.write_h5ad(name)
        os.chmod(name, 0o666 & ~_umask())  # a temporary file is private, a result is not
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
