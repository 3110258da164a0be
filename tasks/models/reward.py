"""Reward models: what a task of preference pairs asks of one, and a bag of words of the answers."""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tasks.base import Recipe
from tasks.data.preferences import length, sides
from tasks.errors import UserError, require

Encode = Callable[[Sequence[str]], dict[str, Tensor]]

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


class RewardModel(Protocol):
    """Reads pairs as texts (prompt, first and second answer, see tasks/data/preferences.py) and gives two rewards."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def recipe(self) -> Recipe: ...

    def prepare(self, texts: Sequence[str]) -> tuple[Encode, Callable[[], nn.Module], dict[str, Any]]:
        """From the training texts: what makes inputs of texts, the builder of θ0, whose forward(**inputs) -> (B, 2) are
        the rewards of first and second, and what identifies both."""


def reward_model(model: Any, task: str) -> RewardModel:
    """`model`, where it is one; else a line with what is."""
    prepare = getattr(model, "prepare", None)
    if prepare is None or list(inspect.signature(prepare).parameters) != ["texts"]:  # classifiers ask for classes, too
        allowed = "a reward model, as reward_bow"
        raise UserError("model", model.name, f"does not reward answers, as task={task} asks", allowed=allowed)
    return model


class RewardNetwork(nn.Module):
    """x (B, 2, F) -> rewards (B, 2): r = w · ReLU(W x + b), the same of both answers. The last layer has no bias: it
    would add the same to both, which no preference tells."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, hidden)
        self.relu = nn.ReLU()
        self.head = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.layer(x)))[..., 0]

    def forward_stack(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Many models at once: parameters (M, ...) by their names here, x (M, B, 2, F) -> (M, B, 2). Answers are
        columns, (M, width, 2B), as in `Perceptron.forward_stack`."""
        columns = x.flatten(1, 2).mT
        hidden = torch.baddbmm(parameters["layer.bias"][..., None], parameters["layer.weight"], columns)
        return torch.bmm(parameters["head.weight"], self.relu(hidden))[:, 0].unflatten(1, x.shape[1:3])


@dataclass(frozen=True)
class RewardBow:
    """Reads answers, not prompts: log(1 + count) of the `vocabulary` most frequent words of the training answers, and
    log(1 + length in words); one hidden layer of ReLUs."""

    name: str
    vocabulary: int
    hidden: int
    dtype: str
    recipe: Recipe

    def __post_init__(self) -> None:
        require(self.vocabulary >= 1, "model.vocabulary", self.vocabulary, "1 or more")
        require(self.hidden >= 1, "model.hidden", self.hidden, "1 or more")
        if self.dtype not in ("float32", "float64"):
            raise UserError("model.dtype", self.dtype, allowed=("float32", "float64"))
        allowed = "sgd or adamw: the loss has no unique optimum"
        require(self.recipe.optimizer != "lbfgs", "model.recipe.optimizer", "lbfgs", allowed)
        require(self.recipe.epochs > 0, "model.recipe.epochs", self.recipe.epochs, "1 or more")

    def prepare(self, texts: Sequence[str]) -> tuple[Encode, Callable[[], nn.Module], dict[str, Any]]:
        words = frequent(texts, self.vocabulary)
        encode = partial(counts, words, getattr(torch, self.dtype))
        return encode, partial(RewardNetwork, len(words) + 1, self.hidden), {"hidden": self.hidden, "words": words}


def words_of(answer: str) -> list[str]:
    """In small letters; punctuation is none."""
    return WORD.findall(answer.lower())


def frequent(texts: Sequence[str], size: int) -> list[str]:
    """The most frequent words of both answers of all pairs, the more frequent first, ties in the alphabet's order."""
    seen = Counter(word for text in texts for answer in sides(text)[1:] for word in words_of(answer))
    return sorted(seen, key=lambda word: (-seen[word], word))[:size]


def counts(words: Sequence[str], dtype: torch.dtype, texts: Sequence[str]) -> dict[str, Tensor]:
    """x (N, 2, V + 1): log(1 + count) of the words, log(1 + length) last."""
    column = {word: k for k, word in enumerate(words)}
    x = torch.zeros(len(texts), 2, len(words) + 1, dtype=dtype)
    for row, text in enumerate(texts):
        for side, answer in enumerate(sides(text)[1:]):
            found = Counter(column[word] for word in words_of(answer) if word in column)
            x[row, side, list(found)] = torch.tensor(list(found.values()), dtype=dtype)
            x[row, side, -1] = length(answer)
    return {"x": x.log1p()}
