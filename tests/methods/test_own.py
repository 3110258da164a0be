"""A model that somebody has trained, from Python: the same answers as in a run, and nothing is trained."""

import numpy as np
import pytest
import torch
from cases import close, problem_of, three_classes
from torch import nn

from bench.run import preset
from bench.suspects import influence, suspects
from methods.base import Unsupported
from methods.own import examples, problem
from tasks.training.train import load


def fitted() -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """Three clouds, one row of each with the label of another."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = np.array([[3.0, 0], [-2, 3], [-2, -3]])[y] + rng.normal(size=(60, 2)) / 2
    y = np.where(np.isin(np.arange(60), (3, 16, 41)), (y + 1) % 3, y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3)).double()
    update = torch.optim.LBFGS(model.parameters(), max_iter=100)

    def loss() -> torch.Tensor:
        update.zero_grad()
        weights = sum(p.pow(2).sum() for p in model.parameters())
        total = nn.functional.cross_entropy(model(torch.tensor(x)), torch.tensor(y)) + 0.005 * weights
        total.backward()
        return total

    update.step(loss)
    return model, x, y


@pytest.mark.parametrize("name", ["graddot", "ekfac", "exact_ggn"])
def test_scores_are_those_of_a_run(name: str) -> None:
    task = three_classes()
    there = problem_of(task)
    model = load(task.initial(0), there.trajectory().final)
    rows = {k: examples(model, s.inputs, s.targets, s.ids) for k, s in task.splits.items()}
    asked = problem(model, rows["train"], l2=task.recipe.l2)
    method = preset(name)
    assert close(method.attribute(asked, rows["query"]), method.attribute(there, task.splits["query"]))


def test_suspects_of_a_model_of_ones_own() -> None:
    model, x, y = fitted()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = examples(model, x.astype(np.float32), y, ids=[f"row {i}" for i in range(60)])
    assert list(rows.inputs) == ["input"] and rows.inputs["input"].dtype == torch.float64
    asked = problem(model, rows, l2=0.01)
    for name in ("self_influence", "loss", "mahalanobis"):
        table = suspects(asked, preset(name))
        assert set(table["id"][:3]) == {"row 3", "row 16", "row 41"}, name
        assert list(table["score"]) == sorted(table["score"]) and len(table) == 60
    first = suspects(asked, preset("loss")).iloc[0]
    assert first["label"] != first["predicted"] and f"says {first['predicted']}" in first["why"]
    assert asked.meter.trainings == 1 and asked.meter.seconds_of_trainings == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the user's model is not touched"
    model[0].weight.data.zero_()
    assert asked.model()[0].weight.abs().sum() > 0, "nor does it change what is explained"


def test_a_method_without_a_value_is_asked_about_val() -> None:
    model, x, y = fitted()
    rows = examples(model, x, y)
    with pytest.raises(Unsupported, match="no value"):
        suspects(problem(model, rows), preset("repsim"))
    clean = [i for i in range(60) if i not in (3, 16, 41)]
    table = suspects(problem(model, rows, val=rows.select(clean[:20])), preset("repsim"))
    assert set(table["id"][:3]) == {"3", "16", "41"} and table["why"][0].startswith("1 of 60 by RepSim, mean over val")


def test_a_regression() -> None:
    x = torch.arange(12.0)[:, None]
    y = 2 * x[:, 0] + 1
    y[7] = -20
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(1.0)
    table = suspects(problem(model, examples(model, x, y)), preset("grad_norm"))
    assert table["id"][0] == "7" and table["predicted"][0] == "15" and "off by 35" in table["why"][0]


def test_named_inputs() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            mask = attention_mask[..., None].float()
            out: torch.Tensor = self.head((self.table(input_ids) * mask).sum(1) / mask.sum(1))
            return out

    torch.manual_seed(0)
    model = Mean()
    ids = torch.randint(9, (10, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = examples(model, inputs, np.arange(10) % 2)
    assert preset("graddot").attribute(problem(model, rows), rows.select([0, 1])).shape == (2, 10)


@pytest.mark.parametrize("name", ["tracin", "loo", "banzhaf"])
def test_what_needs_a_training_is_told(name: str) -> None:
    model, x, y = fitted()
    asked = problem(model, examples(model, x, y))
    assert "epochs=0" in str(preset(name).unmet(asked.task))


def test_influence_lists_the_best_helpers_and_the_worst_opponents() -> None:
    model, x, y = fitted()
    rows = examples(model, x, y, texts=[f"text {i}" for i in range(60)])
    asked = problem(model, rows)
    scores = np.stack([np.arange(60.0), -np.arange(60.0)])
    table = influence(asked.task, asked.trajectory(), rows.select([5, 6]), scores)
    first = table[table["query"] == "5"]
    assert list(first["train"]) == ["59", "58", "57", "56", "55", "0", "1", "2", "3", "4"]
    assert list(first["kind"]) == ["proponent"] * 5 + ["opponent"] * 5 and list(first["rank"]) == [1, 2, 3, 4, 5] * 2
    assert list(table[table["query"] == "6"]["train"][:2]) == ["0", "1"]
    assert set(first["query_text"]) == {"text 5"} and list(first["train_text"][:1]) == ["text 59"]
    assert list(first["train_label"]) == [str(y[int(i)]) for i in first["train"]]
