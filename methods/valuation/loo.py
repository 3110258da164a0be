"""Leave-one-out: train again without the example."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem
from methods.valuation.utility import Valuation
from tasks.base import Examples, Task
from tasks.training.plan import leave_out


@dataclass(frozen=True)
class LOO(Valuation):
    """score(q, i) = v(D, q) − v(D∖{i}, q)    (Cook 1977, the deletion of one case)

    N + 1 trainings a repeat; only rows that are looked at are left out (`Problem.wanted`). Without i the batches are
    drawn from N − 1 rows and so are others: where batches are part of the training, that noise is as large as most
    effects, and only repeats average it out.
    """

    calibrated = True

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        n = len(problem.train)
        rows = list(range(n) if problem.wanted is None else problem.wanted)
        masks = torch.cat([torch.ones(1, n, dtype=torch.float64), leave_out(n, [[i] for i in rows], 0.0)])
        worth = self.worth(problem, masks, queries)
        scores = torch.zeros(len(queries), n, dtype=torch.float64)
        scores[:, rows] = (worth[0] - worth[1:]).T
        return scores

    def retrainings(self, task: Task) -> int:
        return self.repeats * (1 + len(task.train))
