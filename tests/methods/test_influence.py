"""Influence: sign, scale and units against closed forms and real retraining; nothing but the data changes a score."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from cases import (
    CASES,
    GAMMA,
    bert,
    close,
    draw,
    error,
    exact_scores,
    explained,
    far,
    ggn,
    per_example,
    perceptron,
    problem_of,
    stacked,
    task_of,
    three_classes,
    vector_task,
    vectors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.base import Fits, Problem, Unsupported
from methods.compression.sjlt import SJLT
from methods.curvature.base import Curvature
from methods.curvature.damping import Damping
from methods.curvature.dense import Dense
from methods.curvature.ekfac import EKFAC
from methods.curvature.identity import Identity
from methods.gradients import per_example as per_example_module
from methods.gradients.blocks import blocks_of, with_rows_in_use
from methods.gradients.source import Source
from methods.influence import Influence
from tasks.base import Examples, Task
from tasks.errors import UserError
from tasks.objectives.classification import Classification
from tasks.training.train import train

CURVATURES: dict[str, Curvature] = {
    "exact": Dense("ggn", "global", 1.0),
    "ekfac": EKFAC("empirical"),  # its labels are not drawn, so that order and batches may change
    "identity": Identity(),
}
ABSOLUTE = Damping("absolute", 0.02, "block")


def influence(name: str, damping: Damping = ABSOLUTE, **settings: object) -> Influence:
    return Influence(CURVATURES[name], damping, **settings)  # type: ignore[arg-type]


def trained(task: Task) -> Problem:
    return Problem(task, 0, lambda k: train(task, k))


# Sign and scale


@dataclass(frozen=True)
class Squares:
    """ℓ = ½(z − y)², m = −ℓ; ∂²ℓ/∂z² = 1."""

    name: str = "squares"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs[:, 0] - targets).square()

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self.loss(outputs, targets)

    def hessian_root(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs)[:, :, None]

    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        return outputs[:, 0] + torch.special.ndtri(uniforms)

    def fitness(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"mse": (outputs[:, 0] - targets).square().mean().item()}


def average(targets: Tensor) -> nn.Module:
    """One parameter at its optimum, the mean of the targets."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, targets.mean().item())
    return nn.Sequential(layer)


def test_the_mean_of_numbers_has_a_closed_form() -> None:
    """θ = mean y. Without i: θ + (θ − yᵢ)/(N − 1). What stands in the way of exactness is the jump, not the sign."""
    y = torch.randn(400, generator=draw(0), dtype=torch.float64)
    ones = torch.ones(400, 1, dtype=torch.float64)
    rows = Examples(tuple(str(i) for i in range(400)), {"input": ones}, y)
    asked = torch.tensor([5.0, -5.0, 8.0], dtype=torch.float64)
    queries = Examples(("above", "below", "far"), {"input": ones[:3]}, asked)
    task = task_of(rows, queries, partial(average, y), Squares(), weight_decay=0.0)
    scores = Influence(Dense("ggn", "global", 1.0), Damping("absolute", 1e-9, "global")).attribute(
        problem_of(task), queries
    )
    theta = y.mean()
    moved = theta + (theta - y) / 399
    truth = -0.5 * (theta - asked[:, None]).square() + 0.5 * (moved - asked[:, None]).square()
    assert (scores - truth).abs().max() <= 0.01 * truth.abs().max()
    # To first order in 1/N the score is the derivative by the example's weight, which is exact.
    assert close(scores, (theta - asked[:, None]) * (theta - y) / 400, 1e-8)
    helps = y > theta  # pulls the mean towards the query above
    assert (scores[0][helps] > 0).all() and (scores[0][~helps] < 0).all()
    assert (scores[1][helps] < 0).all() and (scores[1][~helps] > 0).all()


def convex() -> Task:
    data, query = vectors("train", 30, 3, 3, 1), vectors("query", 6, 3, 3, 2)
    build = partial(perceptron, 3, 3)
    return task_of(data, query, build, Classification(3), optimizer="lbfgs", weight_decay=0.02, checkpoints=1)


