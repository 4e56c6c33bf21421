"""A folder in which a job keeps what is finished, so that one that was stopped goes on from there.

    manifest.json           what the job is: inputs by their digests, settings, versions, and which responses make a chunk
    chunks/00007.zarr.zip   answers of a chunk, a zarr group in one file: `texts` (JSON) and `numbers`; complete in itself
    values.json             what was worked out once for all chunks, such as the trend of the dispersion
    command.json            what the command line was, where there was one

Every file is written under another name, brought to disk and only then given its own, so that it is there as a whole or not at all. The
same job gives the same chunk whoever computes it: two jobs on one store overwrite like with like, and nobody has to hold a lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import time
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellfate import __version__
from cellfate._runtime import warn
from cellfate.distributed.digest import digest
from cellfate.distributed.records import pack, unpack
from cellfate.errors import DataError

FORMAT = 1
MANIFEST, VALUES, COMMAND, CHUNKS = "manifest.json", "values.json", "command.json", "chunks"
SUFFIX = ".zarr.zip"
STALE = 3600.0  # seconds after which a file that was never finished is taken away
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StoreError(DataError):
    """A store that is of another job, or that cannot be read or written."""


@dataclass(frozen=True)
class Plan:
    """What a job is. Everything that changes an answer is among it.

    inputs: digests by what they are of; settings: by argument; names: of the responses, in order; chunks: first and last + 1 of
    each; responses: a digest of those of each chunk; threads: of a worker.
    """

    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    names: Sequence[str]
    chunks: Sequence[tuple[int, int]]
    responses: Sequence[str]
    threads: int = 1

    @property
    def key(self) -> str:
        """By which a chunk is known to be of this job."""
        return digest(
            [self.inputs, self.settings, list(self.names), [list(c) for c in self.chunks], list(self.responses)]
        )


class Store:
    """The folder of one job."""

    def __init__(self, folder: str | os.PathLike[str], plan: Plan) -> None:
        self.folder, self.plan, self.key = Path(folder), plan, plan.key
        self.threads = plan.threads
        self._damaged: dict[int, int] = {}  # chunks, and when their files were written

    # -- the job -------------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: str | os.PathLike[str], plan: Plan) -> Store:
        """The store in a folder: begun where there is none, and refused where it is of another job."""
        store = cls(folder, plan)
        path = store.folder
        if path.exists() and not path.is_dir():
            raise StoreError(f"store {path} is a file, wanted a folder. Name another.")
        if path.is_dir() and not (path / MANIFEST).exists():
            strangers = [
                p.name
                for p in path.iterdir()
                if p.name not in (CHUNKS, COMMAND, VALUES, "log.txt") and p.name[0] != "."
            ]
            if strangers:
                raise StoreError(
                    f"{path} is no store of results, and holds {', '.join(sorted(strangers)[:3])}. Name an empty folder, or one that is not there."
                )
        try:
            (path / CHUNKS).mkdir(parents=True, exist_ok=True)
            store._sweep()
            written = asdict(plan) | {
                "format": FORMAT,
                "cellfate": __version__,
                "versions": versions(),
                "key": store.key,
            }
            _write_new(path / MANIFEST, json.dumps(written, indent=1).encode())
        except OSError as error:
            raise store._cannot_write("its manifest", error) from error
        manifest = read_manifest(path)
        store._check(manifest)
        store.threads = int(manifest["threads"])  # whoever goes on computes as it was begun
        return store

    def _check(self, manifest: Mapping[str, Any]) -> None:
        """Is this the job that the store is of?"""
        plan, where = self.plan, f"store {self.folder}"
        ours = json.loads(json.dumps(asdict(plan)))  # as it would be read
        redo = "Go on with what it was begun with, or name another store."
        if manifest["cellfate"] != __version__:
            raise StoreError(
                f"{where} was begun by cellfate {manifest['cellfate']}, and this is {__version__}, whose answers may differ. Finish it with "
                f"cellfate {manifest['cellfate']}, or name another store."
            )
        for what in ("settings", "inputs"):
            then, now = manifest[what], ours[what]
            for name in dict.fromkeys([*then, *now]):
                if then.get(name) != now.get(name):
                    if what == "inputs":
                        raise StoreError(f"{where} was begun with another {name} than there is now. {redo}")
                    raise StoreError(
                        f"{where} was begun with {name}={then.get(name)!r}, and now {name} is {now.get(name)!r}. {redo}"
                    )
        if manifest["names"] != ours["names"]:
            then, now = manifest["names"], ours["names"]
            gone, new = [x for x in then if x not in set(now)], [x for x in now if x not in set(then)]
            how = (
                f"{len(gone)} are not asked for now ({', '.join(gone[:3])}), {len(new)} are new ({', '.join(new[:3])})"
            )
            how = how if gone or new else "they are in another order"
            raise StoreError(f"{where} was begun for {len(then)} responses, now there are {len(now)}: {how}. {redo}")
        if manifest["chunks"] != ours["chunks"]:
            then, now = (one["chunks"][0][1] - one["chunks"][0][0] for one in (manifest, ours))
            raise StoreError(f"{where} was begun with chunks of {then} responses, now they have {now}. {redo}")
        changed = [i for i, (a, b) in enumerate(zip(manifest["responses"], ours["responses"], strict=True)) if a != b]
        if changed:
            first, last = ours["chunks"][changed[0]]
            raise StoreError(
                f"{where} was begun with other values of the responses: {len(changed)} of {len(ours['chunks'])} chunks differ, the first "
                f"holds {', '.join(map(repr, ours['names'][first:last][:3]))}. {redo}"
            )
        for name, then in manifest["versions"].items():
            if then != (now := versions()[name]):
                warn(
                    f"{where} was begun with {name} {then}, and this is {now}: chunks of the two may differ in their last digits.",
                    stacklevel=4,
                )

    # -- chunks --------------------------------------------------------------------------------------------------------

    def path(self, index: int) -> Path:
        """The file of a chunk."""
        return self.folder / CHUNKS / f"{index:05d}{SUFFIX}"

    def __contains__(self, index: int) -> bool:
        return self.path(index).exists()

    def read(self, index: int) -> list[Any] | None:
        """The answers of a chunk; None where they are not there, or damaged, which is a warning."""
        path = self.path(index)
        first, last = self.plan.chunks[index]
        try:
            return read_chunk(path, self.key, index, last - first)
        except FileNotFoundError:
            return None
        except StoreError as error:
            self._damaged[index] = self._written(index)
            warn(f"{error} It is computed again.", stacklevel=4)
            return None

    def finished_by_another(self, index: int) -> bool:
        """Whether a chunk is there that was missing, or damaged, when it was looked for."""
        return index in self and self._damaged.get(index) != self._written(index)

    def _written(self, index: int) -> int:
        try:
            return self.path(index).stat().st_mtime_ns
        except OSError:
            return 0

    def write(self, index: int, answers: Sequence[Any]) -> list[Any]:
        """Keep the answers of a chunk, and give them back as they will be read."""
        texts, numbers = pack(answers)
        try:
            _write(self.path(index), _zipped(texts, numbers, self.key, index))
        except OSError as error:
            raise self._cannot_write(f"chunk {index}", error) from error
        return unpack(texts, numbers)

    def done(self) -> list[int]:
        """Chunks whose file is there."""
        return [index for index in range(len(self.plan.chunks)) if index in self]

    def progress(self) -> str:
        """In words, how far the job is."""
        return f"{len(self.done())} of {len(self.plan.chunks)} chunks are in {self.folder}"

    # -- what is worked out once ---------------------------------------------------------------------------------------

    def value(self, name: str) -> Any:
        """What was kept under a name; a KeyError where there is nothing that can be read."""
        try:
            kept = json.loads((self.folder / VALUES).read_text())
        except (OSError, ValueError) as error:
            raise KeyError(name) from error
        if kept.get("key") != self.key:
            raise KeyError(name)
        return kept["values"][name]

    def keep_value(self, name: str, value: Any) -> None:
        """Keep plain data under a name."""
        try:
            _write(self.folder / VALUES, json.dumps({"key": self.key, "values": {name: value}}).encode())
        except OSError as error:
            raise self._cannot_write(name, error) from error

    def _cannot_write(self, what: str, error: OSError) -> StoreError:
        room = " Make room" if error.errno in FULL else " See to it"
        reason = error.strerror or str(error)
        with contextlib.suppress(OSError):
            return StoreError(
                f"{what} cannot be written to store {self.folder}: {reason}. {self.progress()}, and stay good.{room} and run the same again: "
                "only what is missing is computed."
            )
        return StoreError(f"{what} cannot be written to store {self.folder}: {reason}.")

    def _sweep(self) -> None:
        """Take away what was never finished, unless it may be under way."""
        for folder in (self.folder, self.folder / CHUNKS):
            for path in folder.glob(".*.part"):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > STALE:
                        path.unlink()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the job of a store is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as e:
        raise StoreError(f"{folder} is no store of results: it has no {MANIFEST}.") from e
    except (OSError, ValueError) as e:
        raise StoreError(f"{folder / MANIFEST} cannot be read ({' '.join(str(e).split())}). Name another store.") from e
    if manifest.get("format") != FORMAT:
        raise StoreError(
            f"store {folder} has format {manifest.get('format')!r}, and this cellfate reads {FORMAT}. Name another store."
        )
    return dict(manifest)


def found_at(folder: str | os.PathLike[str]) -> Store:
    """The store in a folder, as it is."""
    manifest = read_manifest(Path(folder))
    chunks = [(int(first), int(last)) for first, last in manifest["chunks"]]
    plan = Plan(
        manifest["inputs"], manifest["settings"], manifest["names"], chunks, manifest["responses"], manifest["threads"]
    )
    store = Store(folder, plan)
    store.key = manifest["key"]
    return store


def read_chunk(path: Path, key: str, index: int, count: int) -> list[Any]:
    """The answers in a file, `count` of them; a :class:`StoreError` where they are not whole, or of another job."""
    import zarr
    from zarr.storage import ZipStore

    try:
        with zipfile.ZipFile(path) as packed:
            broken = packed.testzip()  # reads all of it: every entry has its checksum
            if broken is not None:
                raise StoreError(f"{path} is damaged: {broken} is not what was written.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            group: Any = zarr.open_group(ZipStore(path, mode="r"), mode="r")
            about = json.loads(bytes(np.asarray(group["about"][:])).decode())
            texts = json.loads(bytes(np.asarray(group["texts"][:])).decode())
            numbers = np.asarray(group["numbers"][:], dtype=np.float64)
    except FileNotFoundError:
        raise
    except StoreError:
        raise
    except Exception as e:  # zipfile, zarr and its codecs raise whatever a broken file makes them trip over
        size = path.stat().st_size if path.exists() else 0
        raise StoreError(
            f"{path} is damaged or cut short ({size} bytes; {' '.join(str(e).split()) or type(e).__name__})."
        ) from e
    if about != [key, index] or len(texts) != count:
        raise StoreError(f"{path} is of another job than the store it is in.")
    return unpack(texts, numbers)


def _zipped(texts: Sequence[str], numbers: np.ndarray, key: str, index: int) -> bytes:
    """A zarr group in a zip file, the same for the same content."""
    import io

    import zarr

    entries: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr about its own next versions
        which: dict[str, Any] = (
            {"zarr_format": 2} if int(zarr.__version__.split(".")[0]) > 2 else {}
        )  # which both releases read
        group = zarr.open_group(store=entries, mode="w", **which)
        for name, content in (("about", [key, index]), ("texts", list(texts))):
            group[name] = np.frombuffer(json.dumps(content).encode(), dtype=np.uint8)
        group["numbers"] = np.append(numbers, 0.0)  # never empty
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as packed:  # zarr has compressed its parts
        for name in sorted(entries):
            value = entries[name]
            packed.writestr(zipfile.ZipInfo(name), value if isinstance(value, bytes) else value.to_bytes())
    return out.getvalue()


def _write(path: Path, content: bytes) -> None:
    """A file as a whole, or not at all, also if the machine stops."""
    part = _part(path, content)
    try:
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _settle(path.parent)


def _write_new(path: Path, content: bytes) -> None:
    """The same where there is no such file; one that is there stays, also one that came a moment ago."""
    if path.exists():
        return
    part = _part(path, content)
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except (
        OSError
    ):  # a file system without links: the last of two that begin at once stands, and each reads what stands
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    _settle(path.parent)


def _part(path: Path, content: bytes) -> Path:
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


def _settle(folder: Path) -> None:
    """Bring the names in a folder to disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def versions() -> dict[str, str]:
    """Of what the numbers are made with."""
    import torch

    return {"torch": str(torch.__version__), "numpy": np.__version__}
