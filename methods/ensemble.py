"""Several models are asked, and their scores averaged: what one training happened to do cancels out."""

from dataclasses import dataclass

from torch import Tensor

from methods.base import Problem
from methods.wrapper import Wrapper
from tasks.base import Examples
from tasks.errors import require


@dataclass(frozen=True)
class Ensemble(Wrapper):
    """score = (1/k) Σ_j score_j of the base method, j the k explained trainings, of independent seeds; each is charged.

    With the scores of one model, errors that differ from model to model average out (Park et al. 2023, TRAK, §3.3;
    Søgaard et al. 2021).
    """

    k: int

    def __post_init__(self) -> None:
        require(self.k >= 1, "method.k", self.k, "1 or more")

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        total = self.base.attribute(problem, queries)
        for j in range(1, self.k):
            total = total + self.base.attribute(problem.member(j), queries)
        return total / self.k

    def value(self, problem: Problem) -> Tensor:
        total = self.base.value(problem)
        for j in range(1, self.k):
            total = total + self.base.value(problem.member(j))
        return total / self.k
