"""Leave a group out, and share what that does among its members."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem
from methods.valuation.utility import Valuation, design_seed, rows_by_id
from tasks.base import Examples, Task
from tasks.errors import require
from tasks.training.plan import leave_out, partition


@dataclass(frozen=True)
class Group(Valuation):
    """score(q, i) = [v(D, q) − v(D∖G, q)] / |G|, G the group of i

    The training set is dealt out to `groups` random groups whose sizes differ by one at most: groups + 1 trainings a
    repeat instead of the N + 1 of leave-one-out, which as many groups as examples are. The scores of a group sum to its
    effect; its members have one score.
    """

    groups: int
    calibrated = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.groups >= 2, "method.groups", self.groups, "2 or more")

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        members = self._members(problem)
        n = len(problem.train)
        masks = torch.cat([torch.ones(1, n, dtype=torch.float64), leave_out(n, members, 0.0)])
        worth = self.worth(problem, masks, queries)
        scores = torch.empty(len(queries), n, dtype=torch.float64)
        for group, effect in zip(members, worth[0] - worth[1:], strict=True):
            scores[:, group] = effect[:, None] / len(group)
        return scores

    def _members(self, problem: Problem) -> list[list[int]]:
        n, rows = len(problem.train), rows_by_id(problem.train)
        require(self.groups <= n, "method.groups", self.groups, f"2 to {n}, one an example")
        return [rows[group].tolist() for group in partition(n, self.groups, design_seed(problem, "groups"))]

    def retrainings(self, task: Task) -> int:
        return self.repeats * (1 + self.groups)
