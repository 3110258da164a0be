"""Proximal Bregman response: the truth that curvature methods are meant to approximate, gated on its convergence."""

import hashlib
import time
from dataclasses import asdict, dataclass

import numpy as np

from bench.evaluations.agreement import effects_metrics
from bench.evaluations.base import Case, Metric, NotApplicable, Unfit, finite
from bench.statistics import pearson
from tasks.base import Task
from tasks.errors import require
from tasks.training.plan import stratified_sample
from tasks.training.proximal import proximal_response
from tasks.training.retrain import store_of
from tasks.training.vectorised import stackable

LARGEST = 12_000  # parameters of a dense factor: 1.1 GiB
CONVERGED = 1e-3  # gradient norm, of that at the explained model
STRAY = 0.1  # share of the sample that may fail to converge (at a kink of a ReLU network no gradient vanishes)
FAITHFUL = 0.95  # least correlation with the exact Gauss–Newton prediction


@dataclass(frozen=True)
class PBRF:
    """Correlation over a sample of training examples, mean over queries, of scores and responses at damping λ
    (`tasks.training.proximal`). The truth is unfit, and nothing is judged by it, unless 90 % of the optimisations
    converged and the exact Gauss–Newton prediction correlates above .95 with them; the others are left out and counted.

    The truth has its own λ: a method's `method.damping` is its own choice.
    """

    sample: int | None
    damping: float
    seed: int

    def __post_init__(self) -> None:
        require(self.damping > 0, "truth.pbrf.damping", self.damping, "above 0")

    def plan(self, task: Task, seed: int) -> None:
        """No retraining from the start."""
        size = sum(p.numel() for p in task.initial(0).parameters())
        if not stackable(task) or size > LARGEST:
            raise NotApplicable(
                f"pbrf needs vectors, no dropout and at most {LARGEST} parameters; model={task.model} has {size}"
            )
        stratified_sample(task.train.targets, self.sample, self.seed, "truth.pbrf.sample")

    def evaluate(self, case: Case) -> dict[str, Metric]:
        scores, nan = finite(case.attribution("query"))
        rows = stratified_sample(case.task.train.targets, self.sample, self.seed, "truth.pbrf.sample")
        truth = {**asdict(self), "explained_seed": case.seed}
        found = self.responses(case, rows)
        good = found["gradient"] <= CONVERGED
        strays = int((~good).sum())
        response, linear = found["response"][good], found["linear"][good]
        faithful = float(np.nan_to_num(pearson(linear, response)).mean()) if good.sum() > 2 else 0.0
        if strays > STRAY * len(rows) or not faithful > FAITHFUL:
            raise Unfit(
                f"the proximal Bregman response at truth.pbrf.damping={self.damping} is no truth: {strays} of "
                f"{len(rows)} optimisations did not converge (allowed {STRAY:.0%}), the exact Gauss-Newton correlates "
                f"{faithful:.3f} with it (needed {FAITHFUL}); raise truth.pbrf.damping"
            )
        metrics = effects_metrics(
            "pbrf",
            scores[:, np.array(rows)[good]].T,
            response[None],
            truth,
            calibrated=case.calibrated,
            nan=nan,
            noisy=False,
        )
        gate = Metric(faithful, np.empty(0), len(response), truth, nan=strays, better=None)
        return {**metrics, "pbrf_exact_ggn": gate}

    def responses(self, case: Case, rows: list[int]) -> dict[str, np.ndarray]:
        """(n, Q) and (n,), from the store or made now; they belong to the explained seed."""
        base = store_of(case.task.public(), case.store, case.shipped)
        store = type(base)(base.folder.with_name(f"pbrf-{base.folder.name}"), None, base.about)
        name = f"pbrf {case.trajectory.seed} {self.damping!r}"
        keys = [hashlib.sha256(f"{name} {row}".encode()).hexdigest() for row in rows]
        while missing := [key for key in keys if key not in store.read()]:
            with store.builder() as builder:
                mine = builder.claim(missing, len(missing))
                if not mine:
                    time.sleep(0.5)  # another is at it
                    continue
                found = proximal_response(
                    case.task.public(), case.trajectory.final, [rows[keys.index(key)] for key in mine], self.damping
                )
                store.add(mine, {name: value.numpy() for name, value in vars(found).items()}, {"engine": "proximal"})
        done = store.read()
        return {name: np.stack([done[key][name] for key in keys]) for name in ("response", "linear", "gradient")}
