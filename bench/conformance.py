"""Whether a method keeps the contract of `methods.base.Method`: what anyone runs on a method of his own.

python -m bench.conformance method=ekfac [method.damping.value=0.1 ...]
python -m bench.conformance method=custom method._target_=my_package.MyMethod method.k=3

Five small worlds, made here in float64. Their trainings take whole batches: the order of the rows means nothing, for
methods that train again too.

labels   digits, a perceptron by SGD, checkpoints
texts    generated reviews, a BERT of one layer by AdamW, checkpoints with Adam's moments
pairs    generated dialogues with two answers each, rewards of their words by AdamW
ridge    diabetes' progression, real targets, on random Fourier features (Rahimi & Recht 2007); solved, no checkpoints
descent  the same by gradient descent, with checkpoints

Training sets of labels, texts and pairs hold copies of each query: RIGHT with its label, WRONG with another one.
In each world that `unmet` does not exclude, the first answer is checked and compared with others. A change is ‖Δ‖ / ‖s‖
of a query's scores s, or of all values; the largest counts. Up to TOLERANCE is none: solvers stop at a small residual.
Where other seeds of the problem change the scores, by up to δ, the method draws random numbers, and rows or batches in
another order draw others: there up to DRAWS · δ is none, and where that is what unrelated scores differ by, √2, nothing
can be told. The bounds of `scale` are wide: they tell a wrong sign, a forgotten 1/N or a wrong unit, not a good
approximation from a bad one. tests/methods holds the solvers to oracles.
"""

import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import config as configuration
from bench.config import one_line
from bench.run import build, build_method, build_task, check_device
from methods.base import Method, Problem, Unsupported
from tasks.base import Checkpoint, Examples, Task, Trajectory, digest, generator, named_seed
from tasks.errors import UserError
from tasks.training.engines import Rows, one_by_one, stacked
from tasks.training.plan import Plan, explained_seed
from tasks.training.train import train
from tasks.training.vectorised import stackable

HELP = """Whether a method keeps its contract: shapes, determinism, invariances, sign, scale, needs, no side effects.

    python -m bench.conformance method=ekfac [method.<key>=... | method/curvature=...] [device=cpu]
    python -m bench.conformance method=custom method._target_=my_package.MyMethod method.k=3

Small tasks are made and trained here; nothing is written. --config-dir adds YAMLs, as in python -m bench.
Exit status: 0 nothing failed, 1 a check failed, 2 a mistake in the command."""

RIGHT, WRONG = 2, 1  # copies of each query
TOLERANCE = 0.01  # of a change
DRAWS, SEEDS = 2.0, 4  # where random numbers are drawn
UNRELATED = 2**0.5  # what scores that have nothing to do with each other change by
CORRELATION = 0.5  # of scores with effects, at least
SLOPE = (0.1, 10.0)  # of effects on scores
CUT = 5  # rows in a batch at the most, where batches are cut otherwise
WIDTH = 600  # Fourier features

SPLITS = ["task.n_val=3", "task.n_query=4"]
FULL = "model.recipe.batch_size=1000"
RIDGE = ["task=tabular", "task.data=diabetes", "task.n_train=40", "model=linear", "model.recipe.weight_decay=0.1"]
WORLDS = {
    "labels": [
        *("task=digits", "task.n_train=60", "model=mlp", "model.hidden=[8]", "model.dtype=float64"),
        *(FULL, "model.recipe.epochs=60"),
    ],
    "texts": [
        *("task=sst2", "task.data=generated", "task.n_train=16", "task.corruption.rate=0.0", "model=bert_tiny"),
        *("model.layers=1", "model.width=8", "model.heads=2", "model.intermediate=8"),
        *("model.vocabulary=60", "model.max_length=16", "model.dtype=float64"),
        *(FULL, "model.recipe.lr=0.01", "model.recipe.epochs=40", "model.recipe.warmup=0.0"),
    ],
    "pairs": [
        *("task=rlhf", "task.data=generated", "task.n_rows=40", "task.n_train=24", "task.rate=0.0"),
        *("model=reward_bow", "model.vocabulary=60", "model.hidden=8", "model.dtype=float64", FULL),
    ],
    "ridge": RIDGE,
    "descent": [
        *(*RIDGE, FULL),
        *("model.recipe.optimizer=sgd", "model.recipe.lr=0.5", "model.recipe.epochs=200", "model.recipe.checkpoints=5"),
    ],
}

