"""Planted label errors: how many, which, to what, and what the judge is told."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from tasks.data.corruption import KINDS, Corruption
from tasks.errors import UserError

N, CLASSES = 300, 3
IDS = [f"row:{i}" for i in range(N)]
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, CLASSES, N)
FEATURES = RNG.normal(size=(N, 5)) + 1.5 * np.eye(CLASSES, 5)[LABELS]


def flips(
    kind: str, rate: float = 0.1, seed: int = 0, labels: np.ndarray = LABELS, classes: int = CLASSES
) -> np.ndarray:
    """The labels after corruption, with what holds for every kind checked."""
    before = labels.copy()
    found, annotations = Corruption(rate, kind).apply(
        IDS[: len(labels)], labels, classes, FEATURES[: len(labels)], seed
    )
    changed = np.flatnonzero(found != labels)
    assert len(changed) == round(rate * len(labels)), "the rate is of the whole training set"
    assert annotations.flipped == {IDS[i] for i in changed}
    assert annotations.clean == dict(zip(IDS, labels.tolist(), strict=False))
    assert set(found.tolist()) <= set(range(classes))
    assert np.array_equal(labels, before), "what was handed in stays as it was"
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.3])
def test_the_rate_is_of_the_whole_training_set(kind: str, rate: float) -> None:
    flips(kind, rate)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_flips_the_same_rows(kind: str) -> None:
    assert np.array_equal(flips(kind, seed=1), flips(kind, seed=1))
    if kind != "hard":  # what is hard is no matter of chance
        assert not np.array_equal(flips(kind, seed=1), flips(kind, seed=2))


def test_uniform_takes_any_row_and_any_wrong_label() -> None:
    rows, pairs = np.zeros(N), np.zeros((CLASSES, CLASSES))
    for seed in range(400):
        found = flips("uniform", 0.2, seed)
        rows += found != LABELS
        np.add.at(pairs, (LABELS[found != LABELS], found[found != LABELS]), 1)
    assert abs(rows / 400 - 0.2).max() < 4.5 * (0.16 / 400) ** 0.5
    shares = pairs / pairs.sum(1, keepdims=True)
    np.testing.assert_allclose(shares, (1 - np.eye(CLASSES)) / 2, atol=0.02)


def test_one_class_takes_rows_of_class_one_only() -> None:
    found = flips("one_class", 0.2)
    assert set(LABELS[found != LABELS].tolist()) == {1}
    binary = (LABELS == 1).astype(int)
    assert set(flips("one_class", 0.2, labels=binary, classes=2)[binary == 0].tolist()) == {0}
    share = (LABELS == 1).mean()
    flips("one_class", share)
    with pytest.raises(UserError, match=rf"task\.corruption\.rate=0\.5 .*at most {share:.3f}"):
        flips("one_class", 0.5)


def test_hard_takes_the_most_ambiguous_rows_and_their_likeliest_wrong_label() -> None:
    """Against other folds: with 4,000 rows it hardly matters which rows a model was fitted to."""
    n, rng = 4000, np.random.default_rng(1)
    labels = rng.integers(0, CLASSES, n)
    features = rng.normal(size=(n, 5)) + 1.5 * np.eye(CLASSES, 5)[labels]
    found, _ = Corruption(0.1, "hard").apply([str(i) for i in range(n)], labels, CLASSES, features, 0)
    changed = np.flatnonzero(found != labels)
    p = cross_val_predict(LogisticRegression(max_iter=1000), features, labels, cv=10, method="predict_proba")
    two = np.sort(p, 1)[:, -2:]
    gap = two[:, 1] - two[:, 0]
    assert len(changed) == 400 and (gap[changed] <= np.quantile(gap, 0.1)).mean() > 0.85
    assert gap[changed].max() < np.quantile(gap, 0.15)
    masked = p.copy()
    masked[np.arange(n), labels] = -1
    assert (found == masked.argmax(1))[changed].mean() > 0.95


def test_hard_flips_with_a_class_that_no_row_has() -> None:
    """A small training set may lack a class altogether."""
    labels = np.where(LABELS == 1, 2, LABELS)
    found = flips("hard", 0.1, labels=labels)
    assert set(found.tolist()) == {0, 2}


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(UserError, match=r"task\.corruption\.rate"):
        Corruption(rate, "uniform")


def test_impossible_kinds_are_refused_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"task\.corruption\.kind=random .*uniform, one_class, hard"):
        Corruption(0.1, "random")
