"""GraSS: a random mask to k' = 4k numbers, then a sparse Johnson–Lindenstrauss transform to k (Hu et al. 2025).

Of linear blocks only the k' numbers are ever computed: O(k'), whatever the size of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from methods.base import Problem
from methods.compression.base import require_positive, require_within
from methods.compression.bucket_sums import BucketSums
from methods.compression.mask import Kept, Mask
from methods.compression.sjlt import SJLT
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors
from methods.gradients.source import Source

OVERSAMPLING = 4  # k'/k


@dataclass(frozen=True)
class GraSS:
    """The whole gradient becomes `dimension` numbers."""

    dimension: int

    def __post_init__(self) -> None:
        require_positive("dimension", self.dimension)

    def fit(self, problem: Problem, source: Source) -> "Sketched":
        require_within("dimension", self.dimension, source.size)
        mask = Mask(min(OVERSAMPLING * self.dimension, source.size)).fit(problem, source)
        return Sketched(mask, SJLT(self.dimension).fit(problem, replace(source, squeeze=mask)))


@dataclass(frozen=True, eq=False)
class Sketched:
    """The mask, then the sketch of what it keeps."""

    mask: Kept
    sketch: BucketSums

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.sketch.blocks

    def __call__(self, found: Sequence[Factors]) -> list[Factors]:
        return self.sketch(self.mask(found))
