"""Random mask: k of the P numbers, drawn without replacement, times √(P/k) (as in GraSS, Hu et al. 2025).

GraSS leaves the scale away, which is the same only with a damping that is relative to the curvature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem
from methods.compression.base import require_positive, require_within, vector, vectors
from methods.compression.coordinates import numbers_at
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors
from methods.gradients.source import Source


@dataclass(frozen=True)
class Mask:
    """Of the whole gradient, `dimension` numbers are kept, in their order."""

    dimension: int

    def __post_init__(self) -> None:
        require_positive("dimension", self.dimension)

    def fit(self, problem: Problem, source: Source) -> "Kept":
        require_within("dimension", self.dimension, source.size)
        draw = problem.generator("compression", "mask")
        kept = torch.randperm(source.size, generator=draw)[: self.dimension].sort().values.to(problem.device)
        return Kept(
            vector("mask", self.dimension), by_block(kept, source.blocks), (source.size / self.dimension) ** 0.5
        )


@dataclass(frozen=True, eq=False)
class Kept:
    """`places` (n_b,) of each block by name, ascending; `block` (Σ n_b, 1)."""

    block: Block
    places: dict[str, Tensor]
    scale: float

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (self.block,)

    def __call__(self, found: Sequence[Factors]) -> list[Factors]:
        kept = [numbers_at(f, self.places[f.block.name]) for f in found if len(self.places[f.block.name])]
        return [vectors(self.block, self.scale * torch.cat(kept, 1))]


def by_block(kept: Tensor, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Ascending places in the whole gradient as places in each block."""
    parts, start = {}, 0
    for b in blocks:
        parts[b.name] = kept[(kept >= start) & (kept < start + b.size)] - start
        start += b.size
    return parts
