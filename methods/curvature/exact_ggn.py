"""The generalised Gauss–Newton matrix itself, over all blocks at once, in float64.

    G = (1/N) Σ_i J_iᵀ (∂²ℓ/∂outputs²) J_i = S Sᵀ / N            S (P, K), K = N · R columns (Schraudolph 2002, eq. 4)

Primal, P <= K: Cholesky of S Sᵀ/N + δI. Dual, P > K, by Woodbury:
    (S Sᵀ/N + δI)⁻¹ v = (1/δ) [v − S (NδI + SᵀS)⁻¹ Sᵀ v],        δ = γ + λ.
For softmax cross-entropy and other canonical links G is the true Fisher.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Problem
from methods.curvature.base import positive
from methods.curvature.damping import Damping
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors, Gradient, flat, plain
from methods.gradients.source import Source
from tasks.errors import UserError


@dataclass(frozen=True)
class ExactGGN:
    """`memory_gib`: what S or S Sᵀ may take; beyond it the run is refused before it starts."""

    memory_gib: float
    precision: ClassVar[torch.dtype | None] = torch.float64

    def fit(self, problem: Problem, source: Source) -> "FittedGGN":
        task, examples = problem.task, problem.train
        size, n = source.size, len(examples)
        sample = examples.batch([0]).to(problem.device, torch.float64)
        with torch.no_grad():
            rank = task.objective.hessian_root(task.outputs(source.model, sample)).shape[-1]
        columns = n * rank
        needed = 8 * size * min(size, columns) / 2**30
        if needed > self.memory_gib:
            raise UserError(
                "method.curvature.memory_gib",
                self.memory_gib,
                f"is too little: the exact matrix of {size} parameters takes {needed:.1f} GiB",
                hint="raise it, restrict method.modules=, or take method=ekfac",
            )
        primal = size <= columns
        matrix = (
            torch.zeros(size, size, dtype=torch.float64) if primal else torch.zeros(columns, size, dtype=torch.float64)
        )
        done = 0
        for index, found in source.columns(examples):
            rows = torch.cat([flat(plain(column)) for column in found])  # (R · B, P)
            problem.meter.gradients += rank * len(index)
            if primal:
                matrix.addmm_(rows.T, rows)
            else:
                matrix[done : done + len(rows)] = rows
                done += len(rows)
        # The Gram of the smaller side: G = S Sᵀ/N (P, P), or SᵀS/N (K, K).
        return FittedGGN(source.blocks, n, matrix / n if primal else matrix @ matrix.T / n, None if primal else matrix)


@dataclass(frozen=True)
class FittedGGN:
    """`gram`: S Sᵀ/N, or SᵀS/N where `root` Sᵀ (K, P) is kept."""

    blocks: tuple[Block, ...]
    n: int
    gram: Tensor
    root: Tensor | None
    _factors: dict[float, Tensor] = field(default_factory=dict, repr=False)  # Cholesky by δ, the last one only

    @property
    def size(self) -> int:
        return sum(b.size for b in self.blocks)

    def coordinates(self, found: Sequence[Factors]) -> list[Gradient]:
        return plain(found)

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        strength = damping.strengths({"all": self.gram.trace().item()}, {"all": self.size})["all"]
        delta = positive(l2 + strength, 0.0, self.gram.trace().item(), "the exact GGN")
        vectors = flat(rotated).double()  # (R, P)
        factor = self._factor(delta)
        if self.root is None:
            solved = torch.cholesky_solve(vectors.T, factor).T
        else:
            inner = torch.cholesky_solve(self.root @ vectors.T / self.n, factor)  # (K, R)
            solved = (vectors - inner.T @ self.root) / delta
        parts = solved.split([b.size for b in self.blocks], 1)
        return [Gradient(b, part.reshape(-1, *b.shape)) for b, part in zip(self.blocks, parts, strict=True)]

    def _factor(self, delta: float) -> Tensor:
        if delta not in self._factors:
            self._factors.clear()
            damped = self.gram.clone()
            damped.diagonal().add_(delta)
            self._factors[delta] = torch.linalg.cholesky(damped)
        return self._factors[delta]
