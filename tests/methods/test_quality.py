"""Values of labels against hand counts, numpy and cleanlab; planted errors are found by all that look at labels."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from cases import bert, close, draw, logistic, perceptron, problem_of, task_of, three_classes
from hypothesis import given, settings
from hypothesis import strategies as st
from models import regression
from torch import Tensor

from methods.base import Method, Problem, Unsupported
from methods.baselines import Loss
from methods.curvature.damping import Damping
from methods.quality.aum import AreaUnderMargin
from methods.quality.confidence import Confidence, Entropy, Margin
from methods.quality.confident_learning import ConfidentLearning, folds_of, mislabelled, quality
from methods.quality.forgetting import Forgetting, forgotten
from methods.quality.knn_disagreement import KNNDisagreement
from methods.quality.mahalanobis import Mahalanobis
from tasks.base import Checkpoint, Examples, Task, Trajectory
from tasks.errors import UserError
from tasks.objectives.classification import Classification
from tasks.training.plan import Plan
from tasks.training.predictions import per_class
from tasks.training.train import load, train

DAMPING = Damping("mean_eigenvalue", 0.1, "block")
QUALITY: dict[str, Method] = {
    "confidence": Confidence(),
    "margin": Margin(),
    "aum": AreaUnderMargin(),
    "forgetting": Forgetting(),
    "mahalanobis": Mahalanobis(None, "mean", DAMPING),
    "knn_disagreement": KNNDisagreement(None, "mean", 5),
    "confident_learning": ConfidentLearning(4),
}


def retraining(task: Task, plan: Plan) -> dict[str, np.ndarray]:
    """One by one, as the engines would."""
    found: dict[str, list[np.ndarray]] = {"val": [], "query": []}
    for weights, seed in zip(plan.weights, plan.seeds, strict=True):
        model = load(task.initial(0), train(task, seed, weights, plan.own_batches).final)
        with torch.no_grad():
            for split, rows in found.items():
                rows.append(task.measure(model, task.splits[split].batch()).numpy())
    return {**{split: np.stack(rows) for split, rows in found.items()}, "seconds": np.ones(len(plan))}


def trained(task: Task) -> Problem:
    return Problem(task, 0, partial(train, task), retraining=retraining)


def gaussians() -> tuple[Task, Tensor]:
    """Two classes, six deviations apart, 30 rows each, and the 6 rows that have the other's label."""
    draws = draw(5)
    y = torch.arange(60) % 2
    x = torch.randn(60, 2, generator=draws, dtype=torch.float64) + 3 * (2 * y[:, None] - 1)
    wrong = torch.zeros(60, dtype=torch.bool)
    wrong[torch.randperm(60, generator=draws)[:6]] = True
    rows = Examples(tuple(f"row{i}" for i in range(60)), {"x": x}, torch.where(wrong, 1 - y, y))
    query = Examples(("a", "b"), {"x": x[:2]}, y[:2])
    build = partial(perceptron, 2, 2)
    return task_of(rows, query, build, Classification(2), epochs=10, batch_size=10, checkpoints=5), wrong


@pytest.mark.parametrize("name", QUALITY)
def test_planted_errors_come_first(name: str) -> None:
    from sklearn.metrics import roc_auc_score

    task, wrong = gaussians()
    value = QUALITY[name].value(trained(task))
    assert value.shape == (60,) and value.dtype == torch.float64
    assert roc_auc_score(wrong, -value) > 0.95


# Of the model's answer


def by_hand(checkpoints: Sequence[Sequence[float]]) -> Problem:
    """Three classes, x = 1; each checkpoint gives the same logits to all rows, whose labels are 0, 1, 2."""
    rows = Examples(tuple("abc"), {"x": torch.ones(3, 1, dtype=torch.float64)}, torch.tensor([0, 1, 2]))
    task = task_of(rows, rows, partial(perceptron, 1, 3, True), Classification(3))
    name = next(n for n, p in task.initial(0).named_parameters() if p.ndim == 1)
    start = {n: p.detach() for n, p in task.initial(0).named_parameters()}
    kept = [{**start, name: torch.tensor(logits, dtype=torch.float64)} for logits in checkpoints]
    states = tuple(Checkpoint(t, parameters, 1.0) for t, parameters in enumerate(kept))
    return Problem(task, 0, lambda k: Trajectory(k, start, states, 0.0, 0.0))


