"""Tables of numbers: splits, standardisation, kinds; exact influence on the convex models that go with them."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn import datasets
from small_tasks import CONVEX, recipe

from tasks.base import Task
from tasks.data.corruption import Corruption
from tasks.errors import UserError
from tasks.models.mlp import MLP
from tasks.objectives.classification import Classification
from tasks.objectives.regression import Regression
from tasks.tabular import standardised, tabular
from tasks.training.engines import Executor
from tasks.training.plan import leave_one_out, planned
from tasks.training.retrain import retrain
from tasks.training.train import load, train

CONF = Path(__file__).parents[2] / "conf"

SOLVED = recipe(**{k: v for k, v in CONVEX.items() if k != "hidden"})
MLP_TABULAR = MLP("mlp_tabular", (8,), 0.0, "float64", recipe())
LINEAR, LOGREG = (MLP(name, (), 0.0, "float64", SOLVED) for name in ("linear", "logreg"))
FLOOR = {"accuracy": 0.8, "r2": 0.2}


def made(data: str = "wine", model: Any = MLP_TABULAR, rate: float = 0.0, **changes: Any) -> Task:
    keys: dict[str, Any] = dict.fromkeys(("data_dir", "target", "n_train", "n_val", "n_query"))
    keys |= {"kind": "auto", "seed": 0, "corruption": Corruption(rate, "uniform"), "floor": FLOOR, **changes}
    return tabular(model, data, **keys)


def shipped(model: str) -> MLP:
    """The model of the project's own YAML."""
    return instantiate(OmegaConf.load(CONF / "model" / f"{model}.yaml"), _convert_="all")


def fit(task: Task) -> bool:
    """Whether a trained model reaches the task's floor on test."""
    model, test = load(task.initial(0), train(task, 0).final), task.splits["test"]
    with torch.no_grad():
        found = task.objective.fitness(task.outputs(model, test.batch()), test.targets)
    return all(found[name] >= floor for name, floor in task.floor.items())


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as told:
        make()
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("data", "sizes"),
    [("breast_cancer", (341, 57, 85, 86)), ("wine", (107, 18, 27, 26)), ("diabetes", (265, 44, 66, 67))],
)
def test_a_bundled_set_becomes_a_task(data: str, sizes: tuple[int, ...]) -> None:
    task, source = made(data), getattr(datasets, f"load_{data}")()
    assert tuple(len(task.splits[s]) for s in ("train", "val", "query", "test")) == sizes
    assert (task.name, task.source, task.identity["data"]) == ("tabular", data, data)
    ids = [i for split in task.splits.values() for i in split.ids]
    assert sorted(map(int, ids)) == list(range(len(source.target)))
    rows = [int(i) for i in task.train.ids]
    mean, sd = source.data[rows].mean(0), source.data[rows].std(0)
    for split in task.splits.values():
        mine = [int(i) for i in split.ids]
        np.testing.assert_allclose(split.inputs["x"].numpy(), (source.data[mine] - mean) / sd, atol=1e-12)
        targets = source.target[mine]
        if data == "diabetes":
            targets = (targets - source.target[rows].mean()) / source.target[rows].std()
        np.testing.assert_allclose(split.targets.numpy(), targets, atol=1e-12)
    if data == "diabetes":
        assert isinstance(task.objective, Regression) and dict(task.floor) == {"r2": 0.2}
        assert task.train.targets.dtype == torch.float64
    else:
        assert task.objective == Classification(len(set(source.target))) and dict(task.floor) == {"accuracy": 0.8}
        assert task.train.targets.dtype == torch.long
    assert made(data, replace(MLP_TABULAR, dtype="float32")).train.inputs["x"].dtype == torch.float32


def test_what_is_constant_in_training_is_zero_everywhere() -> None:
    columns = np.array([[0.1, 1.0, 5.0], [0.1, 3.0, 5.0], [0.1, 2.0, 7.0]])
    found = standardised(columns, np.array([0, 1]))
    assert found.tolist() == [[0, -1, 0], [0, 1, 0], [0, 0, 0]]
    assert (standardised(np.full((9, 1), 0.1), np.arange(9)) == 0).all(), "rounding is no spread"


def test_the_seed_is_the_data_and_the_set_is_in_the_key() -> None:
    assert made(seed=1).key() == made(seed=1).key() != made(seed=2).key()
    assert made(rate=0.1).key() != made().key()
    assert made(rate=0.1).train.ids == made().train.ids
    assert made(model=replace(MLP_TABULAR, dropout=0.1)).key() != made().key()
    assert made(model=replace(MLP_TABULAR, dropout=0.1)).fingerprint() == made().fingerprint()
    assert made(kind="regression").key() != made().key()


