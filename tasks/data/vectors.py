"""Rows of numbers: sets bundled with scikit-learn, a CSV file, a folder in the UCI benchmark's form, idx files."""

import csv
import gzip
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.errors import UserError, require

BUNDLED = ("breast_cancer", "wine", "diabetes")
KINDS = ("auto", "regression", "classification")
UCI = "uci_regression"  # the folder of $BENCH_DATA that holds folders in the UCI form
MISSING = ("", "na", "nan", "?")
IDX = {2051: 3, 2049: 1}  # magic number of unsigned bytes -> axes: images, labels


@dataclass(frozen=True)
class Table:
    """Features (N, F) float64 and targets (N,), float64 or text; row i of the source is row i. `kind` where the source
    itself says whether it is for regression or classification."""

    name: str
    features: np.ndarray
    targets: np.ndarray
    kind: str | None = None


def read_bundled(name: str) -> Table:
    """One of `BUNDLED`; class labels are 0, 1, …"""
    from sklearn import datasets

    load: Callable = getattr(datasets, f"load_{name}")
    data = load()
    return Table(name, data.data.astype(np.float64), data.target.astype(np.float64))


def find_table(data_dir: str | None) -> Path:
    """The file or folder that the user names: a path, else a folder of $BENCH_DATA/uci_regression."""
    places = f"a CSV file, a folder with one, a folder with data.txt, or the name of a folder in $BENCH_DATA/{UCI}"
    if data_dir is None:
        raise UserError("task.data", "folder", "needs a place", hint=f"give task.data_dir=: {places}")
    path = Path(data_dir).expanduser()
    if path.exists():
        return path
    root = Path(os.environ["BENCH_DATA"]).expanduser() / UCI if os.environ.get("BENCH_DATA") else None
    if root is not None and (root / data_dir).is_dir():
        return root / data_dir
    raise UserError("task.data_dir", data_dir, "is neither a file nor a folder", allowed=places)


def read_table(data_dir: str | None, target: str | None, kind: str) -> Table:
    """The table at the place that the user names, whichever of the two forms it has."""
    path = find_table(data_dir)
    if path.is_file():
        return read_csv(path, target, kind)
    if (path / "data.txt").is_file():
        if target is not None:
            raise UserError(
                "task.target", target, "is not possible", hint="a UCI folder names its target itself: take null"
            )
        return read_uci(path)
    files = sorted(path.glob("*.csv"))
    if len(files) != 1:
        raise UserError(
            "task.data_dir", str(path), f"has {len(files)} CSV files and no data.txt", allowed="one of either"
        )
    return read_csv(files[0], target, kind)


def read_csv(path: Path, target: str | None, kind: str) -> Table:
    """A comma-separated file with a header, UTF-8; every column but `target` is a number. Empty lines are no rows.

    Targets are numbers where all of them are, else text (class labels); numbers mixed with text are class labels only
    if `kind` is classification. What cannot be read is told with its line and column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except UnicodeDecodeError as error:
        raise UserError("task.data_dir", str(path), f"is not UTF-8 (byte {error.start})") from error
    except csv.Error as error:
        raise UserError("task.data_dir", f"{path}:{reader.line_num}", f"is no CSV ({error})") from error
    except OSError as error:
        raise UserError("task.data_dir", str(path), f"cannot be read ({error.strerror})") from error
    if len(lines) < 2:
        raise UserError("task.data_dir", str(path), "has no rows", allowed="a header and a row a line")
    header = [name.strip() for name in lines[0][1]]
    if len(header) < 2 or len(set(header)) < len(header):
        raise UserError(
            "task.data_dir", str(path), "has a bad header", allowed="two or more columns, each its own name"
        )
    if target not in header:
        raise UserError("task.target", target, "is missing" if target is None else "is no column", allowed=header)
    at = header.index(target)
    features, targets = np.empty((len(lines) - 1, len(header) - 1)), []
    for row, (line, cells) in enumerate(lines[1:]):
        if len(cells) != len(header):
            raise UserError(
                "task.data_dir",
                f"{path}:{line}",
                f"has {len(cells)} columns",
                allowed=f"{len(header)}, as in the header",
            )
        missing = [name for name, cell in zip(header, cells, strict=True) if cell.strip().lower() in MISSING]
        if missing:
            raise UserError(
                "task.data_dir",
                f"{path}:{line} column {missing[0]}",
                "has no value",
                hint="remove the row or fill it in",
            )
        features[row] = [_number(cell, path, line, header[k]) for k, cell in enumerate(cells) if k != at]
        targets.append(cells[at].strip())
    return Table(path.stem, features, _targets(targets, [line for line, _ in lines[1:]], path, str(target), kind))


def _targets(texts: Sequence[str], lines: Sequence[int], path: Path, column: str, kind: str) -> np.ndarray:
    numbers = [_is_number(t) for t in texts]
    if all(numbers):
        return np.array([float(t) for t in texts])
    if kind == "regression" or (kind == "auto" and any(numbers)):
        odd = numbers.index(False)
        raise UserError(
            "task.data_dir",
            f"{path}:{lines[odd]} column {column}",
            f"holds {texts[odd]!r}",
            allowed="a number; or task.kind=classification, for class labels",
        )
    return np.array(texts)


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
