"""How fast the truth engine and influence functions are here: ratios from one run, medians of several rounds.

python -m bench.speed [only=...] [rounds=3] [trainings=400]; --help says what the parts are
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tasks.errors import UserError

if TYPE_CHECKING:
    from tasks.base import Task
    from tasks.training.engines import Executor
    from tasks.training.plan import Plan

HELP = """How fast the truth engine and influence functions are here: ratios from one run, medians of several rounds.

    python -m bench.speed [only=vectorised,leave_one_out,processes,ray,ekfac,trak,solvers,logra,memory,precision,own]
                          [rounds=3] [trainings=400]

vectorised     half-data trainings of digits/mlp: the stacked engine on all cores against one sequential trainer a core
leave_one_out  all 1,000 leave-one-outs of digits/logreg to gradient norm 1e-8
processes      trainings of bert_tiny on 1,000 short texts: one process a core against one with torch's default threads,
               and what bfloat16 and batches without length buckets would change
ray            the same rows by Ray on this machine: what a unit costs beside its training (extra `cluster`)
ekfac          EK-FAC scores of 1,000 texts x 100 queries on bert_tiny: ours against kronfluence (`make peers`), one
               thread each, and the share of the processor's matrix-product rate that ours reaches
trak           TRAK's 512 features of the same texts, projected sparsely and densely, against traker (`make peers`)
solvers        conjugate gradients and LiSSA on digits/mlp: 100 queries at once against one by one, with the columns of
               the curvature's root kept in memory and with columns made anew in every product
logra          EK-FAC scores as in `ekfac`, of full gradients against LoGra's 32 x 32 numbers a layer
memory         what scoring adds to this process at its peak, for 1,000, 4,000 and 16,000 training examples
precision      EK-FAC scores as in `ekfac`, with factors and products in float32 against bfloat16
own            a user's CSV file of 100,000 rows and 40 features: suspects by seven cheap methods, command to files
trainings      of the vectorised measurement; 5000 is the size of a published study"""


def main(argv: Sequence[str] | None = None) -> int:
    from bench.__main__ import prepare

    prepare()
    options = {"only": ",".join(PARTS), "rounds": "3", "trainings": "400"}
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    try:
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if key not in options or not equals:
                raise UserError(argument, None, "is not understood", allowed=[f"{k}=..." for k in options])
            options[key] = value
        for key in ("rounds", "trainings"):
            if not options[key].isdigit() or int(options[key]) < 1:
                raise UserError(key, options[key], allowed="1 or more")
        chosen = options["only"].split(",")
        for part in chosen:
            if part not in PARTS:
                raise UserError("only", part, allowed=PARTS)
        print(f"{_cores()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
        for part in chosen:
            for line in PARTS[part](int(options["rounds"]), int(options["trainings"])):
                print(f"{part}: {line}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _vectorised(rounds: int, trainings: int) -> list[str]:
    """Both sides alternate; the sequential side makes enough trainings to last some seconds."""
    from tasks.training.engines import Executor
    from tasks.training.plan import planned, random_subsets

    task = _task("task=digits")
    few, many = 8 * _cores(), trainings
    masks = random_subsets(len(task.train), max(few, many), 0.5, 0)
    plan = planned(masks, 1, "common", 0, 0)
    sequential, stacked = Executor("processes", None), Executor("vectorised", None)
    _made(sequential, task, plan.select(range(_cores())))  # the workers start
    _made(stacked, task, plan.select(range(_cores())))
    slow, fast = [], []
    for _ in range(rounds):
        slow.append(_made(sequential, task, plan.select(range(few))) / few)
        fast.append(_made(stacked, task, plan.select(range(many))) / many)
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return [
        f"sequential {1000 * statistics.median(slow):.1f} ms a model on {_cores()} workers",
        f"stacked {1000 * statistics.median(fast):.1f} ms a model "
        f"({many} trainings {statistics.median(fast) * many:.1f} s; 5,000 at this rate "
        f"{5000 * statistics.median(fast):.0f} s)",
        f"ratio {statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}] over {rounds} rounds",
    ]


def _leave_one_out(rounds: int, trainings: int) -> list[str]:
    from tasks.training.engines import Executor
    from tasks.training.plan import leave_one_out, planned

    task = _task("task=digits", "model=logreg")
    n = len(task.train)
    plan = planned(leave_one_out(n, range(n), 0.0), 1, "fixed", 0, 0)
    took = [_made(Executor("vectorised", None), task, plan) for _ in range(rounds)]
    return [
        f"{n} optima to gradient norm {task.recipe.tolerance:.0e} in {statistics.median(took):.1f} s "
        f"[{min(took):.1f}, {max(took):.1f}] over {rounds} rounds"
    ]


ONE_PROCESS = """
import sys, time
import torch
from bench.speed import _task
from tasks.training.train import train
task, count = _task(*sys.argv[2:]), int(sys.argv[1])
train(task, 0)
started = time.perf_counter()
for seed in range(count):
    train(task, seed, keep=False)