def test_the_models_answer_by_hand() -> None:
    """p = (½, ⅓, ⅙)."""
    problem = by_hand([[9.0, 9.0, 9.0], [math.log(3), math.log(2), 0.0]])  # the last checkpoint is the model
    p = torch.tensor([1 / 2, 1 / 3, 1 / 6], dtype=torch.float64)
    assert close(Confidence().value(problem), p, 1e-14)
    assert close(Margin().value(problem), (p / (1 - p)).log(), 1e-14)
    assert close(Entropy().value(problem), (p * p.log()).sum().expand(3), 1e-14)


def test_certainty_has_no_entropy() -> None:
    assert Entropy().value(by_hand([[0.0, 2000.0, 0.0]])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("make", [three_classes, bert])
def test_confidence_and_margin_rank_as_the_loss(make: object) -> None:
    problem = problem_of(make())  # type: ignore[operator]
    loss = Loss().value(problem)
    assert close(Confidence().value(problem), loss.exp()) and close(Margin().value(problem).sigmoid(), loss.exp())


def test_entropy_does_not_look_at_labels() -> None:
    task = three_classes()
    other = replace(task, splits={**task.splits, "train": replace(task.train, targets=(task.train.targets + 1) % 3)})
    assert torch.equal(Entropy().value(problem_of(task)), Entropy().value(problem_of(other)))
    assert not Entropy().signed


# Of checkpoints


def test_the_area_under_the_margin_by_hand() -> None:
    """Leads of labels 0, 1, 2: 3, −3, −4 with logits (4, 1, 0), and −1, −3, 1 with (2, 0, 3)."""
    found = AreaUnderMargin().value(by_hand([[4.0, 1.0, 0.0], [2.0, 0.0, 3.0]]))
    assert close(found, torch.tensor([1.0, -3.0, -1.5], dtype=torch.float64), 1e-15)


def test_forgetting_by_hand() -> None:
    """Label 0 is lost twice, label 1 once, label 2 is never right; a tie is not right."""
    lost = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]]
    assert Forgetting().value(by_hand([[float(z) for z in row] for row in lost])).tolist() == [-2, -1, -4]


def test_forgetting_of_sequences() -> None:
    sequences = ["1111", "0001", "0101", "1010", "1000", "0000", "0110"]
    right = torch.tensor([[c == "1" for c in s] for s in sequences]).T
    assert forgotten(right).tolist() == [0, 0, 1, 2, 1, 4, 1]
    assert forgotten(torch.tensor([[True, False]])).tolist() == [0, 1]


# Of features


def test_the_mahalanobis_distance_is_numpys() -> None:
    task = logistic()
    x, y = task.train.inputs["x"].numpy(), task.train.targets.numpy()
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    off = x - means[y]
    covariance = np.cov(off.T, bias=True)  # off has mean 0
    for strength in (0.0, 0.7):
        inverse = np.linalg.inv(covariance + strength * np.eye(3))
        found = Mahalanobis(None, "mean", Damping("absolute", strength, "block")).value(problem_of(task))
        assert close(found, -torch.as_tensor(np.einsum("nd,de,ne->n", off, inverse, off)), 1e-10)
    # Σ_i off_iᵀ Σ⁻¹ off_i = N d
    undamped = Mahalanobis(None, "mean", Damping("absolute", 0.0, "block")).value(problem_of(task))
    assert undamped.sum().item() == pytest.approx(-12 * 3)


def test_rows_without_others_lie_on_their_mean() -> None:
    task = logistic(rows=3)
    alone = replace(task, splits={**task.splits, "train": replace(task.train, targets=torch.tensor([0, 2, 1]))})
    assert Mahalanobis(None, "mean", DAMPING).value(problem_of(alone)).tolist() == [0, 0, 0]


