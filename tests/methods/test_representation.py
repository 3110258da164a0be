"""Features against plain forward passes; what is made of them against closed forms, brute force and hand counts."""

import math
from dataclasses import replace
from functools import partial
from itertools import permutations

import pytest
import torch
from cases import alone, bert, close, draw, far, logistic, parameters, perceptron, problem_of, task_of, three_classes
from cases import vectors as random_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from models import cnn, gpt, regression
from torch import Tensor, nn

from methods.activation_precond import ActivationPrecond
from methods.base import Problem, Unsupported
from methods.bm25 import BM25
from methods.curvature.damping import Damping
from methods.knn_shapley import KNNShapley, shapley
from methods.representation import INPUT, features, nearest, neighbours, pooled
from methods.representer import Representer, with_one
from methods.repsim import Embedding, RepSim
from tasks.base import Examples, Task
from tasks.errors import UserError
from tasks.objectives.classification import Classification
from tasks.training.train import train

LAYER = "encoder.encoder.layer.0"  # of `bert`: token vectors, the last ones before its head
REPSIM = RepSim(None, "mean", "label", "cosine")


def hidden(task: Task, i: int) -> Tensor:
    """Last states (T, d) of a training row of `bert`, its padding cut off."""
    inputs, _ = alone(task.train, i)
    return problem_of(task).model().encoder(**inputs).last_hidden_state[0].detach()


def named(problem: Problem, layer: str | None, pooling: str) -> Tensor:
    return features(problem, problem.model(), problem.train, layer, pooling)


# Features


def test_by_default_they_are_what_goes_into_the_last_linear_layer() -> None:
    task = three_classes()
    first = problem_of(task).model().layers[0]
    assert torch.equal(named(problem_of(task), None, "mean"), first(task.train.inputs["x"]).tanh())
    texts = bert()
    by_hand = torch.stack([hidden(texts, i)[0] for i in range(12)])  # the head reads the first token
    assert close(named(problem_of(texts), None, "last"), by_hand)


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_tokens_are_pooled_without_their_padding(pooling: str) -> None:
    task = bert()
    of = {"first": lambda h: h[0], "last": lambda h: h[-1], "mean": lambda h: h.mean(0)}[pooling]
    expected = torch.stack([of(hidden(task, i)) for i in range(12)])
    assert close(named(problem_of(task), LAYER, pooling), expected)
    others = [p for p in ("first", "last", "mean") if p != pooling]
    assert all(far(named(problem_of(task), LAYER, other), expected) for other in others)


@pytest.mark.parametrize("layer", [None, LAYER])
def test_a_batch_of_one_gives_the_same_as_a_padded_batch(layer: str | None) -> None:
    task = bert()
    together = named(problem_of(task), layer, "mean")
    one_by_one = [
        named(problem_of(replace(task, splits={"train": task.train.select([i])})), layer, "mean") for i in range(12)
    ]
    assert close(together, torch.cat(one_by_one))


def test_pooling_where_the_padding_is_on_the_left() -> None:
    output = torch.arange(12, dtype=torch.float64).view(2, 3, 2)
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    expected = {"first": [[2, 3], [6, 7]], "last": [[4, 5], [8, 9]], "mean": [[3, 4], [7, 8]]}
    for pooling, wanted in expected.items():
        assert pooled(output, mask, 2, pooling, "x").tolist() == wanted
    assert pooled(output, None, 2, "mean", "x").tolist() == [[2, 3], [8, 9]]
    assert pooled(output[..., None], mask, 2, "mean", "x").shape == (2, 6)


def test_language_models_have_tokens_before_their_last_layer_too() -> None:
    task = gpt()
    found = named(problem_of(task), None, "last")
    model = problem_of(task).model().network.transformer
    by_hand = [model(**alone(task.train, i)[0]).last_hidden_state[0, -1] for i in range(len(task.train))]
    assert close(found, torch.stack(by_hand).detach())


def test_pictures_are_one_vector() -> None:
    task = cnn()
    found = named(problem_of(task), "first", "mean")
    assert close(found, problem_of(task).model().first(task.train.inputs["x"]).flatten(1).detach())


def test_the_input_itself_needs_no_training() -> None:
    task = three_classes()
    problem = problem_of(task)
    assert torch.equal(RepSim(INPUT, "mean", "none", "dot").of(problem, task.train), task.train.inputs["x"])
    assert problem.meter.trainings == 0


