"""Many small models as one batched computation: the first axis of every parameter is the model."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from tasks.base import Batch, Task
from tasks.training.minimise import MEMORY as HISTORY
from tasks.training.minimise import minimise
from tasks.training.recipe_steps import batch_order, clip, learning_rates, optimizer

ROWS = 512  # rows a model sees at once when it is measured


def stackable(task: Task) -> bool:
    """Sequences come in batches of different lengths, and dropout draws from one stream for all: neither is stacked."""
    if task.train.lengths is not None:  # told without building a large model
        return False
    return not any(isinstance(m, nn.Dropout) and m.p > 0 for m in task.initial(0).modules())


def bytes_of_a_model(task: Task) -> int:
    """Memory that one more model in the stack takes, rounded up: its parameters, gradients and optimizer state, the
    batches of all epochs, the activations of one step and their gradients."""
    sizes: list[int] = []
    model = task.initial(0)
    for module in model.modules():
        module.register_forward_hook(lambda _, __, out: sizes.append(out.numel()) if isinstance(out, Tensor) else None)
    one = task.train.batch([0])
    with torch.no_grad():
        task.outputs(model, one)
    width = sum(sizes) + sum(v.numel() for v in one.inputs.values())
    parameters = sum(p.numel() for p in model.parameters())
    convex = task.recipe.optimizer == "lbfgs"
    rows = len(task.train) if convex else max(ROWS, task.recipe.batch_size)
    copies = 2 * HISTORY + 8 if convex else 6
    orders = 4 if convex else 2 * task.recipe.epochs + 4  # of the rows: by step, and as drawn; weights and members
    return task.dtype.itemsize * (copies * parameters + 4 * rows * width) + 8 * orders * len(task.train)


def train_stack(task: Task, weights: Tensor, seeds: list[int], own_batches: bool) -> dict[str, Tensor]:
    """Trains row m of `weights` (M, N) with `seeds[m]`; equals `train` for each m up to rounding.

    With `own_batches` all rows must have the same number of positive weights (the same steps).
    Returns the final parameters, each (M, ...).
    """
    models, n_train = weights.shape
    if not stackable(task):
        raise ValueError("models of sequences or with dropout are not stacked")
    weights = weights.to(task.dtype)
    if own_batches:
        members = [w.nonzero()[:, 0] for w in weights]
        if len({len(m) for m in members}) != 1:
            raise ValueError("stacked models must train on equally many rows")
    else:
        members = [torch.arange(n_train)] * models
    if task.recipe.optimizer == "lbfgs" and task.recipe.epochs > 0:
        return minimise(task, weights, torch.tensor([len(m) for m in members]))[0]

    template = task.initial(0)
    initial = {s: dict(task.initial(s).named_parameters()) for s in set(seeds)}
    leaves = {
        name: torch.stack([initial[s][name].detach() for s in seeds]).requires_grad_()
        for name, p in template.named_parameters()
        if p.requires_grad
    }
    if task.recipe.epochs == 0:
        return {name: leaf.detach() for name, leaf in leaves.items()}
    # Equal seeds and equal sizes permute positions equally: draw each order once.
    positions = {s: batch_order(torch.arange(len(members[0])), None, task.recipe, s) for s in set(seeds)}
    member = torch.stack(members)  # (M, n)
    steps = [
        member.gather(1, torch.stack(column)) for column in zip(*(positions[s] for s in seeds), strict=True)
    ]  # (M, B)
    forward = _forward(template)
    unweighted = own_batches and bool(((weights == 0) | (weights == 1)).all())
    update = optimizer(task.recipe, leaves.values())
    model_axis = torch.arange(models)[:, None]
    template.train()
    for index, rate in zip(steps, learning_rates(task.recipe, len(steps)), strict=True):
        for group in update.param_groups:
            group["lr"] = rate
        rows = index.flatten()
        inputs = {k: v.index_select(0, rows).unflatten(0, index.shape) for k, v in task.train.inputs.items()}
        losses = task.objective.loss(forward(leaves, inputs), task.train.targets[index])  # (M, B)
        if not unweighted:
            losses = losses * weights[model_axis, index]
        value = losses.sum() / index.shape[1]
        update.zero_grad(set_to_none=True)
        value.backward()
        if task.recipe.clip is not None:
            clip([p.grad for p in leaves.values() if p.grad is not None], task.recipe.clip, stacked=True)
        update.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def _forward(template: nn.Module) -> Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]:
    """(stacked parameters, inputs (M, B, ...)) -> outputs (M, B, ...): the model's own way, or vmap over any model."""
    own = getattr(template, "forward_stack", None)
    if own is not None:
        return lambda stack, inputs: own(stack, **inputs)
    return vmap(lambda parameters, inputs: functional_call(template, parameters, (), inputs))


@torch.no_grad()
def measure_stack(task: Task, stack: dict[str, Tensor], split: str) -> Tensor:
    """Measurements of a split by every model, (M, n)."""
    template, examples = task.initial(0), task.splits[split]
    forward = vmap(lambda parameters, inputs: functional_call(template, parameters, (), inputs), in_dims=(0, None))
    parts = []
    for start in range(0, len(examples), ROWS):
        batch: Batch = examples.batch(slice(start, start + ROWS))
        outputs = forward(stack, batch.inputs)  # (M, b, ...)
        targets = batch.targets.expand(len(outputs), *batch.targets.shape)
        parts.append(task.objective.measure(outputs.flatten(0, 1), targets.flatten(0, 1)).view(len(outputs), -1))
    return torch.cat(parts, 1)
