"""The one interface of every inverse-curvature-vector product."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from methods.base import Problem
from methods.curvature.damping import Damping
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors, Gradient
from tasks.errors import UserError


class Fitted(Protocol):
    """A factorised curvature H of the mean training loss (its L2 term aside); fitted once, any damping after.

    It works in coordinates of its own, an orthonormal basis U in which solving is cheap (U = I is allowed):
    gᵀ (H + δI)⁻¹ v = ⟨Uᵀg, precondition(Uᵀv)⟩, so scores never need to leave them. What is handed in stays as it is.
    """

    def coordinates(self, found: Sequence[Factors]) -> list[Gradient]:
        """Uᵀg of per-example gradients, a block each."""

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        """Uᵀ (H + γI + λI)⁻¹ U of what is in coordinates; γ = `l2`, λ by `damping`. Where H couples no columns, the
        columns stay as they are; else all are given."""


class Curvature(Protocol):
    """Which H, and how it is represented. `precision`: the dtype it wants the model in, None for the model's own."""

    precision: torch.dtype | None

    def fit(self, problem: Problem, model: nn.Module, blocks: Sequence[Block]) -> Fitted:
        """From the whole training set."""


def positive(strength: float, smallest: float, what: str) -> float:
    """The number that is added to eigenvalues; refuses a singular system by name."""
    if strength + smallest <= 0:
        raise UserError("method.damping.value", 0, f"leaves {what} singular", allowed="above 0")
    return strength
