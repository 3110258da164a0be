"""H = I: no curvature at all, gradients are compared as they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from methods.base import Problem
from methods.curvature.base import Blocked, dense
from methods.curvature.damping import Damping
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors


@dataclass(frozen=True)
class Identity:
    """Damping and L2 would only rescale it: they are ignored."""

    precision: ClassVar[torch.dtype | None] = None

    def fit(self, problem: Problem, model: nn.Module, blocks: Sequence[Block]) -> "Identity":
        return self

    def coordinates(self, found: Sequence[Factors]) -> Blocked:
        return dense(found)

    def precondition(self, rotated: Blocked, damping: Damping, l2: float) -> Blocked:
        return rotated

    def solve(self, rhs: Blocked, damping: Damping, l2: float) -> Blocked:
        return rhs