Scores = dict[str, Tensor]  # by "attribute" and "value", what is offered
Change = Callable[[Examples], Examples]
Verdict = tuple[str, str]  # "ok", "failed" or "skipped", and a figure or the reason


@dataclass(frozen=True)
class Result:
    """One line of the report."""

    world: str
    check: str
    status: str
    why: str

    def __str__(self) -> str:
        return f"{self.world:<8} {self.check:<15} {self.status}" + (f": {self.why}" if self.why else "")


# Worlds


@dataclass(frozen=True)
class World:
    """A small task and its trainings. `right`, `wrong` (Q, N): which rows are copies of a query."""

    name: str
    task: Task
    right: Tensor | None = None
    wrong: Tensor | None = None
    device: str = "cpu"
    _trained: dict[int, Trajectory] = field(default_factory=dict, repr=False)
    _retrained: dict[str, Rows] = field(default_factory=dict, repr=False)

    @cached_property
    def prints(self) -> dict[str, str]:
        """Fingerprints of the splits."""
        return {name: rows.fingerprint() for name, rows in self.task.splits.items()}

    @property
    def queries(self) -> Examples:
        return self.task.splits["query"]

    def explained(self, k: int) -> Trajectory:
        """Seeded as in a run."""
        if k not in self._trained:
            seed = explained_seed(0) if k == 0 else named_seed("explained", 0, "member", k)
            self._trained[k] = train(self.task, seed)
        return self._trained[k]

    def retrained(self, task: Task, plan: Plan) -> Rows:
        """As in a run, where equal rows are trained once."""
        asked = digest([task.fingerprint(), plan.keys()])
        if asked not in self._retrained:
            rows = (stacked if stackable(task) else one_by_one)(task, plan)
            self._retrained[asked] = {**rows, "seconds": np.zeros(len(plan))}
        return self._retrained[asked]


def worlds(device: str = "cpu") -> tuple[World, ...]:
    """Made once, good for any number of methods: none sees more than a copy."""
    configs = configuration.compose_all([[*SPLITS, *choice] for choice in WORLDS.values()])
    made = []
    for name, config in zip(WORLDS, configs, strict=True):
        task, right, wrong = build_task(config).public(), None, None
        if name in ("ridge", "descent"):
            model = build(config.model)
            splits = {split: featured(rows) for split, rows in task.splits.items()}
            task = replace(task, splits=splits, build=partial(model.build, WIDTH, 1))
        else:
            task, right, wrong = planted(task)
        made.append(World(name, task, right, wrong, device))
    return tuple(made)


def featured(rows: Examples) -> Examples:
    """x -> √(2/WIDTH) cos(Ωx + b), of norm near 1: as many parameters as rank and dimension of most presets need."""
    draw, x = generator("conformance", "features"), rows.inputs["x"].double()
    omega = 0.3 * torch.randn(x.shape[1], WIDTH, generator=draw, dtype=torch.float64)
    phase = 2 * torch.pi * torch.rand(WIDTH, generator=draw, dtype=torch.float64)
    return replace(rows, inputs={"x": (2 / WIDTH) ** 0.5 * (x @ omega + phase).cos()})


def planted(task: Task) -> tuple[Task, Tensor, Tensor]:
    """Each query RIGHT times with its label, WRONG times with another, behind the training rows; which these are. The
    queries are the validation split, too."""
    rows, queries = task.train, task.splits["query"]
    n, q, classes = len(rows), len(queries), int(rows.targets.max()) + 1
    original = torch.cat([torch.full((n,), -1), torch.arange(q).repeat(RIGHT + WRONG)])  # the query that it copies
    flipped = torch.arange(len(original)) >= n + RIGHT * q
    index = torch.where(original < 0, torch.arange(len(original)), n + original)  # into rows and queries together

    def joined(a: Tensor, b: Tensor) -> Tensor:
        width = max(t.shape[1] for t in (a, b)) if a.ndim > 1 else 0
        return torch.cat([nn.functional.pad(t, (0, width - t.shape[1])) if t.ndim > 1 else t for t in (a, b)])[index]

    targets = joined(rows.targets, queries.targets)
    texts = [*(rows.texts or ()), *(queries.texts or ())]
    train = Examples(
        (*rows.ids, *(f"copy{c}" for c in range(len(original) - n))),
        {name: joined(tensor, queries.inputs[name]) for name, tensor in rows.inputs.items()},
        torch.where(flipped, (targets + 1) % classes, targets),
        tuple(texts[i] for i in index) if texts else None,
    )
    of_query = original[None] == torch.arange(q)[:, None]  # (Q, N)
    val = replace(queries, ids=tuple(f"val{i}" for i in queries.ids))  # who values by val looks for the same rows
    return replace(task, splits={**task.splits, "train": train, "val": val}), of_query & ~flipped, of_query & flipped


