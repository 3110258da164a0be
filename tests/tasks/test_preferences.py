"""A user's own pairs: alike from every format, told with their lines where they are bad, prompts kept apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_tasks import recipe

from bench import config as configuration
from bench.run import run
from tasks.base import Task
from tasks.data.preferences import PairFacts, length, sides
from tasks.errors import UserError
from tasks.models.reward import RewardBow
from tasks.preferences import preferences

ADAMW = recipe(optimizer="adamw", decay="decoupled", lr=0.01, weight_decay=0.05, epochs=2, batch_size=16)
BOW = RewardBow("bow", 50, 4, "float32", ADAMW)
WORDS = ("yes", "no", "maybe", "well", "so", "then", "here", "there")


def table(rows: int = 60, seed: int = 0) -> pd.DataFrame:
    """Two pairs a prompt."""
    rng = np.random.default_rng(seed)
    answers = [[" ".join(rng.choice(WORDS, n)) + f" {k}" for k in range(2)] for n in rng.integers(1, 9, rows)]
    return pd.DataFrame(
        {
            "name": [f"row {i}" for i in range(rows)],
            "question": [f"secret {seed} {i // 2}?" for i in range(rows)],
            "good": [a if i % 2 else a + " more" for i, (a, _) in enumerate(answers)],
            "bad": [b + " or less" if i % 4 == 1 else b for i, (_, b) in enumerate(answers)],
        }
    )


def written(place: Path, rows: pd.DataFrame, name: str) -> Path:
    path, plain = place / name, name.removesuffix(".gz")
    if plain.endswith(".jsonl"):
        rows.to_json(path, orient="records", lines=True)
    else:
        rows.to_csv(path, sep="\t" if plain.endswith(".tsv") else ",", index=False)
    return path


def made(path: Path, **changes: Any) -> Task:
    keys: dict[str, Any] = {"prompt": "question", "chosen": "good", "rejected": "bad", "id": None, "query_file": None}
    keys |= dict.fromkeys(("n_train", "n_val", "n_query", "n_test", "floor"))
    keys |= {"rate": 0.0, "seed": 0, "show_text": False, "model": BOW, **changes}
    return preferences(data_dir=str(path), **keys)


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as told:
        make()
    assert "\n" not in str(told.value) and "secret" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.csv.gz", "a.jsonl.gz"])
def test_every_format_gives_the_same_task(tmp_path: Path, name: str) -> None:
    rows = table()
    rows.loc[3, "good"] = 'with "quotes", a comma\tand a tab'
    one, other = (made(written(tmp_path, rows, n), id="name") for n in ("b.csv", name))
    assert one.fingerprint() == other.fingerprint() and one.key() == other.key()


def test_pairs_are_the_files(tmp_path: Path) -> None:
    rows = table()
    task = made(written(tmp_path, rows, "mine.csv"))
    assert (task.name, task.source, task.pairs, task.annotations) == ("preferences", "mine", True, None)
    assert {k: len(v) for k, v in task.splits.items()} == {"train": 42, "val": 6, "query": 6, "test": 6}
    prompts = []
    for examples in task.splits.values():
        prompts.append(set())
        for i, text, target in zip(examples.ids, examples.texts or (), examples.targets.tolist(), strict=True):
            prompt, *answers = sides(text)
            assert (prompt, answers[target], answers[1 - target]) == tuple(
                rows.iloc[int(i)][["question", "good", "bad"]]
            )
            assert task.facts[i] == PairFacts((length(answers[0]), length(answers[1])), None, None)
            prompts[-1].add(prompt)
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 30, "no prompt in two splits"
    assert 0 < task.train.targets.double().mean() < 1
    assert task.places == {i: str(int(i) + 2) for i in task.train.ids}
    assert dict(task.floor) == {"accuracy": 0.5} and dict(made(tmp_path, floor=0.7).floor) == {"accuracy": 0.7}
    named = made(tmp_path / "mine.csv", id="name")
    assert set(named.train.ids) < set(rows.name)


def test_flips_are_planted_on_request(tmp_path: Path) -> None:
    path = written(tmp_path, table(), "a.csv")
    plain, flipped = made(path), made(path, rate=0.1)
    moved = [i for i, a, b in zip(plain.train.ids, plain.train.targets, flipped.train.targets, strict=True) if a != b]
    assert flipped.annotations is not None and set(moved) == flipped.annotations.flipped and len(moved) == 4
    for i, target in zip(flipped.train.ids, flipped.train.targets.tolist(), strict=True):
        trait = flipped.facts[i].trait
        assert i not in moved or trait[target] > trait[1 - target]
    assert "task.rate=0.9 is not possible" in refused(lambda: made(path, rate=0.9))


def test_bad_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = table()
    rows.loc[4, "good"], rows.loc[8, "bad"], rows.loc[9, ["good", "bad"]] = "", "  ", ""
    rows.loc[10, "bad"] = rows.loc[10, "good"]
    rows.loc[12, ["question", "good", "bad"]] = rows.loc[0, ["question", "good", "bad"]]
    for name in ("a.csv", "b.jsonl"):
        first = 2 if name == "a.csv" else 1
        task = made(written(tmp_path, rows, name))
        assert task.notes[:4] == (
            f"2 rows dropped with an empty answer on one side (lines {4 + first}, {8 + first})",
            f"1 row dropped with two empty answers (line {9 + first})",
            f"1 row dropped with two identical answers (line {10 + first})",
            f"1 row dropped as repetitions of an earlier one (line {12 + first})",
        )
        assert sum(map(len, task.splits.values())) + _left_over(task) == 55
    rows["bad"] = rows["good"]
    told = refused(lambda: made(written(tmp_path, rows, "c.csv")))
    assert "has 0 of 60 rows left" in told and "with two identical answers" in told


def _left_over(task: Task) -> int:
    return sum(int(note.split()[0]) for note in task.notes if "are in no split" in note)


def test_whole_dialogues_need_no_prompt_column(tmp_path: Path) -> None:
    rows = table().iloc[::2].reset_index(drop=True)
    before = ["\n\nHuman: " + q + "\n\nAssistant:" for q in rows.question]
    dialogues = pd.DataFrame(
        {side: [b + " " + a for b, a in zip(before, rows[side], strict=True)] for side in ("good", "bad")}
    )
    task = made(written(tmp_path, dialogues, "a.jsonl"), prompt=None)
    for i, text, target in zip(task.train.ids, task.train.texts or (), task.train.targets.tolist(), strict=True):
        prompt, *answers = sides(text)
        assert (prompt, answers[target]) == (before[int(i)].lstrip(), rows.good[int(i)])
    dialogues.loc[2, "good"] = "no turn"
    assert any(
        n == "1 row dropped without an Assistant turn (line 3)"
        for n in made(written(tmp_path, dialogues, "a.jsonl"), prompt=None).notes
    )


def test_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, table(), "a.csv")
    same = written(tmp_path, table().assign(question="secret"), "same.csv")
    queries = written(tmp_path, pd.concat([table(4, seed=5), table(3)]), "queries.csv")
    cases: list[tuple[Callable[[], Task], str]] = [
        (
            lambda: made(path, chosen="better"),
            "task.chosen=better is no column of a.csv; allowed: name, question, good, bad",
        ),
        (lambda: made(path, rejected=None), "task.rejected is missing"),
        (lambda: made(path, rejected="good"), "task.rejected=good is named twice"),
        (lambda: made(tmp_path / "none.csv"), "is neither a file nor a folder"),
        (lambda: made(path, n_train=49), "task.n_train=49 is not possible; allowed: at most 42"),
        (lambda: made(path, n_val=0), "task.n_val=0"),
        (lambda: made(path, n_val=60, n_test=1, n_query=1), "task.n_query=1 is not possible; allowed: at most 0"),
        (lambda: made(path, n_val=20, n_test=20, n_query=20), "fewer together (60 pairs of 30 prompts)"),
        (lambda: made(same), "pairs of one prompt stay together"),
        (lambda: made(path, query_file=str(queries)), "3 rows have prompts of a.csv, too (lines 6, 7, 8)"),
        (lambda: made(path, query_file=str(queries), n_query=3), "task.n_query=3"),
    ]
    for make, problem in cases:
        assert problem in refused(make)


def test_a_query_file_is_the_query_split(tmp_path: Path) -> None:
    path = written(tmp_path, table(), "a.csv")
    asked = written(tmp_path, table(7, seed=9), "asked.csv")
    task = made(path, query_file=str(asked))
    assert task.splits["query"].ids == tuple(f"query:{i}" for i in range(7))
    assert [len(task.splits[name]) for name in ("train", "val", "test")] == [48, 6, 6]
    assert all("secret 9" in text for text in task.splits["query"].texts or ())


def test_pairs_of_a_query_file_bring_their_own_facts(tmp_path: Path) -> None:
    """The names of both files are the same."""
    files = {"train": table(), "query": table(40, seed=9)}
    own, asked = (written(tmp_path, rows, f"{name}.csv") for name, rows in files.items())
    task = made(own, query_file=str(asked), id="name", rate=0.1)
    assert task.annotations is not None and len(task.annotations.flipped) == 5
    ids = [i for rows in task.splits.values() for i in rows.ids]
    assert len(set(ids)) == len(ids) == len(task.facts) == 100 and set(task.annotations.clean) == set(task.train.ids)
    moved = set()
    for name, examples in task.splits.items():
        rows = files["query" if name == "query" else "train"].set_index("name")
        for i, text, target in zip(examples.ids, examples.texts or (), examples.targets.tolist(), strict=True):
            prompt, *answers = sides(text)
            right = answers.index(rows.good[i.removeprefix("query:")])
            assert prompt == rows.question[i.removeprefix("query:")]
            assert task.facts[i].trait == (length(answers[0]), length(answers[1]))
            moved |= {i} if target != right else set()
    assert moved == task.annotations.flipped
    traits = [task.facts[i].trait for i in task.splits["query"].ids]
    assert traits != traits[::-1] and any(a != b for a, b in traits)


def test_splits_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = written(tmp_path, table(), "a.csv")
    splits = [{name: frozenset(rows.ids) for name, rows in made(path, seed=seed).splits.items()} for seed in range(4)]
    assert all(len({one[name] for one in splits}) == 4 for name in splits[0])


@pytest.mark.parametrize("shown", [False, True])
def test_texts_are_in_no_file_unless_asked_for(tmp_path: Path, capfd: Any, shown: bool) -> None:
    out = tmp_path / "out"
    settings = [f"task.data_dir={written(tmp_path, table(), 'a.csv')}", "task.prompt=question", "task.chosen=good"]
    settings += ["task.rejected=bad", "task.floor=0", "model.recipe.epochs=1", f"task.show_text={str(shown).lower()}"]
    outcome = run(configuration.compose(["task=preferences", "method=loss", f"out={out}", *settings]))
    assert outcome.status == "ok" and outcome.folder is not None
    suspects = pd.read_csv(Path(outcome.folder) / "suspects.csv")
    assert len(suspects) == 42 and set(suspects.label) == {"chosen"}
    p = suspects.why.str.extract(r"p = ([\d.e+-]+)\)")[0].astype(float)
    assert set(suspects.predicted[p > 0.5]) == {"chosen"} and set(suspects.predicted[p < 0.5]) == {"rejected"}
    assert {"prompt", "chosen", "rejected"} <= set(suspects) if shown else "chosen" not in suspects
    if shown:  # as the file has them, whichever of the two an example shows first
        file = pd.DataFrame(table()).astype(str)
        rows = file.iloc[suspects.id]
        for own, theirs in {"prompt": "question", "chosen": "good", "rejected": "bad"}.items():
            assert suspects[own].tolist() == rows[theirs].str.strip().tolist()
    found = {path.name for path in out.rglob("*") if path.is_file() and b"secret" in path.read_bytes()}
    assert found == ({"suspects.csv"} if shown else set()) and "secret" not in "".join(capfd.readouterr())
