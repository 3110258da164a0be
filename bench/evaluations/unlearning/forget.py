"""Which rows are to be forgotten."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bench.evaluations.base import Case, NotApplicable, finite
from tasks.base import Task, named_seed
from tasks.errors import UserError, require

STAYS = ("world", "kept")  # kinds of facts that a model must go on knowing


@dataclass(frozen=True)
class Forgotten:
    """Rows of the training set, sorted. `control`: as many of the same labels, drawn at random from the others."""

    rows: tuple[int, ...]
    control: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Forget:
    """`uses`: what of the attribution method chooses the set; it is another set for another method then."""

    name: str

    uses: ClassVar[str | None] = None

    def chosen(self, case: Case) -> Forgotten:
        raise NotImplementedError

    def check(self, task: Task) -> None:
        """Refuses what is impossible before anything is trained."""


@dataclass(frozen=True)
class Random(Forget):
    """As many rows as `fraction` of the training set has, whichever may go."""

    fraction: float
    seed: int

    def check(self, task: Task) -> None:
        sized(task, self.fraction)

    def chosen(self, case: Case) -> Forgotten:
        rng = np.random.default_rng(named_seed("forget random", self.seed))
        order = rng.permutation(may_go(case.task))
        return Forgotten(tuple(sorted(order[: sized(case.task, self.fraction)].tolist())))


@dataclass(frozen=True)
class Subset(Forget):
    """Whole groups: `groups` of all authors, one at least. Of a class `of_class` of the rows, since a model that never
    saw a label cannot say it."""

    groups: float
    of_class: float
    seed: int

    def check(self, task: Task) -> None:
        require(0 < self.groups < 1, "forget.groups", self.groups, "0 < groups < 1, a share of all groups")
        require(0 < self.of_class < 1, "forget.of_class", self.of_class, "0 < of_class < 1, a share of a class's rows")
        if len(members(task)[0]) < 2:
            raise NotApplicable(f"forget={self.name} needs two groups or classes, task={task.name} has one")

    def chosen(self, case: Case) -> Forgotten:
        rng = np.random.default_rng(named_seed("forget subset", self.seed))
        groups, classes = members(case.task)
        order = rng.permutation(sorted(groups))
        number = min(max(1, round(self.groups * len(groups))), len(groups) - 1)
        rows: list[int] = []
        for name in order[:number].tolist():
            drawn = rng.permutation(groups[name]).tolist()
            rows += drawn[: max(1, round(self.of_class * len(drawn)))] if classes else drawn
        return Forgotten(tuple(sorted(rows)))


@dataclass(frozen=True)
class TopK(Forget):
    """The `fraction` of the rows that helps the query split most, by the method's mean score; beside it, as a control,
    as many rows of the same labels (of the same kind, where rows have no label) at random."""

    fraction: float
    seed: int

    uses: ClassVar[str | None] = "attribute"

    def check(self, task: Task) -> None:
        sized(task, self.fraction)
        require(len(task.splits["query"]) > 0, "task.n_query", 0, "1 or more: forget=topk asks who helps the queries")

    def chosen(self, case: Case) -> Forgotten:
        helps = finite(case.attribution("query"))[0].mean(0)
        rest = np.array(may_go(case.task))
        rows = rest[np.argsort(-helps[rest], kind="stable")][: sized(case.task, self.fraction)].tolist()
        return Forgotten(tuple(sorted(rows)), self.matched(case.task, rows))

    def matched(self, task: Task, rows: Sequence[int]) -> tuple[int, ...]:
        """As many other rows of each label; fewer where there are not so many."""
        rng = np.random.default_rng(named_seed("forget matched", self.seed))
        labels, out, found = labels_of(task), set(rows), []
        for label in sorted({labels[i] for i in rows}):
            others = [i for i in may_go(task) if labels[i] == label and i not in out]
            found += rng.permutation(others).tolist()[: sum(labels[i] == label for i in rows)]
        return tuple(sorted(int(i) for i in found))


def sized(task: Task, fraction: float) -> int:
    """How many rows that is: neither none nor all."""
    n, free = len(task.train), len(may_go(task))
    size = round(fraction * n)
    if not 0 < size < n:
        what = "an empty forget set" if size <= 0 else "the whole training set"
        raise UserError("forget.fraction", fraction, f"is {what} of {n} rows", allowed="one that leaves some of both")
    require(
        size <= free, "forget.fraction", fraction, f"at most {free / n:.3g}: {n - free} rows are not for forgetting"
    )
    return size


def may_go(task: Task) -> list[int]:
    """Rows of the training set that are not of a kind that stays."""
    return [row for row, i in enumerate(task.train.ids) if i not in task.facts or task.facts[i].kind not in STAYS]


def members(task: Task) -> tuple[dict[str, list[int]], bool]:
    """Rows that may go by group, and whether the groups are classes."""
    found: dict[str, list[int]] = defaultdict(list)
    if not task.facts:
        for row, label in enumerate(labels_of(task)):
            found[label].append(row)
        return found, True
    kinds = set()
    for row in may_go(task):
        origin = task.facts[task.train.ids[row]]
        kinds.add(origin.kind)
        found[origin.group].append(row)
    return found, kinds == {"sentence"}


def labels_of(task: Task) -> list[str]:
    """Of each row: its class, or the kind of its fact."""
    targets = task.train.targets
    if targets.ndim == 1 and not targets.is_floating_point():
        return [str(label) for label in targets.tolist()]
    if task.facts:
        return [str(task.facts[i].kind) for i in task.train.ids]
    return ["row"] * len(targets)


def checked(task: Task, forgotten: Forgotten) -> Forgotten:
    """Neither empty nor everything, rows of the training set, each once."""
    rows, n = forgotten.rows, len(task.train)
    if not rows:
        raise UserError("forget", None, "leaves the forget set empty", hint="choose a larger fraction")
    if len(set(rows)) != len(rows) or not all(0 <= i < n for i in rows):
        raise ValueError("a forget set names rows of the training set, each once")
    if len(rows) == n:
        raise UserError("forget", None, "is the whole training set", hint="choose a smaller fraction")
    return forgotten
