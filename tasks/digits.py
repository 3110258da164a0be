"""Handwritten digits, 8x8, bundled with scikit-learn: real, small, no download."""

from functools import partial
from typing import Any

import numpy as np
import torch

from tasks.base import Examples, Task, named_seed
from tasks.data.corruption import Corruption
from tasks.errors import require
from tasks.models.mlp import vector_model
from tasks.objectives.classification import Classification

VERSION = 1
CLASSES = 10


def digits(model: Any, n_train: int, n_val: int, n_query: int, seed: int, corruption: Corruption) -> Task:
    """1,797 images, pixels / 16. Rows are drawn by `seed`; what train, val and query leave is the test split."""
    model = vector_model(model, "digits", "classification", ("logreg", "mlp"))
    from sklearn.datasets import load_digits

    data = load_digits()
    rows = len(data.target)
    for key, size in {"n_train": n_train, "n_val": n_val, "n_query": n_query}.items():
        require(size >= 1, f"task.{key}", size, "1 or more")
    require(
        n_train + n_val + n_query < rows,
        "task.n_train",
        n_train,
        f"at most {rows - 1 - n_val - n_query} ({rows} images, less val, query and a test split)",
    )
    pixels = data.data / 16.0
    order = np.random.default_rng(named_seed("digits", seed)).permutation(rows)
    parts = np.split(order, np.cumsum([n_train, n_val, n_query]))
    labels = data.target.copy()
    train_ids = [str(i) for i in parts[0]]
    labels[parts[0]], annotations = corruption.apply(train_ids, labels[parts[0]], CLASSES, pixels[parts[0]], seed)
    dtype = getattr(torch, model.dtype)
    splits = {
        name: Examples(
            tuple(str(i) for i in part),
            {"x": torch.as_tensor(pixels[part], dtype=dtype)},
            torch.as_tensor(labels[part], dtype=torch.long),
        )
        for name, part in zip(("train", "val", "query", "test"), parts, strict=True)
    }
    return Task(
        name="digits",
        splits=splits,
        build=partial(model.build, 64, CLASSES),
        objective=Classification(CLASSES),
        recipe=model.recipe,
        model=model.name,
        source="bundled",
        floor={"accuracy": 0.8},
        identity={"version": VERSION, **model.identity()},
        dtype=dtype,
        annotations=annotations,
    )
