"""What an evaluation sees, and what it answers."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bench.statistics import Array, around, centred, interval
from methods.base import Method, Problem
from tasks.base import Task, Trajectory
from tasks.training.engines import Executor, Rows
from tasks.training.plan import Plan
from tasks.training.retrain import retrain


class NotApplicable(Exception):
    """The task has nothing that this evaluation could judge by, or the method does not offer what it judges."""


class Unfit(Exception):
    """The truth came out and cannot be trusted: no number is better than one judged by it."""


@dataclass(frozen=True)
class Metric:
    """One number of a record, with its bootstrap replicates: (R,), or (3, R) of `bootstrap_parts` where rows and
    queries were resampled. `better`: higher, lower, one, or None: not ranked.

    `by_query`: arrays (Q,) that the number and its ceiling are means of. `most`, `least`: what it cannot exceed.
    """

    value: float
    replicates: Array
    n: int
    truth: dict[str, Any]
    ceiling: float | None = None
    nan: int = 0
    better: str | None = "higher"
    by_query: Mapping[str, Array] = field(default_factory=dict)
    most: float = 1.0  # of correlations, areas and shares
    least: float = -np.inf  # 0 of areas and shares

    def __post_init__(self) -> None:
        if self.replicates.ndim == 1:
            object.__setattr__(self, "replicates", centred(self.replicates, self.value, self._most))

    @property
    def _most(self) -> float:
        return self.most if self.better == "higher" else np.inf

    def entry(self) -> dict[str, Any]:
        low = high = None
        if self.replicates.size:
            low, high = interval(np.clip(around(self.replicates, self.value), self.least, self._most))
            low, high = min(low, self.value), max(high, self.value)  # all but a few replicates may be one number
        return {
            "value": self.value,
            "low": low,
            "high": high,
            "ceiling": self.ceiling,
            "n": self.n,
            "nan": self.nan,
            "better": self.better,
            "truth": self.truth,
        }


@dataclass(frozen=True)
class Case:
    """One method on one task, to be judged. `attribution(split)` (queries, N) and `value()` (N,) are made when first
    asked for, and raise `NotApplicable` where the method does not offer them.

    `problem` and `method`: for what follows from a method's own inverse curvature. `shipped`: a folder of finished
    trainings that is only read. `notes`: how each truth came about, for the record.
    """

    task: Task
    seed: int
    trajectory: Trajectory
    attribution: Callable[[str], Array]
    value: Callable[[], Array]
    calibrated: bool
    store: Path
    executor: Executor
    progress: Callable[[str, int, int], None]
    problem: Problem | None = None
    method: Method | None = None
    shipped: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def retrain(self, name: str, plan: Plan, task: Task | None = None) -> Rows:
        """Measurements after each training of the plan, from the store or made now; of `task` where that is another."""
        there: list[int] = []

        def tell(done: int, of: int) -> None:
            there.append(done)
            self.progress(name, done, of)

        started = time.perf_counter()
        rows = retrain(task or self.task, plan, self.store, self.executor, tell, self.shipped)
        made = len(set(plan.keys())) - there[0] if there else 0
        note = self.notes.setdefault(name, {"engine": self.executor.engine_for(self.task), "trainings": 0, "made": 0})
        note["trainings"] += len(plan)
        note["made"] += made
        note["seconds"] = note.get("seconds", 0.0) + time.perf_counter() - started
        return rows


class Evaluation(Protocol):
    """A kind of question, with its own truth. Its settings are its fields."""

    def plan(self, task: Task, seed: int) -> Plan | None:
        """The retrainings that its truth needs whatever the method says; refuses impossible settings before anything
        is trained, and raises `NotApplicable` where the task has nothing to judge by."""

    def evaluate(self, case: Case) -> dict[str, Metric]:
        """The metrics that it adds to the record, by name."""


@runtime_checkable
class AsksOfMethod(Protocol):
    """An evaluation that not every method can be judged by."""

    def require(self, task: Task, method: Method) -> None:
        """Refuses, before anything is trained, a method that lacks what is asked of it."""


def finite(scores: Array) -> tuple[Array, int]:
    """Scores with what is not finite put to 0 (no information), and how many queries (rows) that concerns."""
    bad = ~np.isfinite(scores)
    return np.where(bad, 0.0, scores), int(bad.reshape(len(scores), -1).any(1).sum())
