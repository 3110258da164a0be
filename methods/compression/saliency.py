"""Saliency mask: the k parameters whose training gradients have the largest mean square, and no others, unscaled.

What is attributed is then what these parameters learned. As saliency maps for unlearning do (Fan et al. 2024, SalUn),
with the loss of the whole training set; not unbiased in the inner product, and not meant to be.
"""

from dataclasses import dataclass

import torch

from methods.base import Problem
from methods.compression.base import require_positive, require_within, vector
from methods.compression.coordinates import numbers
from methods.compression.mask import Kept, by_block
from methods.gradients.source import Source


@dataclass(frozen=True)
class Saliency:
    """Of the whole gradient, `dimension` numbers are kept, in their order."""

    dimension: int

    def __post_init__(self) -> None:
        require_positive("dimension", self.dimension)

    def fit(self, problem: Problem, source: Source) -> Kept:
        require_within("dimension", self.dimension, source.size)
        squares = {b.name: torch.zeros(b.size, dtype=torch.float64, device=problem.device) for b in source.blocks}
        for index, found in source.gradients(problem.train, problem.task.objective.loss):
            problem.meter.gradients += len(index)
            for f in found:
                values, where = numbers(f)
                squares[f.block.name][where] += values.double().square().sum(0)
        kept = torch.cat([squares[b.name] for b in source.blocks]).topk(self.dimension).indices.sort().values
        return Kept(vector("saliency", self.dimension), by_block(kept, source.blocks), 1.0)
