"""Gold models: trained again without the forget set, and cached with the explained models, shared by all unlearners."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bench.evaluations.base import Unfit
from bench.evaluations.unlearning.base import Parameters
from tasks.base import Task, Trajectory, named_seed
from tasks.training.explained import kept
from tasks.training.train import load

PAIRED = (1, 2)  # the explained initialisation, orders of their own
NEW = 3  # a new initialisation too


@dataclass(frozen=True)
class Golds:
    """`paired`: the reference. `new`: with another initialisation, for the floor alone."""

    paired: tuple[Trajectory, ...]
    new: Trajectory


def without(task: Task, rows: tuple[int, ...]) -> Task:
    """The task on R alone."""
    out = set(rows)
    kept = [i for i in range(len(task.train)) if i not in out]
    return replace(task, splits={**task.splits, "train": task.train.select(kept)})


def from_start(task: Task, start: Parameters) -> Task:
    """The same, every training of which begins at these weights."""
    build = partial(_started, task.build, start)
    return replace(task, build=build, identity={**task.identity, "start": fingerprint(start)})


def _started(build: Callable[[], nn.Module], start: Parameters) -> nn.Module:
    return load(build(), start)


def fingerprint(parameters: Parameters) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(parameters.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def gold(task: Task, seed: int, k: int, models: Path) -> Trajectory:
    """The k-th gold of the run that the user calls `seed`; no method's models have these seeds."""
    return kept(task, named_seed("gold", seed, k), models, f"{seed}-gold-{k}")


def retrained(task: Task, rows: tuple[int, ...], first: Trajectory, seed: int, models: Path) -> Golds:
    """The golds of one forget set and one explained run; trained now or read from `models`."""
    public = without(task.public(), rows)
    paired = from_start(public, first.initial)
    golds = Golds(tuple(gold(paired, seed, k, models) for k in PAIRED), gold(public, seed, NEW, models))
    for one in (*golds.paired, golds.new):
        if not all(torch.isfinite(p).all() for p in one.final.values()):
            raise Unfit(f"a training without the forget set diverged (loss {one.final_loss})")
    return golds


def control(task: Task, rows: tuple[int, ...], first: Trajectory, seed: int, models: Path) -> Trajectory:
    """One paired training without these rows, to compare another forget set with."""
    return gold(from_start(without(task.public(), rows), first.initial), seed, PAIRED[0], models)
