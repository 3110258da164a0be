"""LiSSA: the Neumann series with a batch of training examples a step (Agarwal et al. 2017; Koh & Liang 2017, §3).

    x ← x + (v − (H_B + δI) x) / σ,      `depth` steps, mean over `repeats` runs; H_B the curvature of a random batch
σ is `scale`, or 1.1 times the largest eigenvalue of H_B + δI by power iteration on batches. The damping is added, never
subtracted, inside the recursion. A vector whose residual over all data exceeds 1 diverged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import Problem
from methods.curvature.base import InPlace, unflat
from methods.curvature.damping import Damping
from methods.curvature.neumann import MARGIN, noise, require_solved, say_how_far, still_converging
from methods.curvature.operator import Operator, relative
from methods.curvature.products import MATRICES
from methods.curvature.root import require_matrix
from methods.gradients.per_example import Gradient
from methods.gradients.source import Source
from tasks.errors import require


@dataclass(frozen=True)
class LiSSA:
    """`matrix`: hessian, ggn or empirical; `depth` steps of `batch_size` examples, `repeats` times."""

    matrix: str
    depth: int
    batch_size: int
    repeats: int
    scale: float | None
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        require_matrix(self.matrix, MATRICES)
        for key in ("depth", "batch_size", "repeats"):
            require(getattr(self, key) >= 1, f"method.curvature.{key}", getattr(self, key), "1 or more")
        require(self.scale is None or self.scale > 0, "method.curvature.scale", self.scale, "above 0, or null")

    def fit(self, problem: Problem, source: Source) -> "FittedLiSSA":
        return FittedLiSSA(self, Operator(problem, source, self.matrix))


@dataclass(frozen=True)
class FittedLiSSA(InPlace):
    """Nothing is factorised: every solve reads batches of the training set."""

    settings: LiSSA
    operator: Operator

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        shift, settings = self.operator.shift(damping, l2), self.settings
        vectors = self.operator.vectors(rotated)
        scale = settings.scale
        if scale is None:
            scale = MARGIN * self.operator.largest(shift, batch_size=settings.batch_size)
        total = torch.zeros_like(vectors)
        batches = noise(self.operator, settings.batch_size)
        for repeat in range(settings.repeats):
            x = vectors / scale
            for step in range(settings.depth):
                batch = self.operator.batch(settings.batch_size, "lissa", repeat, step)
                x = x + (vectors - self.operator.times(x, batch) - shift * x) / scale
                still_converging(
                    x, vectors, shift, f"method.curvature.scale={scale:.3g}, {batches}or method.damping.value"
                )
            total += x / settings.repeats
        residuals = relative(vectors - self.operator.times(total) - shift * total, vectors)
        keys = f"{batches}method.curvature.depth={settings.depth}"
        require_solved(residuals, "LiSSA", f"raise {keys} or method.curvature.scale={scale:.3g}")
        say_how_far(residuals, "LiSSA", f"{keys} or method.damping.value")
        return unflat(self.operator.source.blocks, total)
