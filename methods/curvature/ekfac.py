"""EK-FAC: Kronecker-factored eigenbases, re-estimated eigenvalues (George et al. 2018; Grosse et al. 2023, §2.2).

For a block with inputs a (bias as last entry) and output derivatives d of the loss at *sampled* labels (true Fisher):
    A = E[a aᵀ] = U_A diag U_Aᵀ,   S = E[d dᵀ] = U_S diag U_Sᵀ,  over unpadded positions, uncentred
    Λ = (1/N) Σ_i (U_Sᵀ G_i U_A)²,  G_i summed over positions before the square
    (H + δI)⁻¹ V = U_S [ (U_Sᵀ V U_A) / (Λ + δ) ] U_Aᵀ
Factors and eigenvalues use independent draws of labels. Embeddings are linear layers on one-hot inputs: A is diagonal,
so U_A = I. LayerNorms have an exact dense Fisher block. Eigendecompositions in float64. Trace: Σ Λ = E‖G_i‖².
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Problem
from methods.curvature.base import positive
from methods.curvature.damping import Damping
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors, Gradient
from methods.gradients.source import Source


@dataclass(frozen=True)
class EKFAC:
    """`fisher`: "true" (labels sampled from the model) or "empirical" (the training labels): two different matrices."""

    fisher: str
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        from tasks.errors import UserError

        if self.fisher not in ("true", "empirical"):
            raise UserError("method.curvature.fisher", self.fisher, allowed="true, empirical")

    def fit(self, problem: Problem, source: Source) -> "FittedEKFAC":
        n, blocks = len(problem.train), source.blocks
        covariances = {b.name: _Covariance(b) for b in blocks}
        for index, found in self._pseudo_gradients(problem, source, "factors"):
            problem.meter.gradients += len(index)
            for f in found:
                covariances[f.block.name].add(f)
        bases = {b.name: covariances[b.name].basis() for b in blocks}
        eigenvalues = {b.name: torch.zeros(b.shape, dtype=torch.float64) for b in blocks}
        for index, found in self._pseudo_gradients(problem, source, "eigenvalues"):
            problem.meter.gradients += len(index)
            for f in found:
                g = bases[f.block.name].coordinates(f)
                columns = slice(None) if g.columns is None else g.columns.cpu()
                eigenvalues[f.block.name][:, columns] += g.values.square().sum(0).double().cpu()
        return FittedEKFAC(blocks, bases, {name: v / n for name, v in eigenvalues.items()})

    def _pseudo_gradients(self, problem: Problem, source: Source, use: str):  # type: ignore[no-untyped-def]
        objective, draw = problem.task.objective, problem.generator("ekfac", use)

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            if self.fisher == "true":
                targets = objective.sample(outputs.detach().cpu(), draw).to(outputs.device)
            return objective.loss(outputs, targets)

        return source.gradients(problem.train, loss)


class _Covariance:
    """Un-normalised sums of a aᵀ and d dᵀ in float64; of a norm, of vec(G) vec(G)ᵀ."""

    def __init__(self, block: Block) -> None:
        self.block = block
        rows, columns = block.shape
        size = block.size if block.kind == "norm" else rows
        self.outputs = torch.zeros(size, size, dtype=torch.float64)
        self.inputs = torch.zeros(columns, columns, dtype=torch.float64) if block.kind == "linear" else None

    def add(self, f: Factors) -> None:
        if self.block.kind == "norm":
            g = f.gradient().values.flatten(1).double().cpu()
            self.outputs += g.T @ g
            return
        keep = f.mask.flatten() > 0
        d = f.outputs.flatten(0, 1)[keep]
        self.outputs += (d.T @ d).double().cpu()
        if self.inputs is not None:
            a = f.inputs.flatten(0, 1)[keep]
            self.inputs += (a.T @ a).double().cpu()

    def basis(self) -> "Basis":
        left = torch.linalg.eigh(self.outputs)[1]
        right = None if self.inputs is None else torch.linalg.eigh(self.inputs)[1]
        return Basis(left, right, self.block.kind == "norm")


@dataclass(frozen=True)
class Basis:
    """Orthonormal bases in columns, float64; `whole`: `left` is the basis of the flattened block."""

    left: Tensor
    right: Tensor | None
    whole: bool

    def coordinates(self, f: Factors) -> Gradient:
        """U_Sᵀ G U_A of per-example gradients: the factors are rotated, which is far cheaper than their products."""
        left = self.left.to(f.outputs.device, f.outputs.dtype)
        if self.whole:
            g = f.gradient().values
            return Gradient(f.block, (g.flatten(1) @ left).view_as(g))
        inputs = f.inputs if self.right is None else f.inputs @ self.right.to(f.inputs.device, f.inputs.dtype)
        return replace(f, inputs=inputs, outputs=f.outputs @ left).gradient()


@dataclass(frozen=True)
class FittedEKFAC:
    """Bases and eigenvalues (out, in) of each block."""

    blocks: tuple[Block, ...]
    bases: dict[str, Basis]
    eigenvalues: dict[str, Tensor]

    def coordinates(self, found: Sequence[Factors]) -> list[Gradient]:
        return [self.bases[f.block.name].coordinates(f) for f in found]

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        strengths = damping.strengths(
            {b.name: self.eigenvalues[b.name].sum().item() for b in self.blocks}, {b.name: b.size for b in self.blocks}
        )
        solved = []
        for g in rotated:
            values = self.eigenvalues[g.block.name]
            bounds = values.min().item(), values.max().item()
            delta = positive(l2 + strengths[g.block.name], *bounds, f"EK-FAC's block {g.block.name}")
            scale = g.of((values + delta).reciprocal().to(g.values.device, g.values.dtype))
            solved.append(replace(g, values=g.values * scale))
        return solved
