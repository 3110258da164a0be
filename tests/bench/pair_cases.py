"""A small task of preference pairs whose bias is planted: an answer is (trait, quality, noise)."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from tasks.base import Annotations, Examples, Recipe, Task
from tasks.objectives.classification import Classification

SEP = "\x1e"
RECIPE = Recipe("sgd", 0.3, 20, 1000, 0.01, "l2", "constant", 0.0, 0.0, (0.9, 0.999), 1e-8, None, 1, 2, 1e-8)


@dataclass(frozen=True)
class Facts:
    trait: tuple[float, float]
    quality: tuple[float, float] | None
    labeller: str | None


class Rewards(nn.Module):
    """x (B, 2, 3) -> (B, 2)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh())[..., 0]


def pairs(name: str, rows: int, seed: int) -> tuple[Examples, dict[str, Facts]]:
    """The better answer is preferred, ties by coin; trait (0 to 6 words) and quality (0 to 3) are independent."""
    rng = np.random.default_rng(seed)
    trait, quality = rng.integers(0, 7, (rows, 2)).astype(float), rng.integers(0, 4, (rows, 2)).astype(float)
    ids = tuple(f"{name}{i}" for i in range(rows))
    x = np.stack([trait / 3 - 1, quality / 2 - 0.75, rng.normal(size=(rows, 2))], -1)
    better = np.where(quality[:, 0] == quality[:, 1], rng.integers(0, 2, rows), quality[:, 1] > quality[:, 0])
    texts = tuple(SEP.join(("what now", *(" ".join(["so"] * int(t)) for t in both))) for both in trait)
    facts = {i: Facts((t[0], t[1]), (q[0], q[1]), None) for i, t, q in zip(ids, trait, quality, strict=True)}
    return Examples(ids, {"x": torch.as_tensor(x)}, torch.as_tensor(better).long(), texts), facts


def pair_task(rows: int = 60, flips: int = 8, test: int = 80, hidden: int = 4) -> Task:
    """The first `flips` training pairs that prefer less of the trait prefer more of it."""
    sizes = {"train": rows, "val": 12, "query": 14, "test": test}
    made = {name: pairs(name, size, seed) for seed, (name, size) in enumerate(sizes.items())}
    splits = {name: rows for name, (rows, _) in made.items()}
    facts = {i: fact for _, some in made.values() for i, fact in some.items()}
    train = splits["train"]
    lead = lead_of(train, facts)
    flipped = np.flatnonzero(lead < 0)[:flips].tolist()
    targets = train.targets.clone()
    targets[flipped] = 1 - targets[flipped]
    return Task(
        name="pairs",
        splits={**splits, "train": replace(train, targets=targets)},
        build=partial(Rewards, hidden),
        objective=Classification(2),
        recipe=RECIPE,
        model="rewards",
        source="generated",
        floor={},
        identity={"version": 1},
        dtype=torch.float64,
        annotations=Annotations(
            frozenset(train.ids[i] for i in flipped), dict(zip(train.ids, train.targets.tolist(), strict=True))
        ),
        facts=facts,
        pairs=True,
        classes=("first", "second"),
    )


def lead_of(rows: Examples, facts: dict[str, Facts]) -> np.ndarray:
    """Trait of the preferred answer − that of the other, row by row."""
    found = []
    for i, chosen in zip(rows.ids, rows.targets.tolist(), strict=True):
        trait = facts[i].trait
        found.append(trait[chosen] - trait[1 - chosen])
    return np.array(found)


def swapped(rows: Examples, which: list[int]) -> Examples:
    """The same pairs, some in the other order."""
    x, targets, texts = rows.inputs["x"].clone(), rows.targets.clone(), list(rows.texts or ())
    for i in which:
        x[i], targets[i] = rows.inputs["x"][i].flip(0), 1 - targets[i]
        if texts:
            prompt, first, second = texts[i].split(SEP)
            texts[i] = SEP.join((prompt, second, first))
    return replace(rows, inputs={"x": x}, targets=targets, texts=tuple(texts) or None)