def test_layers_that_cannot_be_are_refused_before_training() -> None:
    with pytest.raises(UserError, match=r"method\.layer=head2 is no module; allowed: encoder, .*head, input, null"):
        replace(REPSIM, layer="head2").unmet(bert())
    with pytest.raises(UserError, match=r"method\.layer=input is no vector in this task"):
        replace(REPSIM, layer=INPUT).unmet(bert())
    with pytest.raises(UserError, match=r"method\.pooling=max.*first, last, mean"):
        replace(REPSIM, pooling="max")
    assert replace(REPSIM, layer=LAYER).unmet(bert()) is None


class Idle(nn.Module):
    """x (B, 3) -> (B, 3); one module is never run, one gives a constant, one is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.constant = nn.Embedding(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.mix(x).tanh()) + self.constant(torch.zeros(1, dtype=torch.long)))


def test_modules_that_give_no_vector_an_example_are_refused_and_leave_no_hook() -> None:
    task = replace(logistic(), build=Idle)
    problem = problem_of(task)
    model = problem.model()
    for layer, reason in (("idle", "is not run"), ("constant", r"gives a tensor \(1, 3\) for 12 examples")):
        with pytest.raises(UserError, match=rf"method\.layer={layer} {reason}"):
            features(problem, model, task.train, layer, "mean")
    assert all(not m._forward_hooks for m in model.modules())
    second = model.mix(model.mix(task.train.inputs["x"]).tanh())
    assert torch.equal(features(problem, model, task.train, "mix", "mean"), second)


def test_a_model_without_a_linear_layer_says_so() -> None:
    task = replace(cnn(), build=lambda: nn.Sequential(nn.Conv2d(2, 3, (6, 5)), nn.Flatten()))
    task = replace(task, splits={n: replace(r, inputs={"input": r.inputs["x"]}) for n, r in task.splits.items()})
    with pytest.raises(
        UserError, match=r"method\.layer=null is the last linear layer, and there is none; allowed: 0, 1"
    ):
        named(problem_of(task), None, "mean")


# Similarity


def test_an_exact_duplicate_is_1_and_its_sign_is_by_label() -> None:
    task = three_classes()
    plain = replace(REPSIM, sign="none").attribute(problem_of(task), task.train)
    assert close(plain.diagonal(), torch.ones(12, dtype=torch.float64), 1e-14)
    assert plain.max() <= 1 + 1e-14 and close(plain, plain.T)
    agree = task.train.targets[:, None] == task.train.targets[None]
    assert close(REPSIM.attribute(problem_of(task), task.train), torch.where(agree, plain, -plain), 1e-14)


def test_similarities_by_hand() -> None:
    """h = x: the queries are (1, 0) and (3, 4), the rows (2, 0), (0, 2), (0, 0)."""
    x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    rows = Examples(tuple("abc"), {"x": x}, torch.tensor([0, 1, 1]))
    asked = Examples(
        tuple("de"), {"x": torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=torch.float64)}, torch.tensor([0, 1])
    )
    task = task_of(rows, asked, partial(perceptron, 2, 2, True), Classification(2))
    expected = {
        "cosine": [[1, 0, 0], [0.6, 0.8, 0]],
        "dot": [[2, 0, 0], [6, 8, 0]],
        "euclidean": [[-1, -5, -1], [-17, -13, -25]],
    }
    for similarity, wanted in expected.items():
        found = RepSim(None, "mean", "none", similarity).attribute(problem_of(task), asked)
        assert close(found, torch.tensor(wanted, dtype=torch.float64), 1e-14)


def test_the_base_model_has_representations_of_its_own() -> None:
    task = three_classes()
    problem = Problem(task, 0, partial(train, task))
    before, after = Embedding(None, "mean", "label", "cosine"), REPSIM
    assert torch.equal(before.attribute(problem, task.train), after.attribute(problem_of(task), task.train))
    assert not torch.equal(before.attribute(problem, task.train), after.attribute(problem, task.train))


def test_signs_need_labels_and_a_similarity_that_can_be_0() -> None:
    for method in (REPSIM, ActivationPrecond(None, "mean", "label", Damping("absolute", 1.0, "block"))):
        for task in (regression(), gpt()):
            assert "take method.sign=none" in (method.unmet(task) or "")
            assert replace(method, sign="none").unmet(task) is None
        assert method.signed and not replace(method, sign="none").signed
    with pytest.raises(UserError, match=r"method\.similarity=euclidean is never positive.*method\.sign=none"):
        replace(REPSIM, similarity="euclidean")
    with pytest.raises(UserError, match=r"method\.similarity=l2.*cosine, dot, euclidean"):
        replace(REPSIM, similarity="l2")
    with pytest.raises(UserError, match=r"method\.sign=plus.*label, none"):
        replace(REPSIM, sign="plus")


# The second moment


def whitened(rule: str, value: float) -> ActivationPrecond:
    return ActivationPrecond(None, "mean", "none", Damping(rule, value, "block"))


def test_the_second_moment_is_inverted() -> None:
    task = logistic()
    h, asked = task.train.inputs["x"], task.splits["query"].inputs["x"]
    moments = sum(torch.outer(row, row) for row in h) / 12
    for rule, value, strength in (("absolute", 0.3, 0.3), ("mean_eigenvalue", 0.3, 0.3 * moments.trace() / 3)):
        expected = asked @ torch.linalg.inv(moments + strength * torch.eye(3, dtype=torch.float64)) @ h.T
        assert close(whitened(rule, value).attribute(problem_of(task), task.splits["query"]), expected)


def test_without_damping_no_coordinates_matter_and_with_much_it_is_the_dot_product() -> None:
    task = logistic()
    queries = task.splits["query"]
    matrix = torch.randn(3, 3, generator=draw(3), dtype=torch.float64)
    turned = {n: replace(rows, inputs={"x": rows.inputs["x"] @ matrix}) for n, rows in task.splits.items()}
    found = whitened("absolute", 0.0).attribute(problem_of(task), queries)
    assert close(
        found, whitened("absolute", 0.0).attribute(problem_of(replace(task, splits=turned)), turned["query"]), 1e-8
    )
    much = 1e9 * whitened("absolute", 1e9).attribute(problem_of(task), queries)
    assert close(much, queries.inputs["x"] @ task.train.inputs["x"].T, 1e-7)


def test_a_singular_second_moment_asks_for_damping() -> None:
    task = logistic(rows=2)  # of three features
    with pytest.raises(UserError, match=r"method\.damping\.value=0\.0 adds 0 to a singular matrix"):
        whitened("mean_eigenvalue", 0.0).attribute(problem_of(task), task.train)
    assert whitened("mean_eigenvalue", 0.1).attribute(problem_of(task), task.train).isfinite().all()


# Representer points

REPRESENTER = Representer(None, "mean", 0.01)


@pytest.mark.parametrize("make", [three_classes, bert, regression])
def test_the_logits_are_a_sum_over_examples(make: object) -> None:
    task = make()  # type: ignore[operator]
    problem = problem_of(task)
    head, alphas = REPRESENTER.refitted(problem)
    h = with_one(REPRESENTER.of_train(problem))
    asked = with_one(REPRESENTER.of(problem, task.splits["query"]))
    assert close(torch.einsum("nc,nd,qd->qc", alphas, h, asked), asked @ head.T, 1e-8)
    free = head.clone().requires_grad_()
    objective = task.objective.loss(h @ free.T, task.train.targets).mean() + 0.01 * free.square().sum()
    assert torch.autograd.grad(objective, free)[0].norm() < 1e-9


def test_the_refitted_head_is_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression

    task = three_classes()
    problem = problem_of(task)
    h = with_one(REPRESENTER.of_train(problem))
    peer = LogisticRegression(C=1 / (2 * 0.01 * 12), fit_intercept=False, tol=1e-12, max_iter=10000)
    peer.fit(h.numpy(), task.train.targets.numpy())
    assert close(REPRESENTER.refitted(problem)[0], torch.as_tensor(peer.coef_), 1e-5)


def test_a_regression_is_ridge() -> None:
    task = regression()
    problem = problem_of(task)
    h, y = with_one(REPRESENTER.of_train(problem)), task.train.targets.double()
    ridge = torch.linalg.solve(h.T @ h / len(h) + 0.02 * torch.eye(h.shape[1], dtype=h.dtype), h.T @ y / len(h))
    head, alphas = REPRESENTER.refitted(problem)
    assert close(head[0], ridge, 1e-8)
    assert close(alphas[:, 0], (y - h @ ridge) / (0.02 * len(h)), 1e-6)


def test_scores_follow_the_measurement() -> None:
    """What a step along an example's part of the logits changes in the margin, by central differences."""
    task = three_classes()
    problem, queries = problem_of(task), task.splits["query"]
    head, alphas = REPRESENTER.refitted(problem)
    h, asked = with_one(REPRESENTER.of_train(problem)), with_one(REPRESENTER.of(problem, queries))
    logits, scores = asked @ head.T, REPRESENTER.attribute(problem, queries)
    for i in range(12):
        part = (asked @ h[i])[:, None] * alphas[i]
        m = [task.objective.measure(logits + e * part, queries.targets) for e in (1e-5, -1e-5)]
        assert close(scores[:, i], (m[0] - m[1]) / 2e-5, 1e-7)