def test_disagreement_by_hand() -> None:
    x = torch.tensor([[0.0], [1.0], [2.5], [9.0], [10.5]], dtype=torch.float64)
    rows = Examples(tuple("abcde"), {"x": x}, torch.tensor([0, 0, 1, 1, 1]))
    problem = problem_of(task_of(rows, rows, partial(perceptron, 1, 2), Classification(2)))
    assert KNNDisagreement(None, "mean", 1).value(problem).tolist() == [0, 0, -1, 0, 0]
    assert KNNDisagreement(None, "mean", 2).value(problem).tolist() == [-0.5, -0.5, -1, 0, 0]
    assert KNNDisagreement(None, "mean", 4).value(problem).tolist() == [-0.75, -0.75, -0.5, -0.5, -0.5]


def test_copies_of_a_row_are_its_neighbours_and_the_row_is_not() -> None:
    x = torch.ones(4, 1, dtype=torch.float64)
    rows = Examples(tuple("abcd"), {"x": x}, torch.tensor([0, 1, 1, 1]))
    problem = problem_of(task_of(rows, rows, partial(perceptron, 1, 2), Classification(2)))
    assert KNNDisagreement(None, "mean", 3).value(problem).mul(3).round().tolist() == [-3, -1, -1, -1]
    with pytest.raises(UserError, match=r"method\.k=4.*1 to 3, the other training rows"):
        KNNDisagreement(None, "mean", 4).unmet(problem.task)


# Confident learning


