"""The parts of a recipe that every engine shares: batch order, learning rates, optimizer, clipping."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tasks.base import Recipe, generator


def batch_order(rows: Tensor, lengths: Tensor | None, recipe: Recipe, seed: int) -> list[Tensor]:
    """Row indices of every step of a training on `rows` (n,), epoch after epoch.

    Positions are permuted, not rows: subsets of one size and one seed see "the same" order. With `recipe.bucket` b > 1
    pools of b batches are sorted by length and their batches shuffled, so that less of a batch is padding.
    """
    rng = generator("batches", seed)
    steps: list[Tensor] = []
    for _ in range(recipe.epochs):
        order = rows[torch.randperm(len(rows), generator=rng)]
        if lengths is None or recipe.bucket == 1:
            steps.extend(order.split(recipe.batch_size))
            continue
        batches: list[Tensor] = []
        for pool in order.split(recipe.batch_size * recipe.bucket):
            batches.extend(pool[torch.argsort(lengths[pool], stable=True)].split(recipe.batch_size))
        steps.extend(batches[i] for i in torch.randperm(len(batches), generator=rng).tolist())
    return steps


def steps_of(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of a training on so many rows."""
    full, rest = divmod(rows, recipe.batch_size * recipe.bucket)
    return recipe.epochs * (full * recipe.bucket + math.ceil(rest / recipe.batch_size))


def learning_rates(recipe: Recipe, steps: int) -> list[float]:
    """One a step: linear warm-up over `warmup · steps`, then constant, linear or cosine to 0."""
    warm = round(recipe.warmup * steps)

    def rate(t: int) -> float:
        if t < warm:
            return (t + 1) / warm
        done = (t - warm) / max(1, steps - warm)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[recipe.schedule]

    return [recipe.lr * rate(t) for t in range(steps)]


def kept_steps(recipe: Recipe, steps: int) -> list[int]:
    """The steps after which a checkpoint is kept: evenly spaced, the last one is the end."""
    count = min(recipe.checkpoints, steps)
    return [round(steps * (k + 1) / count) for k in range(count)]


def optimizer(recipe: Recipe, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Works element by element, so a stack of models is optimised exactly as each of them alone."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
        )
    if recipe.optimizer == "adam":  # its weight decay is γθ added to the gradient: the L2 term of the objective
        return torch.optim.Adam(
            parameters, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay, fused=True
        )
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay, fused=True
        )
    raise ValueError(f"no step-wise optimizer: {recipe.optimizer}")


def clip(gradients: Sequence[Tensor], limit: float, stacked: bool) -> None:
    """Scales the gradient of each model, in place, to norm `limit` at most; `stacked`: the first axis is the model."""
    models = gradients[0].shape[0] if stacked else 1
    norms = torch.stack([g.reshape(models, -1).norm(dim=1) for g in gradients]).norm(dim=0)  # (M,)
    scale = (limit / (norms + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(scale.view(-1, *[1] * (g.ndim - 1)) if stacked else scale[0])
