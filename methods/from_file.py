"""Scores that were computed elsewhere, by whatever means, and are judged here."""

import hashlib
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from methods.base import Method, Problem, Unsupported
from tasks.base import Examples, Task
from tasks.errors import UserError

LAYOUT = "scores (Q, N), query_ids (Q,), train_ids (N,), and value (N,) if there is one"
DAMAGED = (EOFError, zipfile.BadZipFile, zlib.error)
SCORES = "attribution/"  # as a run of this suite stores the scores of a split, its ids by split in the metadata


@dataclass(frozen=True)
class FromFile(Method):
    """score(q, i) and value(i) as they stand in a file; rows and columns are joined by the examples' ids.

    .npz           `scores` (Q, N), `query_ids` (Q,), `train_ids` (N,), `value` (N,)
    .safetensors   the same `scores` and `value`, or `attribution/<split>` (Q, N) for several splits; metadata `ids`:
                   JSON {"train": [N ids], "query": [Q ids], "<split>": ...}. A run's own scores.safetensors is such.

    Either `scores` or `value` may be left out. Ids are in any order and may be more than the task has. Without ids an
    axis is the task's query split, or its training set, in order. Positive scores and high values are helpful. Nothing
    in a file is unpickled. Raises UserError for what cannot be read or joined, before anything is trained.
    """

    path: str
    calibrated: bool
    _arrays: dict[str, Tensor] = field(init=False, repr=False, compare=False)  # scores by split, and value; float64
    _ids: dict[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)  # by split, as far as given
    _sha256: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        path = Path(self.path).expanduser()
        readers = {".npz": _npz, ".safetensors": _safetensors}
        if path.suffix not in readers:
            raise self._mistake("is of unknown type", f"a file {' or '.join(readers)}")
        with self._readable():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            arrays, ids = readers[path.suffix](path)
        object.__setattr__(self, "_sha256", digest)
        object.__setattr__(self, "_ids", {split: self._names(split, names) for split, names in ids.items()})
        object.__setattr__(self, "_arrays", {name: self._numbers(name, array) for name, array in arrays.items()})
        if not arrays:
            raise self._mistake("holds neither scores nor value", LAYOUT)
        self._check_shapes({split: len(names) for split, names in self._ids.items()}, "its ids")

    def inputs(self) -> dict[str, str]:
        return {"path": self._sha256}

    def unmet(self, task: Task) -> str | None:
        """Compares the file with the task; the mistakes are the user's."""
        sizes = {split: len(self._of(task, split)) for split in ("train", *self._splits)}
        self._check_shapes(sizes, f"task={task.name}")
        self._check_all_there(task.train.ids, self._of(task, "train"), "training examples")
        if self._splits:
            # A file may be about another split alone; of the queries it has all or none.
            known = self._rows(task)
            whole = any(known.keys() >= set(split.ids) for name, split in task.splits.items() if name != "train")
            queries = task.splits["query"].ids
            if not whole or not known.keys().isdisjoint(queries):
                self._check_all_there(queries, known, "queries")
        return None

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        if not self._splits:
            raise Unsupported(f"method.path={self.path} has a value, but no scores")
        known = self._rows(problem.task)
        missing = [i for i in queries.ids if i not in known]
        if missing:
            raise Unsupported(
                f"method.path={self.path} has no scores for {len(missing)} of the {len(queries)} asked examples"
                f" ({_first(missing)})"
            )
        rows = [known[i] for i in queries.ids]
        return torch.stack([self._arrays[name][row] for name, row in rows])[:, self._columns(problem.task)]

    def value(self, problem: Problem) -> Tensor:
        if "value" not in self._arrays:
            raise Unsupported(f"method.path={self.path} has scores, but no value")
        return self._arrays["value"][self._columns(problem.task)]

    # Joining

    @property
    def _splits(self) -> list[str]:
        """Those that the file has scores of."""
        return [name.removeprefix(SCORES) for name in self._arrays if name.startswith(SCORES)]

    def _of(self, task: Task, split: str) -> Sequence[str]:
        """Ids of an axis: the file's, or the task's where it has none."""
        if split not in self._ids and split not in task.splits:
            raise self._mistake(f"has scores of {split}, a split that task={task.name} lacks", ", ".join(task.splits))
        return self._ids[split] if split in self._ids else task.splits[split].ids

    def _rows(self, task: Task) -> dict[str, tuple[str, int]]:
        """Where the scores of a query are: the array, and the row there; of an id in several splits, the last."""
        return {i: (SCORES + split, row) for split in self._splits for row, i in enumerate(self._of(task, split))}

    def _columns(self, task: Task) -> list[int]:
        known = {i: column for column, i in enumerate(self._of(task, "train"))}
        return [known[i] for i in task.train.ids]

    # What a file may not be

    def _mistake(self, problem: str, expected: str) -> UserError:
        return UserError("method.path", self.path, problem, hint=f"expected: {expected}")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._mistake(f"cannot be read ({error.strerror or error})", f"a file with {LAYOUT}") from error
        except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError, *DAMAGED) as error:
            why = "; ".join(str(error).splitlines()[:1])
            raise self._mistake(f"cannot be read ({why})", f"a file with {LAYOUT}") from error

    def _names(self, split: str, names: Sequence[str]) -> tuple[str, ...]:
        twice = [i for i, times in Counter(names).items() if times > 1]
        if twice:
            raise self._mistake(f"has {split} ids twice ({_first(twice)})", "each id once")
        return tuple(names)

    def _numbers(self, name: str, array: Tensor) -> Tensor:
        axes = 2 if name.startswith(SCORES) else 1
        if array.ndim != axes or not array.numel():
            raise self._mistake(f"has {_shown(name)} of shape {tuple(array.shape)}", LAYOUT)
        if not array.isfinite().any():
            raise self._mistake(f"has no finite number in {_shown(name)}", "numbers")
        return array

    def _check_shapes(self, sizes: Mapping[str, int], whose: str) -> None:
        """Each axis is as long as `sizes` says of its split."""
        for name, array in self._arrays.items():
            axes = (name.removeprefix(SCORES), "train") if name.startswith(SCORES) else ("train",)
            if any(size != sizes.get(axis, size) for size, axis in zip(array.shape, axes, strict=True)):
                expected = ", ".join(f"{sizes.get(axis, 'any')} ({axis})" for axis in axes)
                raise self._mistake(
                    f"has {_shown(name)} of shape {tuple(array.shape)}, which does not fit {whose}", expected
                )

    def _check_all_there(self, wanted: Sequence[str], known: Collection[str], what: str) -> None:
        there = set(known)
        missing = [i for i in wanted if i not in there]
        if missing:
            raise self._mistake(
                f"lacks {len(missing)} of the {len(wanted)} {what} ({_first(missing)}; it has {_first(list(known))})",
                "the ids of the task",
            )


