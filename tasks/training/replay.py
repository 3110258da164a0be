"""Training as a function of the examples' weights: the steps of `train` once more, differentiable.

A state is (θ, the optimizer's own tensors): of SGD with momentum its buffer, of Adam its two running means. `step` is
smooth in state and weights wherever the model is; what `train` does in place is done here by torch.func.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from tasks.base import Batch, Task
from tasks.training.recipe_steps import batch_order, learning_rates
from tasks.training.train import state as trainable

Parameters = dict[str, Tensor]
State = tuple[Parameters, ...]  # θ first


@dataclass(frozen=True, eq=False)
class Replay:
    """The run of one seed, whose initialisation it starts from; step t (from 0) reads the rows `steps[t]`."""

    task: Task
    model: nn.Module
    start: State
    steps: tuple[Tensor, ...]
    rates: tuple[float, ...]

    def step(self, t: int) -> Callable[[State, Tensor], State]:
        """(state, weights (B,) of the batch's rows) -> the next state."""
        batch, recipe, rate = self.task.train.batch(self.steps[t]), self.task.recipe, self.rates[t]

        def advance(state: State, weights: Tensor) -> State:
            theta = state[0]
            g = grad(lambda p: (self._losses(p, batch) * weights).sum() / len(weights))(theta)
            if recipe.clip is not None:
                norm = torch.stack([part.square().sum() for part in g.values()]).sum().sqrt()
                scale = (recipe.clip / (norm + 1e-6)).clamp(max=1.0)
                g = {name: part * scale for name, part in g.items()}
            if recipe.optimizer == "adamw":
                return self._adam(state, g, t + 1, rate, recipe.weight_decay)
            g = {name: part + recipe.weight_decay * theta[name] for name, part in g.items()}
            if recipe.optimizer == "adam":
                return self._adam(state, g, t + 1, rate, 0.0)
            if recipe.momentum == 0:
                return ({name: p - rate * g[name] for name, p in theta.items()},)
            moving = {name: recipe.momentum * state[1][name] + part for name, part in g.items()}
            return {name: p - rate * moving[name] for name, p in theta.items()}, moving

        return advance

    def _losses(self, theta: Parameters, batch: Batch) -> Tensor:
        outputs = functional_call(self.model, theta, (), batch.inputs)
        return self.task.objective.loss(outputs, batch.targets)

    def _adam(self, state: State, g: Parameters, count: int, rate: float, decay: float) -> State:
        """θ ← (1 − ηγ)θ − η m̂/(√v̂ + ε), γ = `decay`. Where v is 0, so is m, and nothing moves: √ has no
        derivative there."""
        recipe = self.task.recipe
        (b1, b2), theta = recipe.betas, state[0]
        first = {name: b1 * state[1][name] + (1 - b1) * part for name, part in g.items()}
        second = {name: b2 * state[2][name] + (1 - b2) * part.square() for name, part in g.items()}
        moved = {}
        for name, p in theta.items():
            seen = second[name] > 0
            root = torch.where(seen, second[name], 1.0).sqrt() / (1 - b2**count) ** 0.5
            move = torch.where(seen, first[name] / (root + recipe.eps), 0.0)
            moved[name] = p * (1 - rate * decay) - rate / (1 - b1**count) * move
        return moved, first, second

    def states(self, state: State, begin: int, end: int) -> Iterator[State]:
        """The states before the steps begin, begin + 1, ..., end; the one before `begin` is given."""
        yield state
        for t in range(begin, end):
            with torch.no_grad():  # functional gradients are taken nevertheless
                state = self.step(t)(state, torch.ones(len(self.steps[t]), dtype=self.task.dtype))
            yield state


def replay(task: Task, seed: int) -> Replay:
    """The training `train(task, seed)`."""
    model = task.initial(seed).train()
    if task.recipe.optimizer == "lbfgs" or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        raise ValueError("what is solved to its optimum, or draws dropout, is not replayed step by step")
    theta = trainable(model)
    tensors = {"adam": 2, "adamw": 2, "sgd": 1 if task.recipe.momentum > 0 else 0}[task.recipe.optimizer]
    zeros = ({name: torch.zeros_like(p) for name, p in theta.items()} for _ in range(tensors))
    steps = batch_order(torch.arange(len(task.train)), task.train.lengths, task.recipe, seed)
    rates = learning_rates(task.recipe, len(steps))
    return Replay(task, model.requires_grad_(False), (theta, *zeros), tuple(steps), tuple(rates))
