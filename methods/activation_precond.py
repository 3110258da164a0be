"""Similarity of representations, in the metric that the training data's own second moment gives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem
from methods.curvature.damping import Damping
from methods.representation import Similarity
from tasks.base import Examples
from tasks.errors import UserError


@dataclass(frozen=True)
class ActivationPrecond(Similarity):
    """score(q, i) = ± h_qᵀ (C + λI)⁻¹ h_i, C = (1/N) Σ_i h_i h_iᵀ, uncentred (d, d)

    K-FAC's factor of the inputs of a layer without that of its output gradients (Martens & Grosse 2015, §3; for a
    squared loss on these features it is the influence of an example with a residual of 1). λ by the rules of `Damping`,
    whose one block this is: mean_eigenvalue takes a share of tr C / d.
    """

    damping: Damping

    def similarities(self, problem: Problem, queries: Examples) -> Tensor:
        train = self.of_train(problem)
        factor = damped_factor(train.T @ train / len(train), self.damping)
        return self.of(problem, queries) @ torch.cholesky_solve(train.T, factor)


def damped_factor(moments: Tensor, damping: Damping) -> Tensor:
    """L (d, d) with L Lᵀ = C + λI."""
    size = len(moments)
    strength = damping.strengths({"": moments.trace().item()}, {"": size})[""]
    factor, failed = torch.linalg.cholesky_ex(moments + strength * torch.eye(size, dtype=moments.dtype))
    spread = factor.diagonal().square()
    if failed or not spread.min() > 1e-13 * spread.max():  # beyond that it is rounding that is inverted
        problem = f"adds {strength:.3g} to a singular matrix of features"
        raise UserError("method.damping.value", damping.value, problem, allowed="above 0, 0.01 for example")
    return factor
