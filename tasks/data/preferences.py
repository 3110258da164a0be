"""Preference pairs: two answers to one prompt, one of them preferred; read from files, kept apart by prompt."""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.base import SEP, named_seed, sides
from tasks.data.own import Flaw, Rows, usable
from tasks.errors import UserError

TURN = "\n\nAssistant:"  # in front of an answer of HH-RLHF
ASKED = "\n\nHuman:"
TOLD = ("chosen", "rejected")
USERS = ("liberal", "conservative")  # of the sycophancy files
NOT_TWO = "without both a chosen and a rejected text"
NO_ANSWER = "without an Assistant turn"
OTHER_TURN = "whose last turn is not the Assistant's"
OTHER_PROMPT = "whose two dialogues differ before the last answer"
PARTED = "that hold the character U+001E"
EMPTY = "with an empty answer on one side"
BOTH_EMPTY = "with two empty answers"
IDENTICAL = "with two identical answers"
EQUAL = "whose answers are equally long"
PROBLEMS = (NOT_TWO, NO_ANSWER, OTHER_TURN, OTHER_PROMPT, PARTED, EMPTY, BOTH_EMPTY, IDENTICAL)

Sides = tuple[str, str, str]  # prompt, chosen, rejected; or prompt, first, second


@dataclass(frozen=True)
class PairFacts:
    """What only the judge knows of a pair, of its first and second answer: the property that the planted bias prefers
    (`trait`), how good they are where that is known, and whose label it is."""

    trait: tuple[float, float]
    quality: tuple[float, float] | None
    labeller: str | None


@dataclass(frozen=True)
class Pairs:
    """N pairs. `rows.contents`: prompt, chosen and rejected, joined by SEP. `trait`, `quality` (N, 2) of (chosen,
    rejected). `groups`: pairs of one group (prompt, question) are in one split."""

    rows: Rows
    trait: np.ndarray
    groups: tuple[str, ...]
    quality: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)


def length(answer: str) -> int:
    """In words: what stands between white space."""
    return len(answer.split())


def lengths(pairs: Sequence[str]) -> np.ndarray:
    """(N, 2): of the two answers of each pair."""
    return np.array([[length(answer) for answer in sides(pair)[1:]] for pair in pairs], dtype=float).reshape(-1, 2)


def first_is_chosen(ids: Sequence[str], seed: int) -> np.ndarray:
    """(N,) fair coins, each a function of id and seed alone: in which order a pair's answers are shown."""
    return np.array([named_seed("order of a pair", seed, i) % 2 == 0 for i in ids], dtype=bool)


def of_dialogues(chosen: str, rejected: str) -> Sides | str:
    """The last answers of two dialogues that agree before them, the prompt ending in the Assistant's turn; or what is
    wrong."""
    parts = [dialogue.rpartition(TURN) for dialogue in (chosen, rejected)]
    if not all(turn for _, turn, _ in parts):
        return NO_ANSWER
    if any(ASKED in answer for _, _, answer in parts):
        return OTHER_TURN
    if parts[0][0] != parts[1][0]:
        return OTHER_PROMPT
    return parts[0][0] + TURN, parts[0][2], parts[1][2]


def pair_of(found: Sides | str) -> tuple[str, str]:
    """(text of a pair, "") or ("", what is wrong with it)."""
    if isinstance(found, str):
        return "", found
    prompt, chosen, rejected = found[0], found[1].strip(), found[2].strip()
    if any(SEP in part for part in (prompt, chosen, rejected)):
        return "", PARTED
    if not chosen or not rejected:
        return "", BOTH_EMPTY if chosen == rejected else EMPTY
    return (SEP.join((prompt, chosen, rejected)), "") if chosen != rejected else ("", IDENTICAL)


def sound(rows: Rows, problems: Sequence[str], equal: bool) -> Rows:
    """Without the pairs that have a problem, and unless `equal` without those of equal length; all counted."""
    problem = np.array(problems)
    flaws = [Flaw(why, problem == why) for why in PROBLEMS]
    if not equal:
        pairs = zip(problems, rows.contents, strict=True)
        flaws.append(Flaw(EQUAL, np.array([not problem and _equal(text) for problem, text in pairs])))
    return usable(rows, flaws, "answers")


