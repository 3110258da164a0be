"""What is trained together, how much at once, in which order it comes back, and that it is what one training gives."""

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tasks import CONVEX, recipe, token_task, vector_task, vectors
from torch import nn

from bench.memory import Peak
from tasks.base import Task
from tasks.errors import UserError
from tasks.models.mlp import Perceptron
from tasks.training import engines, plan
from tasks.training.engines import STACK, Done, Executor, Rows, measured, one_by_one, stacked
from tasks.training.plan import REGIMES, Plan, planned, random_subsets
from tasks.training.retrain import retrain
from tasks.training.vectorised import bytes_of_a_model, stackable

TASK = vector_task(epochs=1, batch_size=12)
PLAN = planned(random_subsets(24, 6, 0.5, 0), 2, "common", 0, 0)
UNITS = [PLAN.select([row]) for row in range(len(PLAN))]


def with_dropout() -> Task:
    def build() -> nn.Module:
        model = Perceptron([4, 5, 3])
        model.layers.add_module("dropout", nn.Dropout(0.5))
        return model

    return replace(TASK, build=build)


# --- stack = sequence ------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"weight_decay": 0.01},
    "momentum": {"momentum": 0.9},
    "momentum_l2": {"momentum": 0.9, "weight_decay": 0.01},
    "adam": {"optimizer": "adamw", "lr": 0.02},
    "adamw": {"optimizer": "adamw", "lr": 0.02, "decay": "decoupled", "weight_decay": 0.1, "betas": (0.8, 0.95)},
}
SCHEDULES = {"constant": 0.0, "linear": 0.0, "cosine": 0.0, "linear after": 0.6}  # warm-up


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stack_is_each_training_alone(optimizer: str, schedule: str, clip: float | None) -> None:
    """Every optimizer with every schedule, clipped or not, under every regime: to float64's rounding."""
    task = vector_task(
        **OPTIMIZERS[optimizer],
        schedule=schedule.split()[0],
        warmup=SCHEDULES[schedule],
        clip=clip,
        batch_size=4,
        epochs=1,
    )
    for regime in REGIMES:
        design = planned(random_subsets(24, 3, 0.6, 1), 1, regime, 0, 0)
        found, wanted = stacked(task, design), one_by_one(task, design)
        for split in wanted:
            np.testing.assert_allclose(found[split], wanted[split], rtol=0, atol=1e-11, err_msg=regime)
            for seed, row in zip(design.seeds, wanted[split], strict=True):
                assert np.abs(row - measured(task, task.initial(seed), split)).max() > 1e-3, "nothing was trained"


# --- how much at once ------------------------------------------------------------------------------------------------


@pytest.fixture
def in_units_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda size: monkeypatch.setattr(engines, "STACK", dict.fromkeys(STACK, size))


