"""Evaluations where every answer is planted: an additive world whose true scores are known, and small retrainings."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, pearsonr, spearmanr

from bench.evaluations import base, pbrf
from bench.evaluations.base import Case, Metric, NotApplicable, Unfit, finite
from bench.evaluations.detection import Detection
from bench.evaluations.groups import LeaveGroupOut
from bench.evaluations.lds import LDS
from bench.evaluations.loo import LOO
from bench.evaluations.pbrf import PBRF
from bench.evaluations.removal import Removal
from bench.evaluations.shapley import Shapley, shapley_values
from bench.statistics import Array, around, ceilings, roc_auc, split_half
from methods.base import Unsupported
from tasks.base import Annotations, Checkpoint, Examples, Recipe, Task, Trajectory
from tasks.errors import UserError
from tasks.models.mlp import Perceptron
from tasks.objectives.classification import Classification
from tasks.training.engines import Executor, Rows
from tasks.training.plan import Plan, explained_seed, random_subsets, rotations
from tasks.training.proximal import Response, proximal_response
from tasks.training.train import train

N, VAL, QUERY = 40, 6, 8
RNG = np.random.default_rng(0)
EFFECT = RNG.normal(size=(QUERY, N))  # [q, i]: measurement of q with i minus without i
VAL_EFFECT = np.random.default_rng(2).normal(size=(VAL, N))
EFFECTS = {N: EFFECT, 100: 0.1 * np.random.default_rng(1).normal(size=(QUERY, 100))}  # by the size of the training set
FLIPPED = frozenset(f"train:{i}" for i in (3, 11, 20, 29, 33, 38))
POSITIVE = np.array([f"train:{i}" in FLIPPED for i in range(N)])


def examples(name: str, rows: int) -> Examples:
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    return Examples(tuple(f"{name}:{i}" for i in range(rows)), {"x": x}, (x.sum(1) > 0).long())


RECIPE = Recipe("lbfgs", 1.0, 1, 10, 0.1, "l2", "constant", 0.0, 0.0, (0.9, 0.999), 1e-8, None, 1, 1, 1e-10)
TASK = Task(
    name="additive",
    splits={k: examples(k, n) for k, n in {"train": N, "val": VAL, "query": QUERY, "test": 5}.items()},
    build=partial(Perceptron, [3, 2]),
    objective=Classification(2),
    recipe=RECIPE,
    model="logreg",
    source="generated",
    floor={},
    identity={"version": 1},
    dtype=torch.float64,
    annotations=Annotations(FLIPPED),
)
NOTHING = Trajectory(0, {}, (Checkpoint(1, {}, 0.0),), 0.0, 0.0)


def no_value() -> Array:
    raise Unsupported("no value")


def case(
    scores: Array | None = None, value: Callable[[], Array] = no_value, val: Array | None = None, **changes: Any
) -> Case:
    """A method that answers `scores` for every split, `val` for that one where it is given."""

    def attribution(split: str) -> Array:
        if scores is None:
            raise NotApplicable("no attribution")
        if split == "val" and val is not None:
            return val
        assert scores.shape[1] == len(settings["task"].train)
        assert len(scores) == len(TASK.splits[split]), f"asked for the wrong split: {split}"
        return scores

    settings: dict[str, Any] = {
        "task": TASK,
        "seed": 4,
        "trajectory": NOTHING,
        "calibrated": False,
        "store": Path("nowhere"),
    } | changes
    executor = Executor("vectorised", 1)
    return Case(attribution=attribution, value=value, executor=executor, progress=lambda *_: None, **settings)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Retraining adds up the effects of the weights; `noise` is of the seed and the row. Plans are kept."""
    state: dict[str, Any] = {"noise": 0.0, "plans": [], "told": [], "val": False}

    def planted(
        task: Task,
        plan: Plan,
        root: Path,
        executor: Executor,
        progress: Callable[[int, int], None],
        shipped: Path | None = None,
    ) -> Rows:
        state["plans"].append(plan)
        progress(len(plan), len(plan))
        rows = 3.0 + plan.weights.numpy() @ EFFECTS[plan.weights.shape[1]].T
        for m, key in enumerate(plan.keys()):
            rng = np.random.default_rng(int(hashlib.sha256(key.encode()).hexdigest()[:8], 16))
            rows[m] += state["noise"] * rng.normal(size=QUERY)
        val = plan.weights.numpy() @ VAL_EFFECT.T if state["val"] else np.full((len(plan), VAL), np.nan)
        return {"query": rows, "val": val}

    monkeypatch.setattr(base, "retrain", planted)
    return state


def lds(**changes: Any) -> LDS:
    return LDS(**{"subsets": 25, "repeats": 2, "regime": "common", "fraction": 0.5, "seed": 0, **changes})


def loo(**changes: Any) -> LOO:
    return LOO(**{"sample": None, "weight": 0.0, "repeats": 1, "regime": "fixed", "seed": 0, **changes})


def replicates(metric: Metric) -> Array:
    """(R,), whatever is stored of them."""
    return around(metric.replicates, metric.value)


def groups(**changes: Any) -> LeaveGroupOut:
    settings = {"kind": "random", "groups": 12, "size": 6, "repeats": 1, "regime": "fixed", "seed": 0}
    return LeaveGroupOut(**{**settings, **changes})


def removal(**changes: Any) -> Removal:
    settings = {"queries": 5, "shares": [0.1, 0.25], "controls": 6, "repeats": 2, "regime": "common", "seed": 0}
    return Removal(**{**settings, **changes})


def shapley(**changes: Any) -> Shapley:
    return Shapley(**{"players": 8, "squares": 2, "repeats": 1, "regime": "common", "seed": 0, **changes})


LEAST = int(torch.bincount(TASK.train.targets).min())
LARGE = replace(TASK, splits={**TASK.splits, "train": examples("train", 100)}, annotations=None)


@pytest.mark.parametrize("regime", ["fixed", "common", "fresh"])
def test_lds_is_one_for_the_true_scores_and_minus_one_for_their_opposite(world: dict[str, Any], regime: str) -> None:
    for scores, wanted in ((EFFECT, 1.0), (5 * EFFECT + 0.0, 1.0), (-EFFECT, -1.0)):
        (found,) = lds(regime=regime).evaluate(case(scores)).values()
        assert found.value == pytest.approx(wanted)
        assert np.allclose(replicates(found), wanted) and found.replicates.shape == (3, 1000)
        assert (found.n, found.nan, found.better) == (QUERY, 0, "higher")