def test_scores_are_what_retraining_with_less_weight_gives() -> None:
    """(m(1) − m(1 − ε)) / ε, both solved to their optimum; the GGN of softmax regression is its Hessian."""
    task, epsilon = convex(), 1e-3
    problem, queries = trained(task), task.splits["query"]
    # Damping must be above 0 to say that the system can be solved: 1e-8 changes nothing at 1 %.
    scores = Influence(Dense("ggn", "global", 1.0), Damping("absolute", 1e-8, "global")).attribute(problem, queries)

    def measured(weights: Tensor) -> Tensor:
        model = problem.model(train(task, 0, weights).final)
        return task.measure(model, queries.batch()).detach()

    whole, truth = measured(torch.ones(30, dtype=torch.float64)), torch.empty_like(scores)
    for i in range(0, 30, 5):
        weights = torch.ones(30, dtype=torch.float64)
        weights[i] -= epsilon
        truth[:, i] = (whole - measured(weights)) / epsilon
    chosen = list(range(0, 30, 5))
    assert close(scores[:, chosen], truth[:, chosen], 0.01)
    # The same without 1/N, with the wrong sign, without γ or without curvature is far off.
    assert far(-scores[:, chosen], truth[:, chosen])
    plain = influence("identity").attribute(problem, queries)[:, chosen]
    assert far(plain * (plain * truth[:, chosen]).sum() / plain.square().sum(), truth[:, chosen])
    forgotten = replace(task, recipe=replace(task.recipe, optimizer="sgd", weight_decay=0.0))
    without = Problem(forgotten, 0, lambda k: problem.trajectory())
    other = Influence(Dense("ggn", "global", 1.0), Damping("absolute", 1e-8, "global")).attribute(without, queries)
    assert far(other[:, chosen], truth[:, chosen])


def test_leaving_one_out_is_ranked_right() -> None:
    """Removal itself, not its derivative, in the units of the measurement."""
    task = convex()
    problem, queries = trained(task), task.splits["query"]
    scores = Influence(Dense("ggn", "global", 1.0), Damping("absolute", 1e-8, "global")).attribute(problem, queries)
    whole = task.measure(problem.model(), queries.batch())
    chosen, truth = [0, 7, 14, 21, 28], []
    for i in chosen:
        weights = torch.ones(30, dtype=torch.float64)
        weights[i] = 0
        # The denominator stays: 1/N is the weight that the example had.
        truth.append(whole - task.measure(problem.model(train(task, 0, weights).final), queries.batch()))
    expected = torch.stack(truth, 1).detach()
    found = scores[:, chosen]
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.97
    slope = (found * expected).sum() / found.square().sum()
    assert 0.7 < slope < 1.4


# Value and similarity


@dataclass(frozen=True)
class LossMeasured(Classification):
    """Measures `sign` · loss."""

    sign: float = -1.0

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.sign * self.loss(outputs, targets)


@pytest.mark.parametrize("name", [*CURVATURES, "true"])
@pytest.mark.parametrize("case", ["three_classes", "bert", "shared", "single"])
def test_value_is_the_diagonal(case: str, name: str) -> None:
    """For m = −ℓ the matrix's diagonal is (1/N) gᵀ A⁻¹ g, and the value its negative."""
    task = CASES[case]()
    curvature = EKFAC("fisher") if name == "true" else CURVATURES[name]
    method = Influence(curvature, Damping("mean_eigenvalue", 0.1, "block"))
    task = replace(task, objective=LossMeasured(task.objective.classes))  # type: ignore[attr-defined]
    value = method.value(problem_of(task))
    assert close(value, -method.attribute(problem_of(task), task.train).diagonal())
    assert (value < 0).all()
    problem = problem_of(task)
    assert close(method.value(problem), -method.attribute(problem, task.train).diagonal())  # in either order


def test_value_written_out() -> None:
    task = three_classes()
    problem = problem_of(task)
    model = explained(problem)
    g = stacked(per_example(model, task.train, task.objective.loss))
    a = ggn(model, task.train) + (GAMMA + 0.02) * torch.eye(35, dtype=torch.float64)
    expected = -(g * torch.linalg.solve(a, g.T).T).sum(1) / len(task.train)
    assert close(influence("exact").value(problem), expected)
    assert far(-g.square().sum(1) / len(task.train), expected)


@pytest.mark.parametrize("case", ["three_classes", "bert", "shared"])
def test_cosine_written_out(case: str) -> None:
    """Norms over all parameters, also of rows that only queries look up."""
    task = CASES[case]()
    problem, queries = problem_of(task), task.splits["query"]
    model = explained(problem)
    m = stacked(per_example(model, queries, task.objective.measure))
    g = stacked(per_example(model, task.train, task.objective.loss))
    found = influence("identity", similarity="cosine").attribute(problem, queries)
    expected = -(m @ g.T) / (m.norm(dim=1)[:, None] * g.norm(dim=1))
    assert close(found, expected)
    assert found.abs().max() <= 1 + 1e-12
    assert far(influence("identity").attribute(problem, queries), expected)


