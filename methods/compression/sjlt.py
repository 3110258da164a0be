"""Sparse Johnson–Lindenstrauss transform: each number is added to s random buckets with random signs, over √s.

s = 1 is the count sketch. Buckets are drawn with replacement (Dasgupta, Kumar & Sarlós 2010; Kane & Nelson 2014 draw
them without): signs are independent, so E⟨Sx, Sy⟩ = ⟨x, y⟩ either way.
"""

from dataclasses import dataclass

import torch

from methods.base import Problem
from methods.compression.base import require_positive, require_within, vector
from methods.compression.bucket_sums import BucketSums
from methods.compression.rademacher import signs
from methods.gradients.source import Source
from tasks.errors import require


@dataclass(frozen=True)
class SJLT:
    """The whole gradient becomes `dimension` numbers; `sparsity` s of them hear of each of its own."""

    dimension: int
    sparsity: int = 1

    def __post_init__(self) -> None:
        require_positive("dimension", self.dimension)
        require_positive("sparsity", self.sparsity)
        require(
            self.sparsity <= self.dimension,
            "method.compression.sparsity",
            self.sparsity,
            f"1 to method.compression.dimension={self.dimension}",
        )

    def fit(self, problem: Problem, source: Source) -> BucketSums:
        require_within("dimension", self.dimension, source.size)
        buckets, flips = {}, {}
        for b in source.blocks:
            draw = problem.generator("compression", "sjlt", b.name)
            shape = (self.sparsity, b.size)
            buckets[b.name] = torch.randint(self.dimension, shape, generator=draw, dtype=torch.int32).to(problem.device)
            flips[b.name] = signs(shape, draw).to(problem.device)
        return BucketSums(vector("sjlt", self.dimension), buckets, flips)
