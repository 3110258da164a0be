"""KNN-Shapley: the exact Shapley values of the training rows, for a classifier that asks the nearest neighbours."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem, Unsupported
from methods.representation import Representation, nearest
from tasks.base import Examples
from tasks.errors import require


@dataclass(frozen=True)
class KNNShapley(Representation):
    """score(q, ·): the Shapley values of the game v(S) = (1/k) Σ_j 1[y_j = y_q], j the min(k, |S|) rows of S that are
    nearest to q in feature space: the share of k votes that are right, lacking ones counted wrong, v(∅) = 0.

    From the farthest row α_N to the nearest α_1, with r_j = 1[y_αj = y_q]    (Jia et al. 2019, VLDB, theorem 1):
    s_N = r_N min(k, N) / (kN),  s_j = s_{j+1} + (r_j − r_{j+1}) min(k, j) / (kj).
    Scores sum to v of all rows. Equally near rows go by their ids. value(i): the mean over the validation rows, which
    must have every label that the training rows have: a row can be right only about queries of its own label.
    """

    k: int
    needs = frozenset({"labels"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.k >= 1, "method.k", self.k, "1 or more")

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        train, labels = problem.train, problem.train.targets
        scores, start = torch.empty(len(queries), len(train), dtype=torch.float64), 0
        for order in nearest(self.of(problem, queries), self.of_train(problem), train.ids):
            rows = slice(start, start + len(order))
            right = (labels[order] == queries.targets[rows, None]).double()
            scores[rows] = scores[rows].scatter(1, order, shapley(right, self.k))
            start += len(order)
        return scores

    def value(self, problem: Problem) -> Tensor:
        val = problem.task.splits["val"]
        lacking = set(problem.train.targets.tolist()) - set(val.targets.tolist())
        if lacking:
            raise Unsupported(f"values are means over validation rows, and none has the label {min(lacking)}")
        return self.attribute(problem, val).mean(0)


def shapley(right: Tensor, k: int) -> Tensor:
    """The recursion for `right` (Q, N), 1 where a row's label is the query's, nearest row first."""
    rank = torch.arange(1, right.shape[1] + 1, dtype=right.dtype)
    share = rank.clamp(max=k) / (k * rank)
    steps = torch.cat([(right[:, :-1] - right[:, 1:]) * share[:-1], right[:, -1:] * share[-1:]], 1)
    return steps.flip(1).cumsum(1).flip(1)
