"""TracIn is the path-weighted sum over checkpoints, not the last one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import bert, close, draw, far, per_example, stacked, three_classes
from torch import Tensor

from methods.base import Problem
from methods.gradients.per_example import gradients
from methods.tracin import TracIn
from tasks.base import Checkpoint, Examples, Task
from tasks.training.recipe_steps import learning_rates
from tasks.training.train import load, train


def problem(task: Task) -> Problem:
    return Problem(task, 0, partial(train, task))


def products(task: Task, checkpoint: Checkpoint, queries: Examples) -> tuple[Tensor, Tensor]:
    """−(1/N) ∇m·∇ℓ and −(1/N) ‖∇ℓ‖² at one checkpoint."""
    model = load(task.initial(0), checkpoint.parameters)
    m = stacked(per_example(model, queries, task.objective.measure))
    g = stacked(per_example(model, task.train, task.objective.loss))
    return -m @ g.T / len(task.train), -g.square().sum(1) / len(task.train)


@pytest.mark.parametrize("case", [three_classes, bert])
def test_written_out_over_the_trajectory(case: object) -> None:
    task: Task = case()  # type: ignore[operator]
    asked = problem(task)
    queries, checkpoints = task.splits["query"], asked.trajectory().checkpoints
    assert len(checkpoints) == 3
    paths = [c.path for c in checkpoints]
    steps = learning_rates(task.recipe, checkpoints[-1].step)
    assert sum(paths) == pytest.approx(sum(steps)) and len(set(paths)) == 3  # the rate decays
    assert paths[0] == pytest.approx(sum(steps[: checkpoints[0].step]))
    parts = [products(task, c, queries) for c in checkpoints]
    expected = torch.stack([c.path * s for c, (s, _) in zip(checkpoints, parts, strict=True)]).sum(0)
    found = TracIn().attribute(asked, queries)
    assert close(found, expected)
    assert far(sum(paths) * parts[-1][0], expected)  # the last checkpoint for all
    assert far(parts[-1][0] * paths[-1], expected)  # the last one only
    assert far(torch.stack([s for s, _ in parts]).mean(0) * sum(paths), expected)  # all alike
    values = torch.stack([c.path * v for c, (_, v) in zip(checkpoints, parts, strict=True)]).sum(0)
    assert close(TracIn().value(asked), values)


def test_one_step_of_gradient_descent_is_what_it_predicts() -> None:
    """Full-batch descent from θ0 in one tiny step: what an example moved is its score, up to the step's square.

    The checkpoint stands where the step ends, so both are compared where the step is too small to matter.
    """
    task = three_classes()
    recipe = replace(task.recipe, lr=1e-6, epochs=1, batch_size=12, weight_decay=0.0, checkpoints=1)
    task = replace(task, recipe=replace(recipe, schedule="constant"))
    queries = task.splits["query"]
    scores = TracIn().attribute(problem(task), queries)

    def measured(weights: Tensor) -> Tensor:
        model = load(task.initial(0), train(task, 0, weights).final)
        return task.measure(model, queries.batch()).detach()

    whole = measured(torch.ones(12))
    for i in (0, 5, 11):
        weights = torch.ones(12)
        weights[i] = 0
        assert close(scores[:, i], whole - measured(weights), 1e-4)


def test_batch_size_and_order_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    task = bert()
    trajectory = train(task, 0)
    queries = task.splits["query"]
    expected, original = TracIn().attribute(Problem(task, 0, lambda k: trajectory), queries), gradients
    order = torch.randperm(12, generator=draw(1))
    shuffled = replace(task, splits={**task.splits, "train": task.train.select(order)})
    for batch_size in (1, 3):
        monkeypatch.setattr("methods.gradients.source.gradients", partial(original, batch_size=batch_size))
        assert close(TracIn().attribute(Problem(task, 0, lambda k: trajectory), queries), expected)
        found = TracIn().attribute(Problem(shuffled, 0, lambda k: trajectory), queries)
        assert close(found, expected[:, order])


def test_modules_given_as_a_string_are_one_pattern() -> None:
    task = three_classes()
    queries = task.splits["query"]
    expected = TracIn(("layers.1",)).attribute(problem(task), queries)
    assert close(TracIn("*.1").attribute(problem(task), queries), expected)  # type: ignore[arg-type]
    assert far(TracIn().attribute(problem(task), queries), expected)


def test_a_model_without_a_path_is_told_before_training() -> None:
    task = three_classes()
    assert TracIn().unmet(task) is None
    solved = replace(task, recipe=replace(task.recipe, optimizer="lbfgs"))
    assert "checkpoints" in (TracIn().unmet(solved) or "")
    assert not TracIn().calibrated


def test_gradients_are_charged_for_every_checkpoint() -> None:
    task = three_classes()
    asked = problem(task)
    TracIn().attribute(asked, task.splits["query"])
    assert asked.meter.gradients == 3 * (5 + 12)
    assert asked.meter.trainings == 1
