"""Distance from a reference: how far an example lies from clean rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem
from methods.representation import Representation
from tasks.base import Examples
from tasks.errors import UserError

REFERENCES = ("val", "query")


@dataclass(frozen=True)
class FromReference(Representation):
    """A method that suspects training rows far from the rows of another split, `reference`, whose labels are clean:
    `val`; or `query`, where those are the validation rows, as in a benchmark of biased preferences.

    Labels are not looked at, so that a wrong one does not show by itself; but where an example is a pair of answers,
    its label says which was preferred, and h is that of the preferred answer − that of the other (Min et al. 2025).
    """

    signed = False
    reference: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference not in REFERENCES:
            raise UserError("method.reference", self.reference, allowed=REFERENCES)

    def compared(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """h of the reference rows (n, d) and of the training rows (N, d)."""
        rows = problem.task.splits[self.reference]
        reference, train = self.of(problem, rows), self.of_train(problem)
        if not problem.task.pairs:
            return reference, train
        return preferred_first(reference, rows), preferred_first(train, problem.train)


def preferred_first(features: Tensor, rows: Examples) -> Tensor:
    """Of first − second, (n, d): that of the preferred answer − that of the other."""
    return torch.where(rows.targets[:, None] == 0, features, -features)
