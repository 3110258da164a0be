"""Removal: is the model worse on a query without the examples that a method calls its best helpers?"""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from bench.evaluations.agreement import seed_of, truth_of
from bench.evaluations.base import Case, Metric, finite
from bench.statistics import Array, bootstrap_queries, removal_area
from tasks.base import Task, named_seed
from tasks.errors import require
from tasks.training.plan import Plan, leave_out, planned

QLD = 0.01  # the share that the query loss difference removes


@dataclass(frozen=True)
class Removal:
    """For each of `queries` queries, retrain without the examples of highest score, `shares` of all at a time, and
    without as many random ones (`controls` draws, shared by all queries and methods):

    effect(k)      = mean over controls of m(q | random k removed) − m(q | top k removed)
    removal_area   mean height of the effect over the shares, from 0 at none (trapezoids), in units of the measurement
    qld            query loss difference: loss without the top 1 % − loss without a random 1 %, in nats
    removal_noise, qld_noise   standard deviation of the same figure when one control takes the method's place
    """

    queries: int
    shares: tuple[float, ...]
    controls: int
    repeats: int
    regime: str
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(sorted(set(self.shares))))
        require(len(self.shares) > 0, "truth.removal.shares", [], "one or more shares")
        for share in self.shares:
            require(0 < share < 1, "truth.removal.shares", share, "shares between 0 and 1")
        require(self.controls >= 2, "truth.removal.controls", self.controls, "2 or more: their spread is the noise")
        require(self.queries >= 1, "truth.removal.queries", self.queries, "1 or more")

    def sizes(self, n: int) -> list[int]:
        sizes = [round(share * n) for share in self.shares]
        require(
            sizes[0] > 0 and sizes[-1] < n,
            "truth.removal.shares",
            list(self.shares),
            f"shares that remove 1 to {n - 1}",
        )
        return sizes

    def asked(self, task: Task) -> list[int]:
        """Rows of the query split."""
        total = len(task.splits["query"])
        require(self.queries <= total, "truth.removal.queries", self.queries, f"1 to {total}")
        rng = np.random.default_rng(named_seed("removal queries", self.seed))
        return sorted(rng.permutation(total)[: self.queries].tolist())

    def plan(self, task: Task, seed: int) -> Plan:
        """The random controls, size by size; what a method removes is known when it has spoken."""
        self.asked(task)
        n = len(task.train)
        rng = np.random.default_rng(named_seed("removal controls", self.seed))
        groups = [rng.permutation(n)[:size].tolist() for size in self.sizes(n) for _ in range(self.controls)]
        return self._planned(task, groups, seed)

    def later(self) -> int:
        """Retrainings that are known when a method has spoken."""
        return self.queries * len(self.shares) * (1 if self.regime == "fixed" else self.repeats)

    def _planned(self, task: Task, groups: list[list[int]], seed: int) -> Plan:
        weights = leave_out(len(task.train), groups, 0.0)
        return planned(weights, self.repeats, self.regime, self.seed, seed, "truth.removal")

    def evaluate(self, case: Case) -> dict[str, Metric]:
        scores, nan = finite(case.attribution("query"))
        rows, sizes = self.asked(case.task), self.sizes(len(case.task.train))
        best = np.argsort(-scores[rows], axis=1, kind="stable")
        groups = [best[q, :size].tolist() for size in sizes for q in range(len(rows))]
        removed = case.retrain("removal", self._planned(case.task, groups, case.seed))["query"]
        removed = removed.reshape(-1, len(sizes), len(rows), removed.shape[1])
        own = np.stack([removed[:, :, k, row] for k, row in enumerate(rows)], axis=2)  # (repeats, sizes, queries)
        control = case.retrain("removal", self.plan(case.task, case.seed))["query"]
        control = control.reshape(-1, len(sizes), self.controls, control.shape[1])[..., rows]

        truth = truth_of(asdict(self), case.seed)
        shares = np.array(self.shares)
        metrics = self._metrics("removal_area", truth, nan, own, control, lambda m: -removal_area(shares, m))
        if QLD in self.shares:
            at = self.shares.index(QLD)
            loss = lambda m: case.task.objective.loss_of_measurement(torch.as_tensor(m)).numpy()  # noqa: E731
            metrics |= self._metrics("qld", truth, nan, loss(own), loss(control), lambda e: e[at])
        return metrics

    def _metrics(
        self, name: str, truth: dict, nan: int, own: Array, control: Array, figure: object
    ) -> dict[str, Metric]:
        """`own` (R, K, Q) and `control` (R, K, C, Q) measured; `figure` (K, Q) -> (Q,), higher where more was lost."""
        assert callable(figure)
        mean = control.mean((0, 2))  # (K, Q)
        found = figure(own.mean(0) - mean)
        others = (control.sum(2, keepdims=True) - control) / (self.controls - 1)
        alone = [float(np.mean(figure((control - others)[:, :, c].mean(0)))) for c in range(self.controls)]
        noise = name.removesuffix("_area") + "_noise"
        return {
            name: Metric(
                value=float(found.mean()),
                replicates=bootstrap_queries(found, seed_of(truth)),
                n=len(found),
                truth=truth,
                nan=nan,
                by_query={"value": found},
                most=np.inf,
            ),
            noise: Metric(float(np.std(alone)), np.empty(0), self.controls, truth, better=None),  # of mean 0
        }
