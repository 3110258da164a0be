"""Self-influence alone, of any method that has one: how much an example props up itself."""

from dataclasses import dataclass

from torch import Tensor

from methods.base import Method, Problem
from tasks.base import Task


@dataclass(frozen=True)
class SelfInfluence(Method):
    """value(i) of the base method; no query is scored."""

    base: Method

    def value(self, problem: Problem) -> Tensor:
        return self.base.value(problem)

    def unmet(self, task: Task) -> str | None:
        return self.base.unmet(task)

    def inputs(self) -> dict[str, str]:
        return self.base.inputs()