def test_an_example_speaks_for_its_own_label() -> None:
    task = three_classes()
    scores = REPRESENTER.attribute(problem_of(task), task.train)
    assert (scores.diagonal() > 0).all()


def test_representers_need_l2_and_one_target() -> None:
    with pytest.raises(UserError, match=r"method\.l2=0"):
        replace(REPRESENTER, l2=0.0)
    assert "one target" in (REPRESENTER.unmet(gpt()) or "")


def test_a_weak_l2_term_is_solved_too() -> None:
    """Separable data: the optimum lies far out."""
    task = logistic(rows=4)
    weak = replace(REPRESENTER, l2=1e-6)
    head, alphas = weak.refitted(problem_of(task))
    assert head.norm() > 10
    assert close(alphas.T @ with_one(task.train.inputs["x"]), head, 1e-3)


# Neighbours


def test_neighbours_by_hand() -> None:
    train = torch.tensor([[0.0], [3.0], [1.0], [3.0]], dtype=torch.float64)
    (found,) = nearest(torch.tensor([[2.9], [0.4]], dtype=torch.float64), train, "dcba")
    assert found.tolist() == [[3, 1, 2, 0], [0, 2, 3, 1]]  # of the two at 3, id a comes before id c
    (found,) = nearest(train, train, "dcba", own=torch.arange(4))
    assert found.tolist() == [[2, 3, 1, 0], [3, 2, 0, 1], [0, 3, 1, 2], [1, 2, 0, 3]]


