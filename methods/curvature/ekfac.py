"""EK-FAC: Kronecker-factored eigenbases, re-estimated eigenvalues (George et al. 2018; Grosse et al. 2023, §2.2).

    A = E[a aᵀ] = U_A diag U_Aᵀ,   S = E[d dᵀ] = U_S diag U_Sᵀ    as in K-FAC
    Λ = (1/N) Σ_i (U_Sᵀ G_i U_A)²,  G_i summed over positions before the square
Factors and eigenvalues use independent draws of labels. Eigendecompositions in float64. Trace: Σ Λ = E‖G_i‖².
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import Problem
from methods.curvature.eigenbasis import Basis, Eigenbases, eigenvectors, second_moments
from methods.curvature.kfac import covariances
from methods.curvature.root import ROOTED, columns, require_matrix
from methods.gradients.sharding import mine
from methods.gradients.source import Source


@dataclass(frozen=True)
class EKFAC:
    """`matrix`: fisher (labels sampled), ggn (their expectation, a backward pass a class) or empirical."""

    matrix: str
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        require_matrix(self.matrix, ROOTED)

    def fit(self, problem: Problem, source: Source) -> Eigenbases:
        rows = mine(len(problem.train))
        sums = covariances(source.blocks, columns(problem, source, self.matrix, "factors", rows))
        bases = {
            name: Basis(eigenvectors(c.outputs), None if c.inputs.ndim == 1 else eigenvectors(c.inputs))
            for name, c in sums.items()
        }
        stream = columns(problem, source, self.matrix, "eigenvalues", rows)
        eigenvalues = second_moments(len(problem.train), bases, source, stream)
        return Eigenbases("EK-FAC", source.blocks, bases, eigenvalues)
