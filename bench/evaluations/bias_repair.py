"""Repair of a bias: what is left of it after the rows that a method suspects most were relabelled, or removed?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bench.evaluations.accuracy import gain, kept
from bench.evaluations.agreement import seed_of
from bench.evaluations.base import Case, Metric, NotApplicable
from bench.evaluations.bias import need_own_test, need_traits, set_rankings, traits
from bench.evaluations.detection import wrong_rows
from bench.evaluations.repair import ACTIONS, relabelled
from bench.statistics import Array, bootstrap_parts, spearman
from tasks.base import Task, named_seed
from tasks.errors import UserError, require

RANKINGS = ("value", "less")  # the set that exposes the bias
ENOUGH = 20  # pairs of equal quality, at least


@dataclass(frozen=True)
class BiasRepair:
    """The first `share` of the training rows by suspicion (by value, and by attribution to the query set `less`) are
    relabelled, each with its right label, or removed; `repeats` models are trained on the result and asked for the
    pairs of the test split:

    more_wins     how often the answer with more of the trait has the higher reward: of pairs of equal quality where the
                  facts name ENOUGH of them; else the mean of the rate where the label prefers more and of that where it
                  prefers less, which holds the label fixed. A model that looks at quality alone has .5 (in the second
                  case, where it is right as often in both)
    correlation   rank correlation of the difference of rewards with that of traits, first answer − second
    accuracy      how often the preferred answer has the higher reward

    <ranking>_<action>_<figure>_change   figure − that after the same was done to as many random rows, a new draw and a
                                         new seed each repeat, the seed shared by both; oracle: wrong labels first
    random_<action>_<figure>, unrepaired_<figure>   what the changes are added to, and where all began
    """

    share: float
    actions: tuple[str, ...]
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "actions", tuple(self.actions))
        require(0 < self.share < 1, "truth.bias_repair.share", self.share, "0 < share < 1")
        require(self.repeats >= 2, "truth.bias_repair.repeats", self.repeats, "2 or more: their spread is the noise")
        for action in self.actions:
            if action not in ACTIONS:
                raise UserError("truth.bias_repair.actions", f"[{','.join(self.actions)}]", allowed=ACTIONS)
        require(len(self.actions) > 0, "truth.bias_repair.actions", "[]", "one or more of " + ", ".join(ACTIONS))

    def size(self, task: Task) -> int:
        n, size = len(task.train), round(self.share * len(task.train))
        require(0 < size < n, "truth.bias_repair.share", self.share, f"one that takes 1 to {n - 1} of {n} rows")
        return size

    def plan(self, task: Task, seed: int) -> None:
        """All trainings follow from rankings."""
        need_traits(task, "bias_repair")
        wrong_rows(task, "bias_repair")
        need_own_test(task, "query")
        asked_of(task)
        self.size(task)

    def later(self) -> int:
        """Two rankings of the method, one of the oracle, random rows; and nothing repaired."""
        return (len(self.actions) * 4 + 1) * self.repeats

    def evaluate(self, case: Case) -> dict[str, Metric]:
        self.plan(case.task, case.seed)
        task, size, asked = case.task, self.size(case.task), asked_of(case.task)
        rng = np.random.default_rng(named_seed("bias repair", self.seed))
        drawn = [rng.permutation(len(task.train))[:size].tolist() for _ in range(self.repeats)]
        wrong = wrong_rows(task, "bias_repair")
        oracle = np.argsort(~wrong, kind="stable")[:size]
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
            "flips": int(wrong.sum()),
            "more_wins": f"{asked.at}, {len(asked.rows)} pairs",
        }
        metrics = asked.levels("unrepaired", self._after(case, "remove", [[]] * self.repeats), truth)
        for action in self.actions:
            random = self._after(case, action, drawn)
            for name, (first, nan) in chosen.items():
                after = self._after(case, action, [first.tolist()] * self.repeats)
                metrics |= asked.changes(f"{name}_{action}", after, random, truth, nan)
            best = self._after(case, action, [oracle.tolist()] * self.repeats)
            for key, metric in asked.changes(f"oracle_{action}", best, random, truth, 0).items():
                metrics[key] = replace(metric, better=None)
            metrics |= asked.levels(f"random_{action}", random, truth)
        return metrics

    def _after(self, case: Case, action: str, rows: Sequence[list[int]]) -> Array:
        """Margins of the test pairs under the r-th model, after the action on the r-th rows, (repeats, T)."""
        n, name = len(case.task.train), "bias_repair"
        splits = {**case.task.splits, "query": case.task.splits["test"]}
        asked = replace(case.task, splits=splits)
        if action == "remove":
            plan = kept(n, list(rows), self.seed, "truth.bias_repair")
            return np.nan_to_num(case.retrain(name, plan, asked)["query"])
        everything = kept(n, [[]] * len(rows), self.seed, "truth.bias_repair")
        made: dict[tuple[int, ...], list[int]] = {}  # the repeats of one relabelling are trained together
        for repeat, chosen in enumerate(rows):
            made.setdefault(tuple(chosen), []).append(repeat)
        found = np.empty((len(rows), len(splits["test"])))
        for once, repeats in made.items():
            found[repeats] = case.retrain(name, everything.select(repeats), relabelled(asked, once))["query"]
        return np.nan_to_num(found)


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
            f"{name}_more_wins_change": gain(self.more_wins(one), self.more_wins(other), truth, nan, "lower"),
            f"{name}_correlation_change": Metric(
                means[0] - means[1], parts[0] - parts[1], one.shape[1], truth, nan=nan, better="lower"
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
