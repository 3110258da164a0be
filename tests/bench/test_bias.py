"""The judge of biased preferences: query sets, length-matched AUC, repair of the bias, labellers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_cases import Facts, lead_of, pair_task
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from bench.evaluations.accuracy import kept
from bench.evaluations.base import Case, NotApplicable
from bench.evaluations.bias import Bias, loss_weights, query_sets, set_rankings, trait_lead
from bench.evaluations.bias_repair import BiasRepair, asked_of, margins
from bench.evaluations.labellers import Labellers, row_weights, skills
from bench.statistics import Array, around, specificity_at, stratified_counts
from methods.base import Unsupported
from tasks.base import Annotations, Examples, Task, named_seed
from tasks.errors import UserError
from tasks.training.engines import Executor
from tasks.training.plan import explained_seed
from tasks.training.train import load, train

TASK = pair_task()
N = len(TASK.train)
FLIPPED = np.array([i in TASK.annotations.flipped for i in TASK.train.ids]) if TASK.annotations else np.zeros(0)
BIAS = Bias((0.1, 0.5), 0.8, "margin")


def no_value() -> Array:
    raise Unsupported("no value")


def case(
    scores: dict[str, Array] | None = None,
    value: Callable[[], Array] = no_value,
    task: Task = TASK,
    store: Path = Path("nowhere"),
) -> Case:
    def attribution(split: str) -> Array:
        if scores is None:
            raise NotApplicable("no attribution")
        return scores[split]

    trajectory: Any = None
    return Case(task, 0, trajectory, attribution, value, False, store, Executor("vectorised", 1), lambda *_: None)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_specificity_is_that_of_sklearns_curve_without_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        positive = rng.random(50) < 0.3
        score = rng.permutation(50) + 6.0 * positive + 0.01 * rng.random(50)
        fpr, tpr, _ = roc_curve(positive, score, drop_intermediate=False)
        for recall in (0.5, 0.8):
            assert specificity_at(positive, score, recall) == pytest.approx(1 - fpr[tpr >= recall - 1e-9][0])


def test_specificity_by_hand_with_ties_and_counts() -> None:
    positive = np.array([True, True, False, False, True, False])
    score = np.array([3.0, 2.0, 2.0, 1.0, 0.0, 0.0])
    # recall 1/3: the first row. 1/2: half of the tied pair at 2, half its negative
    assert specificity_at(positive, score, 1 / 3) == pytest.approx(1.0)
    assert specificity_at(positive, score, 0.5) == pytest.approx(1 - 0.5 / 3)
    assert specificity_at(positive, score, 0.7) == pytest.approx(1 - (1 + 1 + 0.1) / 3)
    assert specificity_at(positive, np.zeros(6), 0.8) == pytest.approx(0.2)  # chance
    for counts in stratified_counts(positive, 1, 10):
        rows = np.repeat(np.arange(6), counts)
        assert specificity_at(positive, score, 0.8, counts) == pytest.approx(
            specificity_at(positive[rows], score[rows], 0.8)
        )


# --- bias ------------------------------------------------------------------------------------------------------------


def test_sets_and_leads_are_of_the_label_as_given() -> None:
    assert TASK.facts
    assert np.array_equal(trait_lead(TASK, TASK.train), lead_of(TASK.train, dict(TASK.facts)))
    assert (trait_lead(TASK, TASK.train)[FLIPPED] > 0).all()
    lead = lead_of(TASK.splits["query"], dict(TASK.facts))
    sets = query_sets(TASK)
    assert np.array_equal(sets["less"], lead < 0) and np.array_equal(sets["more"], lead >= 0) and sets["full"].all()
    assert (lead == 0).any(), "a tie, which is More's"


def test_each_set_judges_by_its_own_queries() -> None:
    """Scores that find the flips by Less, hide them by More: AUC 1 and 0; by sklearn with noise."""
    sets, rng = query_sets(TASK), np.random.default_rng(0)
    scores = np.where(sets["less"][:, None], np.where(FLIPPED, -1.0, 1.0), np.where(FLIPPED, 1.0, -1.0))
    found = BIAS.evaluate(case({"query": scores}))
    assert found["less_auc"].value == 1 and found["more_auc"].value == 0
    assert found["less_tnr80"].value == 1 and found["more_tnr80"].value == 0
    assert not any(name.startswith("value") for name in found)

    scores = rng.normal(size=scores.shape) + 0.3 * scores
    found, value = BIAS.evaluate(case({"query": scores}, lambda: scores[0])), scores[0]
    matched = lead_of(TASK.train, dict(TASK.facts)) > 0
    for name, helps in {"value": value, **{k: scores[rows].mean(0) for k, rows in sets.items()}}.items():
        assert found[f"{name}_auc"].value == pytest.approx(roc_auc_score(FLIPPED, -helps))
        assert found[f"{name}_ap"].value == pytest.approx(average_precision_score(FLIPPED, -helps))
        assert found[f"{name}_matched_auc"].value == pytest.approx(roc_auc_score(FLIPPED[matched], -helps[matched]))
        first = np.argsort(helps)[: N // 10]
        assert found[f"{name}_found10"].value == pytest.approx(FLIPPED[first].sum() / FLIPPED.sum())
    assert found["base_rate"].value == pytest.approx(FLIPPED.mean())
    assert found["less_auc"].truth == {"flips": 8, "queries": int(sets["less"].sum()), "of": "margin"}
    assert found["less_matched_auc"].n == matched.sum() < N
    assert found["less_auc"].entry()["low"] < found["less_auc"].value < found["less_auc"].entry()["high"]


def test_the_matched_auc_takes_the_shortcut_away() -> None:
    """Who only tells whether a label prefers more of the trait is well above chance, and at chance when matched."""
    rule = -(lead_of(TASK.train, dict(TASK.facts)) > 0).astype(float)
    found = BIAS.evaluate(case(None, lambda: rule))
    assert found["value_auc"].value > 0.7 and found["value_matched_auc"].value == 0.5


def test_positives_that_prefer_less_are_not_matched() -> None:
    """Errors of a labeller go both ways."""
    less = int(np.flatnonzero(lead_of(TASK.train, dict(TASK.facts)) < 0)[0])
    assert TASK.annotations is not None
    task = replace(TASK, annotations=Annotations(TASK.annotations.flipped | {TASK.train.ids[less]}))
    value = np.random.default_rng(1).normal(size=N)
    found = [BIAS.evaluate(case(None, lambda: value, t)) for t in (TASK, task)]
    assert found[0]["value_matched_auc"].value == found[1]["value_matched_auc"].value
    assert found[0]["value_auc"].value != found[1]["value_auc"].value


def test_a_query_that_is_no_number_is_counted_in_its_set() -> None:
    sets = query_sets(TASK)
    scores = np.tile(np.where(FLIPPED, -1.0, 1.0), (len(sets["less"]), 1))
    scores[np.flatnonzero(sets["less"])[0]] = np.nan
    found = BIAS.evaluate(case({"query": scores}))
    assert (found["less_auc"].nan, found["more_auc"].nan, found["full_auc"].nan) == (1, 0, 1)
    assert found["less_auc"].value == 1


def test_bias_is_told_where_it_cannot_be_judged() -> None:
    other = replace(TASK, pairs=False)
    for task, said in [(other, "pairs"), (replace(TASK, facts={}), "trait"), (replace(TASK, annotations=None), "rate")]:
        with pytest.raises(NotApplicable, match=said):
            BIAS.plan(task, 0)
    with pytest.raises(NotApplicable, match="neither"):
        BIAS.evaluate(case())
    for shares, recall, of in (((0.0,), 0.8, "margin"), ((0.1,), 1.0, "margin"), ((0.1,), 0.5, "reward")):
        with pytest.raises(UserError, match=r"truth\.bias\."):
            Bias(shares, recall, of)


def test_of_the_loss_is_attribution_to_the_mean_loss_of_a_set() -> None:
    """Gradient products: scores of margins, weighted, against gradients of the set's mean loss by autograd."""
    trained = train(TASK, explained_seed(0))
    model = load(TASK.initial(0), trained.final).requires_grad_(True)
    queries, sets = TASK.splits["query"], query_sets(TASK)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])

    rows = [TASK.train.batch([i]) for i in range(N)]
    of_train = torch.stack([gradient(TASK.loss(model, row).sum()) for row in rows])
    of_query = torch.stack([gradient(TASK.measure(model, queries.batch([q])).sum()) for q in range(len(queries))])
    judged = replace(case({"query": (-of_query @ of_train.T / N).double().numpy()}), trajectory=trained)
    found = {name: helps for name, helps, _, _ in set_rankings(judged, "loss")}
    for name, members in sets.items():
        asked = queries.batch(torch.as_tensor(np.flatnonzero(members)))
        expected = (gradient(TASK.loss(model, asked).mean()) @ of_train.T / N).double().numpy()
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-6)
    by_margin = {name: helps for name, helps, _, _ in set_rankings(judged, "margin")}
    assert np.abs(found["full"] / by_margin["full"]).std() > 1e-3  # another ranking


