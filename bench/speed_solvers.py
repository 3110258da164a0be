"""What it saves to solve for all queries at once, to compress and to round, and what memory scoring takes.

Parts `solvers`, `logra`, `memory` and `precision` of `python -m bench.speed`, on one thread.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from bench.memory import Peak
from bench.speed_ekfac import DAMPING, Took, _correlation, _seconds, problem_of
from methods.base import Problem
from methods.compression.logra import LoGra
from methods.curvature import products
from methods.curvature.base import Curvature
from methods.curvature.cg import ConjugateGradients
from methods.curvature.damping import Damping
from methods.curvature.eigenbasis import Eigenbases
from methods.curvature.ekfac import EKFAC
from methods.curvature.lissa import LiSSA
from methods.curvature.operator import Operator
from methods.gradients.blocks import blocks_of
from methods.gradients.per_example import Gradient, flat
from methods.gradients.source import Source
from methods.influence import Influence
from tasks.base import Examples, Task

DIGITS = ("task=digits", "task.n_query=100")
STRENGTH, TOLERANCE, BATCH = 0.01, 1e-3, 50
SIZES = (1000, 4000, 16000)
MIB = 2**20


@contextmanager
def kept_up_to(size: int) -> Iterator[None]:
    """The matrix-free products keep their columns where they fit in `size` bytes."""
    before = products.KEPT
    products.KEPT = size
    try:
        yield
    finally:
        products.KEPT = before


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def solvers(task: Task, rounds: int, depth: int = 200, apart: Sequence[int] = (10, 2)) -> list[str]:
    """`apart`: how many of the queries are solved for one by one, with columns kept and with columns made anew."""
    problem = problem_of(task)
    model = problem.model()
    source, l2 = Source(problem.task, model, tuple(blocks_of(model))), task.recipe.l2
    queries = source.collected(task.splits["query"], task.objective.measure)
    count, damping = len(queries[0].values), Damping("absolute", STRENGTH, "global")
    scale = 1.1 * Operator(problem, source, "ggn").largest(STRENGTH + l2, batch_size=BATCH)  # keeps the columns
    curvatures: dict[str, Curvature] = {
        f"conjugate gradients to {TOLERANCE:.0e}": ConjugateGradients("ggn", TOLERANCE, 1000),
        f"LiSSA, {depth} steps of {BATCH}": LiSSA("ggn", depth, BATCH, 1, scale),
    }
    lines = [
        f"{count} queries, {len(task.train):,} training examples, {source.size:,} parameters, model={task.model} as "
        f"initialised (seed 0, untrained), GGN, absolute damping {STRENGTH}, L2 {l2}; LiSSA's scale is found beforehand"
    ]
    for size, few, how in zip((products.KEPT, 0), apart, ("kept in memory", "made anew in every product"), strict=True):
        chosen = torch.linspace(0, count - 1, few).long()
        for name, curvature in curvatures.items():
            fitted = curvature.fit(problem, source)

            def solved(rows: Tensor, fitted=fitted) -> Tensor:  # type: ignore[no-untyped-def]
                return flat(fitted.solve([Gradient(g.block, g.values[rows]) for g in queries], damping, l2))

            def one_by_one(rows: Tensor = chosen, solved=solved) -> Tensor:  # type: ignore[no-untyped-def]
                return torch.cat([solved(row) for row in rows.split(1)])

            whole, single, ratios = [], [], []
            with kept_up_to(size), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # LiSSA says how far it is
                solved(chosen[:1])  # warms up
                for _ in range(rounds):
                    seconds, together = _timed(partial(solved, torch.arange(count)))
                    whole.append(seconds)
                    seconds, alone = _timed(one_by_one)
                    single.append(seconds / few)
                    ratios.append(count * single[-1] / whole[-1])
            apart_by = ((alone - together[chosen]).norm(dim=1) / together[chosen].norm(dim=1)).max().item()
            lines.append(
                f"{name}, columns {how}: all at once {_span(whole)} s, one by one {_span(single)} s each (of {few}), "
                f"{count} one by one {_span(ratios)}x the time of all at once, over {rounds} rounds; solutions differ "
                f"by {apart_by:.0e} at most"
            )
    return lines


@one_thread()
def logra(task: Task, rounds: int, rank: int = 32) -> list[str]:
    full = _ekfac()
    sides = {"full gradients": full, f"LoGra, {rank} x {rank} a layer": replace(full, compression=LoGra(rank))}
    return [_setting(task), *compared(task, rounds, sides)]


@one_thread()
def precision(task: Task, rounds: int) -> list[str]:
    full = _ekfac()
    return [_setting(task), *compared(task, rounds, {"float32": full, "bf16": replace(full, precision="bf16")})]


def compared(task: Task, rounds: int, sides: Mapping[str, Influence]) -> list[str]:
    """Lines on two methods that alternate: seconds, their ratios, the correlation of the scores."""
    few = replace(task, splits={name: split.select(range(0, len(split), 5)) for name, split in task.splits.items()})
    for method in sides.values():
        run(few, method)  # warms up
    took: dict[str, list[Took]] = {name: [] for name in sides}
    scores = {}
    for _ in range(rounds):
        for name, method in sides.items():
            seconds, scores[name] = run(task, method)
            took[name].append(seconds)
    one, other = sides
    parts: dict[str, Callable[[Took], float]] = {
        "fit": lambda t: t.fit,
        "scores": lambda t: t.score,
        "both": lambda t: t.both,
    }
    ratios = (
        f"{part} {_span([of(a) / of(b) for a, b in zip(took[one], took[other], strict=True)])}x"
        for part, of in parts.items()
    )
    return [
        *(_seconds(name, seconds) for name, seconds in took.items()),
        f"{one} take {', '.join(ratios)} the time of {other}, over {rounds} rounds",
        f"correlation of the scores {_correlation(scores[one], scores[other]):.5f}",
    ]


def run(task: Task, method: Influence) -> tuple[Took, Tensor]:
    """Scores once with the fit and once without: what the second spares is the fit, and all that is made for it."""
    problem = problem_of(task)
    both, scores = _timed(partial(method.attribute, problem, task.splits["query"]))
    score, _ = _timed(partial(method.attribute, problem, task.splits["query"]))
    return Took(both - score, score), scores


@dataclass(frozen=True, eq=False)
class FirstFit:
    """EK-FAC of the first problem that it meets; others of the same model get the same."""

    made: list[Eigenbases] = field(default_factory=list)
    precision = None

    def fit(self, problem: Problem, source: Source) -> Eigenbases:
        if not self.made:
            self.made.append(EKFAC("empirical").fit(problem, source))
        return replace(self.made[0], blocks=source.blocks)


@one_thread()
def memory(task: Task, sizes: Sequence[int] = SIZES) -> list[str]:
    """The first size is what EK-FAC is fitted on."""
    curvature, queries = FirstFit(), task.splits["query"]
    method = replace(_ekfac(), curvature=curvature)
    method.attribute(problem_of(_with(task, repeated(task.train, sizes[0]))), queries)
    parameters = sum(b.size for b in curvature.made[0].blocks)
    numbers = 4 * len(queries) * parameters / MIB
    lines = [
        f"{len(queries)} queries, model={task.model} as initialised, {parameters:,} parameters in use, EK-FAC "
        f"fitted on the first {sizes[0]:,} examples beforehand, rows repeated; the queries' gradients are "
        f"{numbers:.0f} MiB"
    ]
    added: list[float] = []
    for n in sizes:
        problem, peak = problem_of(_with(task, repeated(task.train, n))), Peak()
        with peak.measured():
            seconds, scores = _timed(partial(method.attribute, problem, queries))
        if peak.bytes is None:
            return [*lines, "this system does not tell the peak memory of a process"]
        added.append(peak.bytes / MIB)
        lines.append(
            f"{n:,} training examples: scoring adds {added[-1]:.1f} MiB at its peak, of which the scores are "
            f"{scores.nbytes / MIB:.1f} MiB; all gradients would be {4 * n * parameters / MIB:,.0f} MiB "
            f"({seconds:.1f} s)"
        )
        del problem, scores
    more = sizes[-1] - sizes[0]
    return [
        *lines,
        f"from {sizes[0]:,} to {sizes[-1]:,} the peak changes by {added[-1] - added[0]:+.1f} MiB, the scores by "
        f"{8 * len(queries) * more / MIB:+.1f}, all gradients would by {4 * more * parameters / MIB:+,.0f}",
    ]


def repeated(examples: Examples, n: int) -> Examples:
    """n rows, the given ones over and over, with ids of their own."""
    rows = torch.arange(n) % len(examples)
    inputs = {name: values[rows] for name, values in examples.inputs.items()}
    return Examples(tuple(map(str, range(n))), inputs, examples.targets[rows])


def _with(task: Task, train: Examples) -> Task:
    return replace(task, splits={**task.splits, "train": train}, annotations=None)


def _ekfac() -> Influence:
    return Influence(EKFAC("empirical"), Damping("absolute", DAMPING, "block"))


def _setting(task: Task) -> str:
    tokens = task.train.inputs["attention_mask"].sum(1)
    return (
        f"{len(task.train):,} texts of {tokens.float().mean():.0f} tokens on average x {len(task.splits['query'])} "
        f"queries, model={task.model} as initialised (seed 0, untrained), all blocks, empirical Fisher, absolute "
        f"damping {DAMPING:.0e}, one thread; scores: once more, everything fitted"
    )


def _timed(make: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.perf_counter()
    found = make()
    return time.perf_counter() - started, found


def _span(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
