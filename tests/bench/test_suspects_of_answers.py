"""Texts that are continued, whose targets are (N, T): what a user reads of them, and who can attribute what Adam
with an L2 term has trained."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from bench import config, records
from bench.run import build_task, preset, run
from bench.suspects import ANSWER, suspects
from methods.base import Problem
from tasks.base import Checkpoint, Trajectory
from tasks.training.plan import explained_seed
from tasks.training.train import load, train

ANSWERS = [
    *("task=unlearning", "model=authors_gpt", "task.data=generated", "task.authors.authors=6", "task.authors.world=6"),
    *("task.authors.strangers=2", "task.authors.asked=2", "task.floor.authors=0", "model.layers=1"),
    *("model.width=8", "model.intermediate=16", "model.recipe.epochs=2", "evaluation=[]"),
]
REVIEWS = [
    *("task=sst2", "task.data=generated", "task.n_train=40", "task.n_val=6", "task.n_query=5", "model=bert_tiny"),
    *("task.floor.generated=0", "model.layers=1", "model.width=8", "model.heads=2", "model.intermediate=8"),
    *("model.max_length=12", "model.vocabulary=80", "model.recipe.epochs=2", "model.recipe.batch_size=20"),
    *("model.recipe.optimizer=adam", "model.recipe.decay=l2", "model.recipe.weight_decay=0.01", "evaluation=[]"),
]


def by_hand(task: Any, trajectory: Trajectory, split: str) -> pd.DataFrame:
    """Row by row, token by token: whether all of an answer is right, and how probable it is."""
    model, rows, found = load(task.initial(0), trajectory.final), task.splits[split], []
    for k, i in enumerate(rows.ids):
        batch = rows.batch([k])
        with torch.no_grad():
            logp = model(**batch.inputs)[0].double().log_softmax(-1)
        targets = batch.targets[0, : len(logp)]
        scored = [(logp[t], int(y)) for t, y in enumerate(targets.tolist()) if y != -100]
        nll = -sum(float(of[y]) for of, y in scored)
        hits = [int(of.argmax()) == y for of, y in scored]
        found.append({"id": i, "nll": nll, "tokens": len(scored), "hits": np.mean(hits), "right": all(hits)})
    return pd.DataFrame(found).set_index("id")


def test_a_run_says_who_answers_and_how_probably(tmp_path: Path) -> None:
    half_learned = ["model.width=16", "model.recipe.lr=0.02", "model.recipe.batch_size=8", "model.recipe.epochs=30"]
    settings = [*ANSWERS, *half_learned, "method=graddot", f"out={tmp_path}"]
    outcome = run(config.compose(settings))
    assert outcome.status == "ok", outcome.reason
    folder, task = Path(str(outcome.folder)), build_task(config.compose(settings))
    assert task.train.targets.ndim == 2
    trajectory = train(task, explained_seed(0))
    told, known = pd.read_csv(folder / "suspects.csv"), by_hand(task, trajectory, "train")
    assert set(told.id) == set(task.train.ids) and set(told.label) == {ANSWER}
    assert list(told.score) == sorted(told.score)
    for line in told.to_dict("records"):
        assert line["predicted"] == (ANSWER if known.right[line["id"]] else "another")
        p = re.search(r"p = ([\d.e+-]+)\)", str(line["why"]))
        assert p is not None and float(p[1]) == pytest.approx(np.exp(-known.nll[line["id"]]), rel=0.06)
    asked = by_hand(task, trajectory, "query")
    influence = pd.read_csv(folder / "influence.csv")
    assert set(influence["query"]) == set(task.splits["query"].ids) and len(influence) == 10 * len(asked)
    assert set(influence.label) == set(influence.train_label) == {ANSWER}
    for line in influence.to_dict("records"):
        assert line["predicted"] == (ANSWER if asked.right[line["query"]] else "another")
    fitness = records.read(folder)["fitness"]
    for split in ("train", "test"):
        hand = by_hand(task, trajectory, split)
        assert fitness[f"{split}_accuracy"] == pytest.approx(hand.right.mean())
        assert fitness[f"{split}_token_accuracy"] == pytest.approx(hand.hits.mean())
        assert fitness[f"{split}_loss_per_token"] == pytest.approx((hand.nll / hand.tokens).mean(), rel=1e-4)
    assert 0.2 < fitness["train_accuracy"] < 0.8, "some answers are known, some are not"


def test_suspects_from_python_are_those_of_a_value() -> None:
    task = build_task(config.compose(ANSWERS)).public()
    problem = Problem(task, 0, lambda k: train(task, explained_seed(0)))
    table, values = suspects(problem, preset("graddot")), preset("graddot").value(problem)
    assert list(table.id) == [task.train.ids[i] for i in np.argsort(values.numpy(), kind="stable")]
    assert list(table.text) == [dict(zip(task.train.ids, task.train.texts or (), strict=True))[i] for i in table.id]


@pytest.mark.parametrize("method", ["trak", "tracin_adam", "tracin", "less", "magic", "ekfac"])
@pytest.mark.parametrize("ground", ["reviews", "answers"])
def test_what_adam_with_an_l2_term_trained_can_be_attributed(ground: str, method: str, tmp_path: Path) -> None:
    few = {"trak": ["method.compression.dimension=32", "method.k=1"]}.get(method, [])
    settings = [*(REVIEWS if ground == "reviews" else ANSWERS), f"method={method}", *few]
    outcome = run(config.compose([*settings, f"out={tmp_path}"]))
    assert outcome.status == "ok", outcome.reason
    scores, ids = records.read_scores(Path(str(outcome.folder)))
    shape = (len(ids["query"]), len(ids["train"]))
    assert scores["attribution/query"].shape == shape
    assert all(np.isfinite(values).all() and np.ptp(values) > 0 for values in scores.values())


def test_moments_of_adam_hold_the_l2_term() -> None:
    """After one step from zero moments: m = (1 − β₁)(∇ℓ + γθ0), where AdamW's has no γθ0."""
    settings = [*REVIEWS, "model.recipe.epochs=1", "model.recipe.batch_size=40", "model.dtype=float64"]
    task = build_task(config.compose([*settings, "model.recipe.weight_decay=0.3"]))
    run_once = train(task, 0)
    last: Checkpoint = run_once.checkpoints[-1]
    assert last.step == 1 and last.moments is not None
    model = task.initial(0)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(task.loss(model, task.train.batch()).mean(), list(parameters.values()))
    for (name, start), g in zip(parameters.items(), gradients, strict=True):
        expected = 0.1 * (g + 0.3 * start.detach())
        torch.testing.assert_close(last.moments[0][name], expected, rtol=1e-6, atol=1e-10)