def test_loss_weights_are_those_of_their_queries_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tokens come by length, not in their order."""
    judged = replace(case(), trajectory=train(TASK, explained_seed(0)))
    expected, order = loss_weights(judged), torch.randperm(14, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(Examples, "batches", lambda rows, size: list(order.split(5)))
    assert loss_weights(judged) == pytest.approx(expected, rel=1e-9) and np.ptp(expected) > 0.1


# --- repair ----------------------------------------------------------------------------------------------------------

BIASED = pair_task(rows=80, flips=25, test=120)
REPAIR = BiasRepair(0.3, ("relabel", "remove"), 4, 0)


def test_who_wins_by_hand() -> None:
    """Rewards that follow the trait win always, their opposite never; a model that is always right wins half the time
    where the label is held fixed, whichever label is the more frequent."""
    test = BIASED.splits["test"]
    first, second = np.array([BIASED.facts[i].trait for i in test.ids]).T
    label = np.where(test.targets.numpy() == 0, 1.0, -1.0)
    blind = replace(BIASED, facts={i: replace(fact, quality=None) for i, fact in BIASED.facts.items()})
    for task, at in ((BIASED, "equal quality"), (blind, "fixed label")):
        asked = asked_of(task)
        assert asked.at == at and asked.weights.mean() == pytest.approx(1)
        for sign in (1, -1):
            follows = (label * sign * (first - second))[None]
            assert asked.more_wins(follows).mean() == pytest.approx((1 + sign) / 2)
            assert asked.levels("a", follows, {})["a_correlation"].value == pytest.approx(sign)
        assert asked.more_wins(np.zeros((1, len(label)))).mean() == pytest.approx(0.5)
    lead = lead_of(test, dict(BIASED.facts))
    assert (lead > 0).sum() != (lead < 0).sum()
    assert asked_of(blind).more_wins(np.ones((1, len(label)))).mean() == pytest.approx(0.5)
    equal = [f.quality[0] == f.quality[1] and f.trait[0] != f.trait[1] for f in (BIASED.facts[i] for i in test.ids)]
    assert asked_of(BIASED).rows.tolist() == np.flatnonzero(equal).tolist()


def test_the_oracle_takes_the_bias_away_and_a_method_that_knows_is_the_oracle(tmp_path: Path) -> None:
    assert BIASED.annotations is not None
    knows = np.array([-1.0 if i in BIASED.annotations.flipped else 1.0 for i in BIASED.train.ids])
    queries = len(BIASED.splits["query"])
    harms = {"query": np.tile(-knows, (queries, 1))}
    found = REPAIR.evaluate(case(harms, lambda: knows, BIASED, tmp_path))
    for action in ("relabel", "remove"):
        for figure in ("more_wins", "correlation", "accuracy"):
            key = f"{action}_{figure}_change"
            assert found[f"value_{key}"].value == pytest.approx(found[f"oracle_{key}"].value)
            assert found[f"oracle_{key}"].better is None
        assert found[f"oracle_{action}_more_wins_change"].value < -0.05
        assert found[f"oracle_{action}_correlation_change"].value < -0.1
        assert found[f"value_{action}_correlation_change"].better is None, "it may be lowered too far"
        assert found[f"less_{action}_correlation_change"].value > found[f"value_{action}_correlation_change"].value
    entry = found["value_relabel_correlation_change"].entry()
    assert entry["low"] < entry["value"] < entry["high"] and entry["value"] < -0.1
    assert found["value_relabel_more_wins_change"].value == pytest.approx(
        found["oracle_relabel_more_wins_change"].value
    )
    assert found["unrepaired_more_wins"].value > 0.5 + 0.05

    # The unrepaired model by hand: trained by the same seeds on the task as it is.
    seed = kept(len(BIASED.train), [[]] * 4, 0, "truth.bias_repair").seeds[1]
    model = load(BIASED.initial(0), train(BIASED, seed).final)
    test = BIASED.splits["test"]
    with torch.no_grad():
        reward = model(test.inputs["x"]).numpy()
    after = after_removal(REPAIR, case(None, task=BIASED, store=tmp_path), [[], []])[1]
    chosen = test.targets.numpy()
    assert after == pytest.approx(reward[np.arange(len(chosen)), chosen] - reward[np.arange(len(chosen)), 1 - chosen])
    trait = np.array([BIASED.facts[i].trait for i in test.ids])
    asked = asked_of(BIASED)
    x, y = asked.correlations(after[None])
    assert y[:, 0] == pytest.approx(reward[:, 0] - reward[:, 1]) and np.array_equal(x[:, 0], trait[:, 0] - trait[:, 1])
    assert asked.levels("m", after[None], {})["m_correlation"].value == pytest.approx(
        spearmanr(trait[:, 0] - trait[:, 1], reward[:, 0] - reward[:, 1]).statistic
    )


def test_repair_of_a_bias_by_hand(tmp_path: Path) -> None:
    """Each model trained by itself, on rows of which a part is wrong; each figure by its definition."""
    task, repeats = pair_task(rows=40, flips=12, test=120), 2
    task = replace(task, recipe=replace(task.recipe, epochs=5))
    assert task.annotations is not None
    clean, test, size = task.annotations.clean, task.splits["test"], 12
    wrong = np.array([i in task.annotations.flipped for i in task.train.ids])
    value = np.random.default_rng(3).normal(size=40) - 0.7 * wrong
    first = np.argsort(value)[:size].tolist()
    assert 0 < wrong[first].sum() < size, "right labels stay"
    queries = {"query": np.tile(-value, (len(task.splits["query"]), 1))}
    found = BiasRepair(0.3, ("relabel", "remove"), repeats, 0).evaluate(case(queries, lambda: value, task, tmp_path))
    seeds = kept(40, [[]] * repeats, 0, "truth.bias_repair").seeds
    trait = np.array([task.facts[i].trait for i in test.ids])
    equal = np.array([task.facts[i].quality[0] == task.facts[i].quality[1] for i in test.ids])
    lead = trait[:, 0] - trait[:, 1]

    def figures(action: str, repeat: int, rows: list[int]) -> np.ndarray:
        targets, weights = task.train.targets.clone(), torch.ones(40)
        if action == "remove":
            weights[rows] = 0
        else:
            targets[rows] = torch.tensor([clean[task.train.ids[i]] for i in rows])
        changed = replace(task, splits={**task.splits, "train": replace(task.train, targets=targets)})
        made = train(changed, seeds[repeat], weights, own_batches=True)
        with torch.no_grad():
            reward = load(task.initial(0), made.final)(test.inputs["x"]).numpy()
        lead_of_reward = reward[:, 0] - reward[:, 1]
        wins = (lead_of_reward * lead > 0)[equal & (lead != 0)].mean()
        right = (reward.argmax(1) == test.targets.numpy()).mean()
        return np.array([wins, spearmanr(lead, lead_of_reward).statistic, right])

    def mean(action: str, rows: list[list[int]]) -> np.ndarray:
        return np.mean([figures(action, r, one) for r, one in enumerate(rows)], axis=0)

    names = ("more_wins", "correlation", "accuracy")
    expected = {f"unrepaired_{k}": v for k, v in zip(names, mean("remove", [[]] * repeats), strict=True)}
    for action in ("relabel", "remove"):
        random = mean(action, drawn(repeats, 40))
        expected |= {f"random_{action}_{k}": v for k, v in zip(names, random, strict=True)}
        ends = {"value": first, "less": np.argsort(-value)[:size].tolist(), "oracle": np.flatnonzero(wrong).tolist()}
        for ranking, rows in ends.items():
            change = mean(action, [rows] * repeats) - random
            expected |= {f"{ranking}_{action}_{k}_change": v for k, v in zip(names, change, strict=True)}
    assert {name: metric.value for name, metric in found.items()} == pytest.approx(expected, abs=1e-9)


def test_a_change_is_of_two_sides() -> None:
    """Of a side and itself nothing changes, whatever is drawn; of two sides swapped, all signs."""
    asked, rng = asked_of(BIASED), np.random.default_rng(0)
    one, other = rng.normal(size=(2, 3, 120))
    for metric in asked.changes("same", one, one.copy(), {}, 0).values():
        assert metric.value == 0 and np.abs(metric.replicates).max() < 1e-12
    there, back = asked.changes("a", one, other, {}, 0), asked.changes("a", other, one, {}, 0)
    for name, metric in there.items():
        assert metric.value == pytest.approx(-back[name].value) and metric.value != 0
        assert metric.replicates == pytest.approx(-back[name].replicates)


def after_removal(repair: BiasRepair, judged: Case, rows: list[list[int]]) -> Any:
    return repair.after(judged, "remove", rows, partial(margins, judged))


def test_random_repair_changes_nothing_against_itself(tmp_path: Path) -> None:
    """A method that chooses what random rows of the first repeat are has no change in that repeat."""
    first = np.random.default_rng(named_seed("bias repair", 0)).permutation(len(BIASED.train))[:24]
    value = np.ones(len(BIASED.train))
    value[first] = -1.0
    repair = replace(REPAIR, actions=("remove",), repeats=2)
    judged = case(None, lambda: value, BIASED, tmp_path)
    found = repair.evaluate(judged)
    one, other = (after_removal(repair, judged, [first.tolist(), rows]) for rows in (first.tolist(), [0, 1]))
    assert np.array_equal(one[0], other[0]) and not np.array_equal(one[1], other[1])
    assert abs(found["value_remove_accuracy_change"].value) <= 1
    assert found["random_remove_accuracy"].value == pytest.approx(
        (np.stack([one[0], after_removal(repair, judged, drawn(2))[1]]) > 0).mean()
    )


def test_a_repeat_keeps_its_seed_whatever_is_relabelled_in_the_others(tmp_path: Path) -> None:
    assert BIASED.annotations is not None
    judged = case(None, task=BIASED, store=tmp_path)
    one, other = (np.flatnonzero([i in BIASED.annotations.flipped for i in BIASED.train.ids])[k::2] for k in (0, 1))

    def after(*rows: np.ndarray) -> Array:
        return REPAIR.after(judged, "relabel", [found.tolist() for found in rows], partial(margins, judged))

    alone, mixed = (after(one, one, one), after(other, other, other)), after(one, other, one)
    assert mixed == pytest.approx(np.stack([alone[0][0], alone[1][1], alone[0][2]]))
    assert len({float(margin) for margin in np.concatenate(alone)[:, 0]}) == 6
    nothing = np.array([], dtype=int)
    assert after(nothing, nothing) == pytest.approx(after_removal(REPAIR, judged, [[], []]))


def drawn(repeats: int, rows: int = 80) -> list[list[int]]:
    """Three tenths of the rows."""
    rng = np.random.default_rng(named_seed("bias repair", 0))
    return [rng.permutation(rows)[: 3 * rows // 10].tolist() for _ in range(repeats)]


def test_bias_repair_refuses_what_cannot_be() -> None:
    for changes, key in [({"share": 1.0}, "share"), ({"actions": ("burn",)}, "actions"), ({"repeats": 1}, "repeats")]:
        with pytest.raises(UserError, match=rf"truth\.bias_repair\.{key}"):
            replace(REPAIR, **changes)
    with pytest.raises(UserError, match="share"):
        replace(REPAIR, share=0.001).plan(BIASED, 0)
    with pytest.raises(NotApplicable, match="pairs"):
        REPAIR.plan(replace(BIASED, pairs=False), 0)
    shared = replace(BIASED, splits={**BIASED.splits, "query": BIASED.splits["test"]})
    with pytest.raises(UserError, match=r"task\.n_test"):
        REPAIR.plan(shared, 0)
    assert REPAIR.later() == 36


# --- labellers -------------------------------------------------------------------------------------------------------

SKILLS = {"a": 0.95, "b": 0.8, "c": 0.65, "d": 0.5}


def pool() -> Task:
    """25 rows a labeller, of which so many are wrong that the share of the right ones is his skill."""
    clean = pair_task(rows=100, flips=0)
    targets, facts, wrong = clean.train.targets.clone(), dict(clean.facts), set()
    for k, (name, skill) in enumerate(SKILLS.items()):
        for j, row in enumerate(range(k, 100, 4)):
            i = clean.train.ids[row]
            facts[i] = Facts(facts[i].trait, facts[i].quality, name)
            if j < round(25 * (1 - skill)):
                targets[row] = 1 - targets[row]
                wrong.add(i)
    train = replace(clean.train, targets=targets)
    known = dict(zip(train.ids, clean.train.targets.tolist(), strict=True))
    return replace(
        clean, splits={**clean.splits, "train": train}, facts=facts, annotations=Annotations(frozenset(wrong), known)
    )


def test_skills_are_shares_of_right_labels() -> None:
    of_row, right, labels = skills(pool())
    assert labels.tolist() == [25] * 4 and of_row[:5].tolist() == [0, 1, 2, 3, 0]
    assert (right / labels).tolist() == pytest.approx([0.96, 0.8, 0.64, 0.52])


def test_weights_keep_the_order_and_have_mean_one_in_the_batches() -> None:
    of_row = np.array([0, 0, 1, 2, 2, 2])
    weights = row_weights(np.array([2.0, -1.0, 1.0]), of_row)
    assert weights == pytest.approx(np.array([2, 2, 0, 1, 1, 1]) / (7 / 5))
    assert row_weights(np.array([-1.0, -2.0, 0.0]), of_row).tolist() == [1.0] * 6


def test_scores_that_know_the_errors_recover_the_skills_and_help(tmp_path: Path) -> None:
    task = pool()
    assert task.annotations is not None
    helps = np.array([-1.0 if i in task.annotations.flipped else 1.0 for i in task.train.ids])
    val = {"val": np.tile(helps, (len(task.splits["val"]), 1))}
    judge = Labellers(3, 0)
    found = judge.evaluate(case(val, lambda: -helps, task, tmp_path))
    assert found["attribution_skill_spearman"].value == pytest.approx(1)
    assert found["value_skill_spearman"].value == pytest.approx(-1)
    assert around(found["attribution_skill_spearman"].replicates, 1.0).shape == (1000,)
    assert found["attribution_weighted_gain"].value > found["shuffled_weighted_gain"].value
    assert found["oracle_weighted_gain"].value >= 0 and found["oracle_weighted_gain"].better is None
    # Weights of the scores 0.92, .6, .28, .04 by hand, through the same training.
    _, right, labels = skills(task)
    weights = np.repeat(2 * right / labels - 1, 25).reshape(4, 25).T.flatten()
    seed = kept(100, [[]] * 3, 0, "truth.labellers").seeds[0]
    model = load(task.initial(0), train(task, seed, torch.as_tensor(weights / weights.mean()), own_batches=True).final)
    test = task.splits["test"]
    with torch.no_grad():
        by_hand = (model(test.inputs["x"]).argmax(1) == test.targets).numpy()
    by_judge = judge._accuracy(case(None, task=task, store=tmp_path), [2 * right / labels - 1] * 3, skills(task)[0])
    assert np.array_equal(by_judge[0], by_hand)


def test_who_is_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores that the models are trained by, of labellers of 40, 30, 20 and 10 rows; accuracies are made up."""
    task, repeats, asked = pool(), 8, []
    owner = np.repeat(list(SKILLS), [40, 30, 20, 10])
    facts = {i: replace(task.facts[i], labeller=str(k)) for i, k in zip(task.train.ids, owner, strict=True)}
    task = replace(task, facts={**task.facts, **facts})
    assert task.annotations is not None
    wrong = np.array([i in task.annotations.flipped for i in task.train.ids])
    helps = np.repeat([0.1, 0.3, 0.2, 0.9], [40, 30, 20, 10]) + 0.01 * np.arange(100) % 0.05
    means, skill, odds = (
        np.array([rule(owner == name) for name in SKILLS])
        for rule in (
            lambda rows: helps[rows].mean(),
            lambda rows: 1 - wrong[rows].mean(),
            lambda rows: np.log(((~wrong)[rows].sum() + 1) / (wrong[rows].sum() + 1)),
        )
    )

    def accuracy(judge: Labellers, judged: Case, scores: list[Array], of_row: np.ndarray) -> Array:
        asked.append(np.stack(scores))
        return asked[-1] @ np.array([[1.0], [2.0], [4.0], [8.0]])

    monkeypatch.setattr(Labellers, "_accuracy", accuracy)
    scores = {"val": np.tile(helps, (len(task.splits["val"]), 1))}
    found, _ = (Labellers(repeats, seed).evaluate(case(scores, task=task)) for seed in (0, 1))
    equal, by_score, shuffled, best, *again = asked
    assert (equal == 1).all() and equal.shape == (repeats, 4)
    assert by_score == pytest.approx(np.tile(means, (repeats, 1))) and best == pytest.approx(
        np.tile(odds, (repeats, 1))
    )
    assert np.array_equal(np.sort(shuffled), np.sort(by_score)) and not np.array_equal(shuffled, again[2])
    assert len({tuple(row) for row in shuffled}) > 3, "of 8 draws of 24 orders"
    for name, weights in {"attribution": by_score, "shuffled": shuffled, "oracle": best}.items():
        made_up = (weights - equal) @ [1, 2, 4, 8]
        assert found[f"{name}_weighted_gain"].value == pytest.approx(made_up.mean())
    assert found["equal_accuracy"].value == 15
    assert found["attribution_skill_spearman"].value == pytest.approx(spearmanr(means, skill).statistic)


def test_labellers_are_told_where_nobody_knows_them() -> None:
    with pytest.raises(NotApplicable, match=r"task\.labellers="):
        Labellers(2, 0).plan(TASK, 0)
    task = pool()
    with pytest.raises(UserError, match=r"task\.n_test"):
        Labellers(2, 0).plan(replace(task, splits={**task.splits, "val": task.splits["test"]}), 0)
    two = {i: replace(f, labeller="a" if f.labeller in ("a", "c") else "b") for i, f in task.facts.items()}
    with pytest.raises(NotApplicable, match="3 labellers"):
        Labellers(2, 0).plan(replace(task, facts=two), 0)


def test_the_pair_task_is_learned() -> None:
    """What the tests above lean on."""
    clean = pair_task(flips=0)
    model = load(clean.initial(0), train(clean, explained_seed(0)).final)
    test = clean.splits["test"]
    with torch.no_grad():
        assert (model(test.inputs["x"]).argmax(1) == test.targets).double().mean() > 0.7
