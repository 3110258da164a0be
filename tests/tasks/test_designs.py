"""tasks/training/plan: names of rows, seeds of regimes, subsets, leave-one-out, samples."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.base import named_seed
from tasks.errors import UserError
from tasks.training.plan import (
    Plan,
    explained_seed,
    leave_one_out,
    planned,
    random_subsets,
    stratified_sample,
)

MASKS = random_subsets(10, 4, 0.5, seed=0)


def test_equal_rows_have_equal_keys_whatever_design_asked_for_them() -> None:
    removal = planned(leave_one_out(10, [3, 7], 0.0), 1, "common", seed=0, explained=0)
    mask = torch.ones(1, 10, dtype=torch.float64)
    mask[0, 7] = 0
    assert planned(mask, 1, "common", 0, explained=5).keys() == removal.keys()[1:]
    assert planned(mask.float(), 1, "common", 0, 0).keys() == removal.keys()[1:]
    assert removal.select([1]).keys() == removal.keys()[1:]
    twice = planned(MASKS, 2, "common", 0, 0)
    assert twice.keys()[:4] == planned(MASKS, 1, "common", 0, 0).keys(), "more repeats keep the first"


def test_keys_tell_weights_seeds_and_batches_apart() -> None:
    base = torch.ones(1, 3, dtype=torch.float64)
    half, swapped = base.clone(), base.clone()
    half[0, 0], swapped[0, 1] = 0.5, 0.5
    plans = [Plan(w, (s,), o) for w in (base, half, swapped) for s in (0, 1, 2**63 - 1) for o in (False, True)]
    keys = [p.keys()[0] for p in plans]
    assert len(set(keys)) == len(keys) == 18
    assert all(len(bytes.fromhex(k)) == 32 for k in keys)


def test_regimes_have_their_seeds() -> None:
    common, fresh, fixed = (planned(MASKS, 3, regime, 1, explained=2) for regime in ("common", "fresh", "fixed"))
    assert common.seeds == tuple(named_seed("truth", 1, r) for r in range(3) for _ in range(4))
    assert len(set(common.seeds)) == 3 and len(set(fresh.seeds)) == 12
    assert fixed.seeds == (explained_seed(2),) * 4
    assert common.own_batches and fresh.own_batches and not fixed.own_batches
    assert torch.equal(common.weights, MASKS.repeat(3, 1)) and torch.equal(fixed.weights, MASKS)
    assert planned(MASKS, 3, "common", 1, explained=9).seeds == common.seeds
    assert not set(planned(MASKS, 3, "common", 2, 2).seeds) & set(common.seeds)


def test_seeds_of_truths_and_of_explained_runs_never_meet() -> None:
    explained = {explained_seed(s) for s in range(50)} | {
        named_seed("explained", s, "member", k) for s in range(50) for k in range(1, 20)
    }
    assert len(explained) == 50 * 20
    truths = {
        s for seed in range(50) for regime in ("common", "fresh") for s in planned(MASKS, 5, regime, seed, 0).seeds
    }
    assert len(truths) == 50 * (5 + 20) and not truths & explained


@settings(deadline=None, max_examples=60)
@given(st.integers(3, 40), st.floats(0.05, 0.95), st.integers(3, 12), st.integers(0, 5))
def test_random_subsets_are_distinct_and_of_the_right_size(n: int, fraction: float, subsets: int, seed: int) -> None:
    size = round(fraction * n)
    if not 0 < size < n or math.comb(n, size) < subsets:
        with pytest.raises(UserError, match="fewer" if 0 < size < n else "fraction"):
            random_subsets(n, subsets, fraction, seed)
        return
    masks = random_subsets(n, subsets, fraction, seed)
    assert masks.shape == (subsets, n) and masks.dtype == torch.float64
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert masks.sum(1).tolist() == [size] * subsets
    assert len({tuple(m.tolist()) for m in masks}) == subsets
    assert torch.equal(masks, random_subsets(n, subsets, fraction, seed))


def test_random_subsets_are_uniform_and_of_their_seed() -> None:
    often = random_subsets(20, 4000, 0.5, seed=1).mean(0)
    assert (often - 0.5).abs().max() < 4 * 0.5 / 4000**0.5
    assert not torch.equal(random_subsets(20, 5, 0.5, 1), random_subsets(20, 5, 0.5, 2))
    more = random_subsets(20, 9, 0.5, 1)
    assert torch.equal(more[:5], random_subsets(20, 5, 0.5, 1)), "more subsets keep the first"


def test_all_subsets_can_be_drawn_but_not_one_more() -> None:
    assert len({tuple(m.tolist()) for m in random_subsets(4, 6, 0.5, 0)}) == 6
    with pytest.raises(UserError, match=r"truth\.lds\.subsets=7 .*4 examples have 6"):
        random_subsets(4, 7, 0.5, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, math.nan, 0.01, 0.99])
def test_impossible_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"truth\.lds\.fraction"):
        random_subsets(10, 5, fraction, 0)


@pytest.mark.parametrize("subsets", [2, 0, -1])
def test_too_few_subsets_are_refused(subsets: int) -> None:
    with pytest.raises(UserError, match=r"truth\.lds\.subsets"):
        random_subsets(10, subsets, 0.5, 0)


def test_leave_one_out_touches_one_example_a_row() -> None:
    assert torch.equal(leave_one_out(3, [0, 1, 2], 0.0), 1 - torch.eye(3, dtype=torch.float64))
    half = leave_one_out(4, [2, 0], 0.5)
    assert half.tolist() == [[1, 1, 0.5, 1], [0.5, 1, 1, 1]]
    for weight in (1.0, -0.1, math.nan):
        with pytest.raises(UserError, match=r"truth\.loo\.weight"):
            leave_one_out(3, [0], weight)


def test_a_stratified_sample_keeps_the_proportions() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    for seed in range(5):
        for size in (10, 20, 50):
            rows = stratified_sample(labels, size, seed)
            assert rows == sorted(set(rows)) and len(rows) == size
            counts = np.bincount(labels[rows].numpy(), minlength=3)
            assert (abs(counts - size * np.array([0.6, 0.3, 0.1])) <= 1).all(), counts
    assert stratified_sample(labels, 20, 1) == stratified_sample(labels, 20, 1) != stratified_sample(labels, 20, 2)
    assert stratified_sample(labels, None, 1) == stratified_sample(labels, 100, 1) == list(range(100))


def test_a_stratified_sample_favours_no_row() -> None:
    labels = torch.tensor([0, 1] * 10)
    often = np.bincount([i for seed in range(2000) for i in stratified_sample(labels, 6, seed)], minlength=20) / 2000
    assert abs(often - 0.3).max() < 4 * (0.21 / 2000) ** 0.5


@pytest.mark.parametrize("size", [0, -1, 101])
def test_impossible_samples_are_refused(size: int) -> None:
    with pytest.raises(UserError, match=r"truth\.loo\.sample"):
        stratified_sample(torch.zeros(100), size, 0)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "nobody"])
def test_a_plan_refuses_weights_that_mean_nothing(bad: Any) -> None:
    weights = torch.ones(2, 3, dtype=torch.float64)
    weights[1] = 0.0 if bad == "nobody" else bad
    with pytest.raises(UserError, match=r"^weights"):
        Plan(weights, (1, 2), False)


def test_a_plan_needs_a_seed_a_row_and_a_regime_that_exists() -> None:
    with pytest.raises(ValueError, match="seeds"):
        Plan(torch.ones(2, 3), (1,), False)
    with pytest.raises(UserError, match=r"regime=random .*fixed, common, fresh"):
        planned(MASKS, 1, "random", 0, 0)
    with pytest.raises(UserError, match="repeats"):
        planned(MASKS, 0, "common", 0, 0)