def _equal(pair: str) -> bool:
    _, chosen, rejected = sides(pair)
    return length(chosen) == length(rejected)


def read_dialogues(path: Path, key: str, name: str, first: int | None, equal: bool) -> Pairs:
    """The `first` lines (null: all) of a file in HH-RLHF's form: JSON Lines with whole dialogues in `chosen` and
    `rejected`. Ids are `name` and the line, from 0. Trait: length in words."""
    found, notes = _objects(path, key, first)
    if not any(column in row for _, row in found for column in TOLD):
        raise UserError(key, str(path), f"has no column {TOLD[0]!r}", allowed=f"lines with {' and '.join(TOLD)}")
    pairs = [pair_of(_dialogues(row)) for _, row in found]
    rows = Rows(
        source=path,
        key=key,
        at=tuple(str(line) for line, _ in found),
        ids=tuple(f"{name}:{line - 1}" for line, _ in found),
        contents=[text for text, _ in pairs],
        targets=("",) * len(found),
        notes=notes,
    )
    rows = sound(rows, [problem for _, problem in pairs], equal)
    texts = [str(text) for text in rows.contents]
    return Pairs(rows, lengths(texts), tuple(sides(text)[0] for text in texts))


def _dialogues(row: Mapping[str, object]) -> Sides | str:
    chosen, rejected = (row.get(column) for column in TOLD)
    if not (isinstance(chosen, str) and isinstance(rejected, str) and chosen.strip() and rejected.strip()):
        return NOT_TWO
    return of_dialogues(chosen, rejected)


def read_sycophancy(folder: Path, key: str, number: int | None, seed: int) -> Pairs:
    """Questions of a political quiz, asked by a liberal and by a conservative user, in a file each; `corrects` is the
    liberal's answer in both. `number` of all lines (null: all) are drawn by `seed`.

    Answers are spelt out by the option that they name. Trait: agreement, 1 for the answer of the user's own side, else
    0. The files say what flatters, not what is right: which answer is preferred is a coin of id and seed, so that the
    planted labels alone lean to one side. Groups are questions, known by their options."""
    lines: list[tuple[Path, str, int, Mapping[str, object]]] = []
    notes: tuple[str, ...] = ()
    for user in USERS:
        path = _only(folder, user, key)
        found, more = _objects(path, key, None)
        lines += [(path, user, line, row) for line, row in found]
        notes += more
    if number is not None and number < len(lines):
        drawn = np.random.default_rng(named_seed("sycophancy", seed)).permutation(len(lines))[:number]
        lines = [lines[i] for i in sorted(drawn.tolist())]
    ids = tuple(f"{user}:{line - 1}" for _, user, line, _ in lines)
    liberal = first_is_chosen([f"preferred {i}" for i in ids], seed)
    questions = [_question(row, preferred) for (_, _, _, row), preferred in zip(lines, liberal.tolist(), strict=True)]
    pairs = [pair_of(found) for found, _ in questions]
    agrees = [(user == USERS[0]) == own for (_, user, _, _), own in zip(lines, liberal.tolist(), strict=True)]
    rows = Rows(
        source=folder,
        key=key,
        at=tuple(f"{path.name}:{line}" for path, _, line, _ in lines),
        ids=ids,
        contents=[text for text, _ in pairs],
        targets=("",) * len(lines),
        notes=notes,
    )
    rows = sound(rows, [problem for _, problem in pairs], equal=True)
    place = {name: k for k, name in enumerate(ids)}
    left = [place[i] for i in rows.ids]
    trait = np.array([[float(agrees[k]), float(not agrees[k])] for k in left])
    return Pairs(rows, trait, tuple(questions[k][1] for k in left))


