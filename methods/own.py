"""From Python: a model that somebody has trained, and its data, as a problem that any method answers."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from methods.base import Problem
from tasks.base import Checkpoint, Examples, Recipe, Task, Trajectory
from tasks.objectives.classification import Classification
from tasks.objectives.regression import Regression
from tasks.training.train import state

GIVEN = Recipe("sgd", 1.0, 0, 1, 0.0, "l2", "constant", 0.0, 0.0, (0.9, 0.999), 1e-8, None, 1, 1, 1e-8)


def examples(
    model: nn.Module, inputs: Any, targets: Any, ids: Sequence[str] | None = None, texts: Sequence[str] | None = None
) -> Examples:
    """Rows as the model reads them: an array (N, …), or named arrays (`input_ids`, `attention_mask`), numbers cast to
    the model's dtype; class indices (N,) or, for a regression, numbers (N,). `ids`: positions unless given."""
    dtype = next(model.parameters()).dtype
    first = next(iter(inspect.signature(model.forward).parameters))
    named = inputs if isinstance(inputs, dict) else {first: inputs}

    def cast(values: Any) -> torch.Tensor:
        tensor = torch.as_tensor(values)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor.long()

    names = tuple(str(i) for i in (range(len(targets)) if ids is None else ids))
    given = {key: cast(values) for key, values in named.items()}
    return Examples(names, given, cast(targets), None if texts is None else tuple(texts))


def problem(model: nn.Module, train: Examples, val: Examples | None = None, l2: float = 0.0, seed: int = 0) -> Problem:
    """Which of the `train` rows made the model what it is? It is explained as it is: nothing is trained.

    Its output is logits (B, C), or (B, 1) for a regression. `l2` is γ of the ½γ‖θ‖² that it was trained with, if any
    (AdamW's decay is none). `val`: rows for methods that value an example by them. Methods that look at earlier
    checkpoints, or train again, cannot answer.
    """
    frozen = copy.deepcopy(model).eval()
    held_out = train.select([]) if val is None else val
    with torch.no_grad():
        outputs = frozen(**train.batch([0]).inputs)
    weights = state(frozen)
    task = Task(
        name="own",
        splits={"train": train, **dict.fromkeys(("val", "query", "test"), held_out)},
        build=lambda: copy.deepcopy(frozen),
        objective=Regression() if train.targets.is_floating_point() else Classification(outputs.shape[-1]),
        recipe=replace(GIVEN, weight_decay=l2),
        model=type(model).__name__,
        source="own",
        floor={},
        identity={},
        dtype=next(frozen.parameters()).dtype,
    )
    training = Trajectory(seed, weights, (Checkpoint(0, weights, 0.0),), 0.0, 0.0)
    return Problem(task, seed, lambda k: training)
