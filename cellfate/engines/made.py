"""Bases that were made for one response and serve the next: kept by what they were made from, up to a size."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import TypeVar, cast

import numpy as np

from cellfate.engines.product_columns import ProductColumns
from cellfate.places.basis import FieldBasis

MOST = 2**30  # bytes kept
Basis = TypeVar("Basis", FieldBasis, ProductColumns)


class Made:
    """The bases made lately. What is found here is what would be made again, so that nothing depends on who asked before."""

    def __init__(self, most: float = MOST) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, FieldBasis | ProductColumns] = OrderedDict()
        self._lock = Lock()  # responses are fitted side by side, and the second waits for what the first is making

    def find(self, arrays: Sequence[np.ndarray], settings: tuple[Hashable, ...], make: Callable[[], Basis]) -> Basis:
        """The basis made of these arrays with these settings, made where it is not kept."""
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        key = (digest.digest(), settings)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(basis.n * basis.rank * 8 for basis in self._kept.values()) > self.most:
                self._kept.popitem(last=False)
            return cast(Basis, self._kept[key])
