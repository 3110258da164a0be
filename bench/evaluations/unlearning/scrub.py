"""A student that disobeys its teacher on the forget set and obeys it elsewhere."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.evaluations.unlearning.base import Context
from bench.evaluations.unlearning.descend import Draw, FirstOrder, Objective
from bench.evaluations.unlearning.measure import divergence, predictions
from tasks.base import Batch, Task
from tasks.errors import require


def distilled(task: Task, teacher: nn.Module, student: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """T² E KL(teacher; student) of the softened predictions, (): 0, and without gradient, where they agree."""
    with torch.no_grad():
        given = predictions(task.outputs(teacher, batch), batch.targets)[0]
    said = predictions(task.outputs(student, batch), batch.targets)[0]
    soft = [(logits / temperature).log_softmax(-1) for logits in (given, said)]
    return temperature**2 * divergence(soft[0], soft[1]).mean()


@dataclass(frozen=True)
class SCRUB(FirstOrder):
    """Alternately minimises γ L_R + α KL(teacher; student) on R and −KL(teacher; student) on F, softened by
    `temperature`, θ0 the teacher (Kurmanji et al. 2023, SCRUB): γ `loss_weight`, α `teacher_weight`. F has the even
    steps of the first `forget_share` of them.

    At θ0 the divergence has no gradient: what starts the ascent is the first step on R. Each side has moments of its
    own: in common ones the loss would drown a divergence that is still small.
    """

    sides: ClassVar[int] = 2

    loss_weight: float
    teacher_weight: float
    temperature: float
    forget_share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.forget_share <= 1, "unlearner.forget_share", self.forget_share, "0 < share <= 1")
        require(self.temperature > 0, "unlearner.temperature", self.temperature, "above 0")

    def side(self, step: int) -> int:
        return int(step % 2 == 0 and step <= self.forget_share * self.steps)

    def reads(self, step: int) -> tuple[str, ...]:
        return ("forget",) if self.side(step) else ("retain",)

    def prepared(self, context: Context) -> Objective:
        teacher = context.network(context.start).requires_grad_(False)

        def objective(model: nn.Module, draw: Draw) -> Tensor:
            if self.side(draw.step) == 1:
                return -distilled(context.task, teacher, model, draw.forget, self.temperature)
            kept = distilled(context.task, teacher, model, draw.retain, self.temperature)
            return self.loss_weight * context.task.loss(model, draw.retain).mean() + self.teacher_weight * kept

        return objective
