"""Vectors of numbers: sets bundled with scikit-learn, a user's CSV file, a UCI folder; classification or regression."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from tasks.base import Annotations, Examples, Task, named_seed
from tasks.data.corruption import Corruption
from tasks.data.vectors import BUNDLED, KINDS, Table, read_bundled, read_table
from tasks.errors import UserError, require
from tasks.models.mlp import vector_model
from tasks.objectives.classification import Classification
from tasks.objectives.regression import Regression

VERSION = 1
SHARES = {"n_train": 0.6, "n_val": 0.1, "n_query": 0.15}  # of the rows, where the size is null; the rest is test
CLASSES = 20  # distinct whole numbers up to which `auto` takes them for class labels
FITTING = {"classification": ("logreg", "mlp_tabular"), "regression": ("linear", "mlp_tabular")}


def tabular(
    model: Any,
    data: str,
    data_dir: str | None,
    target: str | None,
    kind: str,
    n_train: int | None,
    n_val: int | None,
    n_query: int | None,
    seed: int,
    corruption: Corruption,
    floor: Mapping[str, float],
) -> Task:
    """Rows are drawn by `seed`. Features, and the targets of a regression, are standardised by the training split's
    mean and standard deviation; what is constant there becomes 0.

    `kind` auto: a UCI folder is a regression; elsewhere targets are class labels where they are text, or whole numbers
    of which at most `CLASSES` differ; all other numbers are a regression (and numbers mixed with text are refused).
    `floor`: test accuracy and r2 below which the task is unfit.
    """
    table = _read(data, data_dir, target, kind)
    kind = _kind(table, kind)
    model = vector_model(model, "tabular", kind, FITTING[kind])
    rows = len(table.targets)
    sizes = {
        key: max(1, round(SHARES[key] * rows)) if size is None else size
        for key, size in {"n_train": n_train, "n_val": n_val, "n_query": n_query}.items()
    }
    for key, size in sizes.items():
        require(size >= 1, f"task.{key}", size, "1 or more")
    taken = sum(sizes.values())
    allowed = f"at most {rows - 1} together ({table.name} has {rows} rows and needs a test split)"
    require(taken < rows, "task.n_train + n_val + n_query", taken, allowed)
    order = np.random.default_rng(named_seed("tabular", seed)).permutation(rows)
    parts = np.split(order, np.cumsum(list(sizes.values())))
    features = standardised(table.features, parts[0])
    objective: Classification | Regression
    annotations: Annotations | None = None
    if kind == "regression":
        require(corruption.rate == 0, "task.corruption.rate", corruption.rate, "0 with regression: it has no labels")
        targets = standardised(table.targets[:, None], parts[0])[:, 0]
        objective, outputs, measure = Regression(), 1, "r2"
    else:
        labels, targets = np.unique(table.targets, return_inverse=True)
        ids = [str(i) for i in parts[0]]
        targets[parts[0]], annotations = corruption.apply(ids, targets[parts[0]], len(labels), features[parts[0]], seed)
        objective, outputs, measure = Classification(len(labels)), len(labels), "accuracy"
    dtype = getattr(torch, model.dtype)
    splits = {
        name: Examples(
            tuple(str(i) for i in part),
            {"x": torch.as_tensor(features[part], dtype=dtype)},
            torch.as_tensor(targets[part], dtype=dtype if kind == "regression" else torch.long),
        )
        for name, part in zip(("train", "val", "query", "test"), parts, strict=True)
    }
    return Task(
        name="tabular",
        splits=splits,
        build=partial(model.build, features.shape[1], outputs),
        objective=objective,
        recipe=model.recipe,
        model=model.name,
        source=table.name,
        floor={measure: floor[measure]},
        identity={
            "version": VERSION,
            "data": table.name,
            "kind": kind,
            **model.identity(),
        },
        dtype=dtype,
        annotations=annotations,
    )


def standardised(columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(x − mean) / sd of each column (N, F), both from `rows`; 0 where the column is constant there."""
    seen = columns[rows]
    constant = seen.min(0) == seen.max(0)  # not sd == 0, which rounding may miss
    return np.where(constant, 0.0, (columns - seen.mean(0)) / np.where(constant, 1.0, seen.std(0)))


def _read(data: str, data_dir: str | None, target: str | None, kind: str) -> Table:
    if kind not in KINDS:
        raise UserError("task.kind", kind, allowed=KINDS)
    if data == "folder":
        return read_table(data_dir, target, kind)
    if data not in BUNDLED:
        raise UserError(
            "task.data",
            data,
            "is unknown",
            allowed=(*BUNDLED, "folder"),
            hint="a file of yours: task.data=folder task.data_dir=<file> task.target=<column>",
        )
    for key, value in {"data_dir": data_dir, "target": target}.items():
        if value is not None:
            raise UserError(f"task.{key}", value, f"is not for task.data={data}", hint="add task.data=folder")
    return read_bundled(data)


def _kind(table: Table, kind: str) -> str:
    distinct = np.unique(table.targets)
    if kind == "auto":
        text = distinct.dtype.kind == "U"
        labels = text or (len(distinct) <= CLASSES and bool((distinct == np.round(distinct)).all()))
        kind = table.kind or ("classification" if labels else "regression")
    if kind == "classification":
        rows = len(table.targets)
        allowed = f"with 2 to {rows // 2} classes ({table.name} has {len(distinct)} in {rows} rows)"
        require(2 <= len(distinct) <= rows / 2, "task.kind", kind, allowed)
    return kind
