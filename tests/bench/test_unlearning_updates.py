"""Iterative unlearners: their losses against formulas, and what every one of them must keep."""

from dataclasses import MISSING, fields, replace
from functools import cache
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from unlearning_cases import FORGET, IGNORED, VOCABULARY, context, flat, gradient_of, problem, trained

from bench.config import check, check_signature, choices, compose, conf_dir, run_key
from bench.evaluations.unlearning import scrub, soul
from bench.evaluations.unlearning.ascent import FineTune, GradDiff, GradientAscent
from bench.evaluations.unlearning.base import Context, Parameters, Unlearned, Unlearner, cycle, kept_steps
from bench.evaluations.unlearning.descend import Draw, FirstOrder, Objective
from bench.evaluations.unlearning.dmm import PREDICTIONS, Matching
from bench.evaluations.unlearning.iterated_newton import loss_of
from bench.evaluations.unlearning.measure import divergence, losses, measured
from bench.evaluations.unlearning.npo import NPO, SimNPO, npo_loss, simnpo_loss
from bench.evaluations.unlearning.salun import SalUn, wrong_labels
from bench.evaluations.unlearning.tuning import best_of, judged, points
from methods.base import Method, Problem
from methods.curvature.cg import ConjugateGradients
from methods.curvature.damping import Damping
from methods.influence import Influence
from tasks.base import Examples
from tasks.errors import UserError

STEPS: dict[str, Any] = {"name": "x", "grid": {}, "steps": 4, "lr": 1e-2, "batch": 4, "weight_decay": 0.0}
METHOD = Influence(ConjugateGradients("ggn", 1e-3, 10), Damping("absolute", 0.1, "global"))
UPDATES = [name for name in choices("unlearner") if name not in ("none", "retrain")]


