"""The primitive: rows in the order of the plan, made once, resumed, the same by every engine."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_tasks import CONVEX, vector_task

from tasks.base import Task
from tasks.errors import UserError
from tasks.training import engines
from tasks.training.engines import Executor, Rows, one_by_one
from tasks.training.plan import Plan, leave_one_out, planned, random_subsets
from tasks.training.retrain import retrain, store_of

HERE = Path(__file__).parent
TASK = vector_task(epochs=1, batch_size=12)
PLAN = planned(random_subsets(24, 6, 0.5, 0), 2, "common", 0, 0)
ONE = Executor("vectorised", 1)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the rows that the vectorised engine was asked for, in its order."""
    asked: list[str] = []
    lock, stacked = threading.Lock(), engines.stacked

    def counted(task: Task, plan: Plan) -> Rows:
        with lock:
            asked.extend(plan.keys())
        return stacked(task, plan)

    monkeypatch.setattr(engines, "stacked", counted)
    return asked


def in_units_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "STACK", dict.fromkeys(engines.STACK, size))


def keys_on_disk(root: Path, task: Task = TASK) -> list[str]:
    return [k.tobytes().hex() for p in store_of(task, root).folder.glob("*.safetensors") for k in load_file(p)["key"]]


def assert_rows(found: Rows, wanted: Rows, tolerance: float = 0.0) -> None:
    assert found.keys() == {"val", "query", "seconds"} and (found["seconds"] > 0).all()
    for name in ("val", "query"):
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=tolerance)


def test_rows_are_measurements_in_the_order_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_units_of(5, monkeypatch)
    found = retrain(TASK, PLAN, tmp_path, ONE)
    assert found["val"].shape == (12, 5) and found["query"].shape == (12, 6)
    assert_rows(found, one_by_one(TASK, PLAN), 1e-10)
    turned = PLAN.select([7, 2, 2, 0])
    assert_rows(retrain(TASK, turned, tmp_path, ONE), {k: v[[7, 2, 2, 0]] for k, v in found.items()})
    assert len(np.unique(found["query"], axis=0)) == 12


def test_a_second_call_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = retrain(TASK, PLAN, tmp_path, ONE)

    def fail(task: Task, plan: Plan) -> Rows:
        raise AssertionError("trained again")

    monkeypatch.setattr(engines, "stacked", fail)
    monkeypatch.setattr(engines, "one_by_one", fail)
    assert_rows(retrain(TASK, PLAN, tmp_path, ONE), first)
    assert_rows(retrain(TASK, PLAN, tmp_path, Executor("processes", 1)), first)
    with pytest.raises(AssertionError, match="trained again"):
        retrain(TASK, planned(PLAN.weights, 1, "fixed", 0, 0), tmp_path, ONE)


def test_equal_rows_of_a_plan_are_trained_once(tmp_path: Path, trained: list[str]) -> None:
    plan = PLAN.select([0, 1, 0, 1, 1])
    found = retrain(TASK, plan, tmp_path, ONE)
    assert sorted(trained) == sorted(set(plan.keys()))
    assert np.array_equal(found["query"][[0, 1]], found["query"][[2, 3]])


def test_rows_are_shared_by_designs_and_not_by_tasks(tmp_path: Path, trained: list[str]) -> None:
    loo = planned(leave_one_out(24, [1, 2], 0.0), 1, "common", 0, 0)
    both = Plan(torch.cat([PLAN.weights[:3], loo.weights]), PLAN.seeds[:3] + loo.seeds, own_batches=True)
    retrain(TASK, loo, tmp_path, ONE)
    trained.clear()
    retrain(TASK, both, tmp_path, ONE)
    assert sorted(trained) == sorted(PLAN.keys()[:3])
    trained.clear()
    retrain(vector_task(epochs=2, batch_size=12), loo, tmp_path, ONE)
    assert sorted(trained) == sorted(loo.keys())


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_launch_resumes_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[str], workers: int
) -> None:
    in_units_of(3, monkeypatch)
    counted, calls = engines.stacked, 0

    def breaks(task: Task, plan: Plan) -> Rows:
        nonlocal calls
        calls += 1
        if calls == 3:
            time.sleep(0.3)  # what was finished before is kept by now
            raise KeyboardInterrupt
        return counted(task, plan)

    with monkeypatch.context() as patch:
        patch.setattr(engines, "stacked", breaks)
        with pytest.raises(KeyboardInterrupt):
            retrain(TASK, PLAN, tmp_path, Executor("vectorised", workers))
    kept = set(keys_on_disk(tmp_path))
    assert 3 <= len(kept) < 12
    trained.clear()
    found = retrain(TASK, PLAN, tmp_path, ONE)
    assert sorted(trained) == sorted(set(PLAN.keys()) - kept)
    assert_rows(found, one_by_one(TASK, PLAN), 1e-10)


def test_a_damaged_shard_costs_its_rows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    in_units_of(4, monkeypatch)
    first = retrain(TASK, PLAN, tmp_path, ONE)
    torn = sorted(store_of(TASK, tmp_path).folder.glob("*.safetensors"))[0]
    lost = [k.tobytes().hex() for k in load_file(torn)["key"]]
    torn.write_bytes(torn.read_bytes()[:-1])
    trained.clear()
    with pytest.warns(UserWarning, match="damaged"):
        again = retrain(TASK, PLAN, tmp_path, ONE)
    assert sorted(trained) == sorted(lost)
    assert_rows(again, first, 1e-12)