def test_the_rule_by_hand() -> None:
    """t = (0.6, 0.5875): rows 2 and 6 are confidently the other class, row 3 is of neither, the rest of their own."""
    first = torch.tensor([0.95, 0.7, 0.15, 0.45, 0.3, 0.05, 0.85], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    p = torch.stack([first, 1 - first], 1)
    assert p[:3, 0].mean() == pytest.approx(0.6) and p[3:, 1].mean() == pytest.approx(0.5875)
    assert mislabelled(p, labels).tolist() == [False, False, True, False, False, False, True]
    margins = torch.tensor([0.9, 0.4, -0.7 - 2, 0.1, 0.4, 0.9, -0.7 - 2], dtype=torch.float64)
    assert close(quality(p, labels), margins, 1e-12)


def test_one_confident_class_is_enough_and_the_label_may_be_the_most_probable() -> None:
    """t = (0.3, 0.5, 0.2): the last row's label is its most probable class of the two that are confident."""
    p = torch.tensor([[0.3, 0.35, 0.35], [0.3, 0.5, 0.2], [0.45, 0.35, 0.2]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    assert mislabelled(p, labels).tolist() == [True, False, True]
    assert not mislabelled(p, torch.tensor([2, 1, 0])).any()


@pytest.mark.skipif(importlib.util.find_spec("cleanlab") is None, reason="cleanlab is not installed: make peers")
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_cleanlab_says_the_same(seed: int, classes: int) -> None:
    from cleanlab.count import compute_confident_joint
    from cleanlab.rank import get_label_quality_scores

    draws = np.random.default_rng(seed)
    labels = np.arange(40) % classes
    p = draws.dirichlet(np.ones(classes), 40)
    p[np.arange(40), labels] += draws.random(40)
    p /= p.sum(1, keepdims=True)
    _, off = compute_confident_joint(labels, p, calibrate=False, return_indices_of_off_diagonals=True)
    thresholds = np.array([p[labels == c, c].mean() for c in range(classes)])
    # Of two or more confident classes it takes the most probable of all, the paper the most probable of these.
    compared = (p >= thresholds).sum(1) < 2
    compared |= (p >= thresholds)[np.arange(40), p.argmax(1)]
    found = mislabelled(torch.as_tensor(p), torch.as_tensor(labels)).numpy()
    assert compared.sum() > 20 and np.array_equal(found[compared], np.isin(np.arange(40), off)[compared])
    margin = get_label_quality_scores(labels, p, method="normalized_margin")
    ours = quality(torch.as_tensor(p), torch.as_tensor(labels)).numpy() + 2 * found
    np.testing.assert_allclose(ours, 2 * margin - 1, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=30), st.integers(2, 4), st.randoms(use_true_random=False))
def test_folds_share_every_label_and_do_not_see_the_order(labels: list[int], folds: int, random: object) -> None:
    ids = [f"r{i}" for i in range(len(labels))]
    found = folds_of(ids, labels, folds, "test")
    for c in set(labels):
        sizes = torch.bincount(found[torch.tensor(labels) == c], minlength=folds)
        assert sizes.max() - sizes.min() <= 1
    sizes = torch.bincount(found, minlength=folds)
    assert sizes.max() - sizes.min() <= 1 and sizes.min() >= 1
    order = list(range(len(ids)))
    random.shuffle(order)  # type: ignore[attr-defined]
    again = folds_of([ids[i] for i in order], [labels[i] for i in order], folds, "test")
    assert torch.equal(again, found[order])


def test_each_row_is_asked_about_by_the_model_that_did_not_see_it() -> None:
    task = replace(bert(), recipe=replace(bert().recipe, epochs=2, lr=0.05))
    problem, method = trained(task), ConfidentLearning(3)
    found = method.probabilities(problem, torch.arange(2))
    assert close(found.sum(1), torch.ones(12, dtype=torch.float64), 1e-12)
    assert problem.meter.trainings == method.retrainings(task) == 3
    plans: list[Plan] = []

    def seen(asked: Task, plan: Plan) -> dict[str, np.ndarray]:
        plans.append(plan)
        return retraining(asked, plan)

    assert torch.equal(method.probabilities(replace(problem, retraining=seen), torch.arange(2)), found)
    (plan,) = plans
    assert (plan.weights.sum(0) == 2).all() and len(set(plan.seeds)) == 3
    for weights, seed in zip(plan.weights, plan.seeds, strict=True):
        model = load(task.initial(0), train(task, seed, weights, own_batches=True).final)
        out = weights == 0
        expected = model(**task.train.batch().inputs)[out].softmax(1).detach()
        assert close(found[out], expected, 1e-9)


def test_copies_for_each_class() -> None:
    rows = replace(bert().train.select([0, 3]), texts=("a", "b"))
    found = per_class(rows, torch.tensor([1, 4]))
    assert found.ids == ("train0/1", "train0/4", "train3/1", "train3/4") and found.texts == ("a", "a", "b", "b")
    assert found.targets.tolist() == [1, 4, 1, 4]
    assert torch.equal(found.inputs["input_ids"], rows.inputs["input_ids"][[0, 0, 1, 1]])


# Needs


def test_what_tasks_lack_is_told_before_training() -> None:
    for method in [*QUALITY.values(), Entropy()]:
        assert "class labels" in (method.unmet(regression()) or "")
        assert method.unmet(gaussians()[0]) is None
        assert not method.offers("attribute")
    solved = replace(three_classes(), recipe=replace(three_classes().recipe, optimizer="lbfgs"))
    for name in ("aum", "forgetting"):
        assert "checkpoints" in (QUALITY[name].unmet(solved) or "")
    with pytest.raises(UserError, match=r"method\.folds=13.*2 to 12"):
        ConfidentLearning(13).unmet(three_classes())
    with pytest.raises(UserError, match=r"method\.folds=1 "):
        ConfidentLearning(1)
    one = three_classes()
    one = replace(one, splits={**one.splits, "train": replace(one.train, targets=torch.zeros(12, dtype=torch.long))})
    assert "two classes" in (ConfidentLearning(2).unmet(one) or "")
    with pytest.raises(Unsupported, match="nothing can be retrained"):
        ConfidentLearning(2).value(problem_of(three_classes()))


def test_a_diverged_fold_is_no_answer() -> None:
    def diverged(task: Task, plan: Plan) -> dict[str, np.ndarray]:
        return {k: v * np.nan for k, v in retraining(task, plan).items()}

    with pytest.raises(Unsupported, match="diverged"):
        ConfidentLearning(2).value(replace(trained(three_classes()), retraining=diverged))
