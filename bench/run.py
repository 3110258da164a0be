"""The story of a run: build task and method, explain, retrain, judge, write one record."""

import hashlib
import inspect
import os
import platform
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bench import config as configuration
from bench import records, suspects
from bench.console import Console, still_at_it
from bench.evaluations.base import AsksOfMethod, Case, Evaluation, Metric, NotApplicable, Unfit
from bench.memory import Peak
from bench.plan import planned_work
from bench.statistics import bootstrap_queries
from methods.base import Fits, Method, Problem, Unsupported
from methods.gradients.blocks import blocks_of, coverage
from methods.gradients.sharding import first, summed
from tasks.base import Examples, Task, Trajectory, digest
from tasks.errors import UserError
from tasks.training.engines import Executor
from tasks.training.explained import explained
from tasks.training.retrain import VERSION as TRAINING_VERSION
from tasks.training.retrain import retrain
from tasks.training.train import load, without_frozen

VERSION = 1  # of what attribution and judging mean; enters every run id


@dataclass
class Built:
    """The last task of this process: a sweep over methods reads its data once. A user's file that changed meanwhile is
    read again; what $BENCH_DATA holds is not looked at twice."""

    key: str | None = None
    task: Task | None = None

    def of(self, config: DictConfig) -> Task:
        named = [config.task.get("data_dir"), config.task.get("query_file"), config.model.get("path")]
        stamps = [stamp(Path(str(name)).expanduser()) for name in named if name]
        nodes = [OmegaConf.to_container(node, resolve=True) for node in (config.task, config.model)]
        key = digest([nodes, os.environ.get("BENCH_DATA"), str(Path.cwd()), stamps])
        if self.task is None or self.key != key:
            self.task, self.key = build_task(config), key
        return self.task


def stamp(place: Path) -> list[tuple[str, int, int]]:
    """Changes with a file, or with one in a folder, two floors down."""
    if place.is_file():
        return [(str(place), place.stat().st_mtime_ns, place.stat().st_size)]
    files = sorted(path for pattern in ("*", "*/*", "*/*/*") for path in place.glob(pattern) if path.is_file())
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]


BUILT = Built()
WRITTEN = ("suspects.csv", "influence.csv")
FITS = Fits()  # the last fit of this process: a sweep over damping factorises once


@dataclass(frozen=True)
class Outcome:
    """How a run ended and where its record lies."""

    status: str
    folder: str | None
    reason: str | None
    task: str
    found: bool


