"""How rows are trained: many models as one batch, or one by one in a process a core. Never what a row means."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tasks.base import Task
from tasks.errors import UserError, require
from tasks.training.plan import Plan
from tasks.training.train import load, train
from tasks.training.vectorised import measure_stack, train_stack

ENGINES = ("vectorised", "processes")
SMALL = 50_000  # parameters up to which a stack of models is faster than one after the other
STACK = {"sgd": 100, "adamw": 100, "lbfgs": 500}  # models in one batch: enough to hide Python, few enough for the cache
MEASURED = ("val", "query")

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Executor:
    """`engine`: auto, or one by name; `workers`: processes, None for one a core."""

    engine: str
    workers: int | None

    def __post_init__(self) -> None:
        if self.engine not in ("auto", *ENGINES):
            raise UserError("executor.engine", self.engine, allowed=("auto", *ENGINES))
        require(self.workers is None or self.workers >= 1, "executor.workers", self.workers, "1 or more, or null")

    def engine_for(self, task: Task) -> str:
        tokens = task.train.lengths is not None
        if self.engine == "vectorised" and tokens:
            raise UserError(
                "executor.engine",
                "vectorised",
                f"cannot batch models of sequences (model={task.model})",
                allowed="processes",
            )
        if self.engine != "auto":
            return self.engine
        small = sum(p.numel() for p in task.initial(0).parameters()) <= SMALL
        return "vectorised" if small and not tokens else "processes"

    def processes(self) -> int:
        if self.workers is not None:
            return self.workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def unit(self, task: Task) -> int:
        """Rows that are trained, and kept, together."""
        return STACK[task.recipe.optimizer] if self.engine_for(task) == "vectorised" else 1

    def run(self, task: Task, units: Iterator[Plan]) -> Iterator[tuple[Plan, Rows]]:
        """Finished units as they come, in any order. A worker that is free takes the next unit."""
        from joblib import Parallel, delayed

        # A stack's time is spent in kernels that leave the interpreter free: threads do, and start at once.
        engine, backend = {"vectorised": (stacked, "threading"), "processes": (one_by_one, "loky")}[
            self.engine_for(task)
        ]
        parallel = Parallel(
            self.processes(), backend, return_as="generator_unordered", pre_dispatch="2*n_jobs", batch_size=1
        )
        yield from parallel(delayed(_unit)(engine, task, plan) for plan in units)


def _unit(engine: Callable[[Task, Plan], Rows], task: Task, plan: Plan) -> tuple[Plan, Rows]:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    return plan, engine(task, plan)


def stacked(task: Task, plan: Plan) -> Rows:
    """Rows of one number of examples are one stack."""
    counts = (plan.weights > 0).sum(1) if plan.own_batches else torch.full((len(plan),), plan.weights.shape[1])
    parts: list[Rows] = []
    rows: list[int] = []
    for count in counts.unique().tolist():
        same = (counts == count).nonzero()[:, 0].tolist()
        chosen = plan.select(same)
        stack = train_stack(task, chosen.weights, list(chosen.seeds), plan.own_batches)
        parts.append({split: measure_stack(task, stack, split).double().numpy() for split in MEASURED})
        rows.extend(same)
    back = np.argsort(rows)
    return {name: np.concatenate([p[name] for p in parts])[back] for name in MEASURED}


def one_by_one(task: Task, plan: Plan) -> Rows:
    """The sequential trainer, row by row."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in MEASURED}
    for weights, seed in zip(plan.weights, plan.seeds, strict=True):
        trained = train(task, seed, weights, plan.own_batches, keep=False)
        model = load(task.initial(seed), trained.final)
        for split in MEASURED:
            found[split].append(measured(task, model, split))
    return {name: np.stack(values) for name, values in found.items()}


@torch.no_grad()
def measured(task: Task, model: torch.nn.Module, split: str) -> np.ndarray:
    """Measurements of a split, (n,) in float64, in the order of its rows."""
    examples = task.splits[split]
    values = torch.empty(len(examples), dtype=torch.float64)
    for index in examples.batches(256):
        values[index] = task.measure(model, examples.batch(index)).double()
    return values.numpy()
