"""Methods on preference pairs: what they compare, that the order of two answers means nothing, and who says no."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pair_cases import Rewards, lead_of, pair_task, swapped
from torch import Tensor, nn

from bench import config
from bench.conformance import World, checks, planted
from bench.run import build_method
from methods.base import Problem
from methods.length_rule import LengthRule
from methods.representation import INPUT, features
from tasks.base import Task, Trajectory
from tasks.errors import UserError
from tasks.training.plan import explained_seed
from tasks.training.train import train

TASK = pair_task(rows=24, flips=4, test=10)
RUN = train(TASK, explained_seed(0))
COPIED, RIGHT, WRONG = planted(
    replace(TASK, splits={**TASK.splits, "query": TASK.splits["query"].select(range(5))}).public()
)
EVERY = {
    **{name: [] for name in ("graddot", "ekfac", "exact_ggn", "datainf", "tracin", "representer", "repsim", "loo")},
    **{name: [] for name in ("knn_shapley", "knn_disagreement", "mahalanobis", "mahalanobis_reference", "entropy")},
    **{name: [] for name in ("knn_reference", "confidence", "aum", "confident_learning", "length_rule", "random")},
    "oporp_datainf": ["method.compression.dimension=16"],
    "trak": ["method.compression.dimension=16"],
    "contrast": ["method@method.base=graddot"],
    "self_influence": ["method@method.base=graddot"],
}
LABELS = {"same_label": [], "tfidf": [], "bm25": []}
EITHER_WAY = ["graddot", "exact_ggn", "repsim", "confidence", "mahalanobis_reference", "knn_reference", "length_rule"]
CONFIGS = config.compose_all([[f"method={name}", *more] for name, more in (EVERY | LABELS).items()])
METHODS = dict(zip(EVERY | LABELS, map(build_method, CONFIGS), strict=True))


def problem(task: Task = TASK, trajectory: Trajectory = RUN) -> Problem:
    return Problem(task.public(), 0, lambda k: trajectory)


@pytest.fixture(scope="module")
def world() -> World:
    return World("pairs", COPIED, RIGHT, WRONG)


@pytest.mark.parametrize("name", EVERY)
def test_methods_conform_on_pairs(name: str, world: World) -> None:
    found = checks(METHODS[name], [world])
    assert not [r for r in found if r.status == "failed"], "\n".join(str(r) for r in found if r.status == "failed")
    assert sum(r.status == "ok" for r in found) >= 6, "\n".join(map(str, found))


@pytest.mark.parametrize("name", ["same_label", "tfidf", "bm25"])
def test_labels_that_are_an_order_are_not_compared(name: str) -> None:
    reason = METHODS[name].unmet(TASK)
    assert reason is not None and "random order" in reason
    assert METHODS[name].unmet(replace(TASK, pairs=False)) is None


@pytest.mark.parametrize("name", EITHER_WAY)
def test_the_order_of_two_answers_means_nothing(name: str) -> None:
    """The same pairs, half of them shown the other way round, to the same model: the same scores, the same values."""
    other = replace(TASK, splits={k: swapped(v, list(range(0, len(v), 2))) for k, v in TASK.splits.items()})
    one, two, method = problem(), problem(other), METHODS[name]
    offered = [k for k in ("attribute", "value") if method.offers(k)]
    if "attribute" in offered:
        a, b = (method.attribute(p, p.task.splits["query"]) for p in (one, two))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    if "value" in offered:
        torch.testing.assert_close(method.value(one), method.value(two), rtol=1e-8, atol=1e-10)


def test_the_length_rule_is_the_planted_trait() -> None:
    """The generator's trait is the number of words."""
    values = LengthRule().value(problem())
    assert np.array_equal(values.numpy(), -lead_of(TASK.train, dict(TASK.facts)))
    assert "pairs" in str(LengthRule().unmet(replace(TASK, pairs=False)))
    textless = {name: replace(rows, texts=None) for name, rows in TASK.splits.items()}
    assert "texts" in str(LengthRule().unmet(replace(TASK, splits=textless)))


