"""A user's table of rows: CSV, TSV or JSON Lines, gzipped or not; every row with the line where it starts."""

import codecs
import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np

from tasks.errors import UserError

ENDINGS = {".csv": ",", ".tsv": "\t", ".jsonl": None}  # and what stands between two cells
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
ALLOWED = ", ".join([*ENDINGS, *(f"{ending}.gz" for ending in ENDINGS)])
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
BLOCK = 4096  # rows that are held as text at once
LONGEST = 2**30  # characters of a cell


@dataclass(frozen=True)
class Source:
    """A file with named columns. `key`: the setting that names it, for whatever is wrong with it."""

    path: Path
    key: str
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        """Without its endings."""
        return self.path.name[: -len(_ending(self.path))]

    def at(self, line: int) -> str:
        return f"{self.path}:{line}"

    def need(self, key: str, column: str | None) -> str:
        """The column that the setting `key` names; refused where there is none of that name."""
        if column not in self.columns:
            problem = "is missing" if column is None else f"is no column of {self.path.name}"
            raise UserError(key, column, problem, allowed=self.columns, hint=_separators(self.columns))
        return column

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """(line, cells of these columns) of every row; an empty line is no row. A JSON object's numbers stay as they
        are written; what it does not have, or has as null, is an empty cell."""
        with _opened(self.path, self.key) as file:
            if _delimiter(self.path) is None:
                for line, row in _objects(file, self.path, self.key):
                    yield line, [_cell(row.get(name), self.path, self.key, line, name) for name in columns]
                return
            wanted = [self.columns.index(name) for name in columns]
            lines = _lines(file, self.path, self.key)
            next(lines)
            for line, cells in lines:
                if len(cells) != len(self.columns):
                    problem = f"has {len(cells)} columns"
                    allowed = f"{len(self.columns)}, as in the header"
                    raise UserError(self.key, self.at(line), problem, allowed=allowed)
                yield line, [cells[k] for k in wanted]


@dataclass(frozen=True)
class Cells:
    """Columns of N rows: `text` stripped, `numbers` (N, F) with NaN where a cell is no finite number, and `odd`: row ->
    (column, cell) of its first such cell. `lines`: where the rows start."""

    lines: tuple[int, ...]
    text: dict[str, list[str]]
    numbers: np.ndarray
    odd: dict[int, tuple[str, str]]


def is_table(place: str) -> bool:
    """Whether it is a file with one of the endings, or a folder of one."""
    path = Path(place).expanduser()
    return any(_ending(file) for file in (path.iterdir() if path.is_dir() else (path,)))


def open_source(place: str | None, key: str) -> Source:
    """The file that the setting `key` names, or the only one in the folder that it names; its header is read."""
    if place is None:
        raise UserError(key, None, "is missing", allowed=f"a file ({ALLOWED})")
    path = Path(place).expanduser()
    if path.is_dir():
        files = [f for f in sorted(path.iterdir()) if _ending(f)]
        if len(files) != 1:
            raise UserError(
                key, place, f"has {len(files)} files with rows", allowed=f"a file, or a folder of one file ({ALLOWED})"
            )
        path = files[0]
    if not path.is_file():
        raise UserError(key, place, "is neither a file nor a folder", allowed=f"a file ({ALLOWED})")
    if not _ending(path):
        raise UserError(key, str(path), "has an unknown ending", allowed=ALLOWED)
    with _opened(path, key) as file:
        if _delimiter(path) is None:
            names = list(dict.fromkeys(name for _, row in _objects(file, path, key) for name in row))
            if not names:
                raise UserError(key, str(path), "has no rows", allowed="a JSON object a line")
            return Source(path, key, tuple(names))
        lines = _lines(file, path, key)
        header = [name.strip() for name in next(lines, (0, []))[1]]
        if next(lines, None) is None:
            raise UserError(key, str(path), "has no rows", allowed="a header and a row a line")
    twice = next((name for k, name in enumerate(header) if name in header[:k]), None)
    if twice is not None:
        raise UserError(
            key, f"{path}:1", f"has a bad header: {twice!r} stands there twice", allowed="each column its own name"
        )
    return Source(path, key, tuple(header))


