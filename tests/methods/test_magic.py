"""MAGIC is the derivative of training: against finite differences, and end to end against retrainings."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import bert, close, far, three_classes
from torch import Tensor

from bench import config, records
from bench.run import run
from methods.base import Problem
from methods.curvature.damping import Damping
from methods.curvature.identity import Identity
from methods.influence import Influence
from methods.magic import MAGIC
from tasks.base import Task
from tasks.training.train import load, train


def problem_of(task: Task) -> Problem:
    return Problem(task, 0, partial(train, task))


def differences(task: Task, step: float = 1e-5) -> Tensor:
    """∂m/∂w_i of training by central differences, (Q, N)."""
    queries, found = task.splits["query"].batch(), []
    for i in range(len(task.train)):
        sides = []
        for sign in (1, -1):
            weights = torch.ones(len(task.train), dtype=torch.float64)
            weights[i] += sign * step
            sides.append(task.measure(load(task.initial(0), train(task, 0, weights).final), queries).detach())
        found.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(found, 1)


def smooth(task: Task, **changes: object) -> Task:
    return replace(task, recipe=replace(task.recipe, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("case", [three_classes, bert])
def test_it_is_the_derivative_of_training(case: object, optimizer: str) -> None:
    decay = "decoupled" if optimizer == "adamw" else "l2"
    task = smooth(case(), optimizer=optimizer, lr=0.02, decay=decay)  # type: ignore[operator]
    queries, expected = task.splits["query"], differences(task)
    found = MAGIC().attribute(problem_of(task), queries)
    assert close(found, expected, 1e-4)
    products = Influence(Identity(), Damping("absolute", 0.0, "global")).attribute(problem_of(task), queries)
    assert far(products / products.norm() * expected.norm(), expected)


def test_queries_in_chunks_and_few_kept_states_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    task = three_classes()
    queries = task.splits["query"]
    expected = MAGIC().attribute(problem_of(task), queries)
    monkeypatch.setattr("methods.magic.TOGETHER", 1)
    assert close(MAGIC().attribute(problem_of(task), queries.select([4, 0])), expected[[4, 0]])


def test_another_training_than_the_explained_is_noticed() -> None:
    task = three_classes()
    other = replace(train(task, 1), seed=0)
    with pytest.raises(ArithmeticError, match="ends elsewhere"):
        MAGIC().attribute(Problem(task, 0, lambda k: other), task.splits["query"])


def test_what_it_needs_is_told_before_training() -> None:
    task = three_classes()
    assert MAGIC().unmet(task) is None and MAGIC().calibrated
    assert "checkpoints" in (MAGIC().unmet(smooth(task, optimizer="lbfgs")) or "")
    dropping = replace(task, build=lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.1)))
    assert "dropout" in (MAGIC().unmet(dropping) or "")


def test_end_to_end_it_predicts_what_retraining_finds(tmp_path: Path) -> None:
    """Regime fixed, 2 of 200 examples dropped, a smooth model: truth, sign and scale in one."""
    settings = [
        "task=digits", "model=mlp_smooth", "task.n_train=200", "task.n_val=10", "task.n_query=30",
        "model.recipe.epochs=15", "model.recipe.batch_size=50", "evaluation=[lds,loo]", "truth.loo.sample=10",
        "truth.lds.regime=fixed", "truth.lds.fraction=0.99", "truth.lds.subsets=30", "truth.lds.repeats=1",
    ]  # fmt: skip
    outcome = run(config.compose(["method=magic", *settings, f"out={tmp_path}"]))
    metrics = records.read(Path(str(outcome.folder)))["metrics"]
    assert metrics["lds"]["value"] > 0.95
    assert metrics["loo_pearson"]["value"] > 0.98 and 0.8 < metrics["loo_slope"]["value"] < 1.25
