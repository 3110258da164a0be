"""Preference pairs through the program: each judge of a planted bias, and no text in any file unless asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from bench import aggregate, config, records, tables
from bench.__main__ import main
from bench.run import build_task, report, run

MODEL = ["model.vocabulary=80", "model.hidden=8", "model.recipe.epochs=8"]
PAIRS = ["task=rlhf", "task.data=generated", "task.n_rows=180", "task.n_train=80", "task.floor.generated=0", *MODEL]
APART = ["task.n_query=20", "task.n_test=40"]
JUDGES = {
    "bias": [*PAIRS, "task.rate=0.1", "evaluation=[bias]"],
    "bias_repair": [*PAIRS, *APART, "evaluation=[bias_repair]", "truth.bias_repair.repeats=2"],
    "labellers": [
        *(*PAIRS, *APART, "task.n_val=20", "task.rate=0.0", "task.labellers=4"),
        *("evaluation=[labellers]", "truth.labellers.repeats=2"),
    ],
    "bias,lds": [*PAIRS, "evaluation=[bias,lds]", "truth.lds.subsets=4", "truth.lds.repeats=1"],
    "nothing": [*PAIRS, "task.rate=0.0", "evaluation=[]"],
}
RANKED = ("value", "less", "more", "full")
FIGURES = ("auc", "ap", "found5", "found10", "found20", "tnr80", "matched_auc")
CHANGES = ("more_wins_change", "correlation_change", "accuracy_change")
METRICS = {
    "bias": {f"{name}_{figure}" for name in RANKED for figure in FIGURES} | {"base_rate"},
    "bias_repair": {
        f"{name}_{action}_{change}"
        for name in ("value", "less", "oracle")
        for action in ("relabel", "remove")
        for change in CHANGES
    }
    | {
        f"{name}_{level}"
        for name in ("unrepaired", "random_relabel", "random_remove")
        for level in ("more_wins", "correlation", "accuracy")
    },
    "labellers": {
        *("value_skill_spearman", "attribution_skill_spearman", "attribution_weighted_gain"),
        *("shuffled_weighted_gain", "oracle_weighted_gain", "equal_accuracy"),
    },
    "nothing": set(),
}
METRICS["bias,lds"] = METRICS["bias"] | {"lds", "lds_pearson", "lds_kendall"}
MARKS = ("garbled", "muddled", "sloppy", "dubious", "untested", "herb gardens", "mountain huts", "I think that")


def files_with(marks: tuple[str, ...], place: Path) -> set[str]:
    found = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    return {path.name for path, content in found.items() if any(mark.encode() in content for mark in marks)}


@pytest.mark.parametrize("judge", JUDGES)
def test_each_judge_and_no_text_anywhere(judge: str, tmp_path: Path, capfd: Any) -> None:
    settings = [*JUDGES[judge], "method=graddot", f"out={tmp_path}"]
    outcome = run(config.compose(settings))
    assert outcome.status == "ok", outcome.reason
    record = records.read(Path(str(outcome.folder)))
    assert set(record["metrics"]) == METRICS[judge]
    for name, metric in record["metrics"].items():
        assert metric["value"] is not None and np.isfinite(metric["value"]), name
        assert metric["low"] is None or metric["low"] <= metric["value"] <= metric["high"], name
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"record.json", "config.yaml", "scores.safetensors"} <= names
    assert ({"suspects.csv", "influence.csv"} <= names) == (judge == "nothing")
    said = report(tmp_path, [outcome]) + "".join(capfd.readouterr())
    assert files_with(MARKS, tmp_path) == set() and not any(mark in said for mark in MARKS)
    again = run(config.compose(settings))
    assert again.found and again.folder == outcome.folder


def test_texts_are_shown_where_they_are_asked_for(tmp_path: Path) -> None:
    outcome = run(config.compose([*JUDGES["nothing"], "method=graddot", "task.show_text=true", f"out={tmp_path}"]))
    assert files_with(MARKS, tmp_path) == {"suspects.csv", "influence.csv"}
    task = build_task(config.compose([*JUDGES["nothing"], "method=graddot"]))
    folder, answers = Path(str(outcome.folder)), {}
    for rows in task.splits.values():
        for i, text, chosen in zip(rows.ids, rows.texts or (), rows.targets.tolist(), strict=True):
            prompt, *both = text.split("\x1e")
            answers[i] = (prompt, both[chosen], both[1 - chosen])
    sides = ("prompt", "chosen", "rejected")
    suspects, influence = (pd.read_csv(folder / name, dtype=str) for name in ("suspects.csv", "influence.csv"))
    assert len(suspects) == 80
    for ids, table, prefix in (("id", suspects, ""), ("query", influence, "query_"), ("train", influence, "train_")):
        for line in table.to_dict("records"):
            assert tuple(line[prefix + side] for side in sides) == answers[str(line[ids])]


def test_figures_are_those_of_the_scores(tmp_path: Path) -> None:
    """By hand from the scores that the run keeps: which queries are concise, who was flipped, and the sign."""
    settings = [*JUDGES["bias"], "method=graddot", f"out={tmp_path}"]
    folder = Path(str(run(config.compose(settings)).folder))
    metrics, (scores, ids) = records.read(folder)["metrics"], records.read_scores(folder)
    task = build_task(config.compose(settings))
    assert task.annotations is not None and ids["train"] == list(task.train.ids)
    flipped = np.array([i in task.annotations.flipped for i in task.train.ids])

    def leads(split: str) -> np.ndarray:
        rows = task.splits[split]
        words = [[len(answer.split()) for answer in text.split("\x1e")[1:]] for text in rows.texts or ()]
        return np.array([pair[y] - pair[1 - y] for pair, y in zip(words, rows.targets.tolist(), strict=True)])

    assert flipped.sum() == 8 and (leads("train")[flipped] > 0).all() and metrics["base_rate"]["value"] == 0.1
    concise, prefers_more = leads("query") < 0, leads("train") > 0
    sets = {"less": concise, "more": ~concise, "full": np.ones_like(concise)}
    for name, rows in sets.items():
        suspicion = -scores["attribution/query"][rows].mean(0)
        assert metrics[f"{name}_auc"]["value"] == pytest.approx(roc_auc_score(flipped, suspicion))
        few = roc_auc_score(flipped[prefers_more], suspicion[prefers_more])
        assert metrics[f"{name}_matched_auc"]["value"] == pytest.approx(few)
    assert metrics["value_auc"]["value"] == pytest.approx(roc_auc_score(flipped, -scores["value"]))


def test_a_sweep_of_methods_is_one_table(tmp_path: Path) -> None:
    methods = ("length_rule", "mahalanobis_reference", "knn_reference", "graddot", "tfidf")
    composed = config.compose_all([[*JUDGES["bias"], f"method={m}", f"out={tmp_path}"] for m in methods])
    statuses = {m: run(one).status for m, one in zip(methods, composed, strict=True)}
    assert statuses == {**dict.fromkeys(methods, "ok"), "tfidf": "unsupported"}
    (table,) = aggregate.tables(tables.load(tmp_path))
    assert {row.label for row in table.rows} == set(methods)
    assert len(list((tmp_path / "cache" / "models").rglob("*.safetensors"))) == 1, "one reward model for all"


# A user's own pairs


def pairs(number: int = 60) -> list[dict[str, str]]:
    """The chosen answer is the longer one in half of the pairs."""
    rng = np.random.default_rng(0)
    words = ("fine", "maybe", "never", "often", "today", "later")
    rows = []
    for k in range(number):
        a, b = rng.permutation(8)[:2] + 1
        answers = [" ".join(rng.choice(words, n)) for n in (a, b)]
        rows.append({"prompt": f"secret {k}?", "chosen": answers[0], "rejected": answers[1]})
    return rows


def dialogues(number: int = 60) -> list[dict[str, str]]:
    found = []
    for row in pairs(number):
        before = f"\n\nHuman: {row['prompt']}\n\nAssistant: "
        found.append({side: before + row[side] for side in ("chosen", "rejected")})
    return found


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("shown", [False, True])
def test_own_pairs_from_the_command_line(
    shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = pairs()
    rows[3] = {**rows[3], "rejected": rows[3]["chosen"]}
    rows[5] = {**rows[5], "chosen": " "}
    command = ["task=preferences", f"task.data_dir={written(tmp_path / 'mine.jsonl', rows)}", "method=length_rule"]
    command += [*MODEL, f"task.show_text={str(shown).lower()}", "out=out", "task.floor=0"]
    assert main(command) == 0
    said = "".join(capfd.readouterr())
    assert "1 row dropped with two identical answers (line 4)" in said
    assert "1 row dropped with an empty answer on one side (line 6)" in said and "secret" not in said
    assert files_with(("secret",), tmp_path / "out") == ({"suspects.csv"} if shown else set())
    (folder,) = (tmp_path / "out").rglob("suspects.csv")
    suspects = pd.read_csv(folder)
    lead = [len(r["chosen"].split()) - len(r["rejected"].split()) for r in rows]
    assert [-lead[line - 1] for line in suspects.row] == list(suspects.score) == sorted(suspects.score)


# What would mean nothing

Write = Callable[[Path], list[str]]


def own(rows: list[dict[str, str]], *more: str) -> Write:
    return lambda place: ["task=preferences", f"task.data_dir={written(place / 'a.jsonl', rows)}", *more]


def hh(rows: list[dict[str, str]], *more: str) -> Write:
    def settings(place: Path) -> list[str]:
        written(place / "small_test.jsonl", rows)
        few = ["task.subset=small", "task.n_train=30", "task.n_query=10"]
        return ["task=rlhf", "task.data=folder", f"task.data_dir={place}", *few, *more]

    return settings


def overlap(place: Path) -> list[str]:
    queries = written(place / "asked.jsonl", [{**pairs()[7], "chosen": "quite another"}, *pairs(61)[60:]])
    return [*own(pairs())(place), f"task.query_file={queries}"]


def longer(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"chosen": row["chosen"] + " and much more than the other one has", **_without(row)} for row in rows]


def _without(row: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in row.items() if key != "chosen"}


def broken(place: Path) -> list[str]:
    settings = own(pairs())(place)
    with (place / "a.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "secret", "chosen": \n')
    return settings


IDENTICAL = [{**row, "rejected": row["chosen"]} for row in pairs()]
BAD: dict[str, tuple[Write, tuple[str, ...]]] = {
    "malformed dialogues": (
        hh([{**row, "chosen": "secret"} for row in dialogues()]),
        ("task.data_dir=", "0 of 60 rows left", "60 rows dropped without an Assistant turn (lines 1, 2"),
    ),
    "own malformed dialogues": (
        own([{**row, "rejected": "secret"} for row in dialogues()], "task.prompt=null"),
        ("task.data_dir=", "60 rows dropped without an Assistant turn"),
    ),
    "dialogues that differ": (
        hh([{**row, "rejected": "\n\nHuman: secret" + row["rejected"]} for row in dialogues()]),
        ("task.data_dir=", "60 rows dropped whose two dialogues differ before the last answer"),
    ),
    "the last turn is no answer": (
        hh([{**row, "chosen": row["chosen"] + "\n\nHuman: secret"} for row in dialogues()]),
        ("task.data_dir=", "60 rows dropped whose last turn is not the Assistant's"),
    ),
    "no json": (broken, ("task.data_dir=", "a.jsonl:61", "is no JSON")),
    "missing column": (
        own(pairs(), "task.chosen=better"),
        ("task.chosen=better is no column of a.jsonl; allowed: prompt, chosen, rejected",),
    ),
    "missing column of dialogues": (
        hh([{"good": "secret", "bad": "secret"}] * 60),
        ("task.data_dir=", "has no column 'chosen'; allowed: lines with chosen and rejected"),
    ),
    "one-sided pairs": (
        own([{**row, "rejected": ""} for row in pairs()]),
        ("task.data_dir=", "60 rows dropped with an empty answer on one side"),
    ),
    "one-sided dialogues": (
        hh([{"chosen": row["chosen"]} for row in dialogues()]),
        ("task.data_dir=", "60 rows dropped without both a chosen and a rejected text"),
    ),
    "identical pairs": (own(IDENTICAL), ("task.data_dir=", "60 rows dropped with two identical answers")),
    "one pair again and again": (
        own([pairs()[0]] * 60),
        ("task.data_dir=", "59 rows dropped as repetitions of an earlier one"),
    ),
    "one prompt": (
        own([{**row, "prompt": "secret"} for row in pairs()]),
        ("task.n_", "pairs of one prompt stay together"),
    ),
    "no pair to flip": (
        hh(longer(dialogues())),
        ("task.rate=0.0656 is not possible; allowed: at most 0.0000: 0 of 30 training pairs",),
    ),
    "no own pair to flip": (
        own(longer(pairs()), "task.rate=0.1"),
        ("task.rate=0.1 is not possible; allowed: at most 0.0000: 0 of 42 training pairs",),
    ),
    "prompts in two splits": (overlap, ("task.query_file=", "1 row has a prompt of a.jsonl, too (line 1)")),
    "more pairs than there are": (hh(dialogues(), "task.n_train=61"), ("task.n_train=61", "at most 60")),
    "a model of vectors": (own(pairs(), "model=mlp"), ("model=mlp does not reward answers", "reward_bow")),
    "a model of texts": (own(pairs(), "model=bert_tiny"), ("model=bert_tiny does not reward answers", "reward_bow")),
    "a bias that is none": (hh(dialogues(), "task.bias=tone"), ("task.bias=tone", "length, sycophancy, none")),
    "nothing was planted": (hh(dialogues(), "task.rate=0.0"), ("evaluation=[bias] cannot judge task=rlhf",)),
    "repair without test pairs": (hh(dialogues(), "evaluation=[bias_repair]"), ("task.n_test gives no pairs",)),
    "nobody knows the labellers": (
        hh(dialogues(), "evaluation=[labellers]"),
        ("evaluation=[labellers] cannot judge task=rlhf", "task.labellers="),
    ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_what_means_nothing_ends_with_2_and_a_line(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    make, parts = BAD[mistake]
    assert main([*make(tmp_path / "data"), "method=graddot", "out=out"]) == 2
    output = capfd.readouterr()
    assert output.err.count("\n") == 1 and output.out == "" and "secret" not in output.err
    assert output.err.startswith("error: " + parts[0]), output.err
    assert all(part in output.err for part in parts), output.err
    assert not (tmp_path / "out").exists(), "nothing was trained"