def read(source: Source, text: Sequence[str], numbers: Sequence[str] = ()) -> Cells:
    """These columns, converted block by block, so that a large table is never held as text."""
    wanted = list(dict.fromkeys(text))
    rows = source.rows([*wanted, *numbers])
    lines: list[int] = []
    cells: dict[str, list[str]] = {name: [] for name in wanted}
    blocks: list[np.ndarray] = []
    odd: dict[int, tuple[str, str]] = {}
    while block := list(islice(rows, BLOCK)):
        start = len(lines)
        lines += [line for line, _ in block]
        columns = list(zip(*(row for _, row in block), strict=True))
        for name, column in zip(wanted, columns, strict=False):
            cells[name] += [cell.strip() for cell in column]
        found = np.empty((len(block), len(numbers)))
        for k, column in enumerate(columns[len(wanted) :]):
            found[:, k] = _floats(column)
        for row in np.flatnonzero(np.isnan(found).any(1)).tolist():
            k = int(np.isnan(found[row]).argmax())
            odd[start + row] = numbers[k], columns[len(wanted) + k][row].strip()
        blocks.append(found)
    return Cells(tuple(lines), cells, np.concatenate(blocks) if blocks else np.empty((0, len(numbers))), odd)


def real(text: str) -> float:
    """NaN where the text is no finite number."""
    try:
        found = float(text)
    except ValueError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def _floats(cells: Sequence[str]) -> np.ndarray:
    try:
        found = np.array([float(cell) for cell in cells])
    except ValueError:
        found = np.array([real(cell) for cell in cells])
    found[~np.isfinite(found)] = np.nan
    return found


def _ending(path: Path) -> str:
    """`.csv`, `.csv.gz` and so on, as the file has it; empty where it is none of ours."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    return path.name[plain.rindex(".") :] if any(plain.endswith(ending) for ending in ENDINGS) else ""


def _delimiter(path: Path) -> str | None:
    return ENDINGS[_ending(path).lower().removesuffix(".gz")]


def _separators(columns: Sequence[str]) -> str | None:
    if len(columns) == 1 and any(mark in columns[0] for mark in ",;\t|"):
        return "cells are parted by commas in .csv, by tabs in .tsv"
    return None


@contextmanager
def _opened(path: Path, key: str) -> Iterator[TextIO]:
    """The file as text, by its byte order mark, else UTF-8; what cannot be read is told with line and byte."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as raw:
            head = raw.read(3)
            raw.seek(0)
            encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")
            with io.TextIOWrapper(raw, encoding=encoding, newline="") as file:
                yield file
    except UnicodeDecodeError as error:
        raise _undecodable(path, key, encoding) from error
    except DAMAGED as error:
        raise _damaged(path, key, error) from error
    except OSError as error:
        raise UserError(key, str(path), f"cannot be read ({error.strerror})") from error


def _damaged(path: Path, key: str, error: Exception) -> UserError:
    return UserError(key, str(path), f"is damaged ({error})", hint="write it again")


def _undecodable(path: Path, key: str, encoding: str) -> UserError:
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
        content.decode(encoding)
    except DAMAGED as error:
        return _damaged(path, key, error)
    except UnicodeDecodeError as error:
        start = error.start + (len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)  # which the codec leaves out
        line = content[:start].decode(encoding, errors="ignore").count("\n") + 1
        name = "UTF-16" if encoding == "utf-16" else "UTF-8"
        return UserError(key, f"{path}:{line}", f"is not {name} (byte {start} of the file)", hint="save it as UTF-8")
    return UserError(key, str(path), "changes while it is read")


def _lines(file: TextIO, path: Path, key: str) -> Iterator[tuple[int, list[str]]]:
    """(line where it starts, cells) of the header and of every row."""
    csv.field_size_limit(LONGEST)
    delimiter = _delimiter(path)
    assert delimiter is not None
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            kind, hint = _ending(path), "a cell that starts with a quote ends with one; a quote inside is written twice"
            raise UserError(key, f"{path}:{line}", f"is no {kind[1:4].upper()} ({error})", hint=hint) from error
        if cells is None:
            return
        if len(cells) > 1 or (cells and cells[0].strip()):
            yield line, cells


def _objects(file: TextIO, path: Path, key: str) -> Iterator[tuple[int, dict[str, object]]]:
    """(line, object) of every line that is not empty; numbers as they are written."""
    for line, content in enumerate(file, 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content, parse_float=str, parse_int=str, parse_constant=str, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise UserError(key, f"{path}:{line}", f"is no JSON ({error})", allowed="one object a line") from error
        if not isinstance(row, dict):
            raise UserError(key, f"{path}:{line}", "is no JSON object", allowed='one a line, {"column": value, ...}')
        yield line, row


def _once(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name.strip() in found:
            raise ValueError(f"{name.strip()!r} stands there twice")
        found[name.strip()] = value
    return found


def _cell(value: object, path: Path, key: str, line: int, column: str) -> str:
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value).lower()
    if not isinstance(value, str):
        kind = "a list" if isinstance(value, list) else "an object"
        raise UserError(
            key, f"{path}:{line} column {column}", f"holds {kind}", allowed="text, a number, true, false, null"
        )
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(key, f"{path}:{line} column {column}", "holds half of a surrogate pair, which is no text")
    return value
