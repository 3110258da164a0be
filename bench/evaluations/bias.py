"""Bias of preferences: who taught the model to prefer the answer with more of a trait (longer, more agreeable)?"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.evaluations.base import Case, Metric, NotApplicable, finite
from bench.evaluations.detection import Statistic, detected, judged, known_rows, wrong_rows
from bench.statistics import Array, roc_auc, specificity_at
from methods.base import Unsupported
from tasks.base import Examples, Task
from tasks.errors import UserError, require
from tasks.training.train import load

MEASURED = ("margin", "loss")


@dataclass(frozen=True)
class Bias:
    """Rows of the query split make three query sets by the trait of their two answers (Min et al. 2025):

    less   the preferred answer has less of the trait (for length: concise)
    more   it has at least as much (verbose; ties are here)
    full   all

    The suspicion of a training row is −mean over a set of its attribution. `of` margin: it lowers the margins of the
    set; loss: it raises their loss, as Min et al. ask, which is the same mean with weights 1 − p of the label under the
    explained model, ∂(−ℓ)/∂m. `value` is one more ranking, without a set. The rows with a wrong label are to be found:
    ROC-AUC, average precision (base_rate by chance), the true negative rate at the true positive rate `recall`, and the
    share found among the first `inspected` shares of all rows. Flips that plant a bias are all pairs that prefer more
    of the trait, so that who looks at the trait alone is already far above .5:

    <ranking>_matched_auc   ROC-AUC among the rows alone whose label prefers more of the trait, flipped or not.
    """

    inspected: tuple[float, ...]
    recall: float
    of: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "inspected", tuple(self.inspected))
        for share in self.inspected:
            require(0 < share < 1, "truth.bias.inspected", share, "shares between 0 and 1")
        require(0 < self.recall < 1, "truth.bias.recall", self.recall, "between 0 and 1")
        if self.of not in MEASURED:
            raise UserError("truth.bias.of", self.of, allowed=MEASURED)

    def plan(self, task: Task, seed: int) -> None:
        """Nothing to retrain."""
        need_traits(task, "bias")
        wrong_rows(task, "bias")

    def evaluate(self, case: Case) -> dict[str, Metric]:
        self.plan(case.task, case.seed)
        known = known_rows(case.task)
        positive = wrong_rows(case.task, "bias")[known]
        matched = trait_lead(case.task, case.task.train)[known] > 0
        metrics: dict[str, Metric] = {}
        for name, helps, nan, facts in set_rankings(case, self.of):
            metrics |= self._metrics(name, positive, -helps[known], matched, nan, facts)
        metrics["base_rate"] = Metric(float(positive.mean()), np.empty(0), len(positive), {}, better=None)
        return metrics

    def _metrics(
        self, name: str, positive: np.ndarray, suspicion: Array, matched: np.ndarray, nan: int, facts: dict[str, Any]
    ) -> dict[str, Metric]:
        tnr: dict[str, Statistic] = {
            f"{name}_tnr{round(100 * self.recall)}": partial(specificity_at, positive, suspicion, self.recall)
        }
        found = judged(detected(name, positive, suspicion, self.inspected) | tnr, positive, nan, **facts)
        few = positive[matched]
        if few.any() and not few.all():
            auc: dict[str, Statistic] = {f"{name}_matched_auc": partial(roc_auc, few, suspicion[matched])}
            found |= judged(auc, few, nan, matched=int(matched.sum()), **facts)
        return found


def need_traits(task: Task, what: str) -> None:
    facts = (task.facts.get(i) for split in ("train", "query", "test") for i in task.splits[split].ids)
    if not task.pairs or not all(hasattr(fact, "trait") for fact in facts):
        raise NotApplicable(f"{what} needs pairs of answers of which a trait is known: task=rlhf has them")


def need_own_test(task: Task, ranked_by: str) -> None:
    """Refuses to judge a model by the pairs that chose its training rows."""
    if set(task.splits["test"].ids) & set(task.splits[ranked_by].ids):
        problem = f"gives no pairs but the {ranked_by} pairs, by which training rows are chosen"
        sizes = {"query": "task.n_query=450 task.n_test=390", "val": "task.n_val=300 task.n_query=100 task.n_test=400"}
        hint = f"take task.n_train=1400 {sizes[ranked_by]}, for example"
        raise UserError("task.n_test", None, problem, hint=hint)


def traits(task: Task, rows: Examples) -> Array:
    """Of the first answer and of the second, (n, 2)."""
    return np.array([task.facts[i].trait for i in rows.ids], dtype=float).reshape(-1, 2)


def trait_lead(task: Task, rows: Examples) -> Array:
    """Trait of the answer that the label prefers − that of the other, (n,)."""
    first, second = traits(task, rows).T
    return np.where(rows.targets.numpy() == 0, first - second, second - first)


def query_sets(task: Task) -> dict[str, np.ndarray]:
    """Which rows of the query split are in each set, (Q,) each; sets without a row are left out."""
    less = trait_lead(task, task.splits["query"]) < 0
    sets = {"less": less, "more": ~less, "full": np.ones_like(less)}
    return {name: rows for name, rows in sets.items() if rows.any()}


def set_rankings(case: Case, of: str) -> Iterator[tuple[str, Array, int, dict[str, Any]]]:
    """Name, helpfulness (N,) (lowest is most suspicious), how many queries were not finite, and what the ranking is
    by: `value`, then the mean attribution to each query set, as far as the method offers them."""
    found = 0
    try:
        values, nan = finite(case.value()[None])
        yield "value", values[0], nan, {}
        found += 1
    except (Unsupported, NotApplicable):
        pass
    try:
        scores = case.attribution("query")
    except (Unsupported, NotApplicable):
        scores = None
    if scores is not None:
        weights = loss_weights(case) if of == "loss" else np.ones(len(scores))
        for name, rows in query_sets(case.task).items():
            kept, nan = finite(scores[rows])
            yield name, weights[rows] @ kept / len(kept), nan, {"queries": len(kept), "of": of}
            found += 1
    if not found:
        raise NotApplicable("the method neither values nor attributes")


@torch.no_grad()
def loss_weights(case: Case) -> Array:
    """−∂ℓ/∂m of each query under the explained model, (Q,)."""
    task, queries = case.task, case.task.splits["query"]
    model, weights = load(task.initial(0), case.trajectory.final), np.empty(len(queries))
    for index in queries.batches(256):
        batch = queries.batch(index)
        weights[index] = task.objective.residual(task.outputs(model, batch), batch.targets).double().numpy()
    return weights
