"""Valuation by retraining: games whose values are known by enumeration, and small real trainings."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cases import close, far, perceptron, problem_of, task_of, vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from methods.base import Method, Problem, Unsupported
from methods.valuation.banzhaf import Banzhaf, reused
from methods.valuation.datamodel import Datamodel, Lasso, Ridge, regressed
from methods.valuation.group import Group
from methods.valuation.loo import LOO
from methods.valuation.shapley import Shapley, Walks, cardinality_weights, credited
from methods.valuation.utility import Valuation
from tasks.base import Examples, Recipe, Task
from tasks.data.corruption import Corruption
from tasks.digits import digits
from tasks.errors import UserError
from tasks.models.mlp import MLP
from tasks.objectives.classification import Classification
from tasks.training.engines import measured, one_by_one
from tasks.training.plan import Plan, planned
from tasks.training.train import load, train

VAL, QUERY = 2, 3  # columns of a game
Game = Callable[[Tensor], Tensor]  # masks (S, N) -> worth (S, VAL + QUERY)

shapley = partial(Shapley, repeats=1, permutations=3, prefixes=None, truncation=0.0, alpha=1.0, beta=1.0)
datamodel = partial(Datamodel, repeats=1, subsets=18, fraction=0.5, estimator=Ridge(0.0))
ALL: dict[str, Method] = {
    "loo": LOO(1),
    "group": Group(1, 3),
    "banzhaf": Banzhaf(1, 40),
    "shapley": shapley(),
    "chunks": shapley(prefixes=3, truncation=0.3),
    "beta_shapley": shapley(alpha=4.0),
    "datamodel": datamodel(),
    "ridge": datamodel(estimator=Ridge(0.1)),
    "lasso": datamodel(estimator=Lasso(0.01)),
}


# Games


@dataclass
class Player:
    """Measures what a game says of the rows that a plan keeps, the row named train<i> being player i."""

    game: Game
    plans: list[Plan] = field(default_factory=list)

    def __call__(self, task: Task, plan: Plan) -> dict[str, np.ndarray]:
        self.plans.append(plan)
        players = np.argsort([int(i.removeprefix("train")) for i in task.train.ids])
        worth = self.game(plan.weights[:, players]).numpy()
        return {"val": worth[:, :VAL], "query": worth[:, VAL:], "seconds": np.ones(len(plan))}

    @property
    def trained(self) -> set[str]:
        return set().union(*(plan.keys() for plan in self.plans))


def played(n: int, game: Game, seed: int = 0) -> tuple[Problem, Player]:
    """n players; θ0 says 0 of everything, so no example is worth 0."""
    build = partial(perceptron, 3, 2, zero=True)
    task = task_of(vectors("train", n, 3, 2, 0), vectors("query", QUERY, 3, 2, 1), build, Classification(2))
    task = replace(task, splits={**task.splits, "val": vectors("val", VAL, 3, 2, 2)})
    player = Player(game)
    return replace(problem_of(task, seed), retraining=player), player


def table(n: int, seed: int = 0, columns: int = VAL + QUERY) -> Tensor:
    """Worth of each of the 2^n subsets, the bits of the row being its members; the empty one is worth 0."""
    worth = torch.randn(2**n, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    worth[0] = 0
    return worth


def game_of(worth: Tensor) -> Game:
    return lambda masks: worth[(masks @ 2.0 ** torch.arange(masks.shape[1], dtype=torch.float64)).long()]


def additive(n: int) -> tuple[Tensor, Game]:
    """Worths (VAL + QUERY, n) of single players, which add up."""
    worths = torch.randn(VAL + QUERY, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return worths, lambda masks: masks @ worths.T


def every_mask(n: int) -> Tensor:
    return torch.tensor([[s >> i & 1 for i in range(n)] for s in range(2**n)], dtype=torch.float64)


def gains(worth: Tensor, i: int) -> Iterator[tuple[int, Tensor]]:
    """Size of S and v(S ∪ i) − v(S), for all S without i."""
    for s in range(len(worth)):
        if not s >> i & 1:
            yield s.bit_count(), worth[s | 1 << i] - worth[s]


def semivalue(worth: Tensor, weight: Callable[[int, int], float], power: int = 1) -> Tensor:
    """Σ_{S∌i} weight(n, |S|) [v(S ∪ i) − v(S)]^power, (Q, n)."""
    n = len(worth).bit_length() - 1
    by_size = [weight(n, s) for s in range(n)]
    return torch.stack(
        [torch.stack([by_size[s] * gain**power for s, gain in gains(worth, i)]).sum(0) for i in range(n)], 1
    )


def shapley_weight(n: int, s: int) -> float:
    return math.factorial(s) * math.factorial(n - 1 - s) / math.factorial(n)


def banzhaf_weight(n: int, s: int) -> float:
    return 2.0 ** (1 - n)


def beta_weight(alpha: float, beta: float) -> Callable[[int, int], float]:
    """Each other player is there with probability t, t from Beta(β, α)."""
    return lambda n, s: stats.betabinom.pmf(s, n - 1, beta, alpha) / math.comb(n - 1, s)


def walks_of(orders: Any, sizes: Any) -> Walks:
    orders, sizes = torch.as_tensor(np.asarray(orders)), torch.as_tensor(sizes)
    return Walks(orders, sizes, torch.full((len(orders),), len(sizes) - 1))


def worth_of(walks: Walks, worth: Tensor) -> Tensor:
    """(P, K + 1, Q)."""
    return torch.stack([game_of(worth)(walks.masks(k)) for k in range(len(walks.sizes))], 1)


# Shapley and Beta Shapley


@pytest.mark.parametrize(
    "alpha, beta, weight",
    [
        (1.0, 1.0, shapley_weight),
        (1.0, 1.0, beta_weight(1, 1)),
        (16.0, 1.0, beta_weight(16, 1)),
        (1.0, 4.0, beta_weight(1, 4)),
        (0.5, 2.5, beta_weight(0.5, 2.5)),
    ],
)
def test_all_orders_of_five_players_give_the_definition(alpha: float, beta: float, weight: Any) -> None:
    worth = table(5, columns=3)
    walks = walks_of(list(permutations(range(5))), range(6))
    found = credited(walks, worth_of(walks, worth), cardinality_weights(5, shapley(alpha=alpha, beta=beta)))
    assert close(found, semivalue(worth, weight))


def test_alpha_favours_small_subsets() -> None:
    """As the paper's figure of Beta(16, 1); both mirror each other; large N overflows nothing."""
    small = cardinality_weights(30, shapley(alpha=16.0, beta=1.0))
    assert (small.diff() < 0).all() and small[0] > 10
    assert close(cardinality_weights(30, shapley(alpha=1.0, beta=16.0)), small.flip(0))
    for n in (1, 2, 50_000):
        assert cardinality_weights(n, shapley(alpha=16.0)).mean().item() == pytest.approx(1, abs=1e-6)
        assert close(cardinality_weights(n, shapley()), torch.ones(n, dtype=torch.float64), 1e-8)