def run(config: DictConfig) -> Outcome:
    """One method on one task. Finds the record of an equal run instead of doing it again."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    out, name = Path(config.out), str(config.choice.method)
    task, method = BUILT.of(config), build_method(config)
    evaluations, executor = build_evaluations(config, task), build(config.executor)
    for evaluation in evaluations.values():
        if isinstance(evaluation, AsksOfMethod):
            evaluation.require(task, method)
    covered = coverage_of(task, method)
    check_device(config.device)
    if config.detail not in (None, "layer", "token"):
        raise UserError("detail", config.detail, allowed="layer, token, or null")
    executor.engine_for(task)  # an engine that cannot train this model is told before anything is trained
    identity = {
        "config": configuration.run_key(config),
        "code": source_of(method),
        **({"inputs": method.inputs()} if method.inputs() else {}),
        **({"own": own_facts(task)} if task.places else {}),
        "data": task.fingerprint(),
        "task": task.key(),
        "versions": [VERSION, TRAINING_VERSION],
    }
    run_id = records.run_id(identity)
    if config.plan:
        if (unmet := method.unmet(task)) is not None:
            return Outcome("unsupported", None, f"method={name} {unmet}", task.name, False)
        asked = method.retrainings(task)
        print("".join(f"{note}\n" for note in task.notes), end="")
        print(planned_work(task, evaluations, config.seed, out / "cache", executor, shipped_truth(), asked))
        return Outcome("ok", None, "planned only", task.name, False)
    known = records.find(out, task.name, name, run_id)
    if known is not None and not config.rerun:
        status = records.read(known)["status"]
        if status != "failed":
            return Outcome(status, str(known), None, task.name, True)

    check_writable(out)
    console = Console()
    started = datetime.now(UTC)
    record: dict[str, Any] = {
        "schema": records.SCHEMA,
        "run_id": run_id,
        "status": "ok",
        "reason": None,
        "task": task.name,
        "data": {
            "source": task.source,
            "fingerprint": task.fingerprint()[:16],
            "n_train": len(task.train),
            **({"notes": list(task.notes)} if task.notes else {}),
        },
        "model": task.model,
        "method": name,
        "method_label": label_of(config, method),
        "seed": config.seed,
        "config": configuration.run_key(config),
        "coverage": covered,
        "metrics": {},
        "fitness": {},
        "cost": {},
    }
    kept = Kept({}, {}, {}, {}, {})
    try:
        _judge(config, task, method, evaluations, executor, console, record, kept)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        traceback.print_exc()
        record |= {"status": "failed", "reason": configuration.one_line(error), "traceback": traceback.format_exc()}
    if not first():
        return Outcome(record["status"], None, record["reason"], task.name, False)
    record["provenance"] = provenance(config, started)
    folder = records.write(
        out,
        record,
        OmegaConf.to_yaml(config, resolve=True),
        kept.scores,
        kept.ids,
        kept.replicates,
        kept.by_query,
        kept.texts,
        replace=True,
    )
    return Outcome(record["status"], str(folder), record["reason"], task.name, False)


@dataclass(frozen=True)
class Kept:
    """What is stored beside the record."""

    scores: dict[str, np.ndarray]
    ids: dict[str, Sequence[str]]
    replicates: dict[str, np.ndarray]
    by_query: dict[str, dict[str, np.ndarray]]
    texts: dict[str, str]


def _judge(
    config: DictConfig,
    task: Task,
    method: Method,
    evaluations: dict[str, Evaluation],
    executor: Executor,
    console: Console,
    record: dict[str, Any],
    kept: Kept,
) -> None:
    """Fills the record: fitness, scores, metrics, cost."""
    unmet = method.unmet(task)
    if unmet is not None:
        record |= {"status": "unsupported", "reason": f"method={record['method']} {unmet}"}
        return
    cache = Path(config.out) / "cache"
    print(
        f"task={task.name} data={task.source} n_train={len(task.train)} model={task.model} method={record['method']}",
        file=sys.stderr,
    )
    for note in task.notes:
        print(f"  {note}", file=sys.stderr)
    with console.phase("explained_training", "explained model"):
        trajectory = explained(task, config.seed, 0, cache / "models")
    if not all(torch.isfinite(p).all() for p in trajectory.final.values()):
        record |= {"status": "diverged", "reason": f"training ended at loss {trajectory.final_loss}"}
        return
    record["fitness"] = fitness(task, trajectory)
    if not record["fitness"]["fit"]:
        record |= {"status": "unfit", "reason": unfit_reason(task, record["fitness"])}

    problem = Problem(
        task.public(),
        config.seed,
        lambda k: explained(task, config.seed, k, cache / "models"),
        config.device,
        fits=FITS.of((task.key(), task.fingerprint(), config.seed, config.device)),
        retraining=lambda asked, plan: retrain(
            asked, plan, cache / "truth", executor, partial(console.progress, record["method"])
        ),
    )
    peak = Peak()
    attribution, value = _scorers(problem, method, console, peak, kept)
    if config.detail is not None:
        with console.phase("detail", f"scores by {config.detail}"):
            _take_apart(config.detail, problem, method, record, kept)
    case = Case(
        task=task,
        seed=config.seed,
        trajectory=trajectory,
        attribution=attribution,
        value=value,
        calibrated=method.calibrated,
        store=cache / "truth",
        executor=executor,
        progress=console.progress,
        problem=problem,
        method=method,
        shipped=shipped_truth(),
    )
    if not evaluations:
        _try(lambda: attribution("query"), record)
        if _try(value, record) is None and "attribution/query" in kept.scores and len(task.splits["val"]):
            _try(lambda: attribution("val"), record)  # who is suspicious, by who harms it
    for name, evaluation in evaluations.items():
        with console.phase("evaluation", name):
            found = _try(lambda evaluation=evaluation: evaluation.evaluate(case), record)  # type: ignore[misc]
        kept.by_query.update({metric: dict(entry.by_query) for metric, entry in (found or {}).items()})
        for metric, entry in (found or {}).items():
            record["metrics"][metric] = entry.entry()
            if len(entry.replicates):
                kept.replicates[metric] = entry.replicates
    if "attribution/query" in kept.scores:
        for name, values in method.report(problem, problem.task.splits["query"]).items():
            of_query = values.cpu().double().numpy()
            mean = Metric(float(of_query.mean()), bootstrap_queries(of_query, 0), len(of_query), {}, better=None)
            record["metrics"][name], kept.replicates[name] = mean.entry(), mean.replicates
    if not evaluations or task.places or task.annotations is None or not task.annotations.flipped:
        kept.texts.update(written(task, trajectory, record["method_label"], kept.scores))
    record["truths"] = case.notes
    if not kept.scores and not record["metrics"] and record["status"] == "ok":
        why = next(iter(record.get("notes", [])), "it offers nothing that is judged here")
        record |= {"status": "unsupported", "reason": f"method={record['method']}: {why}"}
    record["cost"] = cost_of(problem, console.seconds, peak, kept)


def _take_apart(by: str, problem: Problem, method: Method, record: dict[str, Any], kept: Kept) -> None:
    """The queries' scores by layer or token, kept beside the scores."""
    queries = problem.task.splits["query"]
    parts = _try(lambda: method.detail(problem, queries, by), record) or {}
    if not parts:
        print(f"note: detail={by}: {record['notes'][-1]}; nothing is written", file=sys.stderr)
        return
    kept.scores.update({f"detail/{name}": part.cpu().numpy() for name, part in parts.items()})
    kept.ids.update({"query": queries.ids, "train": problem.train.ids})


