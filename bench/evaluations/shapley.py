"""Shapley values of groups of examples, from retrained coalitions, against the scores' sums."""

from dataclasses import asdict, dataclass

import numpy as np

from bench.evaluations.agreement import effects_metrics, truth_of
from bench.evaluations.base import Case, Metric, finite
from bench.statistics import Array
from tasks.base import Task
from tasks.errors import require
from tasks.training.plan import Plan, coalitions, partition, planned, rotations


@dataclass(frozen=True)
class Shapley:
    """φ(q, g) = E over orders of the players of m(q | those up to g) − m(q | those before g)
    (Shapley 1953; Ghorbani & Zou 2019), the players being random groups that the training set is dealt out to.

    Orders are all rotations of `squares` random permutations: `squares · players · (players − 1) + 1` trainings. What
    no examples are worth adds the same to every player and is put to 0: a correlation does not see it.
    """

    players: int
    squares: int
    repeats: int
    regime: str
    seed: int

    def __post_init__(self) -> None:
        require(self.squares >= 1, "truth.shapley.squares", self.squares, "1 or more")

    def members(self, task: Task) -> list[list[int]]:
        n = len(task.train)
        require(3 <= self.players <= n, "truth.shapley.players", self.players, f"3 to {n}")
        return partition(n, self.players, self.seed)

    def orders(self) -> np.ndarray:
        return rotations(self.players, self.squares, self.seed)

    def plan(self, task: Task, seed: int) -> Plan:
        masks = coalitions(self.orders(), self.members(task), len(task.train))
        return planned(masks, self.repeats, self.regime, self.seed, seed, "truth.shapley")

    def evaluate(self, case: Case) -> dict[str, Metric]:
        scores, nan = finite(case.attribution("query"))
        measured = case.retrain("shapley", self.plan(case.task, case.seed))["query"]
        orders = self.orders()
        worth = measured.reshape(-1, len(orders), self.players, measured.shape[1])  # (repeats, orders, players, Q)
        values = np.stack([shapley_values(run, orders) for run in worth])
        predicted = np.stack([scores[:, group].sum(1) for group in self.members(case.task)])
        truth = truth_of(asdict(self), case.seed)
        # A Shapley value is an average over coalitions of every size: no score is calibrated to it.
        return effects_metrics(
            "shapley", predicted, values, truth, calibrated=False, nan=nan, noisy=self.regime != "fixed"
        )


def shapley_values(worth: Array, orders: np.ndarray) -> Array:
    """Mean marginal contribution of each player, (players, Q): `worth[o, k]` (Q,) is that of the first k + 1 players of
    order o, and that of none is 0."""
    marginal = np.diff(worth, axis=1, prepend=0.0)
    players = orders.shape[1]
    return np.stack([marginal[orders == player].mean(0) for player in range(players)])
