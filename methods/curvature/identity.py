"""H = I: no curvature at all, gradients are compared as they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import Problem
from methods.curvature.base import InPlace
from methods.curvature.damping import Damping
from methods.gradients.per_example import Gradient
from methods.gradients.source import Source


@dataclass(frozen=True)
class Identity(InPlace):
    """Damping and L2 would only rescale it: they are ignored."""

    precision: ClassVar[torch.dtype | None] = None

    def fit(self, problem: Problem, source: Source) -> "Identity":
        return self

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        return list(rotated)
