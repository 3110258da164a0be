"""How rows are trained: many models as one batch, or one by one in a process a core, here or on a Ray cluster.

An engine never changes what a row means, only where and how fast it is made.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import torch

from tasks.base import Task
from tasks.errors import UserError, require
from tasks.training.memory import free_memory
from tasks.training.plan import Plan
from tasks.training.train import load, train
from tasks.training.vectorised import bytes_of_a_model, measure_stack, stackable, train_stack

ENGINES = ("vectorised", "processes", "ray")
SMALL = 50_000  # parameters up to which a stack of models is faster than one after the other
STACK = {"sgd": 50, "adam": 50, "adamw": 50, "lbfgs": 500}  # in one batch: Python is hidden, the cache holds it
MEASURED = ("val", "query")
RETRIES = 3  # of a unit whose Ray node died

Rows = dict[str, np.ndarray]
Engine = Callable[[Task, Plan], Rows]
Submit = Callable[[Plan], "Future[Done]"]


@dataclass(frozen=True)
class Done:
    """A finished unit: its rows in the order of its plan, and what making them took."""

    rows: Rows
    seconds: float


@dataclass(frozen=True)
class Executor:
    """`engine`: auto, or one by name; `workers`: null for one a core; `address` of a running Ray cluster, null to
    start one on this machine."""

    engine: str
    workers: int | None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("auto", *ENGINES):
            raise UserError("executor.engine", self.engine, allowed=("auto", *ENGINES))
        require(self.workers is None or self.workers >= 1, "executor.workers", self.workers, "1 or more, or null")
        if self.address is not None and self.engine != "ray":
            raise UserError("executor.address", self.address, "is Ray's", hint="add executor=ray")
        if self.engine == "ray" and find_spec("ray") is None:  # told before anything is trained or written
            hint = "pip install 'attribution-bench[cluster]'"
            raise UserError("executor.engine", "ray", "is not installed", hint=hint)

    def engine_for(self, task: Task) -> str:
        """`auto`: small models without sequences or dropout as one batch, all others one in a process."""
        if self.engine == "vectorised" and not stackable(task):
            raise UserError(
                "executor.engine",
                "vectorised",
                f"cannot batch models of sequences or with dropout (model={task.model})",
                allowed="processes, ray",
            )
        if self.engine != "auto":
            return self.engine
        return "vectorised" if stackable(task) and _parameters(task) <= SMALL else "processes"

    def stacks(self, task: Task) -> bool:
        """Whether a unit is a batch of models; else a single training."""
        engine = self.engine_for(task)
        return engine == "vectorised" or (engine == "ray" and stackable(task) and _parameters(task) <= SMALL)

    def processes(self) -> int:
        """Units that are made at once."""
        if self.workers is not None:
            return self.workers
        if self.engine == "ray":
            import ray

            if ray.is_initialized():
                return max(1, int(ray.cluster_resources().get("CPU", 1)))
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def unit(self, task: Task) -> int:
        """The most rows that are trained, and kept, together: what half of the free memory holds for every worker."""
        if not self.stacks(task):
            return 1
        fits = free_memory() // 2 // self.processes() // bytes_of_a_model(task)
        return max(1, min(STACK[task.recipe.optimizer], fits))

    def share(self, task: Task, left: int) -> int:
        """Rows of the next unit when `left` are to do: whole units, then smaller ones so that workers end together
        (guided self-scheduling, Polychronopoulos & Kuck 1987), but none so small that batching does not pay."""
        unit = self.unit(task)
        return min(unit, max(-(-unit // 4), -(-left // self.processes())))

    def run(self, task: Task, units: Iterator[Plan]) -> Iterator[tuple[Plan, Done]]:
        """Finished units as they come, in any order; a unit is drawn from `units` when a worker is free for it.

        If one raises, those that are finished are given out first.
        """
        make = stacked if self.stacks(task) else one_by_one
        with self._workers(task, make) as submit:
            running: dict[Future[Done], Plan] = {}
            ended: list[tuple[Plan, Future[Done]]] = []
            while True:
                try:
                    while len(running) < self.processes() and (unit := next(units, None)) is not None:
                        running[submit(unit)] = unit
                except BaseException:
                    yield from ((unit, future.result()) for unit, future in ended)
                    raise
                for unit, future in ended:  # the workers are busy again by now
                    yield unit, future.result()
                if not running:
                    return
                ended = [(running.pop(f), f) for f in wait(running, return_when=FIRST_COMPLETED).done]
                if broken := [f for _, f in ended if f.exception() is not None]:
                    yield from ((unit, f.result()) for unit, f in ended if f not in broken)
                    broken[0].result()

    def _workers(self, task: Task, make: Engine) -> AbstractContextManager[Submit]:
        if self.engine_for(task) == "ray":
            return _on_ray(self, task, make)
        # A stack's time is spent in kernels that leave the interpreter free: threads do, and start at once.
        return (_threads if make is stacked else _processes)(self.processes(), task, make)


def _unit(make: Engine, task: Task, plan: Plan) -> Done:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    started = time.perf_counter()
    rows = make(task, plan)
    return Done(rows, time.perf_counter() - started)


@contextmanager
def _threads(workers: int, task: Task, make: Engine) -> Iterator[Submit]:
    """Daemons: an interrupted program does not wait for the stacks in flight."""
    pool = ThreadPool(workers)

    def work(plan: Plan, future: "Future[Done]") -> None:
        try:
            future.set_result(_unit(make, task, plan))
        except BaseException as error:
            future.set_exception(error)

    def submit(plan: Plan) -> "Future[Done]":
        future: Future[Done] = Future()
        pool.apply_async(work, (plan, future))
        return future

    try:
        yield submit
    finally:
        pool.terminate()


@contextmanager
def _processes(workers: int, task: Task, make: Engine) -> Iterator[Submit]:
    from joblib.externals.loky import get_reusable_executor  # as multiprocessing, for any script and any callable

    pool = get_reusable_executor(max_workers=workers, timeout=300)
    try:
        yield lambda plan: pool.submit(_unit, make, task, plan)
    except BaseException:
        pool.shutdown(wait=False, kill_workers=True)
        raise


@contextmanager
def _on_ray(executor: Executor, task: Task, make: Engine) -> Iterator[Submit]:
    """The task goes into the object store once; a unit whose node dies is made again on another."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        surroundings = {
            "env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        }  # one file system, one code
        settings: dict[str, Any] = {
            "logging_level": "ERROR",
            "log_to_driver": False,
            "runtime_env": surroundings,
        }
        if executor.address is None:
            settings |= {"num_cpus": executor.processes(), "include_dashboard": False}
        try:
            _reach(executor.address or "")
            ray.init(address=executor.address, **settings)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                "executor.address", executor.address, "answers no Ray cluster", hint=str(error).splitlines()[0]
            ) from error
    held = ray.put(task)
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_unit)
    try:
        yield lambda plan: remote.remote(make, held, plan).future()
    except RayTaskError as error:
        if not isinstance(error.cause, RayError):
            raise error.cause from error
        raise UserError("executor.engine", "ray", f"failed on a worker: {str(error.cause).splitlines()[0]}") from error
    except RayError as error:
        raise UserError(
            "executor.engine",
            "ray",
            f"lost its workers ({type(error).__name__}, after {RETRIES} more tries)",
            hint="finished rows are kept; the same command resumes",
        ) from error


def _reach(address: str) -> None:
    """Raises OSError where nobody listens at host:port: Ray would end the process, without an exception."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


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


def _parameters(task: Task) -> int:
    return sum(p.numel() for p in task.initial(0).parameters())
