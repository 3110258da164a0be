"""What all first-order unlearners share: mini-batches of F and of R, Adam from θ0, a mask after every step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.evaluations.unlearning.base import Context, Unlearned, Unlearner, cycle, kept_steps, state_of
from tasks.base import Batch
from tasks.errors import require


@dataclass(frozen=True)
class Draw:
    """The batches of one step: rows of F and of R, by their places there."""

    step: int
    forget: Batch
    retain: Batch
    forget_index: Tensor
    retain_index: Tensor


Objective = Callable[[nn.Module, Draw], Tensor]  # the loss of one step


@dataclass(frozen=True)
class FirstOrder(Unlearner):
    """Minimises `objective` from θ0 by AdamW (decay `weight_decay`, decoupled) with `batch` rows of F and as many of R
    a step."""

    steps: int
    lr: float
    batch: int
    weight_decay: float

    sides: ClassVar[int] = 1  # of objectives that take turns, each with moments of its own

    def side(self, step: int) -> int:
        """Whose turn it is."""
        return 0

    def reads(self, step: int) -> tuple[str, ...]:
        """Which of its two batches the objective uses; the other costs no gradient."""
        return ("forget", "retain")

    def __post_init__(self) -> None:
        require(self.steps >= 1, "unlearner.steps", self.steps, "1 or more")
        require(self.batch >= 1, "unlearner.batch", self.batch, "1 or more")
        require(self.lr > 0, "unlearner.lr", self.lr, "above 0")
        require(self.weight_decay >= 0, "unlearner.weight_decay", self.weight_decay, "0 or more")

    def prepared(self, context: Context) -> Objective:
        """The loss of a step; whatever is computed once is computed here."""
        raise NotImplementedError

    def unlearn(self, context: Context) -> Unlearned:
        objective, device = self.prepared(context), context.problem.device
        model = context.network(context.start)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        weights, decay = list(named.values()), self.weight_decay
        updates = [torch.optim.AdamW(weights, lr=self.lr, weight_decay=decay) for _ in range(self.sides)]
        forget, retain, path = context.forget, context.retain, [(0, context.start)]
        forget_rows = cycle(len(forget), self.batch, context.generator("forget batches"))
        retain_rows = cycle(len(retain), self.batch, context.generator("retain batches"))
        for step in range(1, self.steps + 1):
            f, r = next(forget_rows), next(retain_rows)
            draw = Draw(step, forget.batch(f).to(device), retain.batch(r).to(device), f, r)
            model.zero_grad(set_to_none=True)
            objective(model, draw).backward()
            updates[self.side(step)].step()
            restore(context, named)
            read = self.reads(step)
            context.problem.meter.gradients += len(f) * ("forget" in read) + len(r) * ("retain" in read)
            if step in kept_steps(self.steps):
                path.append((step, state_of(model)))
        return Unlearned(tuple(path))


def restore(context: Context, named: dict[str, nn.Parameter]) -> None:
    """Puts back, in place, what the mask does not allow to move."""
    if context.mask is None:
        return
    with torch.no_grad():
        for name, value in context.allowed({name: p.detach().cpu() for name, p in named.items()}).items():
            named[name].copy_(value)
