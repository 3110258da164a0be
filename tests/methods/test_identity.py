"""No curvature: scores are plain products of gradients."""

import pytest
import torch
from cases import CASES, close, explained, inverse, per_example, problem_of, stacked, three_classes

from methods.curvature.damping import Damping
from methods.curvature.identity import Identity
from methods.gradients.blocks import blocks_of
from methods.gradients.per_example import flat, gradients, plain
from methods.gradients.source import Source
from methods.influence import Influence

NONE = Damping("absolute", 0.0, "global")


@pytest.mark.parametrize("name", CASES)
def test_scores_are_gradient_products(name: str) -> None:
    """−(1/N) ∇m·∇ℓ, the loss summed over an example, N from the objective."""
    task = CASES[name]()
    problem, queries = problem_of(task), task.splits["query"]
    model = explained(problem)
    m = stacked(per_example(model, queries, task.objective.measure))
    g = stacked(per_example(model, task.train, task.objective.loss))
    found = Influence(Identity(), NONE).attribute(problem, queries)
    assert close(found, -m @ g.T / len(task.train))
    assert close(Influence(Identity(), NONE).value(problem), -g.square().sum(1) / len(task.train))


def test_damping_is_ignored() -> None:
    task = three_classes()
    found = [
        Influence(Identity(), Damping(rule, value, "block")).attribute(problem_of(task), task.splits["query"])
        for rule, value in (("absolute", 0.0), ("absolute", 5.0), ("trace", 1.0))
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_its_coordinates_are_the_parameters() -> None:
    task = three_classes()
    problem = problem_of(task)
    model = problem.model()
    blocks = blocks_of(model)
    identity = Identity()
    fitted = identity.fit(problem, Source(problem.task, model, tuple(blocks)))
    assert torch.equal(inverse(fitted, blocks, Damping("absolute", 3.0, "block"), 0.1), torch.eye(35).double())
    for _, g in gradients(task, model, task.train, blocks, task.objective.loss):
        assert torch.equal(flat(fitted.coordinates(g)), flat(plain(g)))


def test_products_are_rank_only() -> None:
    assert not Influence(Identity(), NONE).calibrated
