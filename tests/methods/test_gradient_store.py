"""The store: what comes out is what went in, once; damaged, half-made and foreign shards are noticed."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, bert, close, far, problem_of, three_classes

from methods import store as module
from methods.base import Problem
from methods.compression.gaussian import Gaussian
from methods.compression.logra import LoGra
from methods.compression.none import Uncompressed
from methods.curvature.damping import Damping
from methods.curvature.dense import Dense
from methods.influence import Influence
from tasks.base import Examples
from tasks.errors import UserError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 5)


def influence(place: Path | None, compression: object | None = None, **changes: object) -> Influence:
    method = Influence(Dense("empirical", "block", 1.0), Damping("mean_eigenvalue", 0.1, "block"),
                       compression=compression or LoGra(3), store=None if place is None else str(place))  # type: ignore[arg-type]  # fmt: skip
    return replace(method, **changes)  # type: ignore[arg-type]


def asked(problem: Problem, place: Path | None, queries: Examples | None = None, **changes: object):  # type: ignore[no-untyped-def]
    return influence(place, **changes).attribute(problem, queries or problem.task.splits["query"])


@pytest.mark.parametrize("compression", [LoGra(3), Gaussian(20)])
@pytest.mark.parametrize("case", ["three_classes", "bert"])
def test_scores_are_those_without_a_store_and_the_second_asks_for_queries_only(
    case: str, compression: object, tmp_path: Path
) -> None:
    task = CASES[case]()
    without, first, second = (problem_of(task) for _ in range(3))
    expected = asked(without, None, compression=compression)
    assert close(asked(first, tmp_path, compression=compression), expected)
    other = task.train.select([3, 1])
    assert close(asked(second, tmp_path, other, compression=compression), asked(problem_of(task), None, other,
                                                                                compression=compression))  # fmt: skip
    n, q = len(task.train), len(task.splits["query"])
    assert (without.meter.gradients, first.meter.gradients, second.meter.gradients) == (2 * n + q, n + q, 2)
    assert len(list(tmp_path.rglob("*.npy"))) == 3, "12 rows in shards of 5"
    assert first.meter.stored_bytes == second.meter.stored_bytes > 12 * 8
    assert close(influence(tmp_path, compression).value(second), influence(None, compression).value(without))


def shards(place: Path) -> list[Path]:
    return sorted(place.rglob("*.npy"))


def test_what_is_missing_is_made_and_the_rest_left_alone(tmp_path: Path) -> None:
    task = bert()
    expected = asked(problem_of(task), tmp_path)
    times = [p.stat().st_mtime_ns for p in shards(tmp_path)]
    shards(tmp_path)[1].unlink()
    again = problem_of(task)
    assert close(asked(again, tmp_path), expected)
    after = [p.stat().st_mtime_ns for p in shards(tmp_path)]
    assert after[0] == times[0] and after[2] == times[2] and after[1] != times[1]
    assert again.meter.gradients == 5 + len(task.splits["query"])


def test_damage_is_noticed_and_mended(tmp_path: Path) -> None:
    task = bert()
    expected = asked(problem_of(task), tmp_path)
    path = shards(tmp_path)[2]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        assert close(asked(problem_of(task), tmp_path), expected)
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        assert close(asked(problem_of(task), tmp_path), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked(problem_of(task), tmp_path)


def test_an_interrupted_shard_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, save, calls = bert(), np.save, []

    def dying(file: object, array: np.ndarray, **options: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(file, array, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(np, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        asked(problem_of(task), tmp_path)
    assert len(shards(tmp_path)) == 1 and not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    monkeypatch.setattr(module, "ROWS", 5)
    problem = problem_of(task)
    assert close(asked(problem, tmp_path), asked(problem_of(task), None))
    assert problem.meter.gradients < 12 + len(task.splits["query"])


@pytest.mark.parametrize("change", ["seed", "model", "data", "compression", "modules", "member"])
def test_whatever_decides_the_numbers_has_a_folder_of_its_own(change: str, tmp_path: Path) -> None:
    task = bert()
    asked(problem_of(task), tmp_path)
    problem, changes = problem_of(task), {}
    if change == "seed":
        problem = problem_of(task, 1)
    elif change == "model":
        moved = {n: p + 0.01 for n, p in problem.trajectory().final.items()}
        ended = problem.trajectory()
        last = replace(ended.checkpoints[-1], parameters=moved)
        problem = Problem(task, 0, lambda k: replace(ended, checkpoints=(last,)))
    elif change == "data":
        turned = task.train.select([*range(1, 12), 0])
        problem = problem_of(replace(task, splits={**task.splits, "train": turned}))
    elif change == "compression":
        changes = {"compression": LoGra(4)}
    elif change == "modules":
        changes = {"modules": ("*dense*",)}
    else:
        problem = problem.member(1)
    found = asked(problem, tmp_path, **changes)
    assert close(found, asked(problem, None, **changes))
    assert len(list(tmp_path.iterdir())) == 2


def test_damping_and_curvature_share_a_store(tmp_path: Path) -> None:
    task = bert()
    one = asked(problem_of(task), tmp_path)
    two = asked(problem_of(task), tmp_path, damping=Damping("absolute", 3.0, "global"))
    assert far(one, two) and len(list(tmp_path.iterdir())) == 1


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    task = three_classes()
    with pytest.raises(UserError, match=r"method\.store.*compressed gradients only.*method/compression"):
        asked(problem_of(task), tmp_path, compression=Uncompressed())
    place = tmp_path / "file"
    place.write_text("no folder")
    for wrong in (place, place / "below"):
        with pytest.raises(UserError, match=r"method\.store=.*cannot be written.*folder of yours"):
            influence(wrong).unmet(task)  # before anything is trained
    with pytest.raises(UserError, match="compressed gradients only"):
        influence(tmp_path, Uncompressed()).unmet(task)
    assert influence(tmp_path / "new").unmet(task) is None
