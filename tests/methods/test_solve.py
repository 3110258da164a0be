"""(H + γI + λI)⁻¹ v by parameter, against dense float64 algebra."""

from dataclasses import replace

import pytest
import torch
from cases import CASES, GAMMA, close, explained, ggn, parameters, problem_of
from torch import Tensor

from methods.base import Unsupported
from methods.baselines import Loss
from methods.compression.mask import Mask
from methods.curvature.cg import ConjugateGradients
from methods.curvature.damping import Damping
from methods.curvature.dense import Dense
from methods.curvature.identity import Identity
from methods.influence import Influence

DAMPING = Damping("absolute", 0.04, "global")


def random_vector(start: dict[str, Tensor]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(7)
    return {name: torch.randn(p.shape, generator=rng, dtype=p.dtype) for name, p in start.items()}


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.flatten() for v in named.values()])


@pytest.mark.parametrize("case", ["logistic", "without_bias", "three_classes", "shared"])
@pytest.mark.parametrize(
    "curvature", [Dense("ggn", "global", 1.0), ConjugateGradients("ggn", 1e-12, 200)], ids=["dense", "cg"]
)
def test_it_is_the_dense_solve(case: str, curvature: object) -> None:
    problem = problem_of(CASES[case]())
    start = parameters(problem.task.initial(0))
    vector = random_vector(start)
    matrix = ggn(explained(problem), problem.train)
    expected = torch.linalg.solve(matrix + (0.04 + GAMMA) * torch.eye(len(matrix), dtype=matrix.dtype), flat(vector))
    found = Influence(curvature, DAMPING).solve(problem, vector)  # type: ignore[arg-type]
    assert {name: v.shape for name, v in found.items()} == {name: v.shape for name, v in start.items()}
    assert close(flat(found), expected)


def test_the_training_set_is_the_problems_own() -> None:
    problem = problem_of(CASES["logistic"]())
    train = problem.train.select(range(6))
    fewer = replace(problem, task=replace(problem.task, splits={**problem.task.splits, "train": train}), _once={})
    vector = random_vector(parameters(problem.task.initial(0)))
    matrix = ggn(explained(problem), train)
    expected = torch.linalg.solve(matrix + (0.04 + GAMMA) * torch.eye(len(matrix), dtype=matrix.dtype), flat(vector))
    assert close(flat(Influence(Dense("ggn", "global", 1.0), DAMPING).solve(fewer, vector)), expected)


def test_what_is_not_covered_stays_zero() -> None:
    problem = problem_of(CASES["without_bias"]())
    vector = random_vector(parameters(problem.task.initial(0)))
    found = Influence(Identity(), DAMPING, modules=("layers.1",)).solve(problem, vector)
    assert not found["layers.0.weight"].any()
    assert torch.equal(found["layers.1.weight"], vector["layers.1.weight"])


def test_rows_of_an_embedding_that_no_training_example_looks_up_stay_zero() -> None:
    problem = problem_of(CASES["bert"]())
    start = parameters(problem.task.initial(0))
    found = Influence(Identity(), DAMPING).solve(problem, random_vector(start))
    (table,) = [v for name, v in found.items() if "word_embeddings" in name]
    used = problem.train.inputs["input_ids"].unique()
    assert table[used[used > 0]].all() and not table[9:].any()
    asked = problem.task.splits["query"].inputs["input_ids"].unique()
    found = Influence(Identity(), DAMPING).solve(problem, random_vector(start), [problem.task.splits["query"]])
    (table,) = [v for name, v in found.items() if "word_embeddings" in name]
    assert asked.max() > 8 and table[asked[asked > 8]].all(), "but those whose gradients are solved for"


def test_without_an_inverse_it_is_not_offered() -> None:
    problem = problem_of(CASES["logistic"]())
    vector = random_vector(parameters(problem.task.initial(0)))
    with pytest.raises(Unsupported, match="inverts no curvature"):
        Loss().solve(problem, vector)
    with pytest.raises(Unsupported, match="compressed"):
        Influence(Identity(), DAMPING, compression=Mask(4)).solve(problem, vector)
