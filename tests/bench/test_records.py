"""Records: whole or not at all, the same after a round trip, and honest about numbers that are none."""

import copy
import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import records
from tasks.errors import UserError

ROOT = Path(__file__).parents[2]
SCORES = {"attribution/query": np.arange(6.0).reshape(2, 3), "value": np.arange(3, dtype=np.float32)}
IDS = {"query": ["q0", "q1"], "train": ["7", "8", "9"]}
REPLICATES = {"lds": np.linspace(0, 1, 5)}
FILES = {"config.yaml", "record.json", "scores.safetensors", "replicates.safetensors"}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "run_id": "0123456789abcdef",
        "status": "ok",
        "reason": None,
        "task": "sst2",
        "data": {"source": "generated", "fingerprint": "f00d", "n_train": 3},
        "model": "bert_tiny",
        "method": "ekfac",
        "method_label": "ekfac",
        "seed": 0,
        "config": {"method": {"damping": {"value": 0.1}}},
        "metrics": {"lds": {"value": 0.41, "low": 0.37, "high": 0.45, "ceiling": 0.93, "n": 2, "nan": 0, "truth": {}}},
        "fitness": {"test_accuracy": 0.93},
        "cost": {"seconds": 1.5, "phases": {}, "peak_memory_bytes": 0, "trainings": 1},
        "provenance": {"started": "2026-01-01"},
        **changes,
    }


def write(out: Path, content: dict[str, Any] | None = None, **options: Any) -> Path:
    return records.write(out, content or record(), "seed: 0\n", SCORES, IDS, REPLICATES, **options)


def hidden(out: Path) -> list[Path]:
    return list(out.rglob(".*"))


def test_a_run_reads_back_as_it_was_written(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert folder == tmp_path / "runs" / "sst2" / "ekfac" / "0123456789abcdef"
    assert {path.name for path in folder.iterdir()} == FILES
    assert records.read(folder) == record()
    assert (folder / "config.yaml").read_text() == "seed: 0\n"
    scores, ids = records.read_scores(folder)
    assert ids == IDS
    assert {name: array.tolist() for name, array in scores.items()} == {n: a.tolist() for n, a in SCORES.items()}
    replicates = records.read_replicates(folder)["lds"]
    assert replicates.dtype == np.float32
    np.testing.assert_allclose(replicates, REPLICATES["lds"], rtol=1e-7)
    assert records.find(tmp_path, "sst2", "ekfac", "0123456789abcdef") == folder
    assert records.read_all(tmp_path) == [(record(), folder)]
    assert hidden(tmp_path) == []


def test_arrays_that_are_views_keep_their_order(tmp_path: Path) -> None:
    scores = {"attribution/query": np.arange(6.0).reshape(3, 2).T}  # not contiguous
    folder = records.write(tmp_path, record(), "", scores, IDS, {})
    assert records.read_scores(folder)[0]["attribution/query"].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_run_id_ignores_the_order_of_keys_and_nothing_else() -> None:
    one = records.run_id({"a": 1, "b": {"c": [1, 2], "d": None}})
    assert one == records.run_id({"b": {"d": None, "c": [1, 2]}, "a": 1})
    assert len(one) == 16 and set(one) <= set("0123456789abcdef")
    others = [{"a": 1, "b": {"c": [2, 1], "d": None}}, {"a": 2, "b": {"c": [1, 2], "d": None}}, {"a": 1}]
    assert len({one, *map(records.run_id, others)}) == 4
    with pytest.raises(ValueError):
        records.run_id({"a": float("nan")})


def test_numbers_that_are_not_finite_become_null_and_are_counted(tmp_path: Path) -> None:
    content = record(fitness={"test_accuracy": np.float32("inf"), "curve": np.array([1.0, np.nan])})
    content["metrics"] = {
        "lds": {"value": float("nan"), "low": np.nan, "high": None, "n": np.int64(2), "nan": 0},
        "loo": {"value": float("nan"), "nan": 7},
        "auc": {"value": None, "nan": 0},  # not measured is not NaN
        "ap": {"value": np.float32(0.5), "nan": 0},
    }
    stored = records.read(write(tmp_path, content))
    assert stored["fitness"] == {"test_accuracy": None, "curve": [1.0, None]}
    assert stored["metrics"]["lds"] == {"value": None, "low": None, "high": None, "n": 2, "nan": 1}
    assert [stored["metrics"][name]["nan"] for name in ("loo", "auc", "ap")] == [7, 0, 0]
    assert stored["metrics"]["ap"]["value"] == 0.5
    assert content["metrics"]["lds"]["nan"] == 0  # what was handed in is left alone


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("schema", 2, "schema"),
        ("run_id", "", "run_id"),
        ("task", "../sst2", "task"),
        ("method", ".hidden", "method"),
        ("status", "fine", "status"),
        ("status", "failed", "reason"),  # a failure needs a reason
        ("seed", True, "seed"),
        ("data.n_train", "many", "data.n_train"),
        ("data.source", None, "data.source"),
        ("config", {}, "config.method"),
        ("metrics.lds.value", "0.4", "metrics.lds.value"),
        ("metrics.lds.nan", -1, "metrics.lds.nan"),
        ("metrics.lds.better", "best", "metrics.lds.better"),
        ("metrics.lds.truth", "common", "metrics.lds.truth"),
        ("metrics.lds", {}, "metrics.lds.value"),
        ("cost.seconds", "1", "cost.seconds"),
        ("provenance", None, "provenance"),
    ],
)
def test_a_malformed_record_is_refused_by_the_name_of_its_field(
    tmp_path: Path, path: str, value: Any, named: str
) -> None:
    content = copy.deepcopy(record())
    owner: Any = content
    *parents, last = path.split(".")
    for key in parents:
        owner = owner[key]
    owner[last] = value
    with pytest.raises(ValueError, match=rf"^record\.{named}:"):
        records.validate(content)
    with pytest.raises(ValueError, match=named):
        write(tmp_path, content)
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    assert records.read(write(tmp_path, record(extra={"a": [1]})))["extra"] == {"a": [1]}


