"""LoGra with random sides: G ↦ C G Aᵀ, layer by layer, the bias column included (Choe et al. 2024).

C has entries N(0, 1/r_out), A N(0, 1/r_in), r = min(rank, side): E[CᵀC] = I and E[AᵀA] = I, so that
E⟨C X Aᵀ, C Y Aᵀ⟩ = tr(Xᵀ E[CᵀC] Y E[AᵀA]) = ⟨X, Y⟩. A side that is no longer than the rank stays as it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem
from methods.compression.base import require_positive
from methods.compression.gaussian import normal
from methods.compression.two_sided import TwoSided, require_rank, two_sided
from methods.gradients.blocks import Block
from methods.gradients.source import Source


@dataclass(frozen=True)
class LoGra:
    """Each layer becomes `rank` × `rank` numbers."""

    rank: int

    def __post_init__(self) -> None:
        require_positive("rank", self.rank)

    def fit(self, problem: Problem, source: Source) -> TwoSided:
        require_rank(self.rank, source)

        def side(block: Block, name: str, length: int) -> Tensor:
            if length <= self.rank:
                return torch.eye(length)
            draw = problem.generator("compression", "logra", block.name, name)
            return normal((self.rank, length), draw) / self.rank**0.5

        def sides(block: Block) -> tuple[Tensor, Tensor]:
            out, into = block.shape
            return side(block, "outputs", out), side(block, "inputs", into)

        return two_sided(problem, source, self.rank, sides)
