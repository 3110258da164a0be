"""The one primitive that every retraining truth is a call of."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tasks.base import Task
from tasks.training.engines import Executor, Rows
from tasks.training.plan import Plan
from tasks.training.store import Store

VERSION = 1  # of what a row means: training, measuring; enters the store's key


def store_of(task: Task, root: Path) -> Store:
    """The folder that holds all rows of a task, whatever design asked for them."""
    return Store(root / f"{task.name}-{task.model}-{task.key()[:16]}-v{VERSION}")


def retrain(
    task: Task,
    plan: Plan,
    root: Path,
    executor: Executor,
    progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """Measurements on val and query after each training of the plan: {"val": (M, V), "query": (M, Q)}, float64.

    Rows that the store holds are read; the others are trained, each kept as soon as its unit is finished. Several
    launches over one folder share the work: what another is making is waited for, and made here if that one dies.
    `progress(done, rows)` is told what is done.
    """
    task = task.public()
    store, keys = store_of(task, root), plan.keys()
    where = {key: row for row, key in enumerate(keys)}

    def missing() -> list[str]:
        done = store.read()
        return [key for key in where if key not in done]

    def tell() -> None:
        if progress is not None:
            progress(len(where) - len(missing()), len(where))

    tell()
    if missing():
        unit = executor.unit(task)
        with store.builder() as builder:
            while left := missing():
                share = max(unit, min(len(left), 2 * unit * executor.processes()))
                mine = builder.claim(left, share)
                if not mine:
                    time.sleep(0.5)  # others are at it
                    tell()
                    continue
                chosen = plan.select([where[key] for key in mine])
                size = max(1, min(unit, -(-len(chosen) // executor.processes())))

                def units(chosen: Plan = chosen, size: int = size) -> Iterator[Plan]:
                    for start in range(0, len(chosen), size):
                        yield chosen.select(range(start, min(start + size, len(chosen))))

                for finished, rows in executor.run(task, units()):
                    store.add(finished.keys(), rows)
                    tell()
    done = store.read()
    return {name: np.stack([done[key][name] for key in keys]) for name in ("val", "query")}
