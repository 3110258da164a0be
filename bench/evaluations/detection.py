"""Corrupted-label detection: are the flipped labels what the method calls suspicious?"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.evaluations.base import Case, Metric, NotApplicable
from bench.evaluations.rankings import rankings
from bench.statistics import Array, average_precision, found_in_first, roc_auc, stratified_counts
from tasks.base import Task, digest
from tasks.errors import require


@dataclass(frozen=True)
class Detection:
    """Two rankings, never mixed: by `value` (self-influence, loss …), and by the mean attribution to the clean `val`
    split; lowest first. ROC-AUC and average precision with ties together, the share of flips among the first
    `inspected` shares of all rows, and the base rate that average precision has by chance. Rows whose right label
    nobody knows do not count."""

    inspected: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "inspected", tuple(self.inspected))
        for share in self.inspected:
            require(0 < share < 1, "truth.detection.inspected", share, "shares between 0 and 1")

    def plan(self, task: Task, seed: int) -> None:
        """Nothing to retrain; but some labels must be known to be wrong."""
        self.wrong(task)

    def known(self, task: Task) -> np.ndarray:
        """Training rows whose right label is known, (N,): all where errors were planted."""
        clean = task.annotations.clean if task.annotations else {}
        return np.array([not clean or i in clean for i in task.train.ids])

    def wrong(self, task: Task) -> np.ndarray:
        """Which training rows carry a planted error, (N,)."""
        flipped = task.annotations.flipped if task.annotations else frozenset()
        positive = np.array([i in flipped for i in task.train.ids])
        if not positive.any() or positive.all():
            raise NotApplicable("detection needs labels that are known to be wrong: task.corruption.rate= plants them")
        return positive

    def evaluate(self, case: Case) -> dict[str, Metric]:
        known = self.known(case.task)
        positive = self.wrong(case.task)[known]
        metrics: dict[str, Metric] = {}
        for name, helps, nan in rankings(case):
            metrics |= self._metrics(name, positive, -helps[known], nan)
        metrics["base_rate"] = Metric(float(positive.mean()), np.empty(0), len(positive), {}, better=None)
        return metrics

    def _metrics(self, name: str, positive: np.ndarray, suspicion: Array, nan: int) -> dict[str, Metric]:
        truth = {"flips": int(positive.sum())}
        counts = stratified_counts(positive, int(digest(truth)[:8], 16))
        statistics: dict[str, Callable[[Array | None], float]] = {
            f"{name}_auc": lambda c: roc_auc(positive, suspicion, c),
            f"{name}_ap": lambda c: average_precision(positive, suspicion, c),
        }
        for share in self.inspected:
            statistics[f"{name}_found{round(100 * share)}"] = lambda c, s=share: found_in_first(
                positive, suspicion, s, c
            )  # type: ignore[misc]
        return {
            key: Metric(f(None), np.array([f(c) for c in counts]), len(positive), truth, nan=nan)
            for key, f in statistics.items()
        }
