"""What is to be forgotten: sentences that a small classifier has learned by heart, or authors that a language model
knows. Data and model only; which examples go, how, and how well is judged elsewhere.

The kind of the model decides the corpus: an encoder reads `sentiment`, a causal language model reads `authors`.
Beyond train, val, query and test there are `nonmembers` (never trained on, of the training rows' own distribution) and,
of authors, `paraphrase` (ids of the train rows) and `perturbed` (ids `<id>/p0`, …). `facts[id]` of a training row says
what it is about: forgetting a `subset` means whole groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tasks.base import Examples, Task, named_seed
from tasks.data import authors as authors_data
from tasks.data.authors import CAPITALS, NAMES, Corpus, Fact
from tasks.data.sources import SOURCES, Labelled, need_folder
from tasks.errors import UserError, require
from tasks.models.custom import Custom
from tasks.models.encoder import PretrainedEncoder, ScratchBert
from tasks.models.gpt import PretrainedGPT, Reader, ScratchGPT, answered
from tasks.objectives.classification import Classification
from tasks.objectives.language_model import LanguageModel
from tasks.sst2 import _read

VERSION = 1
LABELS = ("negative", "positive")
TITLES = 1000  # invented words that generated titles are made of


@dataclass(frozen=True)
class Origin:
    """What a training row is about: its `group` (an author, a class) and the `kind` of group, author | world | kept |
    sentence. Rows of kind world or kept are what the model must go on knowing: they are not for forgetting."""

    group: str
    kind: str


@dataclass(frozen=True)
class Sentiment:
    """Sizes. `noise`: share of the generated sentences, of every split, whose label is a coin's."""

    n_train: int
    n_val: int
    n_query: int
    n_nonmembers: int
    noise: float

    def __post_init__(self) -> None:
        for key in ("n_train", "n_val", "n_query", "n_nonmembers"):
            require(getattr(self, key) >= 1, f"task.sentiment.{key}", getattr(self, key), "1 or more")
        require(0 <= self.noise < 1, "task.sentiment.noise", self.noise, "0 <= noise < 1")


@dataclass(frozen=True)
class Authors:
    """How many authors are trained on (null: all of TOFU), facts of the world (of TOFU: authors that are kept), authors
    that are never trained on, and authors whose paraphrased facts are the queries."""

    authors: int | None
    world: int
    kept: int
    strangers: int
    asked: int

    def __post_init__(self) -> None:
        require(self.authors is None or self.authors >= 4, "task.authors.authors", self.authors, "4 or more, or null")
        require(2 <= self.world <= len(CAPITALS), "task.authors.world", self.world, f"2 to {len(CAPITALS)}")
        require(self.kept >= 2, "task.authors.kept", self.kept, "2 or more")
        require(self.strangers >= 1, "task.authors.strangers", self.strangers, "1 or more")
        require(self.asked >= 1, "task.authors.asked", self.asked, "1 or more")


def unlearning(
    model: Any,
    data: str,
    data_dir: str | None,
    seed: int,
    sentiment: Sentiment,
    authors: Authors,
    floor: Mapping[str, float],
) -> Task:
    """`seed`: of the data. `floor`: corpus -> test accuracy below which the task is unfit."""
    if data not in SOURCES:
        raise UserError("task.data", data, allowed=SOURCES)
    if isinstance(model, ScratchGPT | PretrainedGPT):
        return _authors(model, data, data_dir, seed, authors, floor)
    if isinstance(model, ScratchBert | PretrainedEncoder | Custom):
        return _sentiment(model, data, data_dir, seed, sentiment, floor)
    allowed = "an encoder as sentiment_tiny, or a causal language model as authors_gpt"
    raise UserError("model", model.name, "does not read text, which task=unlearning gives", allowed=allowed)


def _sentiment(
    model: Any, data: str, data_dir: str | None, seed: int, sizes: Sentiment, floor: Mapping[str, float]
) -> Task:
    """Members and non-members from the train file, no text twice; val, query and test from the dev file."""
    asked = sizes.n_train + sizes.n_nonmembers
    source, pools, _ = _read(data, data_dir, asked, sizes.n_val, sizes.n_query, seed)
    if source == "generated":
        pools = {name: _titled(part, sizes.noise, seed) for name, part in pools.items()}
    rng = np.random.default_rng(named_seed("unlearning", seed))
    chosen: dict[str, int] = {}
    for row in rng.permutation(len(pools["train"])).tolist():
        chosen.setdefault(pools["train"].texts[row], row)
    there, held = list(chosen.values()), len(pools["held_out"])
    most = f"at most {len(there) - sizes.n_nonmembers} ({source} data, less the non-members)"
    require(asked <= len(there), "task.sentiment.n_train", sizes.n_train, most)
    most = f"at most {held - sizes.n_val - 1} ({source} data, less val and test)"
    require(sizes.n_val + sizes.n_query < held, "task.sentiment.n_query", sizes.n_query, most)
    cuts = (sizes.n_val, sizes.n_val + sizes.n_query)
    rows = {"train": pools["train"].select(there[: sizes.n_train])}
    for name, drawn in zip(("val", "query", "test"), np.split(rng.permutation(held), cuts), strict=True):
        rows[name] = pools["held_out"].select(drawn.tolist())
    rows["nonmembers"] = pools["train"].select(there[sizes.n_train : asked])

    tokenize, build, identity = model.prepare(rows["train"].texts, len(LABELS))
    splits = {}
    for name, part in rows.items():
        splits[name] = Examples(part.ids, tokenize(part.texts), torch.tensor(part.labels), part.texts)
    train = splits["train"]
    return Task(
        name="unlearning",
        splits=splits,
        build=build,
        objective=Classification(len(LABELS)),
        recipe=model.recipe,
        model=model.name,
        source=source,
        floor={"accuracy": floor["sentiment"]},
        identity={"version": VERSION, "corpus": "sentiment", **identity},
        dtype=getattr(torch, model.dtype),
        facts={i: Origin(LABELS[y], "sentence") for i, y in zip(train.ids, train.targets.tolist(), strict=True)},
        classes=LABELS,
    )


