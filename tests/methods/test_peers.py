"""Other people's implementations give the same numbers. Each test needs its peer: `make peers`."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GAMMA, bert, close, draw, far, problem_of, three_classes, vector_task, without_bias
from models import cnn
from torch import Tensor, nn

from bench.speed_ekfac import Peer
from methods.base import Problem
from methods.curvature.damping import Damping
from methods.curvature.eigenbasis import Basis, Eigenbases
from methods.curvature.ekfac import EKFAC
from methods.curvature.kfac import covariances
from methods.curvature.products import product_of
from methods.curvature.root import columns
from methods.gradients.blocks import blocks_of, from_parameters, to_parameters
from methods.gradients.per_example import inner
from methods.gradients.source import Source
from methods.influence import Influence
from tasks.base import Task

DELTA = 0.02
TASKS: dict[str, Callable[[], Task]] = {
    "linear": three_classes,
    "without_bias": without_bias,
    "convolution": cnn,
    "convolution_without_bias": lambda: cnn(bias=False, stride=2, padding=1),
    "padded": bert,  # the linear layers of a transformer on sequences of 2 to 7 tokens
}
EXACT, SINGLE = 1e-10, 1e-4  # relative errors in float64 and in float32

kronfluence = pytest.mark.skipif(
    importlib.util.find_spec("kronfluence") is None, reason="kronfluence is not installed: make peers"
)
curvlinops = pytest.mark.skipif(
    importlib.util.find_spec("curvlinops") is None, reason="curvlinops is not installed: make peers"
)


def source_of(problem: Problem, modules: Sequence[str]) -> Source:
    model = problem.model()
    return Source(problem.task, model, tuple(blocks_of(model, modules)))


def peer_of(problem: Problem, folder: Path, **mistakes: bool) -> tuple[Peer, dict[str, Any], dict[str, Any]]:
    """Fitted; its covariances and its eigenvalues by kind and module. Batches of 5 leave a last one that is smaller."""
    peer = Peer(problem.task, problem.model(), str(folder), **mistakes)
    peer.fit(peer.rows(problem.train), 5)
    return peer, peer.analyzer.load_covariance_matrices("ekfac"), peer.analyzer.load_lambda_matrices("ekfac")


def factors(found: dict[str, Any], name: str) -> dict[str, Tensor]:
    """The peer's sums over its counts: A (in, in) and S (out, out)."""
    return {
        kind: found[f"{kind}_covariance"][name].double() / found[f"num_{kind}_covariance_processed"][name]
        for kind in ("activation", "gradient")
    }


def scores(fitted: Eigenbases, problem: Problem, source: Source, delta: float) -> dict[str, Tensor]:
    """−(1/N) ∇mᵀ (H + δI)⁻¹ ∇ℓ by block, (Q, N)."""
    objective = problem.task.objective
    m = source.collected(problem.task.splits["query"], objective.measure, fitted.coordinates)
    solved = fitted.precondition(m, Damping("absolute", delta, "block"), 0.0)
    g = source.collected(problem.train, objective.loss, fitted.coordinates)
    blocks = zip(solved, g, strict=True)
    return {v.block.name: -inner([v], [u]).double() / len(problem.train) for v, u in blocks}


def transposed(fitted: Eigenbases) -> Eigenbases:
    """Eigenvectors taken from rows: wrong."""

    def turned(vectors: Tensor | None) -> Tensor | None:
        return None if vectors is None else vectors.T.contiguous()

    return replace(fitted, bases={n: Basis(turned(b.left), turned(b.right)) for n, b in fitted.bases.items()})


