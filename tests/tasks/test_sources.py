"""Labelled sentences from files and from the hub's cache: read as they are, or refused with the line."""

import socket
import time
from pathlib import Path

import pandas as pd
import pytest
from huggingface_hub import constants

from tasks.data import sources
from tasks.data.sources import Labelled, hub_file, named_folder, need_folder, read_parquet, read_tsv
from tasks.errors import UserError

GLUE = 'sentence\tlabel\na good film \t1\nbad , " quoted\t0\n'


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "train.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path) -> Labelled:
    return read_tsv(path, "sentence", "label", ("0", "1"))


@pytest.mark.parametrize(
    "content",
    [
        GLUE,
        GLUE.removesuffix("\n"),
        GLUE.replace("\n", "\r\n"),
        'label\tsentence\n1\ta good film \n0\tbad , " quoted\n',
        'label\tsentence\r\n1\ta good film \r\n0\tbad , " quoted\r\n',
        'id\tsentence\tlabel\n7\ta good film\t1\n8\tbad , " quoted\t0\n',
    ],
    ids=["text_first", "no_last_newline", "crlf", "label_first", "label_first_crlf", "more_columns"],
)
def test_columns_are_found_by_name(tmp_path: Path, content: str) -> None:
    found = read(written(tmp_path, content))
    assert found == Labelled(("train:0", "train:1"), ("a good film", 'bad , " quoted'), (1, 0))


def test_letters_beyond_ascii_and_odd_line_separators_stay(tmp_path: Path) -> None:
    found = read(written(tmp_path, "sentence\tlabel\nun café\u2028très bon\x85\u00e9\t1\n"))
    assert found.texts == ("un café\u2028très bon\x85\u00e9",)


def many(line: str) -> str:
    """`line` at line 4711 of the file, the header being line 1."""
    return "\n".join(["sentence\tlabel", *["fine\t1"] * 4709, line, *["fine\t0"] * 5, ""])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("fine\t2", "label '2'.*allowed: 0, 1"),
        ("fine\tpositive", "label 'positive'"),
        ("fine\t", "label ''"),
        ("1\tfine", "label 'fine'"),
        ("\t1", "empty text"),
        ("   \t1", "empty text"),
        ("fine", "1 columns.*allowed: 2"),
        ("fine\t1\t1", "3 columns"),
        ("", "1 columns"),
    ],
)
def test_a_bad_row_is_told_with_its_line(tmp_path: Path, line: str, problem: str) -> None:
    for newline in ("\n", "\r\n"):
        path = written(tmp_path, many(line).replace("\n", newline))
        with pytest.raises(UserError, match=rf"train\.tsv:4711 has .*{problem}") as told:
            read(path)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("content", "column"),
    [
        ("text\tlabel\nx\t1\n", "sentence"),
        ("sentence\ttarget\nx\t1\n", "label"),
        ("", "sentence"),
        ("x\t1\n", "sentence"),
    ],
)
def test_a_missing_column_is_named(tmp_path: Path, content: str, column: str) -> None:
    with pytest.raises(UserError, match=rf"train\.tsv has no column '{column}'.*sentence and label"):
        read(written(tmp_path, content))


def test_a_missing_file_and_another_encoding_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no train\.tsv"):
        read(tmp_path / "train.tsv")
    with pytest.raises(UserError, match=r"train\.tsv"):
        read(written(tmp_path, "sentence\tlabel\nun café\t1\n".encode("latin-1")))


def test_a_selection_keeps_names() -> None:
    rows = Labelled(("a", "b", "c"), ("A", "B", "C"), (0, 1, 0)).select([2, 0])
    assert rows == Labelled(("c", "a"), ("C", "A"), (0, 0)) and len(rows) == 2


def test_the_folder_is_the_users_or_that_of_bench_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sst2").mkdir()
    monkeypatch.delenv("BENCH_DATA", raising=False)
    assert named_folder(None, "sst2") is None
    with pytest.raises(UserError, match=r"needs a folder.*task\.data_dir=.*BENCH_DATA.*sst2/"):
        need_folder(None, "sst2")
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    assert need_folder(None, "sst2") == tmp_path / "sst2"
    assert named_folder(None, "other") is None
    assert need_folder(str(tmp_path), "sst2") == tmp_path, "what the user gives comes first"
    with pytest.raises(UserError, match=r"task\.data_dir=.*nowhere is no folder"):
        need_folder(str(tmp_path / "nowhere"), "sst2")


def test_a_table_of_the_hub_loses_rows_without_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "train.parquet"
    pd.DataFrame({"sentence": ["one ", " ", "two", "three"], "label": [1, 1, -1, 0], "idx": range(4)}).to_parquet(path)
    found = read_parquet(path, "validation", "sentence", "label", 2)
    assert found == Labelled(("validation:0", "validation:3"), ("one", "three"), (1, 0))
    with pytest.raises(UserError, match="no column 'text'"):
        read_parquet(path, "validation", "text", "label", 2)


def test_an_unreachable_hub_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for proxy in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    tried: list[object] = []

    def refuse(address: object, **_: object) -> None:
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    started = time.perf_counter()
    with pytest.raises(OSError):
        hub_file("a/b", "c.parquet", "0" * 40)
    assert time.perf_counter() - started < 3
    wanted = 0 if constants.HF_HUB_OFFLINE else 1
    assert len(tried) == wanted, "one look, no retries"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not sources.hub_reachable() and len(tried) == wanted