@dataclass(frozen=True)
class Cut(Examples):
    """The same rows, whose batches are never larger than CUT: whoever cuts by `batches` is given others."""

    def batches(self, size: int) -> list[Tensor]:
        return super().batches(min(size, CUT))

    def select(self, rows: Sequence[int] | Tensor | np.ndarray) -> Examples:
        return cut(super().select(rows))


def cut(rows: Examples) -> Examples:
    return Cut(rows.ids, rows.inputs, rows.targets, rows.texts)


# A method in a world


@dataclass(frozen=True)
class Noted:
    """Builds as a task does, and keeps what it built, with the number of hooks that it came with."""

    build: Callable[[], nn.Module]
    built: list[tuple[nn.Module, int]] = field(default_factory=list)

    def __call__(self) -> nn.Module:
        model = self.build()
        self.built.append((model, hooks_on(model)))
        return model


@dataclass(frozen=True)
class Shown:
    """A problem made of copies, and what tells afterwards whether it was left as it was."""

    problem: Problem
    models: Noted
    handed: dict[int, Trajectory]  # copies, as they may have become
    settings: list[str]  # of torch that a method changed

    def left(self, world: World) -> list[str]:
        """What is not as it was handed out."""
        splits = self.problem.task.splits.items()
        found = [f"the {name} rows" for name, rows in splits if rows.fingerprint() != world.prints[name]]
        found += [f"trajectory({k})" for k, seen in self.handed.items() if not equal(seen, world.explained(k))]
        hooks = sum(max(0, hooks_on(model) - before) for model, before in self.models.built)
        return found + ([f"hooks ({hooks} still there)"] if hooks else []) + self.settings


def shown(world: World, seed: int = 0, changes: Mapping[str, Change] | None = None) -> Shown:
    """The world as a method sees it; `changes` make other rows of a split."""
    splits = {name: copied(rows) for name, rows in world.task.splits.items()}
    splits |= {name: change(splits[name]) for name, change in (changes or {}).items()}
    models, handed = Noted(world.task.build), {}

    def explained(k: int) -> Trajectory:
        handed[k] = copied_training(world.explained(k))
        return handed[k]

    task = replace(world.task, splits=splits, build=models)
    return Shown(Problem(task, seed, explained, world.device, retraining=world.retrained), models, handed, [])


def copied(rows: Examples) -> Examples:
    return replace(rows, inputs={k: v.clone() for k, v in rows.inputs.items()}, targets=rows.targets.clone())


def copied_training(training: Trajectory) -> Trajectory:
    def state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in tensors.items()}

    def checkpoint(c: Checkpoint) -> Checkpoint:
        moments = None if c.moments is None else (state(c.moments[0]), state(c.moments[1]))
        return replace(c, parameters=state(c.parameters), moments=moments)

    return replace(training, initial=state(training.initial), checkpoints=tuple(map(checkpoint, training.checkpoints)))


def equal(a: Trajectory, b: Trajectory) -> bool:
    def tensors(training: Trajectory) -> dict[tuple[object, ...], Tensor]:
        states = [s for c in training.checkpoints for s in (c.parameters, *(c.moments or ()))]
        return {(k, name): t for k, s in enumerate([training.initial, *states]) for name, t in s.items()}

    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def hooks_on(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's thread count": (torch.get_num_threads, torch.set_num_threads),
    "torch's grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's deterministic mode": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
}


@contextmanager
def surroundings(luck: int, changed: list[str]) -> Iterator[None]:
    """Global generators seeded by `luck`; afterwards all is as it was, `changed` names the settings that were not."""
    before = {name: get() for name, (get, _) in SETTINGS.items()}
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(luck)
        random.seed(luck)
        np.random.seed(luck)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for name, (get, put) in SETTINGS.items():
                if get() != before[name]:
                    changed.append(name)
                    put(before[name])


def answer(method: Method, given: Shown, queries: Examples | None = None, luck: int = 0) -> Scores:
    """Scores and values, less what is unsupported; of `queries`, where there are any, scores alone."""
    problem = given.problem
    if queries is None:
        rows = problem.task.splits["query"]
        wanted = {"attribute": lambda: method.attribute(problem, rows), "value": lambda: method.value(problem)}
    else:
        wanted = {"attribute": lambda: method.attribute(problem, queries)}
    found, reasons = {}, []
    for name, make in wanted.items():
        with surroundings(luck, given.settings):
            try:
                found[name] = make()
            except Unsupported as reason:
                reasons.append(reason)
    if not found:
        raise reasons[0]
    return found