def test_flips_are_of_the_training_split() -> None:
    task, source = made(rate=0.1), datasets.load_wine()
    assert task.annotations is not None and len(task.annotations.flipped) == 11
    for name, split in task.splits.items():
        wrong = {i for i, y in zip(split.ids, split.targets.tolist(), strict=True) if y != source.target[int(i)]}
        assert wrong == (task.annotations.flipped if name == "train" else set())
    assert "task.corruption.rate=0.1 is not possible; allowed: 0 with regression" in refused(
        lambda: made("diabetes", rate=0.1)
    )


def test_sizes_are_shares_or_numbers() -> None:
    task = made(n_train=50, n_query=100)
    assert [len(task.splits[s]) for s in ("train", "val", "query", "test")] == [50, 18, 100, 10]
    said = refused(lambda: made(n_train=133))
    assert "task.n_train + n_val + n_query=178 is not possible; allowed: at most 177 together (wine has 178" in said
    assert len(made(n_train=132).splits["test"]) == 1
    assert "task.n_val=0 is not possible" in refused(lambda: made(n_val=0))


def test_models_go_with_kinds() -> None:
    assert made(model=LOGREG).recipe is made("diabetes", LINEAR).recipe is SOLVED
    said = refused(lambda: made(model=LINEAR))
    assert "model=linear is for regression, task=tabular asks for classification" in said and "allowed: logreg" in said
    said = refused(lambda: made("diabetes", LOGREG))
    assert "model=logreg is for classification, task=tabular asks for regression" in said and "allowed: linear" in said
    assert made(model=LINEAR, kind="regression").objective == Regression()
    assert "model=bert does not read vectors" in refused(lambda: made(model=type("Model", (), {"name": "bert"})()))
    assert [p.shape for p in made("diabetes", LINEAR).initial(0).parameters()] == [(1, 10), (1,)]
    assert [p.shape for p in made(model=LOGREG).initial(0).parameters()] == [(3, 13), (3,)]
    with pytest.raises(UserError, match=r"model\.dropout=1\.0 .*0 <= dropout < 1"):
        replace(MLP_TABULAR, dropout=1.0)


def csv(place: Path, targets: list[str]) -> str:
    rng = np.random.default_rng(0)
    rows = [f"{a},{b},{y}" for (a, b), y in zip(rng.normal(size=(len(targets), 2)), targets, strict=True)]
    path = place / "mine.csv"
    path.write_text("\n".join(["a,b,y", *rows]), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        (["red", "blue"] * 20, "classification"),
        (["10", "9"] * 20, "classification"),
        ([str(i % 20) for i in range(120)], "classification"),
        ([str(i % 21) for i in range(126)], "regression"),
        (["0.5", "1"] * 20, "regression"),
    ],
    ids=["text", "two_numbers", "twenty_numbers", "more_numbers", "fractions"],
)
def test_the_kind_of_a_csv_files_targets(tmp_path: Path, targets: list[str], kind: str) -> None:
    path = csv(tmp_path, targets)
    task = made("folder", data_dir=path, target="y")
    assert (task.source, task.identity["data"], task.identity["kind"]) == ("mine", "mine", kind)
    if kind == "classification":
        order = sorted(set(targets), key=float if targets[0].isdigit() else str)
        for split in task.splits.values():
            assert [order[y] for y in split.targets.tolist()] == [targets[int(i)] for i in split.ids]
    else:
        assert made("folder", data_dir=path, target="y", kind="classification").objective.name == "classification"
    if targets[0].isdigit():
        assert made("folder", data_dir=path, target="y", kind="regression").objective.name == "regression"


def test_impossible_kinds_and_places_are_refused(tmp_path: Path) -> None:
    path = csv(tmp_path, [str(i + 0.5) for i in range(30)])
    said = refused(lambda: made("folder", data_dir=path, target="y", kind="classification"))
    assert "task.kind=classification is not possible; allowed: with 2 to 15 classes (mine has 30 in 30 rows)" in said
    path = csv(tmp_path, ["same"] * 30)
    assert "mine has 1 in 30 rows" in refused(lambda: made("folder", data_dir=path, target="y"))
    boat = tmp_path / "boat"
    boat.mkdir()
    for name, content in {"data": "1 2 0.5\n" * 20, "index_features": "0\n1\n", "index_target": "2\n"}.items():
        (boat / f"{name}.txt").write_text(content)
    assert len(made("folder", LINEAR, data_dir=str(boat)).train) == 12, (
        "a benchmark keeps its repetitions and its shares"
    )
    for key in ("target", "id", "clean", "query_file"):
        said = refused(lambda key=key: made("folder", LINEAR, data_dir=str(boat), **{key: "2"}))
        assert f"task.{key}=2 is not possible; a UCI folder names its columns itself" in said
    assert "task.kind=ordinal" in refused(lambda: made(kind="ordinal"))
    assert "task.data=iris is unknown; allowed: breast_cancer, wine, diabetes, folder" in refused(lambda: made("iris"))
    assert "add task.data=folder" in refused(lambda: made(data_dir=path))
    assert "task.target=y is not for task.data=wine" in refused(lambda: made(target="y"))