def test_lds_by_scipy_with_the_mean_over_repeats(world: dict[str, Any]) -> None:
    world["noise"] = 2.0
    scores = EFFECT + RNG.normal(size=EFFECT.shape)
    found = lds(repeats=3).evaluate(case(scores))["lds"]
    (plan,) = world["plans"]
    assert len(plan) == 75 and torch.equal(plan.weights[:25], random_subsets(N, 25, 0.5, 0))
    measured = base.retrain(TASK, plan, Path(), Executor("auto", 1), lambda *_: None)["query"]
    mean = (measured[:25] + measured[25:50] + measured[50:]) / 3
    predicted = plan.weights[:25].numpy() @ scores.T
    wanted = np.mean([spearmanr(a, b).statistic for a, b in zip(predicted.T, mean.T, strict=True)])
    assert found.value == pytest.approx(wanted)
    entry = found.entry()
    assert entry["low"] < entry["value"] < entry["high"]


def test_lds_by_three_correlations_of_scipy(world: dict[str, Any]) -> None:
    world["noise"] = 2.0
    scores = EFFECT + RNG.normal(size=EFFECT.shape)
    found = lds(correlations=("spearman", "pearson", "kendall")).evaluate(case(scores))
    assert list(found) == ["lds", "lds_pearson", "lds_kendall"]
    (plan,) = world["plans"]
    measured = base.retrain(TASK, plan, Path(), Executor("auto", 1), lambda *_: None)["query"]
    predicted, mean = plan.weights[:25].numpy() @ scores.T, (measured[:25] + measured[25:]) / 2
    for metric, scipys in zip(found.values(), (spearmanr, pearsonr, kendalltau), strict=True):
        by_query = [scipys(a, b).statistic for a, b in zip(predicted.T, mean.T, strict=True)]
        np.testing.assert_allclose(metric.by_query["value"], by_query)
        assert metric.value == pytest.approx(np.mean(by_query))
        assert metric.truth == found["lds"].truth and "correlations" not in metric.truth, "the truth is the same"
        assert metric.ceiling is not None and metric.value < metric.ceiling < 1
    assert found["lds_kendall"].ceiling < found["lds"].ceiling  # type: ignore[operator]
    assert set(lds(correlations=["pearson"]).evaluate(case(scores))) == {"lds_pearson"}


def test_lds_val_is_of_the_validation_split(world: dict[str, Any]) -> None:
    world["val"] = True
    found = lds(val=True).evaluate(case(-EFFECT, val=VAL_EFFECT))
    assert list(found) == ["lds", "lds_val"]
    assert (found["lds"].value, found["lds_val"].value) == (pytest.approx(-1.0), pytest.approx(1.0))
    assert (found["lds"].n, found["lds_val"].n) == (QUERY, VAL)
    assert found["lds"].truth == lds().evaluate(case(-EFFECT))["lds"].truth, "asking for it changes no truth"


@pytest.mark.parametrize("weight", [0.3, 0.98])
def test_lds_of_a_perturbation_sums_over_all_examples(world: dict[str, Any], weight: float) -> None:
    assert lds(weight=weight).evaluate(case(EFFECT))["lds"].value == pytest.approx(1.0)
    (plan,) = world["plans"]
    masks = random_subsets(N, 25, 0.5, 0)
    assert torch.equal(plan.weights[:25], masks + weight * (1 - masks))
    scores = EFFECT + RNG.normal(size=EFFECT.shape)
    found = lds(weight=weight).evaluate(case(scores))["lds"]
    assert found.truth["weight"] == weight
    removed = lds().evaluate(case(scores))["lds"]
    assert found.value == pytest.approx(removed.value) and found.value < 0.99, "additive: only the scale differs"
    assert "weight" not in removed.truth


def test_the_ceiling_is_what_the_true_scores_reach(world: dict[str, Any]) -> None:
    world["noise"] = 3.0
    found = lds(subsets=1000, repeats=2).evaluate(case(EFFECT))["lds"]
    assert found.ceiling is not None and 0.5 < found.ceiling < 0.95
    assert found.value == pytest.approx(found.ceiling, abs=0.02)
    shuffled = EFFECT[:, RNG.permutation(N)]
    assert lds(subsets=100).evaluate(case(shuffled))["lds"].value == pytest.approx(0, abs=0.15)


def test_queries_are_kept_and_their_means_are_the_numbers(world: dict[str, Any]) -> None:
    world["noise"] = 3.0
    scores = EFFECT + RNG.normal(size=EFFECT.shape)
    scores[3] = 0.0
    common = {"regime": "common", "repeats": 3}
    judged = [
        lds(correlations=("spearman", "pearson", "kendall"), **common),
        loo(**common),
        groups(**common),
        shapley(**common),
    ]
    noisy = [metric for one in judged for metric in one.evaluate(case(scores)).values() if metric.by_query]
    assert len(noisy) == 3 + 2 + 2 + 2
    for metric in noisy:
        assert set(metric.by_query) == {"value", "reliability", "ceiling"}
        assert all(array.shape == (QUERY,) for array in metric.by_query.values())
        assert metric.by_query["value"].mean() == pytest.approx(metric.value) and metric.by_query["value"][3] == 0
        assert metric.by_query["ceiling"].mean() == pytest.approx(metric.ceiling)
        assert metric.nan == 1
    measured = base.retrain(TASK, world["plans"][0], Path(), Executor("auto", 1), lambda *_: None)["query"]
    runs = measured.reshape(3, 25, QUERY)
    np.testing.assert_allclose(noisy[0].by_query["ceiling"], ceilings(runs))
    np.testing.assert_allclose(noisy[0].by_query["reliability"], split_half(runs))
    for one in (lds(regime="fixed"), loo(), groups(), shapley(repeats=1)):
        found = next(iter(one.evaluate(case(scores)).values()))
        assert set(found.by_query) == {"value"} and found.ceiling is None


