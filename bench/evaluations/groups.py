"""Leave-group-out: what the scores of a group add up to, against what its removal does."""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from bench.evaluations.agreement import effects_metrics, truth_of
from bench.evaluations.base import Case, Metric, NotApplicable, finite
from tasks.base import Task
from tasks.errors import UserError, require
from tasks.training.plan import Plan, class_groups, leave_out, planned, random_groups

KINDS = ("random", "class")


@dataclass(frozen=True)
class LeaveGroupOut:
    """effect(q, g) = m(q) with everything − m(q) without the `size` examples of group g, against Σ_{i in g} score(q, i)
    (Koh et al. 2019, On the accuracy of influence functions for measuring group effects).

    `kind`: random groups, or groups of one class, whose effects are larger and less additive.
    """

    kind: str
    groups: int
    size: int
    repeats: int
    regime: str
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError("truth.lgo.kind", self.kind, allowed=KINDS)
        require(self.groups >= 3, "truth.lgo.groups", self.groups, "3 or more (a correlation over fewer says nothing)")

    def members(self, task: Task) -> list[list[int]]:
        n, labels = len(task.train), task.train.targets
        if self.kind == "class":
            if labels.is_floating_point():
                raise NotApplicable("truth.lgo.kind=class needs classes")
            most = int(torch.bincount(labels)[labels.unique()].min())
            require(1 <= self.size <= most, "truth.lgo.size", self.size, f"1 to {most}, the smallest class")
            return class_groups(labels, self.groups, self.size, self.seed)
        require(1 <= self.size < n, "truth.lgo.size", self.size, f"1 to {n - 1}")
        return random_groups(n, self.groups, self.size, self.seed)

    def plan(self, task: Task, seed: int) -> Plan:
        """The first row of each repeat trains on everything."""
        n = len(task.train)
        everything = torch.ones(1, n, dtype=torch.float64)
        weights = torch.cat([everything, leave_out(n, self.members(task), 0.0)])
        return planned(weights, self.repeats, self.regime, self.seed, seed, "truth.lgo")

    def evaluate(self, case: Case) -> dict[str, Metric]:
        scores, nan = finite(case.attribution("query"))
        members = self.members(case.task)
        measured = case.retrain("lgo", self.plan(case.task, case.seed))["query"]
        runs = measured.reshape(-1, 1 + len(members), measured.shape[1])
        predicted = np.stack([scores[:, group].sum(1) for group in members])  # (groups, Q)
        truth = truth_of(asdict(self), case.seed)
        return effects_metrics(
            "lgo",
            predicted,
            runs[:, :1] - runs[:, 1:],
            truth,
            calibrated=case.calibrated,
            nan=nan,
            noisy=self.regime != "fixed",
        )
