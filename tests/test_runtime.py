"""Devices, dtypes, seeds, verbosity."""

import io
import logging
import sys
import warnings

import numpy as np
import pytest
import torch

from cellfate import _runtime
from cellfate.errors import CellfateWarning


@pytest.fixture(autouse=True)
def _same_verbosity_after():
    before = _runtime.logger.level
    yield
    _runtime.logger.setLevel(before)


def test_auto_takes_what_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _runtime.resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _runtime.resolve_device("auto") == torch.device("cuda")
    assert _runtime.resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="there are 2 CUDA devices, 'cuda:0' to 'cuda:1'"):
        _runtime.resolve_device("cuda:2")


def test_a_device_object_passes():
    assert _runtime.resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "finds no CUDA device. Use device='cpu' or 'auto'"),
        ("gpu", "device 'gpu' is unknown"),
        ("mps", "device 'mps' is not supported"),
    ],
)
def test_device_errors(device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        _runtime.resolve_device(device)


@pytest.mark.parametrize("name", ["float64", "float32"])
def test_dtypes(name):
    dtype = getattr(torch, name)
    assert _runtime.resolve_dtype(name) is dtype
    assert _runtime.resolve_dtype(dtype) is dtype


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "double"])
def test_dtype_errors(dtype):
    with pytest.raises(ValueError, match="is not supported: use 'float64'"):
        _runtime.resolve_dtype(dtype)


def test_one_seed_however_it_is_given():
    expected = np.random.default_rng(7).random(3)
    for rng in (7, np.int64(7), np.random.SeedSequence(7), np.random.default_rng(7)):
        np.testing.assert_array_equal(_runtime.generator(rng).random(3), expected)
    assert not np.array_equal(_runtime.generator(None).random(3), _runtime.generator(None).random(3))


def test_a_generator_moves_on():
    rng = np.random.default_rng(7)
    assert _runtime.generator(rng) is rng


def test_a_legacy_state_moves_on():
    state, twin = np.random.RandomState(7), np.random.RandomState(7)
    first = _runtime.generator(state).random(3)
    np.testing.assert_array_equal(first, twin.random_sample(3))
    assert state.random_sample() == twin.random_sample()


@pytest.mark.parametrize(
    ("rng", "error", "message"),
    [
        ("7", TypeError, "not str"),
        (True, TypeError, "not bool"),
        (7.0, TypeError, "not float"),
        (-1, ValueError, "0 or more"),
    ],
)
def test_seed_errors(rng, error, message):
    with pytest.raises(error, match=message):
        _runtime.generator(rng)


@pytest.mark.parametrize("level", ["warning", 1])
def test_verbosity_silences_log_and_progress(level, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a session without a logging setup of its own
    _runtime.logger.info("first")
    assert list(_runtime.progress(range(3), desc="second")) == [0, 1, 2]
    assert "cellfate: first\n" in stream.getvalue()
    assert "second" in stream.getvalue()
    said = len(stream.getvalue())
    _runtime.verbosity(level)
    _runtime.logger.info("third")
    assert list(_runtime.progress(range(3), desc="fourth")) == [0, 1, 2]
    assert len(stream.getvalue()) == said


@pytest.mark.parametrize("level", ["loud", 4, -1])
def test_verbosity_errors(level):
    with pytest.raises(ValueError, match="use one of"):
        _runtime.verbosity(level)


def test_tasks_side_by_side_keep_their_order_and_leave_threads_and_warnings_as_they_were():
    before, filters = torch.get_num_threads(), list(warnings.filters)
    torch.set_num_threads(3)
    try:
        seen = []

        def work(task: int) -> tuple[int, int]:
            _runtime.warn("of one of many")
            seen.append(task)
            return task * task, torch.get_num_threads()

        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            done = list(_runtime.side_by_side(work, range(50), torch.device("cpu")))
        assert [square for square, _ in done] == [task * task for task in range(50)]
        assert {threads for _, threads in done} == {1}
        assert not told
        assert torch.get_num_threads() == 3
        taken = []

        def take() -> None:
            for _ in _runtime.side_by_side(work, range(50), torch.device("cpu")):
                taken.append(torch.get_num_threads())
                _runtime.warn("of who takes them")

        with pytest.warns(CellfateWarning, match="of who takes them"):
            take()
        assert set(taken) == {3}
        seen = seen[:50]
        assert sorted(seen) == list(range(50))
        with pytest.raises(ZeroDivisionError):
            list(_runtime.side_by_side(lambda task: 1 / task, range(4), torch.device("cpu")))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert warnings.filters == filters
