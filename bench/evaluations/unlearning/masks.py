"""Where an update may move: weights chosen by gradients, as many at random, or all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.evaluations.unlearning.base import Context, Parameters, flat
from bench.evaluations.unlearning.gradients import mean_gradient
from tasks.errors import UserError, require


@dataclass(frozen=True)
class Mask:
    """Keeps `density` of the coordinates whose forget gradient is not zero: of all of them it would be nearly every one
    that could move at all, where embeddings have rows that F never looks up."""

    name: str
    density: float

    def __post_init__(self) -> None:
        require(0 < self.density < 1, "mask.density", self.density, "0 < density < 1; mask=none lets every weight move")

    def saliency(self, context: Context, forget: Parameters) -> Parameters:
        """The larger, the sooner kept; `forget` is ∇L_F(θ0)."""
        raise NotImplementedError

    def fit(self, context: Context) -> Parameters:
        """True where a weight may move, by parameter."""
        forget = mean_gradient(context, context.start, context.forget)
        live = flat(forget) != 0
        number = round(self.density * int(live.sum()))
        if not 0 < number < int(live.sum()):
            what = "nothing" if number == 0 else "everything"
            raise UserError(
                "mask.density", self.density, f"keeps {what} of {int(live.sum())} weights", allowed="one between"
            )
        saliency = torch.where(live, flat(self.saliency(context, forget)).double(), -torch.inf)
        kept = torch.zeros_like(live)
        kept[torch.argsort(saliency, descending=True, stable=True)[:number]] = True
        return unflat(kept, forget)


@dataclass(frozen=True)
class RandomMask(Mask):
    """Any, each as likely: the control of the others."""

    def saliency(self, context: Context, forget: Parameters) -> Parameters:
        rng = context.generator("random mask")
        return {name: torch.rand(g.shape, generator=rng, dtype=torch.float64) for name, g in sorted(forget.items())}


@dataclass(frozen=True)
class SalUnMask(Mask):
    """|∇L_F(θ0)| (Fan et al. 2024, SalUn)."""

    def saliency(self, context: Context, forget: Parameters) -> Parameters:
        return {name: g.abs() for name, g in forget.items()}


@dataclass(frozen=True)
class WAGLEMask(Mask):
    """|(θ0 − ∇L_R/μ) ⊙ ∇L_F|, mean gradients (Jia et al. 2024, WAGLE). With a small μ the first term is inert:
    the product of the two gradients is left."""

    mu: float

    def saliency(self, context: Context, forget: Parameters) -> Parameters:
        retain = mean_gradient(context, context.start, context.retain)
        return {
            name: ((context.start[name].double() - retain[name].double() / self.mu) * g.double()).abs()
            for name, g in forget.items()
        }


@dataclass(frozen=True)
class NoMask:
    """Every weight may move."""

    name: str

    def fit(self, context: Context) -> None:
        return None


def unflat(values: Tensor, like: Parameters) -> Parameters:
    """The inverse of `flat`."""
    names = sorted(like)
    parts = values.split([like[name].numel() for name in names])
    return {name: part.reshape(like[name].shape) for name, part in zip(names, parts, strict=True)}
