"""The covariance over trainings, written out with numpy; every training is charged."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import alone, bert, close, far, problem_of, three_classes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from methods.base import Problem
from methods.loss_covariance import LossCovariance, covariance
from tasks.base import Examples, Task
from tasks.errors import UserError
from tasks.training.train import load, train

K = 4


def problem(task: Task) -> Problem:
    return Problem(task, 0, partial(train, task))


def table(task: Task, examples: Examples, of: Any) -> np.ndarray:
    """`of(outputs, targets)` of each example by each training, (K, n)."""
    rows = []
    for k in range(K):
        model = load(task.initial(k), train(task, k).final)
        one = [of(model(**inputs), target) for inputs, target in (alone(examples, i) for i in range(len(examples)))]
        rows.append(torch.cat(one).detach().numpy())
    return np.stack(rows)


@pytest.mark.parametrize("case", [three_classes, bert])
def test_written_out_over_the_trainings(case: Any) -> None:
    task: Task = case()
    queries = task.splits["query"]
    losses = table(task, task.train, task.objective.loss)
    measured = table(task, queries, task.objective.measure)
    joint = np.cov(np.concatenate([measured, losses], 1).T)
    expected = -torch.from_numpy(joint[: len(queries), len(queries) :])
    found = LossCovariance(K).attribute(problem(task), queries)
    assert close(found, expected)
    assert far(found, -expected)
    assert far(found, torch.from_numpy(measured.T @ losses) / (K - 1))  # not centred
    assert far(LossCovariance(K - 1).attribute(problem(task), queries), expected)
    assert close(LossCovariance(K).value(problem(task)), -torch.from_numpy(losses.var(0, ddof=1)))
    assert not LossCovariance(K).calibrated


def test_what_is_fitted_better_helps_what_is_measured_higher() -> None:
    """A query that is a training example itself: its margin is high where its loss is low."""
    task = three_classes()
    scores = LossCovariance(K).attribute(problem(task), task.train)
    assert (scores.diagonal() > 0).all() and (scores < 0).any()


def test_a_query_does_not_depend_on_which_others_are_asked() -> None:
    task = bert()
    asked, queries = problem(task), task.splits["query"]
    expected = LossCovariance(K).attribute(problem(task), queries)
    for rows in ([2], [3, 0]):
        assert close(LossCovariance(K).attribute(asked, queries.select(rows)), expected[rows])


def test_every_training_is_charged_once() -> None:
    task = three_classes()
    asked = problem(task)
    LossCovariance(K).attribute(asked, task.splits["query"])
    LossCovariance(K).value(asked)
    assert (asked.meter.trainings, asked.meter.gradients) == (K, 0)


@pytest.mark.parametrize("k", [1, 0, -3])
def test_one_training_has_no_covariance(k: int) -> None:
    with pytest.raises(UserError, match=rf"^method\.k={k} is not possible; allowed: 2 or more"):
        LossCovariance(k)


def test_a_unique_optimum_is_told_before_training() -> None:
    task = three_classes()
    assert LossCovariance(K).unmet(task) is None
    solved = replace(task, recipe=replace(task.recipe, optimizer="lbfgs"))
    assert "one optimum for all" in (LossCovariance(K).unmet(solved) or "")


def test_equal_trainings_have_none_either() -> None:
    """All trainings are θ0 here: no spread, no credit."""
    task = three_classes()
    asked = problem_of(task)
    assert (LossCovariance(3).attribute(asked, task.splits["query"]).abs() < 1e-25).all()


@given(
    st.integers(2, 6),
    st.integers(0, 1000),
    st.floats(-5, 5, allow_subnormal=False),
    st.floats(-1e3, 1e3, allow_subnormal=False),
)
def test_covariance_is_bilinear_and_does_not_see_a_shift(rows: int, seed: int, scale: float, shift: float) -> None:
    def drawn(columns: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    left, right, more = drawn(3, seed), drawn(4, seed + 1), drawn(4, seed + 2)
    expected = covariance(left, right) + scale * covariance(left, more)
    assert torch.allclose(covariance(left + shift, right + scale * more - shift), expected, atol=1e-10)
    assert torch.allclose(covariance(right, left), covariance(left, right).T, atol=1e-12)