def test_neighbours_are_scikit_learns() -> None:
    from sklearn.neighbors import NearestNeighbors

    train, queries = (random_vectors("x", n, 5, 2, n).inputs["x"] + 100 for n in (40, 300))  # 300: more than a chunk
    found = torch.cat(list(nearest(queries, train, [f"{i:02}" for i in range(40)])))
    assert torch.equal(found, torch.as_tensor(NearestNeighbors(n_neighbors=40).fit(train).kneighbors(queries)[1]))


@pytest.mark.parametrize("k", [1, 5, 39, 40])
def test_neighbours_are_the_first_of_all_by_distance_and_id(k: int) -> None:
    """On a grid, where most rows tie with others at the edge."""
    train = torch.arange(40, dtype=torch.float64)[:, None].remainder(4)
    ids = [str(i) for i in torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()]
    wanted = torch.cat([order[:, :k] for order in nearest(train, train, ids, own=torch.arange(40))])
    found = neighbours(train, train, ids, k, own=torch.arange(40))
    assert found.shape == (40, k) and torch.equal(found.sort(1).values, wanted.sort(1).values)


def by_enumeration(right: Tensor, k: int) -> Tensor:
    """Shapley values of one query's game over all orders of its rows, nearest first."""
    n = len(right)
    total = torch.zeros(n, dtype=torch.float64)

    def worth(members: list[int]) -> float:
        return sum(right[j].item() for j in sorted(members)[:k]) / k

    for order in permutations(range(n)):
        for place, player in enumerate(order):
            total[player] += worth([*order[:place], player]) - worth(list(order[:place]))
    return total / math.factorial(n)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 8))
def test_the_recursion_is_the_shapley_value(right: list[bool], k: int) -> None:
    r = torch.tensor(right, dtype=torch.float64)
    assert close(shapley(r[None], k)[0] + 1, by_enumeration(r, k) + 1, 1e-12)


def small(rows: int = 8) -> Task:
    """Three classes on two features; the layer is the input."""
    train = random_vectors("train", rows, 2, 3, 2)
    query = random_vectors("query", 6, 2, 3, 3)
    query = replace(query, targets=torch.tensor([0, 1, 2, 0, 1, 2]))
    return task_of(train, query, partial(perceptron, 2, 3, True), Classification(3))


