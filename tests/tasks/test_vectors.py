"""Rows of numbers from files: read as they are, or refused in one line that names the place."""

import gzip
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import datasets

from tasks.data.vectors import BUNDLED, Table, find_table, read_bundled, read_file, read_idx, read_uci
from tasks.errors import UserError

MORE = [(float(i), 0.5, ("rose", "lily")[i % 2]) for i in range(9)]  # fewer than ten rows are no data set
FLOWERS = "length,width,kind\n5.1,3.5,rose\n4.9,3,lily\n-1e-3,2,rose\n" + "".join(
    f"{length},{width},{kind}\n" for length, width, kind in MORE
)


def read_csv(path: Path, target: str | None, kind: str, **columns: Any) -> Table:
    return read_file(str(path), "task.data_dir", target, kind, **columns)


def written(place: Path, content: str, name: str = "flowers.csv") -> Path:
    path = place / name
    path.write_text(content, encoding="utf-8")
    return path


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as told:
        make()
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_sets_are_scikit_learns(name: str) -> None:
    table, source = read_bundled(name), getattr(datasets, f"load_{name}")()
    assert np.array_equal(table.features, source.data) and np.array_equal(table.targets, source.target)
    assert (table.name, table.kind) == (name, None)


@pytest.mark.parametrize(
    "content",
    [
        FLOWERS,
        FLOWERS.removesuffix("\n"),
        FLOWERS.replace("\n", "\r\n"),
        "\ufeff" + FLOWERS,
        FLOWERS.replace("\n4.9", "\n\n4.9") + "\n\n",
        FLOWERS.replace("rose", '"rose"').replace(",width", ', "width"').replace(', "width"', ", width "),
    ],
    ids=["plain", "no_last_newline", "crlf", "byte_order_mark", "empty_lines", "quoted"],
)
def test_a_csv_file_is_read(tmp_path: Path, content: str) -> None:
    table = read_csv(written(tmp_path, content), "kind", "auto")
    assert table.name == "flowers" and table.kind is None
    assert table.features.tolist() == [[5.1, 3.5], [4.9, 3.0], [-1e-3, 2.0], *([a, b] for a, b, _ in MORE)]
    assert table.targets.tolist() == ["rose", "lily", "rose", *(kind for *_, kind in MORE)]
    assert table.rows is not None and table.rows.notes == () and table.columns == ("length", "width")


def test_any_column_is_the_target_and_numbers_stay_numbers(tmp_path: Path) -> None:
    rows = [(1, 2, 3), (4, 5.5, 6), *((i, i / 4, 2 * i) for i in range(10, 18))]
    path = written(tmp_path, "a,b,c\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    table = read_csv(path, "b", "auto")
    assert table.features.tolist() == [[a, c] for a, _, c in rows] and table.targets.tolist() == [b for _, b, _ in rows]
    assert read_csv(path, "b", "classification").targets.tolist() == table.targets.tolist()
    assert read_csv(path, "b", "auto", features=["c"]).features.tolist() == [[c] for *_, c in rows]
    named = read_csv(path, "b", "auto", id="a")
    assert named.columns == ("c",) and named.rows is not None and named.rows.ids == tuple(str(a) for a, *_ in rows)


def many(line: str) -> str:
    """`line` at line 4711, the header being line 1."""
    return "\n".join(["length,width,kind", *(f"{i},3,rose" for i in range(4709)), line, *["4,2,lily"] * 5, ""])


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("5,x,rose", "without a number in every feature (line 4711 column width 'x')"),
        ("5,1e999,rose", "without a number in every feature (line 4711 column width '1e999')"),
        ("5,1 2,rose", "without a number in every feature (line 4711 column width '1 2')"),
        (",x,rose", "without a number in every feature (line 4711 column length empty)"),
        ("5, NaN ,rose", "without a number in every feature (line 4711 column width 'NaN')"),
        ("5,3,", "without a target (line 4711)"),
        ("5,3, ? ", "without a target (line 4711)"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_and_told_with_its_line(tmp_path: Path, line: str, note: str) -> None:
    table = read_csv(written(tmp_path, many(line)), "kind", "auto")
    assert table.rows is not None and np.isfinite(table.features).all()
    assert table.rows.notes == (
        f"1 row dropped {note}",
        "4 rows dropped as repetitions of an earlier one (lines 4713, 4714, 4715, 4716)",
    )
    assert table.rows.ids == (*(str(i) for i in range(4709)), "4710")
    assert table.features[-2:].tolist() == [[4708, 3], [4, 2]] and len(table.targets) == 4710


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("5,3", r"has 2 columns; allowed: 3, as in the header"),
        ("5,3,rose,1", r"has 4 columns"),
        ('5,3,"ro"se', r"is no CSV"),
        ('5,3,"rose', r"is no CSV"),
    ],
)
def test_a_row_of_another_form_is_refused_with_its_line(tmp_path: Path, line: str, problem: str) -> None:
    said = refused(lambda: read_csv(written(tmp_path, many(line)), "kind", "auto"))
    assert said.startswith(f"task.data_dir={tmp_path / 'flowers.csv'}:4711 ") and problem in said


