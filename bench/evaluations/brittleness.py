"""Brittleness: how few removals flip a prediction (Ilyas et al. 2022, §4.1, data supports)?"""

from dataclasses import asdict, dataclass

import numpy as np

from bench.evaluations.accuracy import need_classes, predictions
from bench.evaluations.agreement import seed_of
from bench.evaluations.base import Case, Metric, NotApplicable, finite
from bench.statistics import bootstrap_queries
from tasks.base import Task, named_seed
from tasks.errors import require
from tasks.training.plan import Plan, leave_out, planned


@dataclass(frozen=True)
class Brittleness:
    """Of up to `queries` queries that models trained on everything answer rightly, the share whose answer most of
    `repeats` models no longer give without the `share` of the training rows that help the query most:

    flipped<share>   for each of `shares`, in percent of the training set
    support          mean over queries of the smallest of these shares that flips it, 1 where none does: lower is better
    """

    queries: int
    shares: tuple[float, ...]
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(sorted(set(self.shares))))
        require(len(self.shares) > 0, "truth.brittleness.shares", "[]", "one or more shares")
        for share in self.shares:
            require(0 < share < 1, "truth.brittleness.shares", share, "shares between 0 and 1")
        require(self.queries >= 1, "truth.brittleness.queries", self.queries, "1 or more")

    def sizes(self, n: int) -> list[int]:
        sizes = [round(share * n) for share in self.shares]
        allowed = f"shares that remove 1 to {n - 1} of {n} rows"
        require(sizes[0] > 0 and sizes[-1] < n, "truth.brittleness.shares", list(self.shares), allowed)
        return sizes

    def plan(self, task: Task, seed: int) -> Plan:
        """The models that are trained on everything: which queries they answer rightly."""
        need_classes(task, "brittleness")
        self.sizes(len(task.train))
        return self._planned(task, [[]], seed)

    def later(self) -> int:
        return self.queries * len(self.shares) * self.repeats

    def _planned(self, task: Task, groups: list[list[int]], seed: int) -> Plan:
        weights = leave_out(len(task.train), groups, 0.0)
        return planned(weights, self.repeats, "common", self.seed, seed, "truth.brittleness")

    def evaluate(self, case: Case) -> dict[str, Metric]:
        scores, nan = finite(case.attribution("query"))
        queries, sizes = case.task.splits["query"], self.sizes(len(case.task.train))
        targets = queries.targets.numpy()
        before = predictions(case, "brittleness", self.plan(case.task, case.seed), queries, case.task)
        order = np.random.default_rng(named_seed("brittleness", self.seed)).permutation(len(queries))
        rows = [q for q in order if _mostly(before[:, q] == targets[q])][: self.queries]
        if not rows:
            raise NotApplicable("brittleness: the models answer no query rightly")
        best = np.argsort(-scores[rows], axis=1, kind="stable")
        groups = [best[q, :size].tolist() for size in sizes for q in range(len(rows))]
        after = predictions(
            case, "brittleness", self._planned(case.task, groups, case.seed), queries.select(rows), case.task
        ).reshape(self.repeats, len(sizes), len(rows), len(rows))
        own = after[:, :, np.arange(len(rows)), np.arange(len(rows))]  # (repeats, sizes, queries)
        flipped = (own != targets[rows]).mean(0) > 0.5
        support = np.where(flipped.any(0), np.array(self.shares)[flipped.argmax(0)], 1.0)
        truth = {**asdict(self), "shares": list(self.shares)}

        def metric(values: np.ndarray, better: str) -> Metric:
            values = values.astype(float)
            replicates = bootstrap_queries(values, seed_of(truth))
            return Metric(float(values.mean()), replicates, len(values), truth, nan=nan, better=better)

        shares = {f"flipped{100 * share:g}": metric(f, "higher") for share, f in zip(self.shares, flipped, strict=True)}
        return shares | {"support": metric(support, "lower")}


def _mostly(answers: np.ndarray) -> bool:
    return bool(answers.mean() > 0.5)