@pytest.mark.parametrize("k", [1, 3, 9])
def test_knn_shapley_by_subsets(k: int) -> None:
    """φ_i = Σ_S |S|! (N − |S| − 1)! / N! (v(S ∪ i) − v(S)) over all 2⁸ subsets, v a vote of neighbours."""
    task, n = small(), 8
    x, y, queries = task.train.inputs["x"], task.train.targets, task.splits["query"]
    found = KNNShapley(None, "mean", k).attribute(problem_of(task), queries)
    for q in range(2):
        distances = (x - queries.inputs["x"][q]).norm(dim=1).tolist()
        worth = []
        for subset in range(2**n):
            near = sorted((i for i in range(n) if subset >> i & 1), key=lambda i: distances[i])[:k]
            worth.append(sum(int(y[i] == queries.targets[q]) for i in near) / k)
        for i in range(n):
            value = 0.0
            for subset in range(2**n):
                if not subset >> i & 1:
                    size = subset.bit_count()
                    share = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                    value += share * (worth[subset | 1 << i] - worth[subset])
            assert abs(found[q, i].item() - value) < 1e-12
        assert abs(found[q].sum().item() - worth[-1]) < 1e-12


def test_equally_near_rows_go_by_their_ids() -> None:
    task = small()
    twice = torch.arange(8).repeat(2)
    rows = replace(task.train.select(range(8)), ids=tuple("abcdefgh"))
    labels = torch.cat([rows.targets, (rows.targets + 1) % 3])
    double = Examples(tuple("abcdefghijklmnop"), {"x": rows.inputs["x"][twice]}, labels)
    order = torch.randperm(16, generator=draw(1))
    scores = []
    for train_rows in (double, double.select(order)):
        of = replace(task, splits={**task.splits, "train": train_rows})
        scores.append(KNNShapley(None, "mean", 3).attribute(problem_of(of), task.splits["query"]))
    assert torch.equal(scores[0][:, order], scores[1])


def test_a_value_is_the_mean_over_validation_rows_of_every_label() -> None:
    task, method = small(), KNNShapley(None, "mean", 3)
    assert torch.equal(method.value(problem_of(task)), method.attribute(problem_of(task), task.splits["val"]).mean(0))
    few = replace(task, splits={**task.splits, "val": task.splits["val"].select([0, 1])})
    with pytest.raises(Unsupported, match="none has the label 2"):
        method.value(problem_of(few))
    assert "labels" in (method.unmet(regression()) or "")
    with pytest.raises(UserError, match=r"method\.k=0"):
        replace(method, k=0)


# Texts


def corpus() -> Task:
    """Lengths 3, 2, 1, mean 2; `film` is in two of three texts, twice in the first."""
    task = small(3)
    rows = replace(task.train, targets=torch.tensor([1, 0, 0]), texts=("film Good film", "bad film", "slow"))
    asked = replace(
        task.splits["query"].select([1, 0]), texts=("film", "Slow film unknown film"), targets=torch.tensor([1, 0])
    )
    return replace(task, splits={**task.splits, "train": rows, "query": asked})


def test_bm25_by_hand() -> None:
    task = corpus()
    film, slow = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)
    first = film * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 3 / 2))
    second = film * 2.2 / (1 + 1.2)
    third = slow * 2.2 / (1 + 1.2 * (0.25 + 0.75 / 2))
    expected = torch.tensor([[first, -second, 0], [-2 * first, 2 * second, third]], dtype=torch.float64)
    assert close(BM25(1.2, 0.75).attribute(problem_of(task), task.splits["query"]), expected, 1e-14)


def test_bm25_limits() -> None:
    """k1 = 0: a word counts once; b = 0: lengths do not count; k1 → ∞ with b = 0: words are counted."""
    task, film = corpus(), math.log(1 + 1.5 / 2.5)
    for k1, b, first in ((0.0, 0.75, film), (1.2, 0.0, film * 2 * 2.2 / 3.2), (1e9, 0.0, 2 * film)):
        found = BM25(k1, b).attribute(problem_of(task), task.splits["query"])[0]
        assert close(found[:2], torch.tensor([first, -film], dtype=torch.float64), 1e-8)


def test_bm25_settings_and_needs() -> None:
    assert "texts" in (BM25(1.2, 0.75).unmet(small()) or "") and BM25(1.2, 0.75).unmet(corpus()) is None
    for settings_, key in (((-1.0, 0.5), "k1"), ((1.0, 1.5), "b")):
        with pytest.raises(UserError, match=rf"method\.{key}="):
            BM25(*settings_)


def test_parameters_of_the_explained_model_are_left_alone() -> None:
    task = three_classes()
    problem = problem_of(task)
    before = parameters(problem.model())
    REPRESENTER.attribute(problem, task.splits["query"])
    assert all(torch.equal(p, before[n]) for n, p in problem.trajectory().final.items())
