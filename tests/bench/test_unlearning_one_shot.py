"""One-shot steps and Newton steps against retraining in closed form and dense algebra."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev
from unlearning_cases import FORGET, IGNORED, VOCABULARY, context, flat, gradient_of, problem, ridge, trained

from bench.evaluations.base import Unfit
from bench.evaluations.unlearning.base import Context, Parameters, moved
from bench.evaluations.unlearning.gradients import mean_gradient
from bench.evaluations.unlearning.influence import Influence
from bench.evaluations.unlearning.iterated_newton import IteratedNewton, loss_of
from bench.evaluations.unlearning.matched import matched, unit
from bench.evaluations.unlearning.random_direction import RandomDirection
from methods.curvature.cg import ConjugateGradients
from methods.curvature.damping import Damping
from methods.curvature.dense import Dense
from methods.curvature.ekfac import EKFAC
from methods.curvature.identity import Identity
from methods.influence import Influence as Method
from tasks.base import Examples
from tasks.errors import UserError
from tasks.training.train import train

NOTHING = Damping("absolute", 0.0, "global")
WRONG = Damping("absolute", 10.0, "global")  # of the method itself: the unlearner's has to take its place
EXACT = {"dense": Dense("ggn", "global", 1.0), "cg": ConjugateGradients("ggn", 1e-12, 300), "ekfac": EKFAC("ggn")}


def influence(form: str = "newton", damping: Damping = NOTHING, scale: float = 1.0) -> Influence:
    return Influence("influence", {}, scale, form, damping)


def newton(**changes: Any) -> IteratedNewton:
    settings = {"steps": 10, "push": 0.3, "radius": 0.5, "target": 1.0, "damping": Damping("absolute", 0.01, "global")}
    return IteratedNewton("iterated_newton", {}, **{**settings, **changes})


def retrained(at: Context) -> Tensor:
    """What lbfgs finds on R alone."""
    task = replace(at.task, splits={**at.task.splits, "train": at.retain})
    return flat(train(task, 5).final)


# Ridge regression


def design(examples: Examples) -> Tensor:
    """(n, 5), the bias first: `flat` sorts names."""
    x = examples.inputs["x"]
    return torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], 1)


@pytest.mark.parametrize("solver", EXACT)
def test_on_ridge_regression_newton_is_retraining(solver: str) -> None:
    at = context("ridge", Method(EXACT[solver], WRONG))
    assert (flat(influence().unlearn(at).final) - retrained(at)).abs().max() < 1e-8


def test_koh_liang_is_off_by_the_share_that_is_forgotten() -> None:
    """Against the minimum of (1/N) Σ_R ℓ + ½γ‖θ‖², whose penalty does not grow as rows go."""
    off = {}
    for rows in (60, 600):
        task = ridge(rows)
        start = train(task.public(), 5)
        at = Context(problem(task, start), Method(EXACT["dense"], WRONG), start.final, FORGET)
        x, y = design(at.retain), at.retain.targets
        h = x.T @ x / rows + task.recipe.l2 * torch.eye(5, dtype=x.dtype)
        gold = torch.linalg.solve(h, x.T @ y / rows)
        found = flat(influence("koh_liang").unlearn(at).final)
        off[rows] = float((found - gold).norm() / (gold - flat(at.start)).norm())
    assert off[60] < 0.5 and off[600] < 0.2 * off[60]


def test_koh_liang_has_the_curvature_of_all_rows() -> None:
    at = context("ridge", Method(EXACT["dense"], WRONG))
    columns, y, n = design(at.task.train), at.task.train.targets, len(at.task.train)
    h = columns.T @ columns / n + at.task.recipe.l2 * torch.eye(5, dtype=torch.float64)
    g = (columns @ flat(at.start) - y)[:, None] * columns
    expected = torch.linalg.solve(h, g[list(FORGET)].sum(0) / n)
    assert torch.allclose(flat(influence("koh_liang").direction(at)), expected, rtol=1e-8, atol=1e-12)


def test_reweight_at_a_minimum_removes_without_the_share_of_those_who_stay() -> None:
    """At the minimum of D, n_r g_R = −n_f g_F − Nγθ: v = (n_f/n_r)(g_F + γθ0), the right-hand side of `newton`."""
    at = context("ridge", Method(EXACT["dense"], WRONG))
    start, task = flat(at.start), at.task
    columns = design(task.train)
    h = columns.T @ columns / len(task.train) + task.recipe.l2 * torch.eye(5, dtype=torch.float64)
    g = (columns @ start - task.train.targets)[:, None] * columns
    n_f, n = len(FORGET), len(task.train)
    v = n_f / (n - n_f) * (g[list(FORGET)].mean(0) + task.recipe.l2 * start)
    found = flat(influence("reweight").direction(at))
    assert torch.allclose(found, torch.linalg.solve(h, v), rtol=1e-6, atol=1e-10)


# A softmax regression and a perceptron: what a solver corrects


CG = [partial(context, name, Method(EXACT["cg"], WRONG)) for name in ("softmax", "classifier")]


def with_a_token_of_its_own() -> Context:
    """One token is said by two rows of F, and by no other."""
    task, trajectory = trained("speaker")
    ids = task.train.inputs["input_ids"].clone()
    ids[FORGET[0], 1] = ids[FORGET[1], 2] = VOCABULARY - 1
    train = replace(task.train, inputs={**task.train.inputs, "input_ids": ids})
    task = replace(task, splits={**task.splits, "train": train})
    return Context(problem(task, trajectory), Method(EXACT["cg"], WRONG), trajectory.final, FORGET)


def read(at: Context) -> Tensor:
    """True but for the row of padding, which no gradient reaches."""
    return flat({n: (torch.arange(len(p)) > 0).expand(p.T.shape).T if n == "table.weight" else p == p
                 for n, p in at.start.items()})  # fmt: skip


def dense_ggn(at: Context, there: Parameters | None = None) -> Tensor:
    """(1/n_r) Σ_R J^T (diag p − p p^T) J over all that is scored, parameters in the order of `flat`."""
    model = at.network(there or at.start)
    named = {name: p.detach() for name, p in model.named_parameters()}
    inputs, scored = at.retain.inputs, at.retain.targets != IGNORED

    def logits(p: Parameters) -> Tensor:
        return functional_call(model, p, (), inputs)[scored]

    jacobian = jacrev(logits)(named)
    j = torch.cat([jacobian[name].flatten(2) for name in sorted(named)], 2)  # (T, C, P)
    p = logits(named).softmax(-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nca,ncd,ndb->ab", j, middle, j) / len(at.retain)


@pytest.mark.parametrize("make", [*CG, with_a_token_of_its_own])
def test_the_correction_is_that_of_the_dense_solve_on_the_retained_rows(make: Callable[[], Context]) -> None:
    """k − v, not k: with a large damping the two hardly differ, and a code that only rescales v looks right."""
    damping, at = 1e-2, make()
    live, l2 = read(at), at.task.recipe.l2
    model = at.network(at.start)
    v = gradient_of(at.task.loss(model, at.forget.batch()).sum(), model) / len(at.retain)
    v = v + len(FORGET) / len(at.retain) * l2 * flat(at.start)
    h = dense_ggn(at) + (l2 + damping) * torch.eye(len(v), dtype=v.dtype)
    k = torch.linalg.solve(h, v)
    found = flat(influence(damping=Damping("absolute", damping, "global")).direction(at))
    correction, expected = (found - v)[live], (k - v)[live]
    assert (correction - expected).norm() < 1e-5 * expected.norm()
    assert expected.norm() > 1.5 * v.norm(), "the case must tell a solver from the identity"


def test_the_identity_is_one_step_of_gradient_ascent() -> None:
    at = context("classifier", Method(Identity(), WRONG))
    ascent = influence().direction(at)
    share, l2 = len(FORGET) / len(at.retain), at.task.recipe.l2
    expected = {n: share * (g + l2 * at.start[n]) for n, g in mean_gradient(at, at.start, at.forget).items()}
    assert torch.allclose(flat(ascent), flat(expected))
    after = moved(at.start, ascent, 0.1)
    assert loss_of(at, after, at.forget) > loss_of(at, at.start, at.forget)


def test_mean_gradients_are_autograds() -> None:
    for name in ("classifier", "speaker"):
        at = context(name)
        model = at.network(at.start)
        expected = gradient_of(at.task.loss(model, at.retain.batch()).mean(), model)
        assert torch.allclose(flat(mean_gradient(at, at.start, at.retain)), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("form", ["koh_liang", "newton", "reweight"])
def test_every_form_forgets(form: str) -> None:
    at = context("classifier", Method(EXACT["cg"], WRONG))
    done = influence(form, Damping("absolute", 0.1, "global")).unlearn(at)
    assert [step for step, _ in done.path] == list(range(6)) and done.path[0][1] is at.start
    losses = [loss_of(at, parameters, at.forget) for _, parameters in done.path]
    assert losses == sorted(losses) and losses[-1] > losses[0] + 1e-3


def test_impossible_settings_are_named() -> None:
    with pytest.raises(UserError, match=r"unlearner\.form=newtn .*koh_liang, newton, reweight"):
        influence("newtn")
    with pytest.raises(UserError, match=r"unlearner\.scale=0"):
        influence(scale=0)
    with pytest.raises(UserError, match=r"unlearner\.target=-1"):
        newton(target=-1.0)


# Iterated Newton


def test_newton_steps_stay_in_the_trust_region_and_stop_at_the_target() -> None:
    at = context("classifier", Method(EXACT["cg"], WRONG))
    done = newton(radius=0.2).unlearn(at)
    states = [flat(parameters) for _, parameters in done.path]
    lengths = [float((b - a).norm()) for a, b in pairwise(states)]
    assert max(lengths) < 0.2 + 1e-9 and len(lengths) >= 3
    losses = [loss_of(at, parameters, at.forget) for _, parameters in done.path]
    assert losses[-1] >= 1.0 > losses[-2] and done.notes["reached"]
    assert not newton(steps=1, radius=0.01).unlearn(at).notes["reached"]
    with pytest.raises(Unfit, match=r"at its target .* already"):
        newton(target=losses[0] / 2).unlearn(at)


@pytest.mark.parametrize("make", [CG[0], with_a_token_of_its_own])
def test_newton_steps_are_solves_of_the_pushed_gradient_each_where_it_begins(make: Callable[[], Context]) -> None:
    at = make()
    live, l2 = read(at), at.task.recipe.l2
    path = [parameters for _, parameters in newton(steps=2, radius=1e9, target=50.0).unlearn(at).path]
    for before, after in pairwise(path):
        model = at.network(before)
        g_f, g_r = (gradient_of(at.task.loss(model, part.batch()).mean(), model) for part in (at.forget, at.retain))
        h = dense_ggn(at, before) + (l2 + 0.01) * torch.eye(len(live), dtype=g_f.dtype)
        step = torch.linalg.solve(h, 0.3 * g_f - g_r - l2 * flat(before))
        assert torch.allclose((flat(after) - flat(before))[live], step[live], rtol=1e-6, atol=1e-9)
    assert len(path) == 3


def test_the_target_is_no_gold() -> None:
    at = context("classifier", Method(EXACT["cg"], WRONG))
    done = newton(target=None).unlearn(replace(at, retrained=lambda: pytest.fail("a gold was asked for")))
    half = at.task.splits["nonmembers"].select(list(range(0, 16, 2)))
    assert math.isclose(done.notes["target"], loss_of(at, at.start, half))


# Random directions, and equal forgetting


def test_a_random_direction_is_a_unit_vector_of_its_own_generator() -> None:
    at = context("classifier")
    one = RandomDirection("random_direction", {}, 2.0)
    torch.manual_seed(1)
    first = one.direction(at)
    torch.manual_seed(2)
    assert torch.equal(flat(first), flat(one.direction(at))) and math.isclose(float(flat(first).norm()), 1)
    assert math.isclose(float((flat(one.unlearn(at).final) - flat(at.start)).norm()), 2, rel_tol=1e-9)


@pytest.mark.parametrize("target", [0.1, 0.3, 0.6])
def test_a_direction_is_followed_to_the_target(target: float) -> None:
    found = matched(lambda step: 0.01 + step**2, target)
    assert found.reached and target <= found.loss < 1.01 * target
    assert math.isclose(found.step, math.sqrt(target - 0.01), rel_tol=2e-3)


def test_what_jumps_over_the_target_or_never_comes_up_to_it_is_not_matched() -> None:
    assert not matched(lambda step: 5.0 if step > 1 else 0.0, 0.3).reached
    assert not matched(lambda step: 0.2 * math.tanh(step), 0.3).reached
    assert not matched(lambda step: math.nan if step > 1 else 0.0, 0.3).reached


def test_only_the_direction_counts_at_equal_forgetting() -> None:
    d = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert math.isclose(float(flat(unit(d)).norm()), 1)
    assert torch.allclose(flat(unit(d)), flat(unit({n: 7 * v for n, v in d.items()})))
    with pytest.raises(ValueError, match="leads nowhere"):
        unit({"a": torch.zeros(3)})