@pytest.mark.parametrize("total", [1, 5, 64, 1000])
def test_shares_sum_to_all_rows_and_get_smaller_towards_the_end(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    for unit, workers in itertools.product([1, 3, 8, 100], [1, 2, 7, 64]):
        monkeypatch.setattr(Executor, "unit", lambda self, task, unit=unit: unit)
        executor, left, shares = Executor("vectorised", workers), total, []
        while left:
            asked = executor.share(TASK, left)
            assert 1 <= asked <= unit
            shares.append(min(asked, left))
            left -= shares[-1]
        assert sum(shares) == total
        assert shares == sorted(shares, reverse=True), "guided: the largest first"
        assert all(4 * share >= unit for share in shares[:-1]), "so small that a stack does not pay"
        assert shares.count(unit) * unit >= total - workers * unit, "whole units as long as all are busy"
        assert len(shares) >= min(workers, total // -(-unit // 4)), "everyone gets something"


def test_the_unit_is_what_half_of_the_free_memory_holds_for_every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    each = bytes_of_a_model(TASK)
    for fits, workers, wanted in ((10, 1, 10), (10, 2, 5), (10, 3, 3), (1, 4, 1), (0, 1, 1), (10**6, 1, STACK["sgd"])):
        monkeypatch.setattr(engines, "free_memory", lambda fits=fits: 2 * fits * each + 1)
        assert Executor("vectorised", workers).unit(TASK) == wanted, (fits, workers)
    monkeypatch.setattr(engines, "free_memory", lambda: 2**62)
    assert Executor("auto", 1).unit(vector_task(**CONVEX)) == STACK["lbfgs"]


def test_little_memory_makes_small_units_and_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(engines, "free_memory", lambda: 2 * 5 * bytes_of_a_model(TASK))

    def noted(task: Task, unit: Plan) -> Rows:
        sizes.append(len(unit))
        return stacked(task, unit)

    with monkeypatch.context() as patch:
        patch.setattr(engines, "stacked", noted)
        found = retrain(TASK, PLAN, tmp_path, Executor("vectorised", 1))
    assert sizes == [5, 5, 2]
    np.testing.assert_allclose(found["query"], one_by_one(TASK, PLAN)["query"], rtol=0, atol=1e-12)


def larger(rows: int, features: int, hidden: tuple[int, ...], classes: int = 3, **changes: Any) -> Task:
    sizes = {"train": rows, "val": 20, "query": 30, "test": 5}
    splits = {name: vectors(name, size, features, classes, seed) for seed, (name, size) in enumerate(sizes.items())}
    return replace(
        vector_task(), splits=splits, build=partial(Perceptron, [features, *hidden, classes]), recipe=recipe(**changes)
    )


LARGER = {
    "wide": partial(larger, 60, 32, (256,), optimizer="adamw", epochs=2),
    "one batch": partial(larger, 1000, 32, (64,), batch_size=1000, momentum=0.9),
    "many rows, many epochs": partial(larger, 4000, 4, (4,), batch_size=500, epochs=20),
}


@pytest.mark.parametrize("kind", LARGER)
def test_the_memory_of_a_model_is_bounded(kind: str) -> None:
    task = LARGER[kind]()
    bound, models = bytes_of_a_model(task), 40
    assert bound >= 4 * 8 * sum(p.numel() for p in task.initial(0).parameters()), "gradients and two moments beside it"
    design = planned(random_subsets(len(task.train), models, 0.5, 0), 1, "fresh", 0, 0)
    stacked(task, design.select(range(2)))
    peak = Peak()
    with peak.measured():
        stacked(task, design)
    if peak.bytes is None:
        pytest.skip("this system does not tell the peak")
    assert peak.bytes <= models * bound + 2**20


def test_the_bound_is_not_absurd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop makes whole stacks of the perceptron on digits."""
    monkeypatch.setattr(engines, "free_memory", lambda: 4 * 2**30)
    task = larger(1000, 64, (64,), 10, optimizer="adamw", epochs=30, batch_size=50)
    assert Executor("vectorised", 8).unit(task) == STACK["adamw"]


def test_the_memory_of_a_model_grows_with_all_that_it_holds() -> None:
    base = bytes_of_a_model(larger(100, 8, (16,)))
    for more in (
        larger(100, 8, (32,)),
        larger(100, 16, (16,)),
        larger(100, 8, (16,), epochs=30),
        larger(9000, 8, (16,)),
        larger(100, 8, (16,), batch_size=1000),
    ):
        assert bytes_of_a_model(more) > base
    train = replace(TASK.train, inputs={"x": TASK.train.inputs["x"].float()})
    single = replace(TASK, dtype=torch.float32, splits={**TASK.splits, "train": train})
    assert bytes_of_a_model(TASK) / 2 <= bytes_of_a_model(single) < bytes_of_a_model(TASK)


def test_more_masks_than_memory_holds_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda: 10**6)
    with pytest.raises(UserError, match=r"truth\.lds\.subsets=1000000000 .*allowed: up to 520"):
        random_subsets(60, 10**9, 0.5, 0)
    assert len(random_subsets(60, 520, 0.5, 0)) == 520
    with pytest.raises(UserError, match=r"subsets=11 .*allowed: fewer: 5 examples have 10 subsets of 2"):
        random_subsets(5, 11, 0.4, 0)


def test_half_of_very_many_rows_is_a_subset() -> None:
    """The number of subsets has more digits than Python writes."""
    assert random_subsets(20_000, 3, 0.5, 0).sum(1).tolist() == [10_000] * 3


# --- the loop --------------------------------------------------------------------------------------------------------


def constant(task: Task, unit: Plan) -> Rows:
    return {name: np.zeros((len(unit), len(task.splits[name]))) for name in ("val", "query")}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_unit_is_drawn_when_a_worker_is_free_for_it(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """What another launch could make meanwhile is not taken in advance."""
    lock = threading.Lock()
    drawn = finished = working = 0
    in_flight, at_once = [], []

    def slow(task: Task, unit: Plan) -> Rows:
        nonlocal finished, working
        with lock:
            working += 1
            at_once.append(working)
        time.sleep(0.01 * (1 + int(unit.keys()[0][0], 16) % 3))
        with lock:
            working -= 1
            finished += 1
        return constant(task, unit)

    def units() -> Iterator[Plan]:
        nonlocal drawn
        for unit in UNITS:
            with lock:
                drawn += 1
                in_flight.append(drawn - finished)
            yield unit

    monkeypatch.setattr(engines, "stacked", slow)
    came = []
    for unit, done in Executor("vectorised", workers).run(TASK, units()):
        came.append(unit.keys()[0])
        assert done.seconds > 0 and done.rows["val"].shape == (1, 5)
    assert sorted(came) == sorted(PLAN.keys())
    assert max(in_flight) <= workers and max(at_once) == workers


def test_nothing_is_drawn_before_it_is_asked_for() -> None:
    def units() -> Iterator[Plan]:
        raise AssertionError("drawn")
        yield PLAN

    loop = Executor("vectorised", 2).run(TASK, units())
    with pytest.raises(AssertionError, match="drawn"):
        next(loop)


def test_workers_are_busy_while_the_caller_keeps_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Semaphore(0)

    def noted(task: Task, unit: Plan) -> Rows:
        started.release()
        return constant(task, unit)

    monkeypatch.setattr(engines, "stacked", noted)
    for k, _ in enumerate(Executor("vectorised", 1).run(TASK, iter(UNITS)), start=1):
        for _ in range(2 if k == 1 else 1):  # this one and the next
            assert k == len(UNITS) or started.acquire(timeout=5), "the next unit waits for the caller"


def at_once(results: dict[str, BaseException]) -> Callable[..., Any]:
    """Workers that have finished a unit when they are given it; those named raise."""

    @contextmanager
    def workers(_: int, task: Task, make: Any) -> Iterator[Callable[[Plan], "Future[Done]"]]:
        def submit(unit: Plan) -> "Future[Done]":
            future: Future[Done] = Future()
            if (error := results.get(unit.keys()[0])) is not None:
                future.set_exception(error)
            else:
                future.set_result(Done(constant(task, unit), 0.5))
            return future

        yield submit

    return workers


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_what_is_finished_when_a_unit_raises_is_given_out(monkeypatch: pytest.MonkeyPatch, broken: int) -> None:
    monkeypatch.setattr(engines, "_threads", at_once({UNITS[broken].keys()[0]: ArithmeticError("no optimum")}))
    came = []
    with pytest.raises(ArithmeticError, match="no optimum"):
        for unit, _ in Executor("vectorised", 3).run(TASK, iter(UNITS)):
            came.append(unit.keys()[0])
    assert sorted(came) == sorted(PLAN.keys()[row] for row in range(3) if row != broken)


def test_a_launch_keeps_what_was_finished_when_a_unit_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_units_of: Callable[[int], None]
) -> None:
    in_units_of(1)
    told: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(engines, "_threads", at_once({PLAN.keys()[4]: ArithmeticError("no optimum")}))
        with pytest.raises(ArithmeticError):
            retrain(TASK, PLAN, tmp_path, Executor("vectorised", 6), lambda done, of: told.append(done))
    assert told[-1] == 5, "all but one of the first six"
    again: list[int] = []
    retrain(TASK, PLAN, tmp_path, Executor("vectorised", 1), lambda done, of: again.append(done))
    assert again[0] == 5 and again[-1] == 12


# --- which engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [token_task, with_dropout], ids=["sequences", "dropout"])
def test_sequences_and_dropout_are_not_batched(make: Callable[[], Task], tmp_path: Path) -> None:
    task = make()
    assert not stackable(task)
    design = planned(random_subsets(len(task.train), 3, 0.5, 0), 1, "common", 0, 0)
    with pytest.raises(
        UserError, match=r"^executor\.engine=vectorised cannot batch .*; allowed: processes, ray$"
    ) as told:
        retrain(task, design, tmp_path, Executor("vectorised", 1))
    assert "\n" not in str(told.value) and task.model in str(told.value)
    assert not list(tmp_path.iterdir()), "something was left behind"
    auto = Executor("auto", 1)
    assert auto.engine_for(task) == "processes" and not auto.stacks(task) and auto.unit(task) == 1
    assert auto.share(task, 1000) == 1


def test_dropout_of_nothing_is_batched() -> None:
    class Same(Perceptron):
        def __init__(self) -> None:
            super().__init__([4, 5, 3])
            self.layers.add_module("dropout", nn.Dropout(0.0))

    assert stackable(replace(TASK, build=Same))


def test_ray_stacks_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    ray = Executor("ray", 3)
    assert ray.engine_for(TASK) == "ray" and ray.stacks(TASK) and ray.unit(TASK) == STACK["sgd"]
    assert not ray.stacks(token_task()) and ray.unit(token_task()) == 1 and not ray.stacks(with_dropout())
    monkeypatch.setattr(engines, "SMALL", 10)
    assert not ray.stacks(TASK) and ray.unit(TASK) == 1
    assert Executor("vectorised", 1).stacks(TASK), "whoever names it gets it"


def test_ray_that_is_not_there_is_told_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^executor\.engine=ray is not installed; pip install"):
        Executor("ray", None)


def test_single_trainings_go_to_processes_in_units_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def here(workers: int, task: Task, make: Any) -> Any:
        @contextmanager
        def workers_here() -> Iterator[Callable[[Plan], "Future[Done]"]]:
            def submit(unit: Plan) -> "Future[Done]":
                future: Future[Done] = Future()
                sizes.append(len(unit))
                future.set_result(Done(make(task, unit), 0.1))
                return future

            yield submit

        return workers_here()

    monkeypatch.setattr(engines, "_processes", here)
    task = with_dropout()
    found = retrain(task, PLAN.select(range(4)), tmp_path, Executor("auto", 2))
    assert sizes == [1] * 4
    assert np.array_equal(found["query"], one_by_one(task, PLAN.select(range(4)))["query"])
