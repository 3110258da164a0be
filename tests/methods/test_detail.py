"""Scores by layer and by token sum to the scores, and each part is what it says."""

from dataclasses import replace

import pytest
import torch
from cases import CASES, GAMMA, bert, close, explained, ggn, per_example, problem_of, stacked, three_classes
from models import gpt

from methods.base import Unsupported
from methods.compression.logra import LoGra
from methods.compression.none import Uncompressed
from methods.curvature.damping import Damping
from methods.curvature.dense import Dense
from methods.curvature.ekfac import EKFAC
from methods.curvature.identity import Identity
from methods.influence import Influence

CURVATURES = {"identity": Identity(), "ekfac": EKFAC("ggn"), "exact": Dense("ggn", "global", 1.0)}


def influence(name: str, **changes: object) -> Influence:
    return replace(Influence(CURVATURES[name], Damping("absolute", 0.02, "global")), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("compression", [Uncompressed(), LoGra(3)])
@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("case", ["bert", "shared", "three_classes"])
def test_layers_sum_to_the_score(case: str, name: str, compression: object) -> None:
    task = CASES[case]()
    problem, queries, method = problem_of(task), task.splits["query"], influence(name, compression=compression)
    layers = method.detail(problem, queries, "layer")["layers"]
    assert len(layers) > 1 and close(layers.sum(0), method.attribute(problem, queries), 1e-10)
    assert all(layer.abs().max() > 0 for layer in layers)


@pytest.mark.parametrize("compression", [Uncompressed(), LoGra(3)])
@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("case", [bert, gpt])
def test_tokens_sum_to_the_score(case: object, name: str, compression: object) -> None:
    task = case()  # type: ignore[operator]
    problem, queries, method = problem_of(task), task.splits["query"], influence(name, compression=compression)
    found, scores = method.detail(problem, queries, "token"), method.attribute(problem, queries)
    assert close(found["train_tokens"].sum(2), scores) and close(found["query_tokens"].sum(1), scores)
    assert found["train_tokens"].shape == (len(queries), len(task.train), int(task.train.lengths.max()) + 1)  # type: ignore[union-attr]
    # Padding has no share, and no token has all of it.
    for i, length in enumerate(task.train.lengths.tolist()):  # type: ignore[union-attr]
        assert (found["train_tokens"][:, i, length:-1] == 0).all()
        assert found["train_tokens"][:, i, :length].abs().sum() > 0
    for q, length in enumerate(queries.lengths.tolist()):  # type: ignore[union-attr]
        assert (found["query_tokens"][q, length:-1] == 0).all()


def test_a_layer_is_the_products_of_its_own_block() -> None:
    task = three_classes()
    problem, queries = problem_of(task), task.splits["query"]
    model = explained(problem)
    m, g = (stacked(per_example(model, e, of)) for e, of in
            ((queries, task.objective.measure), (task.train, task.objective.loss)))  # fmt: skip
    k = torch.linalg.inv(ggn(model, task.train) + (GAMMA + 0.02) * torch.eye(m.shape[1], dtype=m.dtype))
    first = 20  # parameters of layers.0
    solved = m @ k
    expected = -torch.stack([solved[:, :first] @ g[:, :first].T, solved[:, first:] @ g[:, first:].T]) / len(g)
    assert close(influence("exact").detail(problem, queries, "layer")["layers"], expected)


def test_a_token_of_an_embedding_is_what_it_looks_up() -> None:
    """By the word embeddings alone a position's share is what remains when all others are other words' rows."""
    task = bert()
    problem, queries = problem_of(task), task.splits["query"]
    (name,) = [n for n, m in problem.model().named_modules() if n.endswith("word_embeddings") or n == "embedding"]
    method = influence("identity", modules=(name,))
    found = method.detail(problem, queries, "token")["train_tokens"]
    ids = task.train.inputs["input_ids"]
    model = explained(problem)
    table = f"{name}.weight"
    m = torch.stack([p[table] for p in per_example(model, queries, task.objective.measure)])
    g = torch.stack([p[table] for p in per_example(model, task.train, task.objective.loss)])
    compared = 0
    for i in range(3):
        for word in ids[i, : int(task.train.lengths[i])].unique().tolist():  # type: ignore[index]
            mine = found[:, i, :-1][:, ids[i, : found.shape[2] - 1] == word].sum(1)
            expected = -(m[:, word] @ g[i, word]) / len(task.train)
            if expected.abs().max() > 0:
                assert close(mine, expected)
                compared += 1
    assert compared > 2
    assert (found[..., -1] == 0).all()


def test_what_has_no_parts_says_so() -> None:
    task = three_classes()
    with pytest.raises(Unsupported, match="no tokens"):
        influence("identity").detail(problem_of(task), task.splits["query"], "token")
    with pytest.raises(Unsupported, match="cosine"):
        influence("identity", similarity="cosine").detail(problem_of(task), task.splits["query"], "layer")
