"""Similarity of representations: the model sees these two alike."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem, started
from methods.representation import Similarity
from tasks.base import Examples
from tasks.errors import UserError

SIMILARITIES = ("cosine", "dot", "euclidean")


@dataclass(frozen=True)
class RepSim(Similarity):
    """score(q, i) = ± s(h_q, h_i), h = h(x) at `layer` of the explained model    (Hanawa et al. 2021;
    Pezeshkpour et al. 2021)

    cosine      h_qᵀ h_i / (‖h_q‖ ‖h_i‖)
    dot         h_qᵀ h_i
    euclidean   −‖h_q − h_i‖², never positive, so that a sign by label would turn near into far: it takes sign=none
    """

    similarity: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.similarity not in SIMILARITIES:
            raise UserError("method.similarity", self.similarity, allowed=SIMILARITIES)
        if self.similarity == "euclidean" and self.sign == "label":
            problem = "is never positive: a sign by label would turn near into far"
            raise UserError("method.similarity", "euclidean", problem, hint="take method.sign=none, or cosine or dot")

    def similarities(self, problem: Problem, queries: Examples) -> Tensor:
        asked, train = self.of(problem, queries), self.of_train(problem)
        if self.similarity == "euclidean":
            return -torch.cdist(asked, train).square()
        if self.similarity == "cosine":
            asked, train = unit(asked), unit(train)
        return asked @ train.T


@dataclass(frozen=True)
class Embedding(RepSim):
    """The same of the base model θ0, before the task was learned."""

    def similarities(self, problem: Problem, queries: Examples) -> Tensor:
        return super().similarities(problem.at(started, "embedding"), queries)


def unit(vectors: Tensor) -> Tensor:
    """Of length 1; 0 stays 0."""
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