print(torch.get_num_threads(), (time.perf_counter() - started) / count)
"""


def _processes(rounds: int, trainings: int) -> list[str]:
    from tasks.training.engines import Executor
    from tasks.training.plan import planned, random_subsets

    bert = ("task=sst2", "task.data=generated", "task.corruption.rate=0")
    task = _task(*bert)
    each = 4
    masks = random_subsets(len(task.train), each * _cores(), 0.5, 0)
    plan = planned(masks, 1, "common", 0, 0)
    engine = Executor("processes", None)
    _made(engine, task, plan.select(range(_cores())))
    ours, one, threads = [], [], 0
    half = (*bert, f"task.n_train={len(task.train) // 2}")
    for _ in range(rounds):
        ours.append(_made(engine, task, plan) / len(plan))
        threads, seconds = _alone(each, *half)
        one.append(seconds)
    unbucketed = [_alone(each, *half, "model.recipe.bucket=1", threads=1)[1] for _ in range(rounds)]
    bucketed = [_alone(each, *half, threads=1)[1] for _ in range(rounds)]
    ratios = [b / a for a, b in zip(ours, one, strict=True)]
    full, low = _step_seconds(task)
    return [
        f"{statistics.median(ours):.2f} s a training on {_cores()} single-threaded processes "
        f"(100 trainings {100 * statistics.median(ours):.0f} s)",
        f"{statistics.median(one):.2f} s a training in one process with {threads} threads",
        f"ratio {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] over {rounds} rounds",
        f"length buckets: {statistics.median(unbucketed) / statistics.median(bucketed):.2f}x as fast as random batches",
        f"bfloat16 forward and backward: {full / low:.2f}x as fast as float32 on this processor",
    ]


def _alone(count: int, *overrides: str, threads: int | None = None) -> tuple[int, float]:
    """Threads and seconds a training of a process of its own; None: torch's default threads."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS, str(count), *overrides],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found, seconds = done.stdout.split()
    return int(found), float(seconds)


def _step_seconds(task: "Task") -> tuple[float, float]:
    """Forward and backward of one batch in float32 and under bfloat16 autocast, the median of ten, one thread."""
    import torch

    torch.set_num_threads(1)
    model = task.initial(0).train()
    batch = task.train.batch(list(range(task.recipe.batch_size)))

    def seconds(low: bool) -> float:
        took = []
        for _ in range(11):
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = task.loss(model, batch).mean()
            loss.backward()
            took.append(time.perf_counter() - started)
        return statistics.median(took[1:])

    return seconds(False), seconds(True)


def _ray(rounds: int, trainings: int) -> list[str]:
    from tasks.training.engines import Executor
    from tasks.training.plan import planned, random_subsets

    task = _task("task=digits", "model.recipe.epochs=100")
    units = 4 * _cores()
    plan = planned(random_subsets(len(task.train), 25 * units, 0.5, 0), 1, "common", 0, 0)
    lines, shares = [], []
    for executor in (Executor("ray", None), Executor("vectorised", None)):
        _made(executor, task, plan.select(range(25 * _cores())))
        found = []
        for _ in range(rounds):
            started = time.perf_counter()
            busy = [done.seconds for _, done in executor.run(task, _units(executor, task, plan))]
            found.append((_cores() * (time.perf_counter() - started) - sum(busy)) / len(busy))
            shares.append(found[-1] / statistics.mean(busy))
        lines.append(
            f"{executor.engine}: units of {statistics.mean(busy):.2f} s, {1000 * statistics.median(found):.0f} ms of a "
            f"core a unit beside them, {100 * statistics.median(shares[-rounds:]):.1f} % (with the wait for the last)"
        )
    return lines


def _ekfac(rounds: int, trainings: int) -> list[str]:
    from bench.speed_ekfac import LONGEST, SETTINGS, joined, report

    return report(joined(_task(*SETTINGS), LONGEST), rounds)


def _trak(rounds: int, trainings: int) -> list[str]:
    from bench.speed_ekfac import LONGEST, SETTINGS, joined
    from bench.speed_trak import features

    return features(joined(_task(*SETTINGS), LONGEST), rounds)


def _solvers(rounds: int, trainings: int) -> list[str]:
    from bench.speed_solvers import DIGITS, solvers

    return solvers(_task(*DIGITS), rounds)


def _logra(rounds: int, trainings: int) -> list[str]:
    from bench.speed_ekfac import LONGEST, SETTINGS, joined
    from bench.speed_solvers import logra

    return logra(joined(_task(*SETTINGS), LONGEST), rounds)


def _memory(rounds: int, trainings: int) -> list[str]:
    from bench.speed_ekfac import SETTINGS
    from bench.speed_solvers import DIGITS, memory

    return [*memory(_task(*DIGITS)), *memory(_task(*SETTINGS))]


def _precision(rounds: int, trainings: int) -> list[str]:
    from bench.speed_ekfac import LONGEST, SETTINGS, joined
    from bench.speed_solvers import precision

    return precision(joined(_task(*SETTINGS), LONGEST), rounds)


def _made(executor: "Executor", task: "Task", plan: "Plan") -> float:
    """Wall seconds of training a whole plan, without a store."""
    started = time.perf_counter()
    rows = sum(len(unit) for unit, _ in executor.run(task, _units(executor, task, plan)))
    assert rows == len(plan)
    return time.perf_counter() - started


def _units(executor: "Executor", task: "Task", plan: "Plan") -> Iterator["Plan"]:
    start = 0
    while start < len(plan):
        size = executor.share(task, len(plan) - start)
        yield plan.select(range(start, min(start + size, len(plan))))
        start += size


def _task(*overrides: str) -> "Task":
    import torch

    from bench.config import compose
    from bench.run import build_task

    torch.set_flush_denormal(True)
    return build_task(compose(overrides))


def _own(rounds: int, trainings: int) -> list[str]:
    from bench.speed_own import report

    return report(rounds)


def _cores() -> int:
    from tasks.training.engines import Executor

    return Executor("auto", None).processes()


PARTS: dict[str, Callable[[int, int], list[str]]] = {
    "vectorised": _vectorised,
    "leave_one_out": _leave_one_out,
    "processes": _processes,
    "ray": _ray,
    "ekfac": _ekfac,
    "trak": _trak,
    "solvers": _solvers,
    "logra": _logra,
    "memory": _memory,
    "precision": _precision,
    "own": _own,
}


if __name__ == "__main__":
    sys.exit(main())
