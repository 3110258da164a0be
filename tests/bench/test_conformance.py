"""The conformance suite: our own methods keep the contract, and each way to break it fails the check meant for it."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import config, conformance
from bench.conformance import Result, World, checks
from bench.run import build_method
from methods.base import Method, Problem
from methods.curvature.damping import Damping
from methods.curvature.identity import Identity
from methods.influence import Influence
from tasks.base import Examples
from tasks.errors import UserError
from tasks.training.train import train

ROOT = Path(__file__).parent.parent.parent
FEWER = {  # steps, chains, members: more of them is tested beside the methods
    "lissa": ["method.curvature.depth=60", "method.curvature.batch_size=100"],
    "neumann": ["method.curvature.iterations=30"],
    "astra": ["method.curvature.iterations=20"],
    "ekfac_cg": ["method.curvature.tolerance=0.1"],
    "oporp_datainf": ["method.compression.dimension=512"],
    "loss_covariance": ["method.k=4"],
    "bif": ["method.draws=60", "method.burn_in=20", "method.thin=1"],
    "banzhaf": ["method.subsets=60"],
    "datamodel": ["method.subsets=60"],
    "shapley": ["method.permutations=3", "method.prefixes=10"],
    "beta_shapley": ["method.permutations=8"],
    "prefilter": ["method@method.base=graddot"],
    **{name: ["method@method.base=graddot"] for name in ("dda", "debias", "denoise", "ensemble")},
}
ASKS = ("custom", "from_file")  # for what no preset can know
CHECKS = {
    *("runs", "unchanged", "shapes", "finite", "determinism", "any queries"),
    *("query order", "query alone", "training order", "batch size"),
}


@pytest.fixture(scope="module")
def small() -> dict[str, World]:
    return {world.name: world for world in conformance.worlds()}


def failed(results: list[Result]) -> set[str]:
    return {result.check for result in results if result.status == "failed"}


# Our own methods


@pytest.mark.parametrize("name", [m for m in config.choices("method") if m not in ASKS])
def test_every_preset_conforms(name: str, small: dict[str, World]) -> None:
    method = build_method(config.compose([f"method={name}", *FEWER.get(name, [])]))
    grounds = ("labels", "texts", "pairs"), ("ridge", "descent")  # the next where one lacks what the method needs
    met = [[small[w] for w in ground if method.unmet(small[w].task) is None] for ground in grounds]
    found = checks(method, [ground[0] for ground in met if ground])
    assert not failed(found), "\n".join(str(r) for r in found if r.status == "failed")
    assert sum(r.status == "ok" for r in found) >= 7


def test_a_good_method_is_checked_in_every_world(small: dict[str, World]) -> None:
    found = checks(Broken(), list(small.values()))
    assert all(r.status == "ok" or r.check == "scale" for r in found)
    for name in small:
        assert {r.check for r in found if r.world == name} == CHECKS | {
            "scale" if name in ("ridge", "descent") else "sign"
        }


# Broken ones


@dataclass(frozen=True)
class Broken(Method):
    """Gradient dot products: nothing is broken yet."""

    base: Method = Influence(Identity(), Damping("absolute", 0.0, "global"))  # noqa: RUF009

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        return self.base.attribute(problem, queries)


class Transposed(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        return super().attribute(problem, queries).T


class Whole(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        return super().attribute(problem, queries).sign().long()


class NotANumber(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        scores = super().attribute(problem, queries)
        scores[0, 0] = torch.nan
        return scores


class GlobalRandomness(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        scores = super().attribute(problem, queries)
        return scores * (1 + 1e-4 * torch.randn(scores.shape[1]))


class QueriesOnly(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        known = problem.task.splits["query"].ids
        return super().attribute(problem, queries) * torch.tensor([[1.0 + 0 * known.index(i)] for i in queries.ids])


class QueryOrder(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        return super().attribute(problem, queries) * torch.arange(len(queries), 0, -1)[:, None]


class OtherQueries(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        scores = super().attribute(problem, queries)
        return scores / scores.norm()


class TrainingOrder(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        return super().attribute(problem, queries) * torch.linspace(1, 1.5, len(problem.train))


class BatchMean(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        scores = super().attribute(problem, queries)
        for index in problem.train.batches(256):
            scores[:, index] -= scores[:, index].mean(1, keepdim=True)
        return scores


class Flipped(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        return -super().attribute(problem, queries)


class FlippedValue(Broken):
    def value(self, problem: Problem) -> Tensor:
        return -self.base.value(problem)


class ChangedData(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        scores = super().attribute(problem, queries)
        problem.train.targets[0] += 1
        return scores


class ChangedTraining(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        scores = super().attribute(problem, queries)
        next(iter(problem.trajectory().checkpoints[0].parameters.values())).zero_()
        return scores


class HookLeft(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        next(problem.model().children()).register_forward_hook(lambda *_: None)
        return super().attribute(problem, queries)


class GradMode(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        torch.set_grad_enabled(False)
        return super().attribute(problem, queries)


class DefaultDtype(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        torch.set_default_dtype(torch.float16)
        return super().attribute(problem, queries)


class SilentNeed(Broken):
    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        return super().attribute(problem, queries) * len(problem.train.texts[0].split()[0]) ** 0  # type: ignore[index]


@dataclass(frozen=True)
class Scaled(Method):
    """The exact Gauss-Newton matrix, in another unit."""

    factor: float
    base: Method
    calibrated = True

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        return self.factor * self.base.attribute(problem, queries)


@pytest.mark.parametrize(
    ("broken", "check", "said"),
    [
        (Transposed, "shapes", "not (4, "),
        (Whole, "shapes", "torch.int64"),
        (NotANumber, "finite", "1 of "),
        (GlobalRandomness, "determinism", "problem.generator"),
        (QueriesOnly, "any queries", "ValueError"),
        (QueryOrder, "query order", "changes by"),
        (OtherQueries, "query alone", "changes by"),
        (TrainingOrder, "training order", "changes by"),
        (BatchMean, "batch size", "changes by"),
        (Flipped, "sign", "0% of the queries"),
        (FlippedValue, "sign", "mean value"),
        (ChangedData, "unchanged", "the train rows"),
        (ChangedTraining, "unchanged", "trajectory(0)"),
        (HookLeft, "unchanged", "hooks (1 still there)"),
        (GradMode, "unchanged", "grad mode"),
        (DefaultDtype, "unchanged", "default dtype"),
        (SilentNeed, "runs", "unmet() names nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_broken_fails_its_check_and_no_other(
    broken: type[Broken], check: str, said: str, small: dict[str, World]
) -> None:
    found = checks(broken(), [small["labels"], small["descent"]])
    assert failed(found) == {check}
    worlds = {r.world for r in found if r.status == "failed"}
    assert worlds == ({"labels"} if check == "sign" else {"labels", "descent"})
    assert all(said in r.why for r in found if r.status == "failed")
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32, "contained"


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (100.0, False), (0.01, False), (-1.0, False)])
def test_a_wrong_unit_fails_the_scale(factor: float, passes: bool, small: dict[str, World]) -> None:
    exact = build_method(config.compose(["method=exact_ggn"]))
    found = checks(Scaled(factor, exact), [small["ridge"], small["descent"]])
    assert failed(found) == (set() if passes else {"scale"})
    assert sum(r.check == "scale" and "slope" in r.why for r in found) == 2


def test_an_undeclared_need_shows_where_it_is_not_met(small: dict[str, World]) -> None:
    found = checks(SilentNeed(), [small["labels"], small["texts"]])
    (bad,) = [r for r in found if r.status == "failed"]
    assert (bad.world, bad.check) == ("labels", "runs") and "test_conformance.py, line" in bad.why
    declared = type("Declared", (SilentNeed,), {"needs": frozenset({"texts"})})
    (skipped, *rest) = checks(declared(), [small["labels"], small["texts"]])
    assert skipped.status == "skipped" and "needs texts" in skipped.why and not failed(rest)


@dataclass(frozen=True)
class Noisy(Broken):
    """Column noise from a generator of the problem, one sequence for the rows in their order."""

    size: float = 0.1

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        scores = super().attribute(problem, queries)
        noise = torch.randn(scores.shape[1], generator=problem.generator("noise"), dtype=torch.float64)
        return scores * (1 + self.size * noise)


def test_draws_of_its_own_are_no_dependence_on_the_order(small: dict[str, World]) -> None:
    (order,) = [r for r in checks(Noisy(), [small["labels"]]) if r.check == "training order"]
    assert order.status == "ok" and "another problem.seed" in order.why
    (order,) = [r for r in checks(Noisy(size=10.0), [small["labels"]]) if r.check == "training order"]
    assert order.status == "skipped" and "draws random numbers" in order.why


def test_draws_hide_no_dependence_that_is_larger(small: dict[str, World]) -> None:
    class Both(Noisy):
        def attribute(self, problem: Problem, queries: Examples) -> Tensor:
            return super().attribute(problem, queries) * torch.linspace(1, 10, len(problem.train))

    assert failed(checks(Both(), [small["labels"]])) == {"training order"}


def test_a_method_that_offers_nothing_fails(small: dict[str, World]) -> None:
    found = checks(Method(), list(small.values()))
    assert [r.status for r in found] == ["skipped"] * 5 + ["failed"] and "neither" in found[-1].why


def test_unsigned_methods_are_not_held_to_a_sign(small: dict[str, World]) -> None:
    unsigned = type("Unsigned", (Flipped,), {"signed": False})
    (result,) = [r for r in checks(unsigned(), [small["labels"]]) if r.check == "sign"]
    assert (result.status, result.why) == ("skipped", "declares signed = False")


def test_settings_that_are_possible_nowhere_are_a_users_mistake(small: dict[str, World]) -> None:
    method = build_method(config.compose(["method=nystroem", "method.curvature.rank=5000"]))
    with pytest.raises(UserError, match=r"method\.curvature\.rank=5000"):
        checks(method, list(small.values()))
    with pytest.raises(UserError, match=r"methods\.base\.Method"):
        checks(object(), list(small.values()))  # type: ignore[arg-type]


# Worlds


@pytest.mark.parametrize("name", ["labels", "texts", "pairs"])
def test_copies_are_of_the_query_with_its_label_or_another(name: str, small: dict[str, World]) -> None:
    world, task = small[name], small[name].task
    assert world.right is not None and world.wrong is not None
    assert world.right.sum(1).eq(2).all() and world.wrong.sum(1).eq(1).all() and not (world.right & world.wrong).any()
    for q in range(len(world.queries)):
        for mask, same in ((world.right, True), (world.wrong, False)):
            rows = task.train.select(mask[q].nonzero()[:, 0])
            query = world.queries.select([q]).batch()
            assert ((rows.targets == query.targets) == same).all()
            for key, value in rows.batch().inputs.items():
                assert torch.equal(value, query.inputs[key].expand_as(value))
            if rows.texts is not None and world.queries.texts is not None:
                assert set(rows.texts) == {world.queries.texts[q]}


def test_the_closed_form_is_what_retraining_gives(small: dict[str, World]) -> None:
    world = small["ridge"]
    task, effects = world.task, conformance.left_out(world.task)
    batch = world.queries.batch()

    def measured(parameters: dict[str, Tensor]) -> Tensor:
        model = task.initial(0)
        model.load_state_dict(parameters)
        with torch.no_grad():
            return task.measure(model, batch)

    whole = measured(world.explained(0).final)
    for i in (0, 7, 31):
        weights = torch.ones(len(task.train), dtype=torch.float64)
        weights[i] = 0
        torch.testing.assert_close(effects[:, i], whole - measured(train(task, 0, weights).final), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(measured(small["descent"].explained(0).final), whole, atol=1e-3, rtol=1e-3)


def test_the_order_of_rows_means_nothing_to_the_trainings(small: dict[str, World]) -> None:
    for world in small.values():
        task = world.task
        backwards = task.train.select(list(reversed(range(len(task.train)))))
        again = train(replace(task, splits={**task.splits, "train": backwards}), world.explained(0).seed)
        for name, parameter in world.explained(0).final.items():
            torch.testing.assert_close(again.final[name], parameter, atol=1e-6, rtol=1e-4)


# The command

MINE = """
from dataclasses import dataclass
import torch
from methods.base import Method

