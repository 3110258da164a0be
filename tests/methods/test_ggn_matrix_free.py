"""methods/curvature/products: J (∂²ℓ) J V without columns, against the columns and against the dense matrix."""

from dataclasses import replace

import pytest
import torch
from cases import CASES, GAMMA, draw, exact_scores, explained, problem_of
from models import gpt
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from methods.base import Problem, Unsupported
from methods.compression.gaussian import Gaussian
from methods.curvature import products
from methods.curvature.base import Curvature
from methods.curvature.cg import ConjugateGradients
from methods.curvature.damping import Damping
from methods.curvature.dense import Dense
from methods.curvature.diagonal import Diagonal
from methods.curvature.ekfac import EKFAC
from methods.curvature.kfac import KFAC
from methods.curvature.operator import Operator
from methods.curvature.products import product_of
from methods.curvature.root import columns
from methods.gradients.blocks import blocks_of, from_parameters
from methods.gradients.per_example import flat, plain
from methods.gradients.source import Source
from methods.influence import Influence
from tasks.base import Task
from tasks.objectives.language_model import NO_TARGET, LanguageModel

ABSOLUTE = Damping("absolute", 0.05, "global")


def language() -> Task:
    """A GPT-2 of tied embeddings whose first token, or first two, are not scored."""
    task = gpt(vocabulary=7, prompt=2, silent=False)
    return replace(task, objective=LanguageModel(7))


def source_of(problem: Problem) -> Source:
    model = problem.model()
    return Source(problem.task, model, tuple(blocks_of(model)))


def vectors(source: Source, count: int) -> Tensor:
    return torch.randn(count, source.size, generator=draw(7), dtype=torch.float64)


def dense(problem: Problem, source: Source) -> tuple[Tensor, Tensor]:
    """(1/N) Σ_i Σ_t J_itᵀ (diag p − p pᵀ) J_it over scored t, (P, P), in the blocks' order, one example at a time; and
    the mean squared gradient at each label by its probability, the trace of the same."""
    model, total = explained(problem), torch.zeros(source.size, source.size, dtype=torch.float64)
    named = {name: p.detach() for name, p in model.named_parameters()}
    trace = torch.zeros((), dtype=torch.float64)
    for i in range(len(problem.train)):
        batch = problem.train.batch([i])

        def logits(theta: dict[str, Tensor], model: nn.Module = model, batch: object = batch) -> Tensor:
            return functional_call(model, theta, (), batch.inputs)[0]  # type: ignore[attr-defined]

        jacobian = jacrev(logits)(named)  # {name: (T, V, *shape)}
        rows = torch.cat([from_parameters(b, jacobian).flatten(2) for b in source.blocks], 2)  # (T, V, P)
        probabilities = logits(named).softmax(-1)
        for t, target in enumerate(batch.targets[0][: len(rows)].tolist()):
            if target == NO_TARGET:
                continue
            p = probabilities[t]
            total += rows[t].T @ (p.diag() - torch.outer(p, p)) @ rows[t]
            centred = rows[t] - p @ rows[t]
            trace += (p * centred.square().sum(1)).sum()
    return total / len(problem.train), trace / len(problem.train)


@pytest.mark.parametrize(("case", "few"), [("three_classes", 3), ("bert", 32), ("shared", 32), ("single", 32)])
def test_without_columns_as_with_them(case: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(CASES[case]())
    source = source_of(problem)
    v = vectors(source, 5)
    with_columns = product_of(problem, source, "ggn")(v, None)
    monkeypatch.setattr(products, "TOGETHER", few)
    monkeypatch.setattr(products, "BATCH", 5)
    found = products._gauss_newton(problem, source, "ggn", None, v) / len(problem.train)
    assert torch.allclose(found, with_columns, rtol=1e-10, atol=1e-12)
    rows = torch.arange(len(problem.train))[::2]
    some = products._gauss_newton(problem, source, "ggn", rows, v) / len(rows)
    assert torch.allclose(some, product_of(problem, source, "ggn")(v, rows), rtol=1e-10, atol=1e-12)


def test_columns_are_avoided_where_an_example_has_more_than_there_are_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "KEPT", 0)
    problem = problem_of(CASES["three_classes"]())  # two columns an example
    source, asked = source_of(problem), []
    for name in ("_rooted", "_gauss_newton"):
        own = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *a, own=own, name=name: asked.append(name) or own(*a))
    product = product_of(problem, source, "ggn")
    v = vectors(source, 2)
    one, two = product(v[:1], None), product(v, None)
    assert asked == ["_gauss_newton", "_rooted"]
    assert torch.allclose(one, two[:1], rtol=1e-10, atol=1e-12)


