"""LESS: which examples would Adam follow to where the query wants to go."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Method, Problem
from methods.gradients.adam import adam
from methods.gradients.blocks import blocks_of, with_rows_in_use
from methods.gradients.per_example import flat, plain
from methods.gradients.source import Source
from tasks.base import Examples


@dataclass(frozen=True)
class LESS(Method):
    """score(q, i) = −Σ_c η_c cos(∇m_c(q), Γ_c(i))          (Xia et al. 2024, definition 3.1)

    Γ_c(i) is the direction of Adam's next step at checkpoint c on example i alone, its running means included; for
    other optimizers Γ = ∇ℓ_c(i). η_c sums the learning rates of the steps that end at c. Gradients as they are: the
    paper's random projection to 8,192 numbers saves disk and approximates this. Order only.
    """

    modules: tuple[str, ...] | None = None
    needs = frozenset({"checkpoints"})

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        task = problem.task
        scores = torch.zeros(len(queries), len(problem.train), dtype=torch.float64)
        for checkpoint in problem.trajectory().checkpoints:
            model = problem.model(checkpoint.parameters)
            # Adam also moves rows that an example does not look up, and a query's norm needs those that only it does.
            blocks = with_rows_in_use(task, model, blocks_of(model, self.modules), [problem.train, queries])
            source = Source(task, model, tuple(blocks))
            asked = flat(source.collected(queries, task.objective.measure))
            asked = asked / asked.norm(dim=1, keepdim=True).clamp_min(torch.finfo(asked.dtype).tiny)
            problem.meter.gradients += len(queries)
            state = adam(blocks, checkpoint, task.recipe, asked) if checkpoint.moments is not None else None
            for index, found in source.gradients(problem.train, task.objective.loss):
                problem.meter.gradients += len(index)
                gradients = [g.dense() for g in plain(found)]
                directions = gradients if state is None else state.directions(gradients)
                moved = torch.cat([d.flatten(1) for d in directions], 1)
                lengths = moved.norm(dim=1).clamp_min(torch.finfo(moved.dtype).tiny)
                scores[:, index] -= checkpoint.path * (asked @ moved.T / lengths).double().cpu()
        return scores
