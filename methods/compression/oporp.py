"""OPORP, one permutation + one random projection: random signs, then sums of k bins of a random permutation.

(Sg)[h] = Σ_{j: π(j) in bin h} σ_j g_j; bins have ⌊P/k⌋ or ⌈P/k⌉ numbers each. Evenly filled bins take the factor
(P − k)/(P − 1) off the count sketch's variance: at k = P nothing is lost (Li & Li 2023, fixed-length binning).
"""

from dataclasses import dataclass

import torch

from methods.base import Problem
from methods.compression.base import require_positive, require_within, vector
from methods.compression.bucket_sums import BucketSums
from methods.compression.rademacher import signs
from methods.gradients.source import Source


@dataclass(frozen=True)
class OPORP:
    """The whole gradient becomes `dimension` numbers."""

    dimension: int

    def __post_init__(self) -> None:
        require_positive("dimension", self.dimension)

    def fit(self, problem: Problem, source: Source) -> BucketSums:
        require_within("dimension", self.dimension, source.size)
        size, blocks = source.size, source.blocks
        order = torch.randperm(size, generator=problem.generator("compression", "oporp", "permutation"))
        bins = (order * self.dimension // size).to(problem.device)[None].split([b.size for b in blocks], 1)
        buckets = {b.name: part for b, part in zip(blocks, bins, strict=True)}
        draws = {b.name: problem.generator("compression", "oporp", "signs", b.name) for b in blocks}
        flips = {b.name: signs((1, b.size), draws[b.name]).to(problem.device) for b in blocks}
        return BucketSums(vector("oporp", self.dimension), buckets, flips)
