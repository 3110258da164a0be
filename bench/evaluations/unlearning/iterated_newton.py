"""Newton steps with a trust region, until a declared forget loss is reached."""

from dataclasses import dataclass
from typing import Any

from bench.evaluations.base import Unfit
from bench.evaluations.unlearning.base import Context, Parameters, Unlearned, Unlearner, flat, moved
from bench.evaluations.unlearning.gradients import combined, mean_gradient
from bench.evaluations.unlearning.influence import damped
from bench.evaluations.unlearning.measure import losses, strangers, tokens
from tasks.base import Examples
from tasks.errors import require


@dataclass(frozen=True)
class IteratedNewton(Unlearner):
    """θ ← θ + d, d = (H_R(θ) + γI + λI)⁻¹ (c g_F(θ) − g_R(θ)), ‖d‖ ≤ `radius`, at most `steps` times, until the mean
    loss of F (nats a token) is at `target`; g_F the mean gradient of F, g_R that of R's objective, ½γ‖θ‖² included; c
    is `push`.

    `target` null: what θ0 loses on examples that it never saw (half of them, the other half judges). It is no gold: a
    retrained model may lose more or less on F, where F is no random set most of all.
    """

    steps: int
    push: float
    radius: float
    target: float | None
    damping: Any

    @property
    def uses(self) -> str | None:
        return "solve"

    def __post_init__(self) -> None:
        require(self.steps >= 1, "unlearner.steps", self.steps, "1 or more")
        require(self.push > 0, "unlearner.push", self.push, "above 0")
        require(self.radius > 0, "unlearner.radius", self.radius, "above 0")
        require(self.target is None or self.target > 0, "unlearner.target", self.target, "above 0, or null")

    def unlearn(self, context: Context) -> Unlearned:
        method, now = damped(context.method, self.damping), context.start
        target = self.target if self.target is not None else loss_of(context, now, strangers(context.task)[0])
        forget, retain, path = context.forget, context.retain, [(0, now)]
        if (lost := loss_of(context, now, forget)) >= target:
            raise Unfit(f"unlearner={self.name}: the forget loss {lost:.3g} is at its target {target:.3g} already")
        for step in range(1, self.steps + 1):
            if loss_of(context, now, forget) >= target:
                break
            g_f, g_r = mean_gradient(context, now, forget), mean_gradient(context, now, retain)
            vector = combined((self.push, g_f), (-1.0, g_r), (-context.task.recipe.l2, now))
            direction = method.solve(context.at(now, step), vector, [forget])
            now = context.allowed(moved(now, direction, clipped(direction, self.radius)))
            path.append((step, now))
        reached = loss_of(context, now, forget)
        return Unlearned(tuple(path), {"target": target, "reached": bool(reached >= target)})


def clipped(direction: Parameters, radius: float) -> float:
    """The factor that brings a direction into the trust region."""
    return min(1.0, radius / max(float(flat(direction).double().norm()), 1e-300))


def loss_of(context: Context, parameters: Parameters, examples: Examples) -> float:
    """Mean loss, nats a token."""
    found = losses(context.task, context.network(parameters), examples)
    return float((found / tokens(examples.targets)).mean())
