"""What is sent to a worker: a job, which all tasks share, and tasks, each of them plain data.

A job is sent to every worker once, and makes there what its tasks share (an engine, bases, tables). Answers depend on the job and on
the task, not on the worker, on its earlier tasks, or on how many workers there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Work = Callable[[Any], Any]  # the data of a task to its answer


class Job(ABC):
    """What all tasks share: plain data that pickles, and how a task is answered.

    threads: that torch computes on while a task is answered; they are the job's, since last digits depend on them. 0 where torch is
    not needed, so that a worker is up sooner.
    """

    threads: int = 1

    @property
    def one_at_a_time(self) -> bool:
        """Whether a process may answer one task at a time only, though it has more threads."""
        return False

    @abstractmethod
    def prepare(self) -> Work:
        """What answers a task; made once in each process."""


@dataclass(frozen=True, eq=False)
class Task:
    """One of many: its place, what to call it in a message, and its data.

    parts: the same in smaller pieces whose answers, joined, are the answer of the whole, for a task that ends its workers: one
    piece may be to blame, and the others need not suffer. None where there are none.
    """

    index: int
    label: str
    data: Any
    parts: Sequence[Task] | None = None


@dataclass(frozen=True)
class Lost:
    """In place of an answer: the task ended its worker time and again."""

    label: str
    reason: str
