"""Data Banzhaf: what an example adds to a subset drawn by coin flips."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem
from methods.valuation.utility import Valuation, placed
from tasks.base import Examples, Task
from tasks.errors import require


@dataclass(frozen=True)
class Banzhaf(Valuation):
    """score(q, i) = mean of v(S, q) over the S with i − mean over the S without i    (maximum sample reuse)

    S: `subsets` draws that keep each example with probability 1/2, the empty one drawn again. Estimates the Banzhaf
    value, 2^(1−N) Σ_{S∌i} [v(S∪i) − v(S)]: every subset counts for every example.
    Source: Wang & Jia 2023, Data Banzhaf, §4.
    """

    subsets: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.subsets >= 2, "method.subsets", self.subsets, "2 or more")

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        masks = self._masks(problem)
        return reused(masks, self.worth(problem, masks, queries))

    def _masks(self, problem: Problem) -> Tensor:
        rng, n = problem.generator("valuation", "subsets"), len(problem.train)
        rows: list[Tensor] = []
        while len(rows) < self.subsets:
            row = torch.rand(n, generator=rng, dtype=torch.float64) < 0.5
            if row.any():
                rows.append(row)
        masks = torch.stack(rows).double()
        share = masks.mean(0)
        told = bool(((share > 0) & (share < 1)).all())
        require(told, "method.subsets", self.subsets, "more: here some example is in all subsets, or in none")
        return placed(masks, problem.train)

    def retrainings(self, task: Task) -> int:
        return self.repeats * self.subsets


def reused(masks: Tensor, worth: Tensor) -> Tensor:
    """Mean worth with each example − mean worth without: masks (S, N), worth (S, Q) -> (Q, N)."""
    without = 1 - masks
    return worth.T @ masks / masks.sum(0) - worth.T @ without / without.sum(0)
