"""What an evaluation sees, and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.statistics import Array, centred, interval
from tasks.base import Task, Trajectory
from tasks.training.engines import Executor, Rows
from tasks.training.plan import Plan
from tasks.training.retrain import retrain


class NotApplicable(Exception):
    """The task has nothing that this evaluation could judge by, or the method does not offer what it judges."""


@dataclass(frozen=True)
class Metric:
    """One number of a record, with its bootstrap replicates. `better`: higher, lower, one, or None: not ranked."""

    value: float
    replicates: Array
    n: int
    truth: dict[str, Any]
    ceiling: float | None = None
    nan: int = 0
    better: str | None = "higher"

    def __post_init__(self) -> None:
        most = 1.0 if self.better == "higher" else np.inf  # correlations, areas and shares end at 1
        object.__setattr__(self, "replicates", centred(self.replicates, self.value, most))

    def entry(self) -> dict[str, Any]:
        low = high = None
        if len(self.replicates):
            low, high = interval(self.replicates)
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
    asked for, and raise `NotApplicable` where the method does not offer them."""

    task: Task
    seed: int
    trajectory: Trajectory
    attribution: Callable[[str], Array]
    value: Callable[[], Array]
    calibrated: bool
    store: Path
    executor: Executor
    progress: Callable[[str, int, int], None]
    notes: dict[str, Any] = field(default_factory=dict)

    def retrain(self, name: str, plan: Plan) -> Rows:
        """Measurements after each training of the plan, from the store or made now."""
        return retrain(self.task, plan, self.store, self.executor, lambda done, of: self.progress(name, done, of))


class Evaluation(Protocol):
    """A kind of question, with its own truth. Its settings are its fields."""

    def plan(self, task: Task, seed: int) -> Plan | None:
        """The retrainings that its truth needs; refuses impossible settings before anything is trained, and raises
        `NotApplicable` where the task has nothing to judge by."""

    def evaluate(self, case: Case) -> dict[str, Metric]:
        """The metrics that it adds to the record, by name."""


def finite(scores: Array) -> tuple[Array, int]:
    """Scores with what is not finite put to 0 (no information), and how many queries (rows) that concerns."""
    bad = ~np.isfinite(scores)
    return np.where(bad, 0.0, scores), int(bad.reshape(len(scores), -1).any(1).sum())