@pytest.mark.parametrize("similarity", ["cosine", "relatif", "theta_relatif"])
@pytest.mark.parametrize("case", ["three_classes", "without_bias"])
def test_similarities_in_the_metric_of_the_curvature(case: str, similarity: str) -> None:
    task = CASES[case]()
    problem, queries = problem_of(task), task.splits["query"]
    model = explained(problem)
    m = stacked(per_example(model, queries, task.objective.measure))
    g = stacked(per_example(model, task.train, task.objective.loss))
    k = torch.linalg.inv(ggn(model, task.train) + (GAMMA + 0.02) * torch.eye(g.shape[1], dtype=torch.float64))
    dot, n = -m @ k @ g.T, len(task.train)
    own = ((g @ k) * g).sum(1).sqrt()  # ‖g‖_K
    expected, value = {
        "cosine": (dot / (((m @ k) * m).sum(1).sqrt()[:, None] * own), None),
        "relatif": (dot / own / n, -own / n),
        "theta_relatif": (dot / (g @ k).norm(dim=1) / n, -own.square() / (g @ k).norm(dim=1) / n),
    }[similarity]
    method = influence("exact", similarity=similarity)
    assert not method.calibrated
    found = method.attribute(problem, queries)
    assert close(found, expected)
    assert far(influence("exact").attribute(problem, queries), expected)
    assert far(influence("identity", similarity=similarity).attribute(problem, queries), expected)
    if value is not None:
        assert close(method.value(problem), value)


def test_cosine_of_an_example_with_itself_is_one() -> None:
    task = replace(three_classes(), objective=LossMeasured(3))
    found = influence("identity", similarity="cosine").attribute(problem_of(task), task.train)
    assert close(found.diagonal(), torch.ones(12, dtype=torch.float64))
    with pytest.raises(Unsupported, match="cosine"):
        influence("identity", similarity="cosine").value(problem_of(task))


