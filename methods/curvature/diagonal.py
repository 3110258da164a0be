"""The diagonal alone: H ≈ diag(Λ), Λ = (1/N) Σ_i G_i², squared after the sum over positions."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import Problem
from methods.curvature.eigenbasis import Basis, Eigenbases, second_moments
from methods.curvature.root import ROOTED, columns, require_matrix
from methods.gradients.sharding import mine
from methods.gradients.source import Source


@dataclass(frozen=True)
class Diagonal:
    """`matrix`: fisher (labels sampled), ggn (their expectation, a backward pass a class) or empirical."""

    matrix: str
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        require_matrix(self.matrix, ROOTED)

    def fit(self, problem: Problem, source: Source) -> Eigenbases:
        bases = {b.name: Basis() for b in source.blocks}
        stream = columns(problem, source, self.matrix, "eigenvalues", mine(len(problem.train)))
        return Eigenbases(
            "the diagonal", source.blocks, bases, second_moments(len(problem.train), bases, source, stream)
        )
