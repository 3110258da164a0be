"""Leave-one-out: what a single example's score says, against what its removal does."""

from dataclasses import asdict, dataclass

import torch

from bench.evaluations.agreement import effects_metrics, truth_of
from bench.evaluations.base import Case, Metric, finite
from tasks.base import Task
from tasks.errors import UserError
from tasks.training.plan import REGIMES, Plan, leave_one_out, planned, stratified_sample


@dataclass(frozen=True)
class LOO:
    """effect(q, i) = [m(q) with i − m(q) with i's loss times `weight`] / (1 − weight), over all i or a sample.

    Mean over queries of the correlation over i of scores and effects; for calibrated methods also the slope of effects
    on scores, which is 1 for a small change of weight, and above 1 for removal (leverage), and its intercept.
    """

    sample: int | None
    weight: float
    repeats: int
    regime: str
    seed: int

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise UserError("truth.loo.regime", self.regime, allowed=REGIMES)

    def rows(self, task: Task) -> list[int]:
        return stratified_sample(task.train.targets, self.sample, self.seed)

    def plan(self, task: Task, seed: int) -> Plan:
        """The first row of each repeat trains on everything: the same engine gives both sides of a difference."""
        n = len(task.train)
        everything = torch.ones(1, n, dtype=torch.float64)
        weights = torch.cat([everything, leave_one_out(n, self.rows(task), self.weight)])
        return planned(weights, self.repeats, self.regime, self.seed, seed, "truth.loo")

    def evaluate(self, case: Case) -> dict[str, Metric]:
        scores, nan = finite(case.attribution("query"))
        rows = self.rows(case.task)
        measured = case.retrain("loo", self.plan(case.task, case.seed))["query"]
        runs = measured.reshape(-1, 1 + len(rows), measured.shape[1])
        effects = (runs[:, :1] - runs[:, 1:]) / (1 - self.weight)  # (repeats, n, Q)
        truth = truth_of(asdict(self), case.seed)
        return effects_metrics(
            "loo",
            scores[:, rows].T,
            effects,
            truth,
            calibrated=case.calibrated,
            nan=nan,
            noisy=self.regime != "fixed",
        )
