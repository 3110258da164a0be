"""The length rule: of a pair, the longer the preferred answer is against the other, the more suspicious."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Method, Problem
from tasks.base import Task
from tasks.data.preferences import length, sides


@dataclass(frozen=True)
class LengthRule(Method):
    """value(i) = −(|preferred answer| − |other answer|), in words.

    No model is asked. It finds what a bias towards long answers has taught because it is that bias, and says nothing of
    any other error: what finds such pairs should find them beyond this.
    """

    signed = False
    needs = frozenset({"texts", "labels"})

    def unmet(self, task: Task) -> str | None:
        if not task.pairs:
            return f"needs pairs of answers, which task={task.name} does not have"
        return super().unmet(task)

    def value(self, problem: Problem) -> Tensor:
        texts, chosen = problem.train.texts, problem.train.targets
        assert texts is not None
        words = torch.tensor([[length(answer) for answer in sides(text)[1:]] for text in texts])  # (N, 2)
        first_over_second = (words[:, 0] - words[:, 1]).double()
        return torch.where(chosen == 0, -first_over_second, first_over_second)
