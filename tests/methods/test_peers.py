"""Other people's implementations give the same numbers. Each test needs its peer: `make peers`."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import bert, error, far, problem_of, three_classes, without_bias
from models import cnn
from torch import Tensor

from bench.speed_ekfac import Peer
from methods.base import Problem
from methods.curvature.damping import Damping
from methods.curvature.eigenbasis import Basis, Eigenbases
from methods.curvature.ekfac import EKFAC
from methods.curvature.kfac import covariances
from methods.curvature.root import columns
from methods.gradients.blocks import blocks_of
from methods.gradients.per_example import inner
from methods.gradients.source import Source
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
    differ = 0
    for block in peer.modules:
        outputs, inputs = ours[block].normalised()
        expected_factors = factors(theirs, block)
        assert error(inputs, expected_factors["activation"]) <= tolerance, block
        assert error(outputs, expected_factors["gradient"]) <= tolerance, block
        lambdas = eigen["lambda_matrix"][block].double() / eigen["num_lambda_processed"][block]
        deviation = fitted.eigenvalues[block].flatten().sort()[0] - lambdas.flatten().sort()[0]
        assert deviation.abs().max().item() <= tolerance * top, block
        assert (found[block] - expected[block]).abs().max().item() <= tolerance * largest, block
        differ += int(error(wrong[block], expected[block]) > 0.02)
    assert differ
    assert far(sum(wrong.values(), torch.zeros(())), sum(expected.values(), torch.zeros(())))
    plain = -inner(
        source.collected(problem.task.splits["query"], problem.task.objective.measure),
        source.collected(problem.train, problem.task.objective.loss),
    )
    assert far(plain.double() / DELTA / len(problem.train), sum(expected.values(), torch.zeros(())))
