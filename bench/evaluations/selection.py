"""Selection: is a model better for the examples that a method calls most helpful than for as many random ones?"""

from dataclasses import asdict, dataclass

import numpy as np

from bench.evaluations.accuracy import gain, kept, need_classes, right
from bench.evaluations.base import Case, Metric
from bench.evaluations.rankings import rankings
from tasks.base import Task, named_seed
from tasks.errors import require


@dataclass(frozen=True)
class Selection:
    """For each of `shares`, `repeats` models are trained on the most helpful rows alone:

    <ranking>_select<share>_gain = test accuracy − that of models trained on as many random rows, a new draw and a new
    seed each repeat, the seed shared by both.
    """

    shares: tuple[float, ...]
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(sorted(set(self.shares))))
        require(len(self.shares) > 0, "truth.selection.shares", "[]", "one or more shares")
        for share in self.shares:
            require(0 < share < 1, "truth.selection.shares", share, "shares between 0 and 1")
        require(self.repeats >= 2, "truth.selection.repeats", self.repeats, "2 or more: their spread is the noise")

    def plan(self, task: Task, seed: int) -> None:
        """All trainings follow from rankings."""
        need_classes(task, "selection")
        n = len(task.train)
        for share in self.shares:
            require(
                0 < round(share * n) < n, "truth.selection.shares", share, f"ones that keep 1 to {n - 1} of {n} rows"
            )

    def later(self) -> int:
        """Two rankings, random rows."""
        return 3 * len(self.shares) * self.repeats

    def evaluate(self, case: Case) -> dict[str, Metric]:
        n, metrics, truth = len(case.task.train), {}, {**asdict(self), "shares": list(self.shares)}
        found = list(rankings(case))
        rng = np.random.default_rng(named_seed("selection", self.seed))
        orders = [rng.permutation(n) for _ in range(self.repeats)]
        for share in self.shares:
            size = round(share * n)

            def after(orders: list[np.ndarray], size: int = size) -> np.ndarray:
                left = kept(n, [order[size:].tolist() for order in orders], self.seed, "truth.selection")
                return right(case, "selection", left, case.task)

            random = after(orders)
            for name, helps, nan in found:
                chosen = after([np.argsort(-helps, kind="stable")] * self.repeats)
                metrics[f"{name}_select{round(100 * share)}_gain"] = gain(chosen, random, truth, nan)
        return metrics
