"""Repair: is the model better after the rows that a method calls most suspicious were relabelled, or removed?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from bench.evaluations.accuracy import gain, kept, need_classes, right
from bench.evaluations.base import Case, Metric, NotApplicable
from bench.evaluations.rankings import rankings
from bench.statistics import Array
from tasks.base import Task, named_seed
from tasks.errors import UserError, require

ACTIONS = ("relabel", "remove")


@dataclass(frozen=True)
class Repair:
    """The first `share` of the training rows by suspicion are relabelled (a person who knows gives each its right
    label) or removed, and `repeats` models are trained on the result:

    <ranking>_<action>_gain   test accuracy − that after the same was done to as many random rows, a new draw and a new
                              seed each repeat, the seed shared by both
    oracle_<action>_gain      the same where planted errors come first: what any ranking can gain
    random_<action>_accuracy  what the gains are added to
    """

    share: float
    actions: tuple[str, ...]
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "actions", tuple(self.actions))
        require(0 < self.share < 1, "truth.repair.share", self.share, "0 < share < 1")
        require(self.repeats >= 2, "truth.repair.repeats", self.repeats, "2 or more: their spread is the noise")
        for action in self.actions:
            if action not in ACTIONS:
                raise UserError("truth.repair.actions", f"[{','.join(self.actions)}]", allowed=ACTIONS)
        require(len(self.actions) > 0, "truth.repair.actions", "[]", "one or more of " + ", ".join(ACTIONS))

    def size(self, task: Task) -> int:
        n, size = len(task.train), round(self.share * len(task.train))
        require(0 < size < n, "truth.repair.share", self.share, f"one that takes 1 to {n - 1} of {n} rows")
        return size

    def plan(self, task: Task, seed: int) -> None:
        """All trainings follow from rankings."""
        need_classes(task, "repair")
        if task.annotations is None or not task.annotations.flipped:
            raise NotApplicable("repair needs labels that are known to be wrong: task.corruption.rate= plants them")
        self.size(task)

    def later(self) -> int:
        """Two rankings of the method, one of the oracle, random rows."""
        return len(self.actions) * 4 * self.repeats

    def evaluate(self, case: Case) -> dict[str, Metric]:
        task, size = case.task, self.size(case.task)
        assert task.annotations is not None
        rng = np.random.default_rng(named_seed("repair", self.seed))
        drawn = [rng.permutation(len(task.train))[:size].tolist() for _ in range(self.repeats)]
        wrong = [k for k, i in enumerate(task.train.ids) if i in task.annotations.flipped]
        rest = sorted(set(range(len(task.train))) - set(wrong))
        truth = {**asdict(self), "actions": list(self.actions), "flips": len(wrong)}
        metrics = {}
        for action in self.actions:
            random = self._after(case, action, drawn)
            found = [(name, np.argsort(helps, kind="stable")[:size], nan) for name, helps, nan in rankings(case)]
            for name, first, nan in found:
                after = self._after(case, action, [first.tolist()] * self.repeats)
                metrics[f"{name}_{action}_gain"] = gain(after, random, truth, nan)
            best = self._after(case, action, [(wrong + rest)[:size]] * self.repeats)
            metrics[f"oracle_{action}_gain"] = gain(best, random, truth, better=None)
            accuracy = float(random.mean())
            metrics[f"random_{action}_accuracy"] = Metric(accuracy, np.empty(0), random.size, truth, better=None)
        return metrics

    def _after(self, case: Case, action: str, rows: Sequence[list[int]]) -> Array:
        """1 where a test row is answered rightly by the r-th model, after the action on the r-th rows, (repeats, T)."""
        n, name = len(case.task.train), "repair"
        if action == "remove":
            return right(case, name, kept(n, list(rows), self.seed, "truth.repair"), case.task)
        everything = kept(n, [[]] * len(rows), self.seed, "truth.repair")
        made: dict[tuple[int, ...], list[int]] = {}  # the repeats of one relabelling are trained together
        for repeat, chosen in enumerate(rows):
            made.setdefault(tuple(chosen), []).append(repeat)
        found = np.empty((len(rows), len(case.task.splits["test"])))
        for chosen_once, repeats in made.items():
            found[repeats] = right(case, name, everything.select(repeats), relabelled(case.task, chosen_once))
        return found


def relabelled(task: Task, rows: Sequence[int]) -> Task:
    """The same with the right labels of these training rows, where they are known."""
    assert task.annotations is not None
    targets = task.train.targets.clone()
    for row in rows:
        targets[row] = task.annotations.clean.get(task.train.ids[row], int(targets[row]))
    if torch.equal(targets, task.train.targets):
        return task
    return replace(task, splits={**task.splits, "train": replace(task.train, targets=targets)})