def test_targets_without_spread_are_unfit_and_no_crash(tmp_path: Path) -> None:
    task = made("folder", LINEAR, data_dir=csv(tmp_path, ["1.5"] * 30), target="y", kind="regression")
    assert all((split.targets == 0).all() for split in task.splits.values()) and not fit(task)


def test_the_projects_floors_are_those_of_the_tests() -> None:
    """Of a benchmark; of a user's file what always saying the most frequent label reaches."""
    unset = OmegaConf.load(CONF / "task" / "tabular.yaml").task.floor
    assert unset == {"accuracy": None, "r2": None}
    assert made("wine", floor=unset).floor == {"accuracy": 0.8} and made("diabetes", LINEAR, floor=unset).floor == {
        "r2": 0.2
    }


@pytest.mark.parametrize(
    ("data", "model"),
    [(data, "mlp_tabular") for data in ("breast_cancer", "wine", "diabetes")]
    + [("breast_cancer", "logreg"), ("wine", "logreg"), ("diabetes", "linear")],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_projects_models_reach_the_floor(data: str, model: str, seed: int) -> None:
    assert fit(made(data, shipped(model), seed=seed))


SETS = {"energy": 768, "yacht": 308, "kin8nm": 8192, "wine-quality-red": 1599}


@pytest.mark.skipif("BENCH_DATA" not in os.environ, reason="BENCH_DATA names no folder with real data")
@pytest.mark.parametrize("name", SETS)
def test_real_uci_sets_are_regressions_above_the_floor(name: str) -> None:
    if not (Path(os.environ["BENCH_DATA"]) / "uci_regression" / name).is_dir():
        pytest.skip(f"BENCH_DATA has no uci_regression/{name}/")
    for model in ("mlp_tabular", "linear"):
        task = made("folder", shipped(model), data_dir=name)
        assert sum(len(s) for s in task.splits.values()) == SETS[name] and isinstance(task.objective, Regression)
        assert fit(task)


@pytest.mark.parametrize(("data", "model", "removal"), [("diabetes", "linear", 0.95), ("wine", "logreg", 0.85)])
def test_exact_influence_foretells_leave_one_out(data: str, model: str, removal: float, tmp_path: Path) -> None:
    """At the optimum of a convex objective the exact GGN, undamped, is the derivative by an example's weight itself:
    correlation and slope are 1. A whole removal differs from it by the leverage of the example, which grows with the
    parameters of the model and with a query's curvature: the linear model keeps it small."""
    from methods.base import Problem
    from methods.curvature.damping import Damping
    from methods.curvature.dense import Dense
    from methods.influence import Influence

    task = made(data, shipped(model)).public()
    rows = range(0, len(task.train), 3)
    problem = Problem(task, 0, lambda k: train(task, k))
    method = Influence(Dense("ggn", "global", 1.0), Damping("absolute", 0.0, "global"))
    scores = method.attribute(problem, task.splits["query"])[:, list(rows)].numpy()
    n = len(task.train)
    for weight, least in ((0.99, 0.999), (0.0, removal)):
        weights = torch.cat([torch.ones(1, n, dtype=torch.float64), leave_one_out(n, rows, weight)])
        measured = retrain(task, planned(weights, 1, "fixed", 0, 0), tmp_path, Executor("auto", 1))["query"]
        effects = ((measured[0] - measured[1:]) / (1 - weight)).T  # (Q, rows)
        found = [np.corrcoef(s, e)[0, 1] for s, e in zip(scores, effects, strict=True)]
        assert np.mean(found) > least
        if weight:
            assert np.mean((scores * effects).sum(1) / (scores**2).sum(1)) == pytest.approx(1.0, abs=0.02)


def test_a_method_that_needs_labels_says_so_in_one_line() -> None:
    from methods.baselines import SameLabel

    assert SameLabel().unmet(made("wine")) is None
    assert SameLabel().unmet(made("diabetes")) == "needs class labels, which task=tabular does not have"
