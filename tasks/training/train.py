"""One training: the sequential reference that every engine must equal."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tasks.base import Checkpoint, Task, Trajectory
from tasks.training.minimise import minimise
from tasks.training.recipe_steps import batch_order, clip, kept_steps, learning_rates, optimizer


def train(
    task: Task,
    seed: int,
    weights: Tensor | None = None,
    own_batches: bool = False,
    keep: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Trajectory:
    """θ0 and batch order from `seed`; minimises the batch means of wᵢ ℓᵢ (+ ½γ‖θ‖²).

    `weights` (N,), default 1. With `own_batches` the batches are drawn from the rows of positive weight; else from all
    rows, and a row of weight 0 is masked inside its batch, whose denominator stays. `keep` = False keeps the end only.
    """
    started = time.perf_counter()
    rows = torch.arange(len(task.train))
    if weights is None:
        weights = torch.ones(len(rows), dtype=task.dtype)
    weights = weights.to(task.dtype)
    if own_batches:
        rows = rows[weights > 0]
    model = task.initial(seed)
    initial = state(model)
    if task.recipe.epochs == 0:
        untrained, start = (Checkpoint(0, state(model), 0.0),), _mean_loss(task, model, weights, rows)
        return Trajectory(seed, initial, untrained, time.perf_counter() - started, start)
    if task.recipe.optimizer == "lbfgs":
        final, loss = minimise(task, weights[None], torch.tensor([len(rows)]))
        end = {name: value[0] for name, value in final.items()}
        kept = (Checkpoint(1, end, 1.0),)
        return Trajectory(seed, initial, kept, time.perf_counter() - started, float(loss[0]))

    steps = batch_order(rows, task.train.lengths, task.recipe, seed)
    rates = learning_rates(task.recipe, len(steps))
    keeping = set(kept_steps(task.recipe, len(steps)) if keep else [len(steps)])
    parameters = [p for p in model.parameters() if p.requires_grad]
    update = optimizer(task.recipe, parameters)
    checkpoints: list[Checkpoint] = []
    path, value = 0.0, torch.zeros(())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        model.train()
        for t, (index, rate) in enumerate(zip(steps, rates, strict=True), start=1):
            for group in update.param_groups:
                group["lr"] = rate
            losses = task.loss(model, task.train.batch(index))
            value = (losses * weights[index]).sum() / len(index)
            update.zero_grad(set_to_none=True)
            value.backward()
            if task.recipe.clip is not None:
                clip([p.grad for p in parameters if p.grad is not None], task.recipe.clip, stacked=False)
            update.step()
            path += rate
            if t in keeping:
                checkpoints.append(Checkpoint(t, state(model), path, _moments(model, update)))
                path = 0.0
            if progress is not None:
                progress(t, len(steps))
    return Trajectory(seed, initial, tuple(checkpoints), time.perf_counter() - started, float(value.detach()))


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _mean_loss(task: Task, model: nn.Module, weights: Tensor, rows: Tensor) -> float:
    """Of the rows, each with its weight: what a training would start at."""
    total = sum(float((task.loss(model, task.train.batch(i)) * weights[i]).sum()) for i in rows.split(256))
    return total / len(rows)


def _moments(model: nn.Module, update: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Adam's running means of gradients and of their squares; None for optimizers that have none."""
    named = {name: update.state[p] for name, p in model.named_parameters() if p.requires_grad}
    if not all("exp_avg_sq" in s for s in named.values()):
        return None
    first, second = ({name: s[key].clone() for name, s in named.items()} for key in ("exp_avg", "exp_avg_sq"))
    return first, second


def load(model: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """Writes a state into a model, which is returned in eval mode."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in parameters.items():
            own[name].copy_(value)
    return model.eval()


def without_frozen(model: nn.Module) -> nn.Module:
    """The model whose frozen parameters, which no training moves, are buffers: what is left are the trained ones."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not p.requires_grad:
                delattr(module, name)
                module.register_buffer(name, p.detach())
    return model
