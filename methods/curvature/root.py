"""Columns s with E[s sᵀ] = H, example by example: what every factored or dense curvature is made of.

ggn        (1/N) Σ_i J_iᵀ (∂²ℓ/∂outputs²) J_i, a column for each column of the Hessian's root (Schraudolph 2002, eq. 4);
           the expectation over labels of the Fisher, for softmax cross-entropy and other canonical links
fisher     (1/N) Σ_i g_i g_iᵀ at labels drawn from the model, one draw an example
empirical  (1/N) Σ_i g_i g_iᵀ at the training labels: another matrix, not an approximation of the others
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from methods.base import Problem
from methods.gradients.per_example import Factors
from methods.gradients.source import Source
from tasks.base import Examples
from tasks.errors import UserError

ROOTED = ("ggn", "fisher", "empirical")


def require_matrix(matrix: str, allowed: Sequence[str]) -> None:
    if matrix not in allowed:
        raise UserError("method.curvature.matrix", matrix, allowed=allowed)


def columns(
    problem: Problem, source: Source, matrix: str, use: str = "", examples: Examples | None = None
) -> Iterator[tuple[Tensor, list[list[Factors]]]]:
    """Batch after batch: row indices, and for each column its factors. `use` names the draw of labels."""
    examples = problem.train if examples is None else examples
    if matrix == "ggn":
        stream = source.columns(examples)
    else:
        objective, rng = problem.task.objective, problem.generator("fisher", use)

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            if matrix == "fisher":
                targets = objective.sample(outputs.detach().cpu(), rng).to(outputs.device)
            return objective.loss(outputs, targets)

        stream = ((index, [found]) for index, found in source.gradients(examples, loss))
    for index, found in stream:
        problem.meter.gradients += len(index) * len(found)
        yield index, found


def rank(problem: Problem, source: Source, matrix: str) -> int:
    """Columns of one example."""
    if matrix != "ggn":
        return 1

    def asked() -> int:
        parameter = next(source.model.parameters())
        one = problem.train.batch([0]).to(parameter.device, parameter.dtype)
        with torch.no_grad():
            return problem.task.objective.hessian_root(problem.task.outputs(source.model, one)).shape[-1]

    return problem.once(("rank", source.covered), asked)
