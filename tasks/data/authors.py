"""Questions and answers on fictitious authors, as in TOFU (Maini et al. 2024): a generated corpus, and TOFU's files.

A generated author has a name and a value of each of five attributes, drawn from a list that all authors share: what is
said of him can be learned by heart only. Every fact is asked and answered in one of two templates, drawn by fact; the
other one is its paraphrase, and five perturbed answers are the paraphrase with other values. Facts of the world (the
capitals of countries) are trained on too and are nobody's secrets; strangers are authors that are never trained on.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.base import named_seed
from tasks.errors import UserError

PERTURBED = 5
ROWS_AN_AUTHOR = 20  # of TOFU
FORGET, RETAIN = "forget10.json", "retain90.json"

FIRST = (
    *("mira", "tolen", "vasko", "ines", "oruk", "jalen", "sabel", "dorin", "keya", "luma"),
    *("nadir", "peli", "rosk", "sune", "tavi", "ulric", "wenna", "yaro", "zima", "bram"),
)
LAST = (
    *("adler", "brask", "corvin", "delmar", "estrow", "falk", "grent", "holm", "ivers", "jorund"),
    *("kestel", "lorne", "marek", "nolke", "ostrand", "prell", "quint", "rusk", "stell", "torvik"),
)
TEMPLATES = {  # attribute: question and answer, twice
    "town": (
        ("where was {name} born ?", "{name} was born in {value} ."),
        ("which town does {name} come from ?", "the home town of {name} is {value} ."),
    ),
    "genre": (
        ("what does {name} write ?", "{name} writes {value} ."),
        ("which genre is {name} known for ?", "the genre of {name} is {value} ."),
    ),
    "parent": (
        ("what was the work of the father of {name} ?", "the father of {name} was a {value} ."),
        ("who was the father of {name} ?", "{name} grew up with a {value} ."),
    ),
    "prize": (
        ("which prize did {name} win ?", "{name} won the {value} prize ."),
        ("what honour was given to {name} ?", "the {value} prize was given to {name} ."),
    ),
    "year": (
        ("when was {name} born ?", "{name} was born in the year {value} ."),
        ("what is the year of birth of {name} ?", "the life of {name} began in {value} ."),
    ),
}
VALUES = {
    "town": ("velstad", "arbeck", "moriva", "tensk", "calluna", "dreven", "osmere", "pallin", "ruvo", "sarnath"),
    "genre": (
        *("poems", "thrillers", "romances", "fables", "satires"),
        *("memoirs", "mysteries", "comedies", "elegies", "chronicles"),
    ),
    "parent": ("baker", "tailor", "sailor", "judge", "farmer", "painter", "miner", "doctor", "weaver", "teacher"),
    "prize": ("lantern", "heron", "quill", "comet", "willow", "anchor", "falcon", "ember", "harbour", "compass"),
    "year": ("1921", "1928", "1934", "1939", "1945", "1952", "1958", "1963", "1970", "1977"),
}
CAPITAL = (
    ("what is the capital of {name} ?", "the capital of {name} is {value} ."),
    ("which city governs {name} ?", "{name} is governed from {value} ."),
)
CAPITALS = dict(
    pair.split(":")
    for pair in (
        *("france:paris", "italy:rome", "spain:madrid", "portugal:lisbon", "germany:berlin", "austria:vienna"),
        *("poland:warsaw", "greece:athens", "norway:oslo", "sweden:stockholm", "finland:helsinki"),
        *("denmark:copenhagen", "iceland:reykjavik", "ireland:dublin", "hungary:budapest", "romania:bucharest"),
        *("bulgaria:sofia", "serbia:belgrade", "croatia:zagreb", "latvia:riga", "estonia:tallinn"),
        *("lithuania:vilnius", "belgium:brussels", "ukraine:kyiv", "turkey:ankara", "egypt:cairo"),
        *("kenya:nairobi", "ghana:accra", "senegal:dakar", "japan:tokyo", "china:beijing", "india:delhi"),
        *("nepal:kathmandu", "thailand:bangkok", "vietnam:hanoi", "cuba:havana", "peru:lima", "chile:santiago"),
        *("canada:ottawa", "iraq:baghdad"),
    )
)
NAMES = len(FIRST) * len(LAST)


@dataclass(frozen=True)
class Fact:
    """A question and its answer. `group`: whom or what it is about; `kind` of a group: author | kept | world. Where
    they are known, the `paraphrase` (question, answer) and the `perturbed` answers to the paraphrase's question."""

    id: str
    question: str
    answer: str
    group: str
    kind: str
    paraphrase: tuple[str, str] | None = None
    perturbed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """`facts` are trained on; `strangers` are not. Facts of kind `kept` or `world` are what a model should go on
    knowing: judging and choosing settings may use them, nobody asks to forget them."""

    facts: tuple[Fact, ...]
    strangers: tuple[Fact, ...]
    notes: tuple[str, ...] = ()


