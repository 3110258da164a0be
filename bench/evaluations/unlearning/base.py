"""What an unlearner sees, and what it answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Fits, Method, Problem
from tasks.base import Checkpoint, Examples, Task, Trajectory
from tasks.training.train import load

Parameters = dict[str, Tensor]
POINTS = 6  # of a trajectory, the start included


@dataclass(frozen=True)
class Context:
    """The explained model θ0 = `start`, trained on D = F + R, and the rows of F in the training set.

    `mask`, by parameter: True where a weight may move; None: everywhere. `retrained`: the parameters of a gold model,
    for `retrain` and for upper bounds alone.
    """

    problem: Problem
    method: Method
    start: Parameters
    rows: tuple[int, ...]
    mask: Parameters | None = None
    retrained: Callable[[], Parameters] | None = None

    @property
    def task(self) -> Task:
        return self.problem.task

    @property
    def forget(self) -> Examples:
        return self.task.train.select(self.rows)

    @property
    def retain(self) -> Examples:
        return self.task.train.select(self.retain_rows)

    @property
    def retain_rows(self) -> tuple[int, ...]:
        out = set(self.rows)
        return tuple(i for i in range(len(self.task.train)) if i not in out)

    def generator(self, *name: object) -> torch.Generator:
        return self.problem.generator("unlearning", *name)

    def network(self, parameters: Parameters) -> nn.Module:
        """A model with these parameters to be trained, in eval mode: an update draws nothing from dropout."""
        return load(self.task.initial(0), parameters).to(self.problem.device)

    def allowed(self, parameters: Parameters) -> Parameters:
        """m ⊙ θ' + (1 − m) ⊙ θ0: weights outside the mask are θ0's bit by bit, weight decay or not."""
        if self.mask is None:
            return parameters
        return {name: torch.where(self.mask[name], value, self.start[name]) for name, value in parameters.items()}

    def at(self, parameters: Parameters, *name: object) -> Problem:
        """The problem of the retained rows at these parameters, for the inverse curvature of a method."""
        task = replace(self.task, splits={**self.task.splits, "train": self.retain})
        seen = self.problem.trajectory(0)
        there = Trajectory(seen.seed, seen.initial, (Checkpoint(0, parameters, 0.0),), seen.seconds, seen.final_loss)
        where = (*self.problem.where, "retained", *name)
        return replace(self.problem, task=task, explained=lambda k: there, where=where, fits=Fits(), _once={})


@dataclass(frozen=True)
class Unlearned:
    """`path`: (step, parameters) from θ0 to the end, both included. `direction`: of those who take one step."""

    path: tuple[tuple[int, Parameters], ...]
    notes: Mapping[str, Any] = field(default_factory=dict)
    direction: Parameters | None = None

    @property
    def final(self) -> Parameters:
        return self.path[-1][1]


@dataclass(frozen=True)
class Unlearner:
    """`grid`: values of other fields that tuning tries."""

    name: str
    grid: Mapping[str, Sequence[Any]]

    @property
    def uses(self) -> str | None:
        """What of the attribution method it asks for, `solve` or `attribute`; None: the method is not in its row."""
        return None

    @property
    def calibrated(self) -> bool:
        """Whether the method's scores must be in units of the measurement."""
        return False

    @property
    def changes(self) -> bool:
        """Whether θ0 as the answer is a mistake."""
        return True

    @property
    def is_gold(self) -> bool:
        """Whether its answer is the first of the gold models."""
        return False

    @property
    def sees_gold(self) -> bool:
        """Whether the first gold model is in its answer: another one judges it."""
        return self.is_gold

    def unlearn(self, context: Context) -> Unlearned:
        """Gradients of examples go to the meter of `context.problem`."""
        raise NotImplementedError


def flat(parameters: Parameters) -> Tensor:
    """(P,), by name."""
    return torch.cat([parameters[name].flatten() for name in sorted(parameters)])


def moved(start: Parameters, direction: Parameters, scale: float) -> Parameters:
    """θ0 + scale · d."""
    return {name: value + scale * direction[name].to(value) for name, value in start.items()}


def state_of(model: nn.Module) -> Parameters:
    """A copy of what is trained, on the CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def cycle(rows: int, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Batches of row numbers for ever: every pass visits each row once, in a new order."""
    while True:
        yield from torch.randperm(rows, generator=rng).split(size)


def kept_steps(steps: int, points: int = POINTS) -> set[int]:
    """The steps whose parameters are kept, evenly spaced, the last one among them."""
    return {round(steps * k / (points - 1)) for k in range(1, points)}
