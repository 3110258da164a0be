"""The matrix itself, of all blocks at once or block by block, in float64: what all others approximate.

Rooted matrices H = S Sᵀ / N, S (P, K) (see root.py). Primal, P <= K: Cholesky of S Sᵀ/N + δI. Dual, P > K, by Woodbury:
    (S Sᵀ/N + δI)⁻¹ v = (1/δ) [v − S (NδI + SᵀS)⁻¹ Sᵀ v],        δ = γ + λ.
The Hessian of the mean loss is always primal, by products with the identity; it must be positive definite with δ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Problem
from methods.curvature.base import KEYS, InPlace, absolute_above, positive, unflat
from methods.curvature.damping import Damping
from methods.curvature.products import product_of
from methods.curvature.root import ROOTED, columns, rank, require_matrix
from methods.gradients.blocks import Block
from methods.gradients.per_example import Gradient, flat, plain
from methods.gradients.source import Source
from tasks.errors import UserError


@dataclass(frozen=True)
class Dense:
    """`matrix`: hessian, ggn, fisher or empirical. `scope`: `global` couples all blocks, `block` keeps the diagonal
    ones. `memory_gib`: what it may take; beyond it the run is refused before it starts."""

    matrix: str
    scope: str
    memory_gib: float
    precision: ClassVar[torch.dtype | None] = torch.float64

    def __post_init__(self) -> None:
        require_matrix(self.matrix, ("hessian", *ROOTED))
        if self.scope not in ("global", "block"):
            raise UserError("method.curvature.scope", self.scope, allowed=("global", "block"))

    def fit(self, problem: Problem, source: Source) -> "FittedDense":
        n = len(problem.train)
        groups = [source.blocks] if self.scope == "global" else [(block,) for block in source.blocks]
        sizes = [sum(b.size for b in group) for group in groups]
        # A Hessian has no root: as many columns as rows.
        count = max(sizes) if self.matrix == "hessian" else n * rank(problem, source, self.matrix)
        needed = sum(8 * size * min(size, count) for size in sizes) / 2**30
        if needed > self.memory_gib:
            raise UserError(
                "method.curvature.memory_gib",
                self.memory_gib,
                f"is too little: the exact matrix of {source.size} parameters takes {needed:.1f} GiB",
                hint="raise it, restrict method.modules=, or take method=ekfac",
            )
        if self.matrix == "hessian":
            return FittedDense(_hessians(problem, source, groups))
        matrices = [torch.zeros(min(size, count), size, dtype=torch.float64) for size in sizes]
        done = 0
        for index, found in columns(problem, source, self.matrix):
            made = {block: [] for block in source.blocks}  # type: dict[Block, list[Tensor]]
            for column in found:
                for g in plain(column):
                    made[g.block].append(g.dense().flatten(1))
            for group, size, matrix in zip(groups, sizes, matrices, strict=True):
                rows = torch.cat([torch.cat(made[block]) for block in group], 1)  # (R · B, P)
                if size <= count:
                    matrix.addmm_(rows.T, rows)
                else:
                    matrix[done : done + len(rows)] = rows
            done += len(index) * len(found)
        return FittedDense(
            tuple(
                # The Gram of the smaller side: S Sᵀ/N (P, P), or SᵀS/N (K, K).
                Part(tuple(group), n, matrix / n if size <= count else matrix @ matrix.T / n,
                     None if size <= count else matrix)
                for group, size, matrix in zip(groups, sizes, matrices, strict=True)
            )
        )  # fmt: skip


def _hessians(problem: Problem, source: Source, groups: Sequence[Sequence[Block]]) -> "tuple[Part, ...]":
    multiply = product_of(problem, source, "hessian")
    parts, start = [], 0
    for group in groups:
        size = sum(b.size for b in group)
        unit = torch.zeros(size, source.size, dtype=torch.float64)
        unit[:, start : start + size] = torch.eye(size, dtype=torch.float64)
        found = multiply(unit, None)[:, start : start + size]
        parts.append(Part(tuple(group), len(problem.train), (found + found.T) / 2, None))
        start += size
    return tuple(parts)


@dataclass(frozen=True)
class Part:
    """Blocks that are coupled. `gram`: H, or SᵀS/N where the root Sᵀ (K, P) is kept."""

    blocks: tuple[Block, ...]
    n: int
    gram: Tensor
    root: Tensor | None
    _factors: dict[float, Tensor] = field(default_factory=dict, repr=False)  # Cholesky by δ, the last one only

    @property
    def name(self) -> str:
        return self.blocks[0].name if len(self.blocks) == 1 else "all"

    @property
    def size(self) -> int:
        return sum(b.size for b in self.blocks)

    def solve(self, vectors: Tensor, delta: float) -> Tensor:
        """(H + δI)⁻¹ of vectors (R, P)."""
        factor = self._factor(delta)
        if self.root is None:
            return torch.cholesky_solve(vectors.T, factor).T
        inner = torch.cholesky_solve(self.root @ vectors.T / self.n, factor)  # (K, R)
        return (vectors - inner.T @ self.root) / delta

    def _factor(self, delta: float) -> Tensor:
        if delta not in self._factors:
            self._factors.clear()
            damped = self.gram.clone()
            damped.diagonal().add_(delta)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if failed:
                smallest, *_, largest = torch.linalg.eigvalsh(self.gram).tolist()
                enough = absolute_above(max(-smallest, 1e-8 * largest))
                raise UserError(
                    KEYS,
                    problem=f"add {delta:.3g} to the matrix ({self.name}), whose smallest eigenvalue is {smallest:.3g}",
                    hint=f"it is positive definite from {enough} upwards",
                )
            self._factors[delta] = factor
        return self._factors[delta]


@dataclass(frozen=True)
class FittedDense(InPlace):
    """The coupled parts, one after the other."""

    parts: tuple[Part, ...]
    standalone: ClassVar[bool] = True

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        strengths = damping.strengths(
            {part.name: part.gram.trace().item() for part in self.parts}, {part.name: part.size for part in self.parts}
        )
        solved, left = [], list(rotated)
        for part in self.parts:
            mine, left = left[: len(part.blocks)], left[len(part.blocks) :]
            delta = l2 + strengths[part.name]
            positive(delta, 0.0, part.gram.diagonal().abs().sum().item(), f"the matrix ({part.name})")
            solved += unflat(part.blocks, part.solve(flat(mine).double(), delta))
        return solved