def test_a_truth_says_all_that_decides_it(world: dict[str, Any]) -> None:
    common = lds().evaluate(case(EFFECT))["lds"]
    assert common.truth == {"subsets": 25, "repeats": 2, "regime": "common", "fraction": 0.5, "seed": 0}
    assert common.ceiling is not None
    assert lds(repeats=1).evaluate(case(EFFECT))["lds"].ceiling is None
    fixed = lds(regime="fixed").evaluate(case(EFFECT))["lds"]
    assert fixed.truth == {"subsets": 25, "regime": "fixed", "fraction": 0.5, "seed": 0, "explained_seed": 4}
    assert fixed.ceiling is None, "it has no noise"
    assert world["plans"][-1].seeds == (explained_seed(4),) * 25
    found = loo(sample=10).evaluate(case(EFFECT))["loo_pearson"]
    assert found.truth == {"sample": 10, "weight": 0.0, "regime": "fixed", "seed": 0, "explained_seed": 4}
    assert found.ceiling is None
    found = loo(sample=10, regime="common", repeats=2).evaluate(case(EFFECT))["loo_pearson"]
    assert found.truth == {"sample": 10, "weight": 0.0, "repeats": 2, "regime": "common", "seed": 0}
    assert found.ceiling == pytest.approx(1.0)


def test_methods_of_one_truth_share_their_resamples(world: dict[str, Any]) -> None:
    world["noise"] = 2.0
    one, same, other = (lds(seed=s).evaluate(case(k * EFFECT))["lds"].replicates for s, k in ((0, 1), (0, 7), (1, 1)))
    np.testing.assert_allclose(one, same, atol=1e-9)
    assert not np.allclose(one, other)


def test_a_query_that_is_no_number_counts_as_zero_and_is_told(world: dict[str, Any]) -> None:
    scores = EFFECT.copy()
    scores[2], scores[5] = np.nan, np.inf
    found = lds().evaluate(case(scores))["lds"]
    assert found.value == pytest.approx((QUERY - 2) / QUERY) and found.nan == 2
    assert np.isfinite(found.replicates).all() and replicates(found).mean() == pytest.approx(0.75, abs=0.02)
    assert found.by_query["value"].tolist() == pytest.approx([1, 1, 0, 1, 1, 0, 1, 1])
    found = loo().evaluate(case(scores, calibrated=True))["loo_slope"]
    assert found.value == pytest.approx((QUERY - 2) / QUERY) and found.nan == 2
    flat = EFFECT.copy()
    flat[1] = 0.1
    assert lds().evaluate(case(flat))["lds"].nan == 1


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("sample", [None, 12])
def test_loo_is_measurement_with_minus_without(world: dict[str, Any], weight: float, sample: int | None) -> None:
    found = loo(weight=weight, sample=sample).evaluate(case(EFFECT, calibrated=True))
    assert set(found) == {f"loo_{name}" for name in ("pearson", "spearman", "top10", "slope", "intercept")}
    for name, metric in found.items():
        wanted = 0.0 if name == "loo_intercept" else 1.0
        assert metric.value == pytest.approx(wanted, abs=1e-12), "the score is in units of a whole removal"
        assert np.allclose(replicates(metric), wanted)
    half = loo(weight=weight, sample=sample).evaluate(case(0.5 * EFFECT, calibrated=True))
    assert half["loo_slope"].value == pytest.approx(2.0) and half["loo_slope"].better == "one"
    assert half["loo_intercept"].value == pytest.approx(0.0, abs=1e-12) and half["loo_intercept"].better is None
    above = loo(weight=weight, sample=sample).evaluate(case(EFFECT - 0.5, calibrated=True))
    assert above["loo_intercept"].value == pytest.approx(0.5) and above["loo_slope"].value == pytest.approx(1.0)
    opposite = loo(weight=weight, sample=sample).evaluate(case(-EFFECT))
    assert set(opposite) == {"loo_pearson", "loo_spearman", "loo_top10"}, "a slope is of calibrated methods only"
    assert opposite["loo_pearson"].value == opposite["loo_spearman"].value == pytest.approx(-1.0)
    assert opposite["loo_top10"].value == 0.0


def test_the_overlap_of_the_largest_tenth_by_hand(world: dict[str, Any]) -> None:
    scores = EFFECT + RNG.normal(size=EFFECT.shape)
    found = loo().evaluate(case(scores))["loo_top10"]
    shared = [len(set(np.argsort(-s)[:4]) & set(np.argsort(-e)[:4])) / 4 for s, e in zip(scores, EFFECT, strict=True)]
    assert found.value == pytest.approx(np.mean(shared)) and 0 < found.value < 1
    assert loo().evaluate(case(np.zeros_like(EFFECT)))["loo_top10"].value == pytest.approx(0.1), "chance"


def test_loo_compares_within_a_repeat(world: dict[str, Any]) -> None:
    world["noise"] = 0.3
    plan = loo(sample=12, regime="common", repeats=3).plan(TASK, 4)
    assert len(plan) == 3 * 13 and len(set(plan.seeds)) == 3
    for r in range(3):
        assert plan.weights[13 * r].tolist() == [1.0] * N
        assert (plan.weights[13 * r + 1 : 13 * r + 13].sum(1) == N - 1).all()
    metrics = loo(regime="common", repeats=3).evaluate(case(EFFECT, calibrated=True))
    found = metrics["loo_pearson"]
    assert found.ceiling is not None and found.value == pytest.approx(found.ceiling, abs=0.03)
    assert found.ceiling < 0.995
    runs = base.retrain(TASK, world["plans"][0], Path(), Executor("auto", 1), lambda *_: None)["query"]
    effects = np.mean([runs[41 * r] - runs[41 * r + 1 : 41 * r + 41] for r in range(3)], axis=0)
    fits = [np.polyfit(EFFECT[q], effects[:, q], 1) for q in range(QUERY)]
    assert [metrics["loo_slope"].value, metrics["loo_intercept"].value] == pytest.approx(np.mean(fits, axis=0).tolist())


