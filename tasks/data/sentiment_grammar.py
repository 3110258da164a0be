"""An English-like corpus of film reviews from a small grammar, whose labels and proponents are known by construction.

    review     →  [opening] clause | clause [closing]
               |  clause "but" clause | "although" clause clause | clause "although" clause
    clause     →  "the" aspect [attachment] copula predicate
    predicate  →  w | intensifier w | negator w | "more" w "than" reference | "less" w "than" reference
               |  ("better" | "worse") "than" reference

Polarity is compositional: a predicate has the sign of its sentiment word w, which a negator or "less" turns round and
an intensifier, a hedge or "more" keeps; a contrast has the sign of the clause after "but", or of the one that
"although" does not open. Openings, closings, attachments, aspects and references carry no sentiment. A bag of words
sees neither what is negated nor which clause decides. Sentiment words follow a Zipf–Mandelbrot law,
P(rank r) ∝ (r + 2)^(−3/2), so that each rare one hangs on a handful of sentences in a thousand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ASPECTS = (
    *("plot", "acting", "script", "cast", "ending", "dialogue"),
    *("music", "camera", "pacing", "story", "lead", "humour"),
)
ATTACHMENTS = ("of this film", "in the sequel", "on the screen")
OPENINGS = (
    *("in my view", "on first viewing", "after two hours", "in the second half"),
    *("at the local cinema", "for a late show", "as a summer release", "from the back row"),
)
CLOSINGS = (
    *("throughout the film", "from start to finish", "in most scenes", "in the first hour"),
    *("on the big screen", "this time around", "for the whole evening", "in this version"),
)
REFERENCES = (
    *("the trailer", "the book", "the sequel", "the remake"),
    *("last year", "most films", "its rivals", "the first part"),
)
COPULAS = ("is", "was")
NEGATORS = {"not": 0.6, "never": 0.25, "hardly": 0.15}
INTENSIFIERS = {"very": 0.4, "truly": 0.2, "quite": 0.2, "rather": 0.2}  # the last two hedge; none changes the sign

# By rank; a word's opposite number has the same frequency.
POSITIVE = (
    *("good", "great", "funny", "clever", "moving", "charming", "superb", "witty", "gripping", "radiant"),
    *("tender", "inspired", "luminous", "poignant", "sublime", "dazzling"),
    *("beguiling", "riveting", "exquisite", "enchanting"),
)
NEGATIVE = (
    *("bad", "dull", "boring", "weak", "clumsy", "awful", "silly", "bland", "tedious", "stale"),
    *("shallow", "lifeless", "insipid", "turgid", "vapid", "grating"),
    *("plodding", "dreary", "mawkish", "abysmal"),
)
FREQUENT = 12  # words of each polarity; those of a lower rank are rare
RARE = frozenset(POSITIVE[FREQUENT:] + NEGATIVE[FREQUENT:])
COMPARATIVES = {"good": "better", "bad": "worse"}
_WEIGHTS = tuple((rank + 2.0) ** -1.5 for rank in range(1, len(POSITIVE) + 1))

ADJUNCTS = {"opening": 0.2, "attachment": 0.2, "closing": 0.6}
DEGREES = {"more": 0.7, "less": 0.3}
CONTRASTS = {"but": 0.6, "although first": 0.3, "although last": 0.1}
RULES = {"plain": 0.40, "intensifier": 0.17, "negation": 0.14, "contrast": 0.16, "comparison": 0.13}
LARGEST = 50_000  # in one draw; above some 5,000 the short constructions thin out and the shares of the rules drift


@dataclass(frozen=True)
class Sentence:
    """One review with all that the grammar knows about it."""

    text: str  # lower-case words separated by single spaces
    label: int  # 1 positive, 0 negative
    rule: str  # the construction that decides the label: a key of `RULES`
    aspects: tuple[str, ...]  # in order of mention
    polar_words: tuple[str, ...]  # sentiment words, in order of mention
    rare: tuple[str, ...]  # those of them in the rare part of the lexicon


@dataclass(frozen=True)
class _Clause:
    words: str
    aspect: str
    polar: str


def _pick(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(tuple(shares), weights=tuple(shares.values()))[0]


def _sentiment_word(rng: random.Random, polarity: int) -> str:
    return rng.choices(POSITIVE if polarity == 1 else NEGATIVE, weights=_WEIGHTS)[0]


def _predicate(rng: random.Random, kind: str, polarity: int) -> tuple[str, str]:
    """A predicate of this polarity and its sentiment word."""
    if kind == "intensifier":
        word = _sentiment_word(rng, polarity)
        return f"{_pick(rng, INTENSIFIERS)} {word}", word
    if kind == "negation":
        word = _sentiment_word(rng, 1 - polarity)
        return f"{_pick(rng, NEGATORS)} {word}", word
    if kind == "comparison":
        than = f"than {rng.choice(REFERENCES)}"
        degree = _pick(rng, DEGREES)
        word = _sentiment_word(rng, 1 - polarity if degree == "less" else polarity)
        if degree == "more" and word in COMPARATIVES:
            word = COMPARATIVES[word]
            return f"{word} {than}", word
        return f"{degree} {word} {than}", word
    word = _sentiment_word(rng, polarity)
    return word, word


def _clause(rng: random.Random, kind: str, polarity: int, aspect: str, attach: bool) -> _Clause:
    predicate, word = _predicate(rng, kind, polarity)
    subject = f"the {aspect} {rng.choice(ATTACHMENTS)}" if attach else f"the {aspect}"
    return _Clause(f"{subject} {rng.choice(COPULAS)} {predicate}", aspect, word)


def _contrast(rng: random.Random, polarity: int) -> tuple[str, tuple[_Clause, ...]]:
    """Two plain clauses of opposite polarity, of which one decides."""
    main, other = rng.sample(ASPECTS, 2)
    decides = _clause(rng, "plain", polarity, main, False)
    yields = _clause(rng, "plain", 1 - polarity, other, False)
    form = _pick(rng, CONTRASTS)
    if form == "but":
        return f"{yields.words} but {decides.words}", (yields, decides)
    if form == "although first":
        return f"although {yields.words} {decides.words}", (yields, decides)
    return f"{decides.words} although {yields.words}", (decides, yields)


def _sentence(rng: random.Random, label: int) -> Sentence:
    rule = _pick(rng, RULES)
    if rule == "contrast":
        verdict, clauses = _contrast(rng, label)
    else:
        place = _pick(rng, ADJUNCTS) if rule != "comparison" else None
        clause = _clause(rng, rule, label, rng.choice(ASPECTS), place == "attachment")
        verdict, clauses = clause.words, (clause,)
        if place == "opening":
            verdict = f"{rng.choice(OPENINGS)} {verdict}"
        elif place == "closing":
            verdict = f"{verdict} {rng.choice(CLOSINGS)}"
    polar = tuple(clause.polar for clause in clauses)
    return Sentence(
        text=verdict,
        label=label,
        rule=rule,
        aspects=tuple(clause.aspect for clause in clauses),
        polar_words=polar,
        rare=tuple(word for word in polar if word in RARE),
    )


def generate(n: int, seed: int) -> list[Sentence]:
    """n distinct sentences in random order, ⌊n/2⌋ of them positive; the same n and seed give the same list.

    Rules have their shares in small draws; a large one exhausts the frequent plain sentences and shifts to the rest.
    Raises ValueError for n below 0 or above `LARGEST`.
    """
    if not 0 <= n <= LARGEST:
        raise ValueError(f"n must be between 0 and {LARGEST}, got {n}")
    rng = random.Random(seed)
    labels = [i % 2 for i in range(n)]
    rng.shuffle(labels)
    sentences: dict[str, Sentence] = {}
    for label in labels:
        sentence = _sentence(rng, label)
        while sentence.text in sentences:
            sentence = _sentence(rng, label)
        sentences[sentence.text] = sentence
    return list(sentences.values())


def proponents(query: Sentence, training: Sequence[Sentence]) -> NDArray[np.bool_]:
    """The training sentences, as a mask (N,), from which the label of this query can be read off by construction.

    A sentence is a proponent if it has the query's label and rule and shares a sentiment word with it, a rare one
    where the query has any. The common label makes the shared word play the same part in both: under negation,
    "less" and in a contrast, one word speaks for either label.
    """
    wanted = set(query.rare or query.polar_words)
    return np.array(
        [s.label == query.label and s.rule == query.rule and not wanted.isdisjoint(s.polar_words) for s in training],
        dtype=np.bool_,
    )
