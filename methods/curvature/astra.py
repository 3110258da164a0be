"""ASTRA: stochastic Neumann iterations preconditioned by EK-FAC (Wang et al. 2025).

    x ← x − α M⁻¹ ((H_B + δI) x − v),      M the preconditioner with the same damping, x₀ = M⁻¹ v
With all data in the batch it converges for 0 < α < 2/λ_max(M⁻¹(H + δI)); α is `step` over that
λ_max, by power iteration on batches. With batches the mean of the second half of the iterates is returned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import Problem
from methods.curvature.base import Curvature, Fitted, InPlace, unflat
from methods.curvature.damping import Damping
from methods.curvature.neumann import noise, require_solved, say_how_far, still_converging
from methods.curvature.operator import Inverse, Operator, preconditioner, relative
from methods.curvature.products import MATRICES
from methods.curvature.root import require_matrix
from methods.gradients.per_example import Gradient
from methods.gradients.source import Source
from tasks.errors import require


@dataclass(frozen=True)
class ASTRA:
    """`matrix`: hessian, ggn or empirical; `iterations` steps of `batch_size` examples (null: all of them)."""

    matrix: str
    preconditioner: Curvature
    iterations: int
    batch_size: int | None
    step: float
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        require_matrix(self.matrix, MATRICES)
        require(self.iterations >= 1, "method.curvature.iterations", self.iterations, "1 or more")
        size = self.batch_size
        require(size is None or size >= 1, "method.curvature.batch_size", size, "1 or more, or null for all")
        require(0 < self.step < 2, "method.curvature.step", self.step, "0 < step < 2")

    def fit(self, problem: Problem, source: Source) -> "FittedASTRA":
        fitted = preconditioner(problem, source, self.preconditioner)
        assert fitted is not None
        return FittedASTRA(self, Operator(problem, source, self.matrix), fitted)


@dataclass(frozen=True)
class FittedASTRA(InPlace):
    """The preconditioner is factorised; every solve reads batches of the training set."""

    settings: ASTRA
    operator: Operator
    preconditioner: Fitted

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        shift, settings = self.operator.shift(damping, l2), self.settings
        inverse = Inverse(self.preconditioner, self.operator.source, shift)
        vectors = self.operator.vectors(rotated)
        rate = settings.step / self.operator.largest(shift, inverse, settings.batch_size)
        x = inverse(vectors)
        mean, late = torch.zeros_like(x), settings.iterations - settings.iterations // 2
        for t in range(settings.iterations):
            batch = self.operator.batch(settings.batch_size, "astra", t)
            x = x + rate * inverse(vectors - self.operator.times(x, batch) - shift * x)
            still_converging(x, vectors, shift, "method.damping.value, or lower method.curvature.step")
            if t >= settings.iterations - late:
                mean += x / late
        solution = x if self.operator.whole(settings.batch_size) else mean
        residuals = relative(vectors - self.operator.times(solution) - shift * solution, vectors)
        batches = noise(self.operator, settings.batch_size)
        keys = f"{batches}method.curvature.iterations={settings.iterations} or method.damping.value"
        require_solved(residuals, "ASTRA", f"lower method.curvature.step={settings.step}, or raise {keys}")
        say_how_far(residuals, "ASTRA", keys)
        return unflat(self.operator.source.blocks, solution)
