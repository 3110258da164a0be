"""Guidance of labellers: does a method tell who labels well, and is a model better for listening to them?"""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from bench.evaluations.accuracy import gain, kept, need_classes, right
from bench.evaluations.agreement import seed_of
from bench.evaluations.base import Case, Metric, NotApplicable
from bench.evaluations.bias import need_own_test
from bench.evaluations.rankings import rankings
from bench.statistics import Array, bootstrap_parts, spearman
from tasks.base import Task, named_seed
from tasks.errors import require
from tasks.training.plan import Plan

FEWEST = 3  # two are always in one order or the other


@dataclass(frozen=True)
class Labellers:
    """The score of a labeller is the mean over the rows that he labelled of their mean attribution to the clean `val`
    split, an expert's labels (and, as a ranking of its own, of their value). His skill is the share of his labels that
    are right.

    <ranking>_skill_spearman   rank correlation of scores with skills, over labellers, who are resampled
    attribution_weighted_gain  test accuracy of `repeats` models whose rows are weighted by their labeller's score, as
                               far as it is above 0 (who harms the expert's answers on average is left out), scaled to
                               mean 1 − accuracy at equal weights, seed by seed
    oracle_weighted_gain       the same by the log-odds of the skill, the best weights of a vote of independent voters
                               (Nitzan & Paroush 1982); of (right + 1)/(labels + 2), lest one be infinite
    shuffled_weighted_gain     the scores' weights dealt out to the labellers in random order, anew each repeat: what
                               uneven weights do, whoever has them
    equal_accuracy             what the gains are added to

    Weights keep the order of the scores, ties at 0 aside. Where no score is above 0, all weights are 1.
    """

    repeats: int
    seed: int

    def __post_init__(self) -> None:
        require(self.repeats >= 2, "truth.labellers.repeats", self.repeats, "2 or more: their spread is the noise")

    def plan(self, task: Task, seed: int) -> None:
        """All trainings follow from scores."""
        need_classes(task, "labellers")
        skills(task)
        need_own_test(task, "val")

    def later(self) -> int:
        """Weights of the method, the same shuffled, those of the oracle, equal ones."""
        return 4 * self.repeats

    def evaluate(self, case: Case) -> dict[str, Metric]:
        task = case.task
        of_row, right_labels, labels = skills(task)
        skill, truth = right_labels / labels, {**asdict(self), "labellers": len(labels)}
        metrics, weights = {}, None
        for name, helps, nan in rankings(case):
            scores = np.bincount(of_row, helps) / labels
            x, y = scores[:, None], skill[:, None]
            metrics[f"{name}_skill_spearman"] = Metric(
                value=float(np.nan_to_num(spearman(x, y)[0])),
                replicates=bootstrap_parts(x, y, "spearman", seed_of(truth)),
                n=len(labels),
                truth=truth,
                nan=nan,
            )
            if name == "attribution":
                weights = scores
        equal = self._accuracy(case, [np.ones(len(labels))] * self.repeats, of_row)
        if weights is not None:
            by_score = self._accuracy(case, [weights] * self.repeats, of_row)
            metrics["attribution_weighted_gain"] = gain(by_score, equal, truth)
            rng = np.random.default_rng(named_seed("labellers", self.seed))
            shuffled = self._accuracy(case, [rng.permutation(weights) for _ in range(self.repeats)], of_row)
            metrics["shuffled_weighted_gain"] = gain(shuffled, equal, truth, better=None)
        odds = np.log((right_labels + 1) / (labels - right_labels + 1))
        best = self._accuracy(case, [odds] * self.repeats, of_row)
        metrics["oracle_weighted_gain"] = gain(best, equal, truth, better=None)
        metrics["equal_accuracy"] = Metric(float(equal.mean()), np.empty(0), equal.size, truth, better=None)
        return metrics

    def _accuracy(self, case: Case, scores: list[Array], of_row: np.ndarray) -> Array:
        """1 where a test row is answered rightly by the r-th model, weighted by the r-th scores of labellers,
        (repeats, T)."""
        seeds = kept(len(of_row), [[]] * len(scores), self.seed, "truth.labellers").seeds
        weights = torch.as_tensor(np.stack([row_weights(s, of_row) for s in scores]))
        return right(case, "labellers", Plan(weights, seeds, own_batches=True), case.task)


def skills(task: Task) -> tuple[np.ndarray, Array, Array]:
    """The labeller of each training row (N,), counted from 0 in the order of their names; and how many labels of each
    are right, and how many there are, (L,)."""
    names = [getattr(task.facts.get(i), "labeller", None) for i in task.train.ids]
    if any(name is None for name in names):
        raise NotApplicable("labellers needs rows whose labeller is known: task=rlhf task.labellers= makes them")
    found, of_row = np.unique(np.array(names, dtype=str), return_inverse=True)
    if len(found) < FEWEST:
        raise NotApplicable(f"labellers needs {FEWEST} labellers or more, not {len(found)}")
    flipped = task.annotations.flipped if task.annotations else frozenset()
    correct = np.array([i not in flipped for i in task.train.ids], dtype=float)
    return of_row, np.bincount(of_row, correct).astype(float), np.bincount(of_row).astype(float)


def row_weights(scores: Array, of_row: np.ndarray) -> Array:
    """Of each row, (N,): its labeller's score where that is above 0, else 0, scaled so that the mean of the rows that
    are left, which fill the batches, is 1. All 1 where no score is above 0."""
    weights = np.maximum(scores, 0)[of_row]
    if not weights.any():
        return np.ones(len(of_row))
    return weights / weights[weights > 0].mean()
