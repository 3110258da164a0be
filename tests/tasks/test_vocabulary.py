"""tasks/base: examples keep their names, seeds and keys tell apart what differs, a recipe refuses what cannot be."""

import math
import random
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import recipe, token_task, tokens, vector_task

from tasks.base import Examples, Recipe, Task, generator, named_seed
from tasks.errors import UserError

TOKENS = tokens("train", 12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=8))
def test_a_batch_is_cut_to_its_longest_row_and_no_further(rows: list[int]) -> None:
    lengths = TOKENS.lengths
    assert lengths is not None
    longest = int(lengths[rows].max())
    batch = TOKENS.batch(rows)
    assert len(batch) == len(rows)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch.inputs[name], TOKENS.inputs[name][rows, :longest])
    assert not TOKENS.inputs["attention_mask"][rows, longest:].any()
    assert torch.equal(batch.targets, TOKENS.targets[rows])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_selection_has_the_rows_in_the_given_order(kind: Any) -> None:
    chosen = TOKENS.select(kind([5, 0, 7]))
    assert chosen.ids == ("train:5", "train:0", "train:7")
    assert chosen.texts is not None and TOKENS.texts is not None
    assert chosen.texts == tuple(TOKENS.texts[i] for i in (5, 0, 7))
    assert torch.equal(chosen.targets, TOKENS.targets[[5, 0, 7]])
    assert all(torch.equal(chosen.inputs[k], v[[5, 0, 7]]) for k, v in TOKENS.inputs.items())


def test_batches_hold_every_row_once_and_put_like_lengths_together() -> None:
    parts = TOKENS.batches(5)
    assert [len(p) for p in parts] == [5, 5, 2]
    order = torch.cat(parts)
    assert sorted(order.tolist()) == list(range(12))
    lengths = TOKENS.lengths
    assert lengths is not None and (lengths[order].diff() >= 0).all()


def test_a_batch_is_cast_only_where_it_holds_real_numbers() -> None:
    vector = vector_task().train.batch([0, 1]).to("cpu", torch.float32)
    assert vector.inputs["x"].dtype == torch.float32 and vector.targets.dtype == torch.long


def test_ids_are_unique_and_columns_of_one_length() -> None:
    x = {"x": torch.zeros(2, 1)}
    with pytest.raises(ValueError, match="unique"):
        Examples(("a", "a"), x, torch.zeros(2))
    for broken in (
        lambda: Examples(("a", "b", "c"), x, torch.zeros(2)),
        lambda: Examples(("a", "b"), x, torch.zeros(3)),
        lambda: Examples(("a", "b"), x, torch.zeros(2), ("one",)),
    ):
        with pytest.raises(ValueError, match="lengths"):
            broken()


def test_a_fingerprint_changes_with_every_part_of_a_row() -> None:
    base = tokens("train", 6)
    ids, mask, targets = base.inputs["input_ids"].clone(), base.inputs["attention_mask"], base.targets.clone()
    ids[3, 0] += 1
    targets[2] = 1 - targets[2]
    assert base.texts is not None
    others = {
        "input": replace(base, inputs={"input_ids": ids, "attention_mask": mask}),
        "target": replace(base, targets=targets),
        "id": replace(base, ids=("other", *base.ids[1:])),
        "order": base.select([1, 0, 2, 3, 4, 5]),
        "fewer": base.select(range(5)),
        "name": replace(base, inputs={"ids": base.inputs["input_ids"], "attention_mask": mask}),
        "dtype": replace(base, targets=base.targets.int()),
    }
    prints = {name: e.fingerprint() for name, e in others.items()} | {"base": base.fingerprint()}
    assert len(set(prints.values())) == len(prints), prints
    assert base.fingerprint() == tokens("train", 6).fingerprint()


def test_a_fingerprint_changes_with_a_text_whose_tokens_stay() -> None:
    """Truncation and unknown words hide it from the tokens, but a method that reads texts scores it differently."""
    base = tokens("train", 3)
    assert base.texts is not None
    assert replace(base, texts=("another text", *base.texts[1:])).fingerprint() != base.fingerprint()


