"""K-FAC: each block as a Kronecker product of two covariances (Martens & Grosse 2015, §3).

    A = E[a aᵀ] = U_A diag(α) U_Aᵀ,   S = E[d dᵀ] = U_S diag(σ) U_Sᵀ,   H ≈ S ⊗ A,   Λ = σ αᵀ
a the inputs (bias as last entry), d the derivatives of the loss by the outputs; uncentred, over unpadded positions, so
that a sequence counts as so many independent examples: the factor of about T that K-FAC misses on sequences. Embeddings
are linear layers on one-hot inputs: A is diagonal, U_A = I. Whole blocks (norms, …) have one input, 1: exact.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Problem
from methods.curvature.eigenbasis import Basis, Eigenbases, eigenvectors
from methods.curvature.root import ROOTED, columns, require_matrix
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors
from methods.gradients.sharding import mine, summed
from methods.gradients.source import Source


@dataclass(frozen=True)
class KFAC:
    """`matrix`: fisher (labels sampled), ggn (their expectation, a backward pass a class) or empirical."""

    matrix: str
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        require_matrix(self.matrix, ROOTED)

    def fit(self, problem: Problem, source: Source) -> Eigenbases:
        rows = mine(len(problem.train))
        sums = covariances(source.blocks, columns(problem, source, self.matrix, "factors", rows))
        bases, eigenvalues = {}, {}
        for block in source.blocks:
            left, right = sums[block.name].normalised()
            basis = bases[block.name] = Basis(eigenvectors(left), None if right.ndim == 1 else eigenvectors(right))
            assert basis.left is not None
            sigma = ((left @ basis.left) * basis.left).sum(0)
            alpha = right if basis.right is None else ((right @ basis.right) * basis.right).sum(0)
            eigenvalues[block.name] = sigma.clamp_min(0)[:, None] * alpha.clamp_min(0)
        return Eigenbases("K-FAC", source.blocks, bases, eigenvalues)


class Covariances:
    """Sums of a aᵀ and d dᵀ of a block in float64, and over how many positions; of embeddings the diagonal of a aᵀ."""

    def __init__(self, block: Block) -> None:
        rows, columns = block.shape
        self.block = block
        self.outputs = torch.zeros(rows, rows, dtype=torch.float64)
        embedded = block.kind == "embedding"
        self.inputs = torch.zeros(columns, dtype=torch.float64) if embedded else torch.zeros(
            columns, columns, dtype=torch.float64
        )  # fmt: skip
        self.positions = 0

    def add_outputs(self, f: Factors, keep: Tensor) -> None:
        d = f.outputs.flatten(0, 1)[keep]
        self.outputs += (d.T @ d).double().cpu()

    def add_inputs(self, f: Factors, keep: Tensor) -> None:
        a = f.inputs.flatten(0, 1)[keep]
        self.positions += len(a)
        if self.block.kind != "embedding":
            self.inputs += (a.T @ a).double().cpu()
            return
        assert self.block.rows is not None
        a = a[torch.isin(a, self.block.rows.to(a.device))].cpu()
        self.inputs += torch.bincount(torch.searchsorted(self.block.rows, a), minlength=len(self.inputs))

    def normalised(self) -> tuple[Tensor, Tensor]:
        """S and A by position. A column of the Gauss–Newton root is a share of one example: S sums over columns."""
        return self.outputs / self.positions, self.inputs / self.positions


def covariances(
    blocks: Sequence[Block], stream: Iterable[tuple[Tensor, list[list[Factors]]]]
) -> dict[str, Covariances]:
    """Of all blocks; inputs are those of the first column, outputs of all. Added up over processes."""
    sums = {b.name: Covariances(b) for b in blocks}
    for _, found in stream:
        for r, column in enumerate(found):
            for f in column:
                keep = f.mask.flatten() > 0
                sums[f.block.name].add_outputs(f, keep)
                if r == 0:
                    sums[f.block.name].add_inputs(f, keep)
    counts = torch.tensor([float(c.positions) for c in sums.values()], dtype=torch.float64)
    summed([counts, *(t for c in sums.values() for t in (c.outputs, c.inputs))])
    for c, count in zip(sums.values(), counts.tolist(), strict=True):
        c.positions = round(count)
    return sums
