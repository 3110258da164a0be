"""A user's own rows: which of them can be used, what is told about the others, and which split each one goes to."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tasks.base import Annotations, named_seed
from tasks.data.corruption import Corruption
from tasks.data.files import Source, open_source, read
from tasks.errors import UserError, require

QUERY_FILE = "task.query_file"
SHARES = {"n_val": (0.1, 500), "n_query": (0.1, 200), "n_test": (0.1, 2000)}  # of all rows, and at most, where null
FEWEST = 10  # rows that can be used
LISTED = 5  # rows of a note
LABELS = 10  # notes about labels


@dataclass(frozen=True)
class Rows:
    """Rows of a source. `at`: a row's line, or its file where the source is a folder. `contents`: texts, paths, or
    numbers (N, F). `targets` and `clean`: labels as text, empty where there is none."""

    source: Path
    key: str  # the setting that names the source
    at: tuple[str, ...]
    ids: tuple[str, ...]
    contents: Sequence[str] | np.ndarray
    targets: tuple[str, ...]
    clean: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def name(self) -> str:
        """Of the source, without its endings."""
        return self.source.name.removesuffix(".gz").rpartition(".")[0] or self.source.name

    def keys(self) -> list[Hashable]:
        """Equal where two rows' contents are."""
        whole = isinstance(self.contents, np.ndarray)
        return [row.tobytes() if whole else row for row in self.contents]  # type: ignore[union-attr]

    def place(self, row: int) -> str:
        """Of one row, for an error."""
        return f"{self.source}:{self.at[row]}" if self.source.is_file() else str(self.source / self.at[row])

    def places(self, rows: Sequence[int], detail: Mapping[int, str] | None = None) -> str:
        """Of several, for a note: `lines 4, 9 and 12 more`."""
        named = [self.at[row] + (f" {detail[row]}" if detail else "") for row in rows[:LISTED]]
        word = ("lines " if len(rows) > 1 else "line ") if self.source.is_file() else ""
        return word + ", ".join(named) + (f" and {len(rows) - LISTED} more" if len(rows) > LISTED else "")

    def select(self, rows: Sequence[int], notes: Sequence[str]) -> "Rows":
        """These rows, and what is told about the others; where they come from is part of it for a query file."""
        rows = list(rows)
        before = "query file: " if self.key == QUERY_FILE else ""
        return replace(
            self,
            at=tuple(self.at[i] for i in rows),
            ids=tuple(self.ids[i] for i in rows),
            contents=self.contents[rows] if isinstance(self.contents, np.ndarray) else [self.contents[i] for i in rows],
            targets=tuple(self.targets[i] for i in rows),
            clean=None if self.clean is None else tuple(self.clean[i] for i in rows),
            notes=(*self.notes, *(before + note for note in notes)),
        )


@dataclass(frozen=True)
class Flaw:
    """Rows (N,) that cannot be used, why (`without a target`), and what more is to be said of a row."""

    why: str
    rows: np.ndarray
    detail: Mapping[int, str] | None = None


@dataclass(frozen=True)
class Split:
    """Rows by split, those of a query file counted on from the others; what each is trained or measured on."""

    rows: Mapping[str, np.ndarray]
    targets: Mapping[str, np.ndarray]
    annotations: Annotations | None
    notes: tuple[str, ...]

    def places(self, rows: Rows) -> dict[str, str]:
        """Line or file of each training row, by id."""
        return {rows.ids[i]: rows.at[i] for i in self.rows["train"]}


def named_columns(source: Source, settings: Mapping[str, str | None]) -> list[str]:
    """The columns that the settings name: there, and each for one thing."""
    found: list[str] = []
    for key, name in settings.items():
        column = source.need(key, name)
        if column in found:
            raise UserError(key, column, "is named twice", allowed=[c for c in source.columns if c not in found])
        found.append(column)
    return found


def read_rows(
    place: str | None, key: str, content: tuple[str, str | None], target: str | None, id: str | None, clean: str | None
) -> Rows:
    """From a table; `content`: the setting that names the column of texts or paths, and that name. A query file may do
    without the column of right labels."""
    source = open_source(place, key)
    if key == QUERY_FILE and clean not in source.columns:
        clean = None
    optional = {name: column for name, column in {"task.id": id, "task.clean": clean}.items() if column is not None}
    columns = named_columns(source, {content[0]: content[1], "task.target": target, **optional})
    cells = read(source, columns)
    return Rows(
        source=source.path,
        key=key,
        at=tuple(str(line) for line in cells.lines),
        ids=ids_of(source, cells.lines, None if id is None else cells.text[id]),
        contents=cells.text[columns[0]],
        targets=tuple(cells.text[columns[1]]),
        clean=None if clean is None else tuple(cells.text[clean]),
    )


