"""The one interface of every inverse-curvature-vector product."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from methods.base import Problem
from methods.curvature.damping import Damping
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors, Gradient, plain
from methods.gradients.source import Source
from tasks.errors import UserError


class Fitted(Protocol):
    """A factorised curvature H of the mean training loss (its L2 term aside); fitted once, any damping after.

    It works in coordinates of its own, an orthonormal basis U in which solving is cheap (U = I is allowed):
    gᵀ (H + δI)⁻¹ v = ⟨Uᵀg, precondition(Uᵀv)⟩ = ⟨g, back(precondition(Uᵀv))⟩. What is handed in stays as it is.
    `standalone`: it needs its problem no more, and may serve the next run on the same explained model.
    """

    @property
    def standalone(self) -> bool: ...

    def coordinates(self, found: Sequence[Factors]) -> list[Gradient]:
        """Uᵀg of per-example gradients, a block each."""

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        """Uᵀ (H + γI + λI)⁻¹ U of what is in coordinates; γ = `l2`, λ by `damping`. Where H couples no columns, the
        columns stay as they are; else all are given."""

    def back(self, rotated: Sequence[Gradient]) -> list[Gradient]:
        """U of what is in coordinates, all columns given."""

    def solve(self, vectors: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        """(H + γI + λI)⁻¹ of vectors in the parameters' own coordinates, all columns given."""


class InPlace:
    """Coordinates are the parameters' own, U = I, in which `precondition` is the solve itself."""

    standalone: ClassVar[bool] = False

    def coordinates(self, found: Sequence[Factors]) -> list[Gradient]:
        return plain(found)

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        raise NotImplementedError

    def back(self, rotated: Sequence[Gradient]) -> list[Gradient]:
        return list(rotated)

    def solve(self, vectors: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        return self.precondition(vectors, damping, l2)


class Curvature(Protocol):
    """Which H, and how it is represented."""

    @property
    def precision(self) -> torch.dtype | None:
        """The dtype that it wants the model in, None for the model's own."""

    def fit(self, problem: Problem, source: Source) -> Fitted:
        """From the whole training set."""


def unflat(blocks: Sequence[Block], vectors: Tensor) -> list[Gradient]:
    """Vectors (R, P) over all blocks, one after the other, as a gradient of each block."""
    parts = vectors.split([b.size for b in blocks], 1)
    return [Gradient(b, part.reshape(-1, *b.shape)) for b, part in zip(blocks, parts, strict=True)]


def require_rank(rank: int, dimension: int) -> None:
    """A rank is at least 1 and at most the dimension that it is taken of."""
    if not 1 <= rank <= dimension:
        raise UserError(
            "method.curvature.rank", rank, f"is not possible with {dimension} parameters", allowed=f"1 to {dimension}"
        )


ROUNDING = 1e-14  # of the largest eigenvalue: what is smaller is nothing in float64
KEYS = "method.damping.value and model.recipe.weight_decay (if l2)"  # λ and γ


def positive(strength: float, smallest: float, largest: float, what: str) -> float:
    """The number that is added to eigenvalues between `smallest` and `largest`; refuses a singular system by name."""
    rounding = ROUNDING * largest
    if strength + smallest > rounding:
        return strength
    problem = f"leave {what} singular: they add {strength:.3g}"
    if smallest < -rounding:
        problem += f" to a smallest eigenvalue of {smallest:.3g}"
        hint = f"{absolute_above(-smallest)} is enough"
    else:
        rule = "" if largest > 0 else "method.damping.rule=absolute "  # what is relative to nothing is nothing
        hint = f"take {rule}method.damping.value=1e-3 or more"
    raise UserError(KEYS, problem=problem, hint=hint)


def absolute_above(strength: float) -> str:
    """The overrides whose λ alone exceeds `strength`."""
    return f"method.damping.rule=absolute method.damping.value={1.1 * strength:.2g}"