def margins(left_out: Sequence[int] = ()) -> Array:
    """Of the queries, after a real training without these rows."""
    weights = torch.ones(N, dtype=torch.float64)
    weights[list(left_out)] = 0
    final = train(TASK, 0, weights).final
    x, y = TASK.splits["query"].inputs["x"], TASK.splits["query"].targets
    logits = x @ final["layers.linear0.weight"].T + final["layers.linear0.bias"]
    margin: Array = ((2 * y - 1) * (logits[:, 1] - logits[:, 0])).numpy()
    return margin


def test_loo_of_a_real_retraining_has_the_sign_of_the_definition(tmp_path: Path) -> None:
    """Scores made by hand: margin with the example minus margin without it."""
    judged, scores, whole = loo(sample=8), np.zeros((QUERY, N)), margins()
    for i in judged.rows(TASK):
        scores[:, i] = whole - margins([i])
    told: list[tuple[str, int, int]] = []
    made = replace(case(scores, calibrated=True, store=tmp_path), progress=lambda *a: told.append(a))
    for name, metric in judged.evaluate(made).items():
        assert metric.value == pytest.approx(0.0 if name == "loo_intercept" else 1.0, abs=1e-4)
    assert told[-1] == ("loo", 9, 9)


def test_plans_refuse_what_cannot_be_before_anything_is_trained() -> None:
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: lds(regime="random"), r"truth\.lds\.regime=random .*fixed, common, fresh"),
        (lambda: loo(regime="random"), r"truth\.loo\.regime=random"),
        (lambda: lds(subsets=2).plan(TASK, 0), r"truth\.lds\.subsets"),
        (lambda: lds(fraction=1.0).plan(TASK, 0), r"truth\.lds\.fraction"),
        (lambda: lds(repeats=0).plan(TASK, 0), r"truth\.(lds\.)?repeats"),
        (lambda: loo(sample=N + 1).plan(TASK, 0), r"truth\.loo\.sample"),
        (lambda: loo(weight=1.0).plan(TASK, 0), r"truth\.loo\.weight"),
        (lambda: Detection((0.1, 1.0)), r"truth\.detection\.inspected"),
        (lambda: lds(weight=1.0), r"truth\.lds\.weight=1\.0 .*0 <= weight < 1"),
        (lambda: lds(weight=-0.1), r"truth\.lds\.weight"),
        (lambda: lds(correlations=("spearman", "tau")), r"truth\.lds\.correlations=\[spearman,tau\] .*kendall"),
        (lambda: lds(correlations=()), r"truth\.lds\.correlations=\[\]"),
        (lambda: lds(subsets=41, fraction=1 / N).plan(TASK, 0), r"truth\.lds\.subsets=41 .*40 subsets of 1"),
        (lambda: groups(kind="label"), r"truth\.lgo\.kind=label .*random, class"),
        (lambda: groups(groups=2), r"truth\.lgo\.groups=2 .*3 or more"),
        (lambda: groups(size=0).plan(TASK, 0), r"truth\.lgo\.size=0 .*1 to 39"),
        (lambda: groups(size=N).plan(TASK, 0), r"truth\.lgo\.size=40"),
        (lambda: groups(kind="class", size=LEAST + 1).plan(TASK, 0), rf"truth\.lgo\.size=.*1 to {LEAST}, the smallest"),
        (lambda: groups(kind="class", size=0).plan(TASK, 0), r"truth\.lgo\.size=0"),
        (lambda: groups(regime="random").plan(TASK, 0), r"truth\.lgo\.regime=random .*fixed, common, fresh"),
        (lambda: groups(regime="fresh", repeats=0).plan(TASK, 0), r"truth\.lgo\.repeats"),
        (lambda: removal(shares=[0.1, 1.0]), r"truth\.removal\.shares=1\.0 .*between 0 and 1"),
        (lambda: removal(shares=[0.0]), r"truth\.removal\.shares=0\.0"),
        (lambda: removal(shares=[]), r"truth\.removal\.shares=\[\] .*one or more"),
        (lambda: removal(shares=[0.01]).plan(TASK, 0), r"truth\.removal\.shares=\[0\.01\] .*remove 1 to 39"),
        (lambda: removal(shares=[0.99]).plan(TASK, 0), r"truth\.removal\.shares=\[0\.99\]"),
        (lambda: removal(controls=1), r"truth\.removal\.controls=1 .*2 or more"),
        (lambda: removal(queries=0), r"truth\.removal\.queries=0"),
        (lambda: removal(queries=QUERY + 1).plan(TASK, 0), r"truth\.removal\.queries=9 .*1 to 8"),
        (lambda: removal(regime="random").plan(TASK, 0), r"truth\.removal\.regime=random"),
        (lambda: shapley(squares=0), r"truth\.shapley\.squares=0"),
        (lambda: shapley(players=2).plan(TASK, 0), r"truth\.shapley\.players=2 .*3 to 40"),
        (lambda: shapley(players=N + 1).plan(TASK, 0), r"truth\.shapley\.players=41"),
        (lambda: shapley(regime="random").plan(TASK, 0), r"truth\.shapley\.regime=random"),
        (lambda: PBRF(None, 0.0, 0), r"truth\.pbrf\.damping=0\.0 .*above 0"),
        (lambda: PBRF(N + 1, 0.1, 0).plan(TASK, 0), r"truth\.pbrf\.sample=41"),
    ]
    for make, problem in refused:
        with pytest.raises(UserError, match=problem):
            make()


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "class"])
@pytest.mark.parametrize("regime", ["fixed", "common"])
def test_leave_group_out_sums_scores_over_the_group(world: dict[str, Any], kind: str, regime: str) -> None:
    judged = groups(kind=kind, regime=regime)
    found = judged.evaluate(case(EFFECT, calibrated=True))
    assert set(found) == {f"lgo_{name}" for name in ("pearson", "spearman", "top10", "slope", "intercept")}
    for name, metric in found.items():
        assert metric.value == pytest.approx(0.0 if name == "lgo_intercept" else 1.0, abs=1e-10)
    (plan,) = world["plans"]
    assert plan.keys() == judged.plan(TASK, 4).keys() and len(plan) == 13
    assert plan.weights[0].tolist() == [1.0] * N and (plan.weights[1:] == 0).sum(1).tolist() == [6] * 12
    for weights in plan.weights[1:]:
        assert kind == "random" or len(TASK.train.targets[weights == 0].unique()) == 1
    opposite = judged.evaluate(case(-EFFECT))
    assert set(opposite) == {"lgo_pearson", "lgo_spearman", "lgo_top10"}
    assert opposite["lgo_pearson"].value == pytest.approx(-1.0)
    truth = {"kind": kind, "groups": 12, "size": 6, "regime": regime, "seed": 0}
    assert found["lgo_pearson"].truth == truth | ({"explained_seed": 4} if regime == "fixed" else {"repeats": 1})


