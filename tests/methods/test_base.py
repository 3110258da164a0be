"""A problem shows the public side only, makes things once and keeps count."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import close, far, parameters, problem_of, three_classes

from methods.base import Method, Problem, Unsupported, require_eval, started, until
from methods.baselines import Loss, Random
from methods.gradients.blocks import blocks_of
from methods.gradients.per_example import gradients, plain
from tasks.base import Annotations, Checkpoint, Task, Trajectory
from tasks.training.engines import measured, one_by_one
from tasks.training.plan import Plan
from tasks.training.train import load, train


def test_a_task_with_annotations_is_refused() -> None:
    task = three_classes()
    flipped = replace(task, annotations=Annotations(frozenset({"train0"}), {"train0": 1}))
    generated = replace(task, facts={"train0": "a sentence with a known cause"})
    for secret in (flipped, generated, replace(task, annotations=Annotations())):
        with pytest.raises(ValueError, match=r"public side only.*task\.public\(\)"):
            problem_of(secret)
        assert problem_of(secret.public()).train is task.train


def test_once_makes_a_thing_once() -> None:
    problem, made = problem_of(three_classes()), []

    def make() -> list[int]:
        made.append(1)
        return [len(made)]

    first = problem.once(("a", 1), make)
    assert problem.once(("a", 1), make) is first and len(made) == 1
    assert problem.once(("a", 2), make) is not first and len(made) == 2
    assert problem_of(three_classes()).once(("a", 1), make) is not first  # another problem, another thing
    nothing: list[None] = [problem.once("nothing", lambda: made.append(1)) for _ in range(2)]
    assert nothing == [None, None] and len(made) == 4


def test_trajectories_are_charged_once_each() -> None:
    task, asked = three_classes(), []

    def explained(k: int) -> Trajectory:
        asked.append(k)
        return replace(train(task, k), seconds=2.0)

    problem = Problem(task, 0, explained)
    assert problem.meter.trainings == 0
    for _ in range(3):
        problem.model()
        assert problem.trajectory() is problem.trajectory(0)
    assert asked == [0]
    assert (problem.meter.trainings, problem.meter.seconds_of_trainings) == (1, 2.0)
    second = problem.trajectory(1)
    problem.trajectory(1)
    assert asked == [0, 1]
    assert (problem.meter.trainings, problem.meter.seconds_of_trainings) == (2, 4.0)
    name = "layers.0.weight"
    assert far(second.final[name], problem.trajectory().final[name])


def test_members_and_earlier_states_are_problems_of_their_own() -> None:
    task = three_classes()
    problem = Problem(task, 0, lambda k: replace(train(task, k), seconds=2.0))
    second, base = problem.member(1), problem.at(started, "base")
    assert problem.member(0) is problem
    assert torch.equal(second.trajectory().final["layers.0.weight"], problem.trajectory(1).final["layers.0.weight"])
    assert torch.equal(base.trajectory().final["layers.0.weight"], problem.trajectory().initial["layers.0.weight"])
    assert len(problem.trajectory().checkpoints) > 2
    first = problem.at(until(0), "checkpoint", 0)
    assert len(first.trajectory().checkpoints) == 1
    start = problem.trajectory().checkpoints[0].parameters["layers.0.weight"]
    assert torch.equal(dict(first.model().named_parameters())["layers.0.weight"], start)
    # The base of the second member, whichever way it is asked for.
    for both in (second.at(started, "base"), base.member(1)):
        assert torch.equal(both.trajectory().final["layers.0.weight"], problem.trajectory(1).initial["layers.0.weight"])
    assert (problem.meter.trainings, problem.meter.seconds_of_trainings) == (2, 4.0), "each training is charged once"
    assert second.meter is base.meter is problem.meter
    assert second.fits is not problem.fits
    draws = [p.generator("labels").initial_seed() for p in (problem, second, problem.member(2), base, first)]
    assert len(set(draws)) == 5, "what is drawn for one of them is not drawn for another"
    assert draws[1] == problem.member(1).generator("labels").initial_seed()


def test_problems_do_not_share_what_they_keep() -> None:
    one, other = problem_of(three_classes()), problem_of(three_classes())
    one.trajectory()
    one.meter.gradients += 5
    assert (other.meter.trainings, other.meter.gradients) == (0, 0)


def test_models_are_explained_ones_in_eval_mode_and_frozen() -> None:
    task = three_classes()
    start = {n: torch.full_like(p, 0.25) for n, p in parameters(task.initial(0)).items()}
    middle = {n: p + 1 for n, p in start.items()}
    trajectory = Trajectory(0, start, (Checkpoint(1, middle, 1.0), Checkpoint(2, start, 1.0)), 0.0, 0.0)
    problem = Problem(task, 0, lambda k: trajectory)
    for model, expected in ((problem.model(), start), (problem.model(middle), middle)):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        for name, p in model.named_parameters():
            assert torch.equal(p, expected[name])
    with torch.no_grad():  # a model is the caller's own
        next(problem.model().parameters()).zero_()
    assert torch.equal(next(problem.model().parameters()), next(iter(start.values())))


def test_generators_are_named_and_seeded() -> None:
    problem = problem_of(three_classes())

    def draws(problem: Problem, *name: object) -> list[float]:
        return torch.rand(4, generator=problem.generator(*name)).tolist()

    assert draws(problem, "a") == draws(problem, "a")
    found = [draws(problem, *name) for name in (("a",), ("b",), ("a", "b"), ("ab",), ("a", 1))]
    assert len({tuple(d) for d in found}) == 5
    assert draws(problem_of(three_classes(), seed=1), "a") != draws(problem, "a")


def test_train_mode_is_refused_by_name() -> None:
    model = problem_of(three_classes()).model()
    require_eval(model)
    model.get_submodule("layers.1").train()
    with pytest.raises(RuntimeError, match=r"train mode.*layers\.1"):
        require_eval(model)


def test_retrainings_measure_any_examples_and_are_charged_once_each() -> None:
    task, asked = three_classes(), []

    def retraining(given: Task, plan: Plan) -> dict[str, np.ndarray]:
        asked.append(given)
        return one_by_one(given, plan) | {"seconds": np.array([2.0, np.nan])}

    problem = Problem(task, 0, lambda k: train(task, k), retraining=retraining)
    plan = Plan(torch.ones(2, len(task.train), dtype=torch.float64), (3, 4), own_batches=True)
    queries = task.splits["query"]
    found = problem.retrained(plan, queries)
    wanted = np.stack([measured(task, load(task.initial(seed), train(task, seed).final), "query") for seed in (3, 4)])
    assert close(found, torch.as_tensor(wanted)) and not close(found[0], found[1])
    assert close(problem.retrained(plan, queries.select([2, 0])), found[:, [2, 0]])
    assert all(given is task for given in asked), "the store of the task itself serves its own splits"
    turned = replace(queries, targets=(queries.targets + 1) % 3)  # the ids of queries, and other labels
    assert far(problem.retrained(plan, turned), found) and asked[-1] is not task
    both = problem.retrained(plan, task.train.select([0, 1]))
    assert both.shape == (2, 2) and close(both, problem.retrained(plan, task.train)[:, :2])
    assert (problem.meter.trainings, problem.meter.seconds_of_trainings) == (2, 2.0)
    assert problem.meter.waited > 0
    assert close(problem.member(1).retrained(plan, queries), found), "whatever is explained"
    with pytest.raises(Unsupported, match="retrained"):
        problem_of(task).retrained(plan, queries)


def test_what_a_method_does_not_offer_is_unsupported() -> None:
    problem = problem_of(three_classes())
    method = Method()
    with pytest.raises(Unsupported, match="scores no query"):
        method.attribute(problem, problem.train)
    with pytest.raises(Unsupported, match="no value"):
        method.value(problem)
    assert not method.offers("attribute") and not method.offers("value")
    assert Random().offers("attribute") and Random().offers("value")
    assert Loss().offers("value") and not Loss().offers("attribute")
    assert method.unmet(three_classes()) is None and not method.calibrated


def test_dense_gradients_by_block() -> None:
    task = three_classes()
    model = problem_of(task).model()
    blocks = blocks_of(model)
    for index, found in gradients(task, model, task.train, blocks, task.objective.loss):
        by_name = {g.block.name: g.dense() for g in plain(found)}
        assert list(by_name) == [b.name for b in blocks]
        for f in found:
            assert by_name[f.block.name].shape == (len(index), *f.block.shape)
            assert close(by_name[f.block.name], torch.einsum("bto,bti->boi", f.outputs, f.inputs))
