"""What one model says of a set: losses, right answers, margins and the distributions themselves."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tasks.base import Examples, Task

SIZE = 128
UNSCORED = -100  # a target that no loss looks at


@dataclass(frozen=True)
class Measured:
    """Of n examples with T predictions that are scored (one an example where it has one label).

    loss     (n,) nats a scored token, so that sets of long and short answers compare; nll (n,) their sum
    correct  (n,) whether all that counts is greedily right
    margin   (n,) the task's measurement
    logp     (T, C) log-probabilities; row (T,) whose they are
    """

    nll: Tensor
    loss: Tensor
    correct: Tensor
    margin: Tensor
    logp: Tensor
    row: Tensor


def tokens(targets: Tensor) -> Tensor:
    """How many predictions of each example are scored, (n,)."""
    return torch.ones(len(targets), dtype=torch.long) if targets.ndim == 1 else (targets != UNSCORED).sum(1)


@torch.no_grad()
def losses(task: Task, model: nn.Module, examples: Examples) -> Tensor:
    """NLL (n,) of each example, summed over its tokens, float64."""
    found = torch.zeros(len(examples), dtype=torch.float64)
    device = next(model.parameters()).device
    for index in examples.batches(SIZE):
        found[index] = task.loss(model, examples.batch(index).to(device)).cpu().double()
    return found


@torch.no_grad()
def measured(task: Task, model: nn.Module, examples: Examples) -> Measured:
    """In eval mode, in the order of the examples."""
    n, device = len(examples), next(model.parameters()).device
    nll, margin = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    correct, found, rows = torch.zeros(n, dtype=torch.bool), [], []
    for index in examples.batches(SIZE):
        batch = examples.batch(index).to(device)
        outputs = task.outputs(model, batch)
        nll[index] = task.objective.loss(outputs, batch.targets).cpu().double()
        margin[index] = task.objective.measure(outputs, batch.targets).cpu().double()
        correct[index] = task.objective.correct(outputs, batch.targets).cpu()
        scored, whose = predictions(outputs, batch.targets)
        found.append(scored.double().log_softmax(-1).cpu())
        rows.append(index[whose.cpu()])
    if not found:
        raise ValueError("nothing to measure: the set is empty")
    row, logp = torch.cat(rows), torch.cat(found)
    order = torch.argsort(row, stable=True)
    return Measured(nll, nll / tokens(examples.targets), correct, margin, logp[order], row[order])


def predictions(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, C) of what is scored, and whose they are, (T,)."""
    if targets.ndim == 1:
        return outputs, torch.arange(len(targets))
    scored = targets[..., : outputs.shape[-2]] != UNSCORED  # a batch's inputs are cut to its longest row
    return outputs[scored], scored.nonzero()[:, 0]


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first ‖ second) of each row of log-probabilities (T, C), (T,): 0 with zero gradient where they agree."""
    terms = first.exp() * (first - second)
    return torch.where(first == -torch.inf, 0.0, terms).sum(-1)


def by_example(values: Tensor, row: Tensor, n: int) -> Tensor:
    """Mean over an example's predictions, (n,)."""
    counts = torch.zeros(n, dtype=values.dtype).index_add_(0, row, torch.ones_like(values))
    return torch.zeros(n, dtype=values.dtype).index_add_(0, row, values) / counts


def strangers(task: Task) -> tuple[Examples, Examples]:
    """Examples that no model was trained on, in two halves: what an unlearner and its tuning may look at, and what
    judges membership. The split `nonmembers` where there is one, else `test`."""
    there = task.splits.get("nonmembers", task.splits["test"])
    return there.select(list(range(0, len(there), 2))), there.select(list(range(1, len(there), 2)))
