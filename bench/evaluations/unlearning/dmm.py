"""Matching the outputs that an attribution method predicts for a model without the forget set."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.evaluations.unlearning.base import Context, cycle
from bench.evaluations.unlearning.descend import Draw, FirstOrder, Objective
from bench.evaluations.unlearning.measure import measured
from tasks.base import Examples
from tasks.errors import UserError, require

PREDICTIONS = ("attribution", "nothing", "shuffled", "oracle")


@dataclass(frozen=True)
class Matching(FirstOrder):
    """Minimises E (m(x; θ) − m̂(x))² on F and on `sample` rows of R, m the measurement and m̂ what it is predicted to be
    without F (Georgiev et al. 2024, Attribute-to-delete, §4):

    attribution  m̂(x) = m(x; θ0) − Σ_{i in F} score(x, i): any calibrated method becomes an unlearner
    nothing      m̂ = m(x; θ0), the control that must not forget
    shuffled     the changes of `attribution`, dealt out to other examples: F's among F, R's among R
    oracle       m̂ = m(x; θ*) of a retrained model, an upper bound and no unlearner
    """

    sample: int
    predicted: str

    @property
    def uses(self) -> str | None:
        return "attribute" if self.predicted in ("attribution", "shuffled") else None

    @property
    def calibrated(self) -> bool:
        return self.uses is not None

    @property
    def sees_gold(self) -> bool:
        return self.predicted == "oracle"

    @property
    def changes(self) -> bool:
        return self.predicted != "nothing"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sample >= 1, "unlearner.sample", self.sample, "1 or more")
        if self.predicted not in PREDICTIONS:
            raise UserError("unlearner.predicted", self.predicted, allowed=PREDICTIONS)

    def reads(self, step: int) -> tuple[str, ...]:
        return ("forget",)  # its retained rows are a sample of its own

    def prepared(self, context: Context) -> Objective:
        order = torch.randperm(len(context.retain), generator=context.generator("matched sample"))
        retain = context.retain.select(order[: self.sample])
        forget_to, retain_to = (self.targets(context, part, name)
                                for part, name in ((context.forget, "forget"), (retain, "retain")))  # fmt: skip
        rows = cycle(len(retain), self.batch, context.generator("matched batches"))
        device = context.problem.device

        def objective(model: nn.Module, draw: Draw) -> Tensor:
            index = next(rows)
            context.problem.meter.gradients += len(index)
            parts = ((draw.forget, forget_to[draw.forget_index]), (retain.batch(index).to(device), retain_to[index]))
            return torch.stack(
                [(context.task.measure(model, batch) - to.to(device)).square().mean() for batch, to in parts]
            ).mean()

        return objective

    def targets(self, context: Context, examples: Examples, name: str) -> Tensor:
        """m̂ (n,), in the task's dtype."""
        task = context.task
        if self.predicted == "oracle":
            assert context.retrained is not None
            return measured(task, context.network(context.retrained()), examples).margin.to(task.dtype)
        now = measured(task, context.network(context.start), examples).margin
        if self.predicted == "nothing":
            return now.to(task.dtype)
        change = context.method.attribute(context.problem, examples)[:, list(context.rows)].sum(1).double().cpu()
        if self.predicted == "shuffled":
            change = change[torch.randperm(len(change), generator=context.generator("shuffled", name))]
        return (now - change).to(task.dtype)