def test_initial_parameters_are_of_their_seed_and_leave_global_randomness_alone() -> None:
    task = vector_task()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    first = task.initial(3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_state()) == before[1] and random.getstate() == before[2]
    torch.manual_seed(99)
    again, other = task.initial(3), task.initial(4)
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert a.dtype == torch.float64
    assert not first.training


def test_a_key_changes_with_recipe_model_and_data() -> None:
    task = vector_task()
    targets = task.train.targets.clone()
    targets[0] = (targets[0] + 1) % 3
    relabelled = {**task.splits, "train": replace(task.train, targets=targets)}
    requeried = {**task.splits, "query": task.splits["query"].select([1, 0, 2, 3, 4, 5])}
    others: list[Task] = [
        vector_task(lr=0.2),
        vector_task(epochs=4),
        vector_task(betas=(0.8, 0.999)),
        vector_task(hidden=(6,)),
        replace(task, model="another"),
        replace(task, name="another"),
        replace(task, dtype=torch.float32),
        replace(task, splits=relabelled),
        replace(task, splits=requeried),
        replace(task, identity={**task.identity, "version": 2}),
    ]
    assert len({t.key() for t in [task, *others]}) == 1 + len(others)
    assert task.key() == vector_task().key()
    assert task.key() == task.public().key(), "what only the judge knows changes no training"


def test_the_public_side_has_no_annotations() -> None:
    task = replace(token_task(), facts={"train:0": "known"})
    assert task.public().annotations is None and task.public().facts == {}
    assert task.facts, "the task itself keeps them"


def test_named_seeds_are_distinct_positive_and_the_same_everywhere() -> None:
    names: list[tuple[object, ...]] = [(a, i, j) for a in ("truth", "explained") for i in range(20) for j in range(20)]
    names += [("truth", i) for i in range(400)] + [(i, j) for i in range(20) for j in range(20)] + [("1",), (1,)]
    seeds = [named_seed(*name) for name in names]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)
    assert named_seed("truth", 0, 1) == 6546440676726043653  # a change would silently orphan every stored row
    a, b = (torch.rand(3, generator=generator("batches", 1)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, torch.rand(3, generator=generator("batches", 2)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer", "rmsprop"),
        ("decay", "none"),
        ("schedule", "step"),
        ("epochs", -1),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("weight_decay", -1e-3),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("bucket", 0),
        ("checkpoints", 0),
        ("clip", 0.0),
        ("clip", -1.0),
        ("momentum", -0.1),
        ("betas", (1.0, 0.999)),
        ("betas", (0.9, -0.1)),
        ("eps", -1e-8),
        ("tolerance", 0.0),
    ],
)
def test_a_recipe_refuses_what_cannot_be_in_one_line(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"model\.recipe\.{key}=.*allowed: ") as told:
        recipe(**{key: value})
    assert "\n" not in str(told.value)


def test_a_recipe_refuses_a_decay_that_its_optimizer_does_not_have() -> None:
    """AdamW has no L2 term; SGD's weight decay *is* one, so calling it decoupled would hide it from the curvature."""
    with pytest.raises(UserError, match=r"model\.recipe\.decay"):
        recipe(optimizer="adamw", decay="l2", weight_decay=0.1)
    with pytest.raises(UserError, match=r"model\.recipe\.decay"):
        recipe(optimizer="sgd", decay="decoupled", weight_decay=0.1)
    with pytest.raises(UserError, match=r"model\.recipe\.decay"):
        recipe(optimizer="lbfgs", decay="decoupled", weight_decay=0.1)


def test_an_optimum_needs_an_objective_that_has_one() -> None:
    """Without L2 term a softmax regression has no unique optimum, nor has separable data any."""
    with pytest.raises(UserError, match=r"model\.recipe\.weight_decay"):
        recipe(optimizer="lbfgs", weight_decay=0.0)


def test_l2_is_the_objectives_own_term_only() -> None:
    assert recipe(weight_decay=0.1).l2 == 0.1
    assert recipe(optimizer="adamw", decay="decoupled", weight_decay=0.1).l2 == 0.0
    assert recipe(betas=[0.9, 0.99]).betas == (0.9, 0.99)
    assert {f.name for f in fields(Recipe)} == set(vars(recipe()))