@pytest.mark.parametrize(
    ("scores", "replicates"),
    [
        ({"attribution/query": np.zeros((3, 2))}, {}),
        ({"attribution/query": np.zeros(3)}, {}),
        ({"value": np.zeros(4)}, {}),
        ({"value": np.array(["a", "b", "c"])}, {}),
        ({}, {"lds": np.zeros((2, 2))}),
        ({}, {"lds": np.zeros((3, 2, 2))}),
    ],
)
def test_arrays_that_do_not_fit_their_examples_are_refused(
    tmp_path: Path, scores: dict[str, np.ndarray], replicates: dict[str, np.ndarray]
) -> None:
    with pytest.raises(ValueError, match=r"query|value|lds"):
        records.write(tmp_path, record(), "", scores, IDS, replicates)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_crash_while_writing_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, call, die)
        with pytest.raises(Killed):
            write(tmp_path)
    assert records.read_all(tmp_path) == []
    assert records.find(tmp_path, "sst2", "ekfac", "0123456789abcdef") is None
    assert records.read(write(tmp_path)) == record()  # and nothing is in the way of the next


def test_what_a_dead_writer_left_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path)
    left = folder.parent / ".0123456789abcdef.1234.new"
    left.mkdir()
    (left / "record.json").write_text(records.dumps(record()))
    assert [path for _, path in records.read_all(tmp_path)] == [folder]


def test_a_crash_while_replacing_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    rename, calls = os.rename, []

    def second_fails(source: Any, target: Any, **options: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_fails)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, record(seed=9), replace=True)
    assert len(calls) == 3  # aside, new (fails), back
    assert [found["seed"] for found, _ in records.read_all(tmp_path)] == [0]
    assert hidden(tmp_path) == []


def test_a_finished_twin_is_kept_unless_replaced(tmp_path: Path) -> None:
    folder = write(tmp_path, record(seed=1))
    assert write(tmp_path, record(seed=2)) == folder
    assert records.read(folder)["seed"] == 1
    assert write(tmp_path, record(seed=3), replace=True) == folder
    assert records.read(folder)["seed"] == 3
    assert {path.name for path in folder.iterdir()} == FILES
    assert hidden(tmp_path) == []


def test_a_damaged_record_is_replaced(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "record.json").write_text("{")
    assert records.find(tmp_path, "sst2", "ekfac", folder.name) is None
    write(tmp_path, record(seed=2))
    assert records.read(folder)["seed"] == 2


@pytest.mark.parametrize("replace", [False, True])
def test_of_concurrent_writers_one_record_stays_whole(tmp_path: Path, replace: bool) -> None:
    seeds = range(24)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda seed: write(tmp_path, record(seed=seed), replace=replace), seeds))
    assert len(set(folders)) == 1
    ((found, folder),) = records.read_all(tmp_path)
    assert found == record(seed=found["seed"]) and found["seed"] in seeds
    assert {path.name for path in folder.iterdir()} == FILES
    assert hidden(tmp_path) == []


def test_a_twin_that_finishes_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, late = os.rename, []

    def overtaken(source: Any, target: Any, **options: Any) -> None:
        if not late:
            late.append(True)
            write(tmp_path, record(seed=1))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", overtaken)
    folder = write(tmp_path, record(seed=2))
    assert late and records.read(folder)["seed"] == 1
    assert hidden(tmp_path) == []


