"""Rademacher projection: entries ±1/√k (Achlioptas 2003), as in TRAK's library (Park et al. 2023)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from methods.base import Problem
from methods.compression.base import require_positive, require_within, vector
from methods.compression.dense_projection import DenseProjection
from methods.gradients.source import Source


@dataclass(frozen=True)
class Rademacher:
    """The whole gradient becomes `dimension` numbers."""

    dimension: int

    def __post_init__(self) -> None:
        require_positive("dimension", self.dimension)

    def fit(self, problem: Problem, source: Source) -> DenseProjection:
        require_within("dimension", self.dimension, source.size)
        named = partial(problem.generator, "compression", "rademacher")
        return DenseProjection(vector("rademacher", self.dimension), signs, named)


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Entries ±1, int8."""
    return 2 * torch.randint(2, shape, generator=generator, dtype=torch.int8) - 1