def test_leave_group_out_by_hand_within_repeats(world: dict[str, Any]) -> None:
    world["noise"] = 2.0
    judged = groups(groups=20, repeats=3, regime="common")
    scores = EFFECT + RNG.normal(size=EFFECT.shape)
    found = judged.evaluate(case(scores, calibrated=True))
    (plan,) = world["plans"]
    measured = base.retrain(TASK, plan, Path(), Executor("auto", 1), lambda *_: None)["query"]
    members = [[i for i in range(N) if plan.weights[g, i] == 0] for g in range(1, 21)]
    effects = np.mean([measured[21 * r] - measured[21 * r + 1 : 21 * r + 21] for r in range(3)], axis=0)
    sums = [[scores[q, group].sum() for group in members] for q in range(QUERY)]
    wanted = [pearsonr(sums[q], effects[:, q]).statistic for q in range(QUERY)]
    np.testing.assert_allclose(found["lgo_pearson"].by_query["value"], wanted)
    slope, intercept = np.mean([np.polyfit(sums[q], effects[:, q], 1) for q in range(QUERY)], axis=0)
    assert found["lgo_slope"].value == pytest.approx(slope)
    assert found["lgo_intercept"].value == pytest.approx(intercept), "each repeat has its own training on everything"
    assert found["lgo_pearson"].ceiling is not None and found["lgo_pearson"].ceiling < 1


def test_groups_of_a_class_need_classes() -> None:
    real = replace(TASK.train, targets=torch.linspace(0, 1, N))
    with pytest.raises(NotApplicable, match=r"kind=class needs classes"):
        groups(kind="class").plan(replace(TASK, splits={**TASK.splits, "train": real}), 0)
    assert groups(kind="class", size=LEAST).plan(TASK, 0) is not None
    assert len(groups().plan(replace(TASK, splits={**TASK.splits, "train": real}), 0)) == 13


def test_leave_group_out_of_a_real_retraining_has_the_sign_of_the_definition(tmp_path: Path) -> None:
    """Scores made by hand: the measured effect of each of five disjoint groups, dealt out to its examples."""
    judged, scores, whole = groups(groups=5, size=8), np.zeros((QUERY, N)), margins()
    for group in judged.members(TASK):
        scores[:, group] = (whole - margins(group))[:, None] / 8
    for name, metric in judged.evaluate(case(scores, calibrated=True, store=tmp_path)).items():
        assert metric.value == pytest.approx(0.0 if name == "lgo_intercept" else 1.0, abs=1e-4)


# --- removal ---------------------------------------------------------------------------------------------------------


def areas(judged: Removal, scores: Array, **changes: Any) -> tuple[float, float]:
    found = judged.evaluate(case(scores, **changes))
    return found["removal_area"].value, found["removal_noise"].value


def test_removal_by_hand(world: dict[str, Any]) -> None:
    judged, scores = removal(), EFFECT + RNG.normal(size=EFFECT.shape)
    found = judged.evaluate(case(scores))
    assert set(found) == {"removal_area", "removal_noise"}, "no hundredth is removed"
    own, control = world["plans"]
    rows = judged.asked(TASK)
    assert len(rows) == 5 and rows == sorted(set(rows)) and own.weights.shape == (2 * 2 * 5, N)
    assert control.keys() == judged.plan(TASK, 4).keys() and len(control) == 2 * 2 * 6
    assert (control.weights[:12] == 0).sum(1).tolist() == [4] * 6 + [10] * 6
    heights = []
    for q, row in enumerate(rows):
        effect = []
        for k, size in enumerate((4, 10)):
            best = np.argsort(-scores[row])[:size]
            assert (own.weights[5 * k + q] == 0).nonzero()[:, 0].tolist() == sorted(best.tolist())
            lost = [EFFECT[row, (w == 0).numpy()].sum() for w in control.weights[6 * k : 6 * k + 6]]
            effect.append(EFFECT[row, best].sum() - np.mean(lost))
        heights.append((0.1 * effect[0] / 2 + 0.15 * (effect[0] + effect[1]) / 2) / 0.25)
    np.testing.assert_allclose(found["removal_area"].by_query["value"], heights)
    assert found["removal_area"].value == pytest.approx(np.mean(heights))
    assert found["removal_area"].replicates.shape == (1000,) and found["removal_area"].n == 5
    assert found["removal_noise"].better is None and found["removal_noise"].n == 6
    assert found["removal_area"].truth == {
        "queries": 5, "shares": (0.1, 0.25), "controls": 6, "repeats": 2, "regime": "common", "seed": 0
    }  # fmt: skip


def test_removal_tells_true_scores_from_random_and_from_their_opposite(world: dict[str, Any]) -> None:
    world["noise"] = 0.5
    judged = removal(queries=8, controls=10)
    area, noise = areas(judged, EFFECT)
    assert area > 5 * noise > 0
    opposite, same = areas(judged, -EFFECT)
    assert opposite < -5 * noise and same == noise
    found = [areas(judged, RNG.normal(size=EFFECT.shape))[0] for _ in range(30)]
    assert np.abs(found).max() < 4 * noise and 0.3 * noise < np.std(found) < 3 * noise


def test_methods_share_the_controls_of_removal(world: dict[str, Any]) -> None:
    judged = removal()
    for scores, seed in ((EFFECT, 4), (RNG.normal(size=EFFECT.shape), 5)):
        judged.evaluate(case(scores, seed=seed))
    one, control, other, again = world["plans"]
    assert control.keys() == again.keys() != one.keys() != other.keys()
    judged.evaluate(case(EFFECT, seed=5))
    assert world["plans"][-2].keys() == one.keys(), "of retrainings with a seed of their own"
    assert removal(shares=(0.25, 0.1, 0.1)).shares == (0.1, 0.25)
    assert removal(seed=1).plan(TASK, 4).keys() != control.keys()
    fixed = removal(regime="fixed").evaluate(case(EFFECT))["removal_area"].truth
    assert fixed["explained_seed"] == 4 and "repeats" not in fixed