def test_damaged_records_are_skipped_with_a_warning_that_names_them(tmp_path: Path) -> None:
    good = write(tmp_path)
    cut = write(tmp_path, record(run_id="cut"))
    text = (cut / "record.json").read_text()
    (cut / "record.json").write_text(text[: len(text) // 2])
    old = write(tmp_path, record(run_id="old"))
    (old / "record.json").write_text(json.dumps({**record(), "schema": 0}))
    empty = tmp_path / "runs" / "sst2" / "ekfac" / "empty"
    empty.mkdir()
    with pytest.warns(UserWarning) as caught:
        found = records.read_all(tmp_path)
    assert [folder for _, folder in found] == [good]
    messages = "\n".join(str(warning.message) for warning in caught)
    assert all(str(path / "record.json") in messages for path in (cut, old, empty))


def test_reading_nothing_and_reading_some_tasks(tmp_path: Path) -> None:
    assert records.read_all(tmp_path / "none") == []
    write(tmp_path)
    other = write(tmp_path, record(task="digits"))
    assert [folder for _, folder in records.read_all(tmp_path, ["digits"])] == [other]
    assert len(records.read_all(tmp_path)) == 2


def test_a_kept_copy_without_arrays_can_be_read(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for name in ("scores.safetensors", "replicates.safetensors"):
        (folder / name).unlink()
    assert records.read(folder) == record()
    assert records.read_replicates(folder) == {}
    assert records.read_scores(folder) == ({}, {})
    (folder / "replicates.safetensors").write_bytes(b"\x00" * 3)
    with pytest.raises(ValueError, match=r"replicates\.safetensors"):
        records.read_replicates(folder)


def test_parts_of_replicates_are_kept_with_their_shape(tmp_path: Path) -> None:
    parts = np.arange(12.0).reshape(3, 4)
    folder = records.write(tmp_path, record(), "", {}, {}, {"lds": parts, "auc": parts[0]})
    found = records.read_replicates(folder)
    assert found["lds"].tolist() == parts.tolist() and found["lds"].dtype == np.float32
    assert found["auc"].shape == (4,)


def test_what_each_query_contributes_is_kept(tmp_path: Path) -> None:
    by_query = {
        "lds": {"value": np.array([0.1, 1 / 3]), "ceiling": np.array([0.5, 0.25])},
        "loo_pearson": {"value": np.array([np.nan, 0.2])},
        "auc": {},
    }
    folder = write(tmp_path, by_query=by_query)
    assert {path.name for path in folder.iterdir()} == FILES | {"queries.safetensors"}
    found = records.read_queries(folder)
    assert set(found) == {"lds/value", "lds/ceiling", "loo_pearson/value"}
    for key, array in found.items():
        metric, name = key.split("/")
        np.testing.assert_array_equal(array, by_query[metric][name])
        assert array.dtype == np.float64, "numbers in full: their mean is the metric"
    assert records.read_queries(write(tmp_path, record(run_id="none"), by_query={"auc": {}})) == {}
    assert records.read_queries(write(tmp_path, record(run_id="nothing"))) == {}
    again = write(tmp_path, replace=True)
    assert {path.name for path in again.iterdir()} == FILES, "nothing of the replaced record stays"


def test_queries_that_are_no_numbers_or_damaged_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lds/value"):
        write(tmp_path, by_query={"lds": {"value": np.array(["a"])}})
    assert list(tmp_path.iterdir()) == []
    folder = write(tmp_path, by_query={"lds": {"value": np.zeros(2)}})
    (folder / "queries.safetensors").write_bytes(b"\x00")
    with pytest.raises(ValueError, match=r"queries\.safetensors"):
        records.read_queries(folder)


def test_a_full_disk_is_the_users_to_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"^out=.*No space left on device") as caught:
            write(tmp_path)
    assert caught.value.key == "out"
    assert records.read_all(tmp_path) == [] and hidden(tmp_path) == []


def test_a_file_in_the_place_of_the_folder_is_the_users_to_know(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match=r"^out=.*results cannot be written"):
        write(tmp_path / "results")


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_an_array_file_that_cannot_grow_is_the_users_to_know(tmp_path: Path) -> None:
    program = (
        "import resource, sys, numpy as np\n"
        "from bench import records\n"
        "from tasks.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: records.write(sys.argv[1], eval(sys.argv[2]), '', {'value': np.zeros(9999)}, {}, {})\n"
        "except UserError as error: print(error.key)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), repr(record())],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout == "out\n"
    assert records.read_all(tmp_path) == [] and hidden(tmp_path) == []


def test_no_torch_is_imported() -> None:
    program = "import sys, bench.records, bench.tables; print('torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False False\n"