def ids_of(source: Source, lines: Sequence[int], given: Sequence[str] | None) -> tuple[str, ...]:
    """The cells of the user's column of names, refused where one is empty or stands there twice; else positions in the
    source, from 0."""
    if given is None:
        return tuple(f"query:{i}" if source.key == QUERY_FILE else str(i) for i in range(len(lines)))
    first: dict[str, int] = {}
    for line, name in zip(lines, given, strict=True):
        if not name:
            raise UserError(source.key, source.at(line), "has no id", hint="fill it in, or take task.id=null")
        if name in first:
            problem = f"has the id {name!r} of line {first[name]}"
            raise UserError(source.key, source.at(line), problem, allowed="each row its own")
        first[name] = line
    return tuple(given)


def usable(rows: Rows, flaws: Sequence[Flaw], what: str) -> Rows:
    """Without the rows that have a flaw, and without exact repetitions of an earlier row: they would stand on both
    sides of a split. Rows that agree in their contents (`what` they are called) but not in their label are kept. All
    are counted."""
    notes, left = [], np.ones(len(rows), dtype=bool)
    for flaw in flaws:
        mine = np.flatnonzero(flaw.rows & left).tolist()
        left[mine] = False
        if mine:
            notes.append(f"{counted(mine)} dropped {flaw.why} ({rows.places(mine, flaw.detail)})")
    require_enough(rows, int(left.sum()), notes)
    contents = rows.keys()
    seen: dict[Hashable, dict[str, int]] = {}
    again: list[int] = []
    disputed: list[int] = []
    for row in np.flatnonzero(left).tolist():
        labels = seen.setdefault(contents[row], {})
        if rows.targets[row] in labels:
            again.append(row)
            continue
        disputed += [*(labels.values() if len(labels) == 1 else ()), *([row] if labels else ())]
        labels[rows.targets[row]] = row
    left[again] = False
    if again:
        notes.append(f"{counted(again)} dropped as repetitions of an earlier one ({rows.places(again)})")
    if disputed:
        disputed.sort()
        notes.append(f"{counted(disputed)} kept with the {what} of a row of another label ({rows.places(disputed)})")
    require_enough(rows, int(left.sum()), notes, share=0.0)
    return rows.select(np.flatnonzero(left).tolist(), notes)


def require_enough(rows: Rows, left: int, notes: Sequence[str], share: float = 0.1) -> None:
    """Refuses a source of which nothing, or nearly nothing, is left."""
    fewest = 1 if rows.key == QUERY_FILE else FEWEST
    if left < fewest or left < share * len(rows):
        allowed = f"{fewest} or more that can be used" + (", and a tenth of all" if share else "")
        problem = f"has {left} of {len(rows)} rows left"
        raise UserError(rows.key, str(rows.source), problem, allowed=allowed, hint="; ".join(notes) or None)


def counted(rows: Sequence[int]) -> str:
    return "1 row" if len(rows) == 1 else f"{len(rows)} rows"


def label_names(rows: Rows) -> list[str]:
    """Class labels in the order of the alphabet; refused where there are too few or too many to be classes."""
    names = sorted(set(rows.targets))
    if not 2 <= len(names) <= len(rows) / 2:
        problem = f"has {len(names)} different labels in {len(rows)} rows that can be used"
        raise UserError(rows.key, str(rows.source), problem, allowed=f"2 to {len(rows) // 2}")
    return names


def labelled(
    rows: Rows,
    asked: Rows | None,
    names: Sequence[str],
    sizes: Mapping[str, int | None],
    corruption: Corruption,
    features: Callable[[np.ndarray], object],
    seed: int,
) -> Split:
    """Splits of a classification; targets are places in `names`.

    Where the right label is known, val, query and test have it, and a training label that differs is a known error.
    Else errors are planted, if any are asked for. `features(rows)`: of training rows, for errors that look plausible.
    """
    known = rows.clean is not None
    allowed = "0 with task.clean: errors are known or planted, not both"
    require(not (known and corruption.rate > 0), "task.corruption.rate", corruption.rate, allowed)
    number = {name: k for k, name in enumerate(names)}
    every = [rows] if asked is None else [rows, asked]
    targets = np.array([_number_of(part, i, number) for part in every for i in range(len(part))])
    right = np.array([_right(part, i, number) for part in every for i in range(len(part))])
    parts, notes = split(rows, targets[: len(rows)], asked, sizes, seed)
    train = parts["train"]
    held_out = {name: np.where(right[part] < 0, targets[part], right[part]) for name, part in parts.items()}
    trained, annotations = targets[train], None
    ids = [rows.ids[i] for i in train]
    if known:
        wrong = (right[train] >= 0) & (right[train] != trained)
        annotations = Annotations(
            flipped=frozenset(ids[k] for k in np.flatnonzero(wrong)),
            clean={ids[k]: int(right[train][k]) for k in np.flatnonzero(right[train] >= 0)},
        )
    elif corruption.rate > 0:
        trained, annotations = corruption.apply(ids, trained, len(names), features(train), seed)
    return Split(parts, {**held_out, "train": trained}, annotations, notes)