# What must not matter


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_chunks_of_queries_do_not_matter(name: str, similarity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if similarity == "cosine" and name != "identity":
        return
    task = bert()
    queries = task.splits["query"]
    expected = influence(name, similarity=similarity).attribute(problem_of(task), queries)
    monkeypatch.setattr("methods.influence.GRADIENT_BYTES", 1)  # one query at a time
    assert close(influence(name, similarity=similarity).attribute(problem_of(task), queries), expected)
    monkeypatch.setattr("methods.influence.GRADIENT_BYTES", 3 * 256 * 8)  # three, the last chunk is smaller
    assert close(influence(name, similarity=similarity).attribute(problem_of(task), queries), expected)


@pytest.mark.parametrize("name", CURVATURES)
def test_other_queries_do_not_matter(name: str) -> None:
    task = bert()
    queries = task.splits["query"]
    whole = influence(name).attribute(problem_of(task), queries)
    alone = torch.cat([influence(name).attribute(problem_of(task), queries.select([q])) for q in range(4)])
    assert close(alone, whole)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("case", ["bert", "shared"])
def test_batch_size_does_not_matter(case: str, name: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    task = CASES[case]()
    queries = task.splits["query"]
    method = influence(name, Damping("mean_eigenvalue", 0.1, "block"))
    expected, values = method.attribute(problem_of(task), queries), method.value(problem_of(task))
    small: Callable = partial(per_example_module.gradients, batch_size=batch_size)
    monkeypatch.setattr("methods.gradients.source.gradients", small)
    small = partial(per_example_module.output_gradients, batch_size=batch_size)
    monkeypatch.setattr("methods.gradients.source.output_gradients", small)
    assert close(method.attribute(problem_of(task), queries), expected)
    assert close(method.value(problem_of(task)), values)


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("case", ["three_classes", "bert", "shared"])
def test_order_does_not_matter(case: str, name: str) -> None:
    task = CASES[case]()
    order = torch.randperm(len(task.train), generator=draw(1))
    asked = torch.randperm(len(task.splits["query"]), generator=draw(2))
    method = influence(name, Damping("mean_eigenvalue", 0.1, "block"))
    expected = method.attribute(problem_of(task), task.splits["query"])
    shuffled = replace(task, splits={**task.splits, "train": task.train.select(order)})
    found = method.attribute(problem_of(shuffled), task.splits["query"].select(asked))
    assert close(found, expected[asked][:, order])
    assert far(found, expected)
    values = method.value(problem_of(task))
    assert close(method.value(problem_of(shuffled)), values[order])


def refilled(examples: Examples) -> Examples:
    """Padding filled with random ids, among them one that occurs nowhere else; the mask stays."""
    ids, mask = examples.inputs["input_ids"], examples.inputs["attention_mask"]
    noise = torch.randint(1, 12, ids.shape, generator=draw(77))
    return replace(examples, inputs={"input_ids": torch.where(mask > 0, ids, noise), "attention_mask": mask})


@pytest.mark.parametrize("rule", ["absolute", "mean_eigenvalue", "trace"])
@pytest.mark.parametrize("name", CURVATURES)
def test_what_stands_under_the_padding_does_not_matter(name: str, rule: str) -> None:
    task = bert()
    method = influence(name, Damping(rule, 0.1, "block"))
    expected = method.attribute(problem_of(task), task.splits["query"])
    other = replace(task, splits={split: refilled(rows) for split, rows in task.splits.items()})
    assert close(method.attribute(problem_of(other), other.splits["query"]), expected)
    assert close(method.value(problem_of(other)), method.value(problem_of(task)))


@pytest.mark.parametrize("name", CURVATURES)
def test_rows_cut_from_embeddings_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a query looks up rows that no training example does."""
    task = bert()
    expected = influence(name).attribute(problem_of(task), task.splits["query"])
    values = influence(name).value(problem_of(task))
    monkeypatch.setattr("methods.influence.with_rows_in_use", lambda task, model, blocks, data: blocks)
    assert close(influence(name).attribute(problem_of(task), task.splits["query"]), expected)
    assert close(influence(name).value(problem_of(task)), values)


@pytest.mark.parametrize("name", CURVATURES)
def test_one_problem_serves_several_questions(name: str) -> None:
    """Nothing that is kept for one question leaks into another: queries, dampings, modules, similarity."""
    task = bert()
    problem = problem_of(task)
    questions = [
        (influence(name), task.splits["query"]),
        (influence(name), task.train),
        (influence(name, Damping("trace", 0.5, "global")), task.splits["query"].select([1])),
        (influence(name, modules=("head",)), task.splits["query"]),
        (influence("identity", similarity="cosine"), task.splits["query"]),
        (influence("identity", similarity="cosine"), task.splits["query"].select([2, 0])),
        (influence(name), task.splits["query"]),
    ]
    for method, queries in questions:
        assert close(method.attribute(problem, queries), method.attribute(problem_of(task), queries), 1e-14)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 9), asked=st.integers(1, 6), seed=st.integers(0, 99), chunk=st.integers(1, 4000))
def test_any_sizes(rows: int, asked: int, seed: int, chunk: int) -> None:
    task = vector_task([3, 3, 2], rows=rows, queries=asked, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("methods.influence.GRADIENT_BYTES", chunk)
        found = influence("exact").attribute(problem_of(task), task.splits["query"])
    assert found.shape == (asked, rows) and found.dtype == torch.float64
    assert close(found, exact_scores(problem_of(task), task.splits["query"], GAMMA + 0.02))


# Modules and settings


def test_modules_restrict_the_gradients() -> None:
    task = three_classes()
    problem, queries = problem_of(task), task.splits["query"]
    model = explained(problem)
    names = [n for n, _ in model.named_parameters()]
    keep = torch.cat([torch.full((p.numel(),), n.startswith("layers.1")) for n, p in model.named_parameters()])
    assert len(names) == 4 and 0 < keep.sum() < len(keep)
    m = stacked(per_example(model, queries, task.objective.measure))[:, keep]
    g = stacked(per_example(model, task.train, task.objective.loss))[:, keep]
    a = ggn(model, task.train)[keep][:, keep] + (GAMMA + 0.02) * torch.eye(15, dtype=torch.float64)
    expected = -m @ torch.linalg.solve(a, g.T) / 12
    assert close(influence("exact", modules=("layers.1",)).attribute(problem, queries), expected)
    assert far(influence("exact").attribute(problem, queries), expected)


def test_modules_given_as_a_string_are_one_pattern() -> None:
    task = bert()
    method = influence("exact", modules="*head")
    assert method.modules == ("*head",)
    assert influence("exact", modules=["*head"]).modules == ("*head",)  # as YAML gives it; it must be hashable
    expected = influence("exact", modules=("head",)).attribute(problem_of(task), task.splits["query"])
    assert close(method.attribute(problem_of(task), task.splits["query"]), expected)
    assert far(influence("exact").attribute(problem_of(task), task.splits["query"]), expected)
    with pytest.raises(UserError, match=r"method\.modules=nothing.*head"):
        influence("exact", modules="nothing").attribute(problem_of(task), task.splits["query"])


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"method\.similarity=angle.*dot, cosine, relatif"):
        influence("identity", similarity="angle")


def test_calibration_is_said() -> None:
    assert influence("exact").calibrated and influence("ekfac").calibrated
    assert not influence("identity").calibrated
    assert influence("exact").offers("attribute") and influence("exact").offers("value")


def test_gradients_are_charged() -> None:
    """Each training and each query gradient once, and the curvature's own: two columns of the root an example."""
    task = three_classes()
    problem = problem_of(task)
    influence("identity").attribute(problem, task.splits["query"])
    assert problem.meter.gradients == 5 + 12
    influence("exact").value(problem)
    assert problem.meter.gradients == 5 + 12 + 2 * 12 + 12
    assert problem.meter.trainings == 1


@pytest.mark.parametrize("case", ["three_classes", "bert", "shared"])
def test_low_rank_queries_are_their_largest_singular_values(case: str) -> None:
    task = CASES[case]()
    queries = task.splits["query"]
    exact = influence("exact")
    full = exact.attribute(problem_of(task), queries)
    assert close(replace(exact, query_rank=100).attribute(problem_of(task), queries), full)
    errors = []
    for rank in (1, 2):
        found = replace(exact, query_rank=rank).attribute(problem_of(task), queries)
        problem = problem_of(task)
        model = problem.model().double()
        source = Source(task, model, tuple(with_rows_in_use(task, model, blocks_of(model), [problem.train])))
        solved = exact.curvature.fit(problem, source).solve(
            source.collected(queries, task.objective.measure), exact.damping, GAMMA
        )
        expected = torch.zeros_like(full)
        for index, factors in source.gradients(problem.train, task.objective.loss):
            for g, f in zip(solved, factors, strict=True):
                u, s, w = torch.linalg.svd(g.values, full_matrices=False)
                cut = (u[..., :rank] * s[:, None, :rank]) @ w[:, :rank] if f.block.kind == "linear" else g.values
                expected[:, index] -= torch.einsum("qoi,boi->qb", cut, f.gradient().dense()) / len(problem.train)
        assert close(found, expected)
        errors.append(error(found, full))
    assert errors[0] > errors[1] > 1e-6 or case != "bert"


@pytest.mark.parametrize("case", ["three_classes", "bert"])
@pytest.mark.parametrize("name", CURVATURES)
def test_bf16_is_near_float32_and_not_the_same(case: str, name: str) -> None:
    task = CASES[case]()
    queries = task.splits["query"]
    full = influence(name).attribute(problem_of(task), queries)
    rounded = replace(influence(name), precision="bf16").attribute(problem_of(task), queries)
    assert 0 < error(rounded, full) < 0.05
    together = torch.stack([rounded.flatten(), full.flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.999


def test_one_fit_serves_the_runs_of_a_sweep_and_is_charged_to_each(monkeypatch: pytest.MonkeyPatch) -> None:
    task, fits, original = three_classes(), [], EKFAC.fit

    def counting(self: EKFAC, *arguments: object) -> object:
        fits.append(self)
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(EKFAC, "fit", counting)
    queries, shared = task.splits["query"], Fits()
    methods = [Influence(EKFAC("empirical"), Damping("absolute", value, "block")) for value in (0.1, 1.0)]
    problems = [replace(problem_of(task), fits=shared.of("one model")) for _ in methods]
    scores = [m.attribute(p, queries) for m, p in zip(methods, problems, strict=True)]
    assert len(fits) == 1 and far(*scores)
    assert torch.equal(scores[1], methods[1].attribute(problem_of(task), queries))
    assert problems[0].meter.gradients == problems[1].meter.gradients > 0
    assert problems[1].meter.trainings == 1 and problems[1].meter.seconds_of_fits > 0
    other = replace(problem_of(task), fits=shared.of("another model"))
    methods[0].attribute(other, queries)
    assert len(fits) == 3 and other.meter.seconds_of_fits == 0


def test_impossible_precision_and_rank_are_refused() -> None:
    with pytest.raises(UserError, match=r"method\.precision=fp8.*float32, bf16"):
        replace(influence("ekfac"), precision="fp8")
    task = CASES["three_classes"]()
    with pytest.raises(UserError, match=r"method\.query_rank=2 has no effect.*no block.*matrix"):
        vague = replace(influence("ekfac"), query_rank=2, compression=SJLT(10))
        vague.attribute(problem_of(task), task.splits["query"])
    with pytest.raises(UserError, match=r"method\.query_rank=0.*1 or more"):
        replace(influence("ekfac"), query_rank=0)
