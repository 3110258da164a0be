"""Mahalanobis distance: how far an example lies from those that share its label."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.activation_precond import damped_factor
from methods.base import Problem
from methods.curvature.damping import Damping
from methods.representation import Representation


@dataclass(frozen=True)
class Mahalanobis(Representation):
    """value(i) = −(h_i − μ_y)ᵀ (Σ + λI)⁻¹ (h_i − μ_y)    (Lee et al. 2018, eq. 1 and 2)

    μ_c the mean feature of the rows with label c, Σ = (1/N) Σ_i (h_i − μ_yi)(h_i − μ_yi)ᵀ shared by all classes, λ by
    the rules of `Damping`. The paper asks for the nearest class of new inputs; here it is the row's own label's. The
    only row of a class lies on its mean and is never suspicious.
    """

    damping: Damping
    needs = frozenset({"labels"})

    def value(self, problem: Problem) -> Tensor:
        h = self.of_train(problem)
        classes, own = problem.train.targets.unique(return_inverse=True)
        members = torch.nn.functional.one_hot(own, len(classes)).double()  # (N, C)
        off = h - (members.T @ h / members.sum(0)[:, None])[own]
        if not off.any():
            return torch.zeros(len(h), dtype=torch.float64)
        factor = damped_factor(off.T @ off / len(h), self.damping)
        return -torch.linalg.solve_triangular(factor, off.T, upper=False).square().sum(0)
