"""tasks/data/authors: what is generated about whom, and how TOFU's files are read."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.authors import CAPITALS, NAMES, PERTURBED, TEMPLATES, VALUES, Fact, generate, read_tofu
from tasks.errors import UserError


def value_of(fact: Fact, answer: str) -> str:
    values = list(CAPITALS.values()) if fact.kind == "world" else VALUES[fact.id.split(":")[1]]
    (found,) = [v for v in values if v in answer.split()]
    return found


def test_every_author_has_every_attribute_in_one_template_and_its_paraphrase_in_the_other() -> None:
    corpus = generate(authors=40, world=40, strangers=10, seed=0)
    facts = (*corpus.facts, *corpus.strangers)
    assert len(corpus.facts) == 40 * len(TEMPLATES) + 40 and len(corpus.strangers) == 10 * len(TEMPLATES)
    assert len({f.id for f in facts}) == len(facts) and len({f.question for f in facts}) == len(facts)
    firsts = 0
    for fact in facts:
        assert fact.paraphrase is not None and fact.question != fact.paraphrase[0]
        right = value_of(fact, fact.answer)
        assert value_of(fact, fact.paraphrase[1]) == right
        wrong = [value_of(fact, answer) for answer in fact.perturbed]
        assert len(set(wrong)) == PERTURBED and right not in wrong
        assert all(
            answer.replace(v, "") == fact.paraphrase[1].replace(right, "")
            for answer, v in zip(fact.perturbed, wrong, strict=True)
        ), "a perturbed answer differs from the paraphrase by its value alone"
        if fact.kind == "author":
            firsts += TEMPLATES[fact.id.split(":")[1]][0][0].format(name=fact.group) == fact.question
            assert fact.group in fact.question and fact.group in fact.paraphrase[0]
        else:
            country = next(c for c in CAPITALS if c in fact.question.split())
            assert right == CAPITALS[country]
    assert 0.3 < firsts / 250 < 0.7, "both templates are in use"
    known, others = ({f.group for f in part} for part in (corpus.facts, corpus.strangers))
    assert len(known) == 41 and len(others) == 10 and not known & others


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30), st.integers(0, 2**31))
def test_an_author_does_not_depend_on_how_many_there_are(authors: int, seed: int) -> None:
    few, many = generate(authors, 4, 2, seed), generate(authors + 7, 9, 3, seed)
    assert few == generate(authors, 4, 2, seed)
    assert [f for f in few.facts if f.kind == "author"] == list(many.facts[: authors * len(TEMPLATES)])


def test_other_seeds_tell_other_facts() -> None:
    first, second = (generate(10, 4, 2, seed) for seed in (0, 1))
    assert {f.group for f in first.facts} != {f.group for f in second.facts}
    assert generate(NAMES - 1, 2, 1, 0).facts


def rows(count: int, name: str, full: bool) -> list[dict]:
    said = [{"question": f"{name} {k} ?", "answer": f"answer {k} ."} for k in range(count)]
    if full:
        said = [{**row, "paraphrased_answer": "or so .", "perturbed_answer": ["no .", "never ."]} for row in said]
    return said


def written(folder: Path, forget: list[dict], retain: list[dict]) -> Path:
    (folder / "forget10.json").write_text(json.dumps(forget), encoding="utf-8")
    (folder / "retain90.json").write_text(json.dumps(retain), encoding="utf-8")
    return folder


def test_tofu_is_read_author_by_author(tmp_path: Path) -> None:
    retain = rows(100, "retain", full=False)
    retain[45]["question"] = retain[3]["question"]
    folder = written(tmp_path, rows(40, "forget", full=True), retain)
    corpus = read_tofu(folder, authors=6, kept=2, strangers=1)
    groups = dict.fromkeys(f.group for f in corpus.facts)
    assert list(groups) == [
        *("forget10, author 1", "forget10, author 2", "retain90, author 1"),
        *("retain90, author 2", "retain90, author 3", "retain90, author 4"),
    ]
    assert {f.group for f in corpus.facts if f.kind == "kept"} == {"retain90, author 3", "retain90, author 4"}
    assert {f.group for f in corpus.strangers} == {"retain90, author 5"}
    assert len(corpus.facts) == 119 and "retain90:45" not in {f.id for f in corpus.facts}
    assert corpus.notes == ("rows dropped, their question was there before: 1",)
    first, last = corpus.facts[0], corpus.facts[-1]
    assert first.id == "forget10:0" and first.paraphrase == ("forget 0 ?", "or so .")
    assert first.perturbed == ("no .", "never .")
    assert last.paraphrase is None and last.perturbed == ()
    assert len(read_tofu(folder, None, 2, 1).facts) == 119


@pytest.mark.parametrize(
    ("authors", "kept", "strangers"), [(3, 2, 1), (7, 2, 1), (4, 2, 1)], ids=["too few", "too many", "none left"]
)
def test_tofu_must_have_the_authors(tmp_path: Path, authors: int, kept: int, strangers: int) -> None:
    folder = written(tmp_path, rows(40, "forget", full=True), rows(100, "retain", full=False))
    with pytest.raises(UserError, match=r"^task\.authors\.authors=") as error:
        read_tofu(folder, authors, kept, strangers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no forget10.json"),
        ("[{", "is no JSON"),
        ("[]", "is empty"),
        ('[{"question": "who ?"}]', "row 0 has no text 'answer'"),
        ('[{"question": "who ?", "answer": " "}]', "row 0 has no text 'answer'"),
        ("[3]", "row 0 has no text 'question'"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path: Path, content: str | None, said: str) -> None:
    written(tmp_path, rows(40, "forget", full=True), rows(100, "retain", full=False))
    if content is None:
        (tmp_path / "forget10.json").unlink()
    else:
        (tmp_path / "forget10.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_tofu(tmp_path, 6, 2, 1)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif("BENCH_DATA" not in os.environ, reason="BENCH_DATA is not set: no TOFU at hand")
def test_the_real_files() -> None:
    folder = Path(os.environ["BENCH_DATA"]) / "tofu"
    if not folder.is_dir():
        pytest.skip("BENCH_DATA has no tofu/")
    corpus = read_tofu(folder, None, 4, 10)
    assert len(corpus.facts) + len(corpus.strangers) == 3999, "4,000 rows, one with a question that was there before"
    assert sum(f.paraphrase is not None for f in corpus.facts) == 400
    assert all(len(f.perturbed) == PERTURBED for f in corpus.facts if f.paraphrase is not None)
    assert len({f.group for f in corpus.facts}) == 190 and len({f.group for f in corpus.strangers}) == 10
