"""Self-influence is the base method's value, and nothing else of it."""

from dataclasses import replace

import pytest
import torch
from cases import problem_of, three_classes

from methods.base import Unsupported
from methods.baselines import SameLabel, TfIdf
from methods.curvature.damping import Damping
from methods.curvature.dense import Dense
from methods.curvature.ekfac import EKFAC
from methods.influence import Influence
from methods.self_influence import SelfInfluence
from methods.tracin import TracIn

GGN = Dense("ggn", "global", 1.0)
DAMPING = Damping("mean_eigenvalue", 0.1, "block")


@pytest.mark.parametrize("base", [Influence(EKFAC("fisher"), DAMPING), Influence(GGN, DAMPING), TracIn()])
def test_it_is_the_value_of_its_base(base: Influence | TracIn) -> None:
    task = three_classes()
    found = SelfInfluence(base).value(problem_of(task))
    assert torch.equal(found, base.value(problem_of(task)))
    assert found.shape == (12,) and (found < 0).all()


def test_an_example_far_from_the_rest_is_the_most_suspicious() -> None:
    task = three_classes()
    x = task.train.inputs["x"].clone()
    problem = problem_of(task)
    model = problem.model()
    right = task.outputs(model, task.train.batch()).argmax(1)
    targets = right.clone()
    targets[4] = task.outputs(model, task.train.batch())[4].argmin()  # the one example with a wrong label
    wrong = replace(task, splits={**task.splits, "train": replace(task.train, inputs={"x": x}, targets=targets)})
    value = SelfInfluence(Influence(GGN, DAMPING)).value(problem_of(wrong))
    assert value.argmin() == 4


def test_no_query_is_scored() -> None:
    task = three_classes()
    method = SelfInfluence(Influence(GGN, DAMPING))
    assert not method.offers("attribute") and method.offers("value")
    with pytest.raises(Unsupported, match="SelfInfluence scores no query"):
        method.attribute(problem_of(task), task.splits["query"])


def test_needs_are_those_of_the_base() -> None:
    task = three_classes()
    solved = replace(task, recipe=replace(task.recipe, optimizer="lbfgs"))
    assert SelfInfluence(TracIn()).unmet(solved) == TracIn().unmet(solved) is not None
    assert SelfInfluence(TfIdf()).unmet(task) is not None
    assert SelfInfluence(TracIn()).unmet(task) is None


def test_a_base_without_a_value_says_so() -> None:
    with pytest.raises(Unsupported, match="SameLabel has no value"):
        SelfInfluence(SameLabel()).value(problem_of(three_classes()))