def test_members_of_a_chunk_share_its_gain() -> None:
    """A slow second opinion: chunks of two, one and two players, weights of a Beta distribution."""
    worth, orders, bounds = table(5, seed=1, columns=2), [(3, 1, 4, 0, 2), (0, 1, 2, 3, 4)], (0, 2, 3, 5)
    weights = cardinality_weights(5, shapley(alpha=3.0, beta=2.0))
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for order in orders:
        for a, b in pairwise(bounds):
            before, after = (sum(1 << i for i in order[:stop]) for stop in (a, b))
            for i in order[a:b]:
                mean = sum(weights[j].item() for j in range(a, b)) / (b - a)
                expected[:, i] += mean * (worth[after] - worth[before]) / (b - a) / len(orders)
    walks = walks_of(orders, bounds)
    assert close(credited(walks, worth_of(walks, worth), weights), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_shapley_values_share_out_everything(n: int, count: int, seed: int, data: st.DataObject) -> None:
    """Efficiency: Σ_i φ_i = v(D) − v(∅), whatever the orders and however coarse."""
    prefixes = data.draw(st.integers(2, n))
    worth = table(n, seed)
    problem, _ = played(n, game_of(worth), seed)
    found = shapley(permutations=count, prefixes=prefixes).attribute(problem, problem.task.splits["query"])
    assert torch.allclose(found.sum(1), worth[-1, VAL:], atol=1e-10)


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_random_orders_come_near_the_definition(alpha: float) -> None:
    """Ten players, within four standard errors, which enumeration gives too."""
    n, count, worth = 10, 400, table(10)
    problem, player = played(n, game_of(worth))
    method = shapley(permutations=count, alpha=alpha)
    found = method.attribute(problem, problem.task.splits["query"])
    weight = beta_weight(alpha, 1)
    exact = semivalue(worth, weight)[VAL:]
    square = semivalue(worth, lambda n, s: weight(n, s) ** 2 / shapley_weight(n, s), power=2)[VAL:]
    error = ((square - exact**2) / count).sqrt()
    assert ((found - exact).abs() <= 4 * error).all() and ((found - exact).abs() > 0.1 * error).any()
    assert (error < 0.5 * exact.std()).any(), "so wide an interval would hold anything"
    assert max(len(p) for p in player.plans) == count * (n - 1), "one call for all, in stacks of one size"


def test_alpha_and_beta_of_one_are_shapley_on_the_same_orders() -> None:
    game = game_of(table(6))
    (one, _), (other, _) = played(6, game), played(6, game)
    plain, beta = (m.attribute(p, p.task.splits["query"]) for m, p in ((shapley(), one), (shapley(alpha=16.0), other)))
    found = one.once((shapley(), "walks"), lambda: None)
    assert close(plain, credited(found, worth_of(found, table(6))[..., VAL:], torch.ones(6, dtype=torch.float64)))
    assert far(beta, plain)
    assert torch.equal(found.orders, other.once((shapley(alpha=16.0), "walks"), lambda: None).orders)


def test_more_permutations_begin_with_the_same() -> None:
    (few, some), (many, more) = played(6, game_of(table(6))), played(6, game_of(table(6)))
    shapley(permutations=2).value(few)
    shapley(permutations=5).value(many)
    assert some.trained < more.trained


def saturating(masks: Tensor) -> Tensor:
    """Three examples are all that is needed, and val column 1 is never moved."""
    worth = masks.sum(1).clamp(max=3)[:, None].repeat(1, VAL + QUERY)
    worth[:, 1] = 0
    return worth


def test_truncation_leaves_an_order_where_val_is_near_its_end() -> None:
    problem, player = played(8, saturating)
    queries = problem.task.splits["query"]
    found = shapley(truncation=0.1).attribute(problem, queries)
    full_problem, full = played(8, saturating)
    assert close(found, shapley().attribute(full_problem, queries)), "what is left out was worth nothing"
    sizes = {int(plan.weights[m].sum()) for plan in player.plans for m in range(len(plan))}
    assert sizes == {1, 2, 3, 8}
    assert len(full.trained) == 3 * 7 + 1 == shapley().retrainings(problem.task)
    # A coarser one stops before the third: 1/3 of the way is missing there, and is lost to all who come later.
    problem, player = played(8, saturating)
    coarse = shapley(truncation=0.4).attribute(problem, queries)
    orders = problem.once((shapley(truncation=0.4), "walks"), lambda: None).orders
    assert close(coarse, torch.stack([(orders[:, :2] == i).sum().double() / 3 for i in range(8)]).expand(3, -1))
    assert close(coarse.sum(1), torch.full((3,), 2.0, dtype=torch.float64))


def test_orders_are_left_one_by_one_and_trained_place_by_place() -> None:
    """Player 0 is all that counts: an order ends with it. Each place is one plan of the orders that go on."""
    problem, player = played(6, lambda masks: masks[:, :1].repeat(1, VAL + QUERY))
    method = shapley(permutations=10, truncation=0.5)
    found = method.attribute(problem, problem.task.splits["query"])
    orders = problem.once((method, "walks"), lambda: None).orders
    places = (orders == 0).nonzero()[:, 1]
    living = [(places >= k - 1).sum().item() for k in range(1, 6)]
    walked = [len(plan) for plan in player.plans[1:] if len(plan.weights.sum(1).unique()) == 1 and len(plan) > 1]
    assert walked == [k for k in living if k > 1][: len(walked)] and len(set(walked)) > 1
    assert close(found, torch.eye(6, dtype=torch.float64)[:1].expand(3, -1))


# Banzhaf


def test_all_subsets_of_six_players_give_the_banzhaf_value() -> None:
    worth = table(6)
    assert close(reused(every_mask(6), worth), semivalue(worth, banzhaf_weight))


def test_random_subsets_come_near_the_banzhaf_value() -> None:
    """Ten players, within four standard errors of the two means."""
    count, worth = 3000, table(10)
    problem, player = played(10, game_of(worth))
    found = Banzhaf(1, count).attribute(problem, problem.task.splits["query"])
    exact = semivalue(worth, banzhaf_weight)[VAL:]
    error = 2 * worth[:, VAL:].std(0)[:, None] / math.sqrt(count)  # of a difference of two means over half of them
    assert ((found - exact).abs() <= 4 * error).all() and ((found - exact).abs() > 0.1 * error).any()
    (plan,) = player.plans
    assert len(plan) == count and (plan.weights.sum(1) > 0).all()
    assert ((plan.weights.mean(0) - 0.5).abs() < 4 * 0.5 / math.sqrt(count)).all()


def test_the_empty_subset_is_drawn_again() -> None:
    problem, player = played(2, game_of(table(2)))
    Banzhaf(1, 60).value(problem)
    assert {tuple(row) for row in player.plans[0].weights.tolist()} == {(1, 0), (0, 1), (1, 1)}


# Datamodels


def drawn_regression(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    return x, torch.randn(rows, 4, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("rows, columns", [(20, 6), (6, 20)])
def test_ridge_solves_the_normal_equations(rows: int, columns: int) -> None:
    x, y = drawn_regression(rows, columns)
    expected = torch.linalg.solve(x.T @ x / rows + 0.3 * torch.eye(columns, dtype=torch.float64), x.T @ y / rows).T
    assert close(Ridge(0.3).fit(x, y), expected)
    assert close(Ridge(0.0).fit(x, y), (torch.linalg.pinv(x) @ y).T)


def test_ridge_without_penalty_invents_nothing_where_the_design_is_blind() -> None:
    """Masks of one size, centred: the sum of all columns is 0 up to rounding, which must not be inverted."""
    masks = every_mask(6)
    masks = masks[masks.sum(1) == 3]
    x = masks - masks.mean(0)
    found = Ridge(0.0).fit(x, masks @ torch.arange(6, dtype=torch.float64)[:, None])
    assert close(found, torch.arange(6, dtype=torch.float64)[None] - 2.5)


def test_lasso_meets_its_conditions_of_optimality() -> None:
    x, y = drawn_regression(40, 8)
    found = Lasso(0.1).fit(x, y)
    slope = (y - x @ found.T).T @ x / len(x)  # must be λ sign(w), within ±λ where w = 0
    assert (slope.abs() <= 0.1 + 1e-5).all()
    active = found != 0
    assert active.any() and not active.all()
    assert torch.allclose(slope[active], 0.1 * found[active].sign(), atol=1e-5)


def test_cross_validation_finds_the_few_that_count() -> None:
    x, noise = drawn_regression(120, 30)
    wanted = torch.zeros(1, 30, dtype=torch.float64)
    wanted[0, [3, 17]] = torch.tensor([2.0, -1.0], dtype=torch.float64)
    found = Lasso(None).fit(x, x @ wanted.T + 0.1 * noise[:, :1])
    assert close(found, wanted, 0.05) and (found == 0).sum() >= 15
    assert torch.equal(found, Lasso(None).fit(x, x @ wanted.T + 0.1 * noise[:, :1]))


@pytest.mark.parametrize("estimator", [Ridge(0.0), Ridge(0.5), Lasso(0.05)])
def test_datamodels_predict_what_everything_is_worth(estimator: Any) -> None:
    """Constants that subsets of one size do not tell come from v(D); they leave predictions of subsets alone."""
    masks = every_mask(6)
    masks = masks[masks.sum(1) == 3]
    worth, everything = drawn_regression(len(masks), 1)[1], torch.tensor([9.0, 1.0, 0.0, -3.0], dtype=torch.float64)
    found = regressed(masks, worth, everything, estimator)
    assert close(worth.mean(0) + found @ (1 - masks.mean(0)), everything)
    other = regressed(masks, worth, everything + 6, estimator)
    assert close(other - found, torch.full_like(found, 2.0)), "3 of 6 were missing"
    scale = regressed(masks, 3 * worth, 3 * everything, Ridge(0.5))
    assert close(scale, 3 * regressed(masks, worth, everything, Ridge(0.5)))


def test_penalties_draw_towards_the_mean_effect() -> None:
    worths, game = additive(6)
    masks = every_mask(6)
    masks, everything = masks[masks.sum(1) == 3], worths.sum(1)
    for estimator in (Ridge(1e9), Lasso(1e3)):
        strong = regressed(masks, game(masks), everything, estimator)
        assert close(strong, worths.mean(1, keepdim=True).expand(-1, 6), 1e-6)
    assert datamodel().calibrated
    assert not datamodel(estimator=Ridge(0.1)).calibrated and not datamodel(estimator=Lasso(None)).calibrated


# Leave-one-out, and groups


def test_leave_one_out_is_a_difference_of_two_worths() -> None:
    worth = table(5)
    problem, player = played(5, game_of(worth))
    found = LOO(1).attribute(problem, problem.task.splits["query"])
    assert close(found, torch.stack([worth[31] - worth[31 - (1 << i)] for i in range(5)], 1)[VAL:])
    assert LOO(1).calibrated and len(player.trained) == 6


def test_leave_one_out_trains_for_the_rows_that_are_looked_at() -> None:
    problem, player = played(5, game_of(table(5)))
    queries = problem.task.splits["query"]
    found = LOO(1).attribute(problem.within([3, 1]), queries)
    assert len(player.trained) == 3
    assert close(found[:, [3, 1]], LOO(1).attribute(problem, queries)[:, [3, 1]]) and found.shape == (QUERY, 5)


def test_a_group_shares_its_effect_equally() -> None:
    worth = table(7)
    problem, player = played(7, game_of(worth))
    found = Group(1, 3).attribute(problem, problem.task.splits["query"])
    (plan,) = player.plans
    assert (plan.weights[0] == 1).all() and torch.equal(1 - plan.weights[1:], (1 - plan.weights[1:]).bool().double())
    assert close((1 - plan.weights[1:]).sum(0), torch.ones(7, dtype=torch.float64)), "each in one group"
    assert sorted((1 - plan.weights[1:]).sum(1).tolist()) == [2, 2, 3]
    for row in plan.weights[1:]:
        out = (row == 0).nonzero()[:, 0]
        effect = worth[127, VAL:] - worth[127 - sum(1 << int(i) for i in out), VAL:]
        assert close(found[:, out], (effect / len(out))[:, None].expand(-1, len(out)))


def test_groups_of_one_are_leave_one_out() -> None:
    problem, _ = played(6, game_of(table(6)))
    queries = problem.task.splits["query"]
    assert close(Group(1, 6).attribute(problem, queries), LOO(1).attribute(problem, queries))


def test_groups_are_not_those_of_the_truth() -> None:
    """truth.shapley deals the rows out by the plain seed."""
    from tasks.training.plan import leave_out, partition

    problem, player = played(10, game_of(table(10)))
    Group(1, 4).value(problem)
    assert not torch.equal(player.plans[0].weights[1:], leave_out(10, partition(10, 4, 0), 0.0))


# What all share


@pytest.mark.parametrize(
    "method",
    [
        LOO(1),
        Group(1, 8),
        shapley(),
        shapley(permutations=1),
        datamodel(),
        datamodel(fraction=0.25, subsets=25),
    ],
    ids=str,
)
def test_what_adds_up_is_told_exactly(method: Method) -> None:
    worths, game = additive(8)
    problem, _ = played(8, game)
    assert close(method.attribute(problem, problem.task.splits["query"]), worths[VAL:])
    assert close(method.value(problem), worths[:VAL].mean(0))


def test_what_adds_up_is_told_by_beta_shapley_and_banzhaf_on_average() -> None:
    """Their finite samples weigh an example's worth, or do not balance the others: exact over all."""
    worths, game = additive(5)
    worth = game(every_mask(5))
    assert close(reused(every_mask(5), worth), worths)
    walks = walks_of(list(permutations(range(5))), range(6))
    assert close(credited(walks, worth_of(walks, worth), cardinality_weights(5, shapley(alpha=16.0))), worths)


def test_nobody_gains_by_a_player_who_adds_nothing_and_twins_are_equal() -> None:
    """Players 1 and 2 are interchangeable, 0 is worth nothing to anyone."""

    def game(masks: Tensor) -> Tensor:
        some = masks[:, 1] + masks[:, 2] + 2 * masks[:, 3] * masks[:, 4]
        return (some[:, None] ** torch.arange(1, 1 + VAL + QUERY)).double()

    worth, masks = game(every_mask(5)), every_mask(5)
    walks = walks_of(list(permutations(range(5))), range(6))
    values = [reused(masks, worth)]
    for alpha in (1.0, 4.0):
        values.append(credited(walks, worth_of(walks, worth), cardinality_weights(5, shapley(alpha=alpha))))
    problem, _ = played(5, game)
    values.append(LOO(1).attribute(problem, problem.task.splits["query"]))
    for value in values:
        assert (value[:, 0].abs() < 1e-9).all() and (value[:, 3].abs() > 0.1).all()
        assert close(value[:, 1], value[:, 2]) and (value[:, 1].abs() > 0.1).all()
    # A null player is credited with nothing in any sample of orders.
    assert (shapley(permutations=2).attribute(problem, problem.task.splits["query"])[:, 0] == 0).all()


@pytest.mark.parametrize("name", ALL)
def test_value_is_the_mean_score_of_val_and_trains_nothing_else(name: str) -> None:
    problem, player = played(6, game_of(table(6)))
    value, before = ALL[name].value(problem), player.trained
    scores = ALL[name].attribute(problem, problem.task.splits["val"])
    ALL[name].attribute(problem, problem.task.splits["query"])
    assert close(value, scores.mean(0)) and value.shape == (6,) and value.dtype == torch.float64
    assert player.trained == before


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_the_rows_changes_nothing(name: str) -> None:
    """Scores go with the ids, though designs are random."""
    problem, _ = played(9, game_of(table(9)))
    queries, order = problem.task.splits["query"], [4, 0, 8, 2, 7, 1, 3, 6, 5]
    task = replace(problem.task, splits={**problem.task.splits, "train": problem.train.select(order)})
    turned = replace(problem, task=task, _once={})
    tolerance = 1e-4 if name == "lasso" else 1e-10  # coordinate descent stops early
    assert close(ALL[name].attribute(turned, queries), ALL[name].attribute(problem, queries)[:, order], tolerance)


@pytest.mark.parametrize("name", ALL)
def test_designs_and_seeds_are_those_of_the_problem(name: str) -> None:
    """Another run, or another explained model, is another draw; the truth's seeds are never used."""
    game, found = game_of(table(6)), []
    for seed, where in ((0, ()), (1, ()), (0, ("member", 1))):
        problem, player = played(6, game, seed)
        ALL[name].value(replace(problem, where=where))
        found.append({s for plan in player.plans for s in plan.seeds})
        truth = planned(torch.ones(1, 6, dtype=torch.float64), 3, "common", seed, seed).seeds
        assert not found[-1] & set(truth) and len(found[-1]) == 1
        assert all(plan.own_batches for plan in player.plans)
    assert len(set.union(*found)) == 3


@pytest.mark.parametrize("name", ALL)
def test_trainings_are_announced(name: str) -> None:
    method = ALL[name]
    assert isinstance(method, Valuation)
    for repeats in (1, 2):
        problem, player = played(6, game_of(table(6)))
        replace(method, repeats=repeats).value(problem)
        announced = replace(method, repeats=repeats).retrainings(problem.task)
        rows = sum(len(plan) for plan in player.plans)
        assert len(player.trained) == problem.meter.trainings <= announced
        if name != "chunks":  # which leaves orders early
            assert rows == announced
    assert "retraining" in method.needs


def test_repeats_are_seeds_that_all_subsets_share_and_are_averaged() -> None:
    """A seed's noise is added to the worth: the mean over the repeats is left, in every subset."""
    problem, player = played(5, game_of(table(5)))
    noise: dict[int, float] = {}

    def noisy(task: Task, plan: Plan) -> dict[str, np.ndarray]:
        rows = player(task, plan)
        added = np.array([[noise.setdefault(s, 1.0 + len(noise) ** 2)] for s in plan.seeds])
        size = plan.weights.sum(1, keepdim=True).numpy()
        return {**rows, "val": rows["val"] + added * size, "query": rows["query"] + added * size}

    found = LOO(3).attribute(replace(problem, retraining=noisy), problem.task.splits["query"])
    assert sorted(noise.values()) == [1, 2, 5]
    assert close(found, LOO(1).attribute(problem, problem.task.splits["query"]) + 8 / 3)
    plan = player.plans[0]
    assert len(plan) == 18 and len(set(plan.keys())) == 18
    assert all(torch.equal(plan.weights[:6], plan.weights[6 * r : 6 * r + 6]) for r in range(3))


def test_methods_share_trainings() -> None:
    """The same subset under the same seed is one row of the store, whoever asks."""
    problem, player = played(4, game_of(table(4)))
    LOO(2).value(problem)
    before = player.trained
    Group(1, 4).value(problem)
    assert player.trained == before


def test_no_example_is_worth_what_initial_models_measure() -> None:
    """Left out of one, nothing remains: the mean over the seeds of the untrained models stands for it."""
    problem, player = played(1, lambda masks: torch.full((len(masks), VAL + QUERY), 4.0, dtype=torch.float64))
    task = replace(problem.task, build=partial(perceptron, 3, 2))
    problem = replace(problem, task=task)
    queries = task.splits["query"]
    found = LOO(2).attribute(problem, queries)
    (plan,) = player.plans
    initial = [task.measure(task.initial(s), queries.batch()).detach() for s in plan.seeds]
    assert len(plan) == 2 and far(initial[0], initial[1])
    assert close(found[:, 0], 4 - torch.stack(initial).mean(0))
    sole = shapley(prefixes=None).attribute(problem, queries)
    assert close(sole[:, 0], 4 - initial[0])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LOO(0), r"method\.repeats=0 .*1 or more"),
        (lambda: Group(1, 1), r"method\.groups=1 .*2 or more"),
        (lambda: Banzhaf(1, 1), r"method\.subsets=1 .*2 or more"),
        (lambda: shapley(permutations=0), r"method\.permutations=0 "),
        (lambda: shapley(prefixes=1), r"method\.prefixes=1 .*2 or more, or null"),
        (lambda: shapley(truncation=1.0), r"method\.truncation=1\.0 .*0 <= truncation < 1"),
        (lambda: shapley(truncation=-0.1), r"method\.truncation=-0\.1 "),
        (lambda: shapley(alpha=0.0), r"method\.alpha=0\.0 .*above 0"),
        (lambda: shapley(beta=-1.0), r"method\.beta=-1\.0 .*above 0"),
        (lambda: Ridge(-1.0), r"method\.estimator\.penalty=-1\.0 .*0 or more"),
        (lambda: Lasso(0.0), r"method\.estimator\.penalty=0\.0 .*above 0, or null"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    "method, message",
    [
        (Group(1, 7), r"method\.groups=7 .*2 to 6"),
        (shapley(prefixes=7), r"method\.prefixes=7 .*2 to 6"),
        (Banzhaf(1, 2), r"method\.subsets=2 .*in all subsets, or in none"),
        (datamodel(subsets=30), r"method\.subsets=30 .*6 examples have 20 subsets of 3"),
        (datamodel(fraction=1.5, subsets=3), r"method\.fraction=1\.5 "),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_training(method: Method, message: str) -> None:
    problem, player = played(6, game_of(table(6)))
    with pytest.raises(UserError, match=f"^{message}"):
        method.value(problem)
    assert not player.plans


def test_without_means_to_retrain_or_val_there_is_no_value() -> None:
    problem, _ = played(4, game_of(table(4)))
    with pytest.raises(Unsupported, match="retrained"):
        LOO(1).value(replace(problem, retraining=None))
    empty = replace(problem.task, splits={**problem.task.splits, "val": vectors("val", 0, 3, 2, 2)})
    with pytest.raises(Unsupported, match="val, which is empty"):
        LOO(1).value(replace(problem, task=empty))


# Real trainings

RECIPE = Recipe("sgd", 0.3, 3, 4, 1e-3, "l2", "linear", 0.0, 0.9, (0.9, 0.999), 1e-8, None, 1, 1, 1e-8)


def tiny() -> Problem:
    """Twelve digits, retrained one by one."""
    task = digits(MLP("mlp", (4,), 0.0, "float64", RECIPE), 12, 5, 6, 0, Corruption(0.0, "uniform")).public()

    def retraining(given: Task, plan: Plan) -> dict[str, np.ndarray]:
        return one_by_one(given, plan) | {"seconds": np.ones(len(plan))}

    return Problem(task, 0, lambda k: train(task, k), retraining=retraining)


def trained_on(problem: Problem, rows: list[int], seed: int, queries: Examples) -> Tensor:
    """Measurements after a training that has never seen the other rows."""
    task = replace(problem.task, splits={**problem.task.splits, "train": problem.train.select(rows), "query": queries})
    model = task.initial(seed) if not rows else load(task.initial(seed), train(task, seed).final)
    return torch.as_tensor(measured(task, model, "query"))


def test_leave_one_out_of_digits_is_training_without_them() -> None:
    problem, every = tiny(), list(range(12))
    queries = problem.task.splits["query"]
    found = LOO(1).attribute(problem, queries)
    seed = asked_seed(problem)
    whole = trained_on(problem, every, seed, queries)
    expected = [whole - trained_on(problem, every[:i] + every[i + 1 :], seed, queries) for i in every]
    assert close(found, torch.stack(expected, 1))


def test_shapley_of_digits_shares_out_what_training_gains() -> None:
    problem = tiny()
    queries = problem.train.select([0, 5])  # any examples may be asked about
    found = shapley(permutations=2, prefixes=3).attribute(problem, queries)
    seed = asked_seed(problem)
    gain = trained_on(problem, list(range(12)), seed, queries) - trained_on(problem, [], seed, queries)
    assert close(found.sum(1), gain)


def asked_seed(problem: Problem) -> int:
    """The one that a method trains with."""
    seeds: set[int] = set()

    def noted(task: Task, plan: Plan) -> dict[str, np.ndarray]:
        seeds.update(plan.seeds)
        return {s: np.zeros((len(plan), len(task.splits[s]))) for s in ("val", "query")} | {
            "seconds": np.ones(len(plan))
        }

    Group(1, 2).value(replace(problem, retraining=noted, _once={}))
    (seed,) = seeds
    return seed


# Presets

CONF = Path(__file__).parents[2] / "conf" / "method"


@pytest.mark.parametrize("preset", ["loo", "group", "banzhaf", "shapley", "beta_shapley", "datamodel"])
def test_presets_name_every_setting(preset: str) -> None:
    text = (CONF / f"{preset}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    module, _, name = content.pop("_target_").rpartition(".")
    made = {c.__name__: c for c in (LOO, Group, Banzhaf, Shapley, Datamodel)}[name]
    assert text.startswith("# ") and made.__module__ == module
    assert list(content) == list(inspect.signature(made).parameters)
