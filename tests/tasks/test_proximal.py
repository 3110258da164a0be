"""The proximal Bregman response: against an optimiser and a formula that share no line with it."""

from collections.abc import Callable
from dataclasses import astuple, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from small_tasks import CONVEX, vector_task
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

from tasks.base import Examples, Task
from tasks.models.mlp import Perceptron
from tasks.objectives.regression import Regression
from tasks.training import proximal as module
from tasks.training.proximal import proximal_response
from tasks.training.train import train

ROWS = [0, 8, 13]


class Smooth(nn.Module):
    """One hidden layer without kinks."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 5), nn.Linear(5, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh())


def line_task(**changes: Any) -> Task:
    """Linear regression on the same features."""
    task = vector_task(hidden=(), **changes)
    slopes = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    splits = {
        name: Examples(e.ids, e.inputs, e.inputs["x"] @ slopes + e.targets.double()) for name, e in task.splits.items()
    }
    return replace(task, splits=splits, objective=Regression(), build=partial(Perceptron, [4, 1]))


TASKS = {
    "logreg": vector_task(**CONVEX),
    "relu": vector_task(weight_decay=0.02, epochs=20),
    "smooth": replace(vector_task(weight_decay=0.02, epochs=20), build=partial(Smooth, 3)),
    "line": line_task(weight_decay=0.02, epochs=20),
}


@cache
def explained(name: str) -> dict[str, Tensor]:
    return train(TASKS[name], 0).final


def outputs(theta: Tensor, x: Tensor, shapes: list[torch.Size], between: Callable[[Tensor], Tensor]) -> Tensor:
    """Layer by layer, from one flat vector of weights and biases."""
    parts = [p.view(s) for p, s in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]
    for k in range(0, len(parts), 2):
        x = (between(x) if k else x) @ parts[k].T + parts[k + 1]
    return x


def loss(h: Tensor, y: Tensor) -> Tensor:
    return (h[:, 0] - y) ** 2 / 2 if h.shape[1] == 1 else h.logsumexp(1) - h.gather(1, y[:, None])[:, 0]


def measurement(h: Tensor, y: Tensor) -> Tensor:
    """Log-odds of the class, or minus the squared error."""
    p = torch.exp(-loss(h, y))
    return -loss(h, y) if h.shape[1] == 1 else torch.log(p / (1 - p))


def flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in parameters.values()])


def by_hand(name: str, rows: list[int], damping: float) -> tuple[Tensor, Tensor]:
    """(response, linear), (M, Q): BFGS and Newton on the definition, one row at a time, and the dense formula."""
    task, centre = TASKS[name], flat(explained(name))
    x, y, query = task.train.inputs["x"], task.train.targets, task.splits["query"]
    n, delta = len(y), task.recipe.l2 + damping
    shapes = [p.shape for p in explained(name).values()]
    f = partial(outputs, shapes=shapes, between=torch.tanh if name == "smooth" else torch.relu)
    measure = lambda theta: measurement(f(theta, query.inputs["x"]), query.targets)  # noqa: E731
    there = f(centre, x)
    slopes = jacobian(lambda h: loss(h, y).sum(), there)

    def objective(theta: Tensor, row: int) -> Tensor:
        h = f(theta, x)
        divergence = loss(h, y) - loss(there, y) - ((h - there) * slopes).sum(1)
        return (divergence.sum() - loss(h, y)[row]) / n + delta / 2 * ((theta - centre) ** 2).sum()

    def for_scipy(theta: np.ndarray, row: int) -> tuple[float, np.ndarray]:
        point = torch.tensor(theta, requires_grad=True)
        value = objective(point, row)
        return value.item(), torch.autograd.grad(value, point)[0].numpy()

    responses = []
    for row in rows:
        found = minimize(for_scipy, centre.numpy(), (row,), "BFGS", jac=True, options={"gtol": 1e-8})
        theta = torch.tensor(found.x)
        for _ in range(2):  # the last digits
            step = partial(objective, row=row)
            theta = theta - torch.linalg.solve(hessian(step, theta), jacobian(step, theta))
        assert jacobian(step, theta).norm() < 1e-13
        responses.append(measure(centre) - measure(theta))

    of_outputs = jacobian(lambda t: f(t, x), centre)  # (N, C, P)
    curvature = delta * torch.eye(len(centre), dtype=torch.float64)
    for j in range(n):
        inner = hessian(lambda h, j=j: loss(h[None], y[j : j + 1])[0], there[j])
        curvature += of_outputs[j].T @ inner @ of_outputs[j] / n
    losses = jacobian(lambda t: loss(f(t, x), y)[rows], centre)
    linear = -losses @ torch.linalg.inv(curvature) @ jacobian(measure, centre).T / n
    return torch.stack(responses), linear


def gaps(found: Tensor, wanted: Tensor) -> Tensor:
    """Row by row, relative."""
    return (found - wanted).norm(dim=1) / wanted.norm(dim=1)


@pytest.mark.parametrize(
    ("name", "damping"),
    [("logreg", 0.01), ("logreg", 0.3), ("smooth", 0.01), ("smooth", 0.3), ("relu", 0.3), ("line", 0)],
)
def test_the_response_is_an_independent_optimisers_and_the_prediction_the_dense_formulas(
    name: str, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    response, linear = by_hand(name, ROWS, damping)
    found = proximal_response(TASKS[name], explained(name), ROWS, damping)
    assert found.response.shape == found.linear.shape == (3, 6) and found.gradient.shape == (3,)
    assert gaps(found.linear, linear).max() < 1e-10
    assert gaps(found.response, response).max() < 1e-4, "at the tolerance that truths are made with"
    monkeypatch.setattr(module, "RELATIVE", 1e-8)
    found = proximal_response(TASKS[name], explained(name), ROWS, damping)
    assert found.gradient.max() <= 1e-8
    assert gaps(found.response, response).max() < 1e-6
    assert gaps(found.linear, response).max() > 1e-3, "not because the problem were linear"


def test_the_prediction_is_the_response_where_damping_is_large() -> None:
    gap = [gaps(*astuple(proximal_response(TASKS["smooth"], explained("smooth"), ROWS, d))[:2]).max() for d in (3, 300)]
    assert gap[1] < 0.02 * gap[0] < 0.02


def test_losing_a_duplicate_of_the_query_hurts_and_losing_its_opposite_helps() -> None:
    task = TASKS["logreg"]
    query = task.splits["query"]
    right, wrong = query.targets[0], (query.targets[0] + 1) % 3
    more = Examples(
        (*task.train.ids, "right", "wrong"),
        {"x": torch.cat([task.train.inputs["x"], query.inputs["x"][:1], query.inputs["x"][:1]])},
        torch.cat([task.train.targets, right[None], wrong[None]]),
    )
    grown = replace(task, splits={**task.splits, "train": more})
    found = proximal_response(grown, train(grown, 0).final, [24, 25], 0.01)
    assert found.response[0, 0] > 0.05 and found.linear[0, 0] > 0.05
    assert found.response[1, 0] < -0.05 and found.linear[1, 0] < -0.05


def test_rows_in_batches_are_rows_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RELATIVE", 1e-9)
    together = proximal_response(TASKS["smooth"], explained("smooth"), ROWS, 0.1)
    monkeypatch.setattr(module, "ROWS", 1)
    alone = proximal_response(TASKS["smooth"], explained("smooth"), ROWS, 0.1)
    assert gaps(together.linear, alone.linear).max() < 1e-12
    assert gaps(together.response, alone.response).max() < 1e-6


def test_single_precision_is_explained_in_double() -> None:
    task = TASKS["logreg"]
    single = replace(
        task,
        splits={k: replace(e, inputs={"x": e.inputs["x"].float()}) for k, e in task.splits.items()},
        dtype=torch.float32,
    )
    final = {name: p.float() for name, p in explained("logreg").items()}
    found = proximal_response(single, final, ROWS, 0.1)
    assert found.response.dtype == torch.float64
    assert gaps(found.response, proximal_response(task, explained("logreg"), ROWS, 0.1).response).max() < 1e-4


def test_what_stops_at_a_kink_says_so() -> None:
    """Of a ReLU network at little damping some optima lie where no gradient vanishes."""
    found = proximal_response(TASKS["relu"], explained("relu"), list(range(24)), 0.02)
    stuck = found.gradient > module.RELATIVE
    assert 0 < stuck.sum() < 20 and torch.isfinite(found.response).all()