Content = tuple[dict[str, Tensor], dict[str, list[str]]]


def _npz(path: Path) -> Content:
    """Arrays by their names in a run's file, ids by split."""
    if not zipfile.is_zipfile(path):  # else numpy takes it for a pickle
        raise ValueError("not an archive of arrays, as numpy.savez writes")
    with np.load(path, allow_pickle=False) as archive:
        arrays = {f"{SCORES}query" if n == "scores" else n: archive[n] for n in ("scores", "value") if n in archive}
        ids = {s: archive[f"{s}_ids"] for s in ("query", "train") if f"{s}_ids" in archive}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{_shown(name)} is of {array.dtype}, not of numbers")
    for split, names in ids.items():
        if names.dtype.kind not in "Uiu" or names.ndim != 1:
            raise ValueError(f"{split}_ids is of {names.dtype} and shape {names.shape}, not a list of text")
    numbers = {name: torch.from_numpy(array.astype(np.float64)) for name, array in arrays.items()}
    return numbers, {split: [str(i) for i in names.tolist()] for split, names in ids.items()}


def _safetensors(path: Path) -> Content:
    with safe_open(path, "pt") as file:
        names = [n for n in file.keys() if n in ("scores", "value") or n.startswith(SCORES)]  # noqa: SIM118
        arrays = {f"{SCORES}query" if n == "scores" else n: file.get_tensor(n).double() for n in names}
        ids = json.loads((file.metadata() or {}).get("ids", "{}"))
    lists = isinstance(ids, dict) and all(isinstance(v, list) for v in ids.values())
    if not lists or not all(isinstance(i, str | int) for names in ids.values() for i in names):
        raise ValueError("its metadata's ids are not JSON lists of ids by split")
    return arrays, {split: [str(i) for i in names] for split, names in ids.items()}


def _shown(name: str) -> str:
    return "scores" if name == f"{SCORES}query" else name


def _first(ids: Sequence[str], n: int = 3) -> str:
    return ", ".join(ids[:n]) + (", ..." if len(ids) > n else "")