def test_targets_that_are_mixed_are_no_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, "a,price\n1,2.5\n2,3.5\n3,4..5\n" + "".join(f"{i},2.5\n" for i in range(9, 18)))
    for kind in ("auto", "regression"):
        said = refused(partial(read_csv, path, "price", kind))
        assert f"{path}:4 column price holds '4..5'; allowed: a number; or task.kind=classification" in said
    assert read_csv(path, "price", "classification").targets.tolist()[:3] == ["2.5", "3.5", "4..5"]
    said = refused(lambda: read_csv(written(tmp_path, FLOWERS), "kind", "regression"))
    assert "flowers.csv:2 column kind holds 'rose'" in said


@pytest.mark.parametrize(
    ("content", "target", "problem"),
    [
        (FLOWERS, "petal", "task.target=petal is no column of flowers.csv; allowed: length, width, kind"),
        (FLOWERS, None, "task.target is missing; allowed: length, width, kind"),
        ("", "kind", "has no rows"),
        ("length,width,kind\n", "kind", "has no rows"),
        ("a,a,kind\n1,2,3\n", "kind", "flowers.csv:1 has a bad header: 'a' stands there twice"),
        ("kind\n1\n", "kind", "has no column of features"),
        (",b,kind\n0,1,1\n", "kind", "has a column without a name"),
        (FLOWERS.replace(",", ";"), "kind", "cells are parted by commas in .csv"),
        (FLOWERS.replace("0.5", "broad"), "kind", "has 3 of 12 rows left; allowed: 10 or more that can be used"),
    ],
)
def test_a_file_without_what_is_needed(tmp_path: Path, content: str, target: str | None, problem: str) -> None:
    assert problem in refused(lambda: read_csv(written(tmp_path, content), target, "auto"))


def test_another_encoding_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("size,y\n1,2\n3,größe\n".encode("latin-1"))
    said = refused(lambda: read_csv(tmp_path / "x.csv", "y", "auto"))
    assert f"{tmp_path / 'x.csv'}:3 is not UTF-8 (byte 15 of the file); save it as UTF-8" in said


def uci(place: Path, **files: str) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    content = {"data": "1 2  0.5\n\n3\t4e0 -1.5 \n", "index_features": "0\n1\n", "index_target": "2\n"} | files
    for name, text in content.items():
        written(place, text, f"{name}.txt")
    return place