def test_of_a_language_model_it_is_the_dense_matrix_over_scored_tokens() -> None:
    problem = problem_of(language())
    source = source_of(problem)
    matrix, trace = dense(problem, source)
    v = vectors(source, 3)
    assert torch.allclose(product_of(problem, source, "ggn")(v, None), v @ matrix, rtol=1e-10, atol=1e-12)
    assert matrix.trace().item() == pytest.approx(trace.item())
    everything = replace(problem.train, targets=problem.train.targets.clamp_min(0))
    every = problem_of(replace(problem.task, splits={**problem.task.splits, "train": everything}))
    unmasked = product_of(every, source_of(every), "ggn")(v, None)
    assert not torch.allclose(unmasked, v @ matrix, rtol=1e-3), "what is not scored has no curvature"


def test_the_trace_of_a_language_model_is_estimated_by_drawn_labels() -> None:
    task = language()
    exact = dense(problem_of(task), source_of(problem_of(task)))[0].trace().item()
    found = []
    for seed in range(40):
        problem = problem_of(task, seed)
        found.append(Operator(problem, source_of(problem), "ggn").trace())
    spread = torch.tensor(found, dtype=torch.float64)
    assert abs(spread.mean().item() - exact) < 4 * spread.std().item() / len(found) ** 0.5


def test_conjugate_gradients_score_as_the_dense_solve() -> None:
    problem = problem_of(language())
    source, queries = source_of(problem), problem.task.splits["query"]
    matrix = dense(problem, source)[0]

    def gradients(examples: object, of: object) -> Tensor:
        whole = torch.zeros(len(examples), source.size, dtype=torch.float64)  # type: ignore[arg-type]
        for index, found in source.gradients(examples, of):  # type: ignore[arg-type]
            whole[index] = flat(plain(found))
        return whole

    m = gradients(queries, problem.task.objective.measure)
    g = gradients(problem.train, problem.task.objective.loss)
    damped = matrix + (GAMMA + ABSOLUTE.value) * torch.eye(len(matrix), dtype=torch.float64)
    expected = -m @ torch.linalg.solve(damped, g.T) / len(problem.train)
    found = Influence(ConjugateGradients("ggn", 1e-12, 2000), ABSOLUTE).attribute(problem, queries)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("matrix", ["fisher", "empirical"])
@pytest.mark.parametrize("kind", [Diagonal, KFAC, EKFAC])
def test_factored_curvatures_run_on_a_language_model_and_order_of_rows_is_nothing_to_them(
    kind: type, matrix: str
) -> None:
    problem = problem_of(language())
    queries = problem.task.splits["query"]
    method = Influence(kind(matrix), ABSOLUTE)
    found = method.attribute(problem, queries)
    assert torch.isfinite(found).all() and found.abs().max() > 0
    again = method.attribute(problem_of(problem.task), queries.select([2, 0]))
    assert torch.allclose(again, found[[2, 0]], rtol=1e-8, atol=1e-12)


def test_labels_are_drawn_for_scored_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(language())
    drawn, own = [], LanguageModel.sample

    def sample(objective: LanguageModel, outputs: Tensor, uniforms: Tensor) -> Tensor:
        drawn.append(own(objective, outputs, uniforms))
        return drawn[-1]

    monkeypatch.setattr(LanguageModel, "sample", sample)
    for index, _ in columns(problem, source_of(problem), "fisher"):
        targets = problem.train.targets[index][:, : drawn[-1].shape[1]]
        assert torch.equal(drawn[-1] == NO_TARGET, targets == NO_TARGET)
    assert drawn


@pytest.mark.parametrize("curvature", [Dense("ggn", "global", 1.0), EKFAC("ggn"), KFAC("ggn"), Diagonal("ggn")])
def test_what_needs_columns_says_so(curvature: Curvature) -> None:
    problem = problem_of(language())
    with pytest.raises(Unsupported, match=r"matrix=ggn.*fisher and empirical"):
        Influence(curvature, ABSOLUTE).attribute(problem, problem.task.splits["query"])


def test_compressed_gradients_have_no_matrix_free_product() -> None:
    problem = problem_of(language())
    method = Influence(ConjugateGradients("ggn", 1e-3, 10), ABSOLUTE, compression=Gaussian(16))
    with pytest.raises(Unsupported, match="compressed"):
        method.attribute(problem, problem.task.splits["query"])


def test_the_classifiers_scores_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "KEPT", 0)
    problem = problem_of(CASES["three_classes"]())
    queries = problem.task.splits["query"].select([0])
    found = Influence(ConjugateGradients("ggn", 1e-12, 500), ABSOLUTE).attribute(problem, queries)
    expected = exact_scores(problem, queries, GAMMA + ABSOLUTE.value)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-12)