class Tokens(nn.Module):
    """input_ids, attention_mask (B, 2, T) -> (B, 2); `encoder` sees pair after pair, (2B, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(9, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.encoder(input_ids.flatten(0, 1)) * attention_mask.flatten(0, 1)[..., None]
        return self.head(h.sum(1).unflatten(0, (-1, 2)))[..., 0]


def test_features_of_a_pair_are_first_less_second() -> None:
    one = problem()
    model = one.model()
    assert isinstance(model, Rewards)
    x = TASK.train.inputs["x"]
    hidden = model.layer(x).tanh()
    torch.testing.assert_close(features(one, model, TASK.train, None, "mean"), hidden[:, 0] - hidden[:, 1])
    layer = model.layer(x)
    torch.testing.assert_close(features(one, model, TASK.train, "layer", "mean"), layer[:, 0] - layer[:, 1])
    torch.testing.assert_close(replace(METHODS["repsim"], layer=INPUT).of(one, TASK.train), x[:, 0] - x[:, 1])  # type: ignore[attr-defined]


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_features_of_pairs_of_token_sequences(pooling: str) -> None:
    """An encoder that sees (2B, T) and a head that sees (B, 2, d), against one answer at a time."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 9, (5, 2, 4), generator=draw)
    lengths = torch.randint(1, 5, (5, 2, 1), generator=draw)
    mask = (torch.arange(4) < lengths).long()

    class Rows(type(TASK.train)):  # type: ignore[misc]
        def batches(self, size: int) -> list[Tensor]:
            return list(torch.arange(len(self)).split(2))

        def batch(self, rows: Tensor) -> object:
            from tasks.base import Batch

            return Batch({k: v[rows] for k, v in self.inputs.items()}, self.targets[rows])

    rows = Rows(tuple("abcde"), {"input_ids": ids, "attention_mask": mask}, torch.zeros(5).long())
    model = Tokens().double().eval()
    found = features(problem(), model, rows, "encoder", pooling)
    for row in range(5):
        vectors = []
        for side in range(2):
            n = int(lengths[row, side])
            h = model.encoder(ids[row, side, :n])
            vectors.append({"first": h[0], "last": h[-1], "mean": h.mean(0)}[pooling])
        torch.testing.assert_close(found[row], vectors[0] - vectors[1])
    sums = (model.encoder(ids) * mask[..., None]).sum(2)
    torch.testing.assert_close(features(problem(), model, rows, None, pooling), sums[:, 0] - sums[:, 1])


def oriented(task: Task, split: str) -> np.ndarray:
    """Feature of the preferred answer − that of the other, by hand."""
    model, rows = problem().model(), task.splits[split]
    with torch.no_grad():
        h = model.layer(rows.inputs["x"]).tanh().numpy()  # type: ignore[operator]
    chosen = rows.targets.numpy()
    return np.asarray(h[np.arange(len(h)), chosen] - h[np.arange(len(h)), 1 - chosen])


@pytest.mark.parametrize("reference", ["val", "query"])
def test_distances_from_a_reference_by_hand(reference: str) -> None:
    known, rows = oriented(TASK, reference), oriented(TASK, "train")
    mean, cov = known.mean(0), np.cov(known.T, bias=True)
    inverse = np.linalg.inv(cov + 0.1 * np.trace(cov) / len(cov) * np.eye(len(cov)))
    wanted = -np.einsum("nd,de,ne->n", rows - mean, inverse, rows - mean)
    found = replace(METHODS["mahalanobis_reference"], reference=reference).value(problem())
    np.testing.assert_allclose(found, wanted, rtol=1e-8)

    known, rows = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (known, rows))
    distances = np.sort(np.linalg.norm(rows[:, None] - known, axis=2), axis=1)
    for k, column in ((3, 2), (10, 9), (99, -1)):
        found = replace(METHODS["knn_reference"], reference=reference, k=k).value(problem())
        np.testing.assert_allclose(found, -distances[:, column], rtol=1e-8, atol=1e-12)


def test_a_reference_of_classes_is_compared_whatever_the_label() -> None:
    """The same rows as if their labels were classes."""
    one = problem(replace(TASK, pairs=False))
    found = replace(METHODS["knn_reference"], layer=INPUT, k=1).value(one)
    x, v = (TASK.splits[split].inputs["x"].flatten(1).numpy() for split in ("train", "val"))
    x, v = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, v))
    np.testing.assert_allclose(found, -np.linalg.norm(x[:, None] - v, axis=2).min(1), rtol=1e-8)


def test_a_reference_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.reference"):
        replace(METHODS["knn_reference"], reference="test")
