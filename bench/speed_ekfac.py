"""EK-FAC beside kronfluence's: the same model, data, labels and damping, one thread each.

Part `ekfac` of `python -m bench.speed`. The peer is optional: `make peers`.
"""

import contextlib
import gc
import importlib
import importlib.util
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from methods.base import Problem
from methods.curvature.base import Curvature, Fitted
from methods.curvature.damping import Damping
from methods.curvature.ekfac import EKFAC
from methods.curvature.identity import Identity
from methods.gradients.source import Source
from methods.influence import Influence
from tasks.base import Checkpoint, Examples, Task, Trajectory

SETTINGS = ("task=sst2", "task.data=generated", "task.corruption.rate=0", "task.n_query=100")
LONGEST = 48  # tokens
DAMPING = 1e-5  # absolute, for both
BATCHES = (32, 64, 128)  # of the peer; the fastest counts

Row = dict[str, Any]  # {"inputs": {name: tensor}, "targets": tensor}, of one example or of a batch


@dataclass
class Took:
    """Seconds of one run, or its FLOP: 2·m·n·k of each (m, k) · (k, n) that is run, eigendecompositions aside."""

    fit: float
    score: float

    @property
    def both(self) -> float:
        return self.fit + self.score


@dataclass(frozen=True, eq=False)
class Watched:
    """A curvature that notes how long its fit takes, and its FLOP where they are counted."""

    curvature: Curvature
    counter: FlopCounterMode | None = None
    seen: list[float] = field(default_factory=list)  # seconds, FLOP
    precision = None

    def fit(self, problem: Problem, source: Source) -> Fitted:
        before, started = _flop(self.counter), time.perf_counter()
        fitted = self.curvature.fit(problem, source)
        self.seen.extend([time.perf_counter() - started, _flop(self.counter) - before])
        return fitted


def _flop(counter: FlopCounterMode | None) -> float:
    return 0.0 if counter is None else float(counter.get_total_flops())


def joined(task: Task, longest: int) -> Task:
    """Generated sentences are short: text i becomes the sentences i, i + 1, ..., i + (i mod 5), cut to `longest`
    tokens. Its label stays, which is enough to measure speed."""

    def longer(examples: Examples) -> Examples:
        ids, lengths = examples.inputs["input_ids"], examples.inputs["attention_mask"].sum(1).tolist()
        whole = torch.zeros(len(ids), longest, dtype=ids.dtype)
        mask = torch.zeros_like(whole)
        for i in range(len(ids)):
            rows = [j % len(ids) for j in range(i, i + 1 + i % 5)]
            body = torch.cat([ids[j, 1 : lengths[j] - 1] for j in rows])[: longest - 2]
            text = torch.cat([ids[i, :1], body, ids[i, lengths[i] - 1 : lengths[i]]])
            whole[i, : len(text)], mask[i, : len(text)] = text, 1
        return replace(examples, inputs={"input_ids": whole, "attention_mask": mask}, texts=None)

    return replace(task, splits={name: longer(split) for name, split in task.splits.items()}, annotations=None)


def problem_of(task: Task) -> Problem:
    """The initial model of seed 0 is explained: speed and agreement need no training."""
    start = {name: p.detach().clone() for name, p in task.initial(0).named_parameters()}
    return Problem(task.public(), 0, lambda k: Trajectory(k, start, (Checkpoint(1, start, 1.0),), 0.0, 0.0))


def ours(task: Task, damping: float, modules: Sequence[str] | None, count: bool = False) -> tuple[Took, Tensor]:
    """Seconds (or FLOP) of EK-FAC and its scores (Q, N)."""
    counter = FlopCounterMode(display=False) if count else None
    curvature = Watched(EKFAC("empirical"), counter)
    chosen = None if modules is None else tuple(modules)
    method = Influence(curvature, Damping("absolute", damping, "block"), "dot", chosen)
    problem, started = problem_of(task), time.perf_counter()
    with counter or contextlib.nullcontext():
        scores = method.attribute(problem, task.splits["query"])
    total, fit = (_flop(counter), curvature.seen[1]) if count else (time.perf_counter() - started, curvature.seen[0])
    return Took(fit, total - fit), scores