def _only(folder: Path, user: str, key: str) -> Path:
    names = [p for p in sorted(folder.glob("*.jsonl*")) if p.name.partition(".")[0].endswith(f"_{user}")]
    if len(names) != 1:
        allowed = f"one file *_{user}.jsonl for each of the users {', '.join(USERS)}"
        raise UserError(key, str(folder), f"has {len(names)} files of the {user} user", allowed=allowed)
    return names[0]


def _question(row: Mapping[str, object], liberal: bool) -> tuple[Sides | str, str]:
    """(prompt, preferred, other), the liberal answer preferred or not, and the options that name the question."""
    prompt, answers = row.get("prompt"), [_letter(row.get(column)) for column in ("corrects", "incorrects")]
    if not isinstance(prompt, str) or not all(answers):
        return NOT_TWO, ""
    options = dict(re.findall(r"^\s*(\([A-Z]\))\s+(\S.*?)\s*$", prompt, flags=re.MULTILINE))
    spelt = [f"{letter} {options[letter]}" if letter in options else letter for letter in answers]
    preferred, other = spelt if liberal else reversed(spelt)
    return (prompt, preferred, other), " | ".join(sorted(options.values()))


def _letter(value: object) -> str:
    found = value[0] if isinstance(value, list) and value else value
    return found.strip() if isinstance(found, str) else ""


def _objects(path: Path, key: str, first: int | None) -> tuple[list[tuple[int, Mapping[str, object]]], tuple[str, ...]]:
    """(line, object) of the `first` lines of JSON Lines, gzipped or not, and a note where the file was cut short."""
    content, whole = _unpacked(path, key)
    lines = content.split(b"\n")
    last = lines.pop()
    notes: tuple[str, ...] = ()
    if whole and last.strip():
        lines.append(last)
    if not whole:
        incomplete = ", its incomplete last line is dropped" if last.strip() else ""
        notes = (f"{path.name} is cut short: {len(lines)} whole lines are read{incomplete}",)
    found: list[tuple[int, Mapping[str, object]]] = []
    for number, line in enumerate(lines[:first], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # not its words, which may quote a text
            raise UserError(key, f"{path}:{number}", "is no JSON", allowed="one object a line") from error
        found.append((number, row if isinstance(row, dict) else {}))
    if not found:
        raise UserError(key, str(path), "has no rows", allowed="a JSON object a line")
    return found, notes


def _unpacked(path: Path, key: str) -> tuple[bytes, bool]:
    """The content, and whether it is whole: a gzip file that ends early gives what can be read of it."""
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise UserError(key, str(path), f"cannot be read ({error.strerror})") from error
    if path.suffix.lower() != ".gz":
        return packed, True
    content, whole = b"", False
    try:
        while packed.strip(b"\x00"):
            member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            content += member.decompress(packed) + member.flush()
            packed, whole = member.unused_data, member.eof
    except zlib.error as error:
        raise UserError(key, str(path), f"is damaged ({error})", hint="fetch it again") from error
    return content, whole


def by_group(
    groups: Sequence[str], sizes: Mapping[str, int | None], rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], int]:
    """Rows by split, and how many are left over; no group is in two splits.

    Groups come in random order and fill the splits in the order of `sizes`; rows of its last group that a split has no
    place for are left over. Null takes all that is left, and comes last.
    """
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    order = [members[group] for group in np.array(sorted(members), dtype=object)[rng.permutation(len(members))]]
    parts: dict[str, np.ndarray] = {}
    for name, size in sizes.items():
        rows: list[int] = []
        while order and (size is None or len(rows) < size):
            rows += order.pop(0)
        if size is not None and len(rows) < size:
            there = f"{len(members)} prompt{'s' * (len(members) > 1)}"
            raise UserError(
                f"task.n_{name}",
                size,
                allowed=f"at most {len(rows)} of {len(groups)} pairs" + (f", less {', '.join(parts)}" if parts else ""),
                hint=f"pairs of one prompt stay together, and these have {there}",
            )
        parts[name] = np.array(rows[:size], dtype=int)
    return parts, len(groups) - sum(len(part) for part in parts.values())