@dataclass(frozen=True)
class Trial:
    """A method's first answer in a world, and what it did not leave as it was."""

    method: Method
    world: World
    scores: Scores
    left: Sequence[str]

    def again(self, luck: int = 0, seed: int = 0, changes: Mapping[str, Change] | None = None) -> Scores:
        """The same question to a fresh problem."""
        return answer(self.method, shown(self.world, seed, changes), luck=luck)

    @cached_property
    def spread(self) -> float:
        """The largest change between SEEDS seeds of the problem; 0 where nothing is drawn."""
        drawn = [self.scores, self.again(seed=1)]
        if change(*drawn) > 0:
            drawn += [self.again(seed=s) for s in range(2, SEEDS)]
        return max(change(a, b) for a, b in combinations(drawn, 2))

    def asked(self, queries: Examples) -> Tensor:
        """Scores of other queries alone."""
        return answer(self.method, shown(self.world), copied(queries))["attribute"]


def begin(method: Method, world: World) -> Trial:
    """The first answer. Raises `Unsupported` with what the world lacks."""
    if (unmet := method.unmet(world.task)) is not None:
        raise Unsupported(unmet)
    given = shown(world)
    scores = answer(method, given)
    return Trial(method, world, scores, given.left(world))


# Checks

Check = Callable[[Trial], Verdict]


def unchanged(trial: Trial) -> Verdict:
    """Data, trainings, models' hooks and torch's settings are left as they were."""
    return ("failed", f"changed: {', '.join(dict.fromkeys(trial.left))}") if trial.left else ("ok", "")


def shapes(trial: Trial) -> Verdict:
    """attribute (Q, N), value (N,), floating point."""
    queries, rows = len(trial.world.queries), len(trial.world.task.train)
    for name, shape in {"attribute": (queries, rows), "value": (rows,)}.items():
        if (scores := trial.scores.get(name)) is None:
            continue
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            return "failed", f"{name} gives {kind}, not a tensor of floating-point numbers"
        if tuple(scores.shape) != shape:
            return "failed", f"{name} gives {tuple(scores.shape)}, not {shape}"
    return "ok", " and ".join(trial.scores)


def finite(trial: Trial) -> Verdict:
    """No NaN and no infinity."""
    for name, scores in trial.scores.items():
        if wrong := int((~scores.isfinite()).sum()):
            return "failed", f"{name}: {wrong} of {scores.numel()} are not finite"
    return "ok", ""


def determinism(trial: Trial) -> Verdict:
    """A fresh problem gives the same bits, whatever the global generators (torch, numpy, random) hold."""
    if same_bits(trial.scores, trial.again(luck=1)):
        return "ok", ""
    if same_bits(trial.scores, trial.again()):
        return "failed", "depends on a global random state: draw from problem.generator(name)"
    return "failed", "twice the same question, two answers"


def any_queries(trial: Trial) -> Verdict:
    """Any examples can be asked about: here two training rows."""
    if "attribute" not in trial.scores:
        return "skipped", "scores no query"
    scores, rows = trial.asked(trial.world.task.train.select([0, 1])), len(trial.world.task.train)
    if tuple(scores.shape) != (2, rows) or not scores.isfinite().all():
        return "failed", f"training rows as queries: shape {tuple(scores.shape)}, finite: {scores.isfinite().all()}"
    return "ok", ""


def query_order(trial: Trial) -> Verdict:
    """Queries in reverse order give the rows in reverse order."""
    if "attribute" not in trial.scores:
        return "skipped", "scores no query"
    backwards = list(reversed(range(len(trial.world.queries))))
    return tolerated(change(trial.scores, {"attribute": trial.asked(trial.world.queries.select(backwards))[backwards]}))


def query_alone(trial: Trial) -> Verdict:
    """A query's scores do not depend on which others are asked."""
    if "attribute" not in trial.scores:
        return "skipped", "scores no query"
    q = len(trial.world.queries) - 1
    alone = trial.asked(trial.world.queries.select([q]))
    return tolerated(change({"attribute": trial.scores["attribute"][q:]}, {"attribute": alone}))


