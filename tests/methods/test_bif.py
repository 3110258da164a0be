"""BIF: on a quadratic loss the posterior is a Gaussian, and the covariance of two squares is known in closed form."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from cases import (
    GAMMA,
    Biased,
    alone,
    bert,
    close,
    draw,
    error,
    exact_scores,
    far,
    perceptron,
    problem_of,
    randomised,
    task_of,
    three_classes,
    vectors,
)
from torch import Tensor

from methods import bif
from methods.base import Problem
from methods.bif import BIF
from methods.loss_covariance import observed
from tasks.base import Examples, Task
from tasks.errors import UserError
from tasks.objectives.classification import Classification
from tasks.objectives.regression import Regression
from tasks.training.train import train

METHOD = BIF(chains=2, draws=150, burn_in=40, thin=2, step=0.1, beta=0.5, gamma=2.0, batch_size=None)
SHORT = replace(METHOD, draws=5, burn_in=2)
SEEDS = 8


def regression() -> Task:
    """Four parameters, far from their optimum; 12 rows, 5 queries."""

    def rows(name: str, n: int, seed: int) -> Examples:
        y = torch.randn(n, generator=draw(seed + 50), dtype=torch.float64)
        return replace(vectors(name, n, 3, 2, seed), targets=y)

    build = partial(randomised, partial(Biased, [3, 1], [True]))
    return task_of(rows("train", 12, 0), rows("query", 5, 1), build, Regression())


def closed_form(problem: Problem, queries: Examples, s: BIF) -> Tensor:
    """−β Cov(½u_i², −½v_q²) = β (½ c² + E[u_i] E[v_q] c) with c = Cov(u_i, v_q), by the moments of a Gaussian.

    θ ~ N(μ, Σ), A = β XᵀX + (βNγ₂ + γ) I, A μ = β Xᵀy + γθ*. A chain of step ε has Σ⁻¹ = A − ¼ε A², not yet A: from
    Σ = (I − ½εA) Σ (I − ½εA) + εI.
    """
    x, y = with_ones(problem.train), problem.train.targets
    centre = torch.cat([p.flatten() for p in problem.trajectory().final.values()])
    eye = torch.eye(4, dtype=torch.float64)
    a = s.beta * x.T @ x + (s.beta * len(x) * GAMMA + s.gamma) * eye
    mean = torch.linalg.solve(a, s.beta * x.T @ y + s.gamma * centre)
    spread = torch.linalg.inv(a - s.step / 4 * a @ a)
    z = with_ones(queries)
    c = z @ spread @ x.T  # (Q, N)
    u, v = x @ mean - y, z @ mean - queries.targets
    return s.beta * (0.5 * c.square() + v[:, None] * u * c)


def with_ones(examples: Examples) -> Tensor:
    return torch.cat([examples.inputs["x"], torch.ones(len(examples), 1, dtype=torch.float64)], 1)


@lru_cache
def runs() -> tuple[Tensor, Tensor]:
    """Scores (SEEDS, Q, N) and values (SEEDS, N) of independent runs."""
    problems = [problem_of(regression(), seed) for seed in range(SEEDS)]
    scores = torch.stack([METHOD.attribute(p, p.task.splits["query"]) for p in problems])
    return scores, torch.stack([METHOD.value(p) for p in problems])


def deviation(found: Tensor, expected: Tensor) -> float:
    """Root mean square of (mean over runs − expected), in standard errors."""
    z = (found.mean(0) - expected) / (found.std(0) / SEEDS**0.5)
    return z.square().mean().sqrt().item()


def test_scores_have_a_closed_form_on_a_quadratic_loss() -> None:
    problem, (found, _) = problem_of(regression()), runs()
    queries = problem.task.splits["query"]
    expected = closed_form(problem, queries, METHOD)
    assert deviation(found, expected) < 1.5 and error(found.mean(0), expected) < 0.1
    wrong = [
        -expected,
        expected / METHOD.beta,
        closed_form(problem, queries, replace(METHOD, gamma=0.1)),
        closed_form(problem, queries, replace(METHOD, beta=1.0)) / 2,
    ]
    for control in wrong:
        assert deviation(found, control) > 3 and error(found.mean(0), control) > 0.1


def test_values_are_scores_for_the_own_loss() -> None:
    """m = −ℓ here, so that an example's value is its score for itself with the opposite sign: −β Var(ℓ_i)."""
    problem, (_, found) = problem_of(regression()), runs()
    expected = -closed_form(problem, problem.train, METHOD).diagonal()
    assert (found < 0).all()
    assert deviation(found, expected) < 1.5 and error(found.mean(0), expected) < 0.1
    scores = SHORT.attribute(problem_of(regression()), problem.train)
    assert close(SHORT.value(problem_of(regression())), -scores.diagonal())


