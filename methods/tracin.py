"""TracIn: the optimizer's path, step by step, as a sum of gradient products."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Method, Problem
from methods.gradients.adam import adam
from methods.gradients.blocks import blocks_of, with_rows_in_use
from methods.gradients.per_example import Gradient, inner, plain, sum_of_products
from methods.gradients.source import Source
from tasks.base import Examples, Task
from tasks.errors import UserError

PRECONDITIONERS = ("none", "adam")


@dataclass(frozen=True)
class TracIn(Method):
    """score(q, i) = −(1/N) Σ_c η_c ∇m_c(q)ᵀ D_c ∇ℓ_c(i)    (Pruthi et al. 2020, §3.2, TracInCP, where D = I)

    Over the checkpoints of the explained run; η_c sums the learning rates of the steps that end at checkpoint c:
    (1/N) η_c is what example i moved in expectation. value(i) = −(1/N) Σ_c η_c ∇ℓ_c(i)ᵀ D_c ∇ℓ_c(i).
    `preconditioner`: none, or adam: D_c = diag(1/(√v̂_c + ε)), Adam's own at checkpoint c. Momentum, and what an example
    does to v, are left out, so only the order of the scores counts.
    """

    modules: tuple[str, ...] | None = None
    preconditioner: str = "none"
    needs = frozenset({"checkpoints"})

    def __post_init__(self) -> None:
        if self.preconditioner not in PRECONDITIONERS:
            raise UserError("method.preconditioner", self.preconditioner, allowed=PRECONDITIONERS)

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        scores = torch.zeros(len(queries), len(problem.train), dtype=torch.float64)
        for path, source, scales in self._checkpoints(problem):
            measured = source.collected(queries, problem.task.objective.measure)
            if scales is not None:
                measured = [Gradient(g.block, g.values * d) for g, d in zip(measured, scales, strict=True)]
            problem.meter.gradients += len(queries)
            for index, found in source.gradients(problem.train, problem.task.objective.loss):
                problem.meter.gradients += len(index)
                product = inner(measured, (f.gradient() for f in found)).double().cpu()
                scores[:, index] -= path * product / len(problem.train)
        return scores

    def value(self, problem: Problem) -> Tensor:
        values = torch.zeros(len(problem.train), dtype=torch.float64)
        for path, source, scales in self._checkpoints(problem):
            for index, found in source.gradients(problem.train, problem.task.objective.loss):
                problem.meter.gradients += len(index)
                g = plain(found)
                scaled = g
                if scales is not None:
                    scaled = [Gradient(x.block, x.values * x.of(d), x.columns) for x, d in zip(g, scales, strict=True)]
                values[index] -= path * sum_of_products(scaled, g) / len(problem.train)
        return values

    def _checkpoints(self, problem: Problem) -> Iterator[tuple[float, Source, list[Tensor] | None]]:
        """η_c, the gradients there, and D_c by block."""
        for checkpoint in problem.trajectory().checkpoints:
            model = problem.model(checkpoint.parameters)
            blocks = with_rows_in_use(problem.task, model, blocks_of(model, self.modules), [problem.train])
            source, scales = Source(problem.task, model, tuple(blocks)), None
            if self.preconditioner == "adam":
                like = next(model.parameters())
                scales = adam(blocks, checkpoint, problem.task.recipe, like).scales()
            yield checkpoint.path, source, scales

    def unmet(self, task: Task) -> str | None:
        if self.preconditioner == "adam" and task.recipe.optimizer not in ("adam", "adamw"):
            return f"needs Adam's state, which model={task.model} (trained by {task.recipe.optimizer}) does not have"
        return super().unmet(task)