def cost_of(problem: Problem, seconds: Mapping[str, float], peak: Peak, kept: Kept) -> dict[str, Any]:
    """What the method has used: `seconds` by phase, its trainings, fits and updates, memory, gradients, disk."""
    attributed, meter = seconds.get("attribution", 0.0), problem.meter
    gradients = torch.tensor([float(meter.gradients)], dtype=torch.float64)
    summed([gradients])  # of all processes
    return {
        "seconds": attributed + meter.seconds_of_trainings + meter.seconds_of_fits + meter.seconds_of_updates,
        "phases": {
            **seconds,
            "trainings": meter.seconds_of_trainings,
            "fits_reused": meter.seconds_of_fits,
            "updates": meter.seconds_of_updates,
        },
        "peak_memory_bytes": peak.bytes,
        "trainings": meter.trainings,
        "gradients": int(gradients.item()),
        "stored_bytes": sum(a.nbytes for a in kept.scores.values()) + meter.stored_bytes,
    }


def own_facts(task: Task) -> str:
    """Fingerprint of what a user's file says that no training sees, and suspects.csv or a judge does: where its rows
    stand, its wrong labels."""
    facts = task.annotations
    known = None if facts is None else [sorted(facts.flipped), sorted(facts.clean.items())]
    return digest([sorted(task.places.items()), task.notes, task.classes, known])


def written(task: Task, trajectory: Trajectory, by: str, scores: dict[str, np.ndarray]) -> dict[str, str]:
    """suspects.csv and influence.csv, as far as these scores tell."""
    found = {}
    if "value" in scores:
        found["suspects.csv"] = suspects.ranked(task, trajectory, scores["value"], by)
    elif "attribution/val" in scores:
        helps = scores["attribution/val"].mean(0)
        found["suspects.csv"] = suspects.ranked(task, trajectory, helps, f"{by}, mean over val")
    if "attribution/query" in scores:
        queries = task.splits["query"]
        found["influence.csv"] = suspects.influence(task, trajectory, queries, scores["attribution/query"])
    return {name: table.to_csv(index=False, float_format="%.6g") for name, table in found.items()}


def _try(make: Callable[[], Any], record: dict[str, Any]) -> Any:
    """None, with a note in the record, where the method does not offer what is asked."""
    try:
        return make()
    except (Unsupported, NotApplicable) as reason:
        record.setdefault("notes", []).append(str(reason))
    except Unfit as reason:
        record |= {"status": "unfit", "reason": str(reason)}
    return None


