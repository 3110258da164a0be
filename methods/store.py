"""Training gradients on disk, compressed: whoever asks a second time, with other queries, pays for the queries only.

A store is a folder of shards, `ROWS` examples each: .npy files that are memory-mapped, beside each its SHA-256. Its
name is a digest of all that decides the numbers: data, parameters, blocks, compression and seeds. Shards appear whole
or not at all; what is there is not made again, what is damaged is; processes that share a folder divide the shards.
"""

import hashlib
import os
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from methods.base import Problem
from methods.compression.base import vector, vectors
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors
from methods.gradients.source import Source, Squeeze
from tasks.base import digest
from tasks.errors import UserError

VERSION = 1
ROWS = 1024


@dataclass(frozen=True, eq=False)
class Flat:
    """A compression's blocks as vectors, block by block: what lies on disk has no factors any more."""

    squeeze: Squeeze
    blocks: tuple[Block, ...]

    def __call__(self, found: Sequence[Factors]) -> list[Factors]:
        gradients = (f.gradient().dense().flatten(1) for f in self.squeeze(found))
        return [vectors(b, g) for b, g in zip(self.blocks, gradients, strict=True)]


@dataclass(frozen=True, eq=False)
class Kept:
    """The gradients of the training losses, read from shards (rows, size)."""

    blocks: tuple[Block, ...]
    shards: tuple[np.ndarray, ...]
    device: torch.device

    def __call__(self, batch_size: int) -> Iterator[tuple[Tensor, list[Factors]]]:
        start = 0
        for shard in self.shards:
            for begin in range(0, len(shard), batch_size):
                rows = torch.from_numpy(np.array(shard[begin : begin + batch_size])).to(self.device)
                parts = rows.split([b.size for b in self.blocks], 1)
                index = torch.arange(start + begin, start + begin + len(rows))
                yield index, [vectors(b, part) for b, part in zip(self.blocks, parts, strict=True)]
            start += len(shard)


def stored(problem: Problem, source: Source, place: str, said: object) -> Source:
    """The source with its training gradients kept in `place`; `said` is what else decides them (the settings)."""
    require_place(place, source.squeeze is not None)
    assert source.squeeze is not None
    flat = Flat(source.squeeze, tuple(vector(b.name, b.size) for b in source.squeeze.blocks))
    source = replace(source, squeeze=flat)
    parameter = next(source.model.parameters())
    content = {
        "version": [VERSION, ROWS],
        "task": problem.task.key(),
        "where": [problem.seed, *map(str, problem.where)],
        "parameters": _fingerprint(p for _, p in sorted(source.model.named_parameters())),
        "blocks": [[b.name, list(b.shape)] for b in source.covered],
        "rows": _fingerprint(b.rows for b in source.covered if b.rows is not None),
        "settings": repr(said),
        "dtype": str(parameter.dtype),
    }
    folder = Path(place) / f"{problem.task.name}-{problem.task.model}-{digest(content)[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{k:06d}.npy" for k in range(-(-len(problem.train) // ROWS))]
        _fill(problem, source, paths)
    except OSError as error:
        raise UserError("method.store", place, f"cannot be written ({error.strerror})") from error
    problem.meter.stored_bytes = sum(path.stat().st_size for path in paths)
    shards = tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    return replace(source, kept=Kept(source.blocks, shards, parameter.device))


def require_place(place: str, compressed: bool) -> None:
    """Refuses, before anything is trained, what cannot be a store."""
    if not compressed:
        raise UserError(
            "method.store", place, "keeps compressed gradients only", hint="choose a method/compression as well"
        )
    there = Path(place).absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError("method.store", place, "cannot be written", hint="name a folder of yours, or null")


def _fill(problem: Problem, source: Source, paths: Sequence[Path]) -> None:
    """Makes the shards that are not there or not what was written; first those that nobody is at."""
    order = [int(k) for k in np.random.default_rng(os.getpid()).permutation(len(paths))]
    for timeout in (0.0, -1.0):  # -1: until whoever is at it has finished, or died
        for k in order:
            try:
                with FileLock(paths[k].with_suffix(".lock"), timeout=timeout):
                    if not _sound(paths[k]):
                        _make(problem, source, paths[k], k)
            except Timeout:
                continue


def _make(problem: Problem, source: Source, path: Path, k: int) -> None:
    rows = torch.arange(k * ROWS, min((k + 1) * ROWS, len(problem.train)))
    parameter = next(source.model.parameters())
    found = torch.empty(len(rows), source.size, dtype=parameter.dtype)
    for index, gradients in source.gradients(problem.train.select(rows), problem.task.objective.loss):
        problem.meter.gradients += len(index)
        found[index] = torch.cat([f.outputs[:, 0] for f in gradients], 1).cpu()
    aside = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with aside.open("wb") as file:
            np.save(file, found.numpy(), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".sha256").write_text(hashlib.sha256(aside.read_bytes()).hexdigest())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def _sound(path: Path) -> bool:
    checksum = path.with_suffix(".sha256")
    if not path.exists() or not checksum.exists():
        return False
    if hashlib.sha256(path.read_bytes()).hexdigest() == checksum.read_text():
        return True
    warnings.warn(f"{path} is damaged: it is made again", stacklevel=2)
    return False


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
