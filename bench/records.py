"""Records: what a run leaves behind, one folder a run that appears whole or not at all.

    <out>/runs/<task>/<method>/<run id>/
        config.yaml               the resolved configuration
        record.json               metrics, fitness, cost, provenance (schema 1)
        scores.safetensors        `attribution/<split>` (Q, N), `value` (N,); the examples' ids in its metadata
        replicates.safetensors    bootstrap replicates (R,) of each metric, or their parts (3, R), float32
        queries.safetensors       `<metric>/<name>` (Q,): what each query contributes; absent where nothing has queries
        suspects.csv              training rows, most suspicious first, and why; where no errors are known (as below)
        influence.csv             the best helpers and worst opponents of each query

A record is a plain dict. Numbers that are not finite are stored as null. A kept copy may lack the array files.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from tasks.errors import UserError

SCHEMA = 1
STATUSES = ("ok", "unfit", "unsupported", "diverged", "failed")
BETTER = ("higher", "lower", "one", None)  # "one": nearest to 1, as a slope; None: not ranked

Record = dict[str, Any]


def run_id(key: Mapping[str, Any]) -> str:
    """First 16 hex characters of the sha256 of `key` as canonical JSON: the same for any order of its keys."""
    return hashlib.sha256(canonical(key).encode()).hexdigest()[:16]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces; raises ValueError for NaN, which equals nothing, not even itself."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


# --- what a record must hold -----------------------------------------------------------------------------------------


def validate(record: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first field that schema 1 does not allow; keys beyond the schema are kept."""
    if not isinstance(record, Mapping):
        raise ValueError(f"record: a mapping is expected, not {type(record).__name__}")
    _expect(record.get("schema") == SCHEMA, "schema", record.get("schema"), f"{SCHEMA}")
    for field in ("task", "method", "run_id"):
        name = _text(record, field)
        _expect(not name.startswith(".") and not set(name) & set("/\\\0"), field, name, "a name that a folder can have")
    for field in ("model", "method_label"):
        _text(record, field)
    status, reason = record.get("status"), record.get("reason")
    _expect(status in STATUSES, "status", status, ", ".join(STATUSES))
    _expect(reason is None or isinstance(reason, str), "reason", reason, "text or null")
    _expect(status == "ok" or bool(reason), "reason", reason, f"a text, because the status is {status}")
    _count(record, "seed")
    data = _mapping(record, "data")
    _text(data, "source", "data.")
    _text(data, "fingerprint", "data.")
    _count(data, "n_train", "data.")
    _mapping(_mapping(record, "config"), "method", "config.")
    for name, metric in _mapping(record, "metrics").items():
        _validate_metric(metric, f"metrics.{name}")
    _mapping(record, "fitness")
    cost = _mapping(record, "cost")
    for field in ("seconds", "peak_memory_bytes", "trainings", "gradients", "stored_bytes"):
        _expect(_is_number(cost.get(field)), f"cost.{field}", cost.get(field), "a number or null")
    phases = cost.get("phases")
    _expect(phases is None or isinstance(phases, Mapping), "cost.phases", phases, "a mapping")
    _mapping(record, "provenance")


def _validate_metric(metric: Any, field: str) -> None:
    _expect(isinstance(metric, Mapping), field, metric, "a mapping")
    _expect("value" in metric, f"{field}.value", "missing", "a number or null")
    for key in ("value", "low", "high", "ceiling"):
        _expect(_is_number(metric.get(key)), f"{field}.{key}", metric.get(key), "a number or null")
    for key in ("n", "nan"):
        if metric.get(key) is not None:
            _count(metric, key, f"{field}.")
    better = metric.get("better", "higher")
    _expect(better in BETTER, f"{field}.better", better, "higher, lower, one, null")
    truth = metric.get("truth")
    _expect(truth is None or isinstance(truth, Mapping), f"{field}.truth", truth, "a mapping or null")
    status = metric.get("status", "ok")
    _expect(status in STATUSES, f"{field}.status", status, ", ".join(STATUSES))


def _expect(condition: bool, field: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"record.{field}: {value!r} is not possible; expected: {allowed}")


def _text(owner: Mapping[str, Any], key: str, prefix: str = "") -> str:
    value = owner.get(key)
    _expect(isinstance(value, str) and bool(value), f"{prefix}{key}", value, "a text that is not empty")
    return str(value)


