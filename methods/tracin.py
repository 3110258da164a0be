"""TracIn: the optimizer's path, step by step, as a sum of gradient products."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Method, Problem
from methods.gradients.blocks import blocks_of, with_rows_in_use
from methods.gradients.per_example import inner, plain, sum_of_products
from methods.gradients.source import Source
from tasks.base import Examples


@dataclass(frozen=True)
class TracIn(Method):
    """score(q, i) = −(1/N) Σ_c η_c ∇m_c(q)ᵀ ∇ℓ_c(i)    (Pruthi et al. 2020, §3.2, TracInCP)

    Over the checkpoints of the explained run; η_c sums the learning rates of the steps that end at checkpoint c:
    (1/N) η_c is what example i moved in expectation. value(i) = −(1/N) Σ_c η_c ‖∇ℓ_c(i)‖². Momentum and Adam are left
    out, so only the order of the scores counts.
    """

    modules: tuple[str, ...] | None = None
    needs = frozenset({"checkpoints"})

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        scores = torch.zeros(len(queries), len(problem.train), dtype=torch.float64)
        for checkpoint in problem.trajectory().checkpoints:
            source = self._source(problem, checkpoint.parameters)
            measured = source.collected(queries, problem.task.objective.measure)
            problem.meter.gradients += len(queries)
            for index, found in source.gradients(problem.train, problem.task.objective.loss):
                problem.meter.gradients += len(index)
                scores[:, index] -= (
                    checkpoint.path * inner(measured, (f.gradient() for f in found)).double().cpu() / len(problem.train)
                )
        return scores

    def value(self, problem: Problem) -> Tensor:
        values = torch.zeros(len(problem.train), dtype=torch.float64)
        for checkpoint in problem.trajectory().checkpoints:
            source = self._source(problem, checkpoint.parameters)
            for index, found in source.gradients(problem.train, problem.task.objective.loss):
                problem.meter.gradients += len(index)
                g = plain(found)
                values[index] -= checkpoint.path * sum_of_products(g, g).double().cpu() / len(problem.train)
        return values

    def _source(self, problem: Problem, parameters: dict[str, Tensor]) -> Source:
        model = problem.model(parameters)
        blocks = with_rows_in_use(problem.task, model, blocks_of(model, self.modules), [problem.train])
        return Source(problem.task, model, tuple(blocks))
