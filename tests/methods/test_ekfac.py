"""EK-FAC equals the same formulas written out as dense Kronecker products, given the same draws of labels."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import (
    CASES,
    GAMMA,
    Named,
    bert,
    block_scores,
    blocked,
    close,
    draw,
    ekfac,
    error,
    exact_scores,
    explained,
    far,
    ggn,
    inverse,
    labels,
    per_example,
    perceptron,
    problem_of,
    task_of,
    three_classes,
    unit_vectors,
    vector_task,
    vectors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methods.base import Problem
from methods.curvature.damping import Damping
from methods.curvature.dense import Dense
from methods.curvature.eigenbasis import Eigenbases
from methods.curvature.ekfac import EKFAC
from methods.curvature.identity import Identity
from methods.gradients import per_example as per_example_module
from methods.gradients.blocks import blocks_of
from methods.gradients.per_example import flat, gradients, plain
from methods.gradients.source import Source
from methods.influence import Influence
from tasks.base import Examples, Task
from tasks.errors import UserError
from tasks.objectives.classification import Classification

DELTA = 0.03
ABSOLUTE = Damping("absolute", DELTA - GAMMA, "block")


def fitted(problem: Problem, fisher: str = "fisher", modules: Sequence[str] | None = None) -> Eigenbases:
    model = problem.model()
    return EKFAC(fisher).fit(problem, Source(problem.task, model, tuple(blocks_of(model, modules))))


def dense(found: Eigenbases) -> Named:
    """H of each block, from (H + I)⁻¹; that no block meets another is checked on the way."""
    whole = inverse(found, found.blocks, Damping("absolute", 1.0, "block"), 0.0)
    matrices, start = {}, 0
    for block in found.blocks:
        own = slice(start, start + block.size)
        matrices[block.name] = torch.linalg.inv(whole[own, own]) - torch.eye(block.size)
        whole[own, own] = 0
        start += block.size
    assert (whole == 0).all()
    return matrices


@pytest.mark.parametrize("fisher", ["fisher", "empirical"])
@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_formulas_written_out(name: str, fisher: str) -> None:
    task = CASES[name]()
    queries = task.splits["query"]
    matrices = ekfac(problem_of(task), fisher)
    expected = block_scores(problem_of(task), queries, matrices, dict.fromkeys(matrices, DELTA))
    found = Influence(EKFAC(fisher), ABSOLUTE).attribute(problem_of(task), queries)
    assert close(found, expected)
    wrong = ekfac(problem_of(task), fisher, transposed=True)
    assert far(block_scores(problem_of(task), queries, wrong, dict.fromkeys(wrong, DELTA)), expected)
    assert far(Influence(Identity(), ABSOLUTE).attribute(problem_of(task), queries), expected)


@pytest.mark.parametrize("name", ["three_classes", "bert", "shared"])
def test_blocks_equal_the_formulas_written_out(name: str) -> None:
    """Block by block: no large block hides a small one."""
    problem = problem_of(CASES[name]())
    expected, found = ekfac(problem, "fisher"), dense(fitted(problem))
    wrong = ekfac(problem, "fisher", transposed=True)
    assert found.keys() == expected.keys()
    scale = max(h.abs().max().item() for h in expected.values())
    differ = 0
    for block, h in expected.items():
        assert (found[block] - h).abs().max().item() <= 1e-10 * max(scale, 1.0), block
        differ += int(h.abs().max() > 1e-6 and error(wrong[block], h) > 0.1)
    assert differ >= 2


def test_it_is_close_to_the_exact_matrix_and_the_identity_is_not() -> None:
    """Many examples, one layer: EK-FAC scores correlate with exact ones, a transposed rotation or H = I do so less."""
    train, query = vectors("train", 200, 6, 4, 1), vectors("query", 20, 6, 4, 2)
    # Correlated features of different scales: without them every method agrees.
    scales = torch.tensor([2.0, 1.5, 1.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(6, 6, generator=draw(9), dtype=torch.float64))[0]
    train, query = (replace(e, inputs={"x": (e.inputs["x"] * scales) @ mixing}) for e in (train, query))
    task = task_of(train, query, partial(perceptron, 6, 4), Classification(4))
    problem = problem_of(task)
    exact = exact_scores(problem, query, GAMMA + 0.01)
    damping = Damping("absolute", 0.01, "block")
    wrong = ekfac(problem, "fisher", transposed=True)
    scores = {
        "ekfac": Influence(EKFAC("fisher"), damping).attribute(problem, query),
        "transposed": block_scores(problem, query, wrong, dict.fromkeys(wrong, GAMMA + 0.01)),
        "identity": Influence(Identity(), damping).attribute(problem, query),
    }
    correlation = {
        k: torch.corrcoef(torch.stack([v.flatten(), exact.flatten()]))[0, 1].item() for k, v in scores.items()
    }
    assert correlation["ekfac"] > 0.94
    assert correlation["ekfac"] > correlation["transposed"] + 0.1
    assert correlation["ekfac"] > correlation["identity"] + 0.1


@pytest.mark.parametrize("fisher", ["fisher", "empirical"])
@pytest.mark.parametrize("name", ["three_classes", "bert", "shared", "identical"])
def test_eigenvalues_sum_to_the_mean_squared_gradient(name: str, fisher: str) -> None:
    problem = problem_of(CASES[name]())
    model = explained(problem)
    drawn = replace(problem.train, targets=labels(problem, fisher, "eigenvalues"))
    g = blocked(model, per_example(model, drawn, problem.task.objective.loss))
    found = fitted(problem, fisher)
    largest = max(v.sum().item() for v in found.eigenvalues.values())
    for block, values in found.eigenvalues.items():
        assert (values >= 0).all()
        expected = g[block].flatten(1).square().sum(1).mean().item()
        assert values.sum().item() == pytest.approx(expected, rel=1e-10, abs=1e-20 * largest)


@pytest.mark.parametrize("name", ["three_classes", "bert", "shared"])
def test_coordinates_are_orthonormal(name: str) -> None:
    found = fitted(problem_of(CASES[name]()))
    rotated = flat(found.coordinates(unit_vectors(found.blocks)))
    assert close(rotated @ rotated.T, torch.eye(len(rotated), dtype=torch.float64))
    assert far(rotated, torch.eye(len(rotated), dtype=torch.float64))


def uniform(classes: int, rows: int, features: int = 1, values: Tensor | None = None) -> Task:
    """All logits zero; inputs zero unless given, so that only the bias column has gradients."""
    x = torch.zeros(rows, features, dtype=torch.float64) if values is None else values
    train = Examples(tuple(str(i) for i in range(rows)), {"x": x}, torch.arange(rows) % classes)
    return task_of(train, train, partial(perceptron, features, classes, True), Classification(classes))


def test_one_example_with_one_position_is_exact() -> None:
    """Empirical Fisher, uniform logits over two classes: EK-FAC = GGN = g gᵀ."""
    task = uniform(2, 1, 3, torch.tensor([[0.5, -2.0, 1.0]], dtype=torch.float64))
    problem = problem_of(task)
    model = explained(problem)
    (h,) = dense(fitted(problem, "empirical")).values()
    (g,) = blocked(model, per_example(model, task.train, task.objective.loss)).values()
    assert close(h, torch.outer(g.flatten(), g.flatten()))
    assert close(ekfac(problem, "empirical")["layers.linear0"], h)
    # Module order and parameter order differ by where the bias is; scores do not.
    queries = replace(task.train, ids=("query",), inputs={"x": torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)})
    exact = exact_scores(problem, queries, DELTA)
    for curvature in (EKFAC("empirical"), Dense("ggn", "global", 1.0)):
        assert close(Influence(curvature, ABSOLUTE).attribute(problem_of(task), queries), exact)


@pytest.mark.parametrize(("classes", "trace"), [(2, 1 / 2), (3, 2 / 3)])
def test_sampled_fisher_at_uniform_logits(classes: int, trace: float) -> None:
    """At the logits: trace (C − 1)/C in every draw, and diag p − p pᵀ on average, labels set aside."""
    task = uniform(classes, 3000)
    task = replace(task, splits={**task.splits, "train": replace(task.train, targets=torch.zeros(3000).long())})
    found = fitted(problem_of(task))
    assert sum(v.sum().item() for v in found.eigenvalues.values()) == pytest.approx(trace, rel=1e-12)
    bias = torch.arange(classes) * 2 + 1  # vec(G) (C, 2), bias last
    h = dense(found)["layers.linear0"][bias][:, bias]
    p = torch.full((classes,), 1 / classes, dtype=torch.float64)
    expected = p.diag() - torch.outer(p, p)
    assert (h - expected).abs().max() < 0.03
    # The training labels, all of one class, give another matrix (of the same rank one, whatever C).
    empirical = dense(fitted(problem_of(task), "empirical"))["layers.linear0"][bias][:, bias]
    if classes > 2:
        assert (empirical - expected).abs().max() > 0.1
    assert torch.linalg.matrix_rank(empirical, tol=1e-8).item() == 1


def test_sampled_fisher_approaches_the_exact_matrix() -> None:
    """At logits that are not uniform; the Fisher of the training labels does not."""
    x = torch.tensor([[1.0, -0.5]], dtype=torch.float64).expand(4000, 2).contiguous()
    train = Examples(tuple(str(i) for i in range(4000)), {"x": x}, torch.zeros(4000).long())
    task = replace(vector_task([2, 3]), splits={"train": train, "query": train})
    problem = problem_of(task)
    model = explained(problem)
    exact = ggn(model, train.select([0])).trace().item()
    true = sum(v.sum().item() for v in fitted(problem).eigenvalues.values())
    empirical = sum(v.sum().item() for v in fitted(problem, "empirical").eigenvalues.values())
    assert true == pytest.approx(exact, rel=0.05)
    assert abs(empirical - exact) > 0.2 * exact


def test_factors_and_eigenvalues_have_draws_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    task = vector_task([3, 3], rows=50)
    problem = problem_of(task)
    drawn: list[Tensor] = []
    original = Classification.sample

    def noting(self: Classification, outputs: Tensor, uniforms: Tensor) -> Tensor:
        drawn.append(original(self, outputs, uniforms))
        return drawn[-1]

    monkeypatch.setattr(Classification, "sample", noting)
    found = fitted(problem)
    assert sum(map(len, drawn)) == 2 * 50
    first, second = torch.cat(drawn).split(50)  # rows without lengths keep their order
    assert not torch.equal(first, second)
    monkeypatch.undo()
    assert torch.equal(first, labels(problem, "fisher", "factors"))
    assert torch.equal(second, labels(problem, "fisher", "eigenvalues"))
    (h,), (once,) = dense(found).values(), ekfac(problem, "fisher", ("factors", "factors")).values()
    assert far(h, once)
    assert close(h, ekfac(problem, "fisher")["layers.0"])


@pytest.mark.parametrize("case", [three_classes, bert])
def test_sampled_labels_do_not_depend_on_batches(case: object, monkeypatch: pytest.MonkeyPatch) -> None:
    task = case()  # type: ignore[operator]
    expected = fitted(problem_of(task))
    monkeypatch.setattr("methods.gradients.per_example.BATCH", 5)
    monkeypatch.setattr("methods.gradients.per_example.FEWEST", 1)
    found = fitted(problem_of(task))
    for name, values in expected.eigenvalues.items():
        assert close(found.eigenvalues[name], values), name


def test_draws_are_seeded_by_the_run() -> None:
    task = vector_task([3, 3], rows=50)
    first, again, other = (fitted(problem_of(task, seed)) for seed in (0, 0, 1))
    for name, values in first.eigenvalues.items():
        assert torch.equal(values, again.eigenvalues[name])
        assert far(values, other.eigenvalues[name])


def test_training_labels_enter_the_empirical_fisher_only() -> None:
    task = vector_task([3, 3], rows=20)
    flipped = replace(task, splits={**task.splits, "train": replace(task.train, targets=(task.train.targets + 1) % 3)})
    for fisher, same in (("fisher", True), ("empirical", False)):
        left, right = (fitted(problem_of(t), fisher).eigenvalues["layers.0"] for t in (task, flipped))
        assert torch.equal(left, right) is same


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["bert", "shared"])
def test_statistics_do_not_depend_on_the_batch_size(
    name: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = CASES[name]()
    expected = dense(fitted(problem_of(task), "empirical"))
    small = partial(per_example_module.gradients, batch_size=batch_size)
    monkeypatch.setattr("methods.gradients.source.gradients", small)
    found = dense(fitted(problem_of(task), "empirical"))
    scale = max(h.abs().max().item() for h in expected.values())
    for block, h in expected.items():
        assert (found[block] - h).abs().max().item() <= 1e-10 * scale, block


def test_statistics_do_not_depend_on_order_or_on_what_is_under_the_padding() -> None:
    task = bert()
    ids, mask = task.train.inputs["input_ids"], task.train.inputs["attention_mask"]
    noise = torch.randint(1, 9, ids.shape, generator=draw(7))
    filled = replace(task.train, inputs={"input_ids": torch.where(mask > 0, ids, noise), "attention_mask": mask})
    order = torch.randperm(len(task.train), generator=draw(3))
    expected = dense(fitted(problem_of(task), "empirical"))
    scale = max(h.abs().max().item() for h in expected.values())
    for train in (filled, task.train.select(order), filled.select(order)):
        found = dense(fitted(problem_of(replace(task, splits={**task.splits, "train": train})), "empirical"))
        for block, h in expected.items():
            assert (found[block] - h).abs().max().item() <= 1e-10 * scale, block


def test_padding_is_no_position_of_the_input_covariance() -> None:
    """What counting it would give is another matrix."""
    problem = problem_of(bert())
    expected, wrong = ekfac(problem, "fisher"), ekfac(problem, "fisher", padded=True)
    value = "encoder.encoder.layer.0.attention.self.value"
    assert far(wrong[value], expected[value])
    assert close(dense(fitted(problem))[value], expected[value])


def test_norm_blocks_are_dense() -> None:
    """A LayerNorm's empirical Fisher is exact: mean of g gᵀ over examples, no Kronecker factors."""
    task = bert()
    problem = problem_of(task)
    model = explained(problem)
    expected = blocked(model, per_example(model, task.train, task.objective.loss))
    found = dense(fitted(problem, "empirical", ["*LayerNorm"]))
    assert len(found) == 3
    for block, h in found.items():
        g = expected[block].flatten(1)
        assert close(h, g.T @ g / len(g))
        assert far(h.diag().diag(), h)


