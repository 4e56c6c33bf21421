"""Bases that were made for one response and serve the next: kept by what they were made from, up to a size."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

import numpy as np

from cellfate.places.basis import FieldBasis

MOST = 2**30  # bytes kept


class Made:
    """The bases made lately. What is found here is what would be made again, so that nothing depends on who asked before."""

    def __init__(self, most: float = MOST) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, FieldBasis] = OrderedDict()
        self._lock = Lock()  # responses are fitted side by side, and the second waits for what the first is making

    def find(
        self, field: tuple[type, np.ndarray, np.ndarray], settings: tuple[Hashable, ...], make: Callable[[], FieldBasis]
    ) -> FieldBasis:
        """The basis of a field (its kernel, coordinates and specimens) with these settings, made where it is not kept."""
        kernel, *arrays = field
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        key = (kernel, digest.digest(), settings)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(basis.n * basis.rank * 8 for basis in self._kept.values()) > self.most:
                self._kept.popitem(last=False)
            return self._kept[key]