def test_a_uci_folder_is_a_regression(tmp_path: Path) -> None:
    table = read_uci(uci(tmp_path / "boat", index_train_0="0\n", index_test_0="1\n"))
    assert (table.name, table.kind) == ("boat", "regression")
    assert table.features.tolist() == [[1, 2], [3, 4]] and table.targets.tolist() == [0.5, -1.5]
    assert read_uci(uci(tmp_path / "boat", index_features="1\n")).features.tolist() == [[2], [4]]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"data": "1 2 3\n4 5\n"}, "data.txt:2 has 2 columns; allowed: 3"),
        ({"data": "1 2 3\n\n4 5 x\n"}, "data.txt:3 holds 'x'; allowed: a number"),
        ({"data": "1 2 nan\n"}, "data.txt:1 holds 'nan'"),
        ({"data": "\n"}, "data.txt is not possible; allowed: one that is not empty"),
        ({"index_target": "3\n"}, "index_target.txt:1 names column 3; allowed: 0 to 2"),
        ({"index_features": "0\n1.5\n"}, "index_features.txt:2 names column 1.5"),
        ({"index_target": "1\n"}, "index_target.txt is not possible; allowed: one column, no feature"),
        ({"index_target": "2\n2\n"}, "index_target.txt is not possible"),
    ],
)
def test_a_bad_uci_folder_is_told(tmp_path: Path, files: dict[str, str], problem: str) -> None:
    assert problem in refused(lambda: read_uci(uci(tmp_path, **files)))


def test_a_uci_folder_lacks_a_file(tmp_path: Path) -> None:
    (uci(tmp_path) / "index_target.txt").unlink()
    assert "has no index_target.txt" in refused(lambda: read_uci(tmp_path))


def test_places_are_files_folders_and_names_in_bench_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENCH_DATA", raising=False)
    boat = uci(tmp_path / "uci_regression" / "boat")
    assert "task.data_dir=boat is neither a file nor a folder" in refused(lambda: find_table("boat"))
    assert "give task.data_dir=" in refused(lambda: find_table(None))
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    assert find_table("boat") == boat == find_table(str(boat))
    assert "task.data_dir=ship is neither" in refused(lambda: find_table("ship"))
    assert find_table(str(written(tmp_path, FLOWERS))) == tmp_path / "flowers.csv"
    assert read_csv(tmp_path, "kind", "auto").name == "flowers", "the only one in its folder"
    written(tmp_path, FLOWERS, "trees.tsv")
    assert "has 2 files with rows" in refused(lambda: read_csv(tmp_path, "kind", "auto"))


def idx(place: Path, array: np.ndarray, name: str, zipped: bool) -> Path:
    """`array` as the idx format stores it."""
    head = struct.pack(f">{1 + array.ndim}I", {3: 2051, 1: 2049}[array.ndim], *array.shape)
    content = head + array.astype(np.uint8).tobytes()
    path = place / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path


IMAGES = np.arange(30).reshape(5, 2, 3)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read(tmp_path: Path, zipped: bool) -> None:
    idx(tmp_path, IMAGES, "images", zipped)
    idx(tmp_path, np.arange(5), "labels", zipped)
    images, labels = read_idx(tmp_path, "images", 2051), read_idx(tmp_path, "labels", 2049)
    assert images.dtype == np.uint8 and np.array_equal(images, IMAGES) and labels.tolist() == list(range(5))
    said = refused(lambda: read_idx(tmp_path, "labels", 2051))
    assert "is no such idx file (it starts with 2049); allowed: 2051" in said
    assert "has no other and no other.gz" in refused(lambda: read_idx(tmp_path, "other", 2051))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("size", [0, 3, 4, 10, 16, 45])
def test_a_truncated_idx_file_is_told(tmp_path: Path, size: int, zipped: bool) -> None:
    path = idx(tmp_path, IMAGES, "images", zipped)
    path.write_bytes(path.read_bytes()[:size])
    said = refused(lambda: read_idx(tmp_path, "images", 2051))
    assert said.startswith(f"task.data_dir={path} is ") and ("damaged" in said or "no such idx" in said)


def test_an_idx_file_that_is_too_long_or_garbled_is_told(tmp_path: Path) -> None:
    path = idx(tmp_path, IMAGES, "images", False)
    path.write_bytes(path.read_bytes() + b"\0")
    assert "is damaged (31 bytes of data); allowed: 5 x 2 x 3" in refused(lambda: read_idx(tmp_path, "images", 2051))
    path.unlink()
    path = idx(tmp_path, IMAGES, "images", True)
    content = bytearray(path.read_bytes())
    content[20:30] = bytes(10)
    path.write_bytes(content)
    assert "is damaged" in refused(lambda: read_idx(tmp_path, "images", 2051))