class Peer:
    """kronfluence's EK-FAC of the training labels, on a model that it may change; what it keeps goes into `folder`.

    Its scores are ∇f(q)ᵀ (H + λI)⁻¹ ∇ℓ(i) without 1/N, for an f that is low where the query is well; here f = −m.
    `cut`: batches are cut to their longest row. Two mistakes, to be made for contrast: a `mean` loss, and padding that
    is not `masked`.
    """

    def __init__(
        self, task: Task, model: nn.Module, folder: str, cut: bool = False, mean: bool = False, masked: bool = True
    ) -> None:
        library: Any = importlib.import_module("kronfluence")
        self.arguments: Any = importlib.import_module("kronfluence.arguments")
        total = torch.mean if mean else torch.sum

        class Described(library.Task):
            def compute_train_loss(self, batch: Row, model: nn.Module, sample: bool = False) -> Tensor:
                assert not sample, "only the training labels are asked for"
                return total(task.objective.loss(model(**batch["inputs"]), batch["targets"]))

            def compute_measurement(self, batch: Row, model: nn.Module) -> Tensor:
                return -task.objective.measure(model(**batch["inputs"]), batch["targets"]).sum()

            def get_attention_mask(self, batch: Row) -> Tensor | None:
                return batch["inputs"].get("attention_mask") if masked else None

        described, self.dtype = Described(), next(model.parameters()).dtype
        self.model = library.prepare_model(model, described)
        self.modules = tuple(name for name, m in model.named_modules() if type(m).__name__.startswith("Tracked"))
        self.analyzer = library.Analyzer(
            "peer", self.model, described, cpu=True, disable_tqdm=True, output_dir=folder, log_level=logging.ERROR
        )
        loading: Any = importlib.import_module("kronfluence.utils.dataset")
        self.loading = loading.DataLoaderKwargs(collate_fn=_cut if cut else default_collate)

    def rows(self, examples: Examples) -> list[Row]:
        """One dictionary an example, padded as the split is."""
        inputs = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in examples.inputs.items()}
        return [{"inputs": {k: v[i] for k, v in inputs.items()}, "targets": y} for i, y in enumerate(examples.targets)]

    def fit(self, train: list[Row], batch_size: int) -> None:
        kinds = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
        settings = self.arguments.FactorArguments(
            strategy="ekfac", use_empirical_fisher=True, **{f"{kind}_dtype": self.dtype for kind in kinds}
        )
        with quiet():
            self.analyzer.fit_all_factors(
                "ekfac", train, per_device_batch_size=batch_size, dataloader_kwargs=self.loading,
                factor_args=settings, overwrite_output_dir=True,
            )  # fmt: skip

    def scores(
        self, queries: list[Row], train: list[Row], damping: float, batch_size: int, by_module: bool = False
    ) -> dict[str, Tensor]:
        """(Q, N) in this project's units, by module or of "all_modules"; all queries at once, so that the training set
        is read once."""
        kinds = ("per_sample_gradient", "precondition", "score")
        settings = self.arguments.ScoreArguments(
            damping_factor=damping,
            compute_per_module_scores=by_module,
            **{f"{kind}_dtype": self.dtype for kind in kinds},
        )
        with quiet():
            self.analyzer.compute_pairwise_scores(
                "scores", "ekfac", queries, train, per_device_query_batch_size=len(queries),
                per_device_train_batch_size=batch_size, dataloader_kwargs=self.loading, score_args=settings,
                overwrite_output_dir=True,
            )  # fmt: skip
        found = self.analyzer.load_pairwise_scores("scores")
        return {name: scores.double() / len(train) for name, scores in found.items()}


def _cut(rows: list[Row]) -> Row:
    batch = default_collate(rows)
    longest = int(batch["inputs"]["attention_mask"].sum(1).max())
    return {**batch, "inputs": {key: v[:, :longest] for key, v in batch["inputs"].items()}}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For the peer's sake: no deprecations of its own, and when it collects garbage between its steps, as it does, none
    of the many objects of this process are gone through."""
    gc.freeze()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        gc.unfreeze()


def theirs(task: Task, damping: float, batch_size: int, cut: bool) -> tuple[Took, Tensor]:
    """Seconds of kronfluence, and its scores (Q, N). `cut`: rows by length, batches cut to their longest, as ours."""
    order = torch.cat(task.train.batches(len(task.train))) if cut else torch.arange(len(task.train))
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(task, problem_of(task).model(), folder, cut)
        train, queries = peer.rows(task.train.select(order)), peer.rows(task.splits["query"])
        started = time.perf_counter()
        peer.fit(train, batch_size)
        fitted = time.perf_counter()
        (found,) = peer.scores(queries, train, damping, batch_size).values()
        done = time.perf_counter()
    scores = torch.empty_like(found)
    scores[:, order] = found
    return Took(fitted - started, done - fitted), scores


def peak(size: int = 1024, tries: int = 10) -> float:
    """FLOP a second of a float32 matrix product, the best of some."""
    a, took = torch.randn(size, size), []
    for _ in range(tries):
        started = time.perf_counter()
        a @ a
        took.append(time.perf_counter() - started)
    return 2 * size**3 / min(took)


def report(task: Task, rounds: int, damping: float = DAMPING) -> list[str]:
    """Lines; all sides alternate, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _report(task, rounds, damping)
    finally:
        torch.set_num_threads(threads)


