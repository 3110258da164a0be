"""One training by hand, and a stack of trainings against one after the other."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_tasks import assert_same, token_task, vector_task
from torch import Tensor

from tasks.base import Task, Trajectory
from tasks.training.engines import one_by_one, stacked
from tasks.training.plan import Plan, explained_seed, planned
from tasks.training.recipe_steps import batch_order, learning_rates
from tasks.training.train import load, state, train
from tasks.training.vectorised import measure_stack, train_stack

RECIPES: dict[str, dict[str, Any]] = {
    "sgd_momentum_l2": {"momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "decay": "decoupled", "weight_decay": 0.1},
    "clip": {"clip": 0.05},
    "linear_warmup": {"schedule": "linear", "warmup": 0.3},
    "cosine": {"schedule": "cosine", "momentum": 0.5},
    "everything": {
        "optimizer": "adamw",
        "lr": 0.02,
        "decay": "decoupled",
        "weight_decay": 0.1,
        "clip": 0.3,
        "schedule": "cosine",
        "warmup": 0.2,
    },
}


def masks(models: int, rows: int, keep: int) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    weights = torch.zeros(models, rows, dtype=torch.float64)
    for row in weights:
        chosen = torch.randperm(rows, generator=draw)[:keep]
        row[chosen] = 0.5 + torch.rand(keep, generator=draw, dtype=torch.float64)
    return weights


def by_hand(task: Task, seed: int, weights: Tensor, rows: Tensor, lr: float, gamma: float = 0.0) -> dict[str, Tensor]:
    """Plain SGD on softmax regression with the gradient (p − onehot) xᵀ written out."""
    theta = {name: p.detach().clone() for name, p in task.initial(seed).named_parameters()}
    weight, bias = theta["layers.linear0.weight"], theta["layers.linear0.bias"]
    for index in batch_order(rows, None, task.recipe, seed):
        x, y, w = task.train.inputs["x"][index], task.train.targets[index], weights[index]
        error = (x @ weight.T + bias).softmax(1)
        error[torch.arange(len(y)), y] -= 1
        error *= w[:, None] / len(index)  # the denominator is the batch, whatever is masked in it
        weight, bias = weight - lr * (error.T @ x + gamma * weight), bias - lr * (error.sum(0) + gamma * bias)
    return {"layers.linear0.weight": weight, "layers.linear0.bias": bias}


@pytest.mark.parametrize("own_batches", [False, True], ids=["fixed", "own"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_stack_is_each_training_alone(name: str, own_batches: bool) -> None:
    task = vector_task(**RECIPES[name])
    weights, seeds = masks(4, 24, 17), [11, 12, 11, 2**62]
    stack = train_stack(task, weights, seeds, own_batches)
    for m, seed in enumerate(seeds):
        alone = train(task, seed, weights[m], own_batches)
        assert_same({k: v[m] for k, v in stack.items()}, alone.final, 1e-12)
        moved = max((alone.final[k] - alone.initial[k]).abs().max() for k in stack)
        assert moved > 1e-3, "nothing was trained"
    assert not torch.allclose(stack["layers.linear0.weight"][0], stack["layers.linear0.weight"][2])


def test_models_of_sequences_are_not_stacked() -> None:
    with pytest.raises(ValueError, match="not stacked"):
        train_stack(token_task(batch_size=4), masks(3, 23, 16), [1, 2, 1], own_batches=True)


def test_stacked_measurements_are_those_of_each_model() -> None:
    task = vector_task()
    stack = train_stack(task, torch.ones(2, 24, dtype=torch.float64), [1, 2], False)
    found = measure_stack(task, stack, "query")
    assert found.shape == (2, 6)
    for m in range(2):
        model = load(task.initial(0), {k: v[m] for k, v in stack.items()})
        torch.testing.assert_close(found[m], task.measure(model, task.splits["query"].batch()), rtol=1e-12, atol=1e-12)


def test_a_stack_refuses_subsets_of_different_sizes() -> None:
    weights = torch.ones(2, 24, dtype=torch.float64)
    weights[0, 0] = 0
    with pytest.raises(ValueError, match="equally many"):
        train_stack(vector_task(), weights, [1, 2], own_batches=True)


def test_subsets_of_different_sizes_come_back_in_the_order_of_the_plan() -> None:
    task = vector_task(epochs=1)
    weights = torch.ones(5, 24, dtype=torch.float64)
    for m, removed in enumerate([3, 0, 5, 0, 3]):
        weights[m, :removed] = 0
    plan = Plan(weights, (1, 2, 3, 4, 5), own_batches=True)
    found, wanted = stacked(task, plan), one_by_one(task, plan)
    for split in ("val", "query"):
        assert found[split].shape == (5, len(task.splits[split]))
        torch.testing.assert_close(torch.tensor(found[split]), torch.tensor(wanted[split]), rtol=1e-10, atol=1e-10)


def test_fixed_masks_a_removed_example_and_keeps_the_denominator() -> None:
    """Two steps of SGD, written out."""
    task = vector_task(rows=8, hidden=(), batch_size=4, epochs=1, weight_decay=0.02)
    weights = torch.ones(8, dtype=torch.float64)
    weights[5] = 0
    wanted = by_hand(task, 9, weights, torch.arange(8), lr=0.1, gamma=0.02)
    assert_same(train(task, 9, weights).final, wanted, 1e-14)
    stack = train_stack(task, weights[None], [9], own_batches=False)
    assert_same({k: v[0] for k, v in stack.items()}, wanted, 1e-13)
    own = train(task, 9, weights, own_batches=True).final
    assert not torch.allclose(own["layers.linear0.weight"], wanted["layers.linear0.weight"], atol=1e-4)


def test_real_weights_multiply_the_loss() -> None:
    task = vector_task(rows=8, hidden=(), batch_size=8, epochs=2)
    weights = torch.tensor([0.0, 1.0, 2.5, 0.3, 1.0, 0.0, 7.0, 1.0], dtype=torch.float64)
    wanted = by_hand(task, 9, weights, torch.arange(8), lr=0.1)
    assert_same(train(task, 9, weights).final, wanted, 1e-14)
    own = by_hand(task, 9, weights, weights.nonzero()[:, 0], lr=0.1)
    assert_same(train(task, 9, weights, own_batches=True).final, own, 1e-14)


def test_own_batches_are_those_of_a_task_without_the_removed_rows() -> None:
    task = vector_task(momentum=0.9)
    weights = (masks(1, 24, 15)[0] > 0).double()
    rows = weights.nonzero()[:, 0]
    smaller = replace(task, splits={**task.splits, "train": task.train.select(rows)})
    assert_same(train(task, 4, weights, own_batches=True).final, train(smaller, 4).final)
    assert not torch.equal(
        train(task, 4, weights).final["layers.linear0.weight"], train(smaller, 4).final["layers.linear0.weight"]
    )


@pytest.mark.parametrize("make", [vector_task, lambda: token_task(bucket=2, batch_size=4, dropout=0.3)])
def test_fixed_with_nothing_removed_is_the_explained_run_bit_by_bit(make: Any) -> None:
    task = make()
    seed = explained_seed(3)
    explained = train(task, seed)
    plan = planned(torch.ones(1, len(task.train), dtype=torch.float64), 1, "fixed", 0, explained=3)
    assert_same(train(task, plan.seeds[0], plan.weights[0], plan.own_batches, keep=False).final, explained.final)
    row = one_by_one(task, plan)["query"][0]
    model, query = load(task.initial(seed), explained.final), task.splits["query"]
    for index in query.batches(256):
        assert torch.equal(torch.tensor(row)[index], task.measure(model, query.batch(index)).detach())


def test_adamw_first_step_by_hand() -> None:
    lr, eps, gamma = 0.01, 1e-8, 0.1
    task = vector_task(
        optimizer="adamw", lr=lr, decay="decoupled", weight_decay=gamma, eps=eps, epochs=1, batch_size=24
    )
    model = task.initial(1)
    task.loss(model, task.train.batch()).mean().backward()
    made = train(task, 1)
    for name, p in model.named_parameters():
        assert p.grad is not None
        wanted = p * (1 - lr * gamma) - lr * p.grad / (p.grad.abs() + eps)
        torch.testing.assert_close(made.final[name], wanted.detach(), rtol=0, atol=1e-12)


def test_clipping_bounds_the_gradient_of_the_losses_not_the_decay() -> None:
    lr, gamma, limit = 0.1, 0.05, 0.01
    task = vector_task(lr=lr, weight_decay=gamma, clip=limit, epochs=1, batch_size=24)
    model = task.initial(1)
    task.loss(model, task.train.batch()).mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert norm > 10 * limit
    made = train(task, 1)
    for name, p in model.named_parameters():
        wanted = p - lr * (gradients[name] * limit / norm + gamma * p)
        torch.testing.assert_close(made.final[name], wanted.detach(), rtol=0, atol=1e-7)  # its 1e-6 beside the norm


@pytest.mark.parametrize("make", [vector_task, lambda **c: token_task(dropout=0.5, **c)])
def test_a_training_is_of_its_seed(make: Any) -> None:
    task = make()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train(task, 1)
    assert torch.equal(torch.get_rng_state(), before), "global randomness was drawn from or seeded"
    torch.manual_seed(2)
    again, other = train(task, 1), train(task, 2)
    assert_same(again.final, first.final)
    assert_same(again.initial, first.initial)
    for name in first.final:
        assert not torch.equal(first.final[name], other.final[name])
    assert_same(first.initial, state(task.initial(1)))


def test_dropout_is_on_in_training_and_off_in_measuring() -> None:
    task = token_task(dropout=0.5)
    without = token_task(dropout=0.0)
    assert not torch.equal(train(task, 1).final["head.weight"], train(without, 1).final["head.weight"])
    model = load(task.initial(1), train(task, 1).final)
    batch = task.splits["query"].batch()
    assert not model.training and torch.equal(task.measure(model, batch), task.measure(model, batch))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_checkpoints_paths_sum_to_the_learning_rates(schedule: str) -> None:
    task = vector_task(schedule=schedule, warmup=0.2, checkpoints=5)
    made = train(task, 1)
    steps = len(batch_order(torch.arange(24), None, task.recipe, 1))
    rates = learning_rates(task.recipe, steps)
    assert [c.step for c in made.checkpoints] == [round(steps * k / 5) for k in range(1, 6)]
    starts = [0, *(c.step for c in made.checkpoints)]
    for c, start in zip(made.checkpoints, starts, strict=False):
        assert c.path == pytest.approx(sum(rates[start : c.step]), abs=1e-15)
    assert sum(c.path for c in made.checkpoints) == pytest.approx(sum(rates))
    assert made.final is made.checkpoints[-1].parameters


def test_keeping_fewer_states_changes_no_parameter() -> None:
    task = vector_task(checkpoints=5, momentum=0.9)
    all_states, end = train(task, 1), train(task, 1, keep=False)
    assert len(end.checkpoints) == 1 and end.checkpoints[0].step == all_states.checkpoints[-1].step
    assert_same(end.final, all_states.final)
    middle = all_states.checkpoints[0].parameters
    assert not torch.equal(middle["layers.linear0.weight"], end.final["layers.linear0.weight"]), "states are copies"


def test_a_training_reports_its_progress_and_its_loss() -> None:
    told: list[tuple[int, int]] = []
    made: Trajectory = train(vector_task(batch_size=24, epochs=2), 1, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)]
    task = vector_task(batch_size=24, epochs=1)
    model = task.initial(1)
    assert train(task, 1).final_loss == pytest.approx(task.loss(model, task.train.batch()).mean().item())
    assert made.final_loss < train(task, 1).final_loss and made.seed == 1 and made.seconds > 0


def test_training_leaves_what_it_was_given_as_it_was() -> None:
    task, weights = vector_task(), torch.ones(24)
    before = task.fingerprint()
    train(task, 1, weights)
    train_stack(task, weights[None], [1], False)
    assert task.fingerprint() == before and torch.equal(weights, torch.ones(24))


def test_adams_moments_are_kept_with_its_checkpoints() -> None:
    task = vector_task(optimizer="adamw", lr=0.01, checkpoints=2, epochs=1, batch_size=24)
    only = train(task, 3).checkpoints[-1]
    assert only.moments is not None and only.step == 1
    model = task.initial(3)
    task.loss(model, task.train.batch()).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(only.moments[0][name], 0.1 * p.grad)
        torch.testing.assert_close(only.moments[1][name], 0.001 * p.grad.square())
    assert train(vector_task(), 3).checkpoints[-1].moments is None
