"""TRAK's features beside traker's: the same model, texts and dimension, one thread each.

Part `trak` of `python -m bench.speed`. The peer is optional: `make peers`.
"""

import importlib
import importlib.util
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.speed_ekfac import problem_of, quiet
from methods.compression.base import Compression
from methods.compression.rademacher import Rademacher
from methods.compression.sjlt import SJLT
from methods.curvature.damping import Damping
from methods.trak import TRAK
from tasks.base import Task

DIMENSION = 512
BATCHES = (8, 32)  # of the peer; the faster counts


def ours(task: Task, compression: Compression) -> tuple[float, Tensor]:
    """Seconds, and the features (N, dimension) of the training examples."""
    method, problem = TRAK(1, compression, Damping("absolute", 1.0, "global"), None), problem_of(task)
    started = time.perf_counter()
    _, _, found, _ = method._features(problem, 0)
    return time.perf_counter() - started, found


def theirs(task: Task, batch_size: int) -> tuple[float, Tensor]:
    """traker's featurize and finalize_features, float32 on the CPU, where it projects by a dense normal matrix."""
    trak: Any = importlib.import_module("trak")
    outputs: Any = importlib.import_module("trak.modelout_functions")

    class Margin(outputs.AbstractModelOutput):
        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, ids: Tensor, mask: Tensor, y: Tensor) -> Tensor:
            inputs = {"input_ids": ids[None], "attention_mask": mask[None]}
            z = functional_call(model, (weights, buffers), (), inputs)
            return task.objective.output(z, y[None])[0]

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            ids, mask, y = batch
            z = functional_call(model, (weights, buffers), (), {"input_ids": ids, "attention_mask": mask})
            return task.objective.residual(z, y)[:, None].detach()

    train, model = task.train, problem_of(task).model()
    # Added to the attention, (N, 1, T, T), so that vmap meets no branch that depends on the data.
    longest = train.inputs["attention_mask"].shape[1]
    mask = (1.0 - train.inputs["attention_mask"].float())[:, None, None] * torch.finfo(torch.float32).min
    rows = [train.inputs["input_ids"], mask.expand(-1, 1, longest, -1), train.targets]
    with tempfile.TemporaryDirectory() as folder, quiet():
        started = time.perf_counter()
        traker = trak.TRAKer(
            model=model, task=Margin(), train_set_size=len(train), save_dir=folder, device="cpu",
            proj_dim=DIMENSION, use_half_precision=False, logging_level=logging.ERROR,
        )  # fmt: skip
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for start in range(0, len(train), batch_size):
            batch = [column[start : start + batch_size] for column in rows]
            traker.featurize(batch=batch, num_samples=len(batch[0]))
        seconds = time.perf_counter() - started
        found = torch.as_tensor(traker.saver.current_store["grads"]).double()
    return seconds, found


def features(task: Task, rounds: int) -> list[str]:
    """Lines; all sides alternate, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _features(task, rounds)
    finally:
        torch.set_num_threads(threads)


def _features(task: Task, rounds: int) -> list[str]:
    sides: dict[str, Callable[[Task], tuple[float, Tensor]]] = {
        "ours, sparse projection (sjlt)": lambda t: ours(t, SJLT(DIMENSION)),
        "ours, dense projection (rademacher)": lambda t: ours(t, Rademacher(DIMENSION)),
    }
    few = replace(task, splits={name: split.select(range(0, len(split), 10)) for name, split in task.splits.items()})
    installed = importlib.util.find_spec("trak") is not None
    if installed:
        trials = {size: theirs(few, size)[0] for size in BATCHES}
        size = min(trials, key=trials.__getitem__)
        sides["traker, dense projection (normal)"] = lambda t: theirs(t, size)
    for side in sides.values():
        side(few)  # warms up
    took: dict[str, list[float]] = {name: [] for name in sides}
    found = {}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds, found[name] = side(task)
            took[name].append(seconds)
    tokens = task.train.inputs["attention_mask"].sum(1)
    lines = [
        f"{DIMENSION} features of {len(task.train):,} texts of {tokens.float().mean():.0f} tokens on average, "
        f"model={task.model} as initialised (seed 0, untrained), float32, one thread",
        *(f"{name}: {statistics.median(v):.1f} s [{min(v):.1f}, {max(v):.1f}]" for name, v in took.items()),
    ]
    if not installed:
        return [*lines, "traker is not installed: `make peers` installs it"]
    *mine, peer = sides
    for name in mine:
        ratios = [a / b for a, b in zip(took[peer], took[name], strict=True)]
        lines.append(
            f"traker takes {statistics.median(ratios):.1f}x [{min(ratios):.1f}, {max(ratios):.1f}] the time of {name}, "
            f"over {rounds} rounds"
        )
    grams = {name: _gram(f) for name, f in found.items()}
    lines += [
        f"inner products of the features: correlation of {name} and traker {_correlation(grams[name], grams[peer]):.3f}"
        for name in mine
    ]
    return lines


def _gram(features: Tensor, rows: int = 200) -> Tensor:
    return features[:rows].double() @ features[:rows].double().T


def _correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
