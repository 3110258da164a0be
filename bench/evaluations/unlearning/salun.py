"""Random labels on the forget set, under a mask of its own."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.evaluations.unlearning.base import Context
from bench.evaluations.unlearning.descend import Draw, FirstOrder, Objective
from bench.evaluations.unlearning.measure import UNSCORED


@dataclass(frozen=True)
class SalUn(FirstOrder):
    """Minimises ℓ(F with labels drawn once from the wrong ones) + α L_R, α `retain_weight` (Fan et al. 2024, SalUn,
    with random labelling). `mask` is its own, used where no other is chosen."""

    retain_weight: float
    mask: Any

    def prepared(self, context: Context) -> Objective:
        first, forget = context.forget.batch([0]).to(context.problem.device), context.forget
        with torch.no_grad():
            classes = context.task.outputs(context.network(context.start), first).shape[-1]
        forget = replace(forget, targets=wrong_labels(forget.targets, classes, context.generator("random labels")))

        def objective(model: nn.Module, draw: Draw) -> Tensor:
            mistaken = forget.batch(draw.forget_index).to(context.problem.device)
            retain = context.task.loss(model, draw.retain).mean()
            return context.task.loss(model, mistaken).mean() + self.retain_weight * retain

        return objective


def wrong_labels(targets: Tensor, classes: int, rng: torch.Generator) -> Tensor:
    """Any label but the true one, each as likely; what is not scored stays so."""
    shift = torch.randint(1, classes, targets.shape, generator=rng)
    return torch.where(targets == UNSCORED, targets, (targets + shift) % classes)
