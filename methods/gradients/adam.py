"""Adam's view of a gradient: in which direction, and how far, its next step would go."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from methods.gradients.blocks import Block, from_parameters
from tasks.base import Checkpoint, Recipe


@dataclass(frozen=True)
class Adam:
    """Its state by block, each (out, in): running means of gradients and of their squares, after `step` steps."""

    means: tuple[Tensor, ...]
    squares: tuple[Tensor, ...]
    step: int
    betas: tuple[float, float]
    eps: float

    def scales(self) -> list[Tensor]:
        """1/(√v̂ + ε), v̂ = v/(1 − β₂ᵗ): what Adam multiplies its mean gradient with."""
        correction = 1 - self.betas[1] ** self.step
        return [1 / ((v / correction).sqrt() + self.eps) for v in self.squares]

    def directions(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """m̂/(√v̂ + ε) after one more step on the gradient g of each example alone, (B, out, in):
        m = β₁m + (1 − β₁)g, v = β₂v + (1 − β₂)g², m̂ and v̂ corrected for t + 1 steps."""
        (b1, b2), t = self.betas, self.step + 1
        found = []
        for g, m, v in zip(gradients, self.means, self.squares, strict=True):
            mean = (b1 * m + (1 - b1) * g) / (1 - b1**t)
            square = (b2 * v + (1 - b2) * g.square()) / (1 - b2**t)
            found.append(mean / (square.sqrt() + self.eps))
        return found


def adam(blocks: Sequence[Block], checkpoint: Checkpoint, recipe: Recipe, like: Tensor) -> Adam:
    """The state that a checkpoint keeps, on the device and in the dtype of `like`."""
    assert checkpoint.moments is not None
    means, squares = (
        tuple(from_parameters(b, {name: kept[name].to(like) for name in b.parameters}) for b in blocks)
        for kept in checkpoint.moments
    )
    return Adam(means, squares, checkpoint.step, recipe.betas, recipe.eps)
