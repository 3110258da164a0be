"""Small float64 tasks, trained here, and contexts in which unlearners can be asked."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.evaluations.unlearning.base import Context, Parameters
from methods.base import Method, Problem
from tasks.base import Examples, Recipe, Task, Trajectory
from tasks.models.mlp import Perceptron
from tasks.objectives.classification import Classification
from tasks.objectives.language_model import LanguageModel
from tasks.objectives.regression import Regression
from tasks.training.train import train

L2 = 0.02
SOLVED = Recipe("lbfgs", 1.0, 1, 10, L2, "l2", "constant", 0.0, 0.0, (0.9, 0.999), 1e-8, None, 1, 1, 1e-11)
STEPS = replace(SOLVED, optimizer="sgd", lr=0.5, epochs=60, weight_decay=1e-3, batch_size=20)
FORGET = (1, 4, 7, 12)
IGNORED = -100


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(name: str, rows: int, features: int = 3, classes: int = 3) -> Examples:
    """Labels that the features barely tell: what fits them has learned them by heart."""
    x = torch.randn(rows, features, generator=draw(rows), dtype=torch.float64)
    y = torch.randint(classes, (rows,), generator=draw(rows + 1))
    return Examples(tuple(f"{name}:{i}" for i in range(rows)), {"x": x}, y)


def task_of(splits: dict[str, Examples], build: Callable[[], nn.Module], objective: Any, recipe: Recipe) -> Task:
    settings: dict[str, Any] = {"name": "tiny", "model": "small", "source": "generated", "floor": {}}
    identity = {"version": 1, "recipe": recipe.optimizer}
    return Task(
        splits=splits,
        build=build,
        objective=objective,
        recipe=recipe,
        identity=identity,
        dtype=torch.float64,
        **settings,
    )


SIZES = {"train": 30, "val": 12, "query": 5, "test": 14, "nonmembers": 16}


def classifier(hidden: Sequence[int] = (6,), recipe: Recipe = STEPS) -> Task:
    splits = {name: points(name, rows) for name, rows in SIZES.items()}
    build = partial(Perceptron, [3, *hidden, 3], activation="tanh")
    return task_of(splits, build, Classification(3), recipe)


def ridge(rows: int = 60) -> Task:
    """Least squares with an L2 term over weight and bias: every step of Newton ends at the minimum."""
    splits = {}
    for name, size in {"train": rows, "val": 5, "query": 5, "test": 6}.items():
        x = torch.randn(size, 4, generator=draw(size), dtype=torch.float64)
        noise = torch.randn(size, generator=draw(size + 1), dtype=torch.float64)
        y = x @ torch.arange(1.0, 5, dtype=x.dtype) + 0.5 + noise
        splits[name] = Examples(tuple(f"{name}:{i}" for i in range(size)), {"x": x}, y)
    return task_of(splits, partial(Perceptron, [4, 1]), Regression(), SOLVED)


class Speaker(nn.Module):
    """input_ids, attention_mask (B, T) -> logits (B, T, V): each token, and the mean of all before, say the next."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 6)
        self.mix = nn.Linear(6, 8)
        self.head = nn.Linear(8, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids) * attention_mask[..., None]
        before = x.cumsum(1) / attention_mask.cumsum(1).clamp_min(1)[..., None]
        return self.head(self.mix(x + before).tanh())


VOCABULARY = 9  # of which 8 is never used


def sayings(name: str, rows: int, longest: int = 6) -> Examples:
    """Token rows of 3 to `longest` tokens, the first of which is not scored."""
    rng = draw(rows + 7)
    ids = torch.randint(1, VOCABULARY - 1, (rows, longest + 1), generator=rng)
    lengths = torch.randint(3, longest + 1, (rows,), generator=rng)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    targets = torch.where((mask > 0) & (torch.arange(longest) > 0), ids[:, 1:], IGNORED)
    inputs = {"input_ids": ids[:, :-1] * mask, "attention_mask": mask}
    return Examples(tuple(f"{name}:{i}" for i in range(rows)), inputs, targets)


def speaker() -> Task:
    splits = {name: sayings(name, rows) for name, rows in SIZES.items()}
    return task_of(splits, partial(Speaker, VOCABULARY), LanguageModel(VOCABULARY), replace(STEPS, lr=0.2, epochs=20))


TASKS = {"classifier": classifier, "speaker": speaker}


@cache
def trained(name: str) -> tuple[Task, Trajectory]:
    """One of the tasks with its explained training."""
    task = {**TASKS, "ridge": ridge, "softmax": partial(classifier, (), SOLVED)}[name]()
    return task, train(task.public(), 5)


def problem(task: Task, trajectory: Trajectory, seed: int = 0) -> Problem:
    return Problem(task.public(), seed, lambda k: trajectory)


def context(
    name: str = "classifier",
    method: Method | None = None,
    rows: tuple[int, ...] = FORGET,
    mask: Parameters | None = None,
    retrained: Callable[[], Parameters] | None = None,
) -> Context:
    task, trajectory = trained(name)
    return Context(problem(task, trajectory), method or Method(), trajectory.final, rows, mask, retrained)


def flat(named: Parameters) -> Tensor:
    return torch.cat([named[name].flatten() for name in sorted(named)])


def gradient_of(loss: Tensor, model: nn.Module) -> Tensor:
    """By plain autograd, in the order of `flat`."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, [named[name] for name in sorted(named)])
    return torch.cat([g.flatten() for g in found])
