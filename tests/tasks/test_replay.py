"""The replay makes the steps of `train`, whatever the optimizer, and its derivative is that of training."""

from typing import Any

import pytest
import torch
from small_tasks import assert_same, token_task, vector_task
from torch.func import vjp

from tasks.training.replay import replay
from tasks.training.train import load, train

ADAM = {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.1, "decay": "decoupled"}
RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01, "schedule": "linear", "warmup": 0.2},
    "clipped": {"clip": 0.05, "momentum": 0.5},
    "adam": ADAM,
    "adam with L2": {"optimizer": "adam", "lr": 0.02, "weight_decay": 0.1, "decay": "l2"},
    "adam, clipped": {**ADAM, "clip": 0.1, "schedule": "cosine"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_it_ends_where_training_ends(name: str) -> None:
    task = vector_task(**RECIPES[name])
    run = replay(task, 3)
    *_, last = run.states(run.start, 0, len(run.steps))
    assert_same(last[0], train(task, 3).final, 1e-9)


def test_sequences_are_replayed_in_their_batches() -> None:
    task = token_task(bucket=2, **ADAM)
    run = replay(task, 3)
    *_, last = run.states(run.start, 0, len(run.steps))
    assert_same(last[0], train(task, 3).final, 1e-7)


@pytest.mark.parametrize("name", RECIPES)
def test_the_derivative_by_a_weight_is_that_of_training(name: str) -> None:
    """Central differences of `train` in a row's weight."""
    task = vector_task(**RECIPES[name], epochs=2)
    run = replay(task, 3)
    before = list(run.states(run.start, 0, len(run.steps)))
    direction = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
                 for n, p in before[-1][0].items()}  # fmt: skip
    adjoint = (direction, *({n: torch.zeros_like(p) for n, p in part.items()} for part in before[-1][1:]))
    found = torch.zeros(len(task.train), dtype=torch.float64)
    for t in reversed(range(len(run.steps))):
        _, pull = vjp(run.step(t), before[t], torch.ones(len(run.steps[t]), dtype=torch.float64))  # type: ignore[misc]
        adjoint, by_weight = pull(adjoint)
        found[run.steps[t]] += by_weight

    def along(weights: torch.Tensor) -> float:
        final = train(task, 3, weights).final
        return sum(float((direction[n] * p).sum()) for n, p in final.items())

    for i in (0, 7, 23):
        sides = []
        for sign in (1, -1):
            weights = torch.ones(len(task.train), dtype=torch.float64)
            weights[i] += sign * 1e-5
            sides.append(along(weights))
        expected = (sides[0] - sides[1]) / 2e-5
        assert found[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert found.abs().min() >= 0 and found.abs().max() > 1e-4


def test_adams_root_at_zero_has_no_infinite_derivative() -> None:
    """Rows of a table that nobody looks up have no gradient: v = 0."""
    task = token_task(rows=4, epochs=1, **ADAM)
    run = replay(task, 0)
    states = list(run.states(run.start, 0, len(run.steps)))
    assert (states[-1][2]["embedding.weight"] == 0).any()
    ones = torch.ones(len(run.steps[0]), dtype=torch.float64)
    _, pull = vjp(run.step(0), states[0], ones)  # type: ignore[misc]
    cotangent = tuple({n: torch.ones_like(p) for n, p in part.items()} for part in states[1])
    by_state, by_weight = pull(cotangent)
    assert by_weight.isfinite().all() and all(p.isfinite().all() for part in by_state for p in part.values())


def test_what_cannot_be_replayed_is_refused() -> None:
    for task in (vector_task(hidden=(), optimizer="lbfgs", weight_decay=0.1), token_task(dropout=0.5)):
        with pytest.raises(ValueError, match="not replayed"):
            replay(task, 0)


def test_the_model_is_left_alone() -> None:
    task = vector_task()
    run = replay(task, 3)
    list(run.states(run.start, 0, len(run.steps)))
    assert_same(dict(run.model.named_parameters()), dict(load(task.initial(3), {}).named_parameters()))