def test_the_noise_is_that_of_one_control_in_the_methods_place() -> None:
    judged, draw = removal(controls=3), np.random.default_rng(0)
    squares = []
    for _ in range(1000):
        control = draw.normal(size=(1, 1, 3, 1))
        found = judged._metrics("removal_area", {}, 0, np.zeros((1, 1, 1)), control, lambda e: e[0])
        squares.append(found["removal_noise"].value ** 2)
    assert np.mean(squares) == pytest.approx(1 + 1 / 2, rel=0.1), "one draw against the mean of two others"


def test_the_query_loss_difference_by_hand(world: dict[str, Any]) -> None:
    world["noise"] = 0.2
    effect = EFFECTS[100]
    judged = removal(shares=[0.01, 0.05], queries=8)
    found = judged.evaluate(case(effect, task=LARGE))
    assert set(found) == {"removal_area", "removal_noise", "qld", "qld_noise"}
    own, control = (
        base.retrain(LARGE, plan, Path(), Executor("auto", 1), lambda *_: None)["query"] for plan in world["plans"][:2]
    )
    own, control = own.reshape(2, 2, 8, QUERY)[:, 0], control.reshape(2, 2, 6, QUERY)[:, 0]  # (repeats, ..., Q)
    softplus = lambda margin: np.logaddexp(0, -margin)  # noqa: E731
    wanted = [softplus(own[:, q, q]).mean() - softplus(control[:, :, q]).mean() for q in range(QUERY)]
    np.testing.assert_allclose(found["qld"].by_query["value"], wanted)
    assert found["qld"].value == pytest.approx(np.mean(wanted)) and found["qld"].value > 0
    opposite = judged.evaluate(case(-effect, task=LARGE))
    assert opposite["qld"].value < 0 and opposite["qld_noise"].value == found["qld_noise"].value


def test_removal_counts_queries_that_are_no_number(world: dict[str, Any]) -> None:
    scores = EFFECT.copy()
    scores[[1, 2]] = np.nan
    found = removal(queries=8).evaluate(case(scores))["removal_area"]
    assert found.nan == 2 and np.isfinite(found.value)


def test_removal_of_a_real_retraining_has_the_sign_of_the_definition(tmp_path: Path) -> None:
    effects = case(EFFECT, store=tmp_path).retrain("effects", loo().plan(TASK, 4))["query"]
    scores, judged = (effects[0] - effects[1:]).T, removal(repeats=1)
    made = case(scores, store=tmp_path)
    found = judged.evaluate(made)
    assert found["removal_area"].value > 3 * found["removal_noise"].value
    assert made.notes["removal"] == made.notes["removal"] | {"engine": "vectorised", "trainings": 22, "made": 22}
    assert areas(judged, -scores, store=tmp_path)[0] < -3 * found["removal_noise"].value


# --- Shapley values --------------------------------------------------------------------------------------------------


def test_shapley_values_of_an_additive_world_are_sums_of_effects(world: dict[str, Any]) -> None:
    judged = shapley()
    plan, orders, members = judged.plan(TASK, 4), judged.orders(), judged.members(TASK)
    measured = base.retrain(TASK, plan, Path(), Executor("auto", 1), lambda *_: None)["query"]
    worth = measured.reshape(len(orders), 8, QUERY)
    values = shapley_values(worth, orders)
    sums = np.stack([EFFECT[:, group].sum(1) for group in members])
    np.testing.assert_allclose(values, sums + 3 / 8, atol=1e-12)  # what none are worth is shared equally
    np.testing.assert_allclose(values.sum(0), 3 + EFFECT.sum(1))
    np.testing.assert_allclose(worth[:, -1], np.tile(3 + EFFECT.sum(1), (16, 1)))


def test_shapley_agreement(world: dict[str, Any]) -> None:
    found = shapley().evaluate(case(EFFECT, calibrated=True))
    assert set(found) == {"shapley_pearson", "shapley_spearman", "shapley_top10"}, "nobody is calibrated to it"
    assert all(metric.value == pytest.approx(1.0) for metric in found.values())
    assert shapley().evaluate(case(-EFFECT))["shapley_pearson"].value == pytest.approx(-1.0)
    assert found["shapley_pearson"].truth == {
        "players": 8, "squares": 2, "repeats": 1, "regime": "common", "seed": 0
    }  # fmt: skip
    world["noise"] = 2.0
    noisy = shapley(players=20, squares=1, repeats=2).evaluate(case(EFFECT))["shapley_pearson"]
    assert noisy.ceiling is not None and 0.5 < noisy.ceiling < 1
    assert noisy.value == pytest.approx(noisy.ceiling, abs=0.1)


def test_rotations_estimate_the_shapley_values_of_a_game_that_is_not_additive() -> None:
    """Three players whose worth is of pairs and of all three: against the definition, over all six orders."""
    draw = np.random.default_rng(0)
    game = {frozenset(c): draw.normal(size=2) for k in (1, 2, 3) for c in combinations(range(3), k)}
    game[frozenset()] = np.zeros(2)

    def worth(orders: Array) -> Array:
        return np.array([[game[frozenset(order[: k + 1].tolist())] for k in range(3)] for order in orders])

    wanted = np.zeros((3, 2))
    for order in permutations(range(3)):
        for k, player in enumerate(order):
            wanted[player] += (game[frozenset(order[: k + 1])] - game[frozenset(order[:k])]) / 6
    everyone = np.array(list(permutations(range(3))))
    np.testing.assert_allclose(shapley_values(worth(everyone), everyone), wanted)
    many = rotations(3, 1500, seed=0)
    np.testing.assert_allclose(shapley_values(worth(many), many), wanted, atol=0.05)
    one = np.mean([shapley_values(worth(o), o) for o in (rotations(3, 1, seed=s) for s in range(1500))], axis=0)
    np.testing.assert_allclose(one, wanted, atol=0.05)
    single = shapley_values(worth(many[:3]), many[:3])
    assert abs(single - wanted).max() > 0.1, "one square alone does not have them"
    np.testing.assert_allclose(single.sum(0), game[frozenset(range(3))])


