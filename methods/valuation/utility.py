"""What a subset of the training examples is worth: the game that every valuation by retraining plays."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from methods.base import Method, Problem, Unsupported
from methods.loss_covariance import observed
from tasks.base import Examples, named_seed
from tasks.errors import require
from tasks.training.plan import Plan


@dataclass(frozen=True)
class Valuation(Method):
    """v(S, q) = (1/R) Σ_r m_q(θ_r(S)), in units of the measurement

    θ_r(S): trained on the examples of S alone, with the r-th of R = `repeats` seeds, which all subsets share. The seeds
    belong to the method: no truth and no explained training has them. Nothing can be trained on no example: v(∅, q) is
    the mean measurement of the initial models θ0 of the same seeds.
    """

    repeats: int
    needs = frozenset({"retraining"})

    def __post_init__(self) -> None:
        require(self.repeats >= 1, "method.repeats", self.repeats, "1 or more")

    def value(self, problem: Problem) -> Tensor:
        """Mean score for the validation split, as these methods judge an example without a query."""
        val = problem.task.splits["val"]
        if not len(val):
            raise Unsupported("a value is a mean over val, which is empty")
        return self.attribute(problem, val).mean(0)

    def worth(self, problem: Problem, masks: Tensor, examples: Examples) -> Tensor:
        """v of each subset, masks (S, N) of 0 and 1 -> (S, Q)."""
        seeds = [named_seed("valuation", problem.seed, *problem.where, r) for r in range(self.repeats)]
        found = torch.empty(len(masks), len(examples), dtype=torch.float64)
        empty = masks.sum(1) == 0
        if not empty.all():
            kept = masks[~empty].double()
            plan = Plan(kept.repeat(len(seeds), 1), tuple(s for s in seeds for _ in kept), own_batches=True)
            found[~empty] = problem.retrained(plan, examples).unflatten(0, (len(seeds), -1)).mean(0)
        if empty.any():
            found[empty] = self._untrained(problem, seeds, examples)
        return found

    def _untrained(self, problem: Problem, seeds: list[int], examples: Examples) -> Tensor:
        """v(∅), (Q,)."""
        models = (problem.task.initial(seed).to(problem.device) for seed in seeds)
        return torch.stack([observed(problem, model, examples, problem.task.measure) for model in models]).mean(0)


def design_seed(problem: Problem, name: str) -> int:
    """Of a method's own random design, which no truth draws."""
    return named_seed("valuation", problem.seed, *problem.where, name)


def rows_by_id(train: Examples) -> np.ndarray:
    """Rows (N,) sorted by their ids. Designs are drawn over these places: another order of the rows changes nothing."""
    return np.argsort(np.asarray(train.ids), kind="stable")


def placed(masks: Tensor, train: Examples) -> Tensor:
    """Masks (S, N) over places as masks over rows."""
    found = torch.empty_like(masks)
    found[:, torch.as_tensor(rows_by_id(train))] = masks
    return found