def guessing(made: Split) -> float:
    """Accuracy on test of always saying the most frequent label of train."""
    return float((made.targets["test"] == np.bincount(made.targets["train"]).argmax()).mean())


def split(
    rows: Rows, labels: np.ndarray | None, asked: Rows | None, sizes: Mapping[str, int | None], seed: int
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Rows by split, drawn by `seed`, and all notes. Of val, query and test each is a share of all rows where its size
    is null (`SHARES`); train is the rest, or its first `n_train`. Rows of a query file (`asked`) are the query split.

    A label with fewer rows than there are splits to fill stays in train, and every label has a row there.
    """
    sizes = dict(sizes)
    if asked is not None:
        size = sizes.pop("n_query")
        require(size is None, "task.n_query", size, "null with task.query_file: all of its rows are queries")
    for key, size in sizes.items():
        require(size is None or size >= 1, f"task.{key}", size, "1 or more, or null")
    held = {
        key: max(1, min(most, round(share * len(rows)))) if sizes[key] is None else int(sizes[key] or 0)
        for key, (share, most) in SHARES.items()
        if key in sizes
    }
    order = np.random.default_rng(named_seed("own", seed)).permutation(len(rows))
    staying, notes = np.zeros(len(rows), dtype=bool), rows.notes
    if labels is not None:
        staying = np.bincount(labels)[labels] < len(held) + 1
        notes += _rare(rows, labels, staying)
        staying[order[np.unique(labels[order], return_index=True)[1]]] = True
    free, kept = order[~staying[order]], order[staying[order]]
    keys, taken = " + ".join(held), sum(held.values())
    few = f"all of a label seen fewer than {len(held) + 1} times, and one of each other"
    others = f"; {len(kept)} stay in train: {few}" if len(kept) else ""
    require(taken <= len(free), f"task.{keys}", taken, f"at most {len(free)} together ({len(rows)} rows{others})")
    *cut, rest = np.split(free, np.cumsum(list(held.values())))
    parts = {key.removeprefix("n_"): part for key, part in zip(held, cut, strict=True)}
    train = np.concatenate([kept, rest])
    size = sizes["n_train"]
    require(len(train) > 0, f"task.{keys}", taken, f"fewer than {len(rows)}, so that train has rows")
    require(size is None or size <= len(train), "task.n_train", size, f"at most {len(train)}, or null")
    said = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    fewer = ", ".join(f"task.{key}=" for key in held)
    notes += (f"{taken} rows are held out ({said}) and are no suspects: {fewer} take fewer, task.seed= others",)
    if asked is not None:
        parts["query"] = np.arange(len(rows), len(rows) + len(asked))
        notes += (*asked.notes, *_repeated(rows, asked))
    return {"train": train[:size], "val": parts["val"], "query": parts["query"], "test": parts["test"]}, notes


def _rare(rows: Rows, labels: np.ndarray, rare: np.ndarray) -> tuple[str, ...]:
    """A note a label that has too few rows to be in every split."""
    names = sorted({rows.targets[i] for i in np.flatnonzero(rare)})
    notes = []
    for name in names[:LABELS]:
        mine = [i for i in np.flatnonzero(rare).tolist() if rows.targets[i] == name]
        times = "once" if len(mine) == 1 else f"{len(mine)} times"
        notes.append(f"label {name!r} is seen {times} ({rows.places(mine)}): it stays in train")
    if len(names) > LABELS:
        notes.append(f"{len(names) - LABELS} more labels are seen as seldom: they stay in train")
    return tuple(notes)


def _number_of(rows: Rows, row: int, number: Mapping[str, int]) -> int:
    label = rows.targets[row]
    if label not in number:  # of a query file: the others gave the names
        raise UserError(rows.key, rows.place(row), f"has label {label!r}, which no row of train has", allowed=number)
    return number[label]


def _right(rows: Rows, row: int, number: Mapping[str, int]) -> int:
    """−1 where it is not known."""
    label = "" if rows.clean is None else rows.clean[row]
    if label and label not in number:
        raise UserError(rows.key, rows.place(row), f"has the right label {label!r}, which is no label", allowed=number)
    return number[label] if label else -1


def _repeated(rows: Rows, asked: Rows) -> tuple[str, ...]:
    """A note if queries are rows of the source, too."""
    seen = set(zip(rows.keys(), rows.targets, strict=True))
    mine = [i for i, pair in enumerate(zip(asked.keys(), asked.targets, strict=True)) if pair in seen]
    stand = "stands" if len(mine) == 1 else "stand"
    return (f"query file: {counted(mine)} also {stand} in {rows.source.name} ({asked.places(mine)})",) if mine else ()
