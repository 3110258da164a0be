"""Rows of truth, kept as they are made, shared by everyone who sees the folder.

    <root>/<task key>/task.json                             what the key stands for, for people
    <root>/<task key>/<sha256 of the content>.safetensors   rows of finished trainings; renamed into place
    <root>/<task key>/builders/<id>.lock, <id>.claims       a living builder holds its lock; its claims are taken rows

A row is named by what was trained (`Plan.keys`), a shard by its content, so that a damaged one is seen on reading. The
operating system drops a dead builder's lock, and with it its claims. Between machines the folder's file system must
honour POSIX locks (NFS from version 4, Lustre with -o flock); where it does not, rows may be made twice, never wrongly.
"""

import contextlib
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

from tasks.errors import UserError

Row = dict[str, np.ndarray]


@dataclass
class Store:
    """All rows of one task key. `read` sees what others have finished meanwhile; a finished row never changes.

    `shipped`: a folder of finished rows that is only read. `about`: what the key stands for.
    """

    folder: Path
    shipped: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    _rows: dict[str, Row] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    def read(self) -> Mapping[str, Row]:
        """Row key -> named arrays. A torn shard is reported, set aside and its rows are missing again."""
        folders = [self.folder] if self.shipped is None else [self.shipped, self.folder]
        for path in (path for folder in folders for path in self._unseen(folder)):
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # another reader has just set it aside
                continue
            except OSError as error:
                raise UserError("out", str(path), f"cannot be read ({error.strerror})") from error
            if not intact(path, content):
                warnings.warn(f"{path} is damaged: its rows are made again", stacklevel=2)
                self._seen.add(str(path))
                if path.parent == self.folder:
                    with contextlib.suppress(OSError):
                        path.rename(path.with_suffix(".damaged"))
                        self._seen.remove(str(path))
                continue
            arrays = parse(content)
            for i, key in enumerate(arrays.pop("key")):
                self._rows[key.tobytes().hex()] = {name: values[i] for name, values in arrays.items()}
            self._seen.add(str(path))
        return self._rows

    def _unseen(self, folder: Path) -> list[Path]:
        """Shards not read yet, by a plain listing: thousands of files, at every claim."""
        try:
            names = os.listdir(folder)  # noqa: PTH208  (many times faster than making a path of each)
        except FileNotFoundError:
            return []
        new = [name for name in names if name.endswith(".safetensors") and f"{folder}/{name}" not in self._seen]
        return [folder / name for name in sorted(new)]

    def add(
        self, keys: Sequence[str], arrays: Mapping[str, np.ndarray], facts: Mapping[str, object] | None = None
    ) -> None:
        """Keeps rows durably, at once and whole: `arrays[name]` has shape (len(keys), ...). `facts`: how they were
        made, for people."""
        packed = {"key": np.frombuffer(b"".join(bytes.fromhex(k) for k in keys), np.uint8).reshape(len(keys), -1)}
        whole = {**packed, **{name: np.ascontiguousarray(values) for name, values in arrays.items()}}
        content = serialise(whole, {"facts": json.dumps(facts or {}, sort_keys=True)})
        target = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        aside = self.folder / f".{uuid.uuid4().hex}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(target)
            _sync(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise _unwritable(self.folder, error) from error

    @contextlib.contextmanager
    def builder(self) -> Iterator["Builder"]:
        """Takes part in building; whatever was claimed and not finished is free again afterwards."""
        folder, name = self.folder / "builders", uuid.uuid4().hex
        lock = FileLock(folder / f"{name}.lock")
        try:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                if not (self.folder / "task.json").exists():
                    aside = folder / f"{name}.json"
                    aside.write_text(json.dumps(dict(self.about), indent=1, default=str) + "\n", encoding="utf-8")
                    aside.rename(self.folder / "task.json")
            except OSError as error:
                raise _unwritable(self.folder, error) from error
            yield Builder(self, folder, name)
        finally:
            _gone(folder / f"{name}{suffix}" for suffix in (".claims", ".part", ".json"))
            lock.release()
            _gone([folder / f"{name}.lock"])


@dataclass
class Builder:
    """One process that makes rows; `held`: those that it has claimed and that are not finished."""

    store: Store
    folder: Path
    name: str
    held: list[str] = field(default_factory=list)

    def claim(self, wanted: Sequence[str], most: int) -> list[str]:
        """At most `most` of the wanted rows that nobody has finished or is making, not even this builder."""
        try:
            with FileLock(self.folder / "queue.lock"):
                taken = self._claims_of_others()  # before what is done: whoever finishes meanwhile is in one of the two
                done = self.store.read()
                self.held = [key for key in self.held if key not in done]
                taken.update(self.held)
                mine = [key for key in dict.fromkeys(wanted) if key not in done and key not in taken][:most]
                aside = self.folder / f"{self.name}.part"
                aside.write_text("\n".join(self.held + mine))
                aside.rename(self.folder / f"{self.name}.claims")
        except OSError as error:
            raise _unwritable(self.store.folder, error) from error
        self.held += mine
        return mine

    def _claims_of_others(self) -> set[str]:
        taken: set[str] = set()
        for path in self.folder.glob("*.claims"):
            if path.stem == self.name:
                continue
            lock = FileLock(path.with_suffix(".lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:  # its builder lives, or is just leaving
                with contextlib.suppress(FileNotFoundError):
                    taken.update(path.read_text().split())
            else:
                path.unlink(missing_ok=True)
                lock.release()
                path.with_suffix(".lock").unlink(missing_ok=True)
        return taken


def intact(path: Path, content: bytes) -> bool:
    """Whether a shard is what was written: its name is its checksum."""
    return hashlib.sha256(content).hexdigest() == path.stem


def _gone(paths: Iterable[Path]) -> None:
    """Removes them where that can be done: what stays is of a dead builder, and no error hides another."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError("out", str(folder), f"cannot be written ({error.strerror}); finished rows are kept")


def _sync(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