def _scorers(
    problem: Problem, method: Method, console: Console, peak: Peak, kept: Kept
) -> tuple[Callable[[str], np.ndarray], Callable[[], np.ndarray]]:
    """Attribution by split, and value: each made once, timed, its peak memory taken, kept for the record."""

    def made(key: str, label: str, make: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> np.ndarray:
        if key not in kept.scores:
            started, before = time.perf_counter(), problem.meter.waited
            with peak.measured(), torch.random.fork_rng(devices=[]), still_at_it(label):
                torch.manual_seed(0)
                scores = make()
            if tuple(scores.shape) != shape:
                raise ValueError(f"{key}: shape {tuple(scores.shape)}, expected {shape}")
            if not torch.isfinite(scores).any():
                raise ValueError(f"{key}: no score is finite")
            took, waited = time.perf_counter() - started, problem.meter.waited - before
            console.seconds["attribution"] = console.seconds.get("attribution", 0.0) + took - waited
            print(f"  {label}: {took:.1f} s", file=sys.stderr, flush=True)
            kept.scores[key] = scores.detach().cpu().double().numpy()
            kept.ids["train"] = problem.train.ids
        return kept.scores[key]

    def attribution(split: str) -> np.ndarray:
        queries = problem.task.splits[split]
        kept.ids[split] = queries.ids
        shape = (len(queries), len(problem.train))
        return made(
            f"attribution/{split}",
            f"scores of {len(queries)} {split} rows",
            lambda: method.attribute(problem, queries),
            shape,
        )

    def value() -> np.ndarray:
        return made("value", "values", lambda: method.value(problem), (len(problem.train),))

    return attribution, value


def build_task(config: DictConfig) -> Task:
    """The task with its model; a user's mistake comes out as `UserError`."""
    model = build(config.model)
    return _called(lambda: instantiate(config.task, _partial_=True, _convert_="all")(model=model))


def build_method(config: DictConfig) -> Method:
    """The method, with whatever it wraps."""
    method = build(config.method)
    for name in ("attribute", "value"):
        if not callable(getattr(method, name, None)):
            raise UserError(
                "method._target_", config.method._target_, f"has no {name}()", hint="derive it from methods.base.Method"
            )
    return method


def preset(name: str, *settings: str) -> Method:
    """A method by its name and settings, as on the command line: `preset("ekfac", "method.damping.value=0.1")`."""
    composed = configuration.compose([f"method={name}", *settings])
    configuration.check(composed)
    return build_method(composed)


def label_of(config: DictConfig, method: Method) -> str:
    """The method's name in tables: a wrapper says what it wraps, `custom` which class it is."""
    name = type(method).__name__ if config.choice.method == "custom" else str(config.choice.method)
    if config.choice.method == "from_file":  # which one
        name = f"from_file({Path(str(config.method.path)).stem})"
    wrapped = [str(option) for group, option in config.choice.items() if str(group).startswith("method@")]
    return f"{name}({', '.join(wrapped)})" if wrapped else name


def source_of(method: Method) -> str:
    """Fingerprint of the file that the method's class stands in: an edited method is another method."""
    try:
        return hashlib.sha256(Path(inspect.getfile(type(method))).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return type(method).__qualname__


def check_device(device: str) -> None:
    """Refuses a device that torch does not know or this machine does not have."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        allowed = ["cpu", *(name for name, yes in there.items() if yes)]
        raise UserError("device", device, "is not at hand", allowed=allowed) from error


def shipped_truth() -> Path | None:
    """Finished trainings that a checkout brings along, so that a stranger scores a method without retraining."""
    place = Path(__file__).resolve().parent.parent / "results" / "reference" / "truth"
    return place if place.is_dir() else None


def check_writable(out: Path) -> None:
    """Told before anything is trained."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError("out", str(out), "cannot be written", hint="name another folder")


def build_evaluations(config: DictConfig, task: Task) -> dict[str, Evaluation]:
    """Those that the config asks for; impossible settings are refused before anything is trained."""
    chosen = {}
    reasons = []
    for name in config.evaluation:
        if name not in config.truth:
            raise UserError("evaluation", name, "is unknown", allowed=list(config.truth))
        evaluation = build(config.truth[name])
        try:
            evaluation.plan(task, config.seed)
            if task.recipe.epochs == 0 and name != "detection":
                raise NotApplicable(f"{name} retrains, and model.recipe.epochs=0 trains nothing")
        except NotApplicable as reason:
            reasons.append(str(reason))
            continue
        chosen[name] = evaluation
    if reasons and not chosen:
        raise UserError(
            "evaluation", f"[{','.join(config.evaluation)}]", f"cannot judge task={task.name}", hint=reasons[0]
        )
    for why in reasons:
        print(f"left out: {why}", file=sys.stderr)
    return chosen


def build(node: DictConfig) -> Any:
    """What a config node names, built by Hydra; a `UserError` inside comes out as itself."""
    return _called(lambda: instantiate(node, _convert_="all"))


def _called(make: Callable[[], Any]) -> Any:
    """What Hydra builds; a `UserError` inside comes out as itself."""
    try:
        return make()
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from error
        raise


def fitness(task: Task, trajectory: Trajectory) -> dict[str, Any]:
    """How good the explained model is on the test split, and how many of the planted flips it has learned by heart."""
    model = load(task.initial(trajectory.seed), trajectory.final)
    facts: dict[str, Any] = {}
    for split in ("test", "train"):
        facts |= {f"{split}_{name}": number for name, number in how_good(task, model, task.splits[split]).items()}
    if task.annotations is not None and task.annotations.flipped:
        rows = [k for k, i in enumerate(task.train.ids) if i in task.annotations.flipped]
        facts["flips_memorised"] = how_good(task, model, task.train.select(rows))["accuracy"]
    facts["floor"] = dict(task.floor)
    facts["fit"] = all(facts[f"test_{name}"] >= floor for name, floor in task.floor.items())
    return facts


@torch.no_grad()
def how_good(task: Task, model: nn.Module, examples: Examples) -> dict[str, float]:
    """The objective's figures. Those of texts that are continued are means over examples, batch by batch: their outputs
    are of different widths, and large."""
    if examples.targets.ndim == 1:
        batches = examples.batches(256)
        outputs = torch.cat([task.outputs(model, examples.batch(index)) for index in batches])
        return task.objective.fitness(outputs[torch.argsort(torch.cat(batches))], examples.targets)
    total: dict[str, float] = defaultdict(float)
    for index in examples.batches(64):
        batch = examples.batch(index)
        for name, number in task.objective.fitness(task.outputs(model, batch), batch.targets).items():
            total[name] += number * len(index) / len(examples)
    return dict(total)


def unfit_reason(task: Task, facts: dict[str, Any]) -> str:
    parts = [
        f"test {name} {facts[f'test_{name}']:.3f} is below its floor {floor}" for name, floor in task.floor.items()
    ]
    return "; ".join(parts)


def coverage_of(task: Task, method: Method) -> dict[str, object] | None:
    """Which blocks a method that works by blocks covers; patterns that match none are refused here."""
    if not hasattr(method, "modules"):
        return None
    model = without_frozen(task.initial(0))
    return coverage(model, blocks_of(model, method.modules))


def provenance(config: DictConfig, started: datetime) -> dict[str, Any]:
    """What the numbers came from."""
    packages = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "hydra-core")
    return {
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "commit": _commit(),
        "host": {"cpu": _cpu(), "cores": torch.multiprocessing.cpu_count(), "gpu": _gpu(config.device)},
        "started": started.isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench", *_overrides()]),
    }


def _overrides() -> list[str]:
    """What was asked for, less the places of this machine: where it was written to, and what $BENCH_DATA stands for."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    data, asked = os.environ.get("BENCH_DATA"), HydraConfig.get().overrides.task
    shown = [override.replace(data, "$BENCH_DATA") for override in asked] if data else asked
    return [override for override in shown if not override.startswith("out=")]


def _commit() -> str | None:
    import subprocess

    def git(*arguments: str) -> str:
        place = Path(__file__).parent.parent
        return subprocess.run(
            ["git", *arguments], cwd=place, capture_output=True, text=True, check=False
        ).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    code = ("bench", "methods", "tasks", "conf")
    return (commit + "-dirty" if git("status", "--porcelain", *code) else commit) or None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(device: str) -> str | None:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None


def report(out: Path, outcomes: Sequence[Outcome]) -> str:
    """The tables of the tasks that these runs belong to, and where everything lies."""
    from bench import aggregate, figures, formats, tables

    wanted = sorted({o.task for o in outcomes})
    keys = set()
    for outcome in outcomes:
        if outcome.folder is not None:
            record = records.read(Path(outcome.folder))
            keys.add((record["task"], record["data"]["fingerprint"], record["model"]))
    lines: list[str] = []
    for table in aggregate.tables(tables.load(out, wanted)):
        files = tables.write(table, out / "tables")
        drawn = figures.quality_against_seconds(table, out / "tables" / f"{table.name}.png")
        drawn += figures.detection_curves(table, out / "tables" / f"{table.name}-detection.png")
        drawn += figures.unlearning_paths(table, out / "tables" / f"{table.name}-paths.png")
        if (
            table.task,
            table.fingerprint,
            table.model.split(" ")[0],
        ) in keys:  # others of the model's settings may follow
            lines += ["", formats.to_console(table), "", f"table:  {files[0].with_suffix('')}.{{csv,md,tex}}"]
            lines += [f"figure: {path}" for path in drawn if path.suffix == ".png"]
    for outcome in outcomes:
        if outcome.folder is not None:
            again = " (found: rerun=true does it again)" if outcome.found else ""
            lines.append(f"record: {outcome.folder}{again}")
            own = [path for name in WRITTEN if (path := Path(outcome.folder) / name).exists()]
            lines += [f"{path.stem}: {path}" for path in own if len(outcomes) == 1]
        if outcome.reason and outcome.status != "failed":
            lines.append(f"{outcome.status}: {outcome.reason}")
    return "\n".join(lines).strip("\n")
