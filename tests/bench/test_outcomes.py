"""What follows from a ranking, on two clouds of points with planted errors: every figure by training it by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.evaluations.accuracy import gain
from bench.evaluations.base import Case, NotApplicable
from bench.evaluations.brittleness import Brittleness
from bench.evaluations.repair import Repair
from bench.evaluations.selection import Selection
from bench.statistics import Array, crossed
from methods.base import Unsupported
from tasks.base import Annotations, Checkpoint, Examples, Recipe, Task, Trajectory, named_seed
from tasks.errors import UserError
from tasks.models.mlp import Perceptron
from tasks.objectives.classification import Classification
from tasks.objectives.regression import Regression
from tasks.training.engines import Executor
from tasks.training.predictions import classes_of, margins, per_class
from tasks.training.train import load, train

N, SIZE = 60, 12
CLASSES = 3
RECIPE = Recipe("lbfgs", 1.0, 1, 10, 0.05, "l2", "constant", 0.0, 0.0, (0.9, 0.999), 1e-8, None, 1, 1, 1e-8)


def clouds(name: str, rows: int) -> Examples:
    draw = torch.Generator().manual_seed(rows)
    labels = torch.arange(rows) % CLASSES
    centres = torch.tensor([[2.0, 0], [-1, 2], [-1, -2]], dtype=torch.float64)
    x = centres[labels] + torch.randn(rows, 2, generator=draw, dtype=torch.float64)
    return Examples(tuple(f"{name}:{i}" for i in range(rows)), {"x": x}, labels)


CLEAN = clouds("train", N)
WRONG = np.random.default_rng(0).permutation(N)[:SIZE]
TARGETS = CLEAN.targets.clone()
TARGETS[WRONG] = (TARGETS[WRONG] + 1) % CLASSES
TASK = Task(
    name="clouds",
    splits={
        "train": replace(CLEAN, targets=TARGETS),
        **{k: clouds(k, n) for k, n in {"val": 6, "query": 9, "test": 300}.items()},
    },
    build=partial(Perceptron, [2, CLASSES]),
    objective=Classification(CLASSES),
    recipe=RECIPE,
    model="logreg",
    source="generated",
    floor={},
    identity={"version": 1},
    dtype=torch.float64,
    annotations=Annotations(
        frozenset(f"train:{i}" for i in WRONG), {f"train:{i}": int(y) for i, y in enumerate(CLEAN.targets)}
    ),
)
NOTHING = Trajectory(0, {}, (Checkpoint(1, {}, 0.0),), 0.0, 0.0)


def missing() -> Array:
    raise Unsupported("not offered")


def case(
    store: Path,
    value: Array | None = None,
    attribution: dict[str, Array] | None = None,
    task: Task = TASK,
) -> Case:
    return Case(
        task=task,
        seed=0,
        trajectory=NOTHING,
        attribution=lambda split: missing() if attribution is None else attribution[split],
        value=missing if value is None else lambda: value,
        calibrated=False,
        store=store,
        executor=Executor("vectorised", 1),
        progress=lambda *_: None,
    )


def accuracy(train_rows: Examples, test: Examples = TASK.splits["test"]) -> float:
    """By hand: the optimum is unique, so that no seed matters."""
    task = replace(TASK, splits={**TASK.splits, "train": train_rows})
    model = load(task.initial(0), train(task, 0).final)
    return float((model(test.inputs["x"]).argmax(-1) == test.targets).double().mean())


def without(rows: Sequence[int]) -> Examples:
    return TASK.train.select(sorted(set(range(N)) - set(rows)))


def relabelled(rows: Sequence[int]) -> Examples:
    targets = TARGETS.clone()
    targets[list(rows)] = CLEAN.targets[list(rows)]
    return replace(TASK.train, targets=targets)


ACTIONS: dict[str, Callable[[Sequence[int]], Examples]] = {"relabel": relabelled, "remove": without}
SUSPICION = np.where(np.isin(np.arange(N), WRONG), -1.0, 0.0) + 1e-3 * np.arange(N)  # the wrong ones lowest


def drawn(name: str, repeats: int, size: int) -> list[list[int]]:
    rng = np.random.default_rng(named_seed(name, 7))
    return [rng.permutation(N)[:size].tolist() for _ in range(repeats)]


def test_every_class_asked_tells_the_prediction() -> None:
    test = TASK.splits["test"]
    asked = per_class(test, torch.arange(CLASSES))
    assert asked.ids[:4] == ("test:0/0", "test:0/1", "test:0/2", "test:1/0") and len(asked) == 300 * CLASSES
    model = load(TASK.initial(0), train(TASK, 0).final)
    with torch.no_grad():
        measured = TASK.measure(model, asked.batch()).numpy()
        wanted = TASK.outputs(model, test.batch()).softmax(-1).numpy()
    found = margins(np.stack([measured, -measured]), classes_of(TASK))
    assert found.shape == (2, 300, CLASSES)
    np.testing.assert_allclose(1 / (1 + np.exp(-found[0])), wanted, atol=1e-12)


@pytest.mark.parametrize("action", ["relabel", "remove"])
def test_repair_by_hand(action: str, tmp_path: Path) -> None:
    judged, act = Repair(0.2, (action,), 6, 7), ACTIONS[action]
    found = judged.evaluate(case(tmp_path, SUSPICION, {"val": np.stack([-SUSPICION, -SUSPICION])}))
    random = np.mean([accuracy(act(rows)) for rows in drawn("repair", 6, SIZE)])
    assert found[f"random_{action}_accuracy"].value == pytest.approx(random)
    best, worst = np.argsort(SUSPICION)[:SIZE], np.argsort(-SUSPICION)[:SIZE]
    assert found[f"value_{action}_gain"].value == pytest.approx(accuracy(act(best)) - random)
    assert found[f"attribution_{action}_gain"].value == pytest.approx(accuracy(act(worst)) - random)
    assert found[f"oracle_{action}_gain"].value == pytest.approx(found[f"value_{action}_gain"].value)
    assert found[f"value_{action}_gain"].value > 0.02 > found[f"attribution_{action}_gain"].value
    low, high = (found[f"value_{action}_gain"].entry()[k] for k in ("low", "high"))
    assert 0 < low < found[f"value_{action}_gain"].value < high


def test_a_person_changes_wrong_labels_only(tmp_path: Path) -> None:
    right = [i for i in range(N) if i not in WRONG]
    first = np.where(np.isin(np.arange(N), right[:SIZE]), -1.0, 0.0)
    found = Repair(0.2, ("relabel",), 2, 7).evaluate(case(tmp_path, first))
    assert found["value_relabel_gain"].value + found["random_relabel_accuracy"].value == pytest.approx(
        accuracy(TASK.train)
    )


def test_selection_by_hand(tmp_path: Path) -> None:
    found = Selection((0.5,), 2, 7).evaluate(case(tmp_path, SUSPICION))
    rng = np.random.default_rng(named_seed("selection", 7))
    random = np.mean([accuracy(TASK.train.select(rng.permutation(N)[: N // 2])) for _ in range(2)])
    chosen = accuracy(TASK.train.select(np.argsort(-SUSPICION)[: N // 2]))
    assert found["value_select50_gain"].value == pytest.approx(chosen - random) and chosen > random
    assert set(found) == {"value_select50_gain"}


def test_brittleness_by_hand(tmp_path: Path) -> None:
    """A query rests on its own class first, one of the others first: the labels say who helps."""
    queries = TASK.splits["query"]
    scores = (queries.targets[:, None] == TASK.train.targets[None]).double().numpy() + 1e-3 * np.arange(N)
    found = Brittleness(20, (0.1, 0.3, 0.4), 1, 7).evaluate(case(tmp_path, attribution={"query": scores}))
    model = load(TASK.initial(0), train(TASK, 0).final)
    asked = [q for q in range(9) if model(queries.inputs["x"][q]).argmax() == queries.targets[q]]
    supports = []
    for q in asked:
        order = np.argsort(-scores[q])
        kept = [accuracy(without(order[: round(share * N)]), queries.select([q])) for share in (0.1, 0.3, 0.4)]
        supports.append(next((s for s, right in zip((0.1, 0.3, 0.4), kept, strict=True) if not right), 1.0))
    assert len(set(supports)) > 1, "some flip, some do not"
    assert found["support"].value == pytest.approx(np.mean(supports)) and found["support"].n == len(asked)
    for share in (0.1, 0.3, 0.4):
        assert found[f"flipped{100 * share:g}"].value >= np.mean(np.array(supports) == share)
    assert found["flipped40"].value > 0.5
    opposite = Brittleness(20, (0.3,), 1, 7).evaluate(case(tmp_path, attribution={"query": -scores}))
    assert opposite["flipped30"].value == 0 and opposite["support"].value == 1


def test_a_gain_is_paired_by_seed_and_row() -> None:
    """What all models of a repeat, or all models on a row, have in common does not widen the interval."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(8, 1)) + rng.normal(size=(1, 50))
    one, other = noise + 0.25, noise + 0.0
    found = gain(one, other, {"a": 1})
    assert found.value == pytest.approx(0.25)
    np.testing.assert_allclose(crossed(found.replicates), 0, atol=1e-12)
    rows = gain(one + rng.normal(size=(8, 1)), other, {"a": 1})
    assert crossed(rows.replicates).std() == pytest.approx(1 / 8**0.5, rel=0.6)


