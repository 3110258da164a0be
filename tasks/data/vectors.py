"""Rows of numbers: sets bundled with scikit-learn, a user's file, a folder in the UCI benchmark's form, idx files."""

import gzip
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tasks.data.files import ALLOWED, open_source, read, real
from tasks.data.own import QUERY_FILE, Flaw, Rows, ids_of, named_columns, usable
from tasks.errors import UserError, require

BUNDLED = ("breast_cancer", "wine", "diabetes")
KINDS = ("auto", "regression", "classification")
UCI = "uci_regression"  # the folder of $BENCH_DATA that holds folders in the UCI form
MISSING = ("", "na", "nan", "?")
IDX = {2051: 3, 2049: 1}  # magic number of unsigned bytes -> axes: images, labels


@dataclass(frozen=True)
class Table:
    """Features (N, F) float64 and targets (N,), float64 or text; row i of the source is row i, unless `rows` (of a
    user's file) name them. `kind` where the source itself says whether it is for regression or classification."""

    name: str
    features: np.ndarray
    targets: np.ndarray
    kind: str | None = None
    rows: Rows | None = None
    columns: tuple[str, ...] = ()  # of the features, in a user's file


def read_bundled(name: str) -> Table:
    """One of `BUNDLED`; class labels are 0, 1, …"""
    from sklearn import datasets

    load: Callable = getattr(datasets, f"load_{name}")
    data = load()
    return Table(name, data.data.astype(np.float64), data.target.astype(np.float64))


def find_table(data_dir: str | None) -> Path:
    """The file or folder that the user names: a path, else a folder of $BENCH_DATA/uci_regression."""
    places = (
        f"a file ({ALLOWED}), a folder with one, a folder with data.txt, or the name of a folder in $BENCH_DATA/{UCI}"
    )
    if data_dir is None:
        raise UserError("task.data", "folder", "needs a place", hint=f"give task.data_dir=: {places}")
    path = Path(data_dir).expanduser()
    if path.exists():
        return path
    root = Path(os.environ["BENCH_DATA"]).expanduser() / UCI if os.environ.get("BENCH_DATA") else None
    if root is not None and (root / data_dir).is_dir():
        return root / data_dir
    raise UserError("task.data_dir", data_dir, "is neither a file nor a folder", allowed=places)


def read_file(
    place: str,
    key: str,
    target: str | None,
    kind: str,
    id: str | None = None,
    clean: str | None = None,
    features: Sequence[str] | None = None,
) -> Table:
    """A user's file, named by the setting `key`. `features`: the columns of numbers, null for all that have no other
    role. Rows without a target, or without a number in every feature, are no rows of the table; it tells how many.

    Targets are numbers where all of them are, else text (class labels); numbers mixed with text are class labels only
    if `kind` is classification. Right labels (`clean`) are written as the targets are.
    """
    source = open_source(place, key)
    if key == QUERY_FILE and clean not in source.columns:
        clean = None
    optional = {name: column for name, column in {"task.id": id, "task.clean": clean}.items() if column is not None}
    roles = named_columns(source, {"task.target": target, **optional})
    chosen = [name for name in source.columns if name not in roles] if features is None else list(features)
    named_columns(
        source, {"task.target": target, **optional, **{f"task.features[{k}]": c for k, c in enumerate(chosen)}}
    )
    if not chosen or "" in chosen:
        problem = "has a column without a name" if chosen else "has no column of features"
        hint = "an index has no place here: leave it out, or give it a name and task.id=" if chosen else None
        raise UserError(key, str(source.path), problem, hint=hint)
    cells = read(source, roles, chosen)
    labels = cells.text[roles[0]]
    odd = np.isin(np.arange(len(labels)), list(cells.odd))
    flaws = [
        Flaw("without a target", np.array([label.lower() in MISSING for label in labels], dtype=bool)),
        Flaw(
            "without a number in every feature",
            odd,
            {row: f"column {name} {repr(cell[:20]) if cell else 'empty'}" for row, (name, cell) in cells.odd.items()},
        ),
    ]
    rows = Rows(
        source=source.path,
        key=key,
        at=tuple(str(line) for line in cells.lines),
        ids=ids_of(source, cells.lines, None if id is None else cells.text[id]),
        contents=cells.numbers,
        targets=tuple(labels),
        clean=None if clean is None else tuple("" if c.lower() in MISSING else c for c in cells.text[clean]),
    )
    rows = usable(rows, flaws, "features")
    targets = _targets(rows, roles[0], kind)
    if targets.dtype.kind == "f":  # 1 and 1.0 are one label
        right = None if rows.clean is None else tuple(label_of(real(c)) if c else "" for c in rows.clean)
        rows = replace(rows, targets=tuple(label_of(y) for y in targets), clean=right)
    return Table(source.name, np.asarray(rows.contents), targets, None, rows, tuple(chosen))


