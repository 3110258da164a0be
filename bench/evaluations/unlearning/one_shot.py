"""Unlearners that take one step along one direction: they can be compared at equal forgetting."""

from dataclasses import dataclass

from bench.evaluations.unlearning.base import POINTS, Context, Parameters, Unlearned, Unlearner, moved
from tasks.errors import require


@dataclass(frozen=True)
class OneShot(Unlearner):
    """θ0 + `scale` · d. Its path is the straight line, in equal parts."""

    scale: float

    def __post_init__(self) -> None:
        require(self.scale > 0, "unlearner.scale", self.scale, "above 0")

    def direction(self, context: Context) -> Parameters:
        """d, by parameter."""
        raise NotImplementedError

    def unlearn(self, context: Context) -> Unlearned:
        direction, steps = self.direction(context), range(1, POINTS)
        ends = [context.allowed(moved(context.start, direction, self.scale * k / (POINTS - 1))) for k in steps]
        return Unlearned(((0, context.start), *zip(steps, ends, strict=True)), direction=direction)
