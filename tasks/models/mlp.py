"""Multi-layer perceptron on vectors; without hidden layers it is softmax regression."""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from tasks.base import Recipe
from tasks.errors import require


class Perceptron(nn.Module):
    """x (B, in) -> (B, out), ReLU between the layers."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for k, (a, b) in enumerate(pairwise(widths)):
            if k:
                layers[f"relu{k}"] = nn.ReLU()
            layers[f"linear{k}"] = nn.Linear(a, b)
        self.layers = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@dataclass(frozen=True)
class MLP:
    """Reads vectors; PyTorch's own initialisation."""

    name: str
    hidden: tuple[int, ...]
    dtype: str
    recipe: Recipe

    def __post_init__(self) -> None:
        require(
            not (self.hidden and self.recipe.optimizer == "lbfgs"),
            "model.recipe.optimizer",
            "lbfgs",
            "sgd or adamw with hidden layers: their loss has no unique optimum",
        )

    def build(self, features: int, classes: int) -> nn.Module:
        return Perceptron([features, *self.hidden, classes])