def training_order(trial: Trial) -> Verdict:
    """Training rows in another order, with the same trainings, give the columns in that order."""
    rows = len(trial.world.task.train)
    order = torch.randperm(rows, generator=generator("conformance", "order"))
    found = trial.again(changes={"train": lambda examples: examples.select(order)})
    return tolerated_of(trial, change(trial.scores, {k: s[..., order.argsort()] for k, s in found.items()}))


def batch_size(trial: Trial) -> Verdict:
    """Whatever `Examples.batches` cuts, the scores are the same."""
    found = trial.again(changes=dict.fromkeys(trial.world.task.splits, cut))
    return tolerated_of(trial, change(trial.scores, found))


def sign(trial: Trial) -> Verdict:
    """Copies of a query with its label score above copies with a wrong one, for most queries; their value is higher."""
    right, wrong = trial.world.right, trial.world.wrong
    assert right is not None and wrong is not None
    if not trial.method.signed:
        return "skipped", "declares signed = False"
    said = []
    if "attribute" in trial.scores:
        scores = trial.scores["attribute"].double().cpu()
        means = [(scores * rows).sum(1) / rows.sum(1) for rows in (right, wrong)]
        share = (means[0] > means[1]).double().mean().item()
        said.append(f"right copies above wrong ones for {share:.0%} of the queries")
        if share <= 0.5:
            return "failed", said[0]
    if "value" in trial.scores:
        values = trial.scores["value"].double().cpu()
        good, bad = values[right.any(0)].mean().item(), values[wrong.any(0)].mean().item()
        said.append(f"mean value of right copies {good:.3g}, of wrong ones {bad:.3g}")
        if good <= bad:
            return "failed", said[-1]
    return "ok", "; ".join(said)


def scale(trial: Trial) -> Verdict:
    """Scores against the effects of leaving one example out, in closed form: correlation and slope, over all pairs."""
    if "attribute" not in trial.scores:
        return "skipped", "scores no query"
    if not trial.method.calibrated:
        return "skipped", "declares no units (calibrated = False)"
    scores, effects = trial.scores["attribute"].double().cpu().flatten(), left_out(trial.world.task).flatten()
    correlation = torch.corrcoef(torch.stack([scores, effects]))[0, 1].item()
    slope = ((scores @ effects) / (scores @ scores)).item()
    said = f"slope of effects on scores {slope:.3g}, correlation {correlation:.2f}"
    within = correlation >= CORRELATION and SLOPE[0] <= slope <= SLOPE[1]
    bounds = f"; allowed: {SLOPE[0]} to {SLOPE[1]}, {CORRELATION} or more"
    return ("ok", said) if within else ("failed", said + bounds)


ALWAYS: tuple[Check, ...] = (
    *(unchanged, shapes, finite, determinism, any_queries),
    *(query_order, query_alone, training_order, batch_size),
)
FIRST = (shapes, finite)  # where one fails, there is nothing to compare


def same_bits(a: Scores, b: Scores) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def change(a: Scores, b: Scores) -> float:
    """max over rows of ‖a − b‖ / ‖a‖, of all that is in b; 0 where both are 0."""
    worst = 0.0
    for name, found in b.items():
        x, y = a[name].double().cpu(), found.double().cpu()
        if x.shape != y.shape:
            raise ValueError(f"{name} gives {tuple(y.shape)}, not {tuple(x.shape)}")
        size, off = x.norm(dim=-1), (x - y).norm(dim=-1)
        worst = max(worst, torch.where(off == 0, 0.0, off / size).nan_to_num(torch.inf).max().item())
    return worst


def tolerated(changed: float) -> Verdict:
    return "ok" if changed <= TOLERANCE else "failed", f"changes by {changed:.1g}"


def tolerated_of(trial: Trial, changed: float) -> Verdict:
    """As `tolerated`, less what any other draw of the method's random numbers changes."""
    if changed <= TOLERANCE or trial.spread == 0:
        return tolerated(changed)
    if DRAWS * trial.spread >= UNRELATED:
        return "skipped", f"draws random numbers: another problem.seed changes by {trial.spread:.1g}"
    said = f"changes by {changed:.1g}, another problem.seed by {trial.spread:.1g}"
    return "ok" if changed <= DRAWS * trial.spread else "failed", said


