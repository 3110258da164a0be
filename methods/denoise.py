"""The explained run is asked several times on its way, and its answers smoothed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem, until
from methods.wrapper import Wrapper
from tasks.base import Examples, Task
from tasks.errors import UserError, require

SMOOTHINGS = ("mean", "exponential")


@dataclass(frozen=True)
class Denoise(Wrapper):
    """score = Σ_c w_c score_c of the base method at the last `last` checkpoints of the explained run (null: all of
    them), w summing to 1: `mean` equal weights, `exponential` w_c ∝ decay^(C − c), the end counts most.

    The denoising of DDA (Wu et al. 2024), whose formula is known at second hand only.
    """

    last: int | None
    smoothing: str
    decay: float

    def __post_init__(self) -> None:
        require(self.last is None or self.last >= 1, "method.last", self.last, "1 or more, or null for all checkpoints")
        if self.smoothing not in SMOOTHINGS:
            raise UserError("method.smoothing", self.smoothing, allowed=SMOOTHINGS)
        require(0 < self.decay <= 1, "method.decay", self.decay, "0 < decay <= 1")

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        asked = [(w, self.base.attribute(at, queries)) for w, at in self._states(problem)]
        return torch.stack([w * scores for w, scores in asked]).sum(0)

    def value(self, problem: Problem) -> Tensor:
        return torch.stack([w * self.base.value(at) for w, at in self._states(problem)]).sum(0)

    def _states(self, problem: Problem) -> list[tuple[float, Problem]]:
        """Weight and problem of each checkpoint, the end itself first."""
        there = len(problem.trajectory().checkpoints)
        count = there if self.last is None else min(self.last, there)
        weights = [1.0 if self.smoothing == "mean" else self.decay**age for age in range(count)]
        states = [problem, *(problem.at(until(there - 1 - age), "checkpoint", age) for age in range(1, count))]
        return [(w / sum(weights), state) for w, state in zip(weights, states, strict=True)]

    def unmet(self, task: Task) -> str | None:
        if self.last is not None and self.last > task.recipe.checkpoints:
            raise UserError(
                "method.last",
                self.last,
                f"is above the {task.recipe.checkpoints} checkpoints that model={task.model} keeps",
                hint="raise model.recipe.checkpoints or take null for all",
            )
        return super().unmet(task)
