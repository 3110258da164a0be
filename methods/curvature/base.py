"""The one interface of every inverse-curvature-vector product."""

from collections.abc import Sequence
from typing import Protocol

import torch

from methods.base import Problem
from methods.curvature.damping import Damping
from methods.gradients.per_example import Factors, Gradient
from methods.gradients.source import Source
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
    """Which H, and how it is represented."""

    @property
    def precision(self) -> torch.dtype | None:
        """The dtype that it wants the model in, None for the model's own."""

    def fit(self, problem: Problem, source: Source) -> Fitted:
        """From the whole training set."""


ROUNDING = 1e-14  # of the largest eigenvalue: what is smaller is nothing in float64


def positive(strength: float, smallest: float, largest: float, what: str) -> float:
    """The number that is added to eigenvalues between `smallest` and `largest`; refuses a singular system by name."""
    if strength + smallest <= ROUNDING * largest:
        raise UserError("method.damping.value", problem=f"and L2 leave {what} singular", hint="take more damping")
    return strength
