"""Neumann series over the whole training set: what LiSSA samples.

    x ← x + (v − (H + δI) x) / σ,      x_J = (1/σ) Σ_{j<=J} (I − (H + δI)/σ)^j v → (H + δI)⁻¹ v iff 0 < eig(H + δI) < 2σ
σ is `scale`, or the largest eigenvalue by power iteration.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Problem
from methods.curvature.base import InPlace, unflat
from methods.curvature.damping import Damping
from methods.curvature.operator import Operator, relative
from methods.curvature.products import MATRICES
from methods.curvature.root import require_matrix
from methods.gradients.per_example import Gradient
from methods.gradients.source import Source
from tasks.errors import require

MARGIN = 1.1  # the power iteration comes from below
FAR = 0.1
GROWTH = 10.0


@dataclass(frozen=True)
class Neumann:
    """`matrix`: hessian, ggn or empirical. Stops at ‖r‖ <= tolerance · ‖v‖ or after `iterations`."""

    matrix: str
    tolerance: float
    iterations: int
    scale: float | None
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        require_matrix(self.matrix, MATRICES)
        require(0 < self.tolerance < 1, "method.curvature.tolerance", self.tolerance, "0 < tolerance < 1")
        require(self.iterations >= 1, "method.curvature.iterations", self.iterations, "1 or more")
        require(self.scale is None or self.scale > 0, "method.curvature.scale", self.scale, "above 0, or null")

    def fit(self, problem: Problem, source: Source) -> "FittedNeumann":
        return FittedNeumann(self, Operator(problem, source, self.matrix))


@dataclass(frozen=True)
class FittedNeumann(InPlace):
    """Nothing is factorised: every solve reads the training set."""

    settings: Neumann
    operator: Operator

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        shift, settings = self.operator.shift(damping, l2), self.settings
        vectors = self.operator.vectors(rotated)
        scale = MARGIN * self.operator.largest(shift) if settings.scale is None else settings.scale

        x = vectors / scale
        going = torch.arange(len(vectors), device=vectors.device)  # a vector is done whatever the others are
        for _ in range(settings.iterations):
            r = self._residual(x[going], vectors[going], shift)
            still_converging(x, vectors, shift, f"method.curvature.scale={scale:.3g}")
            left = relative(r, vectors[going]) > settings.tolerance
            going = going[left]
            if not len(going):
                break
            x[going] += r[left] / scale
        else:
            remedy = f"method.curvature.iterations={settings.iterations} or method.damping.value"
            say_how_far(relative(self._residual(x, vectors, shift), vectors), "the Neumann series", remedy)
        return unflat(self.operator.source.blocks, x)

    def _residual(self, x: Tensor, vectors: Tensor, shift: float) -> Tensor:
        return vectors - self.operator.times(x) - shift * x


def still_converging(x: Tensor, vectors: Tensor, shift: float, what: str) -> None:
    """‖(H + δI)⁻¹ v‖ <= ‖v‖/δ for every positive semi-definite H: an iterate far beyond it never comes back."""
    worst = (shift * relative(x, vectors)).max().item()
    if not worst <= GROWTH:
        raise ArithmeticError(f"diverged: an iterate is {worst:.1e} times what its solution can be; raise {what}")


def require_solved(residuals: Tensor, name: str, hint: str) -> None:
    """A residual above the right-hand side is worse than the answer 0: it is never returned."""
    worst = residuals.max().item()
    if not worst <= 1:
        raise ArithmeticError(f"{name} diverged: a residual of {worst:.2g} times the right-hand side; {hint}")


def noise(operator: Operator, batch_size: int | None) -> str:
    """The key to raise where batches are a cause, for a list of keys."""
    return "" if operator.whole(batch_size) else f"method.curvature.batch_size={batch_size}, "


def say_how_far(residuals: Tensor, name: str, remedy: str) -> None:
    """A warning where the answer is off by more than a tenth; `remedy`: the keys to raise."""
    if residuals.mean() <= FAR:
        return
    warnings.warn(
        f"{name}: a residual of {residuals.mean().item():.1e} (largest {residuals.max().item():.1e}) of the right-hand "
        f"side is left; raise {remedy}",
        stacklevel=3,
    )
