"""A user's own texts and their labels: which rows of this file are bad, and which made the model say this?"""

from typing import Any

import numpy as np
import torch

from tasks.base import Examples, Task
from tasks.data.corruption import Corruption
from tasks.data.own import QUERY_FILE, Flaw, Rows, guessing, label_names, labelled, read_rows, usable
from tasks.models.encoder import text_model
from tasks.objectives.classification import Classification

VERSION = 1


def text(
    model: Any,
    data_dir: str | None,
    text: str | None,
    target: str | None,
    id: str | None,
    clean: str | None,
    query_file: str | None,
    n_train: int | None,
    n_val: int | None,
    n_query: int | None,
    n_test: int | None,
    seed: int,
    corruption: Corruption,
    floor: float | None,
) -> Task:
    """Classification of the column `text` of a file into the labels of its column `target`; splits drawn by `seed`.

    `id`: the column that names the rows, null for their positions; `clean`: the column of right labels, where they are
    known; `query_file`: another such file, whose rows are the queries. `floor`: test accuracy below which the task is
    unfit, null for that of always saying the most frequent label.
    """
    model = text_model(model, "text")

    def read(place: str | None, key: str) -> Rows:
        rows = read_rows(place, key, ("task.text", text), target, id, clean)
        empty = [np.array([not cell for cell in cells], dtype=bool) for cells in (rows.contents, rows.targets)]
        return usable(rows, [Flaw("without a text", empty[0]), Flaw("without a target", empty[1])], "text")

    rows = read(data_dir, "task.data_dir")
    asked = None if query_file is None else read(query_file, QUERY_FILE)
    names = label_names(rows)
    sizes = {"n_train": n_train, "n_val": n_val, "n_query": n_query, "n_test": n_test}
    every = [rows] if asked is None else [rows, asked]
    texts, ids = ([cell for part in every for cell in cells(part)] for cells in (lambda r: r.contents, lambda r: r.ids))
    made = labelled(rows, asked, names, sizes, corruption, lambda train: _bag_of_words([texts[i] for i in train]), seed)
    tokenize, build, identity = model.prepare([texts[i] for i in made.rows["train"]], len(names))
    splits = {}
    for name, part in made.rows.items():
        chosen = tuple(texts[i] for i in part)
        targets = torch.as_tensor(made.targets[name], dtype=torch.long)
        splits[name] = Examples(tuple(ids[i] for i in part), tokenize(chosen), targets, chosen)
    full = sum(int((split.lengths == model.max_length).sum()) for split in splits.values() if split.lengths is not None)
    said = f"texts of {model.max_length} tokens (model.max_length) or more: {full}; what is beyond is not read"
    return Task(
        name="text",
        splits=splits,
        build=build,
        objective=Classification(len(names)),
        recipe=model.recipe,
        model=model.name,
        source=rows.name,
        floor={"accuracy": guessing(made) if floor is None else floor},
        identity={"version": VERSION, **identity},
        dtype=getattr(torch, model.dtype),
        annotations=made.annotations,
        classes=tuple(names),
        places=made.places(rows),
        notes=(*made.notes, said) if full else made.notes,
    )


def _bag_of_words(texts: list[str]) -> Any:
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(token_pattern=r"\S+").fit_transform(texts)
