"""Hashed sums: (Sg)[h] = (1/√s) Σ_j Σ_t σ_tj g_j [h_tj = h]; each number goes to s buckets h, with signs. O(s P)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from methods.compression.base import vectors
from methods.compression.coordinates import numbers
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors


@dataclass(frozen=True, eq=False)
class BucketSums:
    """Of each block of P_b numbers by name: `buckets` (s, P_b) in 0 … k−1 and `signs` (s, P_b); `block` (k, 1)."""

    block: Block
    buckets: dict[str, Tensor]
    signs: dict[str, Tensor]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (self.block,)

    def __call__(self, found: Sequence[Factors]) -> list[Factors]:
        total = found[0].outputs.new_zeros(len(found[0].outputs), self.block.size)
        for f in found:
            values, places = numbers(f)
            for bucket, sign in zip(self.buckets[f.block.name], self.signs[f.block.name], strict=True):
                total.index_add_(1, bucket[places], values * sign[places])
        sparsity = len(next(iter(self.buckets.values())))
        return [vectors(self.block, total / sparsity**0.5)]
