"""`cellfate` on the command line: each option is an argument of the API function, or says where it runs, nothing more.

Tables go to stdout, progress, warnings and errors to stderr. Exit codes: 0 done; 2 something is wrong with the input, the options or the
machine, said in one line; 3 a job is not complete; 130 interrupted (Ctrl-C), 143 terminated (SIGTERM): what a store has stays good.
"""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cellfate as cf
from cellfate._runtime import logger
from cellfate.cli.fit import DEMO_TRUTH, decompose, demo
from cellfate.cli.jobs import INCOMPLETE, add_merge, add_status, merge, status
from cellfate.cli.options import ABSENT, Parser, add_decompose, add_demo, configured
from cellfate.errors import CellfateWarning, DataError, Interrupted

__all__ = ["ABSENT", "DEMO_TRUTH", "main", "parser"]

INTERRUPTED, TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler sends it before time is up: the same as Ctrl-C, with another exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    try:
        words = configured(sys.argv[1:] if argv is None else argv)
    except DataError as e:
        print(f"cellfate: error: {_one_line(e)}", file=sys.stderr)
        return 2
    arguments = vars(parser().parse_args(words))
    command, level = arguments.pop("command"), arguments.pop("verbosity")
    before = logger.level
    cf.verbosity(level)
    try:
        with warnings.catch_warnings():
            # Warnings of other packages are for programmers; ours are for the user.
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", CellfateWarning)
            warnings.showwarning = _show_warning
            with _terminable():
                return int(command(**arguments) or 0)
    except Interrupted as e:
        print(f"cellfate: error: {_one_line(e)}", file=sys.stderr)
        return INCOMPLETE
    except (
        ValueError,
        OSError,
        NotImplementedError,
        MemoryError,
        RuntimeError,
        ModuleNotFoundError,
    ) as e:  # DataError is a ValueError
        text = _explained(e)
        if text is None:
            raise
        print(f"cellfate: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        ended = isinstance(e, Terminated)
        what = "terminated" if ended else "interrupted"
        print(f"cellfate: {what}{_one_line(e, '').removeprefix('stopped')}", file=sys.stderr)
        return TERMINATED if ended else INTERRUPTED
    finally:
        logger.setLevel(before)


def parser() -> Parser:
    """Return the parser of all commands."""
    top = Parser(prog="cellfate", description=cf.__doc__, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"cellfate {cf.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_demo(commands, demo)
    add_decompose(commands, decompose)
    add_status(commands, status)
    add_merge(commands, merge)
    return top


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM ends the work as Ctrl-C does, and a second one ends the process."""

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # signals are for the main thread
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _explained(error: Exception) -> str | None:
    """In one line what is wrong, or None where it is a bug of ours."""
    text = _one_line(error)
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory ({text}). Take fewer cells, give --library-key if there are several specimens, or a larger machine."
    if name in ("LinAlgError", "_LinAlgError"):
        return f"a matrix could not be solved ({text}). Try --dtype float64, and look for cells at one position or copies of a cell."
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        return None
    return text


def _one_line(error: BaseException, silent: str | None = None) -> str:
    """The message in one line; of an error without one its name, or what stands for it."""
    return " ".join(str(error).split()) or (type(error).__name__ if silent is None else silent)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"cellfate: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
