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
        self._lock = Lock()
        self._making: dict[
            Hashable, Lock
        ] = {}  # one each: responses side by side wait for the basis they share, not for others

    def find(self, arrays: Sequence[np.ndarray], settings: tuple[Hashable, ...], make: Callable[[], Basis]) -> Basis:
        """The basis made of these arrays with these settings, made where it is not kept."""
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        key = (digest.digest(), settings)
        with self._lock:
            making = self._making.setdefault(key, Lock())
        with making:
            with self._lock:
                basis = self._kept.get(key)
            if basis is None:
                basis = make()
            with self._lock:
                self._kept[key] = basis
                self._kept.move_to_end(key)
                while len(self._kept) > 1 and sum(one.n * one.rank * 8 for one in self._kept.values()) > self.most:
                    self._making.pop(self._kept.popitem(last=False)[0], None)
        return cast(Basis, basis)
