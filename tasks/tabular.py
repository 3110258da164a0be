"""Vectors of numbers: sets bundled with scikit-learn, a user's file, a UCI folder; classification or regression."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from tasks.base import Examples, Task, named_seed
from tasks.data.corruption import Corruption
from tasks.data.own import QUERY_FILE, Split, guessing, labelled, split
from tasks.data.vectors import BUNDLED, KINDS, Table, find_table, label_of, read_bundled, read_file, read_uci
from tasks.errors import UserError, require
from tasks.models.mlp import vector_model
from tasks.objectives.classification import Classification
from tasks.objectives.regression import Regression

VERSION = 1
SHARES = {"n_train": 0.6, "n_val": 0.1, "n_query": 0.15}  # of a benchmark's rows, where the size is null; rest is test
CLASSES = 20  # distinct whole numbers up to which `auto` takes them for class labels
FLOOR = {"accuracy": 0.8, "r2": 0.2}
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
    floor: Mapping[str, float | None],
    n_test: int | None = None,
    id: str | None = None,
    clean: str | None = None,
    features: Sequence[str] | None = None,
    query_file: str | None = None,
) -> Task:
    """Rows are drawn by `seed`. Features, and the targets of a regression, are standardised by the training split's
    mean and standard deviation; what is constant there becomes 0.

    `kind` auto: a UCI folder is a regression; elsewhere targets are class labels where they are text, or whole numbers
    of which at most `CLASSES` differ; all other numbers are a regression (and numbers mixed with text are refused).
    `floor`: test accuracy and r2 below which the task is unfit; null: `FLOOR` for a benchmark, and for a user's file
    what always giving the same answer reaches.

    Of a user's file: `target`, `id` and `clean` (right labels, where they are known) name columns, `features` the
    columns of numbers (null: all others), `query_file` another such file, whose rows are the queries.
    """
    columns = {"target": target, "id": id, "clean": clean, "features": features, "query_file": query_file}
    table = _read(data, data_dir, kind, columns)
    kind = _kind(table, kind)
    model = vector_model(model, "tabular", kind, FITTING[kind])
    asked = None
    if query_file is not None:
        asked = read_file(query_file, QUERY_FILE, target, kind, id, clean, table.columns)
    if kind == "regression":
        require(corruption.rate == 0, "task.corruption.rate", corruption.rate, "0 with regression: it has no labels")
        require(clean is None, "task.clean", clean, "null with regression: it has no labels")
    sizes = {"n_train": n_train, "n_val": n_val, "n_query": n_query, "n_test": n_test}
    values, answers, ids = _stacked([table] if asked is None else [table, asked])
    classes = tuple(label_of(value) for value in np.unique(table.targets).tolist()) if kind == "classification" else ()
    if table.rows is None:
        made = _benchmark(table, bool(classes), sizes, corruption, seed)
    elif classes:
        others = None if asked is None else asked.rows
        made = labelled(
            table.rows, others, classes, sizes, corruption, lambda rows: standardised(values, rows)[rows], seed
        )
    else:
        parts, notes = split(table.rows, None, None if asked is None else asked.rows, sizes, seed)
        made = Split(parts, {}, None, notes)
    inputs = standardised(values, made.rows["train"])
    if classes:
        targets = made.targets
    else:
        scaled = standardised(answers[:, None], made.rows["train"])[:, 0]
        targets = {name: scaled[part] for name, part in made.rows.items()}
    dtype = getattr(torch, model.dtype)
    splits = {
        name: Examples(
            tuple(ids[i] for i in part),
            {"x": torch.as_tensor(inputs[part], dtype=dtype)},
            torch.as_tensor(targets[name], dtype=torch.long if classes else dtype),
        )
        for name, part in made.rows.items()
    }
    measure = "accuracy" if classes else "r2"
    always = guessing(made) if classes else 0.0
    reached = FLOOR[measure] if table.rows is None else always
    return Task(
        name="tabular",
        splits=splits,
        build=partial(model.build, values.shape[1], len(classes) or 1),
        objective=Classification(len(classes)) if classes else Regression(),
        recipe=model.recipe,
        model=model.name,
        source=table.name,
        floor={measure: reached if floor[measure] is None else float(floor[measure] or 0)},
        identity={
            "version": VERSION,
            "data": table.name,
            "kind": kind,
            **model.identity(),
        },
        dtype=dtype,
        annotations=made.annotations,
        classes=classes,
        notes=made.notes,
        places={} if table.rows is None else made.places(table.rows),
    )


def _stacked(tables: Sequence[Table]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features, targets and ids of a table, and behind them those of the query file."""
    if len(tables) == 1:
        (table,) = tables
        ids = table.rows.ids if table.rows is not None else range(len(table.targets))
        return table.features, table.targets, [str(i) for i in ids]
    features, targets, ids = zip(*(_stacked([table]) for table in tables), strict=True)
    return np.concatenate(features), np.concatenate(targets), [i for part in ids for i in part]


