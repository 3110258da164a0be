"""Scores from a file: joined by id, refused in one line where they cannot be, told before anything is trained."""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from cases import problem_of, task_of, vector_task

from bench import config as configuration
from bench import records
from bench.run import run
from methods.base import Unsupported
from methods.from_file import FromFile
from tasks.base import Examples, Task
from tasks.errors import UserError

RNG = np.random.default_rng(0)
SCORES, VALUE = RNG.normal(size=(5, 12)), RNG.normal(size=12)


def small() -> Task:
    """12 training examples, 5 queries; val and test are examples of their own."""
    task = vector_task([3, 3])

    def named(name: str) -> Examples:
        rows = task.splits["query"]
        return replace(rows, ids=tuple(f"{name}{i}" for i in range(len(rows))))

    return replace(task, splits={**task.splits, "val": named("val"), "test": named("test")})


TASK = small()
TRAIN, QUERY = np.array(TASK.train.ids), np.array(TASK.splits["query"].ids)


def npz(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "scores.npz", **arrays)
    return str(folder / "scores.npz")


def tensors(folder: Path, arrays: dict[str, np.ndarray], ids: Any = None) -> str:
    metadata = None if ids is None else {"ids": ids if isinstance(ids, str) else json.dumps(ids)}
    safetensors.numpy.save_file(arrays, folder / "scores.safetensors", metadata)
    return str(folder / "scores.safetensors")


def method(path: str) -> FromFile:
    found = FromFile(path, False)
    assert found.unmet(TASK) is None
    return found


def scored(path: str, split: str = "query") -> np.ndarray:
    return method(path).attribute(problem_of(TASK), TASK.splits[split]).numpy()


# What a file may be


def test_ids_say_which_row_is_whose(tmp_path: Path) -> None:
    rows, columns = RNG.permutation(5), RNG.permutation(12)
    shuffled = {"scores": SCORES[rows][:, columns], "query_ids": QUERY[rows], "train_ids": TRAIN[columns]}
    path = npz(tmp_path, **shuffled, value=VALUE[columns])
    assert np.array_equal(scored(path), SCORES)
    assert np.array_equal(method(path).value(problem_of(TASK)).numpy(), VALUE)
    one = method(path).attribute(problem_of(TASK), TASK.splits["query"].select([3, 1]))
    assert np.array_equal(one.numpy(), SCORES[[3, 1]])
    without = npz(tmp_path, scores=shuffled["scores"])
    assert not np.array_equal(scored(without), SCORES)  # without ids the order is believed


def test_without_ids_the_order_is_the_task_s(tmp_path: Path) -> None:
    path = npz(tmp_path, scores=SCORES.astype(np.float32), value=VALUE)
    assert np.array_equal(scored(path), SCORES.astype(np.float32))
    some = method(path).attribute(problem_of(TASK), TASK.splits["query"].select([4, 0])).numpy()
    assert np.array_equal(some, SCORES[[4, 0]].astype(np.float32))


def test_ids_of_one_axis_only(tmp_path: Path) -> None:
    assert np.array_equal(scored(npz(tmp_path, scores=SCORES[:, ::-1], train_ids=TRAIN[::-1])), SCORES)
    assert np.array_equal(scored(npz(tmp_path, scores=SCORES[::-1], query_ids=QUERY[::-1])), SCORES)


def test_a_file_may_know_more_than_is_asked(tmp_path: Path) -> None:
    wide = np.concatenate([RNG.normal(size=(5, 1)), SCORES], 1)
    more = np.concatenate([RNG.normal(size=(1, 13)), wide])
    ids = {"query_ids": np.array(["x", *QUERY]), "train_ids": np.array(["y", *TRAIN])}
    path = npz(tmp_path, scores=more, value=np.array([0.0, *VALUE]), **ids)
    assert np.array_equal(scored(path), SCORES)
    assert np.array_equal(method(path).value(problem_of(TASK)).numpy(), VALUE)


def test_numbers_as_ids(tmp_path: Path) -> None:
    train, query = TASK.train, TASK.splits["query"]
    train = replace(train, ids=tuple(str(i) for i in range(12)))
    query = replace(query, ids=tuple(str(i) for i in range(100, 105)))
    task = task_of(train, query, TASK.build, TASK.objective)
    ids = {"query_ids": np.arange(104, 99, -1), "train_ids": np.arange(12)}
    found = FromFile(npz(tmp_path, scores=SCORES[::-1], **ids), False)
    assert found.unmet(task) is None
    assert np.array_equal(found.attribute(problem_of(task), query).numpy(), SCORES)


def test_scores_or_value_alone(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="has scores, but no value"):
        method(npz(tmp_path, scores=SCORES)).value(problem_of(TASK))
    path = npz(tmp_path, value=VALUE)
    assert np.array_equal(method(path).value(problem_of(TASK)).numpy(), VALUE)
    with pytest.raises(Unsupported, match="has a value, but no scores"):
        scored(path)


