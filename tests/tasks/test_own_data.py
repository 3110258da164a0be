"""A user's own rows: alike from every format, told with their line where they are bad, none lost in silence."""

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small_tasks import recipe

from bench import config as configuration
from bench import records
from bench.run import build_task, run
from tasks.base import Task
from tasks.data.corruption import Corruption
from tasks.data.files import open_source, read
from tasks.errors import UserError
from tasks.images import images
from tasks.models.encoder import ScratchBert
from tasks.models.mlp import MLP
from tasks.tabular import tabular
from tasks.text import text

SPLITS = ("train", "val", "query", "test")
SIZES: dict[str, Any] = dict.fromkeys(("n_train", "n_val", "n_query", "n_test"))
NET = MLP("mlp", (8,), 0.0, "float64", recipe())
BERT = ScratchBert("tiny", 1, 8, 2, 16, 300, 16, 0.0, 0.02, "float32", recipe(optimizer="adamw", epochs=1))
WORDS = ("good", "fine", "great", "bad", "poor", "film", "plot", "cast", "scene", "story")


def told(task: Task) -> tuple[str, ...]:
    """All notes but the one of what is held out."""
    (held,) = [note for note in task.notes if "are held out" in note]
    sizes = [len(rows) for name, rows in task.splits.items() if name != "train"]
    assert int(held.split()[0]) in (sum(sizes), sum(sizes) - len(task.splits["query"]))
    return tuple(note for note in task.notes if note != held)


def sentences(rows: int = 60, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 6))) + f" {seed}-{i}" for i in range(rows)]
    names = [f"row {i}" for i in range(rows)]
    return pd.DataFrame({"name": names, "text": texts, "label": rng.choice(["neg", "pos"], rows)})


def written(place: Path, table: pd.DataFrame, name: str) -> Path:
    path, plain = place / name, name.removesuffix(".gz")
    if plain.endswith(".jsonl"):
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, sep="\t" if plain.endswith(".tsv") else ",", index=False)
    return path


def of_text(path: Path | str, **changes: Any) -> Task:
    keys = {"text": "text", "target": "label", "id": None, "clean": None, "query_file": None, "seed": 0, "floor": None}
    model, planted = changes.pop("model", BERT), changes.pop("corruption", Corruption(0.0, "uniform"))
    return text(model, str(path), **{**SIZES, **keys, "corruption": planted, **changes})


def of_images(path: Path | str, **changes: Any) -> Task:
    keys = {"path": "path", "target": "label", "id": None, "clean": None, "query_file": None, "seed": 0, "floor": None}
    keys |= {"size": 4, "gray": True, "corruption": Corruption(0.0, "uniform")}
    return images(changes.pop("model", NET), str(path), **{**SIZES, **keys, **changes})


def of_table(path: Path | str, **changes: Any) -> Task:
    keys: dict[str, Any] = {**SIZES, "target": "y", "kind": "auto", "seed": 0, "floor": {"accuracy": 0.0, "r2": 0.0}}
    keys |= {"corruption": Corruption(0.0, "uniform"), **changes}
    return tabular(keys.pop("model", NET), "folder", str(path), **keys)


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as told:
        make()
    assert "\n" not in str(told.value)
    return str(told.value)


# Files


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.csv.gz", "a.tsv.gz", "a.jsonl.gz", "A.CSV"])
def test_every_format_gives_the_same_task(tmp_path: Path, name: str) -> None:
    table = sentences()
    table.loc[3, "text"] = 'with "quotes", a comma\tand a tab'
    table.loc[5, "text"] = "größer Ω"
    one, other = (of_text(written(tmp_path, table, n), id="name") for n in ("b.csv", name))
    assert one.fingerprint() == other.fingerprint() and one.key() == other.key()
    numbers = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 3)).round(3), columns=["a", "b", "y"])
    one, other = (of_table(written(tmp_path, numbers, n)) for n in ("x.csv", f"x{name[1:]}"))
    assert one.fingerprint() == other.fingerprint() and one.key() == other.key()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_byte_order_marks_are_understood(tmp_path: Path, encoding: str, ending: str) -> None:
    table = sentences()
    table.loc[0, "text"] = "größer Ω"
    path = written(tmp_path, table, f"a.{ending}")
    content = json.dumps({"text": "größer Ω"}, ensure_ascii=False)
    path.write_bytes((path.read_text() if ending == "csv" else content).encode(encoding))
    assert read(open_source(str(path), "k"), ["text"]).text["text"][0] == "größer Ω"


