"""MNIST (LeCun et al. 1998): the first images in file order, as published attribution benchmarks take them."""

from collections.abc import Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.base import Examples, Task
from tasks.data.corruption import Corruption
from tasks.data.sources import hub_file, named_folder, need_folder
from tasks.data.vectors import read_idx
from tasks.errors import UserError, require
from tasks.models.mlp import vector_model
from tasks.objectives.classification import Classification

VERSION = 1
HUB, REVISION = "ylecun/mnist", "77f3279092a1c1579b2250db8eafed0ad422088c"
SOURCES = ("auto", "folder", "hub")
FILES = {"train": "train", "test": "t10k"}
CLASSES, SIDE = 10, 28
MEAN, SD = 0.1307, 0.3081  # of the training pixels, in 0 … 1
TEST = 2000

Images = tuple[np.ndarray, np.ndarray]  # uint8 (N, 28, 28), labels (N,)


def mnist(
    model: Any,
    data: str,
    data_dir: str | None,
    n_train: int,
    n_val: int,
    n_query: int,
    seed: int,
    corruption: Corruption,
) -> Task:
    """train: the first `n_train` training images; val: the next `n_val`; query: the first `n_query` test images; test:
    the next 2,000. Nothing is drawn but the label errors, by `seed`. x = (pixel / 255 − 0.1307) / 0.3081, (N, 784)."""
    model = vector_model(model, "mnist", "classification", ("mlp_mnist", "logreg_mnist", "mlp", "logreg"))
    for key, size in {"n_train": n_train, "n_val": n_val, "n_query": n_query}.items():
        require(size >= 1, f"task.{key}", size, "1 or more")
    source, pools = _read(data, data_dir, {"train": n_train + n_val, "test": n_query + TEST})
    held, seen = len(pools["train"][1]), len(pools["test"][1])
    require(n_train + n_val <= held, "task.n_train", n_train, f"at most {held - n_val} ({held} images, less val)")
    require(n_query < seen, "task.n_query", n_query, f"at most {seen - 1} ({seen} images, less a test split)")
    parts = {
        "train": ("train", range(n_train)),
        "val": ("train", range(n_train, n_train + n_val)),
        "query": ("test", range(n_query)),
        "test": ("test", range(n_query, seen)),
    }
    dtype = getattr(torch, model.dtype)
    annotations = None
    splits = {}
    for name, (pool, rows) in parts.items():
        images, labels = (part[rows.start : rows.stop] for part in pools[pool])
        ids = tuple(f"{pool}:{i}" for i in rows)
        pixels = images.reshape(len(images), -1) / 255
        if name == "train":
            labels, annotations = corruption.apply(ids, labels, CLASSES, pixels, seed)
        x = torch.as_tensor((pixels - MEAN) / SD, dtype=dtype)
        splits[name] = Examples(ids, {"x": x}, torch.as_tensor(labels, dtype=torch.long))
    return Task(
        name="mnist",
        splits=splits,
        build=partial(model.build, SIDE * SIDE, CLASSES),
        objective=Classification(CLASSES),
        recipe=model.recipe,
        model=model.name,
        source=source,
        floor={"accuracy": 0.8},
        identity={"version": VERSION, **model.identity()},
        dtype=dtype,
        annotations=annotations,
    )


def _read(data: str, data_dir: str | None, wanted: Mapping[str, int]) -> tuple[str, dict[str, Images]]:
    """(source, the first `wanted` images of the files of train and test); `auto`: the folder, else the hub."""
    if data not in SOURCES:
        raise UserError("task.data", data, allowed=SOURCES)
    if data == "folder" or (data == "auto" and named_folder(data_dir, "mnist") is not None):
        folder = need_folder(data_dir, "mnist")
        return "folder", {pool: _from_idx(folder, pool, rows) for pool, rows in wanted.items()}
    try:
        files = {pool: hub_file(HUB, f"mnist/{pool}-00000-of-00001.parquet", REVISION) for pool in wanted}
    except OSError as error:
        raise UserError(
            "task.data",
            data,
            f"finds no images: {HUB} could not be downloaded and is not in the local cache",
            hint="give the folder of the four idx files with task.data_dir=, or BENCH_DATA with a folder mnist/ in it",
        ) from error
    return "hub", {pool: _from_parquet(files[pool], rows) for pool, rows in wanted.items()}


def _from_idx(folder: Path, pool: str, rows: int) -> Images:
    images = read_idx(folder, f"{FILES[pool]}-images-idx3-ubyte", 2051)
    labels = read_idx(folder, f"{FILES[pool]}-labels-idx1-ubyte", 2049)
    fits = len(images) == len(labels) and images.shape[1:] == (SIDE, SIDE) and (labels < CLASSES).all()
    if not fits:
        problem = f"has {len(labels)} labels up to {labels.max(initial=0)} for {pool} images {images.shape}"
        raise UserError("task.data_dir", str(folder), problem, allowed="labels 0 to 9, one for each image of 28 x 28")
    return images[:rows], labels[:rows].astype(np.int64)


def _from_parquet(path: Path, rows: int) -> Images:
    """`image` holds an encoded file's bytes, `label` its digit."""
    import pandas as pd
    from PIL import Image

    try:
        table = pd.read_parquet(path, columns=["image", "label"]).iloc[:rows]
        images = [np.asarray(Image.open(BytesIO(cell["bytes"])).convert("L")) for cell in table["image"]]
        stacked, labels = np.stack(images), np.array(table["label"], np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's and PIL's derive from these
        raise UserError("task.data", "hub", f"cannot be used: {path} is damaged ({error})", hint="remove it") from error
    if stacked.shape[1:] != (SIDE, SIDE) or not ((labels >= 0) & (labels < CLASSES)).all():
        raise UserError("task.data", "hub", f"cannot be used: {path} holds other images", hint="remove it")
    return stacked, labels
