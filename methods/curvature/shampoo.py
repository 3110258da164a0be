"""Eigenvalue-corrected Shampoo: bases of whole gradient matrices, re-estimated eigenvalues.

    L = E[G_i G_iᵀ] = U_S diag U_Sᵀ,   R = E[G_iᵀ G_i] = U_A diag U_Aᵀ,   G_i of one example, summed over positions
    Λ = (1/N) Σ_i (U_Sᵀ G_i U_A)²
(Gupta et al. 2018, Shampoo, for the bases; eigenvalues as in EK-FAC.) Unlike K-FAC's factors, L and R keep the products
between positions of a sequence. Of embeddings U_A = I.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import Problem
from methods.curvature.eigenbasis import Basis, Eigenbases, eigenvectors, second_moments
from methods.curvature.root import ROOTED, columns, require_matrix
from methods.gradients.sharding import mine, summed
from methods.gradients.source import Source


@dataclass(frozen=True)
class Shampoo:
    """`matrix`: fisher (labels sampled), ggn (their expectation, a backward pass a class) or empirical."""

    matrix: str
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        require_matrix(self.matrix, ROOTED)

    def fit(self, problem: Problem, source: Source) -> Eigenbases:
        left = {b.name: torch.zeros(b.shape[0], b.shape[0], dtype=torch.float64) for b in source.blocks}
        right = {
            b.name: torch.zeros(b.shape[1], b.shape[1], dtype=torch.float64)
            for b in source.blocks
            if b.kind != "embedding"
        }
        rows = mine(len(problem.train))
        for _, found in columns(problem, source, self.matrix, "factors", rows):
            for f in (f for column in found for f in column):
                g = f.gradient().values  # (B, out, k)
                wide = g.transpose(0, 1).flatten(1)  # (out, B·k)
                left[f.block.name] += (wide @ wide.T).double().cpu()
                if f.block.name in right:
                    tall = g.flatten(0, 1)  # (B·out, in)
                    right[f.block.name] += (tall.T @ tall).double().cpu()
        summed([*left.values(), *right.values()])
        bases = {
            name: Basis(eigenvectors(total), eigenvectors(right[name]) if name in right else None)
            for name, total in left.items()
        }
        stream = columns(problem, source, self.matrix, "eigenvalues", rows)
        eigenvalues = second_moments(len(problem.train), bases, source, stream)
        return Eigenbases("Shampoo", source.blocks, bases, eigenvalues)
