"""Predicted classes after retraining: the primitive measures margins, which tell them where every class is asked."""

import numpy as np
import torch
from torch import Tensor

from tasks.base import Examples, Task


def classes_of(task: Task) -> int:
    """C, the width of the model's output."""
    with torch.no_grad():
        return task.outputs(task.initial(0), task.train.batch([0])).shape[-1]


def per_class(examples: Examples, classes: Tensor) -> Examples:
    """Each row once with each of the classes (C,) as its target, n · C rows; ids `<id>/<class>`."""
    times = len(classes)
    return Examples(
        tuple(f"{i}/{c}" for i in examples.ids for c in classes.tolist()),
        {name: values.repeat_interleave(times, 0) for name, values in examples.inputs.items()},
        classes.repeat(len(examples)),
        None if examples.texts is None else tuple(text for text in examples.texts for _ in range(times)),
    )


def margins(measured: np.ndarray, classes: int) -> np.ndarray:
    """Measurements (..., n · C) of `per_class` rows as (..., n, C): the margin of each class. p(c | x) = σ(margin), so
    the largest is the predicted class."""
    return measured.reshape(*measured.shape[:-1], -1, classes)
