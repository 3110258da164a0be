"""Repair: is the model better after the rows that a method calls most suspicious were relabelled, or removed?"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from bench.evaluations.accuracy import gain, kept, need_classes, right
from bench.evaluations.base import Case, Metric
from bench.evaluations.detection import wrong_rows
from bench.evaluations.rankings import rankings
from bench.statistics import Array
from tasks.base import Task, named_seed
from tasks.errors import UserError, require
from tasks.training.plan import Plan

ACTIONS = ("relabel", "remove")


@dataclass(frozen=True)
class Repairing:
    """Models trained after the first `share` of the training rows by a ranking were relabelled (a person who knows
    gives each its right label) or removed; `repeats` each, and as many where the same was done to random rows."""

    share: float
    actions: tuple[str, ...]
    repeats: int
    seed: int

    name: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "actions", tuple(self.actions))
        key = f"truth.{self.name}"
        require(0 < self.share < 1, f"{key}.share", self.share, "0 < share < 1")
        require(self.repeats >= 2, f"{key}.repeats", self.repeats, "2 or more: their spread is the noise")
        for action in self.actions:
            if action not in ACTIONS:
                raise UserError(f"{key}.actions", f"[{','.join(self.actions)}]", allowed=ACTIONS)
        require(len(self.actions) > 0, f"{key}.actions", "[]", "one or more of " + ", ".join(ACTIONS))

    def size(self, task: Task) -> int:
        n, size = len(task.train), round(self.share * len(task.train))
        require(0 < size < n, f"truth.{self.name}.share", self.share, f"one that takes 1 to {n - 1} of {n} rows")
        return size

    def drawn(self, task: Task) -> list[list[int]]:
        """Random rows, a new draw each repeat."""
        rng = np.random.default_rng(named_seed(self.name.replace("_", " "), self.seed))
        return [rng.permutation(len(task.train))[: self.size(task)].tolist() for _ in range(self.repeats)]

    def oracle(self, task: Task) -> list[int]:
        """Wrong labels first."""
        return np.argsort(~wrong_rows(task, self.name), kind="stable")[: self.size(task)].tolist()

    def after(self, case: Case, action: str, rows: Sequence[list[int]], asked: Callable[[Plan, Task], Array]) -> Array:
        """What is `asked` (repeats, T) of the r-th model, after the action on the r-th rows."""
        n, key = len(case.task.train), f"truth.{self.name}"
        if action == "remove":
            return asked(kept(n, list(rows), self.seed, key), case.task)
        everything, found = kept(n, [[]] * len(rows), self.seed, key), []
        made: dict[tuple[int, ...], list[int]] = {}  # the repeats of one relabelling are trained together
        for repeat, chosen in enumerate(rows):
            made.setdefault(tuple(chosen), []).append(repeat)
        for chosen_once, repeats in made.items():
            found.append(asked(everything.select(repeats), relabelled(case.task, chosen_once)))
        order = np.argsort([repeat for repeats in made.values() for repeat in repeats])
        return np.concatenate(found)[order]


@dataclass(frozen=True)
class Repair(Repairing):
    """Accuracy on the test split:

    <ranking>_<action>_gain   test accuracy − that after the same was done to as many random rows, a new draw and a new
                              seed each repeat, the seed shared by both
    oracle_<action>_gain      the same where planted errors come first: what any ranking can gain
    random_<action>_accuracy  what the gains are added to
    """

    name: ClassVar[str] = "repair"

    def plan(self, task: Task, seed: int) -> None:
        """All trainings follow from rankings."""
        need_classes(task, self.name)
        wrong_rows(task, self.name)
        self.size(task)

    def later(self) -> int:
        """Two rankings of the method, one of the oracle, random rows."""
        return len(self.actions) * 4 * self.repeats

    def evaluate(self, case: Case) -> dict[str, Metric]:
        task, size, drawn = case.task, self.size(case.task), self.drawn(case.task)
        truth = {**asdict(self), "actions": list(self.actions), "flips": int(wrong_rows(task, self.name).sum())}
        metrics = {}

        def after(action: str, rows: Sequence[list[int]]) -> Array:
            return self.after(case, action, rows, partial(right, case, self.name))

        for action in self.actions:
            random = after(action, drawn)
            found = [(name, np.argsort(helps, kind="stable")[:size], nan) for name, helps, nan in rankings(case)]
            for name, first, nan in found:
                repaired = after(action, [first.tolist()] * self.repeats)
                metrics[f"{name}_{action}_gain"] = gain(repaired, random, truth, nan)
            best = after(action, [self.oracle(task)] * self.repeats)
            metrics[f"oracle_{action}_gain"] = gain(best, random, truth, better=None)
            accuracy = float(random.mean())
            metrics[f"random_{action}_accuracy"] = Metric(accuracy, np.empty(0), random.size, truth, better=None)
        return metrics


def relabelled(task: Task, rows: Sequence[int]) -> Task:
    """The same with the right labels of these training rows, where they are known."""
    assert task.annotations is not None
    targets = task.train.targets.clone()
    for row in rows:
        targets[row] = task.annotations.clean.get(task.train.ids[row], int(targets[row]))
    if torch.equal(targets, task.train.targets):
        return task
    return replace(task, splits={**task.splits, "train": replace(task.train, targets=targets)})
