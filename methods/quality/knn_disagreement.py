"""Disagreement with the neighbours: what lies among rows of another label."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem
from methods.representation import Representation, neighbours
from tasks.base import Task
from tasks.errors import require


@dataclass(frozen=True)
class KNNDisagreement(Representation):
    """value(i) = −(share of the k nearest other training rows whose label is not y_i)

    By distance of features; Wilson (1972) edits out rows whose neighbours outvote their label. Equally near rows go by
    their ids. There are k + 1 different values: ties are expected.
    """

    k: int
    needs = frozenset({"labels"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.k >= 1, "method.k", self.k, "1 or more")

    def unmet(self, task: Task) -> str | None:
        others = len(task.train) - 1
        require(self.k <= others, "method.k", self.k, f"1 to {others}, the other training rows")
        return super().unmet(task)

    def value(self, problem: Problem) -> Tensor:
        h, labels = self.of_train(problem), problem.train.targets
        near = neighbours(h, h, problem.train.ids, self.k, own=torch.arange(len(h)))
        return -(labels[near] != labels[:, None]).double().mean(1)
