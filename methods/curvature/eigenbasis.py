"""H of each block as a diagonal in a Kronecker-factored orthonormal basis: H ≈ Q diag(Λ) Qᵀ, Q = U_S ⊗ U_A.

    (H + δI)⁻¹ V = U_S [ (U_Sᵀ V U_A) / (Λ + δ) ] U_Aᵀ            V, Λ (out, in)
What differs between diagonal, K-FAC, EK-FAC and Shampoo is where U_S, U_A and Λ come from.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from methods.curvature.base import positive
from methods.curvature.damping import Damping
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors, Gradient, wide
from methods.gradients.sharding import summed
from methods.gradients.source import Source

CACHED = 2**20  # numbers of gradients that are squared while they are in the cache


@dataclass(frozen=True)
class Basis:
    """Orthonormal bases in columns, float64; None is the identity."""

    left: Tensor | None = None
    right: Tensor | None = None

    def of_factors(self, f: Factors) -> Factors:
        """Factors of U_Sᵀ G U_A: they are rotated, which is far cheaper than to rotate their products."""
        inputs = f.inputs if self.right is None else f.inputs @ _like(self.right, f.inputs)
        outputs = f.outputs if self.left is None else f.outputs @ _like(self.left, f.outputs)
        return replace(f, inputs=inputs, outputs=outputs)

    def forth(self, v: Tensor) -> Tensor:
        """U_Sᵀ V U_A of (R, out, in)."""
        v = v if self.left is None else _like(self.left, v).T @ v
        return v if self.right is None else v @ _like(self.right, v)

    def back(self, v: Tensor) -> Tensor:
        """U_S V U_Aᵀ of (R, out, in)."""
        v = v if self.left is None else _like(self.left, v) @ v
        return v if self.right is None else v @ _like(self.right, v).T


def _like(matrix: Tensor, other: Tensor) -> Tensor:
    return matrix.to(other.device, other.dtype)


def second_moments(
    n: int, bases: Mapping[str, Basis], source: Source, stream: Iterable[tuple[Tensor, list[list[Factors]]]]
) -> dict[str, Tensor]:
    """Λ = (1/N) Σ (U_Sᵀ G U_A)² over examples and columns, G summed over positions before the square; float64. Added
    up over processes."""
    found = {b.name: torch.zeros(b.shape, dtype=torch.float64) for b in source.blocks}
    for _, columns in stream:
        for f in (f for column in columns for f in source.rounded(column)):
            total = found[f.block.name]
            for few in bases[f.block.name].of_factors(f).split(max(1, CACHED // f.block.size)):
                part = few.gradient()
                where = slice(None) if part.columns is None else part.columns.cpu()
                squares = torch.sum(part.values.square_(), 0, dtype=wide(part.values.dtype))
                total[:, where] += squares.double().cpu()
    summed(list(found.values()))
    return {name: total / n for name, total in found.items()}


def eigenvectors(covariance: Tensor) -> Tensor:
    """In columns, of a symmetric matrix; float64."""
    return torch.linalg.eigh((covariance + covariance.T) / 2)[1]


@dataclass(frozen=True)
class Eigenbases:
    """`name` for messages; basis and eigenvalues (out, in) of each block."""

    name: str
    blocks: tuple[Block, ...]
    bases: Mapping[str, Basis]
    eigenvalues: Mapping[str, Tensor]
    standalone: ClassVar[bool] = True

    def coordinates(self, found: Sequence[Factors]) -> list[Gradient]:
        return [self.bases[f.block.name].of_factors(f).gradient() for f in found]

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        deltas = self._deltas(damping, l2)
        solved = []
        for g in rotated:
            scale = (self.eigenvalues[g.block.name] + deltas[g.block.name]).reciprocal()
            solved.append(replace(g, values=g.values * g.of(_like(scale, g.values))))
        return solved

    def back(self, rotated: Sequence[Gradient]) -> list[Gradient]:
        return self._moved(rotated, lambda basis, v: basis.back(v))

    def solve(self, vectors: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        rotated = self._moved(vectors, lambda basis, v: basis.forth(v))
        return self.back(self.precondition(rotated, damping, l2))

    def _moved(self, vectors: Sequence[Gradient], move: Callable[[Basis, Tensor], Tensor]) -> list[Gradient]:
        return [Gradient(g.block, move(self.bases[g.block.name], g.values)) for g in vectors]

    def _deltas(self, damping: Damping, l2: float) -> dict[str, float]:
        strengths = damping.strengths(
            {b.name: self.eigenvalues[b.name].sum().item() for b in self.blocks}, {b.name: b.size for b in self.blocks}
        )
        return {
            name: positive(
                l2 + strengths[name], values.min().item(), values.max().item(), f"{self.name}'s block {name}"
            )
            for name, values in self.eigenvalues.items()
        }
