"""Nyström: a low-rank H from one pass of products with random vectors, and Woodbury (Frangella et al. 2023, Alg. 2.1).

    Y = HΩ,  Ω (P, rank) orthonormal;   H ≈ Y (ΩᵀY)⁺ Yᵀ = U diag(μ) Uᵀ;   (1/δ) [v − U diag(μ/(μ + δ)) Uᵀ v]
A shift ν = ε‖Y‖ keeps the Cholesky factor of ΩᵀY in the positive and is taken off μ again. H must be positive
semi-definite; at rank >= rank(H) it is exact.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import Problem
from methods.curvature.base import require_rank
from methods.curvature.low_rank import LowRank, orthonormal
from methods.curvature.operator import Operator
from methods.curvature.root import require_matrix
from methods.gradients.source import Source


@dataclass(frozen=True)
class Nystrom:
    """`matrix`: ggn or empirical."""

    matrix: str
    rank: int
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        require_matrix(self.matrix, ("ggn", "empirical"))

    def fit(self, problem: Problem, source: Source) -> LowRank:
        require_rank(self.rank, source.size)
        operator = Operator(problem, source, self.matrix)
        dtype = next(source.model.parameters()).dtype
        sketch = orthonormal(operator.random(self.rank, "nystrom"))  # Ωᵀ (r, P)
        image = operator.times(sketch.to(dtype)).double()  # Yᵀ (r, P)
        shift = torch.finfo(dtype).eps * image.norm().item()
        shifted = image + shift * sketch
        core = shifted @ sketch.T
        factor = torch.linalg.cholesky((core + core.T) / 2)
        half = torch.linalg.solve_triangular(factor, shifted, upper=False)  # (r, P): H ≈ halfᵀ half
        _, singular, vectors = torch.linalg.svd(half, full_matrices=False)
        values = (singular.square() - shift).clamp_min(0)
        return LowRank("Nyström's matrix", source.blocks, vectors, values, operator.trace(), complemented=True)
