"""Gaussian projection: entries N(0, 1)/√k, Var⟨Sx, Sy⟩ = (‖x‖²‖y‖² + ⟨x, y⟩²)/k (Johnson & Lindenstrauss 1984)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from methods.base import Problem
from methods.compression.base import require_positive, require_within, vector
from methods.compression.dense_projection import DenseProjection
from methods.gradients.source import Source


@dataclass(frozen=True)
class Gaussian:
    """The whole gradient becomes `dimension` numbers."""

    dimension: int

    def __post_init__(self) -> None:
        require_positive("dimension", self.dimension)

    def fit(self, problem: Problem, source: Source) -> DenseProjection:
        require_within("dimension", self.dimension, source.size)
        named = partial(problem.generator, "compression", "gaussian")
        return DenseProjection(vector("gaussian", self.dimension), normal, named)


def normal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Entries N(0, 1)."""
    return torch.randn(shape, generator=generator)