# --- the proximal Bregman response -----------------------------------------------------------------------------------


HIDDEN = replace(
    TASK,
    build=partial(Perceptron, [3, 8, 2]),
    recipe=replace(RECIPE, optimizer="sgd", epochs=15, weight_decay=0.0),
    identity={"version": 1, "hidden": [8]},
)


def bregman(sample: int | None = 20, damping: float = 0.05, seed: int = 0) -> PBRF:
    return PBRF(sample, damping, seed)


class Planted:
    """Stands in for the optimisation: responses are the planted effects; the first rows end at these `gradients`."""

    def __init__(self, gradients: Sequence[float] = (), linear: Array | None = None) -> None:
        self.gradients, self.linear, self.asked = gradients, EFFECT if linear is None else linear, []  # type: ignore[var-annotated]

    def __call__(self, task: Task, parameters: Any, rows: list[int], damping: float) -> Response:
        assert task.annotations is None
        self.asked.append(list(rows))
        gradient = torch.zeros(len(rows), dtype=torch.float64)
        gradient[: len(self.gradients)] = torch.tensor(self.gradients, dtype=torch.float64)
        response = torch.tensor(EFFECT[:, rows].T)
        response[~(gradient <= 1e-3)] *= -1e6
        return Response(response, torch.tensor(self.linear[:, rows].T), gradient)


def test_pbrf_of_real_optimisations_judges_by_them(tmp_path: Path) -> None:
    trajectory = train(TASK, 0)
    judged, made = bregman(sample=12), case(EFFECT, trajectory=trajectory, store=tmp_path)
    scores = np.zeros((QUERY, N))
    found = proximal_response(TASK, trajectory.final, list(range(N)), 0.05)
    for wanted, of in ((found.response, "response"), (found.linear, "linear")):
        metrics = judged.evaluate(case(wanted.numpy().T, calibrated=True, trajectory=trajectory, store=tmp_path))
        names = ("pearson", "spearman", "top10", "slope", "intercept", "exact_ggn")
        assert set(metrics) == {f"pbrf_{name}" for name in names}
        value, gate = metrics["pbrf_pearson"].value, metrics["pbrf_exact_ggn"]
        assert value == pytest.approx(1.0 if of == "response" else gate.value, abs=1e-6)
        assert 0.95 < gate.value < 0.99999 and (gate.better, gate.n, gate.nan) == (None, 12, 0)
        if of == "response":
            assert metrics["pbrf_slope"].value == pytest.approx(1.0, abs=1e-4)
            assert metrics["pbrf_intercept"].value == pytest.approx(0.0, abs=1e-4)
        assert metrics["pbrf_pearson"].truth == {"sample": 12, "damping": 0.05, "seed": 0, "explained_seed": 4}
        assert metrics["pbrf_pearson"].ceiling is None
    opposite = judged.evaluate(replace(made, attribution=lambda _: -found.response.numpy().T))
    assert opposite["pbrf_pearson"].value == pytest.approx(-1.0, abs=1e-6) and "pbrf_slope" not in opposite
    assert judged.evaluate(replace(made, attribution=lambda _: scores))["pbrf_pearson"].nan == QUERY


def test_responses_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = Planted()
    monkeypatch.setattr(pbrf, "proximal_response", planted)
    made = case(EFFECT, store=tmp_path)
    first = bregman().evaluate(made)
    assert first["pbrf_pearson"].value == pytest.approx(1.0)
    (asked,) = planted.asked
    assert len(asked) == 20
    assert bregman().evaluate(case(EFFECT, store=tmp_path)).keys() == first.keys()
    assert bregman(sample=15).evaluate(made)["pbrf_pearson"].n == QUERY
    assert len(planted.asked) == 1, "a smaller sample is there already"
    bregman(sample=25).evaluate(made)
    assert len(planted.asked[1]) == 5 and not set(planted.asked[1]) & set(asked), "a larger one asks for the rest"
    bregman(damping=0.1).evaluate(made)
    bregman().evaluate(replace(made, trajectory=replace(NOTHING, seed=1)))
    bregman().evaluate(replace(made, task=replace(TASK, identity={"version": 2})))
    assert [len(rows) for rows in planted.asked] == [20, 5, 20, 20, 20], "another damping, explained seed, task"


def test_responses_that_were_not_found_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pbrf, "proximal_response", Planted([0.5, np.nan]))
    found = bregman().evaluate(case(EFFECT, calibrated=True, store=tmp_path))
    assert found["pbrf_pearson"].value == pytest.approx(1.0), "the two would spoil it"
    assert found["pbrf_slope"].value == pytest.approx(1.0)
    assert (found["pbrf_exact_ggn"].n, found["pbrf_exact_ggn"].nan) == (18, 2)


def test_a_response_that_cannot_be_trusted_is_no_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, planted, said in (
        ("strays", Planted([0.5] * 3), r"damping=0\.05 is no truth: 3 of 20 optimisations did not converge"),
        ("far", Planted(linear=RNG.normal(size=EFFECT.shape)), r"correlates -?0\.\d+ with it \(needed 0\.95\)"),
        ("flat", Planted(linear=np.zeros_like(EFFECT)), r"correlates 0\.000"),
        ("none", Planted([0.5] * 20), r"20 of 20 optimisations did not converge"),
    ):
        monkeypatch.setattr(pbrf, "proximal_response", planted)
        with pytest.raises(Unfit, match=said):
            bregman().evaluate(case(EFFECT, store=tmp_path / folder))


def test_a_tiny_damping_of_a_network_gives_no_truth(tmp_path: Path) -> None:
    made = case(EFFECT, task=HIDDEN, trajectory=train(HIDDEN, 0), store=tmp_path)
    assert bregman(10, damping=0.5).evaluate(made)["pbrf_exact_ggn"].value > 0.95
    with pytest.raises(Unfit, match=r"damping=1e-06 is no truth: .*raise truth\.pbrf\.damping$"):
        bregman(10, damping=1e-6).evaluate(made)


