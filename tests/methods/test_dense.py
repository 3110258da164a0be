"""The exact Gauss-Newton matrix: primal, dual and a dense solve are one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import (
    CASES,
    GAMMA,
    alone,
    bert,
    blocked,
    close,
    exact_scores,
    explained,
    far,
    ggn,
    inverse,
    logistic,
    logit,
    per_example,
    problem_of,
    three_classes,
    unit_vectors,
    vector_task,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import Problem
from methods.curvature.damping import Damping
from methods.curvature.dense import Dense, FittedDense
from methods.curvature.identity import Identity
from methods.gradients.blocks import blocks_of
from methods.gradients.per_example import flat, gradients, plain
from methods.gradients.source import Source
from methods.influence import Influence
from tasks.base import Examples, Task
from tasks.errors import UserError

EXACT = Dense("ggn", "global", memory_gib=1.0)


def absolute(value: float) -> Damping:
    return Damping("absolute", value, "global")


def fitted(problem: Problem) -> FittedDense:
    model = problem.model()
    return EXACT.fit(problem, Source(problem.task, model, tuple(blocks_of(model))))


@pytest.mark.parametrize("damping", [1e-2, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_scores_equal_a_dense_solve(name: str, damping: float) -> None:
    task = CASES[name]()
    queries = task.splits["query"]
    expected = exact_scores(problem_of(task), queries, GAMMA + damping)
    assert close(Influence(EXACT, absolute(damping)).attribute(problem_of(task), queries), expected)
    # Neither no curvature at all, however it is scaled, nor a forgotten L2 term may pass.
    identity = Influence(Identity(), absolute(damping)).attribute(problem_of(task), queries)
    scale = (identity * expected).sum() / (identity * identity).sum()
    if len(task.train) > 1:
        assert far(scale * identity, expected)
    assert far(identity, expected)
    forgotten = exact_scores(problem_of(task), queries, damping)
    assert not close(forgotten, expected, 1e-4)


@pytest.mark.parametrize(("rows", "primal"), [(6, False), (40, True)])
def test_both_forms_are_the_same_matrix(rows: int, primal: bool) -> None:
    """35 parameters against 12 or 80 columns."""
    task = vector_task([4, 4, 3], rows=rows)
    problem = problem_of(task)
    found = fitted(problem)
    assert (found.parts[0].root is None) is primal
    model = explained(problem)
    expected = exact_scores(problem, task.splits["query"], GAMMA + 0.01)
    assert close(Influence(EXACT, absolute(0.01)).attribute(problem, task.splits["query"]), expected)
    # The trace, from which relative damping is made, is that of G in both forms.
    assert found.parts[0].gram.trace().item() == pytest.approx(ggn(model, task.train).trace().item(), rel=1e-12)
    assert found.parts[0].gram.shape == ((35, 35) if primal else (2 * rows, 2 * rows))


def test_duplicated_data_gives_the_same_matrix_in_the_other_form() -> None:
    """N copies of the data leave G as it is, but make the dual system primal."""
    task = vector_task([4, 4, 3], rows=6)
    train = task.train
    five = Examples(
        tuple(f"{i}-{c}" for c in range(5) for i in train.ids),
        {"x": train.inputs["x"].repeat(5, 1)},
        train.targets.repeat(5),
    )
    small, large = problem_of(task), problem_of(replace(task, splits={**task.splits, "train": five}))
    dual, primal = fitted(small), fitted(large)
    assert dual.parts[0].root is not None and primal.parts[0].root is None
    left, right = (inverse(found, found.parts[0].blocks, absolute(1e-3), GAMMA) for found in (dual, primal))
    assert close(left, right)


@pytest.mark.parametrize("name", ["logistic", "three_classes", "bert", "shared"])
def test_what_is_solved_is_the_system(name: str) -> None:
    """(G + δI)⁻¹ (G + δI) = I, blocks one after the other."""
    problem = problem_of(CASES[name]())
    model, found = explained(problem), fitted(problem)
    classes = problem.task.objective.classes  # type: ignore[attr-defined]
    jacobians = []
    for c in range(classes):
        of_logit = blocked(model, per_example(model, problem.train, logit(c)))
        jacobians.append(torch.cat([of_logit[b.name].flatten(1) for b in found.parts[0].blocks], 1))
    j = torch.stack(jacobians, 1)  # (N, C, P)
    matrix = torch.zeros(j.shape[2], j.shape[2], dtype=torch.float64)
    for i in range(len(j)):
        p = model(**alone(problem.train, i)[0])[0].detach().softmax(0)
        matrix += j[i].T @ (p.diag() - torch.outer(p, p)) @ j[i] / len(j)
    identity = torch.eye(len(matrix), dtype=torch.float64)
    inverted = inverse(found, found.parts[0].blocks, absolute(0.02), GAMMA)
    assert close(inverted @ (matrix + (GAMMA + 0.02) * identity), identity)
    assert close(inverted, inverted.T)
    assert far(inverted @ (matrix + 0.02 * identity), identity)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 12),
    features=st.integers(1, 4),
    hidden=st.integers(0, 3),
    classes=st.integers(2, 4),
    seed=st.integers(0, 99),
)
def test_any_small_problem(rows: int, features: int, hidden: int, classes: int, seed: int) -> None:
    widths = [features, hidden, classes] if hidden else [features, classes]
    task = vector_task(widths, rows=rows, queries=2, seed=seed)
    problem = problem_of(task)
    expected = exact_scores(problem, task.splits["query"], GAMMA + 0.05)
    found = Influence(EXACT, absolute(0.05)).attribute(problem, task.splits["query"])
    assert close(found, expected)


def test_a_sweep_of_damping_fits_once_and_equals_fresh_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    task, fits, original = three_classes(), [], Dense.fit

    def counting(self: Dense, *arguments: object) -> FittedDense:
        fits.append(self)
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Dense, "fit", counting)
    problem, queries = problem_of(task), task.splits["query"]
    values = [1e-3, 10.0, 0.1, 1e-3]
    swept = [Influence(EXACT, absolute(v)).attribute(problem, queries) for v in values]
    assert len(fits) == 1
    for value, scores in zip(values, swept, strict=True):
        assert close(scores, Influence(EXACT, absolute(value)).attribute(problem_of(task), queries), 1e-14)
    assert len(fits) == 5
    assert far(swept[0], swept[1]) and far(swept[2], swept[1])
    assert torch.equal(swept[0], swept[3])


@pytest.mark.parametrize("rows", [6, 40])
def test_solving_changes_nothing(rows: int) -> None:
    problem = problem_of(vector_task([4, 4, 3], rows=rows))
    found = fitted(problem)
    rhs = found.coordinates(unit_vectors(found.parts[0].blocks))
    before, gram = [g.values.clone() for g in rhs], found.parts[0].gram.clone()
    root = None if found.parts[0].root is None else found.parts[0].root.clone()
    first = flat(found.precondition(rhs, absolute(0.1), GAMMA))
    found.precondition(rhs, absolute(3.0), GAMMA)
    assert torch.equal(flat(found.precondition(rhs, absolute(0.1), GAMMA)), first)
    assert all(torch.equal(g.values, was) for g, was in zip(rhs, before, strict=True))
    assert torch.equal(found.parts[0].gram, gram)
    assert found.parts[0].root is None or (root is not None and torch.equal(found.parts[0].root, root))


@pytest.mark.parametrize("case", [three_classes, bert])
def test_products_in_coordinates_are_products_with_the_inverse(case: Callable[[], Task]) -> None:
    """⟨coordinates(g), precondition(coordinates(v))⟩ = gᵀ (G + δI)⁻¹ v for real gradients."""
    task = case()
    problem = problem_of(task)
    model, found = problem.model(), fitted(problem)
    inverted = inverse(found, found.parts[0].blocks, absolute(0.1), GAMMA)
    for _, g in gradients(task, model, task.train, found.parts[0].blocks, task.objective.loss):
        inside = found.precondition(found.coordinates(g), absolute(0.1), GAMMA)
        dense = flat(plain(g))
        assert close(flat(found.coordinates(g)) @ flat(inside).T, dense @ inverted @ dense.T)
        assert far(dense @ dense.T, dense @ inverted @ dense.T)


@pytest.mark.parametrize(
    ("rule", "strength"),
    [
        ("absolute", lambda trace, size: 0.2),
        ("mean_eigenvalue", lambda t, s: 0.2 * t / s),
        ("trace", lambda t, s: 0.2 * t),
    ],
)
def test_relative_damping_is_of_the_whole_matrix(rule: str, strength: object) -> None:
    task = three_classes()
    problem, queries = problem_of(task), task.splits["query"]
    matrix = ggn(explained(problem), task.train)
    delta = GAMMA + strength(matrix.trace().item(), len(matrix))  # type: ignore[operator]
    expected = exact_scores(problem, queries, delta, matrix)
    for scope in ("block", "global"):  # one matrix is one block
        assert close(Influence(EXACT, Damping(rule, 0.2, scope)).attribute(problem, queries), expected)


@pytest.mark.parametrize("name", ["three_classes", "identical", "logistic"])
@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_a_singular_system_is_refused(name: str, value: float) -> None:
    """γ = λ = 0, or so near 0 that it drowns: softmax is blind to a shift of all logits, so G has no inverse."""
    task = CASES[name]()
    task = replace(task, recipe=replace(task.recipe, weight_decay=0.0))
    with pytest.raises(UserError, match=r"method\.damping\.value"):
        Influence(EXACT, absolute(value)).attribute(problem_of(task), task.splits["query"])


def test_the_l2_of_the_objective_is_enough_to_invert() -> None:
    task = three_classes()
    found = Influence(EXACT, absolute(0.0)).attribute(problem_of(task), task.splits["query"])
    assert close(found, exact_scores(problem_of(task), task.splits["query"], GAMMA))


def test_decoupled_decay_is_no_curvature() -> None:
    task = three_classes()
    task = replace(task, recipe=replace(task.recipe, optimizer="adamw", decay="decoupled"))
    found = Influence(EXACT, absolute(0.05)).attribute(problem_of(task), task.splits["query"])
    assert close(found, exact_scores(problem_of(task), task.splits["query"], 0.05))
    assert far(found, exact_scores(problem_of(task), task.splits["query"], 0.05 + GAMMA))


def test_too_little_memory_is_refused_before_any_gradient() -> None:
    problem = problem_of(bert())
    with pytest.raises(UserError, match=r"method\.curvature\.memory_gib=1e-09.*modules"):
        Influence(Dense("ggn", "global", 1e-9), absolute(0.1)).attribute(problem, problem.task.splits["query"])
    assert problem.meter.gradients == 0
    # What is restricted to fewer parameters needs less: 10 · 10 · 8 bytes.
    enough = Dense("ggn", "global", 801 / 2**30)
    assert Influence(enough, absolute(0.1), modules=("head",)).attribute(problem, problem.task.splits["query"]).any()


def test_a_float32_task_is_solved_in_float64() -> None:
    task = logistic()
    splits = {name: replace(s, inputs={"x": s.inputs["x"].float().double()}) for name, s in task.splits.items()}
    double = replace(task, splits=splits)
    single = replace(
        task,
        splits={name: replace(s, inputs={"x": s.inputs["x"].float()}) for name, s in task.splits.items()},
        dtype=torch.float32,
    )
    problem = problem_of(single)
    weights = {n: p.double() for n, p in problem.trajectory().final.items()}
    same = problem_of(double)
    same.trajectory().final.update(weights)
    found = Influence(EXACT, absolute(1e-4)).attribute(problem, single.splits["query"])
    assert close(found, exact_scores(same, double.splits["query"], GAMMA + 1e-4))
