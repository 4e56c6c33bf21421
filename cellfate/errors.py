"""What can go wrong, in one place: bad input is an error, a doubtful result is a warning."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class DataError(ValueError):
    """The input breaks the data contract; the message names the key, what was found and what to do."""


class Interrupted(RuntimeError):
    """Work was stopped from outside before it was done; the message says how much is, and how to go on."""


class CellfateWarning(UserWarning):
    """The answer stands, but something about it should be known."""


def unknown(what: str, value: object, known: Iterable[str]) -> DataError:
    """The error for an option with a value that is none of the known ones: the similar one first."""
    names = list(known)
    close = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? There is" if close else "choose from"
    return DataError(f"unknown {what} {value!r}; {hint} {', '.join(names)}.")


@dataclass(frozen=True)
class Failure:
    """One of many responses that has no fit, and why."""

    response: str
    reason: str
