"""LESS and Adam's TracIn written out from the optimizer's own state."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import bert, close, far, per_example, stacked, three_classes
from torch import Tensor

from methods.base import Problem
from methods.less import LESS
from methods.tracin import TracIn
from tasks.base import Checkpoint, Task
from tasks.errors import UserError
from tasks.training.train import load, train


def adam(task: Task) -> Task:
    return replace(task, recipe=replace(task.recipe, optimizer="adamw", decay="decoupled", lr=0.01))


def problem_of(task: Task) -> Problem:
    return Problem(task, 0, partial(train, task))


def gradients(task: Task, checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """∇m of the queries and ∇ℓ of the training examples, (., P)."""
    model = load(task.initial(0), checkpoint.parameters)
    m = stacked(per_example(model, task.splits["query"], task.objective.measure))
    return m, stacked(per_example(model, task.train, task.objective.loss))


def moments(task: Task, checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """m and v, (P,), in the order of the parameters."""
    assert checkpoint.moments is not None
    names = [name for name, _ in task.initial(0).named_parameters()]
    first, second = (torch.cat([kept[n].flatten() for n in names]) for kept in checkpoint.moments)
    return first, second


@pytest.mark.parametrize("case", [three_classes, bert])
def test_less_is_the_cosine_with_adams_next_step(case: object) -> None:
    """The next step of torch's own Adam on one example, from the checkpoint's state."""
    task = adam(case())  # type: ignore[operator]
    problem = problem_of(task)
    expected = torch.zeros(len(task.splits["query"]), len(task.train), dtype=torch.float64)
    (b1, b2), eps = task.recipe.betas, task.recipe.eps
    for checkpoint in problem.trajectory().checkpoints:
        m, g = gradients(task, checkpoint)
        first, second = moments(task, checkpoint)
        moved = []
        for row in g:
            p = torch.zeros_like(row).requires_grad_()
            step = torch.optim.AdamW([p], lr=1.0, betas=(b1, b2), eps=eps, weight_decay=0.0)
            step.state[p] = {
                "step": torch.tensor(float(checkpoint.step)),
                "exp_avg": first.clone(),
                "exp_avg_sq": second.clone(),
            }
            p.grad = row.clone()
            step.step()
            moved.append(-p.detach())
        direction = torch.stack(moved)
        cosine = (m @ direction.T) / (m.norm(dim=1)[:, None] * direction.norm(dim=1))
        expected -= checkpoint.path * cosine
    found = LESS().attribute(problem, task.splits["query"])
    assert close(found, expected, 1e-8)
    plain = torch.zeros_like(expected)
    for c in problem.trajectory().checkpoints:
        m, g = gradients(task, c)
        plain -= c.path * torch.nn.functional.cosine_similarity(m[:, None], g, dim=-1)
    assert far(plain, expected)


def test_less_without_adam_is_the_cosine_over_checkpoints() -> None:
    task = three_classes()
    problem = problem_of(task)
    parts = []
    for c in problem.trajectory().checkpoints:
        m, g = gradients(task, c)
        parts.append(-c.path * (m @ g.T) / (m.norm(dim=1)[:, None] * g.norm(dim=1)))
    assert close(LESS().attribute(problem, task.splits["query"]), torch.stack(parts).sum(0))


@pytest.mark.parametrize("case", [three_classes, bert])
def test_tracin_through_adams_preconditioner(case: object) -> None:
    task = adam(case())  # type: ignore[operator]
    problem, scores, values = problem_of(task), [], []
    for c in problem.trajectory().checkpoints:
        m, g = gradients(task, c)
        scale = 1 / ((moments(task, c)[1] / (1 - task.recipe.betas[1] ** c.step)).sqrt() + task.recipe.eps)
        scores.append(-c.path * (m * scale) @ g.T / len(g))
        values.append(-c.path * (g.square() * scale).sum(1) / len(g))
    method = TracIn(preconditioner="adam")
    found = method.attribute(problem, task.splits["query"])
    assert close(found, torch.stack(scores).sum(0))
    assert close(method.value(problem), torch.stack(values).sum(0))
    assert far(TracIn().attribute(problem, task.splits["query"]), found)


def test_needs() -> None:
    task = three_classes()
    assert "Adam's state" in (TracIn(preconditioner="adam").unmet(task) or "")
    assert TracIn(preconditioner="adam").unmet(adam(task)) is None
    with pytest.raises(UserError, match=r"method\.preconditioner=shampoo.*none, adam"):
        TracIn(preconditioner="shampoo")
    assert "checkpoints" in (LESS().unmet(replace(task, recipe=replace(task.recipe, optimizer="lbfgs"))) or "")
