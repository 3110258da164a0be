"""Gradient ascent on the forget set, alone or with descent on the retained rows."""

from dataclasses import dataclass

from torch import Tensor, nn

from bench.evaluations.unlearning.base import Context
from bench.evaluations.unlearning.descend import Draw, FirstOrder, Objective


@dataclass(frozen=True)
class GradientAscent(FirstOrder):
    """Minimises −L_F (Jang et al. 2023, Knowledge unlearning). Nothing keeps the rest: it collapses in the end."""

    def reads(self, step: int) -> tuple[str, ...]:
        return ("forget",)

    def prepared(self, context: Context) -> Objective:
        return lambda model, draw: -context.task.loss(model, draw.forget).mean()


@dataclass(frozen=True)
class GradDiff(FirstOrder):
    """Minimises −γ L_F + α L_R (Maini et al. 2024, TOFU, §3: gradient difference): γ `forget_weight`, α
    `retain_weight`."""

    forget_weight: float
    retain_weight: float

    def prepared(self, context: Context) -> Objective:
        def objective(model: nn.Module, draw: Draw) -> Tensor:
            forget, retain = context.task.loss(model, draw.forget), context.task.loss(model, draw.retain)
            return self.retain_weight * retain.mean() - self.forget_weight * forget.mean()

        return objective


@dataclass(frozen=True)
class FineTune(FirstOrder):
    """Minimises L_R: the control that must barely forget."""

    def reads(self, step: int) -> tuple[str, ...]:
        return ("retain",)

    def prepared(self, context: Context) -> Objective:
        return lambda model, draw: context.task.loss(model, draw.retain).mean()
