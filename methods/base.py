"""What a method is, and what it may see."""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tasks.base import Checkpoint, Examples, Task, Trajectory, generator
from tasks.training.plan import Plan
from tasks.training.train import load, without_frozen

T = TypeVar("T")
Retraining = Callable[[Task, Plan], dict[str, np.ndarray]]  # val (M, V), query (M, Q), seconds (M,)


class Unsupported(Exception):
    """This method does not offer this, or the task lacks what it needs: a cell of the table, not an error."""


@dataclass
class Meter:
    """What a method has used so far. A training is charged once, whatever part of it is looked at."""

    gradients: int = 0
    trained: set[Hashable] = field(default_factory=set)  # explained trainings by seed, retrainings by key
    seconds_of_trainings: float = 0.0  # of one process, whenever they were made
    waited: float = 0.0  # seconds that were spent on making them now, which are no attribution
    seconds_of_fits: float = 0.0  # of fits that an earlier run made
    seconds_of_updates: float = 0.0  # of unlearning
    stored_bytes: int = 0  # on disk, of a store of gradients

    @property
    def trainings(self) -> int:
        return len(self.trained)

    def charge(self, training: Hashable, seconds: float) -> None:
        if training not in self.trained:
            self.trained.add(training)
            self.seconds_of_trainings += seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While trainings are made, or read."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - started


@dataclass
class Fits:
    """The last fit of a sweep, for the next run on the same explained model: one fit serves every damping.

    Whoever uses it is charged as if he had made it (peak memory aside).
    """

    owner: Hashable = None
    key: Hashable = None
    value: Any = None
    gradients: int = 0
    seconds: float = 0.0

    def of(self, owner: Hashable) -> "Fits":
        """These fits, empty if they belong to another explained model."""
        if owner != self.owner:
            self.owner, self.key, self.value = owner, None, None
        return self


@dataclass(frozen=True)
class Problem:
    """What a method sees: the public side of a task, the explained models, a generator, a meter.

    `trajectory(k)` is the k-th explained training; 0 is the run that is explained, others have independent seeds and
    are charged to whoever asks. `where` names what is explained where that is not the run itself: all random draws
    depend on it. `retraining` trains a task by a plan, for methods that value examples by retraining. `wanted`: the
    training rows whose scores will be looked at; a method may leave those of others at any number.
    """

    task: Task
    seed: int
    explained: Callable[[int], Trajectory]
    device: str = "cpu"
    meter: Meter = field(default_factory=Meter)
    fits: Fits = field(default_factory=Fits, repr=False)
    where: tuple[object, ...] = ()
    retraining: Retraining | None = field(default=None, repr=False)
    wanted: tuple[int, ...] | None = None
    _once: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.task.annotations is not None or self.task.facts:
            raise ValueError("a problem shows a task's public side only: give task.public()")

    @property
    def train(self) -> Examples:
        return self.task.train

    def trajectory(self, k: int = 0) -> Trajectory:
        """The k-th explained training."""

        def made() -> Trajectory:
            with self.meter.waiting():
                return self.explained(k)

        found = self.once(("trajectory", k), made)
        self.meter.charge(found.seed, found.seconds)
        return found

    def retrained(self, plan: Plan, examples: Examples) -> Tensor:
        """Measurements (M, n) of these examples, float64, after each training of the plan. The plan's seeds are the
        method's own, of names that no truth draws from; each training is charged."""
        if self.retraining is None:
            raise Unsupported("nothing can be retrained here")
        for split in ("val", "query"):
            columns = _columns(self.task.splits[split], examples)
            if columns is not None:
                task = self.task
                break
        else:
            split, columns = "query", list(range(len(examples)))
            task = replace(self.task, splits={**self.task.splits, "query": examples})
        with self.meter.waiting():
            rows = self.retraining(task, plan)
        for key, seconds in zip(plan.keys(), np.nan_to_num(rows["seconds"]).tolist(), strict=True):
            self.meter.charge(key, seconds)
        return torch.as_tensor(rows[split])[:, columns]

    def member(self, k: int) -> "Problem":
        """The same question about the k-th explained training; 0 is this one."""
        return self if k == 0 else self._of(lambda j: self.trajectory(k + j), "member", k)

    def at(self, change: Callable[[Trajectory], Trajectory], *name: object) -> "Problem":
        """The same question about an earlier state of the explained trainings: see `started` and `until`."""
        return self._of(lambda k: change(self.trajectory(k)), *name)

    def within(self, rows: Sequence[int]) -> "Problem":
        """The same question, of whose answer only these training rows are looked at."""
        return replace(self, wanted=tuple(rows))

    def _of(self, explained: Callable[[int], Trajectory], *name: object) -> "Problem":
        return replace(self, explained=explained, where=(*self.where, *name), fits=Fits(), _once={})

    def model(self, parameters: dict[str, Tensor] | None = None) -> nn.Module:
        """The explained model, or the one with these parameters, in eval mode, its parameters frozen; those that the
        training left alone are none of its parameters."""
        chosen = self.trajectory().final if parameters is None else parameters
        model = without_frozen(load(self.task.initial(0), chosen)).to(self.device)
        return model.requires_grad_(False)

    def generator(self, *name: object) -> torch.Generator:
        """Seeded by the run's seed, what is explained, and the name of what is drawn."""
        return generator("method", self.seed, *self.where, *name)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Makes a thing once for this problem: a fitted curvature serves all queries and all dampings."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def fitted(self, key: Hashable, make: Callable[[], T], keep: Callable[[T], bool]) -> T:
        """As `once`, and found again by the next run of a sweep where `keep` allows it."""

        def made() -> T:
            fits = self.fits
            self.trajectory()  # has a charge of its own
            if fits.key == key:
                self.meter.gradients += fits.gradients
                self.meter.seconds_of_fits += fits.seconds
                return fits.value
            started, before = time.perf_counter(), self.meter.gradients
            value = make()
            if keep(value):
                fits.key, fits.value, fits.gradients = key, value, self.meter.gradients - before
                fits.seconds = time.perf_counter() - started
            return value

        return self.once(key, made)


