"""What training on changed data does to the accuracy on the test split."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.evaluations.agreement import seed_of
from bench.evaluations.base import Case, Metric, NotApplicable
from bench.statistics import Array, bootstrap_parts
from tasks.base import Examples, Task
from tasks.training.plan import Plan, planned
from tasks.training.predictions import classes_of, margins, per_class


def need_classes(task: Task, what: str) -> None:
    if task.train.targets.is_floating_point():
        raise NotApplicable(f"{what} needs class labels")


def kept(n: int, without: list[list[int]], seed: int, name: str) -> Plan:
    """A training for each group of rows that is left out; the r-th has the r-th seed of the regime `common`."""
    weights = torch.ones(len(without), n, dtype=torch.float64)
    for row, group in zip(weights, without, strict=True):
        row[group] = 0
    seeds = planned(weights[:1], len(without), "common", seed, 0, name).seeds
    return Plan(weights, seeds, own_batches=True)


def predictions(case: Case, name: str, plan: Plan, examples: Examples, task: Task) -> np.ndarray:
    """Predicted classes (M, n) of these examples after each training of the plan."""
    classes = classes_of(task)
    asked = replace(task, splits={**task.splits, "query": per_class(examples, torch.arange(classes))})
    return margins(case.retrain(name, plan, asked)["query"], classes).argmax(-1)


def right(case: Case, name: str, plan: Plan, task: Task) -> Array:
    """1 where a test row is answered rightly, (M, T)."""
    test = case.task.splits["test"]
    return (predictions(case, name, plan, test, task) == test.targets.numpy()).astype(float)


def gain(one: Array, other: Array, truth: dict[str, Any], nan: int = 0, better: str | None = "higher") -> Metric:
    """Mean of `one` − `other` (repeats, T), which share a repeat's seed; bootstrap over repeats × test rows."""
    difference = one - other
    return Metric(
        value=float(difference.mean()),
        replicates=bootstrap_parts(difference, difference, "mean", seed_of(truth)),
        n=difference.shape[1],
        truth=truth,
        nan=nan,
        better=better,
    )
