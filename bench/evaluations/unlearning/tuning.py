"""Choosing settings without a look at a gold model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from bench.evaluations.unlearning.base import Context, Parameters, Unlearned, Unlearner
from bench.evaluations.unlearning.measure import Measured, measured, strangers
from bench.evaluations.unlearning.metrics import mia_auc


def points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination; all of them cost the same number of steps."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def criterion(val: Measured, forget: Measured, others: Measured) -> float:
    """Accuracy on the validation split − |AUC(F against non-members) − ½|: what is to stay should stay right, and none
    should tell F from what was never trained on. These non-members are not those that the results are judged by."""
    return float(val.correct.double().mean()) - abs(mia_auc(forget, others) - 0.5)


def tuned(unlearner: Unlearner, context: Context) -> tuple[Unlearner, Unlearned, dict[str, Any]]:
    """The best point of the grid by `criterion`, what it unlearned, and what was tried; the first of equals, and one
    that diverged only where all did."""
    return best_of(unlearner, context, lambda parameters: judged(context, parameters))


def best_of(
    unlearner: Unlearner, context: Context, judge: Callable[[Parameters], float]
) -> tuple[Unlearner, Unlearned, dict[str, Any]]:
    tried: list[dict[str, Any]] = []
    best: tuple[float, Unlearner, Unlearned, dict[str, Any]] | None = None
    for point in points(unlearner.grid):
        one = replace(unlearner, **point)
        found = one.unlearn(context)
        finite = all(torch.isfinite(p).all() for p in found.final.values())
        score = judge(found.final) if finite else -math.inf
        tried.append({**point, "criterion": score if finite else None})
        if best is None or score > best[0]:
            best = score, one, found, point
    assert best is not None  # an empty grid has one point, the settings as they are
    _, one, found, point = best
    return one, found, {"chosen": point, "tried": tried}


def judged(context: Context, parameters: Parameters) -> float:
    model = context.network(parameters)
    sets = (context.task.splits["val"], context.forget, strangers(context.task)[0])
    return criterion(*(measured(context.task, model, examples) for examples in sets))
