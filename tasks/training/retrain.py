"""The one primitive that every retraining truth is a call of."""

import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tasks.base import Task, digest
from tasks.training.engines import Executor, Rows
from tasks.training.plan import Plan
from tasks.training.store import Store

VERSION = 1  # of what a row means: training, measuring; enters the store's key


def store_of(task: Task, root: Path, shipped: Path | None = None) -> Store:
    """The folder that holds all rows of a task, whatever design asked for them; `shipped`: a root that is only read."""
    name = f"{task.name}-{task.model}-{task.key()[:16]}-v{VERSION}"
    about = {
        "task": task.name,
        "model": task.model,
        "source": task.source,
        "n_train": len(task.train),
        "key": task.key(),
        "version": VERSION,
        "splits": {split: len(rows) for split, rows in task.splits.items()},
        "recipe": vars(task.recipe),
        "identity": dict(task.identity) if task.show_text else digest(dict(task.identity)),  # it may hold their words
    }
    return Store(root / name, None if shipped is None else shipped / name, about)


def retrain(
    task: Task,
    plan: Plan,
    root: Path,
    executor: Executor,
    progress: Callable[[int, int], None] | None = None,
    shipped: Path | None = None,
) -> Rows:
    """Measurements on val and query after each training of the plan, and its seconds (those of a batch of trainings in
    equal parts): {"val": (M, V), "query": (M, Q), "seconds": (M,)}, float64.

    Rows that the store holds are read; the others are trained, each kept as soon as its unit is finished. Several
    launches over one folder share the work: what another is making is waited for, and made here if that one dies.
    `progress(done, rows)` is told what is done.
    """
    task = task.public()
    if plan.weights.shape[1] != len(task.train):
        raise ValueError(f"weights of {plan.weights.shape[1]} examples, the task has {len(task.train)}")
    store, keys = store_of(task, root, shipped), plan.keys()
    size = (plan.weights > 0).sum(1).tolist()  # rows of one size make one stack: neighbours
    where = {keys[row]: row for row in sorted(range(len(plan)), key=lambda row: size[row])}

    def missing() -> list[str]:
        done = store.read()
        return [key for key in where if key not in done]

    def tell() -> None:
        if progress is not None:
            progress(len(where) - len(missing()), len(where))

    tell()
    if missing():
        engine = executor.engine_for(task)  # refused before anything is written
        with store.builder() as builder:

            def units() -> Iterator[Plan]:
                while left := [key for key in missing() if key not in builder.held]:
                    mine = builder.claim(left, executor.share(task, len(left)))
                    if not mine:
                        return
                    yield plan.select([where[key] for key in mine])

            while missing():
                for unit, done in executor.run(task, units()):
                    facts = {"engine": engine, "host": platform.node(), "seconds": done.seconds}
                    seconds = np.full(len(unit), done.seconds / len(unit))
                    store.add(unit.keys(), {**done.rows, "seconds": seconds}, facts)
                    tell()
                if missing():
                    time.sleep(0.5)  # others are at it
                tell()
    rows = store.read()
    measured = {name: np.stack([rows[key][name] for key in keys]) for name in ("val", "query")}
    unknown = np.float64(np.nan)  # of rows that were kept before their seconds were
    return {**measured, "seconds": np.stack([rows[key].get("seconds", unknown) for key in keys])}
