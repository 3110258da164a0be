"""The largest eigenpairs and a damped complement, by block Krylov iteration (Musco & Musco 2015).

    span(Ω, HΩ, H²Ω, …), Ω (P, rank) Gaussian, `passes` passes over the data; its Ritz pairs of largest μ
    (H + δI)⁻¹ v ≈ (1/δ) [v − U diag(μ/(μ + δ)) Uᵀ v]
Directions outside of U count as curvature 0: they dominate the answer where δ is small.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import Problem
from methods.curvature.base import require_rank
from methods.curvature.low_rank import LowRank, orthonormal, ritz
from methods.curvature.operator import Operator
from methods.curvature.products import MATRICES
from methods.curvature.root import require_matrix
from methods.gradients.source import Source
from tasks.errors import require


@dataclass(frozen=True)
class Eigenpairs:
    """`matrix`: hessian, ggn or empirical."""

    matrix: str
    rank: int
    passes: int
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        require_matrix(self.matrix, MATRICES)
        require(self.passes >= 1, "method.curvature.passes", self.passes, "1 or more")

    def fit(self, problem: Problem, source: Source) -> LowRank:
        require_rank(self.rank, source.size)
        operator = Operator(problem, source, self.matrix)
        new = orthonormal(operator.random(self.rank, "eigenpairs"))
        dtype = next(source.model.parameters()).dtype
        basis, images = new, operator.times(new.to(dtype)).double()
        for _ in range(1, self.passes):
            new = orthonormal(images[len(basis) - len(new) :], basis)
            if not len(new) or len(basis) == source.size:
                break
            basis, images = torch.cat([basis, new]), torch.cat([images, operator.times(new.to(dtype)).double()])
        values, vectors = ritz(lambda _: images, basis)
        kept = values.argsort(descending=True)[: self.rank]
        return LowRank(
            "top eigenpairs", source.blocks, vectors[kept], values[kept], operator.trace(), complemented=True
        )
