"""A user's own images and their labels: a folder with a subfolder a class, or a table of paths."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.base import Examples, Task
from tasks.data.corruption import Corruption
from tasks.data.files import is_table
from tasks.data.own import QUERY_FILE, Flaw, Rows, guessing, label_names, labelled, read_rows, usable
from tasks.errors import UserError, require
from tasks.models.mlp import vector_model
from tasks.objectives.classification import Classification

VERSION = 1


def images(
    model: Any,
    data_dir: str | None,
    path: str | None,
    target: str | None,
    id: str | None,
    clean: str | None,
    query_file: str | None,
    size: int,
    gray: bool,
    n_train: int | None,
    n_val: int | None,
    n_query: int | None,
    n_test: int | None,
    seed: int,
    corruption: Corruption,
    floor: float | None,
) -> Task:
    """x = pixels / 255 of `size` x `size` images, channel by channel, row by row: (N, size²) where `gray`, else
    (N, 3 size²). Labels are the names of the subfolders, and ids the paths in the folder; or, of a table, its columns
    `target` and `id` (null: positions), `path` being relative to the table.

    `clean`: the column of right labels, where they are known; `query_file`: another table or folder, whose images are
    the queries. `floor`: test accuracy below which the task is unfit, null for that of always saying the most frequent
    label.
    """
    model = vector_model(model, "images", "classification", ("mlp", "logreg"))
    require(size >= 1, "task.size", size, "1 or more")

    def read(place: str | None, key: str) -> Rows:
        if place is not None and Path(place).expanduser().is_dir() and not is_table(place):
            for setting, column in {"id": id, "clean": clean}.items():
                if column is not None:
                    hint = "take null, or a table of paths"
                    raise UserError(f"task.{setting}", column, "is a column, which a folder does not have", hint=hint)
            rows = _of_folder(Path(place).expanduser(), key)
            folder = rows.source
        else:
            rows = read_rows(place, key, ("task.path", path), target, id, clean)
            folder = rows.source.parent
        return _decoded(rows, folder, size, gray)

    rows = read(data_dir, "task.data_dir")
    asked = None if query_file is None else read(query_file, QUERY_FILE)
    names = label_names(rows)
    sizes = {"n_train": n_train, "n_val": n_val, "n_query": n_query, "n_test": n_test}
    every = [rows] if asked is None else [rows, asked]
    pixels = np.concatenate([np.asarray(part.contents) for part in every]) / 255
    ids = [i for part in every for i in part.ids]
    made = labelled(rows, asked, names, sizes, corruption, lambda train: pixels[train], seed)
    dtype = getattr(torch, model.dtype)
    splits = {
        name: Examples(
            tuple(ids[i] for i in part),
            {"x": torch.as_tensor(pixels[part], dtype=dtype)},
            torch.as_tensor(made.targets[name], dtype=torch.long),
        )
        for name, part in made.rows.items()
    }
    return Task(
        name="images",
        splits=splits,
        build=partial(model.build, pixels.shape[1], len(names)),
        objective=Classification(len(names)),
        recipe=model.recipe,
        model=model.name,
        source=rows.name,
        floor={"accuracy": guessing(made) if floor is None else floor},
        identity={"version": VERSION, **model.identity()},
        dtype=dtype,
        annotations=made.annotations,
        classes=tuple(names),
        notes=made.notes,
        places=made.places(rows),
    )


def _of_folder(folder: Path, key: str) -> Rows:
    """Every file below a subfolder, hidden ones aside; those beside the subfolders belong to no class."""
    classes = [place for place in sorted(folder.iterdir()) if place.is_dir() and not place.name.startswith(".")]
    files = [
        (file.relative_to(folder).as_posix(), place.name)
        for place in classes
        for file in sorted(place.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise UserError(key, str(folder), "has no subfolder with images", allowed="a subfolder a class, or one table")
    beside = sum(place.is_file() and not place.name.startswith(".") for place in folder.iterdir())
    notes = (f"files in no subfolder, and so of no class: {beside}",) if beside else ()
    at, labels = zip(*files, strict=True)
    ids = tuple(f"query:{name}" for name in at) if key == QUERY_FILE else at
    return Rows(folder, key, at, ids, at, labels, notes=notes)


def _decoded(rows: Rows, folder: Path, size: int, gray: bool) -> Rows:
    """Pixels (N, F) uint8 in place of paths; what cannot be read is no row."""
    found = [_pixels(folder / str(path), size, gray) if path else "no path" for path in rows.contents]
    flaws = [
        Flaw("without a target", np.array([not label for label in rows.targets], dtype=bool)),
        Flaw(
            "without an image that can be read",
            np.array([isinstance(image, str) for image in found], dtype=bool),
            {row: f"({image})" for row, image in enumerate(found) if isinstance(image, str)},
        ),
    ]
    blank = np.zeros(size * size * (1 if gray else 3), dtype=np.uint8)
    pixels = np.stack([blank if isinstance(image, str) else image for image in found]) if found else blank[:0, None]
    return usable(replace(rows, contents=pixels), flaws, "pixels")


def _pixels(path: Path, size: int, gray: bool) -> np.ndarray | str:
    """uint8 (F,), upright, or why there is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            if upright.mode.startswith("I"):  # 16 bits, which PIL would cut off at 255
                upright = Image.fromarray((np.asarray(upright, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
            image = upright.convert("L" if gray else "RGB").resize((size, size), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        return f"{path.name} is not there"
    except UnidentifiedImageError:
        return f"{path.name} is no image"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL's readers raise
        return f"{path.name}: {' '.join(str(error).split())[:80]}"
    values = np.asarray(image, dtype=np.uint8)
    return (values if gray else np.moveaxis(values, 2, 0)).ravel()