def label_of(value: float | str) -> str:
    """A class label as text: whole numbers without a fraction."""
    if isinstance(value, str):
        return str(value)
    return str(int(value)) if value == round(value) else repr(float(value))


def _targets(rows: Rows, column: str, kind: str) -> np.ndarray:
    found = np.array([real(text) for text in rows.targets])
    odd = np.flatnonzero(np.isnan(found))
    if not len(odd):
        return found
    if kind == "regression" or (kind == "auto" and len(odd) < len(rows)):
        problem = f"holds {rows.targets[odd[0]]!r}"
        allowed = "a number; or task.kind=classification, for class labels"
        raise UserError(rows.key, f"{rows.place(int(odd[0]))} column {column}", problem, allowed=allowed)
    return np.array(rows.targets)


def read_uci(folder: Path) -> Table:
    """data.txt (numbers between spaces, a row a line), index_features.txt and index_target.txt (columns from 0), as in
    the regression benchmark of Hernández-Lobato & Adams (2015). Its own train and test splits are not used."""
    rows = _numbers(folder / "data.txt")
    width = len(rows[0][1])
    for line, row in rows:
        if len(row) != width:
            raise UserError(
                "task.data_dir", f"{folder / 'data.txt'}:{line}", f"has {len(row)} columns", allowed=f"{width}"
            )
    data = np.array([row for _, row in rows])
    features, target = (_columns(folder / f"index_{which}.txt", width) for which in ("features", "target"))
    if len(target) != 1 or target[0] in features:
        raise UserError(
            "task.data_dir", str(folder / "index_target.txt"), "is not possible", allowed="one column, no feature"
        )
    return Table(folder.resolve().name, data[:, features], data[:, target[0]], "regression")


def _columns(path: Path, width: int) -> list[int]:
    columns = []
    for line, row in _numbers(path):
        for number in row:
            if number != int(number) or not 0 <= number < width:
                raise UserError(
                    "task.data_dir", f"{path}:{line}", f"names column {number:g}", allowed=f"0 to {width - 1}"
                )
            columns.append(int(number))
    return columns


def _numbers(path: Path) -> list[tuple[int, list[float]]]:
    """(line, its numbers) of every line that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError("task.data_dir", str(path.parent), f"has no {path.name}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("task.data_dir", str(path), "cannot be read as text") from error
    rows = [
        (at, [_number(cell, path, at) for cell in line.split()])
        for at, line in enumerate(lines, start=1)
        if line.strip()
    ]
    require(bool(rows), "task.data_dir", str(path), "one that is not empty")
    return rows


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(text: str, path: Path, line: int, column: str | None = None) -> float:
    if not _is_number(text):
        place = f"{path}:{line}" if column is None else f"{path}:{line} column {column}"
        raise UserError("task.data_dir", place, f"holds {text.strip()!r}", allowed="a number")
    return float(text)


def read_idx(folder: Path, name: str, magic: int) -> np.ndarray:
    """uint8 (N, …) from `name` or `name`.gz: a magic number, the sizes of the axes (big-endian, 4 bytes), the bytes."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise UserError("task.data_dir", str(folder), f"has no {name} and no {name}.gz")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, OSError) as error:
        raise UserError("task.data_dir", str(path), f"is damaged ({error})", hint="fetch it again") from error
    start = 4 + 4 * IDX[magic]
    found, *shape = (int.from_bytes(content[at : at + 4], "big") for at in range(0, start, 4))
    if found != magic:
        raise UserError("task.data_dir", str(path), f"is no such idx file (it starts with {found})", allowed=str(magic))
    if len(content) - start != math.prod(shape):
        raise UserError(
            "task.data_dir",
            str(path),
            f"is damaged ({max(len(content) - start, 0)} bytes of data)",
            allowed=f"{' x '.join(str(size) for size in shape)}, as it says itself",
            hint="fetch it again",
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
