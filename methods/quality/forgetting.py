"""Forgetting events: what was learned and lost again while the model was learning."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Method, Problem
from methods.quality.aum import lead
from methods.quality.confidence import judged


@dataclass(frozen=True)
class Forgetting(Method):
    """value(i) = −(how often the model is right at one checkpoint and wrong at the next)    (Toneva et al. 2019, §3)

    Over the T checkpoints that the recipe keeps; the paper looks whenever an example is in a batch. Never right counts
    as T, more than any other. With few checkpoints most rows tie; `model.recipe.checkpoints` is a setting.
    """

    needs = frozenset({"labels", "checkpoints"})

    def value(self, problem: Problem) -> Tensor:
        checkpoints = problem.trajectory().checkpoints
        leads = [judged(problem, problem.model(c.parameters), lead) for c in checkpoints]
        return -forgotten(torch.stack(leads) > 0)


def forgotten(right: Tensor) -> Tensor:
    """Times that `right` (T, N) turns false, T where it is never true: (N,), float64."""
    losses = (right[:-1] & ~right[1:]).sum(0).double()
    return losses.masked_fill(~right.any(0), float(len(right)))
