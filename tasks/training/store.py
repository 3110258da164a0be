"""Rows of truth, kept as they are made, shared by everyone who sees the folder.

    <root>/<task key>/<sha256 of the content>.safetensors   rows of finished trainings; renamed into place
    <root>/<task key>/builders/<id>.lock, <id>.claims       a living builder holds its lock; its claims are taken rows

A row is named by what was trained (`Plan.keys`), a shard by its content, so that a damaged one is seen on reading. The
operating system drops a dead builder's lock, and with it its claims.
"""

import contextlib
import hashlib
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

from tasks.errors import UserError

Row = dict[str, np.ndarray]


@dataclass
class Store:
    """All rows of one task key. `read` sees what others have finished meanwhile; a finished row never changes."""

    folder: Path
    _rows: dict[str, Row] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    def read(self) -> Mapping[str, Row]:
        """Row key -> named arrays. A torn shard is reported, set aside and its rows are missing again."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._seen:
                continue
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != path.stem:
                warnings.warn(f"{path} is damaged: its rows are made again", stacklevel=2)
                with contextlib.suppress(FileNotFoundError):
                    path.rename(path.with_suffix(".damaged"))
                continue
            arrays = parse(content)
            for i, key in enumerate(arrays.pop("key")):
                self._rows[key.tobytes().hex()] = {name: values[i] for name, values in arrays.items()}
            self._seen.add(path.name)
        return self._rows

    def add(self, keys: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps rows durably, at once and whole: `arrays[name]` has shape (len(keys), ...)."""
        packed = {"key": np.frombuffer(b"".join(bytes.fromhex(k) for k in keys), np.uint8).reshape(len(keys), -1)}
        content = serialise({**packed, **{name: np.ascontiguousarray(values) for name, values in arrays.items()}})
        target = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        aside = self.folder / f".{uuid.uuid4().hex}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise UserError(
                "out", str(self.folder), f"cannot be written ({error.strerror}); finished rows are kept"
            ) from error

    @contextlib.contextmanager
    def builder(self) -> Iterator["Builder"]:
        """Takes part in building; whatever was claimed and not finished is free again afterwards."""
        folder = self.folder / "builders"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = uuid.uuid4().hex
            lock = FileLock(folder / f"{name}.lock")
            lock.acquire()
        except OSError as error:
            raise UserError("out", str(self.folder), f"cannot be written ({error.strerror})") from error
        try:
            yield Builder(self, folder, name)
        finally:
            (folder / f"{name}.claims").unlink(missing_ok=True)
            lock.release()
            (folder / f"{name}.lock").unlink(missing_ok=True)


@dataclass(frozen=True)
class Builder:
    """One process that makes rows."""

    store: Store
    folder: Path
    name: str

    def claim(self, wanted: Sequence[str], most: int) -> list[str]:
        """At most `most` of the wanted rows that nobody has finished or is making; forgets earlier claims."""
        try:
            with FileLock(self.folder / "queue.lock"):
                taken = self._claims_of_others()  # before what is done: whoever finishes meanwhile is in one of the two
                done = self.store.read()
                mine = [key for key in dict.fromkeys(wanted) if key not in done and key not in taken][:most]
                aside = self.folder / f"{self.name}.part"
                aside.write_text("\n".join(mine))
                aside.rename(self.folder / f"{self.name}.claims")
        except OSError as error:
            raise UserError(
                "out", str(self.folder), f"cannot be written ({error.strerror}); finished rows are kept"
            ) from error
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
