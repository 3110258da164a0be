"""Squared error: loss, measurement, curvature at the output, samples; and a task of it, from trainer to store."""

from functools import partial
from pathlib import Path

import pytest
import torch
from small_tasks import CONVEX, assert_same, recipe
from torch import Tensor

from tasks.base import Examples, Task
from tasks.models.mlp import Perceptron
from tasks.objectives.classification import Classification
from tasks.objectives.regression import Regression
from tasks.training.engines import Executor
from tasks.training.plan import leave_one_out, planned
from tasks.training.retrain import retrain
from tasks.training.train import train
from tasks.training.vectorised import train_stack

OBJECTIVE = Regression()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OUTPUTS, TARGETS = 3 * draw(40, 1), draw(40, seed=1)


def test_loss_is_the_gaussian_log_likelihood_without_its_constant() -> None:
    loss = OBJECTIVE.loss(OUTPUTS, TARGETS)
    assert loss.shape == (40,)
    normal = torch.distributions.Normal(OUTPUTS[:, 0], 1.0)
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(loss, -normal.log_prob(TARGETS) - constant)
    assert torch.equal(OBJECTIVE.measure(OUTPUTS, TARGETS), -loss)


def test_hessian_root_squares_to_autograds_hessian() -> None:
    root = OBJECTIVE.hessian_root(OUTPUTS)
    assert root.shape == (40, 1, 1) and root.dtype == torch.float64
    for i in (0, 7):
        wanted = torch.autograd.functional.hessian(lambda f, i=i: OBJECTIVE.loss(f[None], TARGETS[i])[0], OUTPUTS[i])
        torch.testing.assert_close((root @ root.mT)[i], wanted)


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_loss_is_a_function_of_its_measurement(classes: int, scale: float) -> None:
    logits, targets = scale * draw(300, classes, seed=2), torch.arange(300) % classes
    objective = Classification(classes)
    found = objective.loss_of_measurement(objective.measure(logits, targets))
    torch.testing.assert_close(found, objective.loss(logits, targets), rtol=1e-12, atol=1e-12)
    found = OBJECTIVE.loss_of_measurement(OBJECTIVE.measure(scale * OUTPUTS, TARGETS))
    assert torch.equal(found, OBJECTIVE.loss(scale * OUTPUTS, TARGETS))


def test_samples_have_the_models_mean_and_variance_1() -> None:
    outputs = torch.tensor([[-2.0], [5.0]], dtype=torch.float64)
    uniforms = torch.rand(40_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drawn = OBJECTIVE.sample(outputs.repeat(20_000, 1), uniforms).view(-1, 2)
    assert drawn.dtype == torch.float64
    torch.testing.assert_close(drawn.mean(0), outputs[:, 0], rtol=0, atol=4 / 20_000**0.5)
    torch.testing.assert_close(drawn.var(0), torch.ones(2, dtype=torch.float64), rtol=0, atol=4 * (2 / 20_000) ** 0.5)
    assert OBJECTIVE.sample(outputs, torch.tensor([0.0, 1.0])).isfinite().all()


def test_fitness() -> None:
    """SSE = 1 + 0 + 1, SST = 2 around the mean 2."""
    found = OBJECTIVE.fitness(torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0]))
    assert found == {"r2": 0.0, "rmse": pytest.approx((2 / 3) ** 0.5)}
    assert OBJECTIVE.fitness(TARGETS[:, None], TARGETS) == {"r2": 1.0, "rmse": 0.0}
    assert not OBJECTIVE.fitness(torch.zeros(1, 1), torch.ones(1))["r2"] > 0, "no spread, no r2"


def regression_task(hidden: tuple[int, ...], **changes: object) -> Task:
    """y = x · (1, −2, 3) + noise."""
    splits = {}
    for seed, (name, rows) in enumerate({"train": 20, "val": 4, "query": 5, "test": 9}.items()):
        x = draw(rows, 3, seed=seed)
        y = x @ torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64) + 0.1 * draw(rows, seed=seed + 10)
        splits[name] = Examples(tuple(f"{name}:{i}" for i in range(rows)), {"x": x}, y)
    return Task(
        name="lines",
        splits=splits,
        build=partial(Perceptron, [3, *hidden, 1]),
        objective=OBJECTIVE,
        recipe=recipe(**changes),
        model="small",
        source="generated",
        floor={"r2": 0.5},
        identity={"version": 1},
        dtype=torch.float64,
    )


def ridge(task: Task, weights: Tensor, n: float) -> Tensor:
    """(Xᵀ W X/n + γI)⁻¹ Xᵀ W y/n, the bias as last column, penalised as all others."""
    x = torch.cat([task.train.inputs["x"], torch.ones(20, 1, dtype=torch.float64)], 1)
    matrix = x.T @ (weights[:, None] * x) / n + CONVEX["weight_decay"] * torch.eye(4, dtype=torch.float64)
    return torch.linalg.solve(matrix, x.T @ (weights * task.train.targets) / n)


def test_the_optimum_is_ridge_regression() -> None:
    task = regression_task(**CONVEX)
    weights = (1 + draw(3, 20, seed=4)).clamp_min(0)
    stack = train_stack(task, weights, [1, 2, 3], own_batches=False)
    for m, w in enumerate(weights):
        wanted = ridge(task, w, 20.0)
        torch.testing.assert_close(stack["layers.linear0.weight"][m, 0], wanted[:3], rtol=0, atol=1e-7)
        torch.testing.assert_close(stack["layers.linear0.bias"][m], wanted[3:], rtol=0, atol=1e-7)
        alone = train(task, 5, w).final
        assert_same(alone, {name: value[m] for name, value in stack.items()}, 1e-7)


def test_stacked_and_sequential_training_are_one() -> None:
    task = regression_task((5,), momentum=0.9, weight_decay=0.01, lr=0.05)
    masks = torch.ones(3, 20, dtype=torch.float64)
    masks[0, :6] = masks[1, 6:12] = masks[2, 14:] = 0
    for own in (False, True):
        stack = train_stack(task, masks, [1, 1, 2], own)
        for m, seed in enumerate([1, 1, 2]):
            one = train(task, seed, masks[m], own).final
            assert_same(one, {name: value[m] for name, value in stack.items()}, 1e-9)


def test_dropout_trains_one_by_one(tmp_path: Path) -> None:
    """Same seed, same masks: a training is a function of its seed with dropout too."""
    task = regression_task((5,))
    task = Task(**{**vars(task), "build": partial(Perceptron, [3, 5, 1], 0.3)})
    assert_same(train(task, 1).final, train(task, 1).final)
    plain = train(regression_task((5,)), 1).final
    assert any(not torch.equal(plain[name], value) for name, value in train(task, 1).final.items())
    plan = planned(leave_one_out(20, range(2), 0.0), 1, "fixed", 0, 0)
    rows = retrain(task, plan, tmp_path, Executor("processes", 1))
    assert rows["query"].shape == (2, 5) and rows["query"].std(0).min() > 0