@cache
def written(name: str) -> DictConfig:
    """Its YAML, with the mask that it brings along."""
    config = OmegaConf.load(conf_dir() / "unlearner" / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    for group in config.pop("defaults", []):
        if group != "_self_":
            config.mask = OmegaConf.load(conf_dir() / "mask" / f"{group['/mask@mask']}.yaml")
    return config


def made(name: str) -> Unlearner:
    """As its YAML makes it."""
    found: Unlearner = instantiate(written(name), _convert_="all")
    return found


def few(name: str) -> Unlearner:
    """Its YAML, with steps that a test has time for."""
    one = made(name)
    changes = {"steps": 6, "batch": 4, "lr": 0.01, "sample": 8, "radius": 0.1}
    return replace(one, **{key: value for key, value in changes.items() if key in {f.name for f in fields(one)}})


def whole(at: Context, step: int = 1) -> Draw:
    index = torch.arange(len(at.forget)), torch.arange(len(at.retain))
    return Draw(step, at.forget.batch(), at.retain.batch(), *index)


def elsewhere(at: Context) -> Parameters:
    """Near θ0, where no term is at a special value."""
    rng = torch.Generator().manual_seed(3)
    return {n: p + 0.1 * torch.randn(p.shape, generator=rng, dtype=p.dtype) for n, p in at.start.items()}


def few_rows(at: Context, step: int = 1) -> Draw:
    """Some rows of both sets, in no order."""
    f, r = torch.tensor([3, 0, 2]), torch.tensor([9, 1, 17, 4])
    return Draw(step, at.forget.batch(f), at.retain.batch(r), f, r)


def gradient(at: Context, objective: Objective, parameters: Parameters) -> Tensor:
    model = at.network(parameters)
    return gradient_of(objective(model, whole(at)), model)


# What each must keep


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("task", ["classifier", "speaker"])
def test_each_moves_and_forgets_the_same_whatever_torch_draws(name: str, task: str) -> None:
    at = context(task, METHOD)
    one, ends = few(name), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        done = one.unlearn(at)
        ends.append(flat(done.final))
    assert torch.equal(*ends)
    assert done.path[0] == (0, at.start) and len(done.path) >= 3
    assert [step for step, _ in done.path] == sorted({step for step, _ in done.path})
    assert (ends[0] - flat(at.start)).abs().max() > 1e-6
    assert loss_of(at, done.final, at.forget) != loss_of(at, at.start, at.forget)
    if name not in ("random_direction", "finetune", "salun", "scrub", "dmm"):
        assert loss_of(at, done.final, at.forget) > loss_of(at, at.start, at.forget)


@pytest.mark.parametrize("name", UPDATES)
def test_masked_out_weights_are_bit_identical_under_weight_decay_too(name: str) -> None:
    free = context("classifier", METHOD)
    rng = torch.Generator().manual_seed(0)
    mask = {n: torch.rand(p.shape, generator=rng) < 0.3 for n, p in free.start.items()}
    one = few(name)
    if hasattr(one, "weight_decay"):
        one = replace(one, weight_decay=0.5)
    for _, parameters in one.unlearn(replace(free, mask=mask)).path:
        for n, value in parameters.items():
            assert torch.equal(value[~mask[n]], free.start[n][~mask[n]])
    moved = one.unlearn(replace(free, mask=mask)).final
    assert any((moved[n] != free.start[n])[mask[n]].any() for n in mask)


def test_weight_decay_alone_would_move_what_is_masked() -> None:
    """The test above can fail: decay moves even a weight without gradient."""
    at = context("speaker")
    done = GradDiff(**{**STEPS, "weight_decay": 0.5}, forget_weight=1.0, retain_weight=1.0).unlearn(at)
    unused = at.start["table.weight"][VOCABULARY - 1]
    assert not torch.equal(done.final["table.weight"][VOCABULARY - 1], unused)


@pytest.mark.parametrize("name", choices("unlearner"))
def test_values_live_in_yaml_alone(name: str) -> None:
    node = OmegaConf.to_container(written(name), resolve=True)
    assert isinstance(node, dict)
    check_signature({str(key): value for key, value in node.items()}, "unlearner")
    one = made(name)
    assert one.name == name and all(f.default is MISSING and f.default_factory is MISSING for f in fields(one))


def test_what_is_chosen_at_the_root_reaches_the_evaluation_and_the_run() -> None:
    config = compose(["task=unlearning", "unlearner=salun", "unlearner.lr=0.5", "mask=wagle", "forget=topk"])
    check(config)
    asked = run_key(config)
    assert not {"unlearner", "forget", "mask"} & set(asked), "runs of other tasks keep their names"
    found = asked["truth"]["unlearning"]
    assert found["unlearner"]["lr"] == 0.5 and found["unlearner"]["mask"]["name"] == "salun"
    assert (found["mask"]["name"], found["forget"]["name"]) == ("wagle", "topk")


@pytest.mark.parametrize("name", UPDATES)
def test_every_point_of_a_grid_is_a_setting_of_equal_price(name: str) -> None:
    one = made(name)
    assert len(points(one.grid)) == 3
    for point in points(one.grid):
        changed = replace(one, **point)
        assert getattr(changed, "steps", 0) == getattr(one, "steps", 0)


def test_an_error_inside_a_loss_is_an_error() -> None:
    calls = []

    class Broken(FirstOrder):
        def prepared(self, context: Context) -> Objective:
            def objective(model: nn.Module, draw: Draw) -> Tensor:
                calls.append(draw.step)
                raise RuntimeError("no loss")

            return objective

    with pytest.raises(RuntimeError, match="no loss"):
        Broken(**STEPS).unlearn(context())
    assert calls == [1]


def test_gradients_are_counted_by_the_sets_that_are_read() -> None:
    both = {"forget_weight": 1.0, "retain_weight": 1.0}
    cases = [(GradientAscent(**STEPS), 16), (FineTune(**STEPS), 16), (GradDiff(**STEPS, **both), 32)]
    cases += [(scrubbed(), 16), (matching("nothing"), 16 + 4 + 4 + 2 + 4)]
    for one, charged in cases:
        at = context()
        one.unlearn(at)
        assert at.problem.meter.gradients == charged, type(one).__name__


def test_batches_visit_every_row_once_a_pass() -> None:
    rows = cycle(7, 3, torch.Generator().manual_seed(0))
    passes = [torch.cat([next(rows) for _ in range(3)]).tolist() for _ in range(2)]
    assert [sorted(p) for p in passes] == [list(range(7))] * 2 and passes[0] != passes[1]
    assert kept_steps(60) == {12, 24, 36, 48, 60} and kept_steps(3) == {1, 2, 3}


# Losses


@pytest.mark.parametrize("task", ["classifier", "speaker"])
def test_gradient_difference_is_the_difference(task: str) -> None:
    at = context(task)
    there = elsewhere(at)
    parts = [gradient(at, kind(**STEPS).prepared(at), there) for kind in (GradientAscent, FineTune)]
    found = gradient(at, GradDiff(**STEPS, forget_weight=0.7, retain_weight=2.0).prepared(at), there)
    assert torch.allclose(found, 0.7 * parts[0] + 2 * parts[1])


@pytest.mark.parametrize("task", ["classifier", "speaker"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_npo_is_ascent_with_each_sequence_weighed(task: str, beta: float) -> None:
    """W = 2 / (1 + exp(β (NLL − NLL_ref))), NLL summed over the sequence: another reduction gives another W."""
    at = context(task)
    there, n = elsewhere(at), len(FORGET)
    nll, before = (losses(at.task, at.network(p), at.forget) for p in (there, at.start))
    w = 2 / (1 + torch.exp(beta * (nll - before)))
    model, expected = at.network(there), torch.zeros_like(flat(at.start))
    for i in range(n):
        expected -= w[i] * gradient_of(at.task.loss(model, at.forget.batch([i])).sum(), model) / n
    found = gradient(at, NPO(**STEPS, beta=beta, retain_weight=0.0).prepared(at), there)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert (w - 1).abs().max() > 1e-3, "at the reference nothing could be told"


def test_npo_at_the_reference_or_with_small_beta_is_gradient_difference() -> None:
    at = context("speaker")
    diff = GradDiff(**STEPS, forget_weight=1.0, retain_weight=0.5).prepared(at)
    at_reference = NPO(**STEPS, beta=3.0, retain_weight=0.5).prepared(at)
    assert torch.allclose(gradient(at, at_reference, at.start), gradient(at, diff, at.start))
    there, small = elsewhere(at), NPO(**STEPS, beta=1e-7, retain_weight=0.5).prepared(at)
    assert torch.allclose(gradient(at, small, there), gradient(at, diff, there), rtol=1e-5, atol=1e-8)


def scrubbed(**changes: Any) -> scrub.SCRUB:
    kind = {"loss_weight": 0.7, "teacher_weight": 3.0, "temperature": 2.0, "forget_share": 0.5}
    return scrub.SCRUB(**{**STEPS, **kind, **changes})


@pytest.mark.parametrize("task", ["classifier", "speaker"])
def test_losses_of_a_batch_are_their_formulas(task: str) -> None:
    """Of rows in no order: what is computed once has to be found again by their places."""
    at = context(task)
    there, teacher = at.network(elsewhere(at)), at.network(at.start)
    draw = few_rows(at)
    f, r = draw.forget_index.tolist(), draw.retain_index.tolist()

    def logits(model: nn.Module, examples: Examples, rows: list[int]) -> list[Tensor]:
        """(T, C) of what is scored, of each row."""
        found = []
        for i in rows:
            scored = examples.targets[[i]] != IGNORED
            z = at.task.outputs(model, examples.batch([i])).detach()
            found.append(z[scored[:, : z.shape[1]]] if z.ndim == 3 else z)
        return found

    def nll(model: nn.Module, examples: Examples, rows: list[int]) -> Tensor:
        told = [examples.targets[[i]][examples.targets[[i]] != IGNORED] for i in rows]
        found = [nn.functional.cross_entropy(z, y, reduction="sum")
                 for z, y in zip(logits(model, examples, rows), told, strict=True)]  # fmt: skip
        return torch.stack(found)

    def kl(examples: Examples, rows: list[int]) -> Tensor:
        """T² KL(softened teacher; softened student), T = 2, the mean over predictions."""
        p, q = (torch.cat(logits(model, examples, rows)).div(2).softmax(-1) for model in (teacher, there))
        return 4 * (p * (p / q).log()).sum(-1).mean()

    l_r = nll(there, at.retain, r).mean()
    now, before = (nll(model, at.forget, f) for model in (there, teacher))
    lengths = torch.stack([(at.forget.targets[i] != IGNORED).sum() for i in f])
    classes = 3 if task == "classifier" else VOCABULARY
    labels = wrong_labels(at.forget.targets, classes, at.generator("random labels"))
    weights = {"beta": 1.5, "retain_weight": 0.6}
    salun = replace(few("salun"), retain_weight=0.6)  # type: ignore[call-arg]
    cases = [
        (NPO(**STEPS, **weights), npo_loss(now, before, 1.5) + 0.6 * l_r),
        (SimNPO(**STEPS, **weights, delta=0.1, forget_weight=0.4),
         0.4 * simnpo_loss(now, lengths, 1.5, 0.1) + 0.6 * l_r),
        (salun, nll(there, replace(at.forget, targets=labels), f).mean() + 0.6 * l_r),
        (scrubbed(), 0.7 * l_r + 3 * kl(at.retain, r)),
    ]  # fmt: skip
    for one, expected in cases:
        assert isinstance(one, FirstOrder)
        assert torch.allclose(one.prepared(at)(there, draw).detach(), expected), one.name
    up = scrubbed().prepared(at)(there, few_rows(at, 2))
    assert torch.allclose(up.detach(), -kl(at.forget, f)) and not torch.allclose(up.detach(), now.mean())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.01, 20, allow_subnormal=False), min_size=1, max_size=5),
    st.floats(0.05, 5, allow_subnormal=False),
)
def test_preference_losses_are_their_formulas(values: list[float], beta: float) -> None:
    nll = torch.tensor(values, dtype=torch.float64)
    lengths = torch.arange(1, len(values) + 1)
    expected = 2 / beta * torch.log1p(torch.exp(-beta * (nll - 1))).mean()
    assert torch.allclose(npo_loss(nll, torch.ones_like(nll), beta), expected)
    expected = 2 / beta * torch.log1p(torch.exp(-beta * nll / lengths + 0.3)).mean()
    assert torch.allclose(simnpo_loss(nll, lengths, beta, 0.3), expected)