def _count(owner: Mapping[str, Any], key: str, prefix: str = "") -> None:
    value = owner.get(key)
    whole = isinstance(value, int) and not isinstance(value, bool)
    _expect(whole and value >= 0, f"{prefix}{key}", value, "a whole number from 0")  # type: ignore[operator]


def _mapping(owner: Mapping[str, Any], key: str, prefix: str = "") -> Mapping[str, Any]:
    value = owner.get(key)
    _expect(isinstance(value, Mapping), f"{prefix}{key}", value, "a mapping")
    return value  # type: ignore[return-value]


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


# --- writing ---------------------------------------------------------------------------------------------------------


def storable(record: Mapping[str, Any]) -> Record:
    """A copy that JSON can hold: numpy scalars as Python's, NaN and infinities as null.

    A metric whose value was not finite says so: its `nan` is at least 1.
    """
    plain: Record = _plain(record, "record")
    metrics = record.get("metrics")
    for name, metric in metrics.items() if isinstance(metrics, Mapping) else ():
        value = metric.get("value") if isinstance(metric, Mapping) else None
        if isinstance(value, float | np.floating) and not math.isfinite(value):
            plain["metrics"][str(name)]["nan"] = max(1, metric.get("nan") or 0)
    return plain


def _plain(value: Any, field: str) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{field}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, field) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ValueError(f"{field}: a {type(value).__name__} cannot be stored")


