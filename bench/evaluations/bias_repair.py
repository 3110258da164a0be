"""Repair of a bias: what is left of it after the rows that a method suspects most were relabelled, or removed?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from bench.evaluations.accuracy import gain
from bench.evaluations.agreement import seed_of
from bench.evaluations.base import Case, Metric, NotApplicable
from bench.evaluations.bias import need_own_test, need_traits, set_rankings, traits
from bench.evaluations.detection import wrong_rows
from bench.evaluations.repair import Repairing
from bench.statistics import Array, bootstrap_parts, spearman
from tasks.base import Task
from tasks.training.plan import Plan

RANKINGS = ("value", "less")  # the set that exposes the bias
ENOUGH = 20  # pairs of equal quality, at least


@dataclass(frozen=True)
class BiasRepair(Repairing):
    """Rankings by value, and by attribution to the query set `less`; the models are asked for the test pairs:

    more_wins     how often the answer with more of the trait has the higher reward: of pairs of equal quality where the
                  facts name ENOUGH of them; else the mean of the rate where the label prefers more and of that where it
                  prefers less, which holds the label fixed. A model that looks at quality alone has .5 (in the second
                  case, where it is right as often in both)
    correlation   rank correlation of the difference of rewards with that of traits, first answer − second
    accuracy      how often the preferred answer has the higher reward

    <ranking>_<action>_<figure>_change   figure − that after the same was done to as many random rows, a new draw and a
                                         new seed each repeat, the seed shared by both; oracle: wrong labels first
    random_<action>_<figure>, unrepaired_<figure>   what the changes are added to, and where all began

    Changes of the bias are not ranked: a repair may overshoot, and what is right is where the oracle's ends.
    """

    name: ClassVar[str] = "bias_repair"

    def plan(self, task: Task, seed: int) -> None:
        """All trainings follow from rankings."""
        need_traits(task, self.name)
        wrong_rows(task, self.name)
        need_own_test(task, "query")
        asked_of(task)
        self.size(task)

    def later(self) -> int:
        """Two rankings of the method, one of the oracle, random rows; and nothing repaired."""
        return (len(self.actions) * 4 + 1) * self.repeats

    def evaluate(self, case: Case) -> dict[str, Metric]:
        self.plan(case.task, case.seed)
        task, size, drawn, asked = case.task, self.size(case.task), self.drawn(case.task), asked_of(case.task)
        chosen = {
            name: (np.argsort(helps, kind="stable")[:size], nan)
            for name, helps, nan, _ in set_rankings(case, "margin")
            if name in RANKINGS
        }
        if not chosen:
            raise NotApplicable("no query prefers the answer with less of the trait")
        truth = {
            **asdict(self),
            "actions": list(self.actions),
            "flips": int(wrong_rows(task, self.name).sum()),
            "more_wins": f"{asked.at}, {len(asked.rows)} pairs",
        }

        def after(action: str, rows: Sequence[list[int]]) -> Array:
            return self.after(case, action, rows, partial(margins, case))

        metrics = asked.levels("unrepaired", after("remove", [[]] * self.repeats), truth)
        for action in self.actions:
            random = after(action, drawn)
            for name, (first, nan) in chosen.items():
                repaired = after(action, [first.tolist()] * self.repeats)
                metrics |= asked.changes(f"{name}_{action}", repaired, random, truth, nan)
            best = after(action, [self.oracle(task)] * self.repeats)
            for key, metric in asked.changes(f"oracle_{action}", best, random, truth, 0).items():
                metrics[key] = replace(metric, better=None)
            metrics |= asked.levels(f"random_{action}", random, truth)
        return metrics


def margins(case: Case, plan: Plan, task: Task) -> Array:
    """Of the test pairs after each training of the plan, (M, T)."""
    asked = replace(task, splits={**task.splits, "query": task.splits["test"]})
    return np.nan_to_num(case.retrain("bias_repair", plan, asked)["query"])


@dataclass(frozen=True)
class Asked:
    """The test pairs: `trait` (T,) first − second, `label` (T,) +1 where the first is preferred, else −1; `rows` whose
    winner is looked at, `weights` of these, of mean 1; `at`: what is held fixed there."""

    trait: Array
    label: Array
    rows: np.ndarray
    weights: Array
    at: str

    def more_wins(self, margins: Array) -> Array:
        """Weighted: the mean is the rate. (R, rows)."""
        reward = margins * self.label
        return (1 + np.sign(reward * self.trait))[:, self.rows] / 2 * self.weights

    def correlations(self, margins: Array) -> tuple[Array, Array]:
        """Differences of traits and of rewards, (T, R) each."""
        reward = (margins * self.label).T
        return np.repeat(self.trait[:, None], reward.shape[1], 1), reward

    def levels(self, name: str, margins: Array, truth: dict[str, Any]) -> dict[str, Metric]:
        figures: dict[str, Array] = {
            "more_wins": self.more_wins(margins),
            "correlation": np.nan_to_num(spearman(*self.correlations(margins))),
            "accuracy": (margins > 0).astype(float),
        }
        return {
            f"{name}_{key}": Metric(float(np.mean(values)), np.empty(0), margins.shape[1], truth, better=None)
            for key, values in figures.items()
        }

    def changes(self, name: str, one: Array, other: Array, truth: dict[str, Any], nan: int) -> dict[str, Metric]:
        """Figures of `one` − those of `other`, margins (R, T), which share a repeat's seed."""
        sides = [self.correlations(margins) for margins in (one, other)]
        means = [float(np.nan_to_num(spearman(*side)).mean()) for side in sides]
        parts = [bootstrap_parts(*side, "spearman", seed_of(truth)) for side in sides]
        return {
            f"{name}_more_wins_change": gain(self.more_wins(one), self.more_wins(other), truth, nan, None),
            f"{name}_correlation_change": Metric(
                means[0] - means[1], parts[0] - parts[1], one.shape[1], truth, nan=nan, better=None
            ),
            f"{name}_accuracy_change": gain((one > 0).astype(float), (other > 0).astype(float), truth, nan),
        }


def asked_of(task: Task) -> Asked:
    """The test pairs, and which of them tell who wins at equal quality."""
    test = task.splits["test"]
    first, second = traits(task, test).T
    trait, label = first - second, np.where(test.targets.numpy() == 0, 1.0, -1.0)
    qualities = [task.facts[i].quality for i in test.ids]
    equal = np.array([quality is not None and quality[0] == quality[1] for quality in qualities])
    rows = np.flatnonzero(equal & (trait != 0))
    if len(rows) >= ENOUGH:
        return Asked(trait, label, rows, np.ones(len(rows)), "equal quality")
    rows = np.flatnonzero(trait != 0)
    more = (trait * label)[rows] > 0
    if not more.any() or more.all():
        raise NotApplicable("bias_repair needs test pairs whose label prefers more of the trait, and ones with less")
    weights = np.where(more, len(rows) / (2 * more.sum()), len(rows) / (2 * (~more).sum()))
    return Asked(trait, label, rows, weights, "fixed label")