def test_simnpo_divides_by_scored_tokens() -> None:
    at = context("speaker")
    one = SimNPO(**STEPS, beta=2.0, delta=0.1, forget_weight=0.5, retain_weight=0.0)
    there = elsewhere(at)
    nll = losses(at.task, at.network(there), at.forget)
    lengths = (at.forget.targets != IGNORED).sum(1)
    value = one.prepared(at)(at.network(there), whole(at))
    assert lengths.unique().numel() > 1
    assert torch.allclose(value.detach(), 0.5 * simnpo_loss(nll, lengths, 2.0, 0.1))


@pytest.mark.parametrize("task", ["classifier", "speaker"])
def test_the_divergence_from_the_teacher_is_nothing_at_the_teacher(task: str) -> None:
    """A cross-entropy that goes by its name would be H(p) > 0 there."""
    at = context(task)
    teacher, student = at.network(at.start), at.network(at.start)
    value = scrub.distilled(at.task, teacher, student, at.forget.batch(), 2.0)
    assert abs(float(value.detach())) < 1e-12 and gradient_of(value, student).abs().max() < 1e-12
    other = at.network(elsewhere(at))
    value = scrub.distilled(at.task, teacher, other, at.forget.batch(), 1.0)
    ours, theirs = (measured(at.task, m, at.forget).logp for m in (teacher, other))
    assert (
        torch.allclose(value.detach(), (ours.exp() * (ours - theirs)).sum(-1).mean()) and float(value.detach()) > 1e-3
    )
    assert not torch.allclose(divergence(ours, theirs).mean(), divergence(theirs, ours).mean())


