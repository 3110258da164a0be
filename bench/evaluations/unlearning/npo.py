"""Negative preference optimisation: the forget set as answers that are only ever the worse ones."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from bench.evaluations.unlearning.base import Context
from bench.evaluations.unlearning.descend import Draw, FirstOrder, Objective
from bench.evaluations.unlearning.measure import losses, tokens
from tasks.errors import require


def npo_loss(nll: Tensor, reference: Tensor, beta: float) -> Tensor:
    """−(2/β) E log σ(β (NLL − NLL_ref)), NLL (B,) in nats summed over a sequence (Zhang et al. 2024, eq. 3).

    Its gradient is that of gradient ascent times W = 2 / (1 + exp(β (NLL − NLL_ref))) of each sequence: 1 at the
    reference and for β → 0, falling as a sequence is forgotten. β is in units of 1/NLL: 0.1 suits answers of a hundred
    tokens, short ones need 1 to 2.
    """
    return -(2 / beta) * logsigmoid(beta * (nll - reference)).mean()


def simnpo_loss(nll: Tensor, lengths: Tensor, beta: float, delta: float) -> Tensor:
    """−(2/β) E log σ(β NLL/n_y − δ), n_y (B,) tokens; no reference (Fan et al. 2024, SimNPO)."""
    return -(2 / beta) * logsigmoid(beta * nll / lengths - delta).mean()


@dataclass(frozen=True)
class NPO(FirstOrder):
    """Minimises `npo_loss` on F + α L_R, the reference being θ0."""

    beta: float
    retain_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, "unlearner.beta", self.beta, "above 0")

    def prepared(self, context: Context) -> Objective:
        reference = losses(context.task, context.network(context.start), context.forget)

        def objective(model: nn.Module, draw: Draw) -> Tensor:
            nll = context.task.loss(model, draw.forget)
            forget = npo_loss(nll, reference[draw.forget_index].to(nll), self.beta)
            return forget + self.retain_weight * context.task.loss(model, draw.retain).mean()

        return objective


@dataclass(frozen=True)
class SimNPO(FirstOrder):
    """Minimises γ `simnpo_loss` on F + α L_R."""

    beta: float
    delta: float
    forget_weight: float
    retain_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, "unlearner.beta", self.beta, "above 0")

    def prepared(self, context: Context) -> Objective:
        def objective(model: nn.Module, draw: Draw) -> Tensor:
            nll, lengths = context.task.loss(model, draw.forget), tokens(draw.forget.targets)
            forget = simnpo_loss(nll, lengths.to(nll), self.beta, self.delta)
            return self.forget_weight * forget + self.retain_weight * context.task.loss(model, draw.retain).mean()

        return objective