def test_lines_are_those_of_the_file_where_cells_hold_breaks_and_lines_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\r\n"one\r\ntwo\nthree",x\r\n\r\nfour,y\r\n  \r\n"five",z\r\n', newline="")
    cells = read(open_source(str(path), "k"), ["label", "text"])
    assert cells.lines == (2, 6, 8) and cells.text["label"] == ["x", "y", "z"]
    assert cells.text["text"] == ["one\r\ntwo\nthree", "four", "five"]


def test_json_numbers_are_text_as_written_and_what_is_not_there_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1.50, "b": true}\n\n{"b": null, "c": NaN, "d": [1]}\n{"a": -2e3, "c": "7"}\n')
    source = open_source(str(path), "k")
    assert source.columns == ("a", "b", "c", "d")
    cells = read(source, ["a", "b"], ["c", "a"])
    assert cells.text == {"a": ["1.50", "", "-2e3"], "b": ["true", "", ""]} and cells.lines == (1, 3, 4)
    np.testing.assert_array_equal(cells.numbers, [[np.nan, 1.5], [np.nan, np.nan], [7, -2000]])
    assert cells.odd == {0: ("c", ""), 1: ("c", "NaN")}
    assert "a.jsonl:3 column d holds a list; allowed: text, a number" in refused(lambda: read(source, ["d"]))


def test_blocks_are_seams_that_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_text("t,a,b\n" + "".join(f"w{i},{i},{'x' if i % 7 == 6 else i / 4}\n" for i in range(25)))
    whole = read(open_source(str(path), "k"), ["t"], ["b", "a"])
    monkeypatch.setattr("tasks.data.files.BLOCK", 4)
    parts = read(open_source(str(path), "k"), ["t"], ["b", "a"])
    np.testing.assert_array_equal(whole.numbers, parts.numbers)
    assert (whole.lines, whole.text, whole.odd) == (parts.lines, parts.text, parts.odd)
    assert whole.odd == {6: ("b", "x"), 13: ("b", "x"), 20: ("b", "x")}


