"""Answers as text and numbers, to the last bit, and back: what a file of the store holds. No code is kept, and none is run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from cellfate.distributed.posteriors import Found
from cellfate.errors import DataError, Failure
from cellfate.inference.fit import GLMMFit
from cellfate.inference.hyperposterior import Hyperposterior

KINDS = {kind.__name__: kind for kind in (GLMMFit, Failure, Found, Hyperposterior)}
ARRAY, KIND, TUPLE = "__array__", "__kind__", "__tuple__"


def pack(answers: Sequence[Any]) -> tuple[list[str], np.ndarray]:
    """A text of JSON for each answer, and the numbers (m,) float64 of all its arrays."""
    numbers: list[np.ndarray] = []
    texts = [json.dumps(_plain(one, numbers)) for one in answers]
    return texts, np.concatenate([np.zeros(0), *numbers])


def unpack(texts: Sequence[str], numbers: np.ndarray) -> list[Any]:
    """The answers again."""
    return [_made(json.loads(text), numbers) for text in texts]


def _plain(value: Any, numbers: list[np.ndarray]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.bool_ | np.integer | np.floating | np.str_):
        return value.item()
    if isinstance(value, np.ndarray):
        exact = value.astype(np.float64) if value.dtype.kind in "fiub" else None  # of float32, too
        if exact is None or not np.array_equal(exact.astype(value.dtype), value, equal_nan=True):
            raise TypeError(f"an array of {value.dtype} is no float64.")
        begin = sum(len(one) for one in numbers)
        numbers.append(exact.ravel())
        return {ARRAY: [begin, list(value.shape), value.dtype.str]}
    if isinstance(value, tuple):
        return {TUPLE: [_plain(one, numbers) for one in value]}
    if isinstance(value, list):
        return [_plain(one, numbers) for one in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"names are text, not {list(value)[:3]!r}.")
        return {key: _plain(one, numbers) for key, one in value.items()}
    name = type(value).__name__
    if KINDS.get(name) is not type(value):
        raise TypeError(f"a {name} cannot be kept.")
    return {KIND: name} | {f.name: _plain(getattr(value, f.name), numbers) for f in fields(value)}


def _made(value: Any, numbers: np.ndarray) -> Any:
    if isinstance(value, list):
        return [_made(one, numbers) for one in value]
    if not isinstance(value, dict):
        return value
    if ARRAY in value:
        begin, shape, dtype = value[ARRAY]
        size = int(np.prod(shape, dtype=np.int64))
        if begin + size > len(numbers):
            raise DataError("there are fewer numbers than the text says.")
        return numbers[begin : begin + size].reshape(shape).astype(dtype)
    if TUPLE in value:
        return tuple(_made(one, numbers) for one in value[TUPLE])
    made = {key: _made(one, numbers) for key, one in value.items() if key != KIND}
    return KINDS[value[KIND]](**made) if KIND in value else made
