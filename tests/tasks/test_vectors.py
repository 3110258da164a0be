"""Rows of numbers from files: read as they are, or refused in one line that names the place."""

import gzip
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn import datasets

from tasks.data.vectors import BUNDLED, find_table, read_bundled, read_csv, read_idx, read_table, read_uci
from tasks.errors import UserError

FLOWERS = "length,width,kind\n5.1,3.5,rose\n4.9,3,lily\n-1e-3,2,rose\n"


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
    assert table.features.tolist() == [[5.1, 3.5], [4.9, 3.0], [-1e-3, 2.0]]
    assert table.targets.tolist() == ["rose", "lily", "rose"]


def test_any_column_is_the_target_and_numbers_stay_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, "a,b,c\n1,2,3\n4,5.5,6\n")
    table = read_csv(path, "b", "auto")
    assert table.features.tolist() == [[1, 3], [4, 6]] and table.targets.tolist() == [2, 5.5]
    assert read_csv(path, "b", "classification").targets.tolist() == [2, 5.5]


def many(line: str) -> str:
    """`line` at line 4711, the header being line 1."""
    return "\n".join(["length,width,kind", *["5,3,rose"] * 4709, line, *["4,2,lily"] * 5, ""])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("5,x,rose", r"column width holds 'x'; allowed: a number"),
        ("5,1e999,rose", r"column width holds '1e999'"),
        ("5,1 2,rose", r"column width holds '1 2'"),
        (",3,rose", r"column length has no value"),
        ("5, NaN ,rose", r"column width has no value"),
        ("5,3,", r"column kind has no value"),
        ("5,3", r"has 2 columns; allowed: 3, as in the header"),
        ("5,3,rose,1", r"has 4 columns"),
        ('5,3,"ro"se', r"is no CSV"),
    ],
)
def test_a_bad_row_is_told_with_its_line(tmp_path: Path, line: str, problem: str) -> None:
    said = refused(lambda: read_csv(written(tmp_path, many(line)), "kind", "auto"))
    assert said.startswith(f"task.data_dir={tmp_path / 'flowers.csv'}:4711 ") and problem in said


def test_targets_that_are_mixed_are_no_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, "a,price\n1,2.5\n2,3.5\n3,4..5\n")
    for kind in ("auto", "regression"):
        said = refused(partial(read_csv, path, "price", kind))
        assert f"{path}:4 column price holds '4..5'; allowed: a number; or task.kind=classification" in said
    assert read_csv(path, "price", "classification").targets.tolist() == ["2.5", "3.5", "4..5"]
    said = refused(lambda: read_csv(written(tmp_path, FLOWERS), "kind", "regression"))
    assert "flowers.csv:2 column kind holds 'rose'" in said


@pytest.mark.parametrize(
    ("content", "target", "problem"),
    [
        (FLOWERS, "petal", "task.target=petal is no column; allowed: length, width, kind"),
        (FLOWERS, None, "task.target is missing; allowed: length, width, kind"),
        ("", "kind", "has no rows"),
        ("length,width,kind\n", "kind", "has no rows"),
        ("a,a,kind\n1,2,3\n", "kind", "bad header"),
        ("kind\n1\n", "kind", "bad header"),
    ],
)
def test_a_file_without_what_is_needed(tmp_path: Path, content: str, target: str | None, problem: str) -> None:
    assert problem in refused(lambda: read_csv(written(tmp_path, content), target, "auto"))


def test_another_encoding_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("größe,y\n1,2\n".encode("latin-1"))
    assert "is not UTF-8" in refused(lambda: read_csv(tmp_path / "x.csv", "y", "auto"))


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
    path = written(tmp_path, FLOWERS)
    assert read_table(str(path), "kind", "auto").name == read_table(str(tmp_path), "kind", "auto").name == "flowers"
    assert read_table("boat", None, "auto").name == "boat"
    assert "task.target=2 is not possible" in refused(lambda: read_table("boat", "2", "auto"))
    written(tmp_path, FLOWERS, "trees.csv")
    assert "has 2 CSV files" in refused(lambda: read_table(str(tmp_path), "kind", "auto"))


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
