"""Conjugate gradients for all queries at once, preconditioned or not (Hestenes & Stiefel 1952; Martens 2010, §4).

    (H + δI) x = v by the recurrence of r, d and z = M⁻¹ r; each vector has step sizes of its own, all share one pass
    over the training set an iteration. A vector is done at ‖r‖ <= tolerance · ‖v‖ and then left alone.
M is a fitted curvature with the same damping (`preconditioner`, for example EK-FAC), or the identity.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Problem
from methods.curvature.base import KEYS, Curvature, Fitted, InPlace, absolute_above, positive, unflat
from methods.curvature.damping import Damping
from methods.curvature.operator import Inverse, Operator, preconditioner, relative
from methods.curvature.products import MATRICES
from methods.curvature.root import require_matrix
from methods.gradients.per_example import Gradient
from methods.gradients.source import Source
from tasks.errors import UserError, require


@dataclass(frozen=True)
class ConjugateGradients:
    """`matrix`: hessian, ggn or empirical. Stops at `tolerance` or after `iterations` passes, which it then says."""

    matrix: str
    tolerance: float
    iterations: int
    preconditioner: Curvature | None = None
    precision: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        require_matrix(self.matrix, MATRICES)
        require(0 < self.tolerance < 1, "method.curvature.tolerance", self.tolerance, "0 < tolerance < 1")
        require(self.iterations >= 1, "method.curvature.iterations", self.iterations, "1 or more")

    def fit(self, problem: Problem, source: Source) -> "FittedCG":
        return FittedCG(
            self, Operator(problem, source, self.matrix), preconditioner(problem, source, self.preconditioner)
        )


@dataclass(frozen=True)
class FittedCG(InPlace):
    """Nothing is factorised: every solve reads the training set."""

    settings: ConjugateGradients
    operator: Operator
    preconditioner: Fitted | None

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        shift = self.operator.shift(damping, l2)
        inverse = None
        if self.preconditioner is not None:
            inverse = Inverse(self.preconditioner, self.operator.source, shift)
        vectors = self.operator.vectors(rotated)
        return unflat(self.operator.source.blocks, self._solve(vectors, shift, inverse))

    def _solve(self, vectors: Tensor, shift: float, inverse: Inverse | None) -> Tensor:
        positive(shift, 0.0, 1.0 if self.operator.matrix == "hessian" else self.operator.trace(), "the matrix")
        x, r = torch.zeros_like(vectors), vectors.clone()
        z = r if inverse is None else inverse(r)
        d, rz = z.clone(), (r * z).sum(1)
        active = (relative(r, vectors) > self.settings.tolerance).nonzero()[:, 0]
        for _ in range(self.settings.iterations):
            if not len(active):
                return x
            w = self.operator.times(d[active]) + shift * d[active]
            curvature = (d[active] * w).sum(1)
            if not (curvature > 0).all():
                met = (curvature / d[active].square().sum(1)).min().item() - shift
                raise UserError(
                    KEYS,
                    problem=f"add {shift:.3g} to a matrix with a curvature of {met:.3g} in some direction, conjugate "
                    "gradients need a positive definite one",
                    hint=f"take at least {absolute_above(-met)}, or method.curvature.matrix=ggn",
                )
            step = rz[active] / curvature
            x[active] += step[:, None] * d[active]
            r[active] -= step[:, None] * w
            z = r[active] if inverse is None else inverse(r[active])
            new = (r[active] * z).sum(1)
            d[active] = z + (new / rz[active])[:, None] * d[active]
            rz[active] = new
            active = active[relative(r[active], vectors[active]) > self.settings.tolerance]
        if len(active):
            worst = relative(r[active], vectors[active]).max().item()
            warnings.warn(
                f"conjugate gradients: {len(active)} of {len(vectors)} vectors are at a residual of up to {worst:.1e} "
                f"after method.curvature.iterations={self.settings.iterations}; raise it or method.damping.value"
                + (", or take method=ekfac_cg" if inverse is None else ""),
                stacklevel=2,
            )
        return x
