"""A cheap look first: only the training examples that a retrieval method finds are scored by the method itself."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from methods.base import Meter, Method, Problem, Unsupported
from methods.wrapper import Wrapper
from tasks.base import Examples, Task
from tasks.errors import require


@dataclass(frozen=True)
class Prefilter(Wrapper):
    """score(q, i) of the base method for the `top` training examples of largest |score| by `filter`, 0 for all others
    (Grosse et al. 2023, §3.2, with TF-IDF).

    Influence functions then take the gradients of candidates alone in their last pass; curvature is still that of all.
    `recall` k: the share of a query's k largest scores of the whole training set that are among its candidates, which
    takes the scores of all, without charge (null: not asked).
    """

    filter: Method
    top: int
    recall: int | None = 10

    def __post_init__(self) -> None:
        require(self.top >= 1, "method.top", self.top, "1 or more")
        require(self.recall is None or self.recall >= 1, "method.recall", self.recall, "1 or more, or null")

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        chosen = self._candidates(problem, queries)
        scores = self.base.attribute(problem.within(chosen.unique().tolist()), queries)
        return torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))

    def value(self, problem: Problem) -> Tensor:
        raise Unsupported("a prefilter looks for what a query needs: a value has none")

    def report(self, problem: Problem, queries: Examples) -> dict[str, Tensor]:
        if self.recall is None:
            return {}
        k = min(self.recall, len(problem.train))
        best = self.base.attribute(replace(problem, meter=Meter()), queries).topk(k, 1).indices
        among = (best[..., None] == self._candidates(problem, queries)[:, None]).any(-1)
        return {f"prefilter_recall{k}": among.double().mean(1)}

    def unmet(self, task: Task) -> str | None:
        return super().unmet(task) or self.filter.unmet(task)

    def _candidates(self, problem: Problem, queries: Examples) -> Tensor:
        """Rows (Q, top)."""
        found = self.filter.attribute(problem, queries).abs()
        return found.topk(min(self.top, len(problem.train)), 1).indices