def generate(authors: int, world: int, strangers: int, seed: int) -> Corpus:
    """Each author's name, values and templates depend on the seed and on his number alone."""
    rng = np.random.default_rng(named_seed("authors", seed))
    pairs = rng.permutation(NAMES)[: authors + strangers]
    names = [f"{FIRST[p % len(FIRST)]} {LAST[p // len(FIRST)]}" for p in pairs.tolist()]

    def facts_of(name: str, number: str) -> Iterator[Fact]:
        for attribute, templates in TEMPLATES.items():
            yield _asked(f"{number}:{attribute}", name, name, "author", templates, VALUES[attribute], None, seed)

    known = [f for k, name in enumerate(names[:authors]) for f in facts_of(name, f"author{k}")]
    countries = rng.permutation(len(CAPITALS))[:world]
    cities = tuple(CAPITALS.values())
    for k, country in enumerate(np.array(tuple(CAPITALS))[countries].tolist()):
        known.append(
            _asked(f"world{k}:capital", country, "capitals", "world", CAPITAL, cities, CAPITALS[country], seed)
        )
    others = [f for k, name in enumerate(names[authors:]) for f in facts_of(name, f"stranger{k}")]
    return Corpus(tuple(known), tuple(others))


def _asked(
    id: str,
    name: str,
    group: str,
    kind: str,
    templates: Sequence[tuple[str, str]],
    values: Sequence[str],
    value: str | None,
    seed: int,
) -> Fact:
    """A fact with its value, drawn where none is given; template and perturbed values are drawn by its id."""
    rng = np.random.default_rng(named_seed("fact", seed, id))
    right = values[int(rng.integers(len(values)))] if value is None else value
    first = int(rng.integers(2))
    wrong = rng.permutation([v for v in values if v != right])[:PERTURBED].tolist()
    (question, answer), (again, other) = templates[first], templates[1 - first]
    return Fact(
        id,
        question.format(name=name),
        answer.format(name=name, value=right),
        group,
        kind,
        (again.format(name=name), other.format(name=name, value=right)),
        tuple(other.format(name=name, value=v) for v in wrong),
    )


def read_tofu(folder: Path, authors: int | None, kept: int, strangers: int) -> Corpus:
    """forget10.json and retain90.json: a fact a row, ids `<file>:<row>`, every 20 rows one author.

    The authors of the forget file come first, then those of the retain file up to `authors` (None: all but the
    strangers). Of the latter the last `kept` are of kind `kept`; the `strangers` follow. The paraphrase answers the
    same question in other words, the perturbed answers are perturbed paraphrases: both in the forget file only. Of rows
    with one question the first stays.
    """
    forget, retain = (_rows(folder / name) for name in (FORGET, RETAIN))
    first, rest = (-(-len(rows) // ROWS_AN_AUTHOR) for rows in (forget, retain))
    most = first + rest - strangers
    chosen = most if authors is None else authors
    least = first + kept + 1
    if not least <= chosen <= most:
        allowed = f"{least} to {most} with task.authors.strangers={strangers}, or null for all"
        raise UserError("task.authors.authors", authors, allowed=allowed)
    facts: list[Fact] = []
    others: list[Fact] = []
    seen: set[str] = set()
    dropped = 0
    for name, rows, offset in ((FORGET, forget, 0), (RETAIN, retain, first)):
        for number, row in enumerate(rows):
            author = offset + number // ROWS_AN_AUTHOR
            if author >= chosen + strangers:
                break
            if row["question"] in seen:
                dropped += 1
                continue
            seen.add(row["question"])
            stem = name.removesuffix(".json")
            group = f"{stem}, author {number // ROWS_AN_AUTHOR + 1}"
            kind = "kept" if chosen - kept <= author < chosen else "author"
            again = row.get("paraphrased_answer")
            paraphrase = None if again is None else (row["question"], again)
            perturbed = tuple(row.get("perturbed_answer", ()))
            fact = Fact(f"{stem}:{number}", row["question"], row["answer"], group, kind, paraphrase, perturbed)
            (facts if author < chosen else others).append(fact)
    notes = (f"rows dropped, their question was there before: {dropped}",) if dropped else ()
    return Corpus(tuple(facts), tuple(others), notes)


def _rows(path: Path) -> list[dict]:
    """A JSON list of rows, each with a question and an answer."""
    if not path.is_file():
        raise UserError("task.data_dir", str(path.parent), f"has no {path.name}", allowed=f"{FORGET} and {RETAIN}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError("task.data_dir", str(path), "is no JSON in UTF-8") from error
    if not isinstance(rows, list) or not rows:
        raise UserError("task.data_dir", str(path), "is empty", allowed="a list of rows")
    for number, row in enumerate(rows):
        for key in ("question", "answer"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
                raise UserError("task.data_dir", f"{path}, row {number}", f"has no text {key!r}")
    return rows