def test_queries_that_it_does_not_have_are_unsupported(tmp_path: Path) -> None:
    for path in (npz(tmp_path, scores=SCORES), npz(tmp_path, scores=SCORES, query_ids=QUERY)):
        with pytest.raises(Unsupported, match=r"no scores for 5 of the 5 asked examples \(val0, val1, val2, \.\.\.\)"):
            scored(path, "val")
    assert np.array_equal(scored(npz(tmp_path, scores=SCORES, query_ids=[f"val{i}" for i in range(5)]), "val"), SCORES)


def test_safetensors_of_one_split(tmp_path: Path) -> None:
    arrays = {"scores": SCORES[::-1].copy(), "value": VALUE}
    path = tensors(tmp_path, arrays, {"query": QUERY[::-1].tolist(), "train": TRAIN.tolist()})
    assert np.array_equal(scored(path), SCORES)
    assert np.array_equal(method(path).value(problem_of(TASK)).numpy(), VALUE)
    assert np.array_equal(scored(tensors(tmp_path, {"scores": SCORES})), SCORES)


def test_safetensors_of_several_splits(tmp_path: Path) -> None:
    arrays = {"attribution/query": SCORES, "attribution/val": 2 * SCORES}
    ids = {split: list(TASK.splits[split].ids) for split in ("train", "val", "query")}
    for path in (tensors(tmp_path, arrays, ids), tensors(tmp_path, arrays)):
        assert np.array_equal(scored(path), SCORES)
        assert np.array_equal(scored(path, "val"), 2 * SCORES)
        with pytest.raises(Unsupported, match="test0"):
            scored(path, "test")


def test_some_numbers_may_be_missing(tmp_path: Path) -> None:
    holes = np.where(np.eye(5, 12) > 0, np.nan, SCORES)
    assert np.array_equal(scored(npz(tmp_path, scores=holes)), holes, equal_nan=True)


# Whose numbers they are


def test_the_content_is_the_identity_and_is_read_once(tmp_path: Path) -> None:
    path = npz(tmp_path, scores=SCORES)
    found, content = FromFile(path, False), Path(path).read_bytes()
    assert found.inputs() == {"path": hashlib.sha256(content).hexdigest()}
    again = npz(tmp_path, scores=2 * SCORES)
    assert again == path and np.array_equal(
        found.attribute(problem_of(TASK), TASK.splits["query"]).numpy(), SCORES
    )  # what it had read stays
    assert FromFile(path, False).inputs() != found.inputs() and FromFile(path, False) != found
    assert repr(found) == f"FromFile(path={path!r}, calibrated=False)"


@pytest.mark.parametrize("calibrated", [True, False])
def test_who_made_them_says_whether_they_are_calibrated(tmp_path: Path, calibrated: bool) -> None:
    assert FromFile(npz(tmp_path, scores=SCORES), calibrated).calibrated is calibrated


# What a file may not be


