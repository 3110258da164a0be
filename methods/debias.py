"""What the base model would have answered is taken off: training cannot have taught what was known before."""

from dataclasses import dataclass

from torch import Tensor

from methods.base import Problem, started
from methods.wrapper import Wrapper
from tasks.base import Examples
from tasks.errors import UserError, require

NORMALISATIONS = ("none", "unit")


@dataclass(frozen=True)
class Debias(Wrapper):
    """score = score at the explained model − β · score at θ0, where its training started.

    `normalise`: unit divides each query's scores (all values) by their norm on either side, before β is applied: the
    base model's gradients may be larger by orders. The debiasing of DDA (Wu et al. 2024, formula at second hand only).
    """

    beta: float
    normalise: str

    def __post_init__(self) -> None:
        require(self.beta >= 0, "method.beta", self.beta, "0 or more")
        if self.normalise not in NORMALISATIONS:
            raise UserError("method.normalise", self.normalise, allowed=NORMALISATIONS)

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        return self.beta == 0 and self.normalise == "none" and self.base.calibrated

    @property
    def signed(self) -> bool:  # type: ignore[override]
        return self.beta == 0 and self.base.signed  # what training moved is not what an example is worth

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        scores = self._scaled(self.base.attribute(problem, queries))
        if self.beta == 0:
            return scores
        return scores - self.beta * self._scaled(self.base.attribute(problem.at(started, "base"), queries))

    def value(self, problem: Problem) -> Tensor:
        values = self._scaled(self.base.value(problem))
        return (
            values
            if self.beta == 0
            else values - self.beta * self._scaled(self.base.value(problem.at(started, "base")))
        )

    def _scaled(self, scores: Tensor) -> Tensor:
        return scores if self.normalise == "none" else scores / scores.norm(dim=-1, keepdim=True).clamp_min(1e-300)