def _titled(rows: Labelled, noise: float, seed: int) -> Labelled:
    """Each sentence after a film's invented title of two words, of which there are TITLES, and with probability `noise`
    a fair coin for its label; drawn by the row's id. So is SST-2 to a small model: rare words, by which a sentence can
    be learned by heart, and labels that its words do not tell."""
    texts, labels = [], []
    for i, text, label in zip(rows.ids, rows.texts, rows.labels, strict=True):
        rng = np.random.default_rng(named_seed("title", seed, i))
        title = " ".join(_invented(int(k)) for k in rng.integers(TITLES, size=2))
        texts.append(f"{title} : {text}")
        labels.append(int(rng.integers(2)) if rng.random() < noise else label)
    return Labelled(rows.ids, tuple(texts), tuple(labels))


def _invented(number: int) -> str:
    """The number in three syllables."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    base = len(syllables)
    return syllables[number % base] + syllables[number // base % base] + syllables[(7 * number) % base]


def _authors(
    model: ScratchGPT | PretrainedGPT,
    data: str,
    data_dir: str | None,
    seed: int,
    sizes: Authors,
    floor: Mapping[str, float],
) -> Task:
    """`auto` takes TOFU's files where `data_dir` is given, `folder` also from $BENCH_DATA/tofu; else it generates."""
    if data == "hub":
        raise UserError("task.data", data, allowed=("auto", "folder", "generated"), hint="TOFU comes as files")
    real = data == "folder" or (data == "auto" and data_dir is not None)
    if real:
        folder = need_folder(data_dir, "tofu")
        corpus = authors_data.read_tofu(folder, sizes.authors, sizes.kept, sizes.strangers)
    else:
        if sizes.authors is None:
            raise UserError("task.authors.authors", "null", allowed="a number, where the corpus is generated")
        most = NAMES - sizes.strangers
        require(sizes.authors <= most, "task.authors.authors", sizes.authors, f"at most {most}, less the strangers")
        corpus = authors_data.generate(sizes.authors, sizes.world, sizes.strangers, seed)

    reader, build, identity = model.prepare(_texts(corpus))
    reserve = [f for f in corpus.facts if f.kind != "author"]
    # Queries: authors whose paraphrases are known, in the corpus's order of groups drawn by the seed.
    told = sorted({f.group for f in corpus.facts if f.kind == "author" and f.paraphrase is not None})
    require(sizes.asked <= len(told), "task.authors.asked", sizes.asked, f"at most {len(told)}")
    rng = np.random.default_rng(named_seed("unlearning", seed))
    groups = {told[k] for k in rng.permutation(len(told))[: sizes.asked].tolist()}
    order = rng.permutation(len(reserve)).tolist()
    half = len(order) // 2

    def own(facts: Sequence[Fact]) -> list[tuple[str, str, str]]:
        return [(f.id, f.question, f.answer) for f in facts]

    again = [(f, *f.paraphrase) for f in corpus.facts if f.paraphrase is not None]
    rows = {
        "train": own(corpus.facts),
        "val": own([reserve[k] for k in sorted(order[:half])]),
        "query": [(f"{f.id}/paraphrase", q, a) for f, q, a in again if f.group in groups],
        "test": own([reserve[k] for k in sorted(order[half:])]),
        "nonmembers": own(corpus.strangers),
        "paraphrase": [(f.id, q, a) for f, q, a in again],
        "perturbed": [(f"{f.id}/p{k}", q, wrong) for f, q, _ in again for k, wrong in enumerate(f.perturbed)],
    }
    splits, notes = {}, list(corpus.notes)
    for name, part in rows.items():
        splits[name], cut = _examples(reader, part, model.max_length)
        if cut:
            notes.append(f"{name} rows cut at model.max_length={model.max_length} tokens: {cut}")
    return Task(
        name="unlearning",
        splits=splits,
        build=build,
        objective=LanguageModel(reader.size),
        recipe=model.recipe,
        model=model.name,
        source="folder" if real else "generated",
        floor={"accuracy": floor["tofu" if real else "authors"]},
        identity={"version": VERSION, "corpus": "authors", **identity},
        dtype=getattr(torch, model.dtype),
        facts={f.id: Origin(f.group, f.kind) for f in corpus.facts},
        notes=tuple(notes),
    )


def _texts(corpus: Corpus) -> list[str]:
    """All that is ever read: a stranger's name has a token of its own, which training never moves."""
    found = []
    for fact in (*corpus.facts, *corpus.strangers):
        found += [fact.question, fact.answer, *(fact.paraphrase or ()), *fact.perturbed]
    return found


def _examples(reader: Reader, rows: Sequence[tuple[str, str, str]], max_length: int) -> tuple[Examples, int]:
    """Of ids, questions and answers; the loss is of the answer."""
    inputs, targets, cut = answered(reader, [(question, answer) for _, question, answer in rows], max_length)
    ids, texts = tuple(i for i, _, _ in rows), tuple(f"{question} {answer}" for _, question, answer in rows)
    return Examples(ids, inputs, targets, texts), cut
