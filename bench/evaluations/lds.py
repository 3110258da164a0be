"""Linear datamodeling score (Park et al. 2023, TRAK, definition 2.3; Ilyas et al. 2022)."""

from dataclasses import asdict, dataclass

from torch import Tensor

from bench.evaluations.agreement import CORRELATIONS, correlated, truth_of
from bench.evaluations.base import Case, Metric, finite
from tasks.base import Task
from tasks.errors import UserError, require
from tasks.training.plan import REGIMES, Plan, planned, random_subsets


@dataclass(frozen=True)
class LDS:
    """Retrain on S random subsets, `repeats` times each; predict a query's measurement by the sum of its scores over
    the subset:  LDS = mean_q Spearman_s( Σ_{i ∈ S_s} score(q, i),  mean over repeats of m_s(q) ).

    `weight` is what the losses of the examples outside the subset are multiplied with: 0 removes them, near 1 is a
    perturbation, and the sum goes over all examples by their weights. `lds_pearson` and `lds_kendall` (τ-b) are the
    same with another correlation. The ceiling is what a perfect method would reach against so noisy a truth; `fixed`
    has no noise and no ceiling. `val` adds `lds_val`, the same of the validation split: hyper-parameters may be tuned
    by it, queries are for the final word.
    """

    subsets: int
    repeats: int
    regime: str
    fraction: float
    seed: int
    weight: float = 0.0
    correlations: tuple[str, ...] = ("spearman",)
    val: bool = False

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise UserError("truth.lds.regime", self.regime, allowed=REGIMES)
        require(0 <= self.weight < 1, "truth.lds.weight", self.weight, "0 <= weight < 1; 0 removes")
        object.__setattr__(self, "correlations", tuple(self.correlations))
        for name in self.correlations or ("",):
            if name not in CORRELATIONS:
                raise UserError("truth.lds.correlations", f"[{','.join(self.correlations)}]", allowed=CORRELATIONS)

    def weights(self, task: Task) -> Tensor:
        """(S, N): 1 inside a subset, `weight` outside."""
        masks = random_subsets(len(task.train), self.subsets, self.fraction, self.seed)
        return masks + self.weight * (1 - masks)

    def plan(self, task: Task, seed: int) -> Plan:
        return planned(self.weights(task), self.repeats, self.regime, self.seed, seed, "truth.lds")

    def evaluate(self, case: Case) -> dict[str, Metric]:
        measured = case.retrain("lds", self.plan(case.task, case.seed))
        weights = self.weights(case.task).numpy()
        said = {k: v for k, v in asdict(self).items() if k not in ("correlations", "val") and (k != "weight" or v)}
        truth = truth_of(said, case.seed)

        def agreement(split: str, correlation: str) -> Metric:
            scores, nan = finite(case.attribution(split))
            runs = measured[split].reshape(-1, self.subsets, measured[split].shape[1])  # (repeats, S, Q)
            return correlated(weights @ scores.T, runs, correlation, truth, nan, noisy=self.regime != "fixed")

        found = {"lds" if c == "spearman" else f"lds_{c}": agreement("query", c) for c in self.correlations}
        return found | ({"lds_val": agreement("val", "spearman")} if self.val else {})
