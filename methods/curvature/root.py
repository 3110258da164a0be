"""Columns s with E[s sᵀ] = H, example by example: what every factored or dense curvature is made of.

ggn        (1/N) Σ_i J_iᵀ (∂²ℓ/∂outputs²) J_i, a column for each column of the Hessian's root (Schraudolph 2002, eq. 4);
           the expectation over labels of the Fisher, for softmax cross-entropy and other canonical links
fisher     (1/N) Σ_i g_i g_iᵀ at labels drawn from the model, one draw an example
empirical  (1/N) Σ_i g_i g_iᵀ at the training labels: another matrix, not an approximation of the others
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from methods.base import Problem, Unsupported
from methods.gradients.per_example import Factors
from methods.gradients.source import Source
from tasks.errors import UserError
from tasks.objectives.language_model import NO_TARGET

ROOTED = ("ggn", "fisher", "empirical")


def require_matrix(matrix: str, allowed: Sequence[str]) -> None:
    if matrix not in allowed:
        raise UserError("method.curvature.matrix", matrix, allowed=allowed)


def columns(
    problem: Problem, source: Source, matrix: str, use: str = "", rows: Tensor | None = None
) -> Iterator[tuple[Tensor, list[list[Factors]]]]:
    """Batch after batch: row indices, and for each column its factors. `use` names the draw of labels, `rows` those
    training examples that are asked for (None: all); indices count among them."""
    objective, examples = problem.task.objective, problem.train
    if matrix == "fisher":  # an example's draw stands where its label stood, whichever batch it is in
        uniforms = torch.rand(examples.targets.shape, generator=problem.generator("fisher", use), dtype=torch.float64)
        if not examples.targets.is_floating_point():
            uniforms = uniforms.masked_fill(examples.targets == NO_TARGET, torch.nan)
        examples = replace(examples, targets=uniforms)
    examples = examples if rows is None else examples.select(rows)
    if matrix == "ggn":
        rank(problem, source, matrix)  # whether there is a root
        stream = source.columns(examples)
    elif matrix == "empirical":
        stream = ((index, [found]) for index, found in source.gradients(examples, objective.loss))
    else:

        def loss(outputs: Tensor, uniforms: Tensor) -> Tensor:
            return objective.loss(outputs, objective.sample(outputs.detach(), uniforms))

        stream = ((index, [found]) for index, found in source.gradients(examples, loss))
    free = matrix == "empirical" and source.made(examples, objective.loss) == 0  # they lie on disk
    for index, found in stream:
        problem.meter.gradients += 0 if free else len(index) * len(found)
        yield index, found


def rank(problem: Problem, source: Source, matrix: str) -> int:
    """Columns of one example. Raises `Unsupported` where the objective has no root."""
    if matrix != "ggn":
        return 1

    def asked() -> int:
        parameter = next(source.model.parameters())
        one = problem.train.batch([0]).to(parameter.device, parameter.dtype)
        with torch.no_grad():
            try:
                return problem.task.objective.hessian_root(problem.task.outputs(source.model, one)).shape[-1]
            except NotImplementedError:
                return 0

    found = problem.once(("rank", source.covered), asked)
    if not found:
        raise Unsupported(
            f"task={problem.task.name} has too many outputs for the columns of matrix=ggn: products with it "
            "(method=cg) and the matrices fisher and empirical are possible"
        )
    return found


def has_columns(problem: Problem, source: Source, matrix: str) -> bool:
    """Whether `columns` of this matrix can be asked for."""
    try:
        return rank(problem, source, matrix) > 0
    except Unsupported:
        return False
