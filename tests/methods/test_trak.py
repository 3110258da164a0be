"""TRAK written out, its ensemble, its traps, and the library of its authors."""

import importlib.util
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import close, draw, explained, far, per_example, problem_of, stacked, three_classes
from torch import Tensor

from methods.base import Problem
from methods.compression.gaussian import Gaussian
from methods.compression.none import Uncompressed
from methods.curvature.damping import Damping
from methods.gradients.per_example import Scalar
from methods.trak import TRAK
from tasks.base import Examples
from tasks.errors import UserError
from tasks.objectives.regression import Regression
from tasks.training.train import load, train


def trak(k: int = 1, compression: object = Uncompressed(), value: float = 0.01) -> TRAK:
    return TRAK(k, compression, Damping("absolute", value, "global"), None)  # type: ignore[arg-type]


def written_out(problem: Problem, k: int, ridge: float) -> tuple[Tensor, Tensor]:
    """The products and the residuals of k members, not yet multiplied; without projection."""
    task, products, residuals = problem.task, [], []
    for j in range(k):
        model = explained(problem.member(j))
        f = stacked(per_example(model, task.train, task.objective.measure))
        q = stacked(per_example(model, task.splits["query"], task.objective.measure))
        gram = f.T @ f + len(f) * ridge * torch.eye(f.shape[1], dtype=f.dtype)
        products.append(q @ torch.linalg.inv(gram) @ f.T)
        outputs = task.outputs(model, task.train.batch()).detach()
        p = outputs.softmax(1).gather(1, task.train.targets[:, None])[:, 0]
        residuals.append(1 - p)
    return torch.stack(products), torch.stack(residuals)


def task_outputs(problem: Problem, model: torch.nn.Module) -> Tensor:
    """Q of the queries."""
    queries, task = problem.task.splits["query"], problem.task
    return task.objective.residual(task.outputs(model, queries.batch()).detach(), queries.targets)


@pytest.fixture
def problem() -> Problem:
    task = three_classes()
    return Problem(task, 0, partial(train, task))


def test_written_out(problem: Problem) -> None:
    products, residuals = written_out(problem, 1, 0.01)
    expected = products[0] * residuals[0]
    queries = problem.task.splits["query"]
    found = trak().attribute(problem, queries)
    assert close(found, expected)
    assert far(products[0], expected) and far(trak(value=0.1).attribute(problem, queries), expected)
    # the query enters by its margin, not by its loss, whose gradient holds the query's own Q
    model = explained(problem)
    asked = task_outputs(problem, model)
    assert far(-asked[:, None] * expected, expected)


def test_of_several_models_the_two_means_are_taken_apart(problem: Problem) -> None:
    products, residuals = written_out(problem, 3, 0.01)
    expected = products.mean(0) * residuals.mean(0)
    found = trak(3).attribute(problem, problem.task.splits["query"])
    assert close(found, expected)
    assert far((products * residuals[:, None]).mean(0), expected), "one mean of the products is another method"
    assert problem.meter.trainings == 3
    assert not trak().calibrated


def test_value_is_its_own_score(problem: Problem) -> None:
    """score(i, i) for the loss of i: ∇(−ℓ) = Q ∇f."""
    products, residuals = [], []
    for j in range(2):
        model = explained(problem.member(j))
        f = stacked(per_example(model, problem.train, problem.task.objective.measure))
        gram = f.T @ f + len(f) * 0.01 * torch.eye(f.shape[1], dtype=f.dtype)
        products.append((f @ torch.linalg.inv(gram) * f).sum(1))
        outputs = problem.task.outputs(model, problem.train.batch()).detach()
        residuals.append(problem.task.objective.residual(outputs, problem.train.targets))
    expected = -torch.stack(products).mean(0) * torch.stack(residuals).mean(0).square()
    assert close(trak(2).value(problem), expected)


def test_each_model_has_a_projection_of_its_own(problem: Problem) -> None:
    same = problem.member(1).generator("compression").initial_seed()
    assert problem.generator("compression").initial_seed() != same
    task = problem.task
    alike = Problem(task, 0, lambda k: replace(train(task, 0), seed=k))  # one training, told as two
    one = trak(1, Gaussian(5)).attribute(alike, task.splits["query"])
    two = trak(2, Gaussian(5)).attribute(alike, task.splits["query"])
    assert far(one, two), "the same model twice: only the projection differs"
    assert close(trak(1).attribute(alike, task.splits["query"]), trak(2).attribute(alike, task.splits["query"]))


def test_regression_is_of_the_prediction(problem: Problem) -> None:
    task = three_classes()
    rows = {name: replace(split, targets=split.inputs["x"][:, 0] * 2) for name, split in task.splits.items()}
    task = replace(task, splits=rows, objective=Regression())
    problem = problem_of(task)
    model = explained(problem)
    f = stacked(per_example(model, task.train, lambda outputs, targets: outputs[..., 0]))
    q = stacked(per_example(model, task.splits["query"], task.objective.measure))
    gram = f.T @ f + len(f) * 0.01 * torch.eye(f.shape[1], dtype=f.dtype)
    left = task.train.targets - task.outputs(model, task.train.batch()).detach()[:, 0]
    assert close(trak().attribute(problem, task.splits["query"]), q @ torch.linalg.inv(gram) @ f.T * left)


