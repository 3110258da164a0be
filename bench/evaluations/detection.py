"""Corrupted-label detection: are the flipped labels what the method calls suspicious?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bench.evaluations.base import Case, Metric, NotApplicable
from bench.evaluations.rankings import rankings
from bench.statistics import Array, average_precision, found_in_first, roc_auc, stratified_counts
from tasks.base import Task, digest
from tasks.errors import require

Statistic = Callable[[Array | None], float]  # of bootstrap counts (N,), None: each row once


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
        wrong_rows(task, "detection")

    def evaluate(self, case: Case) -> dict[str, Metric]:
        known = known_rows(case.task)
        positive = wrong_rows(case.task, "detection")[known]
        metrics: dict[str, Metric] = {}
        for name, helps, nan in rankings(case):
            metrics |= judged(detected(name, positive, -helps[known], self.inspected), positive, nan)
        metrics["base_rate"] = Metric(float(positive.mean()), np.empty(0), len(positive), {}, better=None)
        return metrics


def known_rows(task: Task) -> np.ndarray:
    """Training rows whose right label is known, (N,): all where errors were planted."""
    clean = task.annotations.clean if task.annotations else {}
    return np.array([not clean or i in clean for i in task.train.ids])


def wrong_rows(task: Task, what: str) -> np.ndarray:
    """Which training rows carry a planted error, (N,)."""
    flipped = task.annotations.flipped if task.annotations else frozenset()
    positive = np.array([i in flipped for i in task.train.ids])
    if not positive.any() or positive.all():
        raise NotApplicable(f"{what} needs labels that are known to be wrong: {plants(task)} plants them")
    return positive


def plants(task: Task) -> str:
    """The key that plants wrong labels."""
    return "task.rate=" if task.pairs else "task.corruption.rate="


def detected(name: str, positive: np.ndarray, suspicion: Array, inspected: Sequence[float]) -> dict[str, Statistic]:
    """How well a suspicion (N,) finds the positives (N,): ROC-AUC, average precision, shares found."""
    return {
        f"{name}_auc": partial(roc_auc, positive, suspicion),
        f"{name}_ap": partial(average_precision, positive, suspicion),
        **{f"{name}_found{round(100 * s)}": partial(found_in_first, positive, suspicion, s) for s in inspected},
    }


def judged(statistics: Mapping[str, Statistic], positive: np.ndarray, nan: int, **facts: Any) -> dict[str, Metric]:
    """The statistics with their replicates, of resamples that keep the number of positives; `facts`: what else decides
    the truth."""
    truth = {"flips": int(positive.sum()), **facts}
    counts = stratified_counts(positive, int(digest(truth)[:8], 16))
    return {
        name: Metric(f(None), np.array([f(c) for c in counts]), len(positive), truth, nan=nan, least=0.0)
        for name, f in statistics.items()
    }
