"""Why this rather than that: the scores of one outcome minus those of another."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from methods.base import Method, Problem
from tasks.base import Examples, Task


@dataclass(frozen=True)
class Contrast(Method):
    """score(q, i) = score((x, y), i) − score((x, y'), i) of the base method, y' the class that the explained model
    finds most probable beside the query's own y.

    A method that is linear in the query's gradient thereby attributes ∇m(x, y) − ∇m(x, y') (the contrast of an error
    with its correction: Pezeshkpour et al. 2022; the twofold cost buys that any method can be contrasted).
    """

    base: Method
    needs = frozenset({"labels"})

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        other = replace(queries, targets=self._runner_up(problem, queries))
        return self.base.attribute(problem, queries) - self.base.attribute(problem, other)

    @torch.no_grad()
    def _runner_up(self, problem: Problem, queries: Examples) -> Tensor:
        model, found = problem.model(), torch.empty_like(queries.targets)
        for index in queries.batches(256):
            batch = queries.batch(index).to(problem.device)
            outputs = problem.task.outputs(model, batch)
            found[index] = outputs.scatter(-1, batch.targets[..., None], -torch.inf).argmax(-1).cpu()
        return found

    def unmet(self, task: Task) -> str | None:
        return super().unmet(task) or self.base.unmet(task)

    def inputs(self) -> dict[str, str]:
        return self.base.inputs()
