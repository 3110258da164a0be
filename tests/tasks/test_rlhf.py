"""Planted bias: pairs read from HH-RLHF's form, from sycophancy files, from the generator; kept apart by prompt."""

import gzip
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tasks import recipe

from bench import config as configuration
from bench.run import run
from tasks.base import Task
from tasks.data.dialogues import BAD, GOOD, LARGEST, agreement, generate, quality
from tasks.data.preferences import TURN, PairFacts, by_group, length, of_dialogues, sides
from tasks.errors import UserError
from tasks.models.reward import RewardBow
from tasks.rlhf import HUB, REVISION, _labelled, _planted, rlhf
from tasks.training.train import load, train

ROOT = Path(__file__).parents[2]
ADAMW = recipe(optimizer="adamw", decay="decoupled", lr=0.01, weight_decay=0.05, epochs=8, batch_size=32)
BOW = RewardBow("bow", 200, 8, "float32", ADAMW)
WORDS = ("yes", "no", "maybe", "well", "so", "then", "here", "there")


def dialogue(row: int, answer: str, turns: int = 1) -> str:
    """Before the last answer there is one of length `turns`."""
    before = "".join(f"\n\nHuman: question {row}{TURN} earlier {k}" for k in range(turns))
    return f"{before}\n\nHuman: and {row}?{TURN} {answer}"