@pytest.mark.parametrize("case", [regression, three_classes, bert])
def test_slopes_are_the_gradient_of_the_energy(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """U = β Σ ℓ_i + βN ½γ₂‖θ‖² + ½γ‖θ − θ*‖², one example at a time; batches have its slope in the mean."""
    task: Task = case()
    problem = problem_of(task)
    centre, model = problem.trajectory().final, problem.model().requires_grad_()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=draw(k), dtype=p.dtype)
    losses = 0.0
    for i in range(len(task.train)):
        inputs, target = alone(task.train, i)
        losses += task.objective.loss(model(**inputs), target).sum()
    energy = METHOD.beta * losses
    for name, p in named.items():
        energy += METHOD.beta * 12 * 0.5 * GAMMA * p.square().sum()
        energy += 0.5 * METHOD.gamma * (p - centre[name]).square().sum()
    expected = flat(torch.autograd.grad(energy, list(named.values())))

    def slope(method: BIF) -> Tensor:
        return flat(method._slopes(problem, model, named, centre, rng))

    rng = draw(0)
    assert close(slope(METHOD), expected)
    assert close(slope(replace(METHOD, batch_size=50)), expected)  # more than there are
    monkeypatch.setattr(bif, "TOGETHER", 5)
    assert close(slope(METHOD), expected)
    batches = torch.stack([slope(replace(METHOD, batch_size=6)) for _ in range(60)])
    assert far(batches[0], expected) and far(batches[0], batches[1])
    assert error(batches.mean(0), expected) < 0.15 < error(batches[0], expected)
    assert far(slope(replace(METHOD, beta=1.0)), expected) and far(slope(replace(METHOD, gamma=1.0)), expected)


def flat(parts: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parts])


def test_a_narrow_posterior_gives_the_influence_function() -> None:
    """Softmax regression at its optimum, whose GGN is its Hessian; damping γ / (βN)."""
    splits = [vectors(name, rows, 3, 3, seed) for name, rows, seed in (("train", 12, 0), ("query", 5, 1))]
    task = task_of(*splits, partial(perceptron, 3, 3), Classification(3), optimizer="lbfgs", weight_decay=GAMMA)
    problem, queries = Problem(task, 0, lambda k: train(task, k)), splits[1]
    beta, damping = 1e4, 0.2
    narrow = BIF(1, 2000, 50, 2, 0.6 / (beta * 12), beta, damping * beta * 12, None)
    found = narrow.attribute(problem, queries)
    expected = exact_scores(problem, queries, GAMMA + damping)
    assert error(found, expected) < 0.2
    assert error(found, exact_scores(problem, queries, GAMMA + 10 * damping)) > 0.3
    assert error(found, -expected) > 1
    slope = (found * expected).sum() / expected.square().sum()
    assert narrow.calibrated and 0.9 < slope < 1.1  # in units of the measurement


def test_seeds_decide_and_nothing_else_does() -> None:
    task = regression()
    queries = task.splits["query"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = SHORT.attribute(problem_of(task), queries)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = problem_of(task)
    assert torch.equal(SHORT.attribute(again, queries), first)
    assert torch.equal(SHORT.attribute(again, queries), first)  # of one problem, asked twice
    assert far(SHORT.attribute(problem_of(task, 1), queries), first)
    other = replace(SHORT, batch_size=6)
    assert torch.equal(other.attribute(problem_of(task), queries), other.attribute(problem_of(task), queries))
    # chains differ: with one more, the covariance is another
    assert far(replace(SHORT, chains=3).attribute(problem_of(task), queries), first)


@pytest.mark.parametrize("case", [regression, bert])
def test_a_query_does_not_depend_on_which_others_are_asked(case: Any) -> None:
    task: Task = case()
    queries, method = task.splits["query"], replace(SHORT, step=1e-3)
    expected = method.attribute(problem_of(task), queries)
    problem = problem_of(task)
    for rows in ([2], [3, 0]):
        assert close(method.attribute(problem, queries.select(rows)), expected[rows])
    values = method.value(problem_of(task))
    assert close(method.value(problem), values)  # whoever asks first


def test_losses_do_not_depend_on_the_batch() -> None:
    task = bert()
    problem = problem_of(task)
    found = observed(problem, problem.model(), task.train, task.loss)
    for i in range(len(task.train)):
        inputs, target = alone(task.train, i)
        assert close(found[i : i + 1], task.objective.loss(problem.model()(**inputs), target))


def test_the_explained_model_stays_as_it_was() -> None:
    problem = problem_of(three_classes())
    before = {name: p.clone() for name, p in problem.trajectory().final.items()}
    SHORT.value(problem)
    assert all(torch.equal(p, before[name]) for name, p in problem.trajectory().final.items())


def test_a_chain_that_diverges_says_what_to_change() -> None:
    problem = problem_of(regression())
    wild = replace(METHOD, step=2.0, gamma=0.0, burn_in=500)
    for ask in (lambda: wild.value(problem), lambda: wild.attribute(problem, problem.train)):
        with pytest.raises(ArithmeticError, match=r"method\.step=2\.0: a chain diverged; give a smaller one"):
            ask()


def test_gradients_are_charged() -> None:
    problem = problem_of(regression())
    replace(METHOD, chains=2, draws=3, burn_in=4, thin=5, batch_size=6).value(problem)
    assert problem.meter.gradients == 2 * (4 + 3 * 5) * 6 and problem.meter.trainings == 1


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("chains", 0, "1 or more"),
        ("draws", 0, "1 or more"),
        ("burn_in", -1, "0 or more"),
        ("thin", 0, "1 or more"),
        ("step", 0.0, "above 0"),
        ("step", 2.0, r"below 4 / method\.gamma"),
        ("beta", 0.0, "above 0"),
        ("gamma", -1.0, "0 or more"),
        ("batch_size", 0, "1 or more, null"),
    ],
)
def test_impossible_settings_are_refused(key: str, value: float, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"^method\.{key}={value} is not possible; allowed: {allowed}"):
        replace(METHOD, **{key: value})


def test_one_draw_has_no_covariance() -> None:
    with pytest.raises(UserError, match=r"^method\.draws=1 .*2 or more where there is one chain"):
        replace(METHOD, chains=1, draws=1)
    replace(METHOD, chains=2, draws=1)