@pytest.mark.parametrize("changes", [{"epochs": 2, "momentum": 0.9}, CONVEX], ids=["sgd", "convex"])
def test_engines_make_the_same_rows(tmp_path: Path, changes: dict[str, Any]) -> None:
    task = vector_task(**changes)
    for regime in ("fixed", "common", "fresh"):
        plan = planned(random_subsets(24, 4, 0.5, 0), 1, regime, 0, 0)
        rows = [retrain(task, plan, tmp_path / engine, Executor(engine, 1)) for engine in ("vectorised", "processes")]
        assert_rows(rows[0], rows[1], 1e-7 if changes is CONVEX else 1e-10)  # an optimum is known to its tolerance


def test_worker_processes_make_the_same_rows(tmp_path: Path) -> None:
    found = retrain(TASK, PLAN.select([0, 7, 3]), tmp_path, Executor("processes", 2))
    assert_rows(found, one_by_one(TASK, PLAN.select([0, 7, 3])), 1e-12)


def test_two_launches_at_once_make_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    in_units_of(2, monkeypatch)
    plan = planned(random_subsets(24, 30, 0.5, 0), 1, "common", 0, 0)
    found: list[Rows] = []
    barrier = threading.Barrier(3)

    def launch() -> None:
        barrier.wait()
        found.append(retrain(TASK, plan, tmp_path, ONE))

    threads = [threading.Thread(target=launch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert sorted(trained) == sorted(keys_on_disk(tmp_path)) == sorted(plan.keys())
    for rows in found[1:]:
        assert_rows(rows, found[0])


LAUNCH = """
import sys
from pathlib import Path
from test_retrain import PLAN, TASK
from tasks.training import engines
from tasks.training.retrain import retrain
engines.STACK = dict.fromkeys(engines.STACK, 1)
print("ready", flush=True)
sys.stdin.readline()
found = retrain(TASK, PLAN, Path(sys.argv[1]), engines.Executor("vectorised", 1))
print(found["query"].tobytes().hex())
"""


def test_two_processes_at_once_make_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_units_of(1, monkeypatch)
    command = [sys.executable, "-c", LAUNCH, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            assert other.stdin is not None
            other.stdin.write("go\n")
            other.stdin.flush()
            mine = retrain(TASK, PLAN, tmp_path, ONE)
            answer = other.communicate(timeout=100)[0]
        finally:
            other.kill()
    assert other.returncode == 0
    assert answer == mine["query"].tobytes().hex() + "\n"
    assert sorted(keys_on_disk(tmp_path)) == sorted(PLAN.keys())


@pytest.mark.parametrize("call", ["rename", "mkdir"])
def test_a_full_disk_is_one_line_and_leaves_a_valid_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, trained: list[str]
) -> None:
    first = retrain(TASK, PLAN.select(range(4)), tmp_path, ONE)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, fail)
        with pytest.raises(UserError, match="No space left"):
            retrain(TASK, PLAN, tmp_path, ONE)
    trained.clear()
    again = retrain(TASK, PLAN, tmp_path, ONE)
    assert len(trained) == 8
    assert_rows({k: v[:4] for k, v in again.items()}, first)


def test_progress_counts_rows_up_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_units_of(5, monkeypatch)
    told: list[tuple[int, int]] = []
    retrain(TASK, PLAN, tmp_path, ONE, lambda done, of: told.append((done, of)))
    assert told[0] == (0, 12) and told[-1] == (12, 12)
    assert told == sorted(told) and {of for _, of in told} == {12}


def test_the_judges_facts_name_no_row(tmp_path: Path) -> None:
    """Annotations are cut off before training: a task and its public side share rows."""
    first = retrain(TASK, PLAN.select([0]), tmp_path, ONE)
    assert_rows(retrain(TASK.public(), PLAN.select([0]), tmp_path, ONE), first)
    assert len(keys_on_disk(tmp_path)) == 1


def test_an_executor_is_refused_or_chooses_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"executor\.engine=slurm .*auto, vectorised, processes"):
        Executor("slurm", None)
    with pytest.raises(UserError, match=r"executor\.workers"):
        Executor("auto", 0)
    assert Executor("auto", None).engine_for(TASK) == "vectorised"
    monkeypatch.setattr(engines, "SMALL", 10)
    assert Executor("auto", None).engine_for(TASK) == "processes"
    assert Executor("processes", None).unit(TASK) == 1


@pytest.mark.parametrize("remove", [False, True], ids=["with_affinity", "without_affinity"])
def test_the_number_of_workers_is_the_users(monkeypatch: pytest.MonkeyPatch, remove: bool) -> None:
    """Not every system tells which cores a process may use."""
    if remove:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    workers: Callable[[int | None], int] = lambda n: Executor("auto", n).processes()  # noqa: E731
    assert workers(7) == 7 and workers(1) == 1 and workers(None) >= 1
