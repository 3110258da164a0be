"""Tasks small enough to retrain in a test, in float64, and recipes that differ in one thing."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tasks.base import Annotations, Examples, Recipe, Task
from tasks.models.mlp import Perceptron
from tasks.objectives.classification import Classification

RECIPE: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 0.1,
    "epochs": 3,
    "batch_size": 7,
    "weight_decay": 0.0,
    "decay": "l2",
    "schedule": "constant",
    "warmup": 0.0,
    "momentum": 0.0,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "clip": None,
    "bucket": 1,
    "checkpoints": 3,
    "tolerance": 1e-9,
}
CONVEX: dict[str, Any] = {"hidden": (), "optimizer": "lbfgs", "weight_decay": 0.05, "checkpoints": 1}


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{**RECIPE, **changes})


def vectors(name: str, rows: int, features: int = 4, classes: int = 3, seed: int = 0) -> Examples:
    """Overlapping classes: labels are the largest of noisy linear functions of the features."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=draw, dtype=torch.float64)
    truth = torch.randn(features, classes, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    noise = torch.randn(rows, classes, generator=draw, dtype=torch.float64)
    return Examples(tuple(f"{name}:{i}" for i in range(rows)), {"x": x}, (x @ truth + noise).argmax(1))


def vector_task(rows: int = 24, hidden: tuple[int, ...] = (5,), classes: int = 3, **changes: Any) -> Task:
    """A perceptron on vectors; `changes` are of the recipe."""
    splits = {
        name: vectors(name, size, classes=classes, seed=seed)
        for seed, (name, size) in enumerate({"train": rows, "val": 5, "query": 6, "test": 20}.items())
    }
    return Task(
        name="vectors",
        splits=splits,
        build=partial(Perceptron, [4, *hidden, classes]),
        objective=Classification(classes),
        recipe=recipe(**changes),
        model="small",
        source="generated",
        floor={"accuracy": 0.3},
        identity={"version": 1, "hidden": list(hidden)},
        dtype=torch.float64,
        annotations=Annotations(frozenset({"train:0"}), {}),
    )


class Bag(nn.Module):
    """input_ids, attention_mask (B, T) -> logits (B, C): the mean embedding of what is no padding, after dropout."""

    def __init__(self, vocabulary: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 4)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None].to(self.head.weight.dtype)
        return self.head(self.dropout((self.embedding(input_ids) * mask).sum(1) / mask.sum(1)))


def tokens(name: str, rows: int, longest: int = 9, seed: int = 0) -> Examples:
    """Token rows of 1 to `longest` tokens; 0 is padding."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=draw)
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(1, 12, (rows, longest), generator=draw) * mask
    texts = tuple(" ".join(str(t) for t in row[:n].tolist()) for row, n in zip(ids, lengths, strict=True))
    targets = (ids[:, 0] % 2).long()
    return Examples(
        tuple(f"{name}:{i}" for i in range(rows)), {"input_ids": ids, "attention_mask": mask}, targets, texts
    )


def token_task(rows: int = 23, dropout: float = 0.0, **changes: Any) -> Task:
    splits = {
        name: tokens(name, size, seed=s) for s, (name, size) in enumerate({"train": rows, "val": 4, "query": 5}.items())
    }
    return Task(
        name="tokens",
        splits=splits,
        build=partial(Bag, 12, 2, dropout),
        objective=Classification(2),
        recipe=recipe(**changes),
        model="bag",
        source="generated",
        floor={"accuracy": 0.3},
        identity={"version": 1, "dropout": dropout},
        dtype=torch.float64,
    )


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Equal parameters; tolerance 0 means bit by bit."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)
