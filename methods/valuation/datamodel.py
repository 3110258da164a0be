"""Datamodels: a linear model of what training on a subset gives, fitted to many subsets."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from methods.base import Problem
from methods.valuation.utility import Valuation, design_seed, placed
from tasks.base import Examples, Task
from tasks.errors import require
from tasks.training.plan import random_subsets


class Estimator(Protocol):
    """A linear regression without intercept."""

    @property
    def penalty(self) -> float | None:
        """0: least squares."""

    def fit(self, x: Tensor, y: Tensor) -> Tensor:
        """Weights (Q, N) of x (M, N) for y (M, Q), column by column."""


@dataclass(frozen=True)
class Ridge:
    """argmin_w (1/2M) ‖y − X w‖² + (λ/2) ‖w‖², λ = `penalty`; at 0 the solution of smallest norm."""

    penalty: float

    def __post_init__(self) -> None:
        require(self.penalty >= 0, "method.estimator.penalty", self.penalty, "0 or more")

    def fit(self, x: Tensor, y: Tensor) -> Tensor:
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        real = s > s.max() * max(x.shape) * torch.finfo(s.dtype).eps
        shrunk = torch.where(real, s / (s**2 + len(x) * self.penalty), 0.0)
        return (y.T @ u * shrunk) @ vt


@dataclass(frozen=True)
class Lasso:
    """argmin_w (1/2M) ‖y − X w‖² + λ ‖w‖₁, λ = `penalty`; null: for each query by five-fold cross-validation."""

    penalty: float | None

    def __post_init__(self) -> None:
        allowed = "above 0, or null for cross-validation"
        require(self.penalty is None or self.penalty > 0, "method.estimator.penalty", self.penalty, allowed)

    def fit(self, x: Tensor, y: Tensor) -> Tensor:
        from sklearn import linear_model

        rows = []
        for column in y.T:
            if self.penalty is None:
                model = linear_model.LassoCV(cv=5, fit_intercept=False)
            else:
                model = linear_model.Lasso(self.penalty, fit_intercept=False, max_iter=10_000, tol=1e-6)
            rows.append(torch.as_tensor(model.fit(x.numpy(), column.numpy()).coef_))
        return torch.stack(rows)


@dataclass(frozen=True)
class Datamodel(Valuation):
    """score(q, i) = w_qi of v(S, q) ≈ b_q + Σ_{i∈S} w_qi, fitted to `subsets` random S that keep `fraction` of the rows
    (Ilyas et al. 2022, Datamodels, §2; LASSO there)

    The regression is of centred v on centred masks. Subsets of one size tell w only up to a constant for each query:
    here one more training a repeat, on everything, tells it, Σ_i w_qi (1 − m̄_i) = v(D, q) − v̄(q) with m̄, v̄ the means
    over the subsets. It gives scores a sign and changes no order; a penalty draws them towards the mean effect.
    `subsets` + 1 trainings a repeat.
    """

    subsets: int
    fraction: float
    estimator: Estimator

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        return self.estimator.penalty == 0  # shrunk weights are too small

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        n, seed = len(problem.train), design_seed(problem, "subsets")
        masks = placed(random_subsets(n, self.subsets, self.fraction, seed, "method"), problem.train)
        worth = self.worth(problem, torch.cat([torch.ones(1, n, dtype=masks.dtype), masks]), queries)
        return regressed(masks, worth[1:], worth[0], self.estimator)

    def retrainings(self, task: Task) -> int:
        return self.repeats * (1 + self.subsets)


def regressed(masks: Tensor, worth: Tensor, everything: Tensor, estimator: Estimator) -> Tensor:
    """Weights (Q, N) from masks (M, N), worth (M, Q) and what all examples are worth (Q,)."""
    centre, level = masks.mean(0), worth.mean(0)
    weights = estimator.fit(masks - centre, worth - level)
    absent = 1 - centre
    missing = everything - level - weights @ absent
    return weights + (missing / absent.sum())[:, None]
