"""Area under the margin: how clearly the label led while the model was learning."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Method, Problem
from methods.quality.confidence import judged


@dataclass(frozen=True)
class AreaUnderMargin(Method):
    """value(i) = (1/T) Σ_t (z_y(t) − max_{c ≠ y} z_c(t)), in logits    (Pleiss et al. 2020, eq. 1 and 2)

    Over the T checkpoints that the recipe keeps, in eval mode; the paper's mean is over all epochs, as the training
    pass met the example. Its threshold, from rows given to a class that does not exist, needs another training: here
    is the ranking only.
    """

    needs = frozenset({"labels", "checkpoints"})

    def value(self, problem: Problem) -> Tensor:
        checkpoints = problem.trajectory().checkpoints
        return torch.stack([judged(problem, problem.model(c.parameters), lead) for c in checkpoints]).mean(0)


def lead(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y − max_{c ≠ y} z_c, (B,)."""
    chosen = labels[:, None]
    return logits.gather(-1, chosen)[:, 0] - logits.scatter(-1, chosen, -torch.inf).amax(-1)