def test_a_singular_gram_is_refused(problem: Problem) -> None:
    with pytest.raises(UserError, match=r"method\.damping\.value=0.*12 training examples.*35"):
        trak(value=0.0).attribute(problem, problem.task.splits["query"])
    trak(value=0.0, compression=Gaussian(6)).attribute(problem, problem.task.splits["query"])
    with pytest.raises(UserError, match=r"method\.k=0"):
        trak(0)


def test_queries_and_batches_do_not_matter(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = problem.task.splits["query"]
    expected = trak(2, Gaussian(5)).attribute(problem, queries)
    fresh = Problem(problem.task, 0, problem.explained)
    order = torch.randperm(len(queries), generator=draw(0))
    monkeypatch.setattr("methods.gradients.per_example.BATCH", 5)
    monkeypatch.setattr("methods.gradients.per_example.FEWEST", 1)
    assert close(trak(2, Gaussian(5)).attribute(fresh, queries.select(order)), expected[order])


@pytest.mark.skipif(importlib.util.find_spec("trak") is None, reason="traker is not installed: make peers")
@pytest.mark.parametrize("k", [1, 2])
def test_trakers_scores(k: int, tmp_path: object) -> None:
    """In float32 on the CPU, λ = 0, the first layer's parameters, fewer than examples (all layers' would be singular: a
    shift of all logits changes no margin). It divides each inverse by its mean absolute entry, model by model."""
    from trak import TRAKer
    from trak.projectors import NoOpProjector

    task = replace(three_classes(), dtype=torch.float32)
    wide = replace(task.train, inputs={"x": torch.randn(80, *task.train.inputs["x"].shape[1:], generator=draw(3))},
                   ids=tuple(map(str, range(80))), targets=torch.arange(80) % 3)  # fmt: skip
    asked = replace(task.splits["query"], inputs={"x": task.splits["query"].inputs["x"].float()})
    task = replace(task, splits={**task.splits, "train": wide, "query": asked})
    problem = Problem(task, 0, partial(train, task))
    queries = task.splits["query"]
    names = ["layers.0.weight", "layers.0.bias"]
    size = sum(p.numel() for name, p in task.initial(0).named_parameters() if name in names)
    assert 10 < size < 80
    ours = replace(trak(k, value=0.0), modules=("layers.0",)).attribute(problem, queries)

    model = task.initial(0)
    traker = TRAKer(
        model=_Rows(model), task="image_classification", train_set_size=80, save_dir=str(tmp_path), proj_dim=size,
        projector=NoOpProjector(device="cpu"), device="cpu", use_half_precision=False, lambda_reg=0.0, logging_level=40,
        grad_wrt=[f"model.{name}" for name in names],
    )  # fmt: skip
    products, scale = [], []
    for j in range(k):
        state = _Rows(load(task.initial(0), problem.trajectory(j).final)).state_dict()
        traker.load_checkpoint(state, model_id=j)
        traker.featurize(batch=[task.train.inputs["x"].float(), task.train.targets], num_samples=80)
        model = explained(problem.member(j))
        f, q = (first(model, examples, task.objective.measure, names) for examples in (task.train, queries))
        inverse = torch.linalg.inv(f.T @ f)
        products.append(q @ inverse @ f.T)
        scale.append(inverse.abs().mean())
    traker.finalize_features()
    x, y = queries.inputs["x"].float(), queries.targets
    for j in range(k):
        state = _Rows(load(task.initial(0), problem.trajectory(j).final)).state_dict()
        traker.start_scoring_checkpoint("scores", state, model_id=j, num_targets=len(queries))
        traker.score(batch=[x, y], num_samples=len(queries))
    theirs = torch.as_tensor(traker.finalize_scores("scores")).T.double()
    _, residuals = written_out(problem, k, 0.01)
    mean = residuals.double().mean(0)
    assert close(torch.stack(products).mean(0) * mean, ours, 1e-3)
    # Theirs divides features by √dimension, and is of several models a mean of differently scaled products: these two
    # scales are the only difference.
    theirs = theirs * size
    scaled = torch.stack([p / s for p, s in zip(products, scale, strict=True)]).mean(0) * mean
    assert close(theirs, scaled, 1e-3)
    assert far(theirs, scaled.flip(0))


def first(model: torch.nn.Module, examples: Examples, of: Scalar, names: list[str]) -> Tensor:
    """The gradients by some parameters, one after the other, (B, P), float64."""
    found = per_example(model, examples, of)
    return torch.stack([torch.cat([g[name].flatten() for name in names]) for g in found]).double()


class _Rows(torch.nn.Module):
    """A model of keyword x as one of a positional argument."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