GOOD = "text,label\n" + "".join(f"word {i},{'ab'[i % 2]}\n" for i in range(30))
LATIN = GOOD.encode() + "größe,a\n".encode("latin-1")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", LATIN, f"a.csv:32 is not UTF-8 (byte {len(GOOD) + 2} of the file); save it as UTF-8"),
        ("a.csv", b"\xef\xbb\xbf" + LATIN, f"a.csv:32 is not UTF-8 (byte {len(GOOD) + 5} of the file)"),
        ("a.csv.gz", gzip.compress(LATIN), f"a.csv.gz:32 is not UTF-8 (byte {len(GOOD) + 2} of the file)"),
        ("a.csv", GOOD.encode("utf-16")[:-1], "a.csv:31 is not UTF-16"),
        ("a.csv.gz", gzip.compress(LATIN)[:-9], "a.csv.gz is damaged"),
        ("a.csv.gz", GOOD.encode(), "a.csv.gz is damaged"),
        ("a.csv", (GOOD + "one,two,a\n").encode(), "a.csv:32 has 3 columns; allowed: 2, as in the header"),
        ("a.csv", (GOOD + 'x,a\n"open\n,b\n').encode(), "a.csv:33 is no CSV"),
        ("a.tsv", b'text\tlabel\n"a" b\tx\n', "a.tsv:2 is no TSV"),
        ("a.csv", b"text,label,text\n1,2,3\n", "a.csv:1 has a bad header: 'text' stands there twice"),
        ("a.csv", b"text;label\n1;2\n", "task.text=text is no column of a.csv; allowed: text;label; cells are parted"),
        ("a.csv", b"text,class\n1,2\n", "task.target=label is no column of a.csv; allowed: text, class"),
        ("a.csv", b"", "a.csv has no rows"),
        ("a.csv", b"text,label\n", "a.csv has no rows"),
        ("a.jsonl", b"\n", "a.jsonl has no rows"),
        ("a.jsonl", b'{"text": 1}\n{"text": \n', "a.jsonl:2 is no JSON"),
        ("a.jsonl", b'{"text": 1}\n[1]\n', "a.jsonl:2 is no JSON object"),
        ("a.jsonl", b'{"text": 1}\n{"text": 1, "text": 2}\n', "a.jsonl:2 is no JSON ('text' stands there twice)"),
        ("a.jsonl", b'{"text": "\\ud800", "label": 1}\n', "a.jsonl:1 column text holds half of a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1 is no JSON"),
        ("a.xlsx", b"", "a.xlsx has an unknown ending; allowed: .csv, .tsv, .jsonl, .csv.gz"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_told_with_its_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refused(lambda: of_text(tmp_path / name))


def test_places(tmp_path: Path) -> None:
    assert "task.data_dir=nowhere.csv is neither a file nor a folder" in refused(lambda: of_text("nowhere.csv"))
    assert "has 0 files with rows" in refused(lambda: of_text(tmp_path))
    path = written(tmp_path, sentences(), "a.csv")
    assert of_text(tmp_path).key() == of_text(path).key() and of_text(path).source == "a"
    assert "task.target=label is named twice" in refused(
        lambda: of_text(path, text="label", target="label", id="label")
    )


# Rows


def test_ids_are_positions_or_a_column_and_lead_back_to_the_row(tmp_path: Path) -> None:
    table = sentences()
    table.loc[7, "text"] = "  "
    path = written(tmp_path, table, "a.csv")
    for task, row_of in ((of_text(path), int), (of_text(path, id="name"), lambda i: int(i.removeprefix("row ")))):
        ids = [i for split in task.splits.values() for i in split.ids]
        assert sorted(map(row_of, ids)) == [i for i in range(60) if i != 7]
        for split in task.splits.values():
            assert split.texts is not None
            for i, said, y in zip(split.ids, split.texts, split.targets.tolist(), strict=True):
                assert (said, task.classes[y]) == (table.text[row_of(i)], table.label[row_of(i)])
    assert {k: len(v) for k, v in task.splits.items()} == {"train": 41, "val": 6, "query": 6, "test": 6}


@pytest.mark.parametrize(
    ("cell", "said"), [("row 4", "a.csv:12 has the id 'row 4' of line 6"), (" ", "a.csv:12 has no id")]
)
def test_ids_are_unique_and_there(tmp_path: Path, cell: str, said: str) -> None:
    table = sentences()
    table.loc[10, "name"] = cell
    path = written(tmp_path, table, "a.csv")
    assert said in refused(lambda: of_text(path, id="name"))


def test_what_is_dropped_is_counted_and_named(tmp_path: Path) -> None:
    table = sentences(60)
    table.loc[[2, 7], "text"] = ""
    table.loc[[7, 9], "label"] = None
    table.loc[[20, 21, 22, 23, 24, 25, 26], ["text", "label"]] = ["a good film", "pos"]
    table.loc[30, ["text", "label"]] = ["a good film", "neg"]
    task = of_text(written(tmp_path, table, "a.csv"))
    assert told(task) == (
        "2 rows dropped without a text (lines 4, 9)",
        "1 row dropped without a target (line 11)",
        "6 rows dropped as repetitions of an earlier one (lines 23, 24, 25, 26, 27 and 1 more)",
        "2 rows kept with the text of a row of another label (lines 22, 32)",
    )
    gone = {2, 7, 9, *range(21, 27)}
    ids = {int(i) for split in task.splits.values() for i in split.ids}
    assert ids == set(range(60)) - gone, "good rows are not lost"
    assert told(of_text(written(tmp_path, sentences(60), "b.csv"))) == ()


def test_notes_change_nothing(tmp_path: Path) -> None:
    table = sentences()
    numbers = pd.DataFrame({"a": np.arange(60.0), "y": table.label})
    clean = of_table(written(tmp_path, numbers, "a.csv"))
    again = of_table(written(tmp_path, pd.concat([numbers, numbers[:3]]), "a.csv"))
    assert told(clean) == () and len(told(again)) == 1
    assert clean.key() == again.key() and clean.fingerprint() == again.fingerprint()
    assert again.public().notes == again.notes


def test_nearly_nothing_left_is_an_error(tmp_path: Path) -> None:
    table = sentences(200)
    table.loc[15:, "label"] = ""
    said = refused(lambda: of_text(written(tmp_path, table, "a.csv")))
    assert (
        "has 15 of 200 rows left; allowed: 10 or more" in said and "185 rows dropped without a target (lines 17" in said
    )
    table = sentences(200)
    table.text = "same"
    said = refused(lambda: of_text(written(tmp_path, table, "a.csv")))
    assert "has 2 of 200 rows left" in said and "198 rows dropped as repetitions" in said


@pytest.mark.parametrize("make", [of_text, of_table])
def test_rare_labels_stay_in_train_and_are_told(tmp_path: Path, make: Callable[..., Task]) -> None:
    table = sentences(80).assign(a=np.arange(80.0))
    table.loc[15, "label"] = "postive"
    table.loc[[3, 4, 70], "label"] = "so-so"
    table.loc[[40, 41, 42, 43], "label"] = "great"
    if make is of_table:
        table = table[["a", "label"]]
    path = written(tmp_path, table, "a.csv")
    for seed in range(5):
        task = make(path, target="label", seed=seed)
        assert told(task) == (
            "label 'postive' is seen once (line 17): it stays in train",
            "label 'so-so' is seen 3 times (lines 5, 6, 72): it stays in train",
        )
        assert task.classes == ("great", "neg", "pos", "postive", "so-so")
        assert {"15", "3", "4", "70"} <= set(task.train.ids)
        assert {task.classes[y] for y in task.train.targets.tolist()} == set(task.classes), "train has every label"
        small = make(path, target="label", seed=seed, n_train=10)
        assert {small.classes[y] for y in small.train.targets.tolist()} == set(task.classes)


def test_labels_that_are_no_classes(tmp_path: Path) -> None:
    table = sentences(40)
    said = refused(lambda: of_text(written(tmp_path, table.assign(label="x"), "a.csv")))
    assert "has 1 different labels in 40 rows that can be used; allowed: 2 to 20" in said
    said = refused(lambda: of_text(written(tmp_path, table.assign(label=table.name), "a.csv")))
    assert "has 40 different labels in 40 rows" in said
    said = refused(lambda: of_text(written(tmp_path, table.assign(label=[f"{i // 3}" for i in range(40)]), "a.csv")))
    assert "task.n_val + n_query + n_test=12 is not possible; allowed: at most 0 together (40 rows; 40 stay" in said


def test_splits_are_disjoint_and_of_the_sizes_asked(tmp_path: Path) -> None:
    path = written(tmp_path, sentences(100), "a.csv")
    for seed in range(3):
        task = of_text(path, seed=seed, n_train=30, n_val=5, n_query=7, n_test=11)
        assert [len(task.splits[s]) for s in SPLITS] == [30, 5, 7, 11]
        ids = [i for split in task.splits.values() for i in split.ids]
        assert len(set(ids)) == len(ids)
    assert of_text(path, seed=1).key() == of_text(path, seed=1).key() != of_text(path, seed=2).key()
    with pytest.raises(UserError, match=r"task\.n_train=71 is not possible; allowed: at most 70, or null"):
        of_text(path, n_train=71)
    with pytest.raises(UserError, match=r"task\.n_val=0 "):
        of_text(path, n_val=0)
    with pytest.raises(UserError, match=r"n_val \+ n_query \+ n_test=120 .* at most 98 together"):
        of_text(path, n_query=100)


def test_large_files_have_held_out_rows_up_to_a_most(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": np.arange(30_000.0), "y": np.arange(30_000) * 0.5})
    task = of_table(written(tmp_path, table, "a.csv"))
    assert [len(task.splits[s]) for s in SPLITS] == [27_300, 500, 200, 2000]


# Known errors, planted errors, queries of one's own


@pytest.mark.parametrize("make", [of_text, of_table])
def test_known_errors_are_the_judges_and_held_out_rows_have_the_right_label(
    tmp_path: Path, make: Callable[..., Task]
) -> None:
    right = sentences(100).assign(a=np.arange(100.0))
    wrong = right.copy()
    bad = list(range(0, 100, 7))
    wrong.loc[bad, "label"] = [{"neg": "pos", "pos": "neg"}[y] for y in right.label[bad]]
    wrong["truth"] = right.label.where(np.arange(100) % 2 == 0, "")  # known for every other row
    if make is of_table:
        wrong = wrong[["a", "label", "truth"]]
    path = written(tmp_path, wrong, "a.csv")
    task = make(path, target="label", clean="truth")
    assert task.annotations is not None
    mine = {int(i) for i in task.train.ids}
    assert task.annotations.flipped == {str(i) for i in mine & set(bad) if i % 2 == 0} != set()
    clean = {i: task.classes[y] for i, y in task.annotations.clean.items()}
    assert clean == {str(i): right.label[i] for i in mine if i % 2 == 0}
    for name, split in task.splits.items():
        for i, y in zip(map(int, split.ids), split.targets.tolist(), strict=True):
            trained = wrong.label[i] if name == "train" or i % 2 else right.label[i]
            assert task.classes[y] == trained
    assert task.public().annotations is None and make(path, target="label", clean=None, **(
        {"features": ["a"]} if make is of_table else {})).annotations is None  # fmt: skip
    said = refused(lambda: make(path, target="label", clean="truth", corruption=Corruption(0.1, "uniform")))
    assert "task.corruption.rate=0.1 is not possible; allowed: 0 with task.clean" in said
    wrong.loc[20, "truth"] = "mixed"
    said = refused(lambda: make(written(tmp_path, wrong, "a.csv"), target="label", clean="truth"))
    assert "a.csv:22 has the right label 'mixed', which is no label; allowed: neg, pos" in said


def test_errors_can_be_planted(tmp_path: Path) -> None:
    path = written(tmp_path, table := sentences(100), "a.csv")
    for kind in ("uniform", "hard"):
        task = of_text(path, corruption=Corruption(0.2, kind))
        assert task.annotations is not None and len(task.annotations.flipped) == 14
        for i, y in zip(task.train.ids, task.train.targets.tolist(), strict=True):
            assert (task.classes[y] != table.label[int(i)]) == (i in task.annotations.flipped)


def test_a_file_of_queries(tmp_path: Path) -> None:
    path, asked = written(tmp_path, sentences(60), "a.csv"), sentences(5, seed=1)
    asked.loc[1, "text"] = " "
    asked.loc[3, ["text", "label"]] = sentences(60).loc[8, ["text", "label"]]
    others = written(tmp_path, asked.assign(label=asked.label), "b.jsonl")
    task = of_text(path, query_file=str(others))
    assert task.splits["query"].ids == ("query:0", "query:2", "query:3", "query:4")
    assert task.splits["query"].texts == tuple(asked.text[[0, 2, 3, 4]])
    assert [len(task.splits[s]) for s in SPLITS] == [48, 6, 4, 6]
    assert told(task) == (
        "query file: 1 row dropped without a text (line 2)",
        "query file: 1 row also stands in a.csv (line 4)",
    )
    said = refused(lambda: of_text(path, query_file=str(others), n_query=3))
    assert "task.n_query=3 is not possible; allowed: null with task.query_file" in said
    asked.loc[2, "label"] = "great"
    said = refused(lambda: of_text(path, query_file=str(written(tmp_path, asked, "b.jsonl"))))
    assert "task.query_file=" in said and "b.jsonl:3 has label 'great', which no row of train has" in said
    said = refused(lambda: of_text(path, query_file="nowhere.csv"))
    assert said.startswith("task.query_file=nowhere.csv is neither")


@pytest.mark.parametrize("targets", ["number", "label"])
def test_queries_of_a_table_are_standardised_as_train_is(tmp_path: Path, targets: str) -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(3, 2, size=(50, 3)), columns=["a", "b", "y"])
    if targets == "label":
        table["y"] = rng.integers(0, 2, 50)
    asked = table[:4] + (10.0 if targets == "number" else 0)
    path = written(tmp_path, table, "a.csv")
    others = written(tmp_path, asked[["y", "b", "a"]], "q.tsv")  # columns in another order
    task = of_table(path, query_file=str(others))
    train = table.iloc[[int(i) for i in task.train.ids]]
    mean, sd = train.mean(), train.std(ddof=0)
    wanted = ((asked - mean) / sd)[["a", "b"]].to_numpy()
    np.testing.assert_allclose(task.splits["query"].inputs["x"].numpy(), wanted, atol=1e-12)
    answers = ((asked - mean) / sd).y if targets == "number" else asked.y
    np.testing.assert_allclose(task.splits["query"].targets.numpy(), answers, atol=1e-12)
    said = refused(lambda: of_table(path, query_file=str(written(tmp_path, asked[["y", "b"]], "q.csv"))))
    assert "task.features[0]=a is no column of q.csv; allowed: y, b" in said


def test_labels_of_a_table_are_numbers_in_order(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": np.arange(40.0), "y": ["10", "9"] * 20, "z": ["10.0", ""] * 20})
    task = of_table(written(tmp_path, table, "a.csv"), clean="z")
    assert task.classes == ("9", "10") and task.annotations is not None and not task.annotations.flipped
    assert set(task.annotations.clean.values()) == {1}


# Images


def drawn(place: Path, rows: int = 24) -> Path:
    """White images in one folder, black ones in the other, each with a pixel of its own."""
    for i in range(rows):
        pixels = np.full((8, 8, 3), 255 * (i % 2), dtype=np.uint8)
        pixels[i // 8, i % 8] = (200, 100 + i, 50)
        file = place / ("white" if i % 2 else "black") / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return place


def test_a_folder_of_classes_and_a_table_of_paths(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "pictures")
    one = of_images(folder, size=8)
    assert one.classes == ("black", "white") and one.source == "pictures" and told(one) == ()
    assert one.train.inputs["x"].shape == (18, 64)
    files = sorted(folder.rglob("*.png"))
    ids = [i for split in one.splits.values() for i in split.ids]
    assert sorted(ids) == [file.relative_to(folder).as_posix() for file in files]
    for split in one.splits.values():
        for i, x, y in zip(split.ids, split.inputs["x"], split.targets.tolist(), strict=True):
            assert one.classes[y] == i.split("/")[0]
            wanted = np.asarray(Image.open(folder / i).convert("L")) / 255
            np.testing.assert_array_equal(x.view(8, 8).numpy(), wanted)
    table = pd.DataFrame({"path": [f"pictures/{i}" for i in sorted(ids)], "label": [i[:5] for i in sorted(ids)]})
    other = of_images(written(tmp_path, table, "list.jsonl"), size=8)
    assert [s.targets.tolist() for s in one.splits.values()] == [s.targets.tolist() for s in other.splits.values()]
    assert torch.equal(one.train.inputs["x"], other.train.inputs["x"]) and other.train.ids[0].isdigit()


def test_colours_come_channel_by_channel(tmp_path: Path) -> None:
    task = of_images(drawn(tmp_path), size=8, gray=False)
    i, x = task.train.ids[0], task.train.inputs["x"][0]
    np.testing.assert_allclose(x.view(3, 8, 8) * 255, np.moveaxis(np.asarray(Image.open(tmp_path / i)), 2, 0))


def test_images_that_cannot_be_read_are_dropped_and_named(tmp_path: Path) -> None:
    drawn(tmp_path)
    whole = (tmp_path / "black" / "00.png").read_bytes()
    (tmp_path / "black" / "half.png").write_bytes(whole[:-30])
    (tmp_path / "white" / "notes.txt").write_text("no image")
    (tmp_path / "white" / ".hidden").write_text("no image")
    (tmp_path / "white" / "again.png").write_bytes((tmp_path / "white" / "01.png").read_bytes())
    (tmp_path / "readme.txt").write_text("beside")
    task = of_images(tmp_path, size=8)
    assert task.notes[0] == "files in no subfolder, and so of no class: 1"
    assert task.notes[1].startswith("2 rows dropped without an image that can be read (black/half.png (half.png: ")
    assert task.notes[1].endswith("white/notes.txt (notes.txt is no image))")
    assert told(task)[2:] == ("1 row dropped as repetitions of an earlier one (white/again.png)",)
    assert sum(len(split) for split in task.splits.values()) == 24
    paths = [*(f"black/{i:02d}.png" for i in range(0, 24, 2)), "black/99.png", ""]
    table = pd.DataFrame({"path": paths, "label": list("ab") * 7})
    task = of_images(written(tmp_path, table, "list.csv"))
    assert task.notes[0].endswith("(lines 14 (99.png is not there), 15 (no path))")


def test_sixteen_bits_are_not_cut_off(tmp_path: Path) -> None:
    drawn(tmp_path)
    Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16)).save(tmp_path / "black" / "deep.png")
    task = of_images(tmp_path, n_val=1, n_query=1, n_test=1)
    found = [s.inputs["x"][s.ids.index("black/deep.png")] for s in task.splits.values() if "black/deep.png" in s.ids]
    np.testing.assert_allclose(found[0], 100 / 255)


def test_places_of_images(tmp_path: Path) -> None:
    assert "has no subfolder with images" in refused(lambda: of_images(tmp_path))
    assert "task.data_dir=nowhere is neither" in refused(lambda: of_images("nowhere"))
    drawn(tmp_path)
    assert "task.id=name is a column, which a folder does not have" in refused(lambda: of_images(tmp_path, id="name"))
    assert "model=tiny does not read vectors" in refused(lambda: of_images(tmp_path, model=BERT))
    assert "task.size=0" in refused(lambda: of_images(tmp_path, size=0))


# Through the program

TINY = ["model.width=8", "model.heads=1", "model.layers=1", "model.intermediate=8", "model.recipe.epochs=1"]


def test_a_file_of_texts_end_to_end(tmp_path: Path) -> None:
    table = sentences(60).rename(columns={"text": "review", "label": "stars"})
    path = written(tmp_path, table, "mine.tsv.gz")
    chosen = ["task=text", f"task.data_dir={path}", "task.text=review", "task.target=stars", "task.id=name", *TINY]
    config = configuration.compose([*chosen, "method=loss", f"out={tmp_path}"])
    configuration.check(config)
    outcome = run(config)
    assert outcome.status in ("ok", "unfit"), outcome.reason
    record = records.read(Path(str(outcome.folder)))
    scores, ids = records.read_scores(Path(str(outcome.folder)))
    assert record["data"]["source"] == "mine" and record["fitness"]["floor"]["accuracy"] >= 0.5 - 1e-9
    assert scores["value"].shape == (42,) and set(ids["train"]) <= set(table.name)


@pytest.mark.parametrize("task", ["text", "images"])
def test_without_a_place_one_line_says_what_to_give(task: str) -> None:
    config = configuration.compose([f"task={task}", "method=loss"])
    configuration.check(config)
    assert "task.data_dir is missing; allowed: a file (.csv, " in refused(partial(build_task, config))


def test_long_texts_are_told(tmp_path: Path) -> None:
    table = sentences(60)
    table.loc[[3, 4, 5], "text"] += " good" * 30
    task = of_text(written(tmp_path, table, "a.csv"))
    assert told(task) == ("texts of 16 tokens (model.max_length) or more: 3; what is beyond is not read",)


def test_the_floor_of_a_file_is_what_always_one_answer_reaches(tmp_path: Path) -> None:
    lines = ["x,label", *(f"{i / 7},{'yes' if i % 4 else 'no'}" for i in range(80))]
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines) + "\n")
    task = of_table(path, target="label", floor={"accuracy": None, "r2": None})
    share = (task.splits["test"].targets == task.classes.index("yes")).double().mean()
    assert task.floor == {"accuracy": pytest.approx(float(share))} and 0.5 < share < 1
    assert of_table(path, target="label", floor={"accuracy": 0.1, "r2": None}).floor == {"accuracy": 0.1}
