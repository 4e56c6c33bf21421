"""Jobs: where they run, how far they are (`status`), and their results as one file (`merge`)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cellfate as cf
from cellfate import _keys
from cellfate._runtime import logger
from cellfate.cli.options import TABLES, add_command, read_config
from cellfate.cli.show import print_tables
from cellfate.errors import DataError, Failure

if TYPE_CHECKING:
    from distributed import Client

    from cellfate.distributed.store import Store

INCOMPLETE = 3  # exit code
LOG = "log.txt"
SHOWN = 5  # responses that failed, and files that are damaged


def add_status(commands: Any, status: Callable[..., Any]) -> None:
    """Options of `cellfate status`."""
    command = add_command(
        commands, "status", status, "How far a job is: chunks that are done, failed and damaged ones."
    )
    command.add_argument("store", type=Path, metavar="DIR", help="the --store of the job")


def add_merge(commands: Any, merge: Callable[..., Any]) -> None:
    """Options of `cellfate merge`."""
    command = add_command(
        commands, "merge", merge, "Write the data of a job that is complete, with the results in them."
    )
    command.add_argument("store", type=Path, metavar="DIR", help="the --store of the job")
    command.add_argument("--out", type=Path, help="file to write; by default that of the job, or result.h5ad in DIR")
    command.add_argument("--input", type=Path, help="the input of the job, where it is no longer where it was")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")


@contextmanager
def connected(scheduler: str, workers: int | None, gpus_per_worker: int, config: Path | None) -> Iterator[Client]:
    """A client with workers; how they are started is in a table of the configuration."""
    from cellfate.distributed.clusters import cluster

    tables = {} if config is None else read_config(config)
    options = tables.get(scheduler, {}) if scheduler in TABLES else {}
    with cluster(scheduler, workers, gpus_per_worker, options) as client:
        yield client


@contextmanager
def noted(store: Path, source: Path, out: Path | None, options: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a store that is begun holds its command, for `merge`, and a log; a store that is not begun leaves nothing behind."""
    from cellfate.distributed.store import COMMAND, MANIFEST

    begun, theirs = (store / MANIFEST).exists(), store.is_dir() and any(store.iterdir())
    path, log = store / COMMAND, store / LOG
    if begun or not theirs:
        store.mkdir(parents=True, exist_ok=True)
        if not begun:
            note = {"input": str(source.resolve()), "out": None if out is None else str(out.resolve())}
            path.write_text(json.dumps(note | {"options": {k: _lasting(v) for k, v in options.items()}}, indent=1))
    handler = _Log(log, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    if store.is_dir() and (begun or not theirs):
        logger.addHandler(handler)
    try:
        yield
    except BaseException as error:  # the screen gets it later, and may be gone
        handler.handle(
            logger.makeRecord(logger.name, logging.ERROR, "", 0, f"{type(error).__name__}: {error}", (), None)
        )
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
        if not begun and not theirs and not (store / MANIFEST).exists():
            with suppress(OSError):
                path.unlink(missing_ok=True)
                log.unlink(missing_ok=True)
                store.rmdir()


class _Log(logging.FileHandler):
    """A log is no reason to stop, nor to fill the screen where the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:
        return None


def _lasting(value: Any) -> Any:
    """An option as it is meant from any folder."""
    if isinstance(value, list):
        return [_lasting(one) for one in value]
    if isinstance(value, str) and Path(value).is_file():
        return str(Path(value).resolve())
    return str(value) if isinstance(value, Path) else value


def _looked_at(folder: Path) -> tuple[Store, dict[int, list[Any]], list[str]]:
    """The store, answers by chunk, and what is wrong with chunks that are damaged."""
    from cellfate.distributed.store import StoreError, found_at, read_chunk

    store = found_at(folder)
    answers: dict[int, list[Any]] = {}
    damaged = []
    for index in store.done():
        first, last = store.plan.chunks[index]
        try:
            answers[index] = read_chunk(store.path(index), store.key, index, last - first)
        except StoreError as error:
            damaged.append(str(error))
        except FileNotFoundError:
            pass  # this very moment taken away
    return store, answers, damaged


def status(*, store: Path) -> int:
    """Print how far a job is; 0 where it is complete."""
    from cellfate.distributed.store import read_manifest
    from cellfate.inference.report import GLMMFit

    kept, answers, damaged = _looked_at(store)
    manifest = read_manifest(store)
    count, names = len(kept.plan.chunks), len(kept.plan.names)
    there = [one for chunk in answers.values() for one in chunk]
    failed = [one for one in there if isinstance(one, Failure)]
    doubtful = sum(isinstance(one, GLMMFit) and one.diagnostics["status"] != "converged" for one in there)
    what = "trees" if kept.plan.settings.get("n_trees") else "responses"
    settings = kept.plan.settings
    about = [f"{name} {settings[name]}" for name in ("family", "engine", "device", "dtype", "seed") if name in settings]
    made = [f"cellfate {manifest['cellfate']}", *(f"{name} {v}" for name, v in manifest["versions"].items())]
    print(f"{store}: {len(answers)} of {count} chunks, {len(there)} of {names} {what}")
    print(f"  {', '.join(about)}; {', '.join(made)}")
    print(f"  {len(failed)} failed, {doubtful} in doubt")
    for one in failed[:SHOWN]:
        print(f"  failed: {one.response}: {one.reason}")
    for text in damaged[:SHOWN]:
        print(f"  {text} It will be computed again.")
    if len(answers) == count:
        print(f"  complete: `cellfate merge {store}` writes the data with the results in them")
        return 0
    print("  not complete: the command of the job, given again, computes what is missing")
    return INCOMPLETE


def merge(*, store: Path, out: Path | None, input: Path | None, overwrite: bool) -> int:  # noqa: A002
    """Write the data of a complete job with the results in them."""
    from cellfate.cli.fit import arguments, check_folder, check_out
    from cellfate.distributed.store import COMMAND
    from cellfate.io.files import check_suffix, read, write

    kept, answers, damaged = _looked_at(store)
    count = len(kept.plan.chunks)
    if len(answers) < count:
        broken = f", {len(damaged)} are damaged" if damaged else ""
        print(
            f"cellfate: {len(answers)} of {count} chunks are in {store}{broken}: give the command of the job again, which computes what is "
            "missing, and then merge.",
            file=sys.stderr,
        )
        return INCOMPLETE
    try:
        note = json.loads((store / COMMAND).read_text())
    except (OSError, ValueError) as e:
        raise DataError(
            f"{store} has no {COMMAND} that can be read: it was begun from Python, where the same call of cf.tl.decompose gives the data."
        ) from e
    source = input or Path(note["input"])
    if not source.is_file():
        raise DataError(f"the input {source} is not there. Give --input FILE.")
    target = out or (Path(note["out"]) if note["out"] else store / f"result{source.suffix}")
    check_suffix(target)
    check_folder(target)
    check_out(target, source, overwrite)
    adata = read(source)
    fate, options = arguments(adata, source, note["options"])
    key = options.get("key_added", _keys.KEY)
    cf.tl.decompose(adata, fate, **options, store=store)
    write(adata, target)
    print_tables(adata, key)
    logger.info("results are in %s, uns[%r]", target, key)
    return 0
