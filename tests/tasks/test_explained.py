"""Explained trainings: made once, read back exactly, made again when damaged, members independent."""

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tasks import CONVEX, assert_same, vector_task

from tasks.base import Task, Trajectory
from tasks.errors import UserError
from tasks.training import explained as module
from tasks.training.explained import explained
from tasks.training.plan import explained_seed
from tasks.training.train import train

TASK = vector_task(checkpoints=3, momentum=0.9)


def never(*_: object, **__: object) -> Trajectory:
    raise AssertionError("trained again")


def only_file(root: Path) -> Path:
    (path,) = root.rglob("*.safetensors")
    return path


def assert_equal(found: Trajectory, wanted: Trajectory) -> None:
    assert (found.seed, found.seconds, found.final_loss) == (wanted.seed, wanted.seconds, wanted.final_loss)
    assert_same(found.initial, wanted.initial)
    assert [(c.step, c.path) for c in found.checkpoints] == [(c.step, c.path) for c in wanted.checkpoints]
    for a, b in zip(found.checkpoints, wanted.checkpoints, strict=True):
        assert_same(a.parameters, b.parameters)
        assert (a.moments is None) == (b.moments is None)
        for mine, other in zip(a.moments or (), b.moments or (), strict=True):
            assert_same(mine, other)


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoints": 3, "momentum": 0.9},
        {"checkpoints": 12},
        {"checkpoints": 2, "optimizer": "adamw", "lr": 0.01},
        CONVEX,
    ],
)
def test_the_second_call_reads_what_the_first_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    task = vector_task(**changes)
    first = explained(task, 4, 0, tmp_path)
    assert first.seed == explained_seed(4)
    assert_same(first.final, train(task, explained_seed(4)).final)
    monkeypatch.setattr(module, "train", never)
    assert_equal(explained(task, 4, 0, tmp_path), first)
    with pytest.raises(AssertionError, match="trained again"):
        explained(vector_task(lr=0.2), 4, 0, tmp_path)


def test_seeds_and_members_are_different_trainings(tmp_path: Path) -> None:
    made = [explained(TASK, seed, k, tmp_path) for seed, k in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))]
    assert len({t.seed for t in made}) == 5
    for a in range(5):
        for b in range(a):
            assert not torch.equal(made[a].final["layers.linear0.weight"], made[b].final["layers.linear0.weight"])
            assert not torch.equal(made[a].initial["layers.linear0.weight"], made[b].initial["layers.linear0.weight"])
    assert_equal(explained(TASK, 0, 1, tmp_path), made[1])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no_checksum", "swapped"])
def test_a_damaged_file_is_told_and_trained_again(tmp_path: Path, damage: str) -> None:
    first = explained(TASK, 0, 0, tmp_path)
    path = only_file(tmp_path)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no_checksum":
        path.with_suffix(".sha256").unlink()
    else:
        explained(TASK, 0, 1, tmp_path)
        for end in (".safetensors", ".sha256"):
            path.with_name(f"0-1{end}").replace(path.with_suffix(end))
    with pytest.warns(UserWarning, match="damaged"):
        again = explained(TASK, 0, 0, tmp_path)
    assert_same(again.final, first.final)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(explained(TASK, 0, 0, tmp_path), again)


def test_a_failed_write_is_one_line_and_leaves_no_file_that_would_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(UserError, match="No space left"):
            explained(TASK, 0, 0, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.part")), "nothing half-written stays"
    assert explained(TASK, 0, 0, tmp_path).checkpoints
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        explained(TASK, 0, 0, tmp_path / "file")


def test_what_a_method_does_to_its_copy_stays_with_it(tmp_path: Path) -> None:
    task: Task = TASK
    first = explained(task, 0, 0, tmp_path)
    first.final["layers.linear0.weight"].zero_()
    assert explained(task, 0, 0, tmp_path).final["layers.linear0.weight"].abs().max() > 0
