"""The one interface of every inverse-curvature-vector product."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from methods.base import Problem
from methods.curvature.damping import Damping
from methods.gradients.blocks import Block

Blocked = dict[str, Tensor]  # block name -> (R, out, in), R right-hand sides


class Fitted(Protocol):
    """A factorised curvature H of the mean training loss (its L2 term aside)."""

    def solve(self, rhs: Blocked, damping: Damping, l2: float) -> Blocked:
        """(H + γI + λI)⁻¹ rhs with γ = `l2`, λ by `damping`; fitted once, any damping after. `rhs` stays as it is."""


class Curvature(Protocol):
    """Which H, and how it is represented. `precision`: the dtype it wants the model in, None for the model's own."""

    precision: torch.dtype | None

    def fit(self, problem: Problem, model: nn.Module, blocks: Sequence[Block]) -> Fitted:
        """From the whole training set."""


def positive(strength: float, smallest: float, what: str) -> float:
    """The number that is added to eigenvalues; refuses a singular system by name."""
    from tasks.errors import UserError

    if strength + smallest <= 0:
        raise UserError("method.damping.value", 0, f"leaves {what} singular", allowed="above 0")
    return strength