def test_pbrf_refuses_what_has_no_dense_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    bregman().plan(TASK, 0)
    with pytest.raises(NotApplicable, match="no dropout"):
        bregman().plan(replace(TASK, build=partial(Perceptron, [3, 4, 2], 0.5)), 0)
    monkeypatch.setattr(pbrf, "LARGEST", 7)
    with pytest.raises(NotApplicable, match="at most 7 parameters; model=logreg has 8"):
        bregman().plan(TASK, 0)


# --- the store that a checkout brings along --------------------------------------------------------------------------


def test_shipped_trainings_are_read_and_not_made(tmp_path: Path) -> None:
    judged, scores = loo(sample=6), RNG.normal(size=EFFECT.shape)
    here = case(scores, store=tmp_path / "a")
    first = judged.evaluate(here)
    there = case(scores, store=tmp_path / "b", shipped=tmp_path / "a")
    second = judged.evaluate(there)
    assert [m.value for m in second.values()] == [m.value for m in first.values()]
    assert (here.notes["loo"]["made"], there.notes["loo"]["made"]) == (7, 0)
    assert there.notes["loo"]["trainings"] == 7 and not list((tmp_path / "b").rglob("*.safetensors"))
    more = case(scores, store=tmp_path / "b", shipped=tmp_path / "a")
    loo(sample=8).evaluate(more)
    assert more.notes["loo"]["made"] == 2 and list((tmp_path / "b").rglob("*.safetensors"))


# --- detection -------------------------------------------------------------------------------------------------------

DETECTION = Detection((0.1, 0.25))
ORACLE = np.where(POSITIVE, -1.0, 1.0) + 0.1 * RNG.random(N)


def test_detection_is_perfect_for_an_oracle_and_lowest_is_most_suspicious() -> None:
    found = DETECTION.evaluate(case(np.tile(ORACLE, (VAL, 1)), lambda: ORACLE))
    names = {f"{k}_{m}" for k in ("value", "attribution") for m in ("auc", "ap", "found10", "found25")}
    assert set(found) == names | {"base_rate"}
    for kind in ("value", "attribution"):
        assert found[f"{kind}_auc"].value == found[f"{kind}_ap"].value == 1.0
        assert found[f"{kind}_found10"].value == pytest.approx(4 / 6) and found[f"{kind}_found25"].value == 1.0
        assert np.allclose(found[f"{kind}_auc"].replicates, 1.0)
        assert found[f"{kind}_auc"].truth == {"flips": 6} and found[f"{kind}_auc"].n == N
    assert found["base_rate"].value == pytest.approx(6 / 40) and found["base_rate"].better is None
    assert found["base_rate"].entry()["low"] is None
    assert DETECTION.evaluate(case(None, lambda: -ORACLE))["value_auc"].value == 0.0


def test_rows_of_which_nobody_knows_the_right_label_do_not_count() -> None:
    """Without row 3, which is wrong, and row 4, which is not: as if they were not there."""
    known = {f"train:{i}": 0 for i in range(N) if i not in (3, 4)}
    sparse = replace(TASK, annotations=Annotations(FLIPPED - {"train:3"}, known))
    value = np.random.default_rng(5).normal(size=N)
    found = Detection((0.2,)).evaluate(case(value=lambda: value, task=sparse))
    rest = np.delete(np.arange(N), [3, 4])
    assert found["base_rate"].value == pytest.approx(5 / 38) and found["value_auc"].n == 38
    assert found["value_auc"].value == pytest.approx(roc_auc(POSITIVE[rest], -value[rest]))


def test_detection_averages_the_attribution_to_val() -> None:
    scores = 3 * RNG.normal(size=(VAL, N)) + ORACLE
    one, mean = DETECTION.evaluate(case(scores)), DETECTION.evaluate(case(None, lambda: scores.mean(0)))
    assert set(one) == {"attribution_auc", "attribution_ap", "attribution_found10", "attribution_found25", "base_rate"}
    assert set(mean) == {k.replace("attribution", "value") for k in one}
    assert one["attribution_auc"].value == pytest.approx(mean["value_auc"].value) and 0.5 < mean["value_auc"].value < 1
    assert np.array_equal(one["attribution_auc"].replicates, mean["value_auc"].replicates)


def test_detection_by_a_constant_is_chance_whatever_the_order() -> None:
    found = DETECTION.evaluate(case(None, lambda: np.zeros(N)))
    assert found["value_auc"].value == 0.5 and found["value_ap"].value == pytest.approx(6 / 40)
    assert found["value_found10"].value == pytest.approx(0.1) and found["value_found25"].value == pytest.approx(0.25)


@pytest.mark.parametrize("task", [replace(TASK, annotations=None), replace(TASK, annotations=Annotations())])
def test_detection_needs_labels_known_to_be_wrong(task: Task) -> None:
    with pytest.raises(NotApplicable, match="known to be wrong"):
        DETECTION.evaluate(case(np.tile(ORACLE, (VAL, 1)), lambda: ORACLE, task=task))


def test_detection_needs_a_value_or_an_attribution() -> None:
    with pytest.raises(NotApplicable, match="neither"):
        DETECTION.evaluate(case(None))


def test_one_query_that_is_no_number_does_not_hide_the_others_from_detection() -> None:
    scores = np.tile(ORACLE, (VAL, 1))
    scores[1] = np.nan
    found = DETECTION.evaluate(case(scores))["attribution_auc"]
    assert found.nan == 1 and found.value == 1.0


def test_a_value_that_is_no_number_is_told() -> None:
    value = ORACLE.copy()
    value[5] = np.nan
    found = DETECTION.evaluate(case(None, lambda: value))["value_auc"]
    assert found.nan == 1 and 0.95 < found.value <= 1.0


def test_finite_counts_queries() -> None:
    scores, bad = finite(np.array([[1.0, np.nan], [2.0, 3.0], [np.inf, -np.inf]]))
    assert scores.tolist() == [[1, 0], [2, 3], [0, 0]] and bad == 2
    metric = Metric(0.5, np.linspace(0, 1, 1001), 3, {"a": 1}, ceiling=0.9, nan=bad)
    assert metric.entry() == {
        "value": 0.5,
        "low": pytest.approx(0.025),
        "high": pytest.approx(0.975),
        "ceiling": 0.9,
        "n": 3,
        "nan": 2,
        "better": "higher",
        "truth": {"a": 1},
    }