def refused(path: str, task: Task = TASK) -> str:
    with pytest.raises(UserError) as error:
        FromFile(path, False).unmet(task)
    message = str(error.value)
    assert message.startswith(f"method.path={path} ") and "\n" not in message and "expected: " in message
    return message


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refused(str(tmp_path / "none.npz"))
    (tmp_path / "folder.npz").mkdir()
    assert "cannot be read (Is a directory)" in refused(str(tmp_path / "folder.npz"))
    (tmp_path / "scores.csv").write_text("1,2")
    assert "unknown type; expected: a file .npz or .safetensors" in refused(str(tmp_path / "scores.csv"))
    for name, content in (("a.npz", b"no zip"), ("a.safetensors", b"none"), ("b.safetensors", b""), ("b.npz", b"")):
        (tmp_path / name).write_bytes(content)
        assert "cannot be read (" in refused(str(tmp_path / name))
    path = Path(npz(tmp_path, scores=SCORES))
    content = bytearray(path.read_bytes())
    content[200] ^= 255  # within the numbers
    path.write_bytes(content)
    assert "cannot be read (Bad CRC-32" in refused(str(path))
    path.write_bytes(content[: len(content) // 2])
    assert "cannot be read (" in refused(str(path))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/from_file_was_unpickled"),))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    bombs = np.array([[Bomb()]], dtype=object)
    assert "allow_pickle=False" in refused(npz(tmp_path, scores=bombs))
    assert "allow_pickle=False" in refused(npz(tmp_path, scores=SCORES, query_ids=np.array(list(QUERY), dtype=object)))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    assert "not an archive of arrays" in refused(str(tmp_path / "pickle.npz"))
    np.save(tmp_path / "one.npy", SCORES)
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    assert "not an archive of arrays" in refused(str(tmp_path / "one.npz"))
    assert not Path("/tmp/from_file_was_unpickled").exists()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"other": SCORES}, "holds neither scores nor value; expected: scores (Q, N), query_ids (Q,)"),
        ({"scores": SCORES.astype(str)}, "scores is of <U"),
        ({"scores": SCORES * 1j}, "scores is of complex128, not of numbers"),
        ({"scores": VALUE}, "has scores of shape (12,)"),
        ({"scores": SCORES[:0]}, "has scores of shape (0, 12)"),
        ({"scores": SCORES, "value": SCORES}, "has value of shape (5, 12)"),
        ({"scores": np.full((5, 12), np.nan)}, "has no finite number in scores"),
        ({"value": np.full(12, np.inf)}, "has no finite number in value"),
        (
            {"scores": SCORES.T},
            "has scores of shape (12, 5), which does not fit task=small; expected: 5 (query), 12 (train)",
        ),
        (
            {"scores": SCORES, "value": VALUE[:7]},
            "has value of shape (7,), which does not fit task=small; expected: 12",
        ),
        ({"scores": SCORES[:, :7], "train_ids": TRAIN[:7]}, "lacks 5 of the 12 training examples (train7, train8,"),
        ({"scores": SCORES, "train_ids": TRAIN[:7]}, "does not fit its ids; expected: any (query), 7 (train)"),
        ({"scores": SCORES, "train_ids": [*TRAIN[:11], "z"]}, "lacks 1 of the 12 training examples (train11; it has"),
        ({"scores": SCORES, "query_ids": [*QUERY[:4], "z"]}, "lacks 1 of the 5 queries (query4; it has query0,"),
        ({"scores": SCORES, "query_ids": list("abcde")}, "lacks 5 of the 5 queries (query0, query1, query2, ...; it"),
        ({"scores": SCORES, "query_ids": QUERY[[0, 0, 2, 3, 3]]}, "has query ids twice (query0, query3)"),
        ({"scores": SCORES, "train_ids": TRAIN[[*range(11), 0]]}, "has train ids twice (train0)"),
        ({"scores": SCORES, "query_ids": np.arange(5) / 2}, "query_ids is of float64 and shape (5,), not a list"),
        ({"scores": SCORES, "query_ids": QUERY[:, None]}, "and shape (5, 1), not a list of text"),
        ({"value": VALUE, "train_ids": [*TRAIN[:11], "z"]}, "lacks 1 of the 12 training examples"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    assert said in refused(npz(tmp_path, **arrays))


@pytest.mark.parametrize(
    ("arrays", "ids", "said"),
    [
        ({"else": SCORES}, None, "holds neither scores nor value"),
        ({"scores": SCORES}, "no JSON", "cannot be read (Expecting value"),
        ({"scores": SCORES}, ["a"], "its metadata's ids are not JSON lists of ids by split"),
        ({"scores": SCORES}, {"query": [["a"]] * 5}, "its metadata's ids are not JSON lists of ids by split"),
        ({"attribution/query": SCORES}, {"query": ["a"]}, "does not fit its ids; expected: 1 (query), any (train)"),
        ({"attribution/clean": SCORES}, None, "has scores of clean, a split that task=small lacks; expected: train,"),
        ({"attribution/val": SCORES[:4]}, None, "attribution/val of shape (4, 12), which does not fit task=small"),
    ],
)
def test_the_same_of_safetensors(tmp_path: Path, arrays: dict[str, Any], ids: Any, said: str) -> None:
    assert said in refused(tensors(tmp_path, arrays, ids))


# Through the program

DIGITS = [
    "task=digits",
    "task.n_train=60",
    "task.n_val=20",
    "task.n_query=8",
    "truth.lds.subsets=6",
    "truth.lds.repeats=1",
    "model.recipe.epochs=15",
    "model.recipe.batch_size=10",
    "evaluation=[lds,detection]",
    "task.corruption.rate=0.1",
]


def test_a_run_s_own_scores_are_judged_as_its_method_was(tmp_path: Path) -> None:
    def record(*overrides: str) -> tuple[Any, Path]:
        outcome = run(configuration.compose([*DIGITS, *overrides, f"out={tmp_path}"]))
        assert outcome.folder is not None, outcome.reason
        folder = Path(outcome.folder)
        return records.read(folder), folder

    first, folder = record("method=graddot")
    kept = folder / "scores.safetensors"
    again, place = record("method=from_file", f"method.path={kept}")
    assert again["metrics"] == first["metrics"] and len(again["metrics"]) > 3
    assert again["cost"]["gradients"] == 0 < first["cost"]["gradients"]

    # The content decides, not the place: a copy is the same run, other numbers are another.
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(kept.read_bytes())
    assert record("method=from_file", f"method.path={copy}")[1] == place
    scores, ids = records.read_scores(folder)
    reversed_ = {name: -array for name, array in scores.items()}
    safetensors.numpy.save_file(reversed_, copy, {"ids": json.dumps(ids)})
    other, elsewhere = record("method=from_file", f"method.path={copy}")
    assert elsewhere != place
    assert other["metrics"]["lds"]["value"] == pytest.approx(-first["metrics"]["lds"]["value"])


def test_a_wrong_file_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    path = npz(tmp_path, scores=np.ones((8, 59)))
    with pytest.raises(UserError, match=r"of shape \(8, 59\), which does not fit task=digits; expected: 8 .*60"):
        run(configuration.compose([*DIGITS, "method=from_file", f"method.path={path}", f"out={tmp_path / 'out'}"]))
    assert not list(tmp_path.rglob("cache"))
