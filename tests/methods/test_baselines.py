"""Baselines against numbers that a reader can check by hand."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import (
    CASES,
    bert,
    close,
    draw,
    explained,
    far,
    per_example,
    perceptron,
    problem_of,
    stacked,
    task_of,
    three_classes,
    vectors,
)

from methods.base import Unsupported
from methods.baselines import GradNorm, Loss, Random, SameLabel, TfIdf
from tasks.base import Examples, Task
from tasks.objectives.classification import Classification


def by_hand() -> Task:
    """Two classes, all parameters 0: p = (½, ½)."""
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    train = Examples(tuple("abc"), {"x": x}, torch.tensor([0, 1, 1]))
    query = Examples(tuple("de"), {"x": x[:2]}, torch.tensor([1, 0]))
    return task_of(train, query, partial(perceptron, 2, 2, True), Classification(2))


def test_loss() -> None:
    found = Loss().value(problem_of(by_hand()))
    assert close(found, torch.full((3,), -math.log(2), dtype=torch.float64), 1e-15)
    task = bert()
    problem = problem_of(task)
    model = explained(problem)
    alone = torch.cat([task.loss(model, task.train.batch([i])) for i in range(12)]).detach()
    assert close(Loss().value(problem), -alone)
    with pytest.raises(Unsupported, match="Loss scores no query"):
        Loss().attribute(problem, task.splits["query"])


def test_loss_grows_less_negative_where_the_model_is_right() -> None:
    task = three_classes()
    problem = problem_of(task)
    right = task.outputs(problem.model(), task.train.batch()).argmax(1)
    flattered = replace(task, splits={**task.splits, "train": replace(task.train, targets=right)})
    assert (Loss().value(problem_of(flattered)) >= Loss().value(problem)).all()


def test_gradient_norm() -> None:
    """G = (p − y) [x, 1]ᵀ: ‖p − y‖ = √½, ‖[x, 1]‖ = 1, √26, √2."""
    found = GradNorm().value(problem_of(by_hand()))
    expected = -torch.tensor([0.5, 13.0, 1.0], dtype=torch.float64).sqrt()
    assert close(found, expected, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradient_norm_equals_autograd(name: str) -> None:
    task = CASES[name]()
    problem = problem_of(task)
    g = stacked(per_example(explained(problem), task.train, task.objective.loss))
    assert close(GradNorm().value(problem), -g.norm(dim=1))


def test_gradient_norm_of_some_modules() -> None:
    task = bert()
    head = GradNorm(("head",)).value(problem_of(task))
    assert close(GradNorm("*head").value(problem_of(task)), head)  # type: ignore[arg-type]
    assert far(GradNorm().value(problem_of(task)), head)


def test_same_label() -> None:
    task = by_hand()
    expected = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(SameLabel().attribute(problem_of(task), task.splits["query"]), expected)
    with pytest.raises(Unsupported, match="SameLabel has no value"):
        SameLabel().value(problem_of(task))


def test_random_is_seeded() -> None:
    task = three_classes()
    queries = task.splits["query"]
    found = Random().attribute(problem_of(task), queries)
    assert found.shape == (5, 12) and found.dtype == torch.float64
    assert torch.equal(found, Random().attribute(problem_of(task), queries))
    other = Random().attribute(problem_of(task, seed=1), queries)
    assert (found != other).all()
    values = Random().value(problem_of(task))
    assert values.shape == (12,) and torch.equal(values, Random().value(problem_of(task)))
    assert (values != Random().value(problem_of(task, seed=1))).all()


def test_random_depends_on_the_query_and_on_no_other() -> None:
    task = three_classes()
    queries = task.splits["query"]
    found = Random().attribute(problem_of(task), queries)
    assert len({tuple(row) for row in found.tolist()}) == 5
    order = [3, 0]
    assert torch.equal(Random().attribute(problem_of(task), queries.select(order)), found[order])
    torch.manual_seed(99)  # the global state is nobody's business
    assert torch.equal(Random().attribute(problem_of(task), queries), found)


def test_random_is_standard_normal() -> None:
    many = replace(three_classes(), splits={"train": vectors("train", 4000, 4, 3, 0)})
    queries = vectors("query", 5, 4, 3, 1)
    found = Random().attribute(problem_of(many), queries)
    assert found.mean().abs() < 0.03 and (found.std() - 1).abs() < 0.03
    assert torch.corrcoef(found).fill_diagonal_(0).abs().max() < 0.08


def texts() -> Task:
    """Every training word but `film` occurs in one text, `film` in two of three."""
    task = by_hand()
    train = replace(task.train, texts=("good film", "bad film", "slow"))
    query = replace(task.splits["query"], texts=("Good film unheard", "nothing known"))
    return replace(task, splits={**task.splits, "train": train, "query": query})


def test_tfidf() -> None:
    """idf = 1 + ln((1 + 3) / (1 + df)): rare words 1 + ln 2, film 1 + ln 4/3; unknown words do not count."""
    rare, film = 1 + math.log(2), 1 + math.log(4 / 3)
    square = rare**2 + film**2
    task = texts()
    found = TfIdf().attribute(problem_of(task), task.splits["query"])
    # The first query has label 1, the training examples 0, 1, 1: − the same text, + what shares `film`, 0.
    expected = torch.tensor([[-1.0, film**2 / square, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert close(found, expected, 1e-12)


def test_tfidf_of_training_examples_is_one_on_the_diagonal() -> None:
    task = texts()
    found = TfIdf().attribute(problem_of(task), task.train)
    assert close(found.diagonal(), torch.ones(3, dtype=torch.float64), 1e-12)
    assert close(found, found.T, 1e-12)


def test_needs_are_told_before_training() -> None:
    task = by_hand()
    assert "texts" in (TfIdf().unmet(task) or "") and "small" in (TfIdf().unmet(task) or "")
    assert TfIdf().unmet(texts()) is None
    regression = replace(
        task, splits={**task.splits, "train": replace(task.train, targets=torch.rand(3, generator=draw(0)))}
    )
    assert "labels" in (SameLabel().unmet(regression) or "")
    for method in (Random(), Loss(), GradNorm(), SameLabel()):
        assert method.unmet(task) is None
        assert not method.calibrated
