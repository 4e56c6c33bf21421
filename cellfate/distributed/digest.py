"""What went into a job, as a short text: the same for the same arrays and settings, another for any other."""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

CHARACTERS = 32  # of a digest: 128 bits


def digest(value: Any) -> str:
    """SHA-256 of plain data: numbers, text, arrays, tensors, sparse matrices, and lists, dicts and dataclasses of them.

    Of a dataclass what it was made from counts, not what was worked out since. Arrays count by dtype, shape and content.
    """
    found = hashlib.sha256()
    _add(found, value)
    return found.hexdigest()[:CHARACTERS]


def _add(found: Any, value: Any) -> None:
    """Each part with its kind and its length, so that no two values read the same."""
    if value is None or isinstance(value, bool | int | float | complex | str | np.generic):
        text = repr(value.item() if isinstance(value, np.generic) else value).encode()
        _tagged(found, type(value).__name__ if not isinstance(value, np.generic) else "scalar", len(text))
        found.update(text)
    elif isinstance(value, bytes):
        _tagged(found, "bytes", len(value))
        found.update(value)
    elif isinstance(value, np.ndarray):
        if value.dtype == object:
            _tagged(found, "objects", value.shape)
            for one in value.ravel().tolist():
                _add(found, one)
        else:
            _tagged(found, "array", value.dtype.str, value.shape)
            found.update(np.ascontiguousarray(value).data if value.size else b"")
    elif hasattr(value, "detach") and hasattr(value, "numpy"):  # a tensor, on any device
        _add(found, value.detach().cpu().numpy())
    elif hasattr(value, "tocsr"):
        rows = value.tocsr().copy()
        rows.sum_duplicates()  # sorts the columns, too: one matrix may be stored in several ways
        _tagged(found, "sparse", rows.shape)
        for part in (rows.indptr.astype(np.int64), rows.indices.astype(np.int64), rows.data):
            _add(found, part)
    elif isinstance(value, dict):
        _tagged(found, "dict", len(value))
        for key, one in sorted(value.items(), key=lambda item: repr(item[0])):
            _add(found, key)
            _add(found, one)
    elif isinstance(value, list | tuple):
        _tagged(found, "list", len(value))
        for one in value:
            _add(found, one)
    elif isinstance(value, slice):
        _add(found, ["slice", value.start, value.stop, value.step])
    elif is_dataclass(value) and not isinstance(value, type):
        _tagged(found, type(value).__qualname__)
        _add(found, {f.name: getattr(value, f.name) for f in fields(value)})
    elif isinstance(value, Exception):
        _add(found, [type(value).__name__, str(value)])
    else:
        raise TypeError(f"a {type(value).__qualname__} has no digest: what it holds is not known.")


def _tagged(found: Any, *parts: Any) -> None:
    found.update(f"<{' '.join(map(str, parts))}>".encode())
