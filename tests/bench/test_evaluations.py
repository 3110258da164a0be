"""LDS, LOO and detection where every answer is planted: an additive world whose true scores are known."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from bench.evaluations import base
from bench.evaluations.base import Case, Metric, NotApplicable, finite
from bench.evaluations.detection import Detection
from bench.evaluations.lds import LDS
from bench.evaluations.loo import LOO
from bench.statistics import Array
from methods.base import Unsupported
from tasks.base import Annotations, Checkpoint, Examples, Recipe, Task, Trajectory
from tasks.errors import UserError
from tasks.models.mlp import Perceptron
from tasks.objectives.classification import Classification
from tasks.training.engines import Executor, Rows
from tasks.training.plan import Plan, explained_seed, random_subsets
from tasks.training.train import train

N, VAL, QUERY = 40, 6, 8
RNG = np.random.default_rng(0)
EFFECT = RNG.normal(size=(QUERY, N))  # [q, i]: measurement of q with i minus without i
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


def case(scores: Array | None = None, value: Callable[[], Array] = no_value, **changes: Any) -> Case:
    """A method that answers `scores` for every split."""

    def attribution(split: str) -> Array:
        if scores is None:
            raise NotApplicable("no attribution")
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
    state: dict[str, Any] = {"noise": 0.0, "plans": [], "told": []}

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
        rows = 3.0 + plan.weights.numpy() @ EFFECT.T
        for m, key in enumerate(plan.keys()):
            rng = np.random.default_rng(int(hashlib.sha256(key.encode()).hexdigest()[:8], 16))
            rows[m] += state["noise"] * rng.normal(size=QUERY)
        return {"query": rows, "val": np.full((len(plan), VAL), np.nan)}

    monkeypatch.setattr(base, "retrain", planted)
    return state


def lds(**changes: Any) -> LDS:
    return LDS(**{"subsets": 25, "repeats": 2, "regime": "common", "fraction": 0.5, "seed": 0, **changes})


def loo(**changes: Any) -> LOO:
    return LOO(**{"sample": None, "weight": 0.0, "repeats": 1, "regime": "fixed", "seed": 0, **changes})


@pytest.mark.parametrize("regime", ["fixed", "common", "fresh"])
def test_lds_is_one_for_the_true_scores_and_minus_one_for_their_opposite(world: dict[str, Any], regime: str) -> None:
    for scores, wanted in ((EFFECT, 1.0), (5 * EFFECT + 0.0, 1.0), (-EFFECT, -1.0)):
        (found,) = lds(regime=regime).evaluate(case(scores)).values()
        assert found.value == pytest.approx(wanted)
        assert np.allclose(found.replicates, wanted) and len(found.replicates) == 1000
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


def test_the_ceiling_is_what_the_true_scores_reach(world: dict[str, Any]) -> None:
    world["noise"] = 3.0
    found = lds(subsets=1000, repeats=2).evaluate(case(EFFECT))["lds"]
    assert found.ceiling is not None and 0.5 < found.ceiling < 0.95
    assert found.value == pytest.approx(found.ceiling, abs=0.02)
    shuffled = EFFECT[:, RNG.permutation(N)]
    assert lds(subsets=100).evaluate(case(shuffled))["lds"].value == pytest.approx(0, abs=0.15)


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
    assert np.isfinite(found.replicates).all() and found.replicates.mean() == pytest.approx(0.75, abs=0.02)
    found = loo().evaluate(case(scores, calibrated=True))["loo_slope"]
    assert found.value == pytest.approx((QUERY - 2) / QUERY) and found.nan == 2
    flat = EFFECT.copy()
    flat[1] = 0.1
    assert lds().evaluate(case(flat))["lds"].nan == 1


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("sample", [None, 12])
def test_loo_is_measurement_with_minus_without(world: dict[str, Any], weight: float, sample: int | None) -> None:
    found = loo(weight=weight, sample=sample).evaluate(case(EFFECT, calibrated=True))
    assert set(found) == {"loo_pearson", "loo_spearman", "loo_slope"}
    for metric in found.values():
        assert metric.value == pytest.approx(1.0), "the score is in units of a whole removal"
        assert np.allclose(metric.replicates, 1.0)
    half = loo(weight=weight, sample=sample).evaluate(case(0.5 * EFFECT, calibrated=True))
    assert half["loo_slope"].value == pytest.approx(2.0) and half["loo_slope"].better == "one"
    opposite = loo(weight=weight, sample=sample).evaluate(case(-EFFECT))
    assert set(opposite) == {"loo_pearson", "loo_spearman"}, "a slope is of calibrated methods only"
    assert opposite["loo_pearson"].value == opposite["loo_spearman"].value == pytest.approx(-1.0)


def test_loo_compares_within_a_repeat(world: dict[str, Any]) -> None:
    world["noise"] = 0.3
    plan = loo(sample=12, regime="common", repeats=3).plan(TASK, 4)
    assert len(plan) == 3 * 13 and len(set(plan.seeds)) == 3
    for r in range(3):
        assert plan.weights[13 * r].tolist() == [1.0] * N
        assert (plan.weights[13 * r + 1 : 13 * r + 13].sum(1) == N - 1).all()
    found = loo(regime="common", repeats=3).evaluate(case(EFFECT))["loo_pearson"]
    assert found.ceiling is not None and found.value == pytest.approx(found.ceiling, abs=0.03)
    assert found.ceiling < 0.995


def test_loo_of_a_real_retraining_has_the_sign_of_the_definition(tmp_path: Path) -> None:
    """Scores made by hand: margin with the example minus margin without it."""

    def margins(weights: torch.Tensor) -> np.ndarray:
        final = train(TASK, 0, weights).final
        x, y = TASK.splits["query"].inputs["x"], TASK.splits["query"].targets
        logits = x @ final["layers.linear0.weight"].T + final["layers.linear0.bias"]
        return ((2 * y - 1) * (logits[:, 1] - logits[:, 0])).numpy()

    everything, judged = torch.ones(N, dtype=torch.float64), loo(sample=8)
    scores, whole = np.zeros((QUERY, N)), margins(torch.ones(N))
    for i in judged.rows(TASK):
        without = everything.clone()
        without[i] = 0
        scores[:, i] = whole - margins(without)
    told: list[tuple[str, int, int]] = []
    made = replace(case(scores, calibrated=True, store=tmp_path), progress=lambda *a: told.append(a))
    for metric in judged.evaluate(made).values():
        assert metric.value == pytest.approx(1.0, abs=1e-4)
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
    ]
    for make, problem in refused:
        with pytest.raises(UserError, match=problem):
            make()


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
