"""Arnoldi: the curvature within a Krylov space, everything else dropped (Schioppa et al. 2022, §4.1).

    span(b, Hb, H²b, …) of `iterations` dimensions, re-orthogonalised in full (for a symmetric H: Lanczos);
    H ≈ U diag(μ) Uᵀ by its `rank` Ritz pairs of largest |μ|;      score: U diag(1/(μ + δ)) Uᵀ v
A space that closes early (equal eigenvalues) goes on from a new random vector. Negative μ are kept as they are: μ + δ
must be positive, so they ask for more damping than a Gauss–Newton matrix.
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
from tasks.errors import UserError


@dataclass(frozen=True)
class Arnoldi:
    """`matrix`: hessian, ggn or empirical."""

    matrix: str
    rank: int
    iterations: int
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        require_matrix(self.matrix, MATRICES)
        if self.rank > self.iterations:
            raise UserError(
                "method.curvature.rank",
                self.rank,
                f"is above method.curvature.iterations={self.iterations}",
                hint="lower the one or raise the other",
            )

    def fit(self, problem: Problem, source: Source) -> LowRank:
        require_rank(self.rank, source.size)
        operator = Operator(problem, source, self.matrix)
        dtype = operator.random(1, "arnoldi").dtype
        basis, step = torch.zeros(0, source.size, dtype=torch.float64), operator.random(1, "arnoldi")
        images = torch.zeros(0, source.size, dtype=torch.float64)  # H of each basis vector
        while len(basis) < min(self.iterations, source.size):
            new = orthonormal(step, basis)
            if not len(new):
                new = orthonormal(operator.random(1, f"arnoldi {len(basis)}"), basis)
            basis = torch.cat([basis, new])
            step = operator.times(new.to(dtype)).double()
            images = torch.cat([images, step])
        values, vectors = ritz(lambda _: images, basis)
        kept = values.abs().argsort(descending=True)[: self.rank]
        return LowRank(
            "Arnoldi's matrix", source.blocks, vectors[kept], values[kept], operator.trace(), complemented=False
        )