def test_scrub_moves_the_student_and_not_the_teacher() -> None:
    at = context()
    before = flat(at.start).clone()
    one = few("scrub")
    assert isinstance(one, scrub.SCRUB)
    objective = one.prepared(at)
    there = at.network(elsewhere(at))
    up, down = (gradient_of(objective(there, whole(at, step)), there) for step in (2, 1))
    teacher = at.network(at.start)
    kl = gradient_of(scrub.distilled(at.task, teacher, there, at.forget.batch(), one.temperature), there)
    assert torch.allclose(up, -kl) and not torch.allclose(down, -kl)
    done = one.unlearn(at)
    assert (flat(done.final) - before).abs().max() > 1e-3 and torch.equal(flat(at.start), before)


def test_the_sides_of_scrub_take_turns_each_with_its_own_moments() -> None:
    """Against AdamW by its formula, on whole sets; F has the even ones of the first 0.7 · 6 steps."""
    at = context()
    one = scrubbed(steps=6, batch=100, weight_decay=0.2, forget_share=0.7)
    objective, names = one.prepared(at), sorted(at.start)
    now, moments = flat(at.start), [[torch.zeros_like(flat(at.start))] * 2 for _ in range(2)]
    sizes, turns = [at.start[name].numel() for name in names], [0, 0]
    for step in (1, 2, 3, 4, 5, 6):
        parts = zip(names, now.split(sizes), strict=True)
        model = at.network({name: part.view_as(at.start[name]) for name, part in parts})
        g, side = gradient_of(objective(model, whole(at, step)), model), int(step in (2, 4))
        m, v = moments[side]
        turns[side] += 1
        m, v = moments[side] = [0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2]
        mean, square = m / (1 - 0.9 ** turns[side]), v / (1 - 0.999 ** turns[side])
        now = (1 - 0.01 * 0.2) * now - 0.01 * mean / (square.sqrt() + 1e-8)
    assert turns == [4, 2] and torch.allclose(flat(one.unlearn(at).final), now, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("task", ["classifier", "speaker"])
def test_wrong_labels_are_wrong_and_fixed(task: str) -> None:
    at = context(task)
    targets = at.task.train.targets
    classes = 3 if task == "classifier" else VOCABULARY
    drawn = wrong_labels(targets, classes, torch.Generator().manual_seed(0))
    scored = targets != IGNORED
    assert (drawn[scored] != targets[scored]).all() and (drawn[~scored] == IGNORED).all()
    assert drawn[scored].min() >= 0 and drawn[scored].max() < classes
    assert len(drawn[scored].unique()) == classes
    one = few("salun")
    assert isinstance(one, SalUn)
    first, second = (one.prepared(at)(at.network(at.start), whole(at)) for _ in range(2))
    assert torch.equal(first, second)


# Sophia


def test_momentum_and_curvature_are_applied_once() -> None:
    one = torch.ones(3, dtype=torch.float64)
    assert torch.allclose(soul.with_gradient(torch.zeros(3).double(), one, 0.9), 0.1 * one)
    assert torch.allclose(soul.with_gradient(one, one, 0.9), one)
    assert torch.allclose(soul.with_curvature(one, 2 * one, 0.95, 10), 0.95 * one + 0.05 * 10 * 4 * one)
    step, cut = soul.step_of(torch.tensor([3.0, -3.0, 0.5, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0]), 2.0)
    assert step.tolist() == [1, -1, 0.25, 0] and cut.tolist() == [True, True, False, False]


def moments_of(monkeypatch: pytest.MonkeyPatch, at: Context, **changes: Any) -> tuple[list[soul.Moments], Unlearned]:
    """What a run of it held at each step."""
    seen: list[soul.Moments] = []
    move = soul.SOUL._move

    def watched(self: soul.SOUL, named: Any, moments: soul.Moments, gamma: float) -> float:
        seen.append(soul.Moments(dict(moments.m), dict(moments.h)))
        return move(self, named, moments, gamma)

    monkeypatch.setattr(soul.SOUL, "_move", watched)
    kind = {"forget_weight": 1.0, "retain_weight": 1.0, "betas": [0.9, 0.95], "every": 3, "clipped": 0.5}
    return seen, soul.SOUL(**{**STEPS, "batch": 100, "lr": 1e-4, **kind, **changes}).unlearn(at)


def test_a_run_of_soul_starts_with_a_tenth_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    at = context()
    seen, done = moments_of(monkeypatch, at)
    expected = gradient(at, GradDiff(**STEPS, forget_weight=1.0, retain_weight=1.0).prepared(at), at.start)
    assert torch.allclose(flat(seen[0].m), 0.1 * expected)
    assert flat(seen[0].h).min() >= 0 and flat(seen[0].h).max() > 0
    assert torch.equal(flat(seen[0].h), flat(seen[2].h)) and not torch.equal(flat(seen[2].h), flat(seen[3].h))
    assert 0.4 <= done.notes["clipped"] <= 0.6 and done.notes["gamma"] > 0


def test_curvature_has_labels_of_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model that is sure of a wrong class, data labels would give a large gradient, its own labels none."""
    at = context()
    sure = {name: torch.zeros_like(p) for name, p in at.start.items()}
    last = next(name for name in reversed(list(at.start)) if name.endswith("bias"))
    sure[last] = torch.tensor([0.0, 40.0, 0.0], dtype=torch.float64)
    model, rng = at.network(sure), torch.Generator().manual_seed(0)
    assert (soul.sampled_labels(at.task, model, at.retain.batch(), rng).targets == 1).all()
    certain = replace(at, start=sure)
    assert (certain.retain.targets != 1).any(), "the data say otherwise"
    seen, _ = moments_of(monkeypatch, certain)
    assert flat(seen[0].h).max() < 1e-12, "the run itself draws them"
    speaker = context("speaker")
    batch = speaker.retain.batch()
    drawn = soul.sampled_labels(speaker.task, speaker.network(speaker.start), batch, rng).targets
    width = drawn.shape[1]
    assert ((drawn == IGNORED) == (batch.targets[:, :width] == IGNORED)).all()
    assert not torch.equal(drawn, batch.targets[:, :width])


def test_decay_shrinks_and_what_is_masked_counts_in_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    at = context("speaker")
    _, done = moments_of(monkeypatch, at, lr=0.1, weight_decay=0.5)
    unused = at.start["table.weight"][VOCABULARY - 1]
    assert torch.allclose(done.final["table.weight"][VOCABULARY - 1], unused * 0.95**4)
    rng = torch.Generator().manual_seed(0)
    mask = {n: torch.rand(p.shape, generator=rng) < 0.3 for n, p in at.start.items()}
    seen, done = moments_of(monkeypatch, replace(at, mask=mask), steps=1, clipped=0.2)
    m, h, may_move = flat(seen[0].m).abs(), flat(seen[0].h), flat(mask)
    assert m[may_move].any() and not m[~may_move].any()
    clipped = (m > done.notes["gamma"] * h)[may_move & (m > 0)].double().mean()
    assert abs(float(clipped) - 0.2) < 0.02 and float(clipped) == pytest.approx(done.notes["clipped"])


# Matching


class Told(Method):
    """score(q, i) by the rows' places, so that the sum over F can be known."""

    calibrated = True

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        place = {name: k for k, name in enumerate(problem.train.ids)}
        rows = torch.tensor([float(place[i]) for i in queries.ids], dtype=torch.float64)
        return rows[:, None] + 0.01 * torch.arange(len(problem.train), dtype=torch.float64)


def matching(predicted: str, **changes: Any) -> Matching:
    return Matching(**{**STEPS, "sample": 10, "predicted": predicted, **changes})


def test_matched_outputs_are_those_that_the_scores_predict() -> None:
    at = context("classifier", Told())
    now = measured(at.task, at.network(at.start), at.forget).margin
    change = len(FORGET) * torch.tensor([float(i) for i in FORGET]) + 0.01 * sum(FORGET)
    assert torch.allclose(matching("attribution").targets(at, at.forget, "forget"), now - change)
    assert torch.allclose(matching("nothing").targets(at, at.forget, "forget"), now)
    now, there = (matching(kind).targets(at, at.retain, "retain") for kind in ("nothing", "attribution"))
    shuffled = now - matching("shuffled").targets(at, at.retain, "retain")
    assert torch.allclose(shuffled.sort().values, (now - there).sort().values)
    assert not torch.allclose(shuffled, now - there)


def test_the_oracle_is_matched_and_nothing_stays() -> None:
    gold = elsewhere(context())
    at = context("classifier", Method(), retrained=lambda: gold)
    wanted = measured(at.task, at.network(gold), at.forget).margin

    def off(parameters: Parameters) -> float:
        return float((measured(at.task, at.network(parameters), at.forget).margin - wanted).square().mean())

    done = matching("oracle", steps=150, lr=3e-3, sample=26, batch=30).unlearn(at)
    assert off(done.final) < 0.05 * off(at.start)
    kept = matching("nothing", batch=30, sample=26).unlearn(at).final
    assert abs(loss_of(at, kept, at.forget) - loss_of(at, at.start, at.forget)) < 1e-2
    assert [kind for kind in PREDICTIONS if matching(kind).sees_gold] == ["oracle"], "another gold judges it"
    assert matching("oracle").uses is None and matching("attribution").uses == "attribute"
    with pytest.raises(UserError, match=r"unlearner\.predicted=orakel"):
        matching("orakel")


def test_outputs_are_matched_row_by_row_on_both_sets() -> None:
    """The sample being all of R, its order does not matter."""
    gold = elsewhere(context())
    at = context("classifier", Method(), retrained=lambda: gold)
    draw = few_rows(at)
    objective = matching("oracle", sample=26, batch=26).prepared(at)
    model, wanted = at.network(at.start), at.network(gold)

    def off(examples: Examples) -> float:
        found, goal = (at.task.measure(m, examples.batch()).detach() for m in (model, wanted))
        return float((found - goal).square().mean())

    parts = off(at.forget.select(draw.forget_index)), off(at.retain)
    assert float(objective(model, draw).detach()) == pytest.approx(sum(parts) / 2) and parts[0] != parts[1]


# Tuning


def test_tuning_takes_the_best_by_its_own_criterion_and_asks_for_no_gold() -> None:
    at = context("classifier", retrained=lambda: pytest.fail("a gold was asked for"))
    one = GradientAscent(**{**STEPS, "grid": {"lr": [0.1, 1e-3, 1e-2]}})
    start = flat(at.start)
    chosen, done, note = best_of(one, at, lambda p: -float((flat(p) - start).norm()))
    assert chosen == replace(one, lr=1e-3) and note["chosen"] == {"lr": 1e-3} and len(note["tried"]) == 3
    assert torch.equal(flat(done.final), flat(chosen.unlearn(at).final))


def test_what_diverged_is_not_chosen_and_the_criterion_is_of_those_who_do_not_judge() -> None:
    """Accuracy on `val` − |AUC(F, every other non-member) − ½|, by loops."""
    at = context()
    one = FineTune(**{**STEPS, "grid": {"lr": [1e308, 1e-3]}})
    chosen, _, note = best_of(one, at, lambda p: float(not flat(p).isfinite().all()))
    assert chosen == replace(one, lr=1e-3) and [tried["criterion"] for tried in note["tried"]] == [None, 0]
    model, splits = at.network(at.start), at.task.splits

    def expected(named: str, first: int) -> float:
        with torch.no_grad():
            right = [int(model(**splits[named].batch([i]).inputs).argmax()) == int(splits[named].targets[i])
                     for i in range(len(splits[named]))]  # fmt: skip
            inside = at.task.loss(model, at.forget.batch()).tolist()
            outside = at.task.loss(model, splits["nonmembers"].batch(range(first, 16, 2))).tolist()
        wins = [float(a < b) + 0.5 * (a == b) for a in inside for b in outside]
        return sum(right) / len(right) - abs(sum(wins) / len(wins) - 0.5)

    found = judged(at, at.start)
    assert found == pytest.approx(expected("val", 0))
    assert min(abs(found - expected("test", 0)), abs(found - expected("val", 1))) > 1e-3, "the case tells them apart"


def test_what_is_drawn_is_of_the_name_and_of_the_run() -> None:
    at = context()
    others = replace(at, problem=problem(*trained("classifier"), seed=1))
    asked = [(at, "a", 1), (at, "a", 1), (at, "b", 1), (at, "a", 2), (others, "a", 1)]
    drawn = [torch.rand(3, generator=one.generator(*name)).tolist() for one, *name in asked]
    assert drawn[0] == drawn[1] and len({tuple(row) for row in drawn}) == 4
