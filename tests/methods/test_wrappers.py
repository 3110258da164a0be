"""Ensemble, denoise, debias, dda and contrast, written out over the method that they wrap."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from cases import close, far, three_classes
from torch import Tensor

from methods.base import Method, Problem
from methods.baselines import Random
from methods.contrast import Contrast
from methods.curvature.damping import Damping
from methods.curvature.identity import Identity
from methods.dda import dda
from methods.debias import Debias
from methods.denoise import Denoise
from methods.ensemble import Ensemble
from methods.influence import Influence
from tasks.base import Checkpoint, Examples, Task
from tasks.errors import UserError
from tasks.objectives.regression import Regression
from tasks.training.train import train

BASE = Influence(Identity(), Damping("absolute", 0.0, "global"))


@dataclass(frozen=True)
class Drawn(Method):
    """Scores that are drawn for each problem, to see which problems are asked."""

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        draw = problem.generator("drawn")
        return torch.randn(len(queries), len(problem.train), generator=draw, dtype=torch.float64)


def problem_of(task: Task) -> Problem:
    return Problem(task, 0, partial(train, task))


def at(task: Task, checkpoint: Checkpoint, k: int = 0) -> Problem:
    """A problem whose one training ended at this checkpoint."""
    return Problem(task, 0, lambda _: replace(train(task, k), checkpoints=(checkpoint,)))


@pytest.fixture
def task() -> Task:
    return three_classes()


def test_an_ensemble_is_the_mean_of_its_members_who_are_charged(task: Task) -> None:
    queries, problem = task.splits["query"], problem_of(task)
    alone = [at(task, train(task, k).checkpoints[-1], k) for k in range(3)]
    scores = torch.stack([BASE.attribute(p, queries) for p in alone])
    found = Ensemble(BASE, 3).attribute(problem, queries)
    assert close(found, scores.mean(0)) and far(found, scores[0])
    assert problem.meter.trainings == 3
    assert problem.meter.gradients == 3 * (len(queries) + len(task.train))
    values = torch.stack([BASE.value(p) for p in alone]).mean(0)
    assert close(Ensemble(BASE, 3).value(problem), values)
    assert close(Ensemble(BASE, 1).attribute(problem_of(task), queries), scores[0])


def test_members_draw_apart(task: Task) -> None:
    queries = task.splits["query"]
    one, five = (Ensemble(Drawn(), k).attribute(problem_of(task), queries) for k in (1, 25))
    assert 0.15 < five.std() / one.std() < 0.25, "25 equal draws would not average out"


def test_an_ensemble_is_what_its_base_is() -> None:
    assert Ensemble(BASE, 2).calibrated == BASE.calibrated
    assert not Ensemble(Random(), 2).signed and Ensemble(BASE, 2).signed
    with pytest.raises(UserError, match=r"method\.k=0"):
        Ensemble(BASE, 0)


@pytest.mark.parametrize(
    ("last", "smoothing", "weights"),
    [(None, "mean", [1, 1, 1]), (2, "mean", [0, 1, 1]), (None, "exponential", [0.25, 0.5, 1]), (1, "mean", [0, 0, 1])],
)
def test_denoise_is_a_weighted_mean_over_checkpoints(
    task: Task, last: int | None, smoothing: str, weights: list[float]
) -> None:
    queries, problem = task.splits["query"], problem_of(task)
    checkpoints = problem.trajectory().checkpoints
    assert len(checkpoints) == 3
    w = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    method = Denoise(BASE, last, smoothing, 0.5)
    parts = torch.stack([BASE.attribute(at(task, c), queries) for c in checkpoints])
    found = method.attribute(problem, queries)
    assert close(found, (w[:, None, None] * parts).sum(0))
    assert (last == 1) == close(found, parts[-1], 1e-3)
    values = torch.stack([BASE.value(at(task, c)) for c in checkpoints])
    assert close(method.value(problem), (w[:, None] * values).sum(0))
    assert problem.meter.trainings == 1


def test_debias_takes_off_the_base_model(task: Task) -> None:
    queries, problem = task.splits["query"], problem_of(task)
    training = problem.trajectory()
    end = BASE.attribute(problem, queries)
    start = BASE.attribute(at(task, Checkpoint(0, training.initial, 0.0)), queries)
    assert far(end, start)
    for beta in (0.5, 1.0):
        assert close(Debias(BASE, beta, "none").attribute(problem, queries), end - beta * start)
    unit = Debias(BASE, 0.5, "unit").attribute(problem, queries)
    assert close(unit, end / end.norm(dim=1, keepdim=True) - 0.5 * start / start.norm(dim=1, keepdim=True))
    assert close(Debias(BASE, 0.0, "none").attribute(problem, queries), end)
    value = BASE.value(problem) - BASE.value(at(task, Checkpoint(0, training.initial, 0.0)))
    assert close(Debias(BASE, 1.0, "none").value(problem), value)


def test_dda_is_both(task: Task) -> None:
    queries, problem = task.splits["query"], problem_of(task)
    training = problem.trajectory()
    parts = torch.stack([BASE.attribute(at(task, c), queries) for c in training.checkpoints])
    start = BASE.attribute(at(task, Checkpoint(0, training.initial, 0.0)), queries)
    found = dda(BASE, 0.7, "none", None, "mean", 1.0).attribute(problem, queries)
    assert close(found, parts.mean(0) - 0.7 * start)


def test_debias_of_an_ensemble_takes_off_each_members_own_base(task: Task) -> None:
    queries = task.splits["query"]
    found = Debias(Ensemble(BASE, 2), 1.0, "none").attribute(problem_of(task), queries)
    swapped = Ensemble(Debias(BASE, 1.0, "none"), 2).attribute(problem_of(task), queries)
    assert close(found, swapped)


def test_more_checkpoints_than_are_kept_are_refused_before_training(task: Task) -> None:
    with pytest.raises(UserError, match=r"method\.last=9.*3 checkpoints.*model\.recipe\.checkpoints"):
        Denoise(BASE, 9, "mean", 1.0).unmet(task)
    assert Denoise(BASE, 3, "mean", 1.0).unmet(task) is None
    with pytest.raises(UserError, match=r"method\.smoothing=median.*mean, exponential"):
        Denoise(BASE, None, "median", 1.0)
    with pytest.raises(UserError, match=r"method\.normalise=l1.*none, unit"):
        Debias(BASE, 1.0, "l1")
    with pytest.raises(UserError, match=r"method\.beta"):
        Debias(BASE, -1.0, "none")


def test_contrast_attributes_the_difference_of_two_outcomes(task: Task) -> None:
    queries, problem = task.splits["query"], problem_of(task)
    outputs = task.outputs(problem.model(), queries.batch()).detach()
    order = outputs.argsort(descending=True)
    other = torch.where(order[:, 0] == queries.targets, order[:, 1], order[:, 0])
    assert (other != queries.targets).all()
    expected = BASE.attribute(problem, queries) - BASE.attribute(problem, replace(queries, targets=other))
    found = Contrast(BASE).attribute(problem, queries)
    assert close(found, expected) and far(found, BASE.attribute(problem, queries))
    rows = {name: replace(split, targets=split.inputs["x"][:, 0]) for name, split in task.splits.items()}
    assert "class labels" in (Contrast(BASE).unmet(replace(task, splits=rows, objective=Regression())) or "")
