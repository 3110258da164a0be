"""DataInf: the mean and the inverse exchanged, Sherman–Morrison for each example (Kwon et al. 2024, eq. 5).

    (H + δI)⁻¹ v ≈ (1/N) Σ_i (g_i g_iᵀ + δI)⁻¹ v = (1/δ) [v − (1/N) Σ_i g_i (g_iᵀ v) / (δ + ‖g_i‖²)],  block by block
g_i gradients at the training labels (empirical Fisher). This is not the inverse of H + δI: where δ is small against
‖g_i‖² and gradients are near orthogonal, it is close to v/δ, a gradient product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Problem
from methods.curvature.base import InPlace, positive, unflat
from methods.curvature.damping import Damping
from methods.curvature.root import columns
from methods.gradients.blocks import Block
from methods.gradients.per_example import Gradient, flat, plain
from methods.gradients.source import Source
from tasks.errors import UserError


@dataclass(frozen=True)
class DataInf:
    """`scope`: `block` (the paper: each layer its own g_i) or `global` (one g_i over all blocks): two methods."""

    scope: str
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        if self.scope not in ("block", "global"):
            raise UserError("method.curvature.scope", self.scope, allowed=("block", "global"))

    def fit(self, problem: Problem, source: Source) -> "FittedDataInf":
        groups = [(b,) for b in source.blocks] if self.scope == "block" else [source.blocks]
        totals = torch.zeros(len(groups), dtype=torch.float64)
        for batch in _batches(problem, source, groups):
            totals += torch.stack([g.double().square().sum().cpu() for g in batch])
        return FittedDataInf(problem, source, tuple(groups), tuple((totals / len(problem.train)).tolist()))


def _batches(problem: Problem, source: Source, groups: Sequence[Sequence[Block]]) -> Iterator[list[Tensor]]:
    """The training gradients (B, P_group) of each group."""
    for _, (found,) in columns(problem, source, "empirical"):
        by_block = {g.block: g for g in plain(found)}
        yield [flat([by_block[b] for b in group]) for group in groups]


@dataclass(frozen=True)
class FittedDataInf(InPlace):
    """`traces` E‖g_i‖² by group; every solve reads the training gradients once."""

    problem: Problem
    source: Source
    groups: tuple[tuple[Block, ...], ...]
    traces: tuple[float, ...]

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        names = [group[0].name for group in self.groups]
        sizes = {name: sum(b.size for b in group) for name, group in zip(names, self.groups, strict=True)}
        strengths = damping.strengths(dict(zip(names, self.traces, strict=True)), sizes)
        deltas = [
            positive(l2 + strengths[name], 0.0, trace, f"DataInf's block {name}")
            for name, trace in zip(names, self.traces, strict=True)
        ]
        by_block = {g.block: g for g in rotated}
        vectors = [flat([by_block[b] for b in group]) for group in self.groups]
        sums = [torch.zeros_like(v) for v in vectors]
        for batch in _batches(self.problem, self.source, self.groups):
            for g, v, total, delta in zip(batch, vectors, sums, deltas, strict=True):
                total.addmm_((v @ g.T) / (delta + g.square().sum(1)), g)
        n = len(self.problem.train)
        return [
            one
            for group, v, total, delta in zip(self.groups, vectors, sums, deltas, strict=True)
            for one in unflat(group, (v - total / n) / delta)
        ]