@dataclass(frozen=True)
class Mine(Method):
    factor: float = 1.0
    signed = False

    def value(self, problem):
        return self.factor * torch.arange(len(problem.train)) + problem.train.targets
"""


def test_the_command_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_methods.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["method=custom", "method._target_=my_methods.Mine"]
    assert conformance.main([*command, "method.factor=1.5"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if " training order " in line and "failed: changes by" in line]) == 5
    assert lines[-1].endswith(" skipped") and "5 failed" in lines[-1]
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# Mine\n_target_: my_methods.Mine\nfactor: 0.0\n")
    assert conformance.main(["--config-dir", str(tmp_path), "method=mine"]) == 0
    assert " 0 failed" in capsys.readouterr().out


def test_a_stranger_runs_it_from_his_folder(tmp_path: Path) -> None:
    (tmp_path / "my_methods.py").write_text(MINE)
    command = [sys.executable, "-m", "bench.conformance", "method=custom", "method._target_=my_methods.Mine"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "method.factor=0.0"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "labels   runs            ok" in done.stdout and " 0 failed" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["my_methods.py"], "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["method=nothing"], "method=nothing is unknown"),
        (["method=ekfac", "method.dampin.value=1"], "method.dampin is no key"),
        (["method=ekfac", "task=digits"], "task has no place here"),
        (["ekfac"], "ekfac has no place here"),
        (["-m", "method=ekfac"], "--multirun is not possible"),
        (["--config-dir", "nowhere", "method=ekfac"], "--config-dir=nowhere is no folder"),
        (["method=custom", "method._target_=nowhere.Nothing"], "cannot be imported"),
        (["method=custom", "method._target_=fractions.Fraction"], "derive it from methods.base.Method"),
        (["method=ekfac", "device=nothing"], "device=nothing is not at hand"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main(arguments) == 2
    output = capsys.readouterr()
    assert said in output.err and output.err.count("\n") == 1 and output.out == ""


def test_help_is_printed_where_nothing_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main([]) == 0 and conformance.main(["--help"]) == 0
    assert capsys.readouterr().out.count("python -m bench.conformance method=ekfac") == 2
