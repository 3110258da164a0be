"""Linear datamodeling score (Park et al. 2023, TRAK, definition 2.3; Ilyas et al. 2022)."""

from dataclasses import asdict, dataclass

import numpy as np

from bench.evaluations.base import Case, Metric, finite
from bench.statistics import bootstrap_correlation, ceiling, spearman
from tasks.base import Task, digest
from tasks.errors import UserError
from tasks.training.plan import REGIMES, Plan, planned, random_subsets


@dataclass(frozen=True)
class LDS:
    """Retrain on S random subsets, `repeats` times each; predict a query's measurement by the sum of its scores over
    the subset:  LDS = mean_q Spearman_s( Σ_{i ∈ S_s} score(q, i),  mean over repeats of m_s(q) ).

    The ceiling is what a perfect method would reach against so noisy a truth; `fixed` has no noise and no ceiling.
    """

    subsets: int
    repeats: int
    regime: str
    fraction: float
    seed: int

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise UserError("truth.lds.regime", self.regime, allowed=REGIMES)

    def plan(self, task: Task, seed: int) -> Plan:
        masks = random_subsets(len(task.train), self.subsets, self.fraction, self.seed)
        return planned(masks, self.repeats, self.regime, self.seed, seed)

    def evaluate(self, case: Case) -> dict[str, Metric]:
        scores, nan = finite(case.attribution("query"))
        plan = self.plan(case.task, case.seed)
        measured = case.retrain("lds", plan)["query"]
        runs = measured.reshape(-1, self.subsets, measured.shape[1])  # (repeats, S, Q)
        masks = plan.weights[: self.subsets].numpy()
        predicted, actual = masks @ scores.T, runs.mean(0)
        truth = {k: v for k, v in asdict(self).items() if k != "repeats" or self.regime != "fixed"}
        if self.regime == "fixed":
            truth["explained_seed"] = case.seed
        found = spearman(predicted, actual)
        undefined = int(np.isnan(found).sum())
        return {
            "lds": Metric(
                value=float(np.nan_to_num(found).mean()),
                replicates=bootstrap_correlation(predicted, actual, "spearman", _seed(truth)),
                n=len(found),
                nan=max(nan, undefined),
                truth=truth,
                ceiling=None if self.regime == "fixed" else ceiling(runs),
            )
        }


def _seed(truth: dict) -> int:
    return int(digest(truth)[:8], 16)
