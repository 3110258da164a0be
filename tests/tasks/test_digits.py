"""Handwritten digits: rows named as in the source, splits apart, only training labels flipped."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from small_tasks import recipe

from tasks.base import Task
from tasks.data.corruption import Corruption
from tasks.digits import digits
from tasks.errors import UserError
from tasks.models.mlp import MLP

MODEL = MLP("mlp", (8,), 0.0, "float64", recipe())


def made(seed: int = 0, rate: float = 0.2, kind: str = "uniform", n_train: int = 100) -> Task:
    return digits(MODEL, n_train, 20, 30, seed, Corruption(rate, kind))


@pytest.mark.parametrize("kind", ["uniform", "one_class", "hard"])
def test_rows_are_those_of_the_source_and_only_training_labels_are_flipped(kind: str) -> None:
    task, source = made(rate=0.05, kind=kind), load_digits()
    assert [len(task.splits[s]) for s in ("train", "val", "query", "test")] == [100, 20, 30, 1797 - 150]
    for name, split in task.splits.items():
        rows = [int(i) for i in split.ids]
        assert np.array_equal(split.inputs["x"].numpy(), source.data[rows] / 16)
        wrong = {i for i, y in zip(split.ids, split.targets.tolist(), strict=True) if y != source.target[int(i)]}
        assert task.annotations is not None
        assert wrong == (task.annotations.flipped if name == "train" else set())
    assert task.annotations is not None and len(task.annotations.flipped) == 5
    assert all(task.annotations.clean[i] == source.target[int(i)] for i in task.train.ids)
    ids = [i for split in task.splits.values() for i in split.ids]
    assert len(set(ids)) == len(ids) == 1797


def test_the_seed_is_the_data() -> None:
    assert made(1).fingerprint() == made(1).fingerprint() != made(2).fingerprint()
    assert made(1).key() != made(1, rate=0.1).key()
    assert torch.equal(made(1, 0.2).train.inputs["x"], made(1, 0.0).train.inputs["x"])
    wider = digits(replace(MODEL, hidden=(9,)), 100, 20, 30, 1, Corruption(0.2, "uniform"))
    assert wider.key() != made(1).key() and wider.fingerprint() == made(1).fingerprint()


def test_too_many_rows_and_a_model_that_reads_text_are_refused() -> None:
    assert len(made(n_train=1746).splits["test"]) == 1
    with pytest.raises(UserError, match=r"task\.n_train=1747 .*at most 1746"):
        made(n_train=1747)
    with pytest.raises(UserError, match=r"task\.n_train=0"):
        made(n_train=0)
    with pytest.raises(UserError, match=r"model=bert .*logreg, mlp"):
        digits(type("Model", (), {"name": "bert"})(), 10, 10, 10, 0, Corruption(0.0, "uniform"))


def test_a_model_with_hidden_layers_is_not_solved_to_an_optimum() -> None:
    """Its objective is not convex: from zero, where the solver starts, hidden layers never move."""
    solved = recipe(optimizer="lbfgs", weight_decay=0.1)
    assert digits(MLP("logreg", (), 0.0, "float64", solved), 20, 5, 5, 0, Corruption(0.0, "uniform")).recipe is solved
    with pytest.raises(UserError, match="lbfgs"):
        digits(MLP("mlp", (8,), 0.0, "float64", solved), 20, 5, 5, 0, Corruption(0.0, "uniform"))


def test_hard_flips_of_a_training_set_too_small_for_all_classes() -> None:
    task = made(rate=0.2, kind="hard", n_train=20)
    assert task.annotations is not None and len(task.annotations.flipped) == 4