def _report(task: Task, rounds: int, damping: float) -> list[str]:
    n, queries, lengths = len(task.train), len(task.splits["query"]), task.train.inputs["attention_mask"].sum(1)
    model = task.initial(0)
    linear = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    few = replace(
        task,
        splits={"train": task.train.select(range(0, n, 5)), "query": task.splits["query"].select(range(0, queries, 5))},
    )
    sides: dict[str, Callable[[Task], tuple[Took, Tensor]]] = {
        "linear": lambda t: ours(t, damping, linear),
        "all": lambda t: ours(t, damping, None),
    }
    installed = importlib.util.find_spec("kronfluence") is not None
    if installed:
        trials = {size: theirs(few, damping, size, False)[0].both for size in BATCHES}
        size = min(trials, key=trials.__getitem__)
        sides["padded"] = lambda t: theirs(t, damping, size, False)
        sides["cut"] = lambda t: theirs(t, damping, size, True)
    for side in sides.values():
        side(few)  # warms up
    took: dict[str, list[Took]] = {name: [] for name in sides}
    scores, rates = {}, [peak()]
    for _ in range(rounds):
        for name, side in sides.items():
            seconds, scores[name] = side(task)
            took[name].append(seconds)
            rates.append(peak())
    rate = max(rates)
    lines = [
        f"{n:,} texts of {lengths.float().mean():.0f} tokens on average and {lengths.max()} at most x {queries} "
        f"queries, model={task.model} as initialised (seed 0, untrained), float32, labels of the data (empirical "
        f"Fisher), absolute damping {damping:.0e}, one thread",
        _seconds(f"ours, {len(linear)} linear layers", took["linear"]),
        _seconds("ours, all blocks (embeddings and norms too)", took["all"]),
        f"1024 x 1024 float32 matrix products reach {rate / 1e9:.1f} GFLOP/s here",
        _share("ours, linear layers", took["linear"], ours(task, damping, linear, count=True)[0], rate),
        _share("ours, all blocks", took["all"], ours(task, damping, None, count=True)[0], rate),
    ]
    if not installed:
        return [*lines, "kronfluence is not installed: `make peers` installs it"]
    identity: Any = Identity()
    dots = Influence(identity, Damping("absolute", 1.0, "block"), modules=tuple(linear))
    expected, difference = scores["padded"], (scores["linear"] - scores["padded"]).abs().max()
    return [
        *lines,
        _seconds(f"kronfluence, linear layers, padded to {task.train.inputs['input_ids'].shape[1]}", took["padded"])
        + f"; batches of {size}, the fastest of {', '.join(f'{k} ({v:.1f} s on a fifth)' for k, v in trials.items())}",
        _seconds("kronfluence, rows sorted by length, batches cut to their longest", took["cut"]),
        _ratio("padded", took["padded"], took["linear"]),
        _ratio("sorted and cut", took["cut"], took["linear"]),
        f"scores of ours and kronfluence on the linear layers: correlation "
        f"{_correlation(scores['linear'], expected):.8f}, largest difference "
        f"{(difference / expected.abs().max()).item():.1e} of the largest score; without a curvature ours would "
        f"correlate {_correlation(dots.attribute(problem_of(task), task.splits['query']), expected):.3f}",
    ]


def _ratio(name: str, theirs: Sequence[Took], ours: Sequence[Took]) -> str:
    ratios = [a.both / b.both for a, b in zip(theirs, ours, strict=True)]
    return (
        f"kronfluence ({name}) takes {statistics.median(ratios):.2f}x [{min(ratios):.2f}, {max(ratios):.2f}] our time, "
        f"fit and scores, over {len(ratios)} rounds"
    )


def _seconds(name: str, runs: Sequence[Took]) -> str:
    parts = {"fit": [t.fit for t in runs], "scores": [t.score for t in runs], "both": [t.both for t in runs]}
    told = (f"{k} {statistics.median(v):.2f} s [{min(v):.2f}, {max(v):.2f}]" for k, v in parts.items())
    return f"{name}: " + ", ".join(told)


def _share(name: str, runs: Sequence[Took], flop: Took, rate: float) -> str:
    """FLOP over seconds over what a large matrix product reaches."""
    fit, score = statistics.median(t.fit for t in runs), statistics.median(t.score for t in runs)
    return (
        f"{name}: fit {flop.fit / 1e9:.0f} GFLOP at {flop.fit / fit / rate:.0%} of that rate, "
        f"scores {flop.score / 1e9:.0f} GFLOP at {flop.score / score / rate:.0%}"
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