def _benchmark(table: Table, labels: bool, sizes: Mapping[str, int | None], corruption: Corruption, seed: int) -> Split:
    """Splits of a published set, whose rows are all used."""
    rows = len(table.targets)
    taking = {
        key: max(1, round(share * rows)) if (size := sizes[key]) is None else size for key, share in SHARES.items()
    }
    for key, size in taking.items():
        require(size >= 1, f"task.{key}", size, "1 or more")
    taken = sum(taking.values())
    allowed = f"at most {rows - 1} together ({table.name} has {rows} rows and needs a test split)"
    require(taken < rows, "task.n_train + n_val + n_query", taken, allowed)
    n_test = sizes["n_test"]
    allowed = f"1 to {rows - taken}, or null for all that are left"
    require(n_test is None or 1 <= n_test <= rows - taken, "task.n_test", n_test, allowed)
    order = np.random.default_rng(named_seed("tabular", seed)).permutation(rows)
    cut = np.split(order, np.cumsum(list(taking.values())))
    parts = dict(zip(("train", "val", "query", "test"), [*cut[:3], cut[3][:n_test]], strict=True))
    if not labels:
        return Split(parts, {}, None, ())
    train, (names, targets) = parts["train"], np.unique(table.targets, return_inverse=True)
    features = standardised(table.features, train)[train]
    ids = [str(i) for i in train]
    targets[train], annotations = corruption.apply(ids, targets[train], len(names), features, seed)
    return Split(parts, {name: targets[part] for name, part in parts.items()}, annotations, ())


def standardised(columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(x − mean) / sd of each column (N, F), both from `rows`; 0 where the column is constant there."""
    seen = columns[rows]
    constant = seen.min(0) == seen.max(0)  # not sd == 0, which rounding may miss
    return np.where(constant, 0.0, (columns - seen.mean(0)) / np.where(constant, 1.0, seen.std(0)))


def _read(data: str, data_dir: str | None, kind: str, columns: Mapping[str, Any]) -> Table:
    if kind not in KINDS:
        raise UserError("task.kind", kind, allowed=KINDS)
    if data == "folder":
        place = find_table(data_dir)
        if not (place / "data.txt").is_file():
            settings = {name: columns[name] for name in ("target", "id", "clean", "features")}
            return read_file(str(place), "task.data_dir", kind=kind, **settings)
        for key, value in columns.items():
            if value is not None:
                hint = "a UCI folder names its columns itself: take null"
                raise UserError(f"task.{key}", value, "is not possible", hint=hint)
        return read_uci(place)
    if data not in BUNDLED:
        raise UserError(
            "task.data",
            data,
            "is unknown",
            allowed=(*BUNDLED, "folder"),
            hint="a file of yours: task.data=folder task.data_dir=<file> task.target=<column>",
        )
    for key, value in {"data_dir": data_dir, **columns}.items():
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