def test_what_cannot_be_is_refused_before_anything_is_trained() -> None:
    regression = replace(
        TASK,
        objective=Regression(),
        splits={**TASK.splits, "train": replace(CLEAN, targets=CLEAN.targets.double())},
    )
    clean = replace(TASK, annotations=None)
    repair, selection = Repair(0.1, ("remove",), 2, 0), Selection((0.3,), 2, 0)
    for judged in (repair, selection, Brittleness(3, (0.1,), 1, 0)):
        with pytest.raises(NotApplicable, match="class labels"):
            judged.plan(regression, 0)  # type: ignore[attr-defined]
    with pytest.raises(NotApplicable, match=r"task\.corruption\.rate"):
        repair.plan(clean, 0)
    assert selection.plan(clean, 0) is None
    made: list[tuple[str, Callable[[], Any]]] = [
        ("truth.repair.share", lambda: Repair(1.0, ("remove",), 2, 0)),
        ("truth.repair.repeats", lambda: Repair(0.1, ("remove",), 1, 0)),
        ("truth.repair.actions", lambda: Repair(0.1, ("burn",), 2, 0)),
        ("truth.repair.actions", lambda: Repair(0.1, (), 2, 0)),
        ("truth.repair.share", lambda: Repair(0.001, ("remove",), 2, 0).plan(TASK, 0)),
        ("truth.selection.shares", lambda: Selection((0.0,), 2, 0)),
        ("truth.selection.shares", lambda: Selection((), 2, 0)),
        ("truth.selection.shares", lambda: Selection((0.001,), 2, 0).plan(TASK, 0)),
        ("truth.brittleness.queries", lambda: Brittleness(0, (0.1,), 1, 0)),
        ("truth.brittleness.shares", lambda: Brittleness(3, (0.001,), 1, 0).plan(TASK, 0)),
    ]
    for key, make in made:
        with pytest.raises(UserError, match=key):
            make()


def test_a_method_that_offers_nothing_is_not_judged(tmp_path: Path) -> None:
    for judged in (Repair(0.1, ("remove",), 2, 0), Selection((0.3,), 2, 0)):
        with pytest.raises((NotApplicable, Unsupported)):
            judged.evaluate(case(tmp_path))
