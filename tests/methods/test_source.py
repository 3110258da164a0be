"""SOURCE: its two limits, the quadratic that it unrolls exactly, and segments that differ."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import close, draw, far, three_classes, vector_task
from torch import Tensor

from methods.base import Problem
from methods.source import SOURCE
from methods.tracin import TracIn
from tasks.base import Examples, Task
from tasks.objectives.regression import Regression
from tasks.training.train import load, train


def problem_of(task: Task) -> Problem:
    return Problem(task, 0, partial(train, task))


def source(segments: int) -> SOURCE:
    return SOURCE(segments, "ggn", None)


def quadratic(steps: int, lr: float, checkpoints: int, momentum: float = 0.0, l2: float = 0.0) -> Task:
    """Linear regression by full-batch descent: the curvature is the same everywhere, and EK-FAC is exact."""
    base = vector_task([3, 1], rows=20)

    def targets(examples: Examples) -> Examples:
        x = examples.inputs["x"]
        noise = torch.randn(len(x), generator=draw(len(x)), dtype=x.dtype)
        return replace(examples, targets=x @ torch.tensor([1.0, -2.0, 0.5], dtype=x.dtype) + noise)

    recipe = replace(
        base.recipe, optimizer="sgd", lr=lr, epochs=steps, batch_size=20, weight_decay=l2, decay="l2",
        momentum=momentum, schedule="constant", warmup=0.0, checkpoints=checkpoints, clip=None,
    )  # fmt: skip
    splits = {name: targets(split) for name, split in base.splits.items()}
    return replace(base, splits=splits, objective=Regression(), recipe=recipe)


def derivative(task: Task, weight: float = 1e-4) -> Tensor:
    """∂m/∂w_i of the whole training, by central differences: measurement with i minus without i, to first order."""
    queries = task.splits["query"].batch()
    found = []
    for i in range(len(task.train)):
        sides = []
        for sign in (1, -1):
            weights = torch.ones(len(task.train), dtype=torch.float64)
            weights[i] += sign * weight
            model = load(task.initial(0), train(task, 0, weights).final)
            sides.append(task.measure(model, queries).detach())
        found.append((sides[0] - sides[1]) / (2 * weight))
    return torch.stack(found, 1)


@pytest.mark.parametrize(("momentum", "l2"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.1)])
def test_absolute_scale_where_unrolling_is_exact(momentum: float, l2: float) -> None:
    """Small steps, a segment for every few of them: what is left is that exp(−ηH) is not 1 − ηH."""
    steps = 60
    task = quadratic(steps, 0.02 * (1 - momentum), steps, momentum, l2)
    queries = task.splits["query"]
    expected = derivative(task)
    assert close(source(steps).attribute(problem_of(task), queries), expected, 0.05)
    flipped = -source(steps).attribute(problem_of(task), queries)
    assert far(flipped, expected) and far(TracIn().attribute(problem_of(task), queries), expected)
    once = source(1).attribute(problem_of(task), queries)
    assert far(once, expected), "gradients of the whole run averaged: too coarse here"


def test_without_the_l2_term_it_would_miss() -> None:
    task = quadratic(60, 0.02, 60, l2=0.5)
    queries = task.splits["query"]
    expected = derivative(task)
    found = source(60).attribute(problem_of(task), queries)
    assert close(found, expected, 0.05)
    trained = problem_of(task).trajectory()
    blind = replace(task, recipe=replace(task.recipe, weight_decay=0.0))
    assert not close(source(60).attribute(Problem(blind, 0, lambda k: trained), queries), expected, 0.1)


def test_a_long_segment_is_an_undamped_influence_function() -> None:
    """One segment at the end of a converged run: −(1/N) ∇mᵀ (H + γI)⁻¹ ∇ℓ."""
    task = quadratic(4000, 0.1, 4000, l2=0.05)
    trained = train(task, 0)
    ended = replace(trained, checkpoints=(replace(trained.checkpoints[-1], path=400.0),))
    queries = task.splits["query"]
    found = source(1).attribute(Problem(task, 0, lambda k: ended), queries)
    x = torch.cat([task.train.inputs["x"], torch.ones(20, 1, dtype=torch.float64)], 1)
    xq = torch.cat([queries.inputs["x"], torch.ones(len(queries), 1, dtype=torch.float64)], 1)
    model = load(task.initial(0), trained.final)
    g = (task.outputs(model, task.train.batch())[:, 0] - task.train.targets).detach()[:, None] * x
    m = -(task.outputs(model, queries.batch())[:, 0] - queries.targets).detach()[:, None] * xq
    h = x.T @ x / 20 + 0.05 * torch.eye(4, dtype=torch.float64)
    assert close(found, -m @ torch.linalg.inv(h) @ g.T / 20, 1e-6)


def test_short_segments_are_tracin() -> None:
    """τ → 0: −(τ/N) ∇mᵀ ḡ, with the query's gradient of the end."""
    task = three_classes()
    trained = train(task, 0)
    tiny = tuple(replace(c, path=1e-9 * c.path) for c in trained.checkpoints[-1:])
    ended = Problem(task, 0, lambda k: replace(trained, checkpoints=tiny))
    queries = task.splits["query"]
    tau = 1 / (1 - task.recipe.momentum)
    assert close(source(1).attribute(ended, queries), tau * TracIn().attribute(ended, queries), 1e-6)


def test_segments_use_their_own_checkpoints() -> None:
    task = three_classes()
    trained = train(task, 0)
    queries = task.splits["query"]
    last = tuple(replace(c, parameters=trained.final) for c in trained.checkpoints)
    alike = Problem(task, 0, lambda k: replace(trained, checkpoints=last))
    assert far(source(3).attribute(alike, queries), source(3).attribute(problem_of(task), queries))


def test_what_it_needs_is_told_before_training() -> None:
    task = three_classes()
    assert source(3).unmet(task) is None
    assert "method.segments=4" in (source(4).unmet(task) or "")
    assert "SGD" in (
        source(1).unmet(replace(task, recipe=replace(task.recipe, optimizer="adamw", decay="decoupled"))) or ""
    )
    assert source(1).calibrated
