"""The corpus is what it says: labels follow from the text, a bag of words is not enough, proponents are known."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from tasks.data.sentiment_grammar import (
    ASPECTS,
    ATTACHMENTS,
    CLOSINGS,
    LARGEST,
    NEGATIVE,
    OPENINGS,
    POSITIVE,
    RARE,
    REFERENCES,
    RULES,
    Sentence,
    generate,
    proponents,
)

SIGN = dict.fromkeys((*POSITIVE, "better"), 1) | dict.fromkeys((*NEGATIVE, "worse"), -1)
REVERSERS = {"not", "never", "hardly", "less"}

HAND_WRITTEN = {
    "the plot is good in most scenes": 1,
    "in my view the acting was dull": 0,
    "the plot of this film is very good": 1,
    "the plot is rather bad this time around": 0,
    "the plot is not good in most scenes": 0,
    "the plot was never abysmal throughout the film": 1,
    "the plot was hardly luminous in most scenes": 0,
    "the plot is good but the script was bad": 0,
    "the plot is bad but the script was good": 1,
    "although the plot is bad the script was good": 1,
    "although the plot is good the script was bad": 0,
    "the plot is good although the script was bad": 1,
    "the plot is bad although the script was good": 0,
    "the plot is better than the book": 1,
    "the plot is worse than the book": 0,
    "the plot is more boring than the book": 0,
    "the plot is less boring than the book": 1,
    "the plot is less funny than the book": 0,
}


def label_of(text: str) -> int:
    """The label re-derived from the words alone, by a reader that shares no code with the generator."""
    words = text.split()
    signs = [SIGN[w] * (-1 if words[i - 1] in REVERSERS else 1) for i, w in enumerate(words) if w in SIGN]
    decides = 0 if "although" in words[1:] else -1
    return int(signs[decides] > 0)


@pytest.fixture(scope="module")
def corpus() -> list[Sentence]:
    return generate(20_000, seed=0)


@pytest.mark.parametrize("text", HAND_WRITTEN)
def test_reader_agrees_with_hand_written_labels(text: str) -> None:
    assert label_of(text) == HAND_WRITTEN[text]


@pytest.mark.parametrize("rule", RULES)
def test_label_follows_from_the_text(rule: str, corpus: list[Sentence]) -> None:
    sentences = [s for s in corpus if s.rule == rule]
    assert len(sentences) > 500
    assert all(label_of(s.text) == s.label for s in sentences)
    assert 0.4 < np.mean([s.label for s in sentences]) < 0.6  # the rule alone tells nothing


def test_rule_is_the_construction_of_the_text(corpus: list[Sentence]) -> None:
    marks = {
        "negation": {"not", "never", "hardly"},
        "intensifier": {"very", "truly", "quite", "rather"},
        "contrast": {"but", "although"},
        "comparison": {"than"},
    }
    for s in corpus:
        found = [rule for rule, cues in marks.items() if cues & set(s.text.split())]
        assert found == ([] if s.rule == "plain" else [s.rule])


def test_facts_are_read_off_the_text(corpus: list[Sentence]) -> None:
    for s in corpus:
        words = s.text.split()
        assert s.text == " ".join(words).lower()
        assert s.polar_words == tuple(w for w in words if w in SIGN)
        assert s.aspects == tuple(w for w in words if w in ASPECTS)
        assert s.rare == tuple(w for w in s.polar_words if w in RARE)
        assert len(s.polar_words) == len(s.aspects) == (2 if s.rule == "contrast" else 1)


def test_neutral_phrases_hold_no_sentiment_and_no_cue() -> None:
    cues = set(SIGN) | REVERSERS | {"but", "although", "than", "more"} | set(ASPECTS)
    for phrase in (*OPENINGS, *CLOSINGS, *ATTACHMENTS, *REFERENCES):
        assert cues.isdisjoint(phrase.split())


def test_same_seed_same_corpus_other_seed_another() -> None:
    assert generate(300, seed=3) == generate(300, seed=3)
    assert generate(300, seed=3) != generate(300, seed=4)


def test_distinct_balanced_and_short(corpus: list[Sentence]) -> None:
    assert len({s.text for s in corpus}) == len(corpus) == 20_000
    assert sum(s.label for s in corpus) == 10_000
    assert sum(s.label for s in generate(7, seed=0)) == 3
    lengths = [len(s.text.split()) for s in generate(1000, seed=1)]
    assert 8.0 <= np.mean(lengths) <= 11.0
    assert max(lengths) <= 16


def test_order_tells_nothing() -> None:
    labels = np.array([s.label for s in generate(1000, seed=5)])
    assert 0.4 < labels[:500].mean() < 0.6
    assert 0.4 < (labels[1:] == labels[:-1]).mean() < 0.6


def test_rules_have_their_shares() -> None:
    counts = Counter(s.rule for s in generate(2000, seed=2))
    assert sum(RULES.values()) == pytest.approx(1.0)
    for rule, share in RULES.items():
        assert counts[rule] / 2000 == pytest.approx(share, abs=0.04)


def test_rare_words_are_a_handful_and_frequent_ones_are_not() -> None:
    counts = Counter(word for s in generate(1000, seed=0) for word in s.polar_words)
    assert max(counts[word] for word in RARE) <= 20
    assert 2 <= np.mean([counts[word] for word in RARE]) <= 10
    assert min(counts["good"], counts["bad"]) >= 80


def test_every_sentiment_word_speaks_for_both_labels(corpus: list[Sentence]) -> None:
    for rule in ("negation", "contrast"):
        seen = {(word, s.label) for s in corpus if s.rule == rule for word in s.polar_words}
        if rule == "contrast":
            assert seen >= {(word, label) for word in RARE for label in (0, 1)}
        else:
            assert seen >= {(word, int(word in NEGATIVE)) for word in RARE}  # plain sentences hold the other label


@pytest.mark.parametrize("n", [-1, LARGEST + 1])
def test_refuses_a_size_that_it_cannot_draw(n: int) -> None:
    with pytest.raises(ValueError, match="n must be"):
        generate(n, seed=0)


def test_bag_of_words_learns_something_but_not_the_grammar() -> None:
    sentences = generate(3000, seed=0)
    train, test = sentences[:1000], sentences[1000:]
    counts = CountVectorizer()
    model = LogisticRegression(max_iter=1000)
    model.fit(counts.fit_transform([s.text for s in train]), [s.label for s in train])
    right = model.predict(counts.transform([s.text for s in test])) == np.array([s.label for s in test])
    assert 0.65 < right.mean() < 0.80
    assert right[[s.rule == "plain" for s in test]].mean() > 0.9
    assert right[[s.rule == "negation" for s in test]].mean() < 0.4
    assert right[[s.rule == "contrast" for s in test]].mean() < 0.65


def sentence(label: int, rule: str, *polar: str) -> Sentence:
    return Sentence("", label, rule, ("plot",), polar, tuple(w for w in polar if w in RARE))


def test_proponents_share_label_rule_and_word() -> None:
    query = sentence(0, "negation", "good")
    training = [
        sentence(0, "negation", "good"),
        sentence(0, "plain", "good"),
        sentence(1, "negation", "good"),
        sentence(0, "negation", "great"),
    ]
    mask = proponents(query, training)
    assert mask.dtype == np.bool_
    assert mask.tolist() == [True, False, False, False]
    assert proponents(query, []).shape == (0,)


def test_a_rare_word_of_the_query_must_be_the_shared_one() -> None:
    query = sentence(1, "contrast", "bad", "luminous")
    training = [sentence(1, "contrast", "bad", "great"), sentence(1, "contrast", "weak", "luminous")]
    assert proponents(query, training).tolist() == [False, True]
    assert proponents(replace(query, polar_words=("bad", "great"), rare=()), training).tolist() == [True, False]


def test_every_query_is_its_own_proponent_and_few_others_are() -> None:
    training = generate(500, seed=7)
    masks = np.stack([proponents(s, training) for s in training])  # (N, N)
    assert masks.diagonal().all()
    rare = np.array([bool(s.rare) for s in training])
    assert masks[rare].sum(1).mean() < masks[~rare].sum(1).mean() < 50
