"""tasks/training/plan: names of rows, seeds of regimes, subsets, groups left out, coalitions, samples."""

import math
from itertools import pairwise
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
    class_groups,
    coalitions,
    explained_seed,
    leave_one_out,
    leave_out,
    partition,
    planned,
    random_groups,
    random_subsets,
    rotations,
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


def test_subsets_of_one_seed_are_nested() -> None:
    by_fraction = [random_subsets(40, 30, fraction, seed=3) for fraction in (0.1, 0.25, 0.5, 0.9)]
    for small, large in pairwise(by_fraction):
        assert (small <= large).all() and (small.sum(1) < large.sum(1)).all()
    assert not (by_fraction[0] <= random_subsets(40, 30, 0.5, seed=4)).all()


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


def test_leave_out_touches_one_group_a_row() -> None:
    assert leave_out(4, [[0, 2], [3]], 0.0).tolist() == [[0, 1, 0, 1], [1, 1, 1, 0]]
    assert leave_out(4, [[0, 2], [3]], 1.5).tolist() == [[1.5, 1, 1.5, 1], [1, 1, 1, 1.5]]
    assert torch.equal(leave_out(5, [[4], [1]], 0.25), leave_one_out(5, [4, 1], 0.25))
    for weight in (1.0, -0.1, math.nan):
        with pytest.raises(UserError, match=r"^weight"):
            leave_out(3, [[0]], weight)


def test_random_groups_are_disjoint_as_long_as_they_can_be() -> None:
    groups = random_groups(20, 7, 6, seed=2)
    assert [len(set(g)) for g in groups] == [6] * 7 and all(g == sorted(g) for g in groups)
    for at in (0, 3):  # three fit into 20 rows, then the rows are shuffled anew
        assert len({row for g in groups[at : at + 3] for row in g}) == 18
    assert {row for g in groups for row in g} <= set(range(20))
    assert groups == random_groups(20, 9, 6, seed=2)[:7] != random_groups(20, 7, 6, seed=3)
    often = np.bincount([i for s in range(1000) for g in random_groups(20, 2, 5, s) for i in g], minlength=20) / 1000
    assert abs(often - 0.5).max() < 4 * 0.5 / 1000**0.5


def test_class_groups_are_of_one_class_each_in_turn() -> None:
    labels = torch.tensor([0, 1, 2, 1, 1, 0, 2, 2, 1, 0, 0, 1])
    groups = class_groups(labels, 8, 3, seed=0)
    assert [labels[g].unique().tolist() for g in groups] == [[c] for c in (0, 1, 2, 0, 1, 2, 0, 1)]
    assert all(len(set(g)) == 3 and g == sorted(g) for g in groups)
    assert groups[2] == groups[5] == [2, 6, 7], "a class of three has one such group"
    assert groups == class_groups(labels, 8, 3, seed=0) != class_groups(labels, 8, 3, seed=1)
    apart = class_groups(torch.tensor([5, 9, 5, 9]), 3, 2, seed=0)
    assert apart == [[0, 2], [1, 3], [0, 2]], "classes need not be counted from 0"


@pytest.mark.parametrize(("n", "players"), [(12, 4), (13, 4), (5, 5), (40, 3)])
def test_a_partition_deals_out_every_row_once(n: int, players: int) -> None:
    groups = partition(n, players, seed=1)
    assert sorted(row for g in groups for row in g) == list(range(n))
    assert len(groups) == players and max(map(len, groups)) - min(map(len, groups)) <= 1
    assert groups == partition(n, players, seed=1)
    assert n == players or groups != partition(n, players, seed=2)


def test_rotations_put_each_player_at_each_place_equally_often() -> None:
    orders = rotations(5, 3, seed=0)
    assert orders.shape == (15, 5) and (np.sort(orders, axis=1) == np.arange(5)).all()
    for place in range(5):
        assert np.bincount(orders[:, place]).tolist() == [3] * 5
    for square in orders.reshape(3, 5, 5):
        assert {tuple(np.roll(square[0], k)) for k in range(5)} == {tuple(order) for order in square}
    assert np.array_equal(orders[:5], rotations(5, 1, seed=0)), "more squares keep the first"


def test_rotations_are_uniform_among_all_orders() -> None:
    orders, often = np.unique(rotations(3, 3000, seed=0), axis=0, return_counts=True)
    assert len(orders) == 6
    assert abs(often / 9000 - 1 / 6).max() < 4 * (0.25 / 3000) ** 0.5 / 3  # two classes of rotations, three orders each


def test_coalitions_are_the_beginnings_of_the_orders() -> None:
    groups = [[0, 3], [1], [2, 4]]
    masks = coalitions(np.array([[2, 0, 1], [1, 2, 0]]), groups, 6)
    assert masks.dtype == torch.float64
    assert masks.tolist() == [
        [0, 0, 1, 0, 1, 0],
        [1, 0, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 1, 0],
        [1, 1, 1, 1, 1, 0],
    ]


def test_coalitions_of_a_square_are_as_few_trainings_as_there_are() -> None:
    players, groups = 6, partition(20, 6, seed=0)
    masks = coalitions(rotations(players, 1, 0), groups, 20)
    plan = planned(masks, 1, "common", 0, 0)
    assert len(plan) == players**2 and len(set(plan.keys())) == players * (players - 1) + 1


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


def test_a_stratified_sample_of_real_targets_takes_of_every_quarter() -> None:
    targets = torch.linspace(-3, 5, 80)[torch.randperm(80, generator=torch.Generator().manual_seed(0))] ** 3
    rows = stratified_sample(targets, 20, seed=0)
    ranks = targets.argsort().argsort()[rows] // 20
    assert (np.bincount(ranks.numpy(), minlength=4) >= 4).all()


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
