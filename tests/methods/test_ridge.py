"""Ridge regression, where leaving an example out has a closed form: calibrated methods state it in its own unit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import draw, vector_task
from torch import Tensor

from methods.base import Problem
from methods.curvature.arnoldi import Arnoldi
from methods.curvature.cg import ConjugateGradients
from methods.curvature.damping import Damping
from methods.curvature.dense import Dense
from methods.curvature.eigenpairs import Eigenpairs
from methods.curvature.ekfac import EKFAC
from methods.curvature.identity import Identity
from methods.curvature.kfac import KFAC
from methods.curvature.neumann import Neumann
from methods.curvature.nystrom import Nystrom
from methods.influence import Influence
from tasks.base import Checkpoint, Examples, Task, Trajectory
from tasks.objectives.regression import Regression

N, FEATURES, L2 = 400, 6, 0.02
NOTHING = Damping("absolute", 0.0, "global")
EXACT: dict[str, Any] = {
    "ggn": Dense("ggn", "global", 1.0),
    "hessian": Dense("hessian", "global", 1.0),
    "block": Dense("ggn", "block", 1.0),
    "cg": ConjugateGradients("ggn", 1e-8, 200),
    "cg of the hessian": ConjugateGradients("hessian", 1e-8, 200),
    "neumann": Neumann("ggn", 1e-2, 2000, None),
    "ekfac": EKFAC("ggn"),  # one output: its eigenbasis is that of E[a aᵀ], and its eigenvalues are exact
    "kfac": KFAC("ggn"),
    "eigenpairs": Eigenpairs("ggn", FEATURES + 1, 4),
    "nystrom": Nystrom("ggn", FEATURES + 1),
    "arnoldi": Arnoldi("ggn", FEATURES + 1, FEATURES + 1),
}


def ridge() -> Task:
    base = vector_task([FEATURES, 1], rows=N, queries=30)

    def noisy(examples: Examples) -> Examples:
        x = examples.inputs["x"] * torch.linspace(0.3, 3, FEATURES, dtype=torch.float64)  # the identity is no curvature
        truth = torch.arange(1.0, FEATURES + 1, dtype=x.dtype)
        return replace(
            examples, inputs={"x": x}, targets=x @ truth + torch.randn(len(x), generator=draw(len(x)), dtype=x.dtype)
        )

    splits = {name: noisy(split) for name, split in base.splits.items()}
    recipe = replace(base.recipe, optimizer="lbfgs", weight_decay=L2, decay="l2", checkpoints=1)
    return replace(base, splits=splits, objective=Regression(), recipe=recipe)


def solved(x: Tensor, y: Tensor, n: int) -> Tensor:
    """argmin (1/n) Σ ½(xᵀθ − y)² + ½γ‖θ‖²; the bias is the last number and is decayed too."""
    return torch.linalg.solve(x.T @ x / n + L2 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y / n)


def with_bias(examples: Examples) -> Tensor:
    x = examples.inputs["x"]
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


@pytest.fixture(scope="module")
def world() -> tuple[Problem, Tensor]:
    """The problem at its optimum, and the effects of leaving out: measurement with i minus without i, (Q, N)."""
    task = ridge()
    x, y, xq = with_bias(task.train), task.train.targets, with_bias(task.splits["query"])

    def measured(theta: Tensor) -> Tensor:
        return -0.5 * (xq @ theta - task.splits["query"].targets).square()

    theta = solved(x, y, N)
    keep = ~torch.eye(N, dtype=torch.bool)
    effects = torch.stack([measured(theta) - measured(solved(x[k], y[k], N)) for k in keep], 1)
    (weight, bias) = (name for name, _ in task.initial(0).named_parameters())
    end = {weight: theta[None, :-1], bias: theta[-1:]}
    return Problem(task, 0, lambda k: Trajectory(k, end, (Checkpoint(1, end, 1.0),), 0.0, 0.0)), effects


def slope_and_correlation(scores: Tensor, effects: Tensor) -> tuple[float, float]:
    """Least squares of effects on scores through all pairs, and Pearson's r."""
    a, b = scores.flatten() - scores.mean(), effects.flatten() - effects.mean()
    return float(a @ b / (a @ a)), float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("name", EXACT)
def test_exact_solvers_state_leave_one_out_within_5_percent(name: str, world: tuple[Problem, Tensor]) -> None:
    problem, effects = world
    method = Influence(EXACT[name], NOTHING)
    assert method.calibrated
    slope, r = slope_and_correlation(method.attribute(problem, problem.task.splits["query"]), effects)
    assert abs(slope - 1) < 0.05 and r > 0.995
    half = slope_and_correlation(method.attribute(problem, problem.task.splits["query"]) / N * (N / 2), effects)[0]
    assert abs(half - 2) < 0.1, "a wrong N would show"


def test_without_a_curvature_there_is_no_unit(world: tuple[Problem, Tensor]) -> None:
    problem, effects = world
    method = Influence(Identity(), NOTHING)
    assert not method.calibrated
    slope, r = slope_and_correlation(method.attribute(problem, problem.task.splits["query"]), effects)
    assert abs(slope - 1) > 0.2 and r < 0.995


def test_the_cosine_puts_a_duplicate_first() -> None:
    task = ridge()
    copies = task.splits["query"].select([3, 7])
    train = Examples(
        (*task.train.ids, "copy 3", "copy 7"),
        {"x": torch.cat([task.train.inputs["x"], copies.inputs["x"]])},
        torch.cat([task.train.targets, copies.targets]),
    )
    task = replace(task, splits={**task.splits, "train": train})
    start = {name: p.detach().clone() for name, p in task.initial(0).named_parameters()}
    problem = Problem(task, 0, lambda k: Trajectory(k, start, (Checkpoint(1, start, 1.0),), 0.0, 0.0))
    scores = Influence(Identity(), NOTHING, "cosine").attribute(problem, copies)
    assert scores.argmax(1).tolist() == [N, N + 1]
    torch.testing.assert_close(scores.max(1).values, torch.ones(2, dtype=torch.float64))