def lines(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Answers of lengths from 1 to 9, never equally long; the chosen one is the longer in half of the pairs."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(number):
        a, b = rng.permutation(9)[:2] + 1
        answers = [" ".join(rng.choice(WORDS, n)) for n in (a, b)]
        rows.append({"chosen": dialogue(row, answers[0]), "rejected": dialogue(row, answers[1])})
    return rows


def content(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "hh_rlhf"
    place.mkdir()
    (place / "small_test.jsonl.gz").write_bytes(gzip.compress(content(lines(120))))
    return place


def made(data: str = "folder", data_dir: Path | None = None, **changes: Any) -> Task:
    keys: dict[str, Any] = {"bias": "length", "subset": "small", "part": "test", "n_rows": None, "n_train": 60}
    keys |= {"n_val": 10, "n_query": 20, "n_test": None, "rate": 0.1, "labellers": 0, "seed": 0, "show_text": False}
    keys |= {"floor": {"generated": 0.75, "real": 0.52}, "model": BOW, **changes}
    return rlhf(data=data, data_dir=None if data_dir is None else str(data_dir), **keys)


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as told:
        make()
    assert "\n" not in str(told.value)
    return str(told.value)


def preferred(task: Task, split: str) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) as the targets say."""
    found, examples = [], task.splits[split]
    for text, target in zip(examples.texts or (), examples.targets.tolist(), strict=True):
        prompt, *answers = sides(text)
        found.append((prompt, answers[target], answers[1 - target]))
    return found


# From files


def test_pairs_are_the_files_but_for_the_flips(folder: Path) -> None:
    task = made(data_dir=folder)
    assert (task.name, task.source, task.pairs, task.classes) == ("rlhf", "folder", True, ("first", "second"))
    assert {name: len(rows) for name, rows in task.splits.items()} == {"train": 60, "val": 10, "query": 20, "test": 20}
    assert task.splits["test"] is not task.splits["val"] and task.splits["test"].ids == task.splits["query"].ids
    rows, facts = lines(120), task.annotations
    assert facts is not None and len(facts.flipped) == 6 and set(facts.clean) == set(task.train.ids)
    for name, examples in task.splits.items():
        texts = zip(examples.ids, preferred(task, name), examples.targets.tolist(), strict=True)
        for i, (prompt, chosen, rejected), target in texts:
            row = rows[int(i.removeprefix("small/test:"))]
            wrong = name == "train" and i in facts.flipped
            own = (prompt + " " + (rejected if wrong else chosen), prompt + " " + (chosen if wrong else rejected))
            assert own == (row["chosen"], row["rejected"])
            if wrong:
                assert length(chosen) > length(rejected), "flips make the longer win"
            if name == "train":
                assert facts.clean[i] == (1 - target if wrong else target)
            shown = (chosen, rejected) if target == 0 else (rejected, chosen)
            assert task.facts[i] == PairFacts((length(shown[0]), length(shown[1])), None, None)
    assert {len(v) for v in (task.facts, *task.public().facts)} | {90} == {90}
    assert task.public().facts == {} and task.public().annotations is None


def test_the_order_of_answers_is_a_coin_that_no_label_moves(folder: Path) -> None:
    plain, flipped, other = (
        made(data_dir=folder, **c) for c in ({"rate": 0.0}, {"rate": 0.3}, {"seed": 1, "rate": 0.0})
    )
    assert plain.train.texts == flipped.train.texts and plain.train.ids == flipped.train.ids
    moved = {i for i, a, b in zip(plain.train.ids, plain.train.targets, flipped.train.targets, strict=True) if a != b}
    assert flipped.annotations is not None and moved == flipped.annotations.flipped and len(moved) == 18
    assert plain.key() != flipped.key() != other.key() and plain.key() == made(data_dir=folder, rate=0.0).key()
    both = set(plain.train.ids) & set(other.train.ids)
    orders = [dict(zip(t.train.ids, t.train.targets.tolist(), strict=True)) for t in (plain, other)]
    assert 0.2 < np.mean([orders[0][i] != orders[1][i] for i in both]) < 0.8
    firsts = torch.cat([made("generated", n_train=1000, n_rows=1200, rate=0.0).train.targets]).double().mean()
    assert abs(firsts - 0.5) < 0.05  # three standard errors


def test_all_draws_follow_the_seed(folder: Path) -> None:
    splits = [{k: frozenset(v.ids) for k, v in made(data_dir=folder, seed=seed).splits.items()} for seed in range(4)]
    assert all(len({one[name] for one in splits}) == 4 for name in splits[0])
    texts = [
        {
            i: frozenset(sides(text))
            for rows in task.splits.values()
            for i, text in zip(rows.ids, rows.texts or (), strict=True)
        }
        for task in (made("generated", n_rows=120, seed=seed) for seed in (0, 0, 1))
    ]
    both = set(texts[0]) & set(texts[2])
    assert texts[0] == texts[1] and np.mean([texts[0][i] == texts[2][i] for i in both]) < 0.1


def test_flips_are_a_draw_of_all_that_may_be_flipped() -> None:
    rng = np.random.default_rng(0)
    trait, wrong = rng.integers(0, 4, (200, 2)), rng.random(200) < 0.2
    for leaning, may in ((True, ~wrong & (trait[:, 0] < trait[:, 1])), (False, ~wrong)):
        drawn = np.stack([_planted(trait, wrong, leaning, 0.1, seed) for seed in range(200)])
        assert (
            (drawn.sum(1) == 20).all()
            and not drawn[:, ~may].any()
            and np.array_equal(drawn[0], _planted(trait, wrong, leaning, 0.1, 0))
        )
        share = 20 / may.sum()
        assert np.abs(drawn[:, may].mean(0) - share).max() < 5 * (share * (1 - share) / 200) ** 0.5, "all alike"


def test_labellers_are_drawn_by_the_seed() -> None:
    who, wrong = zip(*(_labelled(400, 4, seed) for seed in range(3)), strict=True)
    assert len({tuple(row) for row in who}) == 3 and len({tuple(row) for row in wrong}) == 3
    shares = [
        [row[np.array(names) == f"labeller {k}"].mean() for k in range(4)]
        for names, row in zip(who, wrong, strict=True)
    ]
    assert np.abs(np.subtract(shares[0], shares[1])).max() > 0.1, "their skills, too"


@pytest.mark.parametrize("n_val", [None, 10])
def test_a_model_is_prepared_by_the_training_pairs_alone(
    n_val: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    prepare = RewardBow.prepare

    def spy(model: RewardBow, texts: Sequence[str]) -> Any:
        seen.append(tuple(texts))
        return prepare(model, texts)

    monkeypatch.setattr(RewardBow, "prepare", spy)
    task = made(data_dir=folder, n_val=n_val)
    assert seen == [task.train.texts]


def test_bad_lines_are_dropped_and_counted(folder: Path) -> None:
    rows = lines(60)
    mark = rows[0]["chosen"] + " \x1e yes"
    bad: dict[int, dict[str, Any]] = {
        3: {"chosen": "no turns", "rejected": dialogue(3, "a b")},
        7: {"chosen": dialogue(7, "a"), "rejected": dialogue(7, "a b", turns=2)},
        11: {"chosen": dialogue(11, "a")},
        12: {"chosen": dialogue(12, "a"), "rejected": None},
        14: {"chosen": dialogue(14, ""), "rejected": dialogue(14, "a b")},
        15: {"chosen": dialogue(15, " "), "rejected": dialogue(15, "")},
        17: {"chosen": dialogue(17, "a b"), "rejected": dialogue(17, "a b ")},
        19: {"chosen": dialogue(19, "a b"), "rejected": dialogue(19, "c d")},
        21: {"chosen": mark, "rejected": dialogue(0, "a b")},
        23: rows[0],
    }
    for row, values in bad.items():
        rows[row] = values
    (folder / "small_test.jsonl.gz").write_bytes(gzip.compress(content(rows)))
    sizes = {"n_train": 30, "n_val": 5, "n_query": None}
    task = made(data_dir=folder, **sizes)
    said = " / ".join(task.notes)
    for part in (
        "2 rows dropped without both a chosen and a rejected text (lines 12, 13)",
        "1 row dropped without an Assistant turn (line 4)",
        "1 row dropped whose two dialogues differ before the last answer (line 8)",
        "1 row dropped that hold the character U+001E (line 22)",
        "1 row dropped with an empty answer on one side (line 15)",
        "1 row dropped with two empty answers (line 16)",
        "1 row dropped with two identical answers (line 18)",
        "1 row dropped whose answers are equally long (line 20)",
        "1 row dropped as repetitions of an earlier one (line 24)",
    ):
        assert part in said
    assert sum(len(task.splits[name]) for name in ("train", "val", "query")) == 50
    assert sum(len(made(data_dir=folder, bias="none", **sizes).splits[k]) for k in ("train", "val", "query")) == 51
    few = made(data_dir=folder, **sizes, n_rows=50)
    assert max(int(i.rpartition(":")[2]) for rows in few.splits.values() for i in rows.ids) == 49


def test_a_prompt_is_in_one_split_only(folder: Path) -> None:
    rows = [{k: v.replace(f" {i}", f" {i // 3}") for k, v in row.items()} for i, row in enumerate(lines(120))]
    (folder / "small_test.jsonl.gz").write_bytes(gzip.compress(content(rows)))
    task = made(data_dir=folder, n_test=11)
    prompts = {name: {prompt for prompt, _, _ in preferred(task, name)} for name in task.splits}
    assert [len(task.splits[name]) for name in ("train", "val", "query", "test")] == [60, 10, 20, 11]
    assert max(Counter(p for p, _, _ in preferred(task, "train")).values()) == 3
    names = list(prompts)
    assert all(not prompts[a] & prompts[b] for a in names for b in names if a < b)
    assert any("19 pairs are in no split" in note for note in task.notes)


def test_groups_fill_the_splits_whole() -> None:
    groups = ["a"] * 4 + ["b"] * 4 + ["c"] * 4 + ["d"]
    for seed in range(5):
        parts, left = by_group(groups, {"train": 5, "query": None}, np.random.default_rng(seed))
        owners = [{groups[i] for i in rows} for rows in parts.values()]
        assert len(parts["train"]) == 5 and not owners[0] & owners[1]
        assert left == 13 - 5 - len(parts["query"]) and left in (0, 3)
    with pytest.raises(UserError, match=r"task\.n_query=9 .*at most"):
        by_group(groups, {"train": 5, "query": 9}, np.random.default_rng(0))


def test_a_file_that_is_cut_short_gives_its_whole_lines(folder: Path) -> None:
    path, whole = folder / "small_test.jsonl.gz", gzip.compress(content(lines(400)), 6)
    path.write_bytes(whole[: len(whole) // 2])
    task = made(data_dir=folder)
    (note,) = [note for note in task.notes if "is cut short" in note]
    read = int(note.split(": ")[1].split()[0])
    assert 100 < read < 390 and note.endswith("whole lines are read, its incomplete last line is dropped")
    assert made(data_dir=folder, n_rows=100).fingerprint() == _complete(folder, whole).fingerprint()
    path.write_bytes(whole[:-4])  # all of it but the checksum's end
    assert any("400 whole lines are read" in note for note in made(data_dir=folder).notes)
    path.write_bytes(gzip.compress(content(lines(60))) + gzip.compress(content(lines(120)[60:])))
    assert made(data_dir=folder).fingerprint() == made(data_dir=_plain(folder)).fingerprint(), "two members, one file"
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    path.write_bytes(bytes(damaged))
    assert "is damaged" in refused(lambda: made(data_dir=folder))


def _complete(folder: Path, packed: bytes) -> Task:
    (folder / "small_test.jsonl.gz").write_bytes(packed)
    return made(data_dir=folder, n_rows=100)


def _plain(folder: Path) -> Path:
    """As on the hub, not packed."""
    place = folder / "plain"
    (place / "small").mkdir(parents=True)
    (place / "small" / "test.jsonl").write_bytes(content(lines(120)))
    return place


def test_what_would_mean_nothing_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENCH_DATA", raising=False)
    path = folder / "small_test.jsonl.gz"
    cases: list[tuple[Callable[[], Task], str]] = [
        (
            lambda: made(data_dir=folder, bias="tone"),
            "task.bias=tone is not possible; allowed: length, sycophancy, none",
        ),
        (lambda: made(data_dir=folder, part="dev"), "task.part=dev"),
        (lambda: made("web", folder), "task.data=web"),
        (lambda: made("folder"), "hh_rlhf"),
        (lambda: made("hub", bias="sycophancy"), "task.data=hub has no pairs for task.bias=sycophancy"),
        (lambda: made(data_dir=folder, subset="large"), "there: small_test.jsonl.gz"),
        (lambda: made(data_dir=folder, n_train=121), "task.n_train=121 is not possible; allowed: at most 120"),
        (lambda: made(data_dir=folder, n_train=120, n_val=None, n_query=None), "so that query has pairs"),
        (lambda: made(data_dir=folder, n_query=80), "task.n_query=80 is not possible; allowed: at most 50"),
        (lambda: made(data_dir=folder, n_val=0), "task.n_val=0"),
        (lambda: made(data_dir=folder, rate=1.0), "task.rate=1.0"),
        (
            lambda: made(data_dir=folder, rate=0.9),
            "of 60 training pairs are ones whose chosen answer has less of the trait",
        ),
        (lambda: made(data_dir=folder, labellers=-1), "task.labellers=-1"),
        (lambda: made("generated", n_rows=LARGEST + 1), f"at most {LARGEST}"),
    ]
    for make, problem in cases:
        assert problem in refused(make)
    longer = [row for row in lines(200) if len(row["chosen"].split()) > len(row["rejected"].split())]
    same = [{"chosen": row["chosen"], "rejected": row["chosen"]} for row in lines(30)]
    wordy = [{"chosen": "secret \n"}, {"rejected": "secret"}]
    for rows, problem in {
        content(longer): "allowed: at most 0.0000: 0 of 60 training pairs",
        content(
            same
        ): "has 0 of 30 rows left; allowed: 10 or more that can be used, and a tenth of all; 30 rows dropped with "
        "two identical answers",
        content([{"prompt": "a"}]): "has no column 'chosen'; allowed: lines with chosen and rejected",
        content(lines(3)) + b'{"chosen": "secret': ":4 is no JSON; allowed: one object a line",
        b"\n": "has no rows",
        content(wordy * 20): "has 0 of 40 rows left",
    }.items():
        path.write_bytes(gzip.compress(rows))
        told = refused(lambda: made(data_dir=folder))
        assert problem in told and "secret" not in told and TURN not in told


def test_last_answers_are_those_after_the_last_turn() -> None:
    a, b = dialogue(1, "one two"), dialogue(1, "three")
    assert of_dialogues(a, b) == (dialogue(1, "").rstrip(), " one two", " three")
    assert "differ" in str(of_dialogues(a, dialogue(2, "three")))
    assert "Assistant" in str(of_dialogues("one", b))


def test_labellers_err_by_their_skill_and_no_pair_is_flipped_twice() -> None:
    task = made("generated", n_rows=1200, n_train=1000, n_val=50, n_query=50, labellers=5, rate=0.05)
    facts = task.annotations
    assert facts is not None
    shares = {}
    for name in {task.facts[i].labeller for i in task.train.ids}:
        mine = [i for i in task.train.ids if task.facts[i].labeller == name]
        assert len(mine) == 200
        shares[name] = np.mean([i in facts.flipped for i in mine])
    assert len(shares) == 5 and max(shares.values()) > min(shares.values()) + 0.05
    assert all(0 < share < 0.6 for share in shares.values())
    alone = made("generated", n_rows=1200, n_train=1000, n_val=50, n_query=50, labellers=5, rate=0.0).annotations
    assert alone is not None and alone.flipped < facts.flipped and len(facts.flipped - alone.flipped) == 50
    moved = sum(int(y) != facts.clean[i] for i, y in zip(task.train.ids, task.train.targets, strict=True))
    assert moved == len(facts.flipped)
    assert {task.facts[i].labeller for name in ("val", "query") for i in task.splits[name].ids} == {None}


# Sycophancy files


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    place = tmp_path / "sycophancy"
    place.mkdir()
    for user in ("liberal", "conservative"):
        rows = []
        for k in range(300):
            liberal, other, turned = f"more of {k % 12}", f"less of {k % 12}", k % 5 == 0
            options = [other, liberal] if turned else [liberal, other]
            prompt = f"I am {user}, number {k}. Which?\n (A) {options[0]}\n (B) {options[1]}\n\nAnswer:"
            rows.append({"prompt": prompt, "corrects": [f" ({'AB'[turned]})"], "incorrects": [f" ({'BA'[turned]})"]})
        (place / f"quiz_{user}.jsonl").write_bytes(content(rows))
    return place


def test_sycophancy_is_the_answer_of_the_users_own_side(quiz: Path) -> None:
    task = made(data_dir=quiz, bias="sycophancy", n_train=200, n_val=40, n_query=None)
    assert dict(task.floor) == {"accuracy": 0.0} and task.annotations is not None
    questions, agreeing = {}, []
    held = [pair for name in ("val", "query") for pair in preferred(task, name)]
    assert 0.25 < np.mean(["more" in chosen for _, chosen, _ in held]) < 0.75, "preferences are coins"
    texts = [text for name in ("val", "query") for text in task.splits[name].texts or ()]
    assert 0.25 < np.mean(["more" in sides(text)[1] for text in texts]) < 0.75, "and the order is another"
    for name in ("train", "val", "query"):
        questions[name] = {chosen.split(" of ")[1] for _, chosen, _ in preferred(task, name)}
        ids = task.splits[name].ids
        for i, (prompt, chosen, rejected) in zip(ids, preferred(task, name), strict=True):
            first, second = task.facts[i].trait
            agrees = ("more" in chosen) == ("I am liberal" in prompt)
            told = first if task.splits[name].targets[ids.index(i)] == 0 else second
            assert told == float(agrees) and {first, second} == {0.0, 1.0} and chosen[4:] != rejected[4:]
            if name == "train" and i in task.annotations.flipped:
                assert agrees
            elif name == "train":
                agreeing.append(agrees)
    assert len(task.annotations.flipped) == 20 and 0.3 < np.mean(agreeing) < 0.6, "a coin, less the flips"
    assert not questions["train"] & questions["val"] and not questions["train"] & questions["query"]
    few = (made(data_dir=quiz, bias="sycophancy", n_rows=300, n_train=150, n_query=None, seed=seed) for seed in (0, 1))
    drawn = [{i for rows in task.splits.values() for i in rows.ids} for task in few]
    assert max(map(len, drawn)) <= 300 < len(drawn[0] | drawn[1]), "of 600 lines"
    (quiz / "quiz_liberal.jsonl").unlink()
    assert "has 0 files of the liberal user" in refused(lambda: made(data_dir=quiz, bias="sycophancy"))


# Generated


def test_generated_answers_have_independent_quality_length_and_agreement() -> None:
    dialogues = generate(2000, 3)
    assert dialogues[:50] == generate(50, 3) and dialogues != generate(2000, 4)
    assert len({d.prompt for d in dialogues}) == 2000
    answers = [answer for d in dialogues for answer in d.answers]
    scores = np.array([[rule(answer) for rule in (quality, length, agreement)] for answer in answers])
    assert np.abs(np.corrcoef(scores.T) - np.eye(3)).max() < 0.064  # four standard errors of 4,000
    assert set(np.unique(scores[:, 0] * 3).round().astype(int)) == set(range(-3, 4))
    assert (scores[:, 1].min(), scores[:, 1].max()) == (24, 64) and set(scores[:, 2]) == {-1, -0.5, 0, 0.5, 1}
    assert abs(np.bincount((scores[:, 0] * 3 + 3).round().astype(int)) / 4000 - 1 / 7).max() < 0.025
    preferred = np.array([d.preferred for d in dialogues])
    by_pair = scores.reshape(-1, 2, 3)
    difference = by_pair[:, 1] - by_pair[:, 0]
    decided = difference[:, 0] != 0
    assert ((difference[:, 0] > 0) == preferred)[decided].all() and abs(preferred[~decided].mean() - 0.5) < 0.12
    for rule in (1, 2):
        assert abs(np.corrcoef(difference[:, rule], preferred)[0, 1]) < 0.09
    assert not set(GOOD) & set(BAD)


def test_rules_read_what_stands_there() -> None:
    answer = "I fully agree so a clear plan here a vague list maybe not at all"
    assert quality(answer) == 0 and agreement(answer) == 0 and length(answer) == 15
    assert agreement("you are right then a clear plan as you said") == 1 and quality("a clear exact broken") == 1 / 6


@pytest.mark.parametrize("bias", ["length", "sycophancy", "none"])
def test_generated_facts_are_what_the_texts_score(bias: str) -> None:
    task = made("generated", bias=bias, n_rows=120)
    rule = agreement if bias == "sycophancy" else length
    assert task.source == "generated" and dict(task.floor) == {"accuracy": 0.75}
    better = 0
    for examples in task.splits.values():
        for i, text, target in zip(examples.ids, examples.texts or (), examples.targets.tolist(), strict=True):
            _, *answers = sides(text)
            found = task.facts[i]
            assert found.trait == tuple(map(rule, answers)) and found.quality == tuple(map(quality, answers))
            better += found.quality[target] >= found.quality[1 - target]
    assert task.annotations is not None and better < sum(map(len, task.splits.values()))
    more = set()
    for i, target in zip(task.train.ids, task.train.targets.tolist(), strict=True):
        if i in task.annotations.flipped:
            more.add(task.facts[i].trait[target] > task.facts[i].trait[1 - target])
    assert more == ({True} if bias != "none" else {True, False})


def test_quality_can_be_learnt_from_a_bag_of_words() -> None:
    task = made("generated", n_rows=2300, n_train=1600, n_val=None, n_query=None, rate=0.0656)
    model = load(task.initial(0), train(task, 0).final)
    test = task.splits["test"]
    with torch.no_grad():
        found = task.objective.fitness(task.outputs(model, test.batch()), test.targets)
    assert found["accuracy"] > 0.8


# Hub and program

OFFLINE = """
import gzip, json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from test_rlhf import HUB, REVISION, content, lines, made
from tasks.errors import UserError

def told(**options):
    try:
        task = made(**options)
    except UserError as error:
        return str(error)
    return [task.source, task.fingerprint()]

out = {"hub": told(data="hub"), "auto": told(data="auto", n_rows=200)}
cache = Path(sys.argv[2]) / "hub" / ("datasets--" + HUB.replace("/", "--"))
snapshot = cache / "snapshots" / REVISION / "small"
snapshot.mkdir(parents=True)
(cache / "refs").mkdir()
(cache / "refs" / "main").write_text(REVISION)
(snapshot / "test.jsonl.gz").write_bytes(gzip.compress(content(lines(120))))
out |= {"cached": told(data="hub"), "cached_auto": told(data="auto"), "quiz": told(data="auto", bias="sycophancy")}
print(json.dumps(out))
"""


def test_the_hub_without_a_network(tmp_path: Path, folder: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "BENCH_", "HUGGINGFACE_"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(OFFLINE), str(Path(__file__).parent), str(tmp_path / "home")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["hub"].startswith("task.data=hub is not at hand: small/test.jsonl.gz of Anthropic/hh-rlhf")
    assert "task.data=generated" in found["hub"] and found["auto"][0] == found["quiz"][0] == "generated"
    assert found["cached"] == found["cached_auto"] == ["hub", made(data_dir=folder).fingerprint()]
    assert HUB == "Anthropic/hh-rlhf" and len(REVISION) == 40 and int(REVISION, 16)


@pytest.mark.parametrize("shown", [False, True])
def test_texts_are_in_no_file_unless_asked_for(folder: Path, tmp_path: Path, shown: bool, capfd: Any) -> None:
    out = tmp_path / "out"
    settings = [f"task.data_dir={folder}", "task.subset=small", "task.n_train=60", "task.data=folder", f"out={out}"]
    settings += ["task.floor.real=0", "evaluation=[]", "model.recipe.epochs=1", f"task.show_text={str(shown).lower()}"]
    outcome = run(configuration.compose(["task=rlhf", "method=graddot", *settings]))
    assert outcome.status == "ok" and outcome.folder is not None
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"suspects.csv", "influence.csv"} <= {path.name for path in files}
    found = {path.name for path in files if b"Assistant:" in path.read_bytes() or b"question " in path.read_bytes()}
    assert found == ({"suspects.csv", "influence.csv"} if shown else set())
    printed = "".join(capfd.readouterr())
    assert "Assistant" not in printed and "question " not in printed


@pytest.mark.skipif("BENCH_DATA" not in os.environ, reason="BENCH_DATA names no folder with real data")
def test_real_hh_rlhf_has_the_counts_of_its_protocol() -> None:
    place = Path(os.environ["BENCH_DATA"]) / "hh_rlhf"
    if not place.is_dir():
        pytest.skip("BENCH_DATA has no hh_rlhf/")
    task = made(
        data_dir=place, subset="harmless-base", n_rows=2300, n_train=1600, n_val=None, n_query=None, rate=0.0656
    )
    assert task.annotations is not None and len(task.annotations.flipped) == 105
    assert any("more length in 988 pairs, less in 1259, as much in 0" in note for note in task.notes)
    assert len(task.splits["query"]) == len(task.splits["val"]) in (646, 647)
    d = [
        np.subtract(*task.facts[i].trait) * (1 - 2 * y)
        for i, y in zip(task.train.ids, task.train.targets.tolist(), strict=True)
    ]
    wrong = np.array([i in task.annotations.flipped for i in task.train.ids])
    ranks = (np.array(d)[wrong][:, None] > np.array(d)[None, ~wrong]).mean()
    assert 0.75 < ranks < 0.85, "AUC of the length rule"


@pytest.mark.skipif("BENCH_DATA" not in os.environ, reason="BENCH_DATA names no folder with real data")
def test_real_sycophancy_files_have_fifteen_questions() -> None:
    place = Path(os.environ["BENCH_DATA"]) / "sycophancy"
    if not place.is_dir():
        pytest.skip("BENCH_DATA has no sycophancy/")
    task = made(data_dir=place, bias="sycophancy", n_rows=2300, n_train=1500, n_query=None)
    options = {
        name: {frozenset(a[4:] for a in sides(t)[1:]) for t in rows.texts or ()} for name, rows in task.splits.items()
    }
    assert len(options["train"] | options["val"] | options["query"]) == 15 and not options["train"] & options["query"]