@kronfluence
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
@pytest.mark.parametrize("name", TASKS)
def test_ekfac_is_kronfluences(name: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    """Covariances, eigenvalues (sorted: their order belongs to the basis) and scores, module by module."""
    problem = problem_of(replace(TASKS[name](), dtype=dtype))
    peer, theirs, eigen = peer_of(problem, tmp_path)
    source = source_of(problem, peer.modules)
    assert {b.name for b in source.blocks} == set(peer.modules) and peer.modules
    fitted = EKFAC("empirical").fit(problem, source)
    ours = covariances(source.blocks, columns(problem, source, "empirical"))
    queries = peer.rows(problem.task.splits["query"])
    expected = peer.scores(queries, peer.rows(problem.train), DELTA, 5, by_module=True)
    found, wrong = (scores(f, problem, source, DELTA) for f in (fitted, transposed(fitted)))

    largest = max(s.abs().max().item() for s in expected.values())
    top = max(v.max().item() for v in fitted.eigenvalues.values())
    for block in peer.modules:
        outputs, inputs = ours[block].normalised()
        normal = factors(theirs, block)
        assert close(inputs, normal["activation"], tolerance), block
        assert close(outputs, normal["gradient"], tolerance), block
        lambdas = eigen["lambda_matrix"][block].double() / eigen["num_lambda_processed"][block]
        deviation = fitted.eigenvalues[block].flatten().sort()[0] - lambdas.flatten().sort()[0]
        assert deviation.abs().max().item() <= tolerance * top, block
        assert (found[block] - expected[block]).abs().max().item() <= tolerance * largest, block
    total = sum(expected.values(), torch.zeros(()))
    damping = Damping("absolute", DELTA - GAMMA, "block")  # γ is added to it
    whole = Influence(EKFAC("empirical"), damping, modules=peer.modules)
    assert close(whole.attribute(problem, problem.task.splits["query"]), total, tolerance)
    assert far(sum(wrong.values(), torch.zeros(())), total)
    identity = replace(fitted, eigenvalues={n: torch.zeros_like(v) for n, v in fitted.eigenvalues.items()})
    assert far(sum(scores(identity, problem, source, DELTA).values(), torch.zeros(())), total)


@kronfluence
def test_a_mean_loss_and_padding_that_counts_are_seen(tmp_path: Path) -> None:
    """What the comparison above would say of these mistakes."""
    problem = problem_of(bert())
    right, mean, padded = (
        peer_of(problem, tmp_path / str(k), **wrong) for k, wrong in enumerate(({}, {"mean": True}, {"masked": False}))
    )
    block = "encoder.encoder.layer.0.attention.self.value"
    assert far(factors(padded[1], block)["activation"], factors(right[1], block)["activation"])
    assert close(factors(mean[1], block)["activation"], factors(right[1], block)["activation"])
    assert far(factors(mean[1], block)["gradient"], factors(right[1], block)["gradient"])
    assert far(mean[2]["lambda_matrix"][block], right[2]["lambda_matrix"][block])


# Products


def vectors_as_parameters(source: Source, vectors: Tensor) -> Tensor:
    """(R, P) block by block -> (P, R) in the order of the model's parameters."""
    named: dict[str, Tensor] = {}
    for block, part in zip(source.blocks, vectors.split([b.size for b in source.blocks], 1), strict=True):
        named |= to_parameters(block, part.reshape(-1, *block.shape))
    return torch.cat([named[name].flatten(1) for name, _ in source.model.named_parameters()], 1).T


def parameters_as_vectors(source: Source, matrix: Tensor) -> Tensor:
    """The inverse."""
    sizes = {name: p.shape for name, p in source.model.named_parameters()}
    parts = matrix.T.split([shape.numel() for shape in sizes.values()], 1)
    named = {name: part.reshape(-1, *sizes[name]) for name, part in zip(sizes, parts, strict=True)}
    return torch.cat([from_parameters(b, named).flatten(1) for b in source.blocks], 1)


@curvlinops
@pytest.mark.parametrize("rows", [None, [7, 0, 3]])
@pytest.mark.parametrize(
    ("matrix", "operator"),
    [("hessian", "HessianLinearOperator"), ("ggn", "GGNLinearOperator"), ("empirical", "EFLinearOperator")],
)
def test_products_are_curvlinops(matrix: str, operator: str, rows: list[int] | None) -> None:
    """H V of a perceptron with two hidden layers, one of them without bias, over all rows and over some."""
    import curvlinops

    problem = problem_of(vector_task([4, 5, 4, 3], [True, False, True]))
    source = source_of(problem, ["*"])
    vectors = torch.randn(6, source.size, generator=draw(1), dtype=torch.float64)
    index = None if rows is None else torch.tensor(rows)
    batch = (problem.train if index is None else problem.train.select(index)).batch()

    def other(name: str, reduction: str = "mean") -> Tensor:
        model = problem.model().requires_grad_(True)
        product = getattr(curvlinops, name)(
            model,
            nn.CrossEntropyLoss(reduction=reduction),
            list(model.parameters()),
            [(batch.inputs["x"], batch.targets)],
        )
        return parameters_as_vectors(source, product @ vectors_as_parameters(source, vectors)).detach()

    assert torch.equal(parameters_as_vectors(source, vectors_as_parameters(source, vectors)), vectors)
    found = product_of(problem, source, matrix)(vectors, index)
    assert close(found, other(operator), EXACT)
    names = {"HessianLinearOperator", "GGNLinearOperator", "EFLinearOperator"} - {operator}
    assert all(far(found, other(name)) for name in names)  # another matrix
    assert far(found, other(operator, "sum")) and far(found, vectors)
