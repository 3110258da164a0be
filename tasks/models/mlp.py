"""Multi-layer perceptron on vectors; without hidden layers it is softmax or linear regression."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tasks.base import Recipe
from tasks.errors import UserError, require
from tasks.models.custom import Custom, Weights, read_weights, require_start, started

MADE_FOR = {"linear": "regression", "logreg": "classification", "logreg_mnist": "classification"}

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class Perceptron(nn.Module):
    """x (B, in) -> (B, out), an activation between the layers, and dropout after each where there is any."""

    def __init__(self, widths: list[int], dropout: float = 0.0, activation: str = "relu") -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for k, (a, b) in enumerate(pairwise(widths)):
            if k:
                layers[f"{activation}{k}"] = ACTIVATIONS[activation]()
            if k and dropout > 0:
                layers[f"dropout{k}"] = nn.Dropout(dropout)
            layers[f"linear{k}"] = nn.Linear(a, b)
        self.layers = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def forward_stack(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Many perceptrons at once: parameters (M, ...) by their names here, x (M, B, in) -> (M, B, out).

        Examples are columns, (M, width, B): a layer with few outputs, as classes are, is then a product with few rows,
        which BLAS does several times faster than one with few columns.
        """
        x = x.mT
        for name, layer in self.layers.named_children():
            if isinstance(layer, nn.Linear):
                weight, bias = parameters[f"layers.{name}.weight"], parameters[f"layers.{name}.bias"]
                x = torch.baddbmm(bias[..., None], weight, x)
            else:
                x = layer(x)
        return x.mT


@dataclass(frozen=True)
class MLP:
    """Reads vectors; PyTorch's own initialisation, or the weights in the file `path`."""

    name: str
    hidden: tuple[int, ...]
    dropout: float
    dtype: str
    recipe: Recipe
    activation: str = "relu"
    path: str | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError("model.activation", self.activation, allowed=ACTIVATIONS)
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "0 <= dropout < 1")
        require(
            not (self.hidden and self.recipe.optimizer == "lbfgs"),
            "model.recipe.optimizer",
            "lbfgs",
            "sgd or adamw with hidden layers: their loss has no unique optimum",
        )
        require_start(self.path, self.recipe)

    @cached_property
    def start(self) -> Weights | None:
        return None if self.path is None else read_weights(self.path)

    def build(self, features: int, outputs: int) -> nn.Module:
        return started(Perceptron([features, *self.hidden, outputs], self.dropout, self.activation), self.start)

    def identity(self) -> dict[str, object]:
        """What tells two of one name apart."""
        smooth = {} if self.activation == "relu" else {"activation": self.activation}
        start = {} if self.start is None else {"start": self.start.fingerprint}
        return {"hidden": list(self.hidden), "dropout": self.dropout, **smooth, **start}


def vector_model(model: Any, task: str, kind: str, fitting: Sequence[str]) -> MLP | Custom:
    """`model`, where it can learn a regression or classification (`kind`) from vectors; else a line with what can."""
    if not isinstance(model, MLP | Custom):
        raise UserError("model", model.name, f"does not read vectors, which task={task} gives", allowed=fitting)
    if MADE_FOR.get(model.name, kind) != kind:
        raise UserError(
            "model", model.name, f"is for {MADE_FOR[model.name]}, task={task} asks for {kind} here", allowed=fitting
        )
    return model
