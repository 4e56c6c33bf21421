"""Bases kept for the next response: made once, whoever asks at the same time, and nobody waits for another one's."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier, Event

import numpy as np

from cellfate.engines.made import Made


@dataclass(frozen=True)
class Basis:
    n: int
    rank: int


def test_what_several_ask_for_at_once_is_made_once():
    made, calls, together = Made(), [], Barrier(4)

    def make():
        calls.append(1)
        return Basis(10, 2)

    def ask(_):
        together.wait(10)
        return made.find([np.arange(3.0)], ("a",), make)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert len(calls) == 1
    assert all(basis is found[0] for basis in found)


def test_one_basis_does_not_wait_for_another():
    made, other = Made(), Event()

    def slow():
        assert other.wait(10), "the second basis waited for the first"
        return Basis(10, 1)

    def quick():
        other.set()
        return Basis(10, 2)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(made.find, [np.arange(3.0)], ("a",), slow)
        second = pool.submit(made.find, [np.arange(3.0)], ("b",), quick)
        assert first.result().rank == 1
        assert second.result().rank == 2


def test_the_one_asked_for_longest_ago_goes_first():
    made, calls = Made(most=2 * 8 * 10), []

    def of(name):
        def make():
            calls.append(name)
            return Basis(10, 1)

        return made.find([np.arange(3.0)], (name,), make)

    for name in "abacaba":  # two fit
        of(name)
    assert calls == ["a", "b", "c", "b"]


def test_other_arrays_are_another_basis():
    made = Made()
    one = made.find([np.arange(3.0)], ("a",), lambda: Basis(3, 1))
    two = made.find([np.arange(3.0) + 1], ("a",), lambda: Basis(3, 2))
    assert (one.rank, two.rank) == (1, 2)