@pytest.mark.parametrize("name", ["three_classes", "bert", "shared"])
def test_products_in_coordinates_are_products_with_the_inverse(name: str) -> None:
    """⟨coordinates(g), precondition(coordinates(v))⟩ = gᵀ (H + δI)⁻¹ v for real gradients, block by block."""
    task = CASES[name]()
    problem = problem_of(task)
    model, found = problem.model(), fitted(problem)
    for damping in (ABSOLUTE, Damping("mean_eigenvalue", 0.1, "block"), Damping("trace", 0.1, "global")):
        whole = inverse(found, found.blocks, damping, GAMMA)
        sizes, compared = [b.size for b in found.blocks], 0
        starts = dict(zip((b.name for b in found.blocks), torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
        for _, g in gradients(task, model, task.train, found.blocks, task.objective.loss):
            rotated = found.coordinates(g)
            inside = found.precondition(rotated, damping, GAMMA)
            for plain_one, left, right in zip(plain(g), rotated, inside, strict=True):
                block = plain_one.block
                assert left.block is right.block is block
                own = slice(starts[block.name], starts[block.name] + block.size)
                v = plain_one.dense().flatten(1)
                expected = v @ whole[own, own] @ v.T
                assert close(left.dense().flatten(1) @ right.dense().flatten(1).T, expected)
                assert far(v @ v.T, expected)
                compared += 1
        assert compared == len(found.blocks)


def test_solving_changes_nothing_and_a_sweep_equals_fresh_fits() -> None:
    task = bert()
    found = fitted(problem_of(task))
    rhs = found.coordinates(unit_vectors(found.blocks))
    before = [g.values.clone() for g in rhs]
    values = {n: v.clone() for n, v in found.eigenvalues.items()}
    dampings = [Damping("absolute", v, "block") for v in (1e-3, 10.0, 1e-3)]
    swept = [flat(found.precondition(rhs, d, GAMMA)) for d in dampings]
    assert all(torch.equal(g.values, was) for g, was in zip(rhs, before, strict=True))
    assert all(torch.equal(v, found.eigenvalues[n]) for n, v in values.items())
    assert torch.equal(swept[0], swept[2]) and far(swept[0], swept[1])
    fresh = fitted(problem_of(task))
    again = flat(fresh.precondition(fresh.coordinates(unit_vectors(fresh.blocks)), dampings[1], GAMMA))
    assert close(swept[1], again, 1e-14)


@pytest.mark.parametrize("scope", ["block", "global"])
@pytest.mark.parametrize("rule", ["absolute", "mean_eigenvalue", "trace"])
def test_every_block_has_the_damping_that_it_is_due(rule: str, scope: str) -> None:
    task = three_classes()
    problem, queries = problem_of(task), task.splits["query"]
    matrices = ekfac(problem, "fisher")
    traces = {n: h.trace().item() for n, h in matrices.items()}
    sizes = {n: len(h) for n, h in matrices.items()}
    if scope == "global":
        traces, sizes = dict.fromkeys(traces, sum(traces.values())), dict.fromkeys(sizes, sum(sizes.values()))
    strength = {
        "absolute": lambda n: 0.2,
        "mean_eigenvalue": lambda n: 0.2 * traces[n] / sizes[n],
        "trace": lambda n: 0.2 * traces[n],
    }[rule]
    deltas = {n: GAMMA + strength(n) for n in matrices}
    found = Influence(EKFAC("fisher"), Damping(rule, 0.2, scope)).attribute(problem, queries)
    assert close(found, block_scores(problem, queries, matrices, deltas))
    if scope == "block" and rule != "absolute":
        first = dict.fromkeys(deltas, deltas["layers.0"])  # the first block's damping for all
        assert error(found, block_scores(problem, queries, matrices, first)) > 1e-3


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 10),
    features=st.integers(1, 4),
    hidden=st.integers(0, 3),
    classes=st.integers(2, 4),
    seed=st.integers(0, 99),
    fisher=st.sampled_from(["fisher", "empirical"]),
)
def test_any_small_problem(rows: int, features: int, hidden: int, classes: int, seed: int, fisher: str) -> None:
    """Trace, symmetry and definiteness hold whatever the sizes."""
    task = vector_task([features, hidden, classes] if hidden else [features, classes], rows=rows, seed=seed)
    problem = problem_of(task, seed)
    model = explained(problem)
    drawn = replace(task.train, targets=labels(problem, fisher, "eigenvalues"))
    g = blocked(model, per_example(model, drawn, task.objective.loss))
    for block, h in dense(fitted(problem, fisher)).items():
        # Inverting back from (H + I)⁻¹ costs digits where H is large.
        scale = max(1.0, h.abs().max().item())
        assert (h - h.T).abs().max() <= 1e-10 * scale
        assert torch.linalg.eigvalsh(h).min() >= -1e-10 * scale
        expected = g[block].flatten(1).square().sum(1).mean().item()
        assert h.trace().item() == pytest.approx(expected, rel=1e-9, abs=1e-9 * scale)


def test_a_singular_block_is_refused() -> None:
    """γ = λ = 0: softmax is blind to a shift of all logits, so some eigenvalues are zero but for rounding."""
    task = three_classes()
    task = replace(task, recipe=replace(task.recipe, weight_decay=0.0))
    with pytest.raises(UserError, match=r"method\.damping\.value.*layers\.1"):
        Influence(EKFAC("fisher"), Damping("absolute", 0.0, "block")).attribute(problem_of(task), task.splits["query"])


def test_an_unknown_fisher_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.curvature\.matrix=sampled.*ggn, fisher, empirical"):
        EKFAC("sampled")


def test_gradients_are_charged() -> None:
    problem = problem_of(three_classes())
    fitted(problem)
    assert problem.meter.gradients == 2 * len(problem.train)