def _columns(split: Examples, examples: Examples) -> list[int] | None:
    """Where these examples stand in a split; None where they do not."""
    place = {i: column for column, i in enumerate(split.ids)}
    columns = [place[i] for i in examples.ids if i in place]
    same = len(columns) == len(examples) and split.select(columns).fingerprint() == examples.fingerprint()
    return columns if same else None


def started(training: Trajectory) -> Trajectory:
    """As if it had ended where it began: the base model."""
    return replace(training, checkpoints=(Checkpoint(0, training.initial, 0.0),))


def until(c: int) -> Callable[[Trajectory], Trajectory]:
    """As if it had ended at its c-th checkpoint (from 0)."""
    return lambda training: replace(training, checkpoints=training.checkpoints[: c + 1])


class Method:
    """A method offers `attribute`, `value`, or both; it is a frozen dataclass of its settings.

    `calibrated`: scores are in units of the measurement; otherwise only their order counts.
    `signed`: positive scores mean that an example helped; `random` promises nothing.
    `needs`: of "texts", "labels", "checkpoints", "retraining", what the task must have.
    `retrainings(task)`: how many trainings it asks for beyond the explained ones, told by plan=true.
    """

    calibrated: bool = False
    signed: bool = True
    needs: frozenset[str] = frozenset()

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        """scores (Q, N): [q, i] estimates measurement of q with i minus without i; positive: i helped."""
        raise Unsupported(f"{type(self).__name__} scores no query")

    def value(self, problem: Problem) -> Tensor:
        """(N,): higher is more helpful, lower more suspicious; no query."""
        raise Unsupported(f"{type(self).__name__} has no value without a query")

    def solve(self, problem: Problem, vector: dict[str, Tensor], of: Sequence[Examples] = ()) -> dict[str, Tensor]:
        """(H + γI + λI)⁻¹ v at the explained parameters, H of the problem's training set; v and the answer by
        parameter, zero for those that the method does not cover, and for rows of embeddings that neither the training
        set looks up nor `of`, the examples whose gradients v is made of."""
        raise Unsupported(f"{type(self).__name__} inverts no curvature")

    def detail(self, problem: Problem, queries: Examples, by: str) -> dict[str, Tensor]:
        """Parts of `attribute` that sum to it: by="layer" {"layers": (L, Q, N)}, by="token" {"train_tokens": (Q, N, T),
        "query_tokens": (Q, T, N)}, the last of T being what belongs to no token."""
        raise Unsupported(f"{type(self).__name__} has no scores by {by}")

    def report(self, problem: Problem, queries: Examples) -> dict[str, Tensor]:
        """Figures of the method's own about an attribution, by name (Q,): their means enter the record, not ranked."""
        return {}

    def unmet(self, task: Task) -> str | None:
        """Why this method cannot run on a task, told before anything is trained; None where it can."""
        if "texts" in self.needs and task.train.texts is None:
            return f"needs texts, which task={task.name} does not have"
        targets = task.train.targets
        if "labels" in self.needs and (targets.is_floating_point() or targets.ndim != 1):
            return f"needs class labels, which task={task.name} does not have"
        if "retraining" in self.needs and task.recipe.epochs == 0:
            return "needs retrainings, and model.recipe.epochs=0 trains nothing"
        if "checkpoints" in self.needs and task.recipe.epochs == 0:
            return "needs checkpoints, and model.recipe.epochs=0 trains nothing"
        if "checkpoints" in self.needs and task.recipe.optimizer == "lbfgs":
            return f"needs checkpoints, which model={task.model} (solved to its optimum) does not keep"
        return None

    def retrainings(self, task: Task) -> int:
        return 0

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the files that the settings name: another content is another run."""
        return {}

    def offers(self, name: str) -> bool:
        """Whether `attribute`, `value` or `solve` is this method's own."""
        return getattr(type(self), name) is not getattr(Method, name)


def require_eval(model: nn.Module) -> None:
    """Raises if any module is in train mode: dropout or batch statistics would enter the numbers."""
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise RuntimeError(f"in train mode while it is measured: {', '.join(training[:3])}")
