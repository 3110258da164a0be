"""Dense random projections: Sg = (1/√k) Σ_blocks R_bᵀ vec(G_b), R_b (P_b, k) of independent entries of variance 1.

R is never in memory as a whole. Each block's rows are cut to chunks; a chunk is drawn from a generator of its own name
whenever it is needed, and is gone afterwards. Where a batch has zeros only (rows of a table that it does not look up),
nothing is drawn. O(P k) random numbers a batch: for small models; the others cost less.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.compression.base import vectors
from methods.compression.coordinates import numbers
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors

CHUNK_BYTES = 2**26  # of a chunk in float64

Draw = Callable[[tuple[int, int], torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class DenseProjection:
    """`draw` gives a chunk's entries, `generator` a random state by (block, chunk); `block` (k, 1) comes out."""

    block: Block
    draw: Draw
    generator: Callable[[str, int], torch.Generator]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (self.block,)

    def __call__(self, found: Sequence[Factors]) -> list[Factors]:
        k = self.block.size
        height = max(1, CHUNK_BYTES // (8 * k))
        total = found[0].outputs.new_zeros(len(found[0].outputs), k)
        for f in found:
            values, places = numbers(f)
            for chunk, part in _chunks(places, height):
                start = chunk * height
                shape = min(height, f.block.size - start), k
                entries = self.draw(shape, self.generator(f.block.name, chunk)).to(values)
                total += values[:, part] @ entries[places[part] - start]
                del entries  # before the next chunk is drawn
        return [vectors(self.block, total / k**0.5)]


def _chunks(places: Tensor, height: int) -> list[tuple[int, slice]]:
    """Chunks of `height` places each that hold some of these ascending ones: its number, and which they are."""
    chunks, sizes = (places // height).unique_consecutive(return_counts=True)
    ends = sizes.cumsum(0)
    return [(c, slice(end - n, end)) for c, n, end in zip(chunks.tolist(), sizes.tolist(), ends.tolist(), strict=True)]