def folder(out: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Where the record lives: out/runs/<task>/<method>/<run id>."""
    return Path(out) / "runs" / record["task"] / record["method"] / record["run_id"]


def write(
    out: str | os.PathLike[str],
    record: Mapping[str, Any],
    config_yaml: str,
    scores: Mapping[str, np.ndarray],
    ids: Mapping[str, Sequence[str]],
    replicates: Mapping[str, np.ndarray],
    by_query: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    texts: Mapping[str, str] | None = None,
    *,
    replace: bool = False,
) -> Path:
    """Stores one run and returns its folder, which appears whole or not at all.

    A readable record that is already there (a twin's, say) stays as it is unless `replace`; a damaged one is replaced.
    `by_query`: metric -> named arrays (Q,), such as each query's value, reliability and ceiling. `texts`: other files.
    `scores` `attribution/<split>` (Q, N) must fit `ids[<split>]` and `ids["train"]` where these are given.
    Raises ValueError for a malformed record or array, UserError when the folder cannot be written.
    """
    record = storable(record)
    validate(record)
    scores = {name: _array(name, array) for name, array in scores.items()}
    replicates = {name: _array(name, array).astype(np.float32) for name, array in replicates.items()}
    queries = {f"{metric}/{name}": array for metric, of in (by_query or {}).items() for name, array in of.items()}
    queries = {name: _array(name, array) for name, array in queries.items()}
    _check_shapes(scores, ids, replicates)
    target = folder(out, record)
    if not replace and is_readable(target):
        return target
    aside = target.parent / f".{target.name}.{uuid4().hex}.new"
    with writable(out):
        try:
            aside.mkdir(parents=True)
            (aside / "config.yaml").write_text(config_yaml, encoding="utf-8")
            safetensors.numpy.save_file(scores, aside / "scores.safetensors", metadata={"ids": json.dumps(_lists(ids))})
            safetensors.numpy.save_file(replicates, aside / "replicates.safetensors")
            if queries:
                safetensors.numpy.save_file(queries, aside / "queries.safetensors")
            for name, text in (texts or {}).items():
                (aside / name).write_text(text, encoding="utf-8")
            (aside / "record.json").write_text(dumps(record), encoding="utf-8")
            for path in (*aside.iterdir(), aside):
                _sync(path)
            _publish(aside, target, replace)
            _sync(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # gone already when it was published
    return target


def dumps(record: Mapping[str, Any]) -> str:
    """record.json's text; metrics keep the order in which they were measured."""
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _publish(aside: Path, target: Path, replace: bool) -> None:
    """Renames `aside` to `target`. Rename refuses a full folder, so of several writers exactly one comes first."""
    for _ in range(100):
        old: Path | None = None
        if target.exists():
            if not replace and is_readable(target):
                return
            old = aside.with_suffix(".old")
            try:
                target.rename(old)
            except FileNotFoundError:  # another writer has just moved it
                continue
        try:
            aside.rename(target)
        except BaseException as error:
            code = error.errno if isinstance(error, OSError) else None
            # A twin's record came in between; another twin may have moved it away again by now.
            if code in (errno.EEXIST, errno.ENOTEMPTY) or (code == errno.EACCES and target.exists()):
                if old is not None:
                    shutil.rmtree(old, ignore_errors=True)
                continue
            if old is not None:
                old.rename(target)
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        return
    raise OSError(errno.EBUSY, "too many writers at once", str(target))


def _sync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes one file so that a reader finds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{uuid4().hex}.new"
    try:
        aside.write_bytes(content)
        _sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def writable(out: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a full disk or a folder that cannot be written into a UserError naming `out`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = "free space there or choose another folder with out=..."
        raise UserError("out", os.fspath(out), f"cannot be written ({why})", hint=hint) from error


def _array(name: str, array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: an array of numbers is expected, not of {array.dtype}")
    return array


def _check_shapes(
    scores: Mapping[str, np.ndarray], ids: Mapping[str, Sequence[str]], replicates: Mapping[str, np.ndarray]
) -> None:
    for name, array in scores.items():
        axes = (name.removeprefix("attribution/"), "train") if name.startswith("attribution/") else ("train",)
        if len(axes) == 2 or name == "value":
            fits = array.ndim == len(axes)
            fits = fits and all(
                size == len(ids[axis]) for size, axis in zip(array.shape, axes, strict=True) if axis in ids
            )
            if not fits:
                expected = ", ".join(f"{axis}: {len(ids[axis]) if axis in ids else 'any'}" for axis in axes)
                raise ValueError(f"scores {name}: shape {array.shape} does not fit ({expected})")
    for name, array in replicates.items():
        if array.ndim != 1 and (array.ndim != 2 or len(array) != 3):
            raise ValueError(f"replicates {name}: shape (R,) or (3, R) is expected, not {array.shape}")


def _lists(ids: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {split: [str(i) for i in names] for split, names in ids.items()}


# --- reading ---------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Record:
    """The record of one run's folder; raises ValueError naming the file when it is missing or damaged."""
    path = Path(folder) / "record.json"
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        validate(record)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return record


def is_readable(folder: Path) -> bool:
    try:
        read(folder)
    except ValueError:
        return False
    return True


def find(out: str | os.PathLike[str], task: str, method: str, run_id: str) -> Path | None:
    """The folder of a finished run, or None; a damaged record counts as none, so that it is made again."""
    path = folder(out, {"task": task, "method": method, "run_id": run_id})
    return path if is_readable(path) else None


def read_all(out: str | os.PathLike[str], tasks: Iterable[str] | None = None) -> list[tuple[Record, Path]]:
    """Every record under out/runs with its folder, sorted by folder; damaged ones are skipped with a warning."""
    wanted = None if tasks is None else set(tasks)
    found = []
    for path in sorted((Path(out) / "runs").glob("*/*/*")):
        task, method, name = path.parts[-3:]
        hidden = any(part.startswith(".") for part in (task, method, name))  # a writer's, alive or dead
        if hidden or not path.is_dir() or (wanted is not None and task not in wanted):
            continue
        try:
            found.append((read(path), path))
        except ValueError as error:
            warnings.warn(f"skipped a damaged record: {error}", stacklevel=2)
    return found


def read_replicates(folder: Path) -> dict[str, np.ndarray]:
    """Bootstrap replicates (R,), or parts (3, R), by metric; empty where none are kept; ValueError when damaged."""
    return _load(Path(folder) / "replicates.safetensors")


def read_queries(folder: Path) -> dict[str, np.ndarray]:
    """Arrays (Q,) by `<metric>/<name>`: what each query contributes to a metric; empty where none are kept."""
    return _load(Path(folder) / "queries.safetensors")


def read_scores(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """The scores by name, and the examples' ids by split."""
    path = Path(folder) / "scores.safetensors"
    scores = _load(path)
    if not scores and not path.exists():
        return {}, {}
    with safe_open(path, framework="numpy") as file:
        ids: dict[str, list[str]] = json.loads((file.metadata() or {}).get("ids", "{}"))
    return scores, ids


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        arrays: dict[str, np.ndarray] = safetensors.numpy.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error
    return arrays
