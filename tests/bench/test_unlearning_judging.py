"""Forget sets, masks, neighbours, golds and figures: each against what is planted or counted by hand."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torch.func import functional_call
from unlearning_cases import FORGET, IGNORED, classifier, context, flat, problem, sayings, trained

from bench import aggregate, figures, records
from bench.evaluations.base import Case, NotApplicable, Unfit
from bench.evaluations.unlearning import gold, language, masks
from bench.evaluations.unlearning.anchors import Nothing, Retrain
from bench.evaluations.unlearning.ascent import GradDiff, GradientAscent
from bench.evaluations.unlearning.base import Context, Parameters, Unlearned, Unlearner, moved
from bench.evaluations.unlearning.dmm import Matching
from bench.evaluations.unlearning.evaluation import ANCHORS, Unlearning, judged_by
from bench.evaluations.unlearning.forget import Forget, Forgotten, Random, Subset, TopK, checked
from bench.evaluations.unlearning.gradients import mean_gradient
from bench.evaluations.unlearning.influence import Influence
from bench.evaluations.unlearning.masks import NoMask, RandomMask, SalUnMask, WAGLEMask
from bench.evaluations.unlearning.matched import unit
from bench.evaluations.unlearning.measure import Measured, measured, strangers
from bench.evaluations.unlearning.metrics import against, distance, kl, ks, mia_auc, normalised, tow, two_samples
from bench.evaluations.unlearning.neighbours import nearest, represented
from bench.evaluations.unlearning.tuning import criterion
from methods.base import Method
from methods.curvature.cg import ConjugateGradients
from methods.curvature.damping import Damping
from methods.influence import Influence as InfluenceMethod
from tasks.base import Examples, Task, named_seed
from tasks.errors import UserError
from tasks.training.engines import Executor

METHOD = InfluenceMethod(ConjugateGradients("ggn", 1e-6, 100), Damping("absolute", 0.1, "global"))
STEPS: dict[str, Any] = {"name": "diff", "grid": {}, "steps": 8, "lr": 0.02, "batch": 10, "weight_decay": 0.0}
DIFF = GradDiff(**STEPS, forget_weight=1.0, retain_weight=1.0)
RANDOM = Random("random", 0.2, 0)
STEP = Influence("influence", {}, 1.0, "newton", Damping("absolute", 0.1, "global"))


def case(tmp: Path, task: Task | None = None, method: Method = METHOD, attribution: Any = None, seed: int = 0) -> Case:
    _, trajectory = trained("classifier")
    asked = task or trained("classifier")[0]
    return Case(
        task=asked,
        seed=seed,
        trajectory=trajectory,
        attribution=attribution or (lambda split: pytest.fail("no scores were needed")),
        value=lambda: pytest.fail("no values were needed"),
        calibrated=False,
        store=tmp / "truth",
        executor=Executor("vectorised", 1),
        progress=lambda *_: None,
        problem=problem(asked, trajectory, seed),
        method=method,
    )


def unlearning(unlearner: Unlearner = DIFF, forget: Forget = RANDOM, **changes: Any) -> Unlearning:
    settings: dict[str, Any] = {"mask": NoMask("none"), "matched": [], "tune": False}
    return Unlearning(unlearner, forget, **{**settings, **changes})


def said(**changes: Any) -> Measured:
    n = len(next(iter(changes.values())))
    blank = {name: torch.zeros(n, dtype=torch.float64) for name in ("nll", "loss", "margin")}
    blank |= {"correct": torch.ones(n).bool(), "logp": torch.zeros(n, 1).double(), "row": torch.arange(n)}
    return Measured(**{**blank, **changes})


# Forget sets


@dataclass(frozen=True)
class Origin:
    group: str
    kind: str


def with_facts(task: Task, kind: str = "author") -> Task:
    """Rows 0-23 of six groups, 24-29 of the world."""
    facts = {i: Origin(f"g{k // 4}", kind) for k, i in enumerate(task.train.ids[:24])}
    return replace(task, facts={**facts, **{i: Origin("world", "world") for i in task.train.ids[24:]}})


def test_a_random_set_is_of_the_asked_size_and_of_what_may_go(tmp_path: Path) -> None:
    task = with_facts(classifier())
    rows = Random("random", 0.5, 0).chosen(case(tmp_path, task)).rows
    assert len(rows) == 15 and max(rows) < 24 and rows == tuple(sorted(set(rows)))
    assert rows != Random("random", 0.5, 1).chosen(case(tmp_path, task)).rows


def test_whole_authors_go_but_of_a_class_a_share(tmp_path: Path) -> None:
    task = with_facts(classifier())
    rows = Subset("subset", 0.34, 0.4, 0).chosen(case(tmp_path, task)).rows
    assert len(rows) == 8 and len({i // 4 for i in rows}) == 2 and max(rows) < 24
    bare = classifier()
    rows = Subset("subset", 0.2, 0.4, 0).chosen(case(tmp_path, bare)).rows
    (label,) = {int(bare.train.targets[i]) for i in rows}
    assert len(rows) == round(0.4 * int((bare.train.targets == label).sum()))
    sentences = Subset("subset", 0.2, 0.5, 0).chosen(case(tmp_path, with_facts(bare, "sentence"))).rows
    assert len(sentences) == 2


def test_the_most_helpful_rows_go_and_others_of_their_labels_are_the_control(tmp_path: Path) -> None:
    task, helps = classifier(), np.random.default_rng(0).normal(size=30)
    scores = helps + np.random.default_rng(1).normal(size=(5, 1))
    found = TopK("topk", 0.2, 0).chosen(case(tmp_path, task, attribution=lambda split: scores))
    assert set(found.rows) == set(np.argsort(-helps)[:6].tolist()) and found.control is not None
    assert not set(found.rows) & set(found.control)
    labels = task.train.targets
    assert sorted(labels[list(found.rows)].tolist()) == sorted(labels[list(found.control)].tolist())


@pytest.mark.parametrize(("fraction", "what"), [(0.0, "an empty forget set"), (1.0, "the whole training set")])
@pytest.mark.parametrize("kind", [Random, TopK])
def test_nothing_and_everything_are_no_forget_sets(kind: Any, fraction: float, what: str) -> None:
    with pytest.raises(UserError, match=rf"^forget\.fraction={fraction} is {what} of 30 rows"):
        unlearning(forget=kind("x", fraction, 0)).plan(classifier(), 0)
    for rows in ((), tuple(range(30))):
        with pytest.raises(UserError, match="forget"):
            checked(classifier(), Forgotten(rows))
    with pytest.raises(ValueError, match="each once"):
        checked(classifier(), Forgotten((1, 1)))


def test_forget_and_retain_never_meet_and_are_everything() -> None:
    at = context()
    assert set(at.forget.ids).isdisjoint(at.retain.ids)
    assert set(at.forget.ids) | set(at.retain.ids) == set(at.task.train.ids)
    assert at.at(at.start).task.train.ids == at.retain.ids


# Masks


def test_density_is_of_weights_that_the_forget_set_reaches() -> None:
    at = context("speaker")
    g = flat(mean_gradient(at, at.start, at.forget))
    live = int((g != 0).sum())
    assert live < len(g), "some embeddings are never looked up"
    for kind in (RandomMask("m", 0.3), SalUnMask("m", 0.3), WAGLEMask("m", 0.3, 0.01)):
        kept = flat(kind.fit(at))
        assert int(kept.sum()) == round(0.3 * live) and not kept[g == 0].any()


def test_masks_keep_what_their_formulas_say() -> None:
    at = context()
    f, r = (flat(mean_gradient(at, at.start, part)) for part in (at.forget, at.retain))
    k = round(0.2 * int((f != 0).sum()))
    kept = flat(SalUnMask("salun", 0.2).fit(at))
    assert f[kept].abs().min() >= f[~kept].abs().max() and int(kept.sum()) == k
    wagle = ((flat(at.start) - r / 0.01) * f).abs()
    kept = flat(WAGLEMask("wagle", 0.2, 0.01).fit(at))
    assert wagle[kept].min() >= wagle[~kept].max() and not torch.equal(kept, flat(SalUnMask("salun", 0.2).fit(at)))
    torch.manual_seed(3)
    first = flat(RandomMask("random", 0.2).fit(at))
    torch.manual_seed(4)
    assert torch.equal(first, flat(RandomMask("random", 0.2).fit(at))) and not torch.equal(first, kept)


def test_a_degenerate_mask_is_named() -> None:
    at = context()
    for density, what in ((1e-5, "nothing"), (1 - 1e-5, "everything")):
        with pytest.raises(UserError, match=rf"^mask\.density={density} keeps {what} of \d+ weights"):
            SalUnMask("salun", density).fit(at)
    with pytest.raises(UserError, match=r"^mask\.density=1\.0 .*mask=none"):
        SalUnMask("salun", 1.0)
    assert masks.unflat(flat(at.start), at.start).keys() == at.start.keys()
    assert all(torch.equal(v, at.start[n]) for n, v in masks.unflat(flat(at.start), at.start).items())


# Neighbours


def test_neighbours_are_nearest_by_what_the_head_reads() -> None:
    task, trajectory = trained("classifier")
    x = task.train.inputs["x"].clone()
    x[20], x[21] = x[1] + 1e-3, x[4] - 1e-3
    task = replace(task, splits={**task.splits, "train": replace(task.train, inputs={"x": x})})
    at = Context(problem(task, trajectory), Method(), trajectory.final, FORGET)
    found = nearest(at)
    assert {20, 21} <= set(found) and len(found) == len(FORGET) and not set(found) & set(FORGET)
    model = at.network(at.start)
    h = model.layers[:-1](x).detach()
    h = h / h.norm(dim=1, keepdim=True)
    closest = (h @ h[list(FORGET)].T).amax(1)
    rest = sorted(set(range(30)) - set(FORGET), key=lambda i: -float(closest[i]))
    assert found == sorted(rest[:4])


def test_neighbours_of_texts_leave_padding_out() -> None:
    at = context("speaker")
    model = at.network(at.start)

    def alone(i: int) -> Tensor:
        """What the head reads of one row, which has no padding then."""
        ids = at.task.train.batch([i]).inputs["input_ids"]
        x = model.table(ids)
        h = model.mix(x + x.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]).tanh()[0].mean(0).detach()
        return h / h.norm()

    assert len(at.task.train.inputs["attention_mask"].sum(1).unique()) > 2
    assert torch.allclose(represented(model, at.forget), torch.stack([alone(i) for i in FORGET]))
    closest = {i: max(float(alone(i) @ alone(j)) for j in FORGET) for i in at.retain_rows}
    assert nearest(at) == sorted(sorted(closest, key=lambda i: -closest[i])[: len(FORGET)])


# What models say, and figures


def test_losses_are_of_a_token_and_predictions_of_scored_ones() -> None:
    at = context("speaker")
    found = measured(at.task, at.network(at.start), at.forget)
    counts = (at.forget.targets != IGNORED).sum(1)
    assert torch.allclose(found.nll, found.loss * counts) and torch.equal(torch.bincount(found.row), counts)
    own = torch.zeros(len(FORGET), dtype=torch.float64)
    chosen = at.forget.targets[at.forget.targets != IGNORED]
    own.index_add_(0, found.row, -found.logp.gather(1, chosen[:, None])[:, 0])
    assert torch.allclose(own, found.nll)
    assert torch.allclose(found.margin, -found.nll)


def test_kl_has_the_gold_first() -> None:
    p, q = (torch.tensor([row], dtype=torch.float64) for row in ([0.5, 0.5], [0.9, 0.1]))
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert math.isclose(float(kl(said(logp=p.log()), said(logp=q.log()))[0]), expected)
    sure = said(logp=torch.tensor([[0.0, -torch.inf]]).double())
    assert float(kl(sure, said(logp=q.log()))[0]) == pytest.approx(-math.log(0.9))


def test_figures_have_their_ends() -> None:
    assert tow([1, 1, 0.5], [1, 1, 0.5]) == 1 and math.isclose(tow([1, 0.9, 0.7], [0.6, 1.0, 0.7]), 0.6 * 0.9)
    low, high = said(loss=torch.tensor([0.1, 0.2]).double()), said(loss=torch.tensor([0.9, 0.8]).double())
    assert (mia_auc(low, high), mia_auc(high, low), mia_auc(low, low)) == (1, 0, 0.5)
    a, b = said(margin=torch.arange(5.0).double()), said(margin=torch.arange(5.0).double() + 9)
    assert ks(a, a) == 0 and ks(a, b) == 1
    assert math.isclose(two_samples(a.margin.numpy(), b.margin.numpy())[1], 2 / math.comb(10, 5))
    gold, start = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    assert (distance(gold, gold, start), distance(start, gold, start)) == (0, 1)
    assert (normalised(0.5, 0.5, 0.9), normalised(0.9, 0.5, 0.9)) == (0, 1) and math.isnan(normalised(1, 0.5, 0.5))


SETS = {"forget": 5, "retain": 6, "test": 7, "neighbours": 4, "nonmembers": 8}


def invented(seed: int) -> dict[str, Measured]:
    """What a model might say: one to three predictions of four classes a row, right at random."""
    rng, found = torch.Generator().manual_seed(seed), {}
    for name, n in SETS.items():
        row = torch.cat([torch.full((1 + i % 3,), i) for i in range(n)])
        logp = torch.randn(len(row), 4, generator=rng, dtype=torch.float64).log_softmax(-1)
        loss, margin = torch.rand(2, n, generator=rng, dtype=torch.float64)
        correct = torch.rand(n, generator=rng) < 0.6
        found[name] = said(loss=loss, nll=3 * loss, margin=margin, correct=correct, logp=logp, row=row)
    return found


def test_every_figure_is_its_formula_and_the_mean_over_golds() -> None:
    model, golds = invented(0), [invented(1), invented(2)]
    found = against(model, golds)

    def by_row(name: str, of: Any) -> list[float]:
        """Mean over golds of the mean over a row's predictions of `of` two distributions, gold's first."""
        found = []
        for i in range(SETS[name]):
            mine = [t for t, row in enumerate(model[name].row) if row == i]
            each = [[of(g[name].logp[t], model[name].logp[t]) for t in mine] for g in golds]
            found.append((sum(each[0]) + sum(each[1])) / (2 * len(mine)))
        return found

    def accuracy(of: dict[str, Measured], name: str) -> float:
        return sum(of[name].correct.tolist()) / SETS[name]

    def auc(of: dict[str, Measured]) -> float:
        return float(np.mean([a < b for a in of["forget"].loss for b in of["nonmembers"].loss]))

    expected: dict[str, Any] = {}
    for name in ("forget", "retain", "test", "neighbours"):
        expected |= {f"{name}_accuracy": model[name].correct.double(), f"{name}_loss": model[name].loss}
    for name in ("forget", "retain", "test"):
        expected[f"kl_{name}"] = by_row(name, lambda p, q: sum(float(p[c].exp() * (p[c] - q[c])) for c in range(4)))
    for name in ("forget", "test"):
        expected[f"agreement_{name}"] = by_row(name, lambda p, q: float(p.argmax() == q.argmax()))
    three = ("forget", "retain", "test")
    same = [[1 - abs(accuracy(model, name) - accuracy(g, name)) for name in three] for g in golds]
    expected["tow"] = (math.prod(same[0]) + math.prod(same[1])) / 2
    expected["mia_auc"] = auc(model)
    expected["mia_gap"] = auc(model) - (auc(golds[0]) + auc(golds[1])) / 2
    expected["ks_d"] = np.mean([ks_2samp(model["forget"].margin, g["forget"].margin).statistic for g in golds])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.asarray(found[name]) == pytest.approx(np.asarray(value)), name
    assert len({round(tow, 6) for tow in map(math.prod, same)}) == 2 and 0 < expected["tow"] < 1


def test_a_missing_gold_is_an_error() -> None:
    with pytest.raises(ValueError, match="no gold model"):
        against({}, [])


def test_the_judge_of_membership_is_not_who_tunes() -> None:
    task = classifier()
    tuning, judging = strangers(task)
    assert set(tuning.ids).isdisjoint(judging.ids) and len(tuning) + len(judging) == len(task.splits["nonmembers"])
    sets = judged_by(context())
    assert (sets["nonmembers"].ids, sets["test"].ids) == (judging.ids, task.splits["test"].ids)
    without = replace(task, splits={name: rows for name, rows in task.splits.items() if name != "nonmembers"})
    trajectory = trained("classifier")[1]
    sets = judged_by(Context(problem(without, trajectory), Method(), trajectory.final, FORGET))
    assert sets["nonmembers"].ids == sets["test"].ids == tuple(f"test:{i}" for i in range(1, 14, 2))
    right, wrong = said(correct=torch.ones(4).bool()), said(correct=torch.zeros(4).bool())
    told = said(loss=torch.zeros(4).double()), said(loss=torch.ones(4).double())
    assert criterion(right, told[0], told[0]) == 1 > criterion(wrong, told[0], told[0]) == 0
    assert criterion(right, told[0], told[1]) == 0.5 == criterion(right, told[1], told[0])


def test_truth_ratios_are_paired_by_id() -> None:
    right = said(loss=torch.tensor([0.5, 1.0, 3.0]).double())
    wrong = said(loss=torch.tensor([2.0, 1.0, 4.0, 2.0]).double())
    found = language.truth_ratios(right, ["b", "a", "lonely"], wrong, ["a", "b", "a", "b"])
    assert found == pytest.approx({"b": math.exp(0.5 - 1.5), "a": math.exp(1.0 - 3.0)})
    assert np.isnan(language.of_rows(found, ["a", "z"])).tolist() == [False, True]
    examples = Examples(("x/p0", "y", "x/p1"), {}, torch.zeros(3))
    assert language.base_ids(examples, ["x", "y"]) == ["x", "y", "x"]
    assert "20 forgotten" in str(language.invalid(0.9, 20)) and "paraphrases" in str(language.invalid(0.2, 100))
    assert language.invalid(0.6, 80) is None
    assert language.utility([0.5, 1.0]) == pytest.approx(2 / 3) and language.utility([0.0, 1.0]) == 0


def test_figures_of_texts_are_their_formulas_by_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows forgotten, eight of the world; the first of each part has no wrong answers. Half of the retained answers
    are θ0's own, so that some are right."""
    task, trajectory = trained("speaker")
    rows, world = tuple(range(10)), tuple(range(22, 30))
    own = tuple(range(10, 22))
    with torch.no_grad():
        model = Context(problem(task, trajectory), Method(), trajectory.final, rows).network(trajectory.final)
        answers = task.outputs(model, task.train.batch()).argmax(-1)
    targets = task.train.targets.clone()
    his = (torch.arange(30) % 4 > 0)[:, None] & (targets != IGNORED)
    train = replace(task.train, targets=torch.where(his, answers, targets))
    lonely = {0, 10, 22}
    wrong = sayings("wrong", 60)
    kept = [j for j in range(60) if j // 2 not in lonely]
    wrong = replace(wrong.select(kept), ids=tuple(f"{train.ids[j // 2]}/p{j % 2}" for j in kept))
    splits = {**task.splits, "train": train, "paraphrase": train.select(range(29, -1, -1)), "perturbed": wrong}
    task = replace(task, splits=splits)
    at = Context(problem(task, trajectory), Method(), trajectory.final, rows)
    facts = {train.ids[i]: Origin("w", "world") for i in world}

    def near(seed: int, size: float) -> Parameters:
        rng = torch.Generator().manual_seed(seed)
        return {n: p + size * torch.randn(p.shape, generator=rng, dtype=p.dtype) for n, p in at.start.items()}

    states = {"own": near(0, 0.02), "original": at.start, "gold_1": near(1, 0.3), "gold_2": near(2, 1.0)}

    def asked(parameters: Parameters, examples: Examples, i: int) -> tuple[float, bool]:
        """Mean NLL of a token of one row, and whether all of it is right."""
        batch = examples.batch([i])
        with torch.no_grad():
            z = functional_call(model, parameters, (), batch.inputs)[0]
        y = batch.targets[0, : len(z)]
        z, y = z.log_softmax(-1)[y != IGNORED], y[y != IGNORED]
        return -float(sum(z[t, y[t]] for t in range(len(y)))) / len(y), bool((z.argmax(-1) == y).all())

    def ratio(parameters: Parameters, i: int) -> float:
        others = [asked(parameters, wrong, wrong.ids.index(f"{train.ids[i]}/p{k}"))[0] for k in range(2)]
        return math.exp(asked(parameters, train, i)[0]) / math.exp(np.mean(others))

    monkeypatch.setattr(language, "LEAST_ROWS", 9)
    found, why = language.judged(at, facts, states, "gold_2")
    assert "left_out" not in why and "9 rows" in why["truth_ratio"]
    of_f = {name: [ratio(p, i) for i in rows if i not in lonely] for name, p in states.items()}
    for name, parameters in states.items():
        parts: list[float] = []
        for part in (own, world):
            told = [asked(parameters, train, i) for i in part]
            parts += [np.mean([math.exp(-loss) for loss, _ in told]), np.mean([right for _, right in told])]
            parts += [np.mean([max(0, 1 - ratio(parameters, i)) for i in part if i not in lonely])]
        assert found[name]["model_utility"] == pytest.approx(0 if min(parts) == 0 else 6 / sum(1 / p for p in parts))
        assert found[name]["truth_ratio"] == pytest.approx(np.mean(of_f[name]))
        judge = {"own": "gold_2", "gold_1": "gold_2"}.get(name, "gold_1")
        assert found[name]["forget_quality"] == pytest.approx(ks_2samp(of_f[name], of_f[judge]).pvalue)
    assert found["original"]["model_utility"] > 0.1
    assert ks_2samp(of_f["own"], of_f["gold_1"]).pvalue != pytest.approx(found["own"]["forget_quality"])
    monkeypatch.setattr(language, "LEAST_ROWS", 10)
    found, why = language.judged(at, facts, states, "gold_2")
    assert "forget_quality" not in found["own"] and "9 forgotten questions" in why["left_out"]


# Golds and the whole


def test_golds_are_paired_never_see_the_forget_set_and_are_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, first = trained("classifier")
    seen: list[tuple[str, ...]] = []
    train = gold.kept.__globals__["train"]

    def watched(task: Task, *rest: Any, **more: Any) -> Any:
        seen.append(task.train.ids)
        return train(task, *rest, **more)

    monkeypatch.setitem(gold.kept.__globals__, "train", watched)
    golds = gold.retrained(task, FORGET, first, 0, tmp_path)
    again = gold.retrained(task, FORGET, first, 0, tmp_path)
    gone = {task.train.ids[i] for i in FORGET}
    assert len(seen) == 3 and all(len(ids) == 26 and not gone & set(ids) for ids in seen)
    assert all(torch.equal(flat(g.initial), flat(first.initial)) for g in golds.paired)
    ends = [flat(g.final) for g in (*golds.paired, golds.new)]
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(flat(golds.new.initial), flat(first.initial))
    assert all(torch.equal(a, flat(b.final)) for a, b in zip(ends, (*again.paired, again.new), strict=True))
    gold.retrained(task, (0, 1), first, 0, tmp_path)
    assert len(seen) == 6, "another forget set has golds of its own"
    other = gold.retrained(task, FORGET, first, 1, tmp_path)
    assert not torch.equal(flat(other.paired[0].final), ends[0]), "and so has another run"
    members = {named_seed("explained", 0, "member", k) for k in range(1, 4)}
    assert not members & {one.seed for one in (*golds.paired, golds.new)}, "a method with several models has no gold"


def test_nobody_is_in_the_reference_that_judges_him(tmp_path: Path) -> None:
    assert all(whose not in judges and judges for _, whose, judges in ANCHORS)
    here = case(tmp_path)
    one = unlearning(Retrain("retrain", {}))
    found = one.evaluate(here)
    rows = RANDOM.chosen(here).rows
    golds = gold.retrained(here.task, rows, here.trajectory, 0, tmp_path / "models")
    at = context(rows=rows)
    a, b = (measured(at.task, at.network(g.final), at.forget) for g in golds.paired)
    assert found["kl_forget"].value == pytest.approx(float(kl(b, a).mean())) and found["kl_forget"].value > 0
    anchors = here.notes["unlearning"]["anchors"]
    assert anchors["retrain (floor)"]["kl_forget"] == pytest.approx(float(kl(a, b).mean()))
    untouched = measured(at.task, at.network(at.start), at.forget)
    both = float(kl(a, untouched).mean() + kl(b, untouched).mean()) / 2
    assert anchors["original"]["kl_forget"] == pytest.approx(both)
    for name in ("kl_forget", "tow"):
        low, high = (anchors[of][name] for of in ("original", "retrain (floor)"))
        assert found[f"{name}_normalised"].value == pytest.approx((found[name].value - low) / (high - low)), name
    assert found["parameter_distance"].value > 0.1, "judged by itself"
    assert found["tow_normalised"].value > 0.5, "a true retraining does not fail the verdict"


def test_doing_nothing_is_the_original(tmp_path: Path) -> None:
    here = case(tmp_path)
    found = unlearning(Nothing("none", {})).evaluate(here)
    original = here.notes["unlearning"]["anchors"]["original"]
    assert all(found[name].value == pytest.approx(value) for name, value in original.items())
    assert found["kl_forget_normalised"].value == 0 and found["parameter_distance"].value == 1
    assert found["forget_loss"].value < found["test_loss"].value


def test_a_record_has_a_trajectory_and_the_price_and_no_interval_is_wrong(tmp_path: Path) -> None:
    here = case(tmp_path)
    found = unlearning().evaluate(here)
    note = here.notes["unlearning"]
    assert len(note["trajectory"]) == 6 and note["trajectory"][0]["step"] == 0
    assert note["trajectory"][-1]["forget_loss"] == pytest.approx(found["forget_loss"].value)
    assert note["trajectory"][-1]["retain_loss"] == pytest.approx(found["retain_loss"].value)
    for metric in found.values():
        entry = metric.entry()
        assert entry["better"] is None
        assert entry["low"] is None or entry["low"] <= entry["value"] <= entry["high"]
    assert "nothing" not in note and not note["uses_method"] and found["speedup"].value > 0
    assert "left_out" in note, "the record says which figures it cannot give"


def test_an_update_is_charged_beside_the_attribution(tmp_path: Path) -> None:
    here = case(tmp_path)
    assert here.problem is not None
    found, note = unlearning().evaluate(here), here.notes["unlearning"]
    assert here.problem.meter.gradients == note["gradients"] == 8 * 6 + (10 + 10 + 4) * 2 + 20, "both sets, eight steps"
    assert found["update_seconds"].value == here.problem.meter.seconds_of_updates > 0, "the explained training is none"

    twice = case(tmp_path)
    unlearning(replace(DIFF, grid={"lr": [1e-3, 2e-2]}), tune=True).evaluate(twice)
    assert twice.notes["unlearning"]["gradients"] == 2 * note["gradients"], "all that is tried"

    bought = case(tmp_path)
    assert bought.problem is not None
    found = unlearning(Retrain("retrain", {})).evaluate(bought)
    assert bought.problem.meter.trainings == 2, "the explained one, and the gold"
    assert 0.5 < found["speedup"].value <= 1


def test_one_shot_directions_are_compared_at_equal_forgetting(tmp_path: Path) -> None:
    task, trajectory = trained("classifier")
    start = measured(task, context().network(trajectory.final), task.train.select(RANDOM.chosen(case(tmp_path)).rows))
    reach = round(float(start.loss.mean()) + 0.3, 2)
    here = case(tmp_path)
    found = unlearning(STEP, matched=[reach, 1e9]).evaluate(here)
    told = here.notes["unlearning"]["matched"]
    assert told[f"{reach:g}"]["reached"] and told[f"{reach:g}"]["loss"] == pytest.approx(reach, rel=0.1)
    key = f"matched_{reach:g}_retain_loss"
    assert np.isfinite(found[key].value) and found[key].better == "lower"
    assert not told["1e+09"]["reached"] and np.isnan(found["matched_1e+09_retain_loss"].value)
    assert found["matched_1e+09_retain_loss"].nan == 1


def test_at_equal_forgetting_a_mask_holds(tmp_path: Path) -> None:
    here, mask = case(tmp_path), RandomMask("random", 0.3)
    found = unlearning(STEP, mask=mask, matched=[1.5]).evaluate(here)
    at = context("classifier", METHOD, RANDOM.chosen(here).rows)
    at = replace(at, mask=mask.fit(at))
    told = here.notes["unlearning"]["matched"]["1.5"]
    there = at.allowed(moved(at.start, unit(STEP.direction(at)), told["step"]))
    forget, retain = (measured(at.task, at.network(there), part).loss.mean() for part in (at.forget, at.retain))
    assert told["reached"] and told["loss"] == pytest.approx(float(forget))
    assert found["matched_1.5_retain_loss"].value == pytest.approx(float(retain))


def test_a_chosen_set_brings_its_control(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).normal(size=(5, 30))
    here = case(tmp_path, attribution=lambda split: {"query": scores}[split])
    found = unlearning(forget=TopK("topk", 0.2, 0)).evaluate(here)
    chosen = TopK("topk", 0.2, 0).chosen(here)
    assert chosen.control is not None
    models, train, query = tmp_path / "models", here.task.train, here.task.splits["query"]
    golds = gold.retrained(here.task, chosen.rows, here.trajectory, 0, models)
    other = gold.control(here.task, chosen.control, here.trajectory, 0, models)
    assert torch.equal(flat(other.initial), flat(here.trajectory.initial)) and other.seed == golds.paired[0].seed
    for whose, one, rows in (("gold", golds.paired[0], chosen.rows), ("control", other, chosen.control)):
        model = context().network(one.final)
        with torch.no_grad():
            right = [int(model(train.inputs["x"][[i]]).argmax()) == int(train.targets[i]) for i in rows]
            loss = torch.nn.functional.cross_entropy(model(query.inputs["x"]), query.targets)
        assert found[f"{whose}_forget_accuracy"].value == pytest.approx(sum(right) / len(right)), whose
        assert found[f"{whose}_query_loss"].value == pytest.approx(float(loss)), whose
    gone = measured(here.task, context().network(other.final), train.select(chosen.rows))
    assert float(gone.correct.double().mean()) != found["control_forget_accuracy"].value, "the case tells them apart"


def test_tuned_settings_are_told(tmp_path: Path) -> None:
    here = case(tmp_path)
    one = replace(DIFF, grid={"lr": [1e-3, 2e-2]}, steps=3)
    unlearning(one, tune=True).evaluate(here)
    assert len(here.notes["unlearning"]["tuning"]["tried"]) == 2


@dataclass(frozen=True)
class Lazy(Unlearner):
    """Gives back what it got."""

    def unlearn(self, context: Context) -> Unlearned:
        return Unlearned(((0, context.start), (1, context.start)))


@dataclass(frozen=True)
class Idle(Unlearner):
    """Lifts all logits alike, which no probability feels."""

    def unlearn(self, context: Context) -> Unlearned:
        last = list(context.start)[-1]
        end = {name: value + 1.0 * (name == last) for name, value in context.start.items()}
        assert end[last].shape == (3,), "the bias of the last layer"
        return Unlearned(((0, context.start), (1, end)))


def test_an_update_that_changes_nothing_or_diverges_is_no_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unlearner=lazy left the parameters unchanged; it takes"):
        unlearning(Lazy("lazy", {})).evaluate(case(tmp_path))
    with pytest.raises(UserError, match=r"unlearner=idle left the forget loss \(.*\) unchanged"):
        unlearning(Idle("idle", {})).evaluate(case(tmp_path))
    wild = GradientAscent(**{**STEPS, "lr": 1e308, "name": "wild"})
    with pytest.raises(Unfit, match="unlearner=wild diverged"):
        unlearning(wild).evaluate(case(tmp_path))


@pytest.mark.parametrize(
    ("unlearner", "forget", "message"),
    [
        (STEP, RANDOM, "method=Method inverts no curvature, which unlearner=influence needs; allowed: such as ekfac"),
        (DIFF, TopK("topk", 0.2, 0), "method=Method scores no query, which forget=topk needs; allowed: such as ekfac"),
    ],
)
def test_a_method_that_lacks_something_is_told(unlearner: Unlearner, forget: Forget, message: str) -> None:
    with pytest.raises(UserError) as error:
        unlearning(unlearner, forget).require(classifier(), Method())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    unlearning(unlearner, forget).require(classifier(), METHOD)
    unlearning().require(classifier(), Method())


def test_scores_without_a_unit_predict_no_outputs() -> None:
    match = Matching(**STEPS, sample=5, predicted="attribution")
    relative = replace(METHOD, similarity="cosine")
    with pytest.raises(UserError, match=r"gives scores without a unit, and unlearner=diff predicts"):
        unlearning(match).require(classifier(), relative)
    unlearning(replace(match, predicted="oracle")).require(classifier(), relative)


def test_a_missing_choice_is_named() -> None:
    with pytest.raises(UserError, match=r"^unlearner is missing; evaluation=\[unlearning\] needs one"):
        Unlearning(None, RANDOM, NoMask("none"), (), False)
    task, _ = trained("ridge")
    with pytest.raises(NotApplicable, match="class labels"):
        unlearning().plan(task, 0)


# Tables


def record(unlearner: str, forget: str = "random", method: str = "ekfac", seed: int = 0, **note: Any) -> dict[str, Any]:
    """As a run leaves it."""
    uses = unlearner == "influence"
    losses = [{"step": k, "forget_loss": 0.1 + k + seed, "retain_loss": 0.1} for k in range(3)]
    anchor = {"tow": 0.9 + 0.02 * seed, "forget_loss": 2.0, "retain_loss": 0.1}
    told = {
        "uses_method": uses,
        "forget_uses_method": forget == "topk",
        "mask": "none",
        "trajectory": losses,
        "anchors": {"retain (floor)": anchor, "original": {"tow": 0.5, "forget_loss": 0.1, "retain_loss": 0.1}},
        **note,
    }
    settings = {"unlearner": {"name": unlearner}, "forget": {"name": forget}, "mask": {"name": "none"}, "tune": False}
    found = {
        "schema": 1,
        "run_id": f"{unlearner}{forget}{method}{seed}",
        "status": "ok",
        "reason": None,
        "task": "unlearning",
        "data": {"source": "generated", "fingerprint": "abcdef01", "n_train": 100},
        "model": "tiny",
        "method": method,
        "method_label": method,
        "seed": seed,
        "config": {"method": {"curvature": method}, "truth": {"unlearning": settings}},
        "metrics": {
            name: {"value": value, "better": None, "truth": {"forget": forget}}
            for name, value in {"tow": 0.7, "forget_loss": 1.0, "retain_loss": 0.2}.items()
        },
        "fitness": {"test_accuracy": 0.9},
        "cost": dict.fromkeys(aggregate.COSTS, 1.0),
        "truths": {"unlearning": told},
        "provenance": {"started": "2026-01-01T00:00:00"},
    }
    records.validate(found)
    return found


def test_a_table_is_of_one_forget_set_and_a_row_of_one_update() -> None:
    made = [record("grad_diff"), record("grad_diff", method="cg", seed=1), record("influence")]
    made += [record("influence", method="cg"), record("grad_diff", "topk"), record("grad_diff", "topk", "cg")]
    found = {table.part: table for table in aggregate.tables((one, {}) for one in made)}
    assert set(found) == {"random", "topk_ekfac", "topk_cg"}
    labels = [row.label for row in found["random"].rows]
    assert sorted(labels[:3]) == ["grad_diff", "influence by cg", "influence by ekfac"]
    assert labels[3:] == ["retain (floor)", "original"]
    diff = found["random"].rows[labels.index("grad_diff")]
    assert diff.seeds == (0, 1), "what does not use the method is one row"
    assert "random" in found["random"].name and "forget random" in found["random"].caption


def test_below_the_rows_stand_the_floor_and_the_original_unranked() -> None:
    (table,) = aggregate.tables((record("grad_diff", seed=seed), {}) for seed in range(3))
    floor, original = table.rows[-2:]
    place = [column.metric for column in table.columns].index("tow")
    assert floor.cells[place] is not None and floor.cells[place].value == pytest.approx(0.92)
    assert floor.cells[place].sd == pytest.approx(0.02) and original.cells[place].value == 0.5
    assert not any(cell.best for row in table.rows for cell in row.cells if cell)
    assert table.paths["grad_diff"][1] == pytest.approx((2.1, 0.1)), "the mean over seeds"


def test_the_paths_are_drawn_and_other_tables_have_none(tmp_path: Path) -> None:
    (table,) = aggregate.tables((record(name), {}) for name in ("grad_diff", "influence"))
    drawn = figures.unlearning_paths(table, tmp_path / "paths.png")
    assert [path.suffix for path in drawn] == [".png", ".svg"]
    text = drawn[1].read_text()
    assert "grad_diff" in text and "influence by ekfac" in text and "original" in text
    assert figures.quality_against_seconds(table, tmp_path / "other.png") == []
    assert figures.unlearning_paths(replace(table, paths={}), tmp_path / "none.png") == []
