"""Predicted classes after retraining: the primitive measures margins, which tell them where every class is asked."""

import numpy as np
import torch

from tasks.base import Examples, Task


def classes_of(task: Task) -> int:
    """C, the width of the model's output."""
    with torch.no_grad():
        return task.outputs(task.initial(0), task.train.batch([0])).shape[-1]


def per_class(examples: Examples, classes: int) -> Examples:
    """Each row C times in a row, once with every class as its target; ids `<id>/<class>`."""
    return Examples(
        tuple(f"{i}/{c}" for i in examples.ids for c in range(classes)),
        {name: values.repeat_interleave(classes, 0) for name, values in examples.inputs.items()},
        torch.arange(classes, dtype=torch.long).repeat(len(examples)),
        None if examples.texts is None else tuple(text for text in examples.texts for _ in range(classes)),
    )


def margins(measured: np.ndarray, classes: int) -> np.ndarray:
    """Measurements (..., n · C) of `per_class` rows as (..., n, C): the margin of each class. p(c | x) = σ(margin), so
    the largest is the predicted class."""
    return measured.reshape(*measured.shape[:-1], -1, classes)
