"""Covariance of losses over independent trainings: what falls and rises together was learned together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.base import Method, Problem, require_eval
from tasks.base import Batch, Examples, Task
from tasks.errors import require


@dataclass(frozen=True)
class LossCovariance(Method):
    """score(q, i) = −Cov_k(ℓ_i(θ_k), m_q(θ_k)), value(i) = −Var_k(ℓ_i(θ_k))    (the estimator of Daunce, 2505.23223)

    Over θ_0 … θ_{k−1}, the explained training and k − 1 independent ones: their spread stands for that of a posterior,
    over which −Cov is what the example does to E[m_q] (see bif). Its temperature is unknown, so only the order of the
    scores counts. The paper's models are fine-tunings of one model under perturbed losses; these differ in their seeds.
    """

    k: int

    def __post_init__(self) -> None:
        require(self.k >= 2, "method.k", self.k, "2 or more: one training has no covariance")

    def unmet(self, task: Task) -> str | None:
        if task.recipe.optimizer == "lbfgs":
            return f"needs trainings that differ by their seeds; model={task.model} has one optimum for all"
        return super().unmet(task)

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        losses, measured = self._losses(problem), []
        for k in range(self.k):
            measured.append(observed(problem, self._model(problem, k), queries, problem.task.measure))
        return -covariance(torch.stack(measured), losses)

    def value(self, problem: Problem) -> Tensor:
        return -self._losses(problem).var(0)

    def _losses(self, problem: Problem) -> Tensor:
        """(k, N)."""

        def made() -> Tensor:
            models = (self._model(problem, k) for k in range(self.k))
            return torch.stack([observed(problem, m, problem.train, problem.task.loss) for m in models])

        return problem.once((self, "losses"), made)

    def _model(self, problem: Problem, k: int) -> nn.Module:
        return problem.model(problem.trajectory(k).final)


def covariance(left: Tensor, right: Tensor) -> Tensor:
    """Of the columns over the S rows, unbiased: left (S, Q), right (S, N) -> (Q, N)."""
    return (left - left.mean(0)).T @ (right - right.mean(0)) / (len(left) - 1)


@torch.no_grad()
def observed(
    problem: Problem, model: nn.Module, examples: Examples, of: Callable[[nn.Module, Batch], Tensor]
) -> Tensor:
    """`of(model, batch)`, a loss or a measurement, of each example: (n,), float64, on the CPU."""
    require_eval(model)
    found = torch.empty(len(examples), dtype=torch.float64)
    for index in examples.batches(256):
        found[index] = of(model, examples.batch(index).to(problem.device)).double().cpu()
    return found
