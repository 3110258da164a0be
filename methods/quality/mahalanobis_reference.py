"""Mahalanobis distance from a clean reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.activation_precond import damped_factor
from methods.base import Problem
from methods.curvature.damping import Damping
from methods.quality.reference import FromReference


@dataclass(frozen=True)
class MahalanobisReference(FromReference):
    """value(i) = −(h_i − μ)ᵀ (Σ + λI)⁻¹ (h_i − μ)    (Lee et al. 2018, eq. 2, of one class)

    μ (d,) and Σ (d, d) are mean and covariance of h over the rows of `reference`, λ by the rules of `Damping`.
    """

    damping: Damping

    def value(self, problem: Problem) -> Tensor:
        known, h = self.compared(problem)
        spread, off = known - known.mean(0), h - known.mean(0)
        if not spread.any():
            return -off.square().sum(1)
        factor = damped_factor(spread.T @ spread / len(known), self.damping)
        return -torch.linalg.solve_triangular(factor, off.T, upper=False).square().sum(0)
