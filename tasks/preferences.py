"""A user's own preference pairs: which labels taught the reward model this, and which are wrong?"""

from dataclasses import replace
from typing import Any

import numpy as np

from tasks.base import Task, named_seed
from tasks.data.files import open_source, read
from tasks.data.own import QUERY_FILE, SHARES, Rows, counted, ids_of, named_columns
from tasks.data.preferences import Pairs, Sides, by_group, lengths, of_dialogues, pair_of, sides, sound
from tasks.errors import UserError, require
from tasks.models.reward import reward_model
from tasks.rlhf import assembled

VERSION = 1


def preferences(
    model: Any,
    data_dir: str | None,
    prompt: str | None,
    chosen: str | None,
    rejected: str | None,
    id: str | None,
    query_file: str | None,
    n_train: int | None,
    n_val: int | None,
    n_query: int | None,
    n_test: int | None,
    rate: float,
    seed: int,
    show_text: bool,
    floor: float | None,
) -> Task:
    """Pairs of a file, by the names of its columns; `prompt` null: `chosen` and `rejected` are whole dialogues, as in
    HH-RLHF. Splits are drawn by `seed`, by prompt; `query_file`: another such file, whose pairs are the queries.

    `id`: the column that names the rows, null for their positions. `rate` of the training pairs are flipped, drawn from
    those whose chosen answer is shorter, to see whether a method finds them. `floor`: test accuracy below which the
    task is unfit, null for a coin's.
    """
    model = reward_model(model, "preferences")

    def pairs(place: str | None, key: str) -> Pairs:
        return _read(place, key, prompt, chosen, rejected, id)

    own = pairs(data_dir, "task.data_dir")
    asked = None if query_file is None else pairs(query_file, QUERY_FILE)
    parts, notes = _split(own, asked, {"n_train": n_train, "n_val": n_val, "n_query": n_query, "n_test": n_test}, seed)
    every = own if asked is None else _joined(own, asked)
    task = assembled(model, every, parts, True, rate, 0, seed)
    return replace(
        task,
        source=own.rows.name,
        floor={"accuracy": 0.5 if floor is None else floor},
        identity={"version": VERSION, **task.identity},
        annotations=task.annotations if rate > 0 else None,
        notes=(*own.rows.notes, *notes),
        places={own.rows.ids[i]: own.rows.at[i] for i in parts["train"]},
        show_text=show_text,
    )


def _read(
    place: str | None, key: str, prompt: str | None, chosen: str | None, rejected: str | None, id: str | None
) -> Pairs:
    source = open_source(place, key)
    named = {"task.prompt": prompt, "task.chosen": chosen, "task.rejected": rejected, "task.id": id}
    optional = ("task.prompt", "task.id")
    settings = {name: column for name, column in named.items() if column is not None or name not in optional}
    named_columns(source, settings)
    cells = read(source, [column for column in settings.values() if column is not None])
    columns = [cells.text[column] for column in (prompt, chosen, rejected) if column is not None]
    found = [pair_of(_sides(row)) for row in zip(*columns, strict=True)]
    rows = Rows(
        source=source.path,
        key=key,
        at=tuple(str(line) for line in cells.lines),
        ids=ids_of(source, cells.lines, None if id is None else cells.text[id]),
        contents=[text for text, _ in found],
        targets=("",) * len(found),
    )
    rows = sound(rows, [problem for _, problem in found], equal=True)
    texts = [str(text) for text in rows.contents]
    return Pairs(rows, lengths(texts), tuple(sides(text)[0] for text in texts))


def _sides(row: tuple[str, ...]) -> Sides | str:
    if len(row) == 3:
        return row[0], row[1], row[2]
    chosen, rejected = row
    return of_dialogues(chosen, rejected) if chosen and rejected else ("", chosen, rejected)


def _split(
    own: Pairs, asked: Pairs | None, sizes: dict[str, int | None], seed: int
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Rows by split, those of a query file counted on from the others, and notes; shares as of all own files."""
    for key, size in sizes.items():
        require(size is None or size >= 1, f"task.{key}", size, "1 or more, or null")
    n_train, shares = sizes.pop("n_train"), dict(SHARES)
    if asked is not None:
        size = sizes.pop("n_query")
        require(size is None, "task.n_query", size, "null with task.query_file: all of its pairs are queries")
        both = sorted(set(own.groups) & set(asked.groups))
        if both:
            rows = [k for k, prompt in enumerate(asked.groups) if prompt in set(both)]
            stand = "has a prompt" if len(rows) == 1 else "have prompts"
            problem = f"{counted(rows)} {stand} of {own.rows.source.name}, too ({asked.rows.places(rows)})"
            raise UserError(QUERY_FILE, str(asked.rows.source), problem, hint="leave them out of one of the two")
    held: dict[str, int | None] = {
        key.removeprefix("n_"): max(1, min(most, round(share * len(own)))) if sizes[key] is None else sizes[key]
        for key, (share, most) in shares.items()
        if key in sizes
    }
    parts, left = by_group(own.groups, {**held, "train": n_train}, np.random.default_rng(named_seed("own pairs", seed)))
    train = parts.pop("train")
    allowed = f"fewer together ({len(own)} pairs of {len(set(own.groups))} prompts)"
    require(len(train) > 0, f"task.{' + '.join(sizes)}", sum(size or 0 for size in held.values()), allowed)
    said = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    notes: tuple[str, ...] = (f"{sum(map(len, parts.values()))} rows are held out ({said}) and are no suspects",)
    if left:
        notes += (f"{left} rows are in no split: a prompt is in one split only, and its rows beyond a size in none",)
    if asked is not None:
        parts["query"] = np.arange(len(own), len(own) + len(asked))
        notes += asked.rows.notes
    return {"train": train, "val": parts["val"], "query": parts["query"], "test": parts["test"]}, notes


def _joined(own: Pairs, asked: Pairs) -> Pairs:
    """The pairs of a query file behind the others. Names are unique within a file: one that both have is told apart."""
    known, taken = set(own.rows.ids), {*own.rows.ids, *asked.rows.ids}

    def apart(name: str) -> str:
        while name in taken:
            name = f"query:{name}"
        return name

    rows = replace(
        own.rows,
        at=(*own.rows.at, *asked.rows.at),
        ids=(*own.rows.ids, *(apart(i) if i in known else i for i in asked.rows.ids)),
        contents=[*own.rows.contents, *asked.rows.contents],
        targets=(*own.rows.targets, *asked.rows.targets),
    )
    return Pairs(rows, np.concatenate([own.trait, asked.trait]), (*own.groups, *asked.groups))
