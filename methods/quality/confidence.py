"""What the explained model says of its own training labels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.base import Method, Problem, require_eval


@torch.no_grad()
def judged(problem: Problem, model: nn.Module, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`of(logits (B, C), labels (B,))` of each training row: (N,), float64."""
    require_eval(model)
    found = torch.empty(len(problem.train), dtype=torch.float64)
    for index in problem.train.batches(256):
        batch = problem.train.batch(index).to(problem.device)
        found[index] = of(problem.task.outputs(model, batch).double(), batch.targets).double().cpu()
    return found


@dataclass(frozen=True)
class Confidence(Method):
    """value(i) = p(y_i | x_i), the probability of the label (self-confidence in Northcutt et al. 2021); ranks as the
    loss does."""

    needs = frozenset({"labels"})

    def value(self, problem: Problem) -> Tensor:
        def of(logits: Tensor, labels: Tensor) -> Tensor:
            return logits.softmax(-1).gather(-1, labels[:, None])[:, 0]

        return judged(problem, problem.model(), of)


@dataclass(frozen=True)
class Entropy(Method):
    """value(i) = Σ_c p_c log p_c, the negative entropy of the model's answer, in nats (Settles 2009, §3.1).

    What the model is unsure of is suspicious. It does not look at the label, so a wrong one that the model has learned
    by heart, or contradicts with certainty, does not show.
    """

    signed = False
    needs = frozenset({"labels"})

    def value(self, problem: Problem) -> Tensor:
        def of(logits: Tensor, labels: Tensor) -> Tensor:
            return torch.special.entr(logits.softmax(-1)).sum(-1).neg()

        return judged(problem, problem.model(), of)


@dataclass(frozen=True)
class Margin(Method):
    """value(i) = z_y − logsumexp(z_c, c ≠ y), the task's own measurement of a training row; ranks as the loss does."""

    needs = frozenset({"labels"})

    def value(self, problem: Problem) -> Tensor:
        return judged(problem, problem.model(), problem.task.objective.measure)
