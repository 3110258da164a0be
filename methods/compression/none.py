"""No compression: gradients as they are."""

from dataclasses import dataclass

from methods.base import Problem
from methods.gradients.source import Source


@dataclass(frozen=True)
class Uncompressed:
    """Every number of a gradient is kept."""

    def fit(self, problem: Problem, source: Source) -> None:
        return None