def left_out(task: Task) -> Tensor:
    """Effects (Q, N) of each row on each query, of min_θ (1/N) Σ ½(φ_iᵀθ − y_i)² + ½γ‖θ‖², N as it was:
    f(q) = k_qᵀ (K + NγI)⁻¹ y with K = ΦΦᵀ of the rows that are left."""
    phi, asked = (nn.functional.pad(rows.inputs["x"], (0, 1), value=1.0) for rows in (task.train, task.splits["query"]))
    y, wanted = task.train.targets.double(), task.splits["query"].targets
    gram, across = phi @ phi.T, asked @ phi.T

    def measured(rows: Tensor) -> Tensor:
        ridge = len(phi) * task.recipe.l2 * torch.eye(len(rows), dtype=gram.dtype)
        answers = across[:, rows] @ torch.linalg.solve(gram[rows][:, rows] + ridge, y[rows])
        return task.objective.measure(answers[:, None], wanted)

    every = torch.arange(len(phi))
    return torch.stack([measured(every) - measured(every[every != i]) for i in every], 1)


def checks(method: Method, among: Sequence[World] | None = None) -> list[Result]:
    """Every check of a method in every world. A `UserError` where its settings are possible in none."""
    return list(results(method, worlds() if among is None else among))


def results(method: Method, among: Sequence[World]) -> Iterator[Result]:
    """As `checks`, one by one."""
    if not isinstance(method, Method):
        hint = "derive it from methods.base.Method"
        raise UserError("method._target_", type(method).__name__, "is no method", hint=hint)
    tried, refused = False, []
    for world in among:
        try:
            trial = begin(method, world)
        except Unsupported as reason:
            yield Result(world.name, "runs", "skipped", str(reason))
            continue
        except UserError as error:
            refused.append(error)
            yield Result(world.name, "runs", "skipped", f"refused: {error}")
            continue
        except Exception as error:
            tried = True
            yield Result(world.name, "runs", "failed", f"{located(error)}; unmet() names nothing that is lacking")
            continue
        tried = True
        yield Result(world.name, "runs", "ok", "")
        comparable = True
        for check in (*ALWAYS, scale if world.right is None else sign):
            status, why = judged(check, trial) if comparable else ("skipped", "nothing to compare")
            comparable = comparable and not (check in FIRST and status == "failed")
            yield Result(world.name, check.__name__.replace("_", " "), status, why)
    if not tried:
        if refused:
            raise refused[0]
        yield Result("all", "runs", "failed", "neither attribute nor value gives anything in any world")


def judged(check: Check, trial: Trial) -> Verdict:
    """A check's verdict, whatever is raised on its way."""
    try:
        return check(trial)
    except Unsupported as reason:
        return "skipped", str(reason)
    except Exception as error:
        return "failed", located(error)


def located(error: Exception) -> str:
    """What was raised, and in which line of whose code."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
    return f"{one_line(error)} ({Path(frame.filename).name}, line {frame.lineno})"


# The program


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 nothing failed, 1 a check failed, 2 a mistake in the command, 130 interrupted."""
    from bench.__main__ import prepare

    prepare()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    try:
        return report(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def report(arguments: Sequence[str]) -> int:
    """Prints a line a check."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    config = configuration.compose(overrides_of(arguments))
    configuration.check(config)
    method = build_method(config)
    check_device(config.device)
    counts = dict.fromkeys(("ok", "failed", "skipped"), 0)
    for result in results(method, worlds(config.device)):
        print(result, flush=True)
        counts[result.status] += 1
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["failed"] else 0


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """What chooses a method and a device; tasks and models are made here."""
    from bench.__main__ import _options, _quoted

    options = _options(list(arguments))
    overrides = list(options.overrides)
    for flag in ("multirun", "cfg", "info", "hydra_help", "shell_completion"):
        if getattr(options, flag):
            raise UserError(f"--{flag.replace('_', '-')}", None, "is not possible", hint="one method, its checks")
    for override in overrides:
        key, equals, _ = override.lstrip("+").partition("=")
        if not equals or key.split(".")[0].split("/")[0].split("@")[0] not in ("method", "device"):
            allowed = ["method=...", "method.<key>=...", "method/curvature=...", "device=..."]
            raise UserError(key, None, "has no place here", allowed=allowed, hint="tasks are made by the suite")
    if options.config_dir is not None:
        if not Path(options.config_dir).is_dir():
            raise UserError("--config-dir", options.config_dir, "is no folder")
        overrides.append(f"hydra.searchpath=[{_quoted(f'file://{Path(options.config_dir).absolute()}')}]")
    return overrides


if __name__ == "__main__":
    from bench.conformance import main as importable  # one copy of this module, also for those who import it

    sys.exit(importable())
