"""A job that is quick. Workers import this file, too, and are up sooner where it imports little."""

import hashlib
import os
import signal
import time
from dataclasses import dataclass

from cellfate.distributed.tasks import Job, Task


@dataclass(frozen=True, eq=False)
class Hash(Job):
    """Answers a number with its digest, after a while; `poison` is a number that ends the process it is in."""

    seconds: float = 0.0
    poison: int | None = None
    threads: int = 0

    def prepare(self):
        def work(numbers):
            time.sleep(self.seconds)
            if self.poison in numbers:
                os.kill(os.getpid(), signal.SIGKILL)
            return [hashlib.sha256(str(x).encode()).hexdigest() for x in numbers]

        return work


def numbered(count, of=1):
    """Tasks of `of` numbers each."""
    for i in range(count):
        numbers = list(range(i * of, (i + 1) * of))
        parts = [Task(i, f"number {x}", [x]) for x in numbers] if of > 1 else None
        yield Task(i, f"task {i}", numbers, parts)


def digests(first, last):
    return [hashlib.sha256(str(x).encode()).hexdigest() for x in range(first, last)]
