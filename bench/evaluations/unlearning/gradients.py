"""Gradients of mean losses over a set, by plain autograd."""

import torch

from bench.evaluations.unlearning.base import Context, Parameters
from tasks.base import Examples

SIZE = 128


def mean_gradient(context: Context, parameters: Parameters, examples: Examples) -> Parameters:
    """∇ (1/|S|) Σ_S ℓ(i; θ), by parameter, accumulated in float64; each is charged."""
    model = context.network(parameters)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}
    for index in examples.batches(SIZE):
        loss = context.task.loss(model, examples.batch(index).to(context.problem.device)).sum()
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, g in zip(named, found, strict=True):
            if g is not None:
                total[name] += g.cpu().double()
    context.problem.meter.gradients += len(examples)
    return {name: (g / len(examples)).to(parameters[name]) for name, g in total.items()}


def combined(*terms: tuple[float, Parameters]) -> Parameters:
    """Σ factor · vector."""
    names = terms[0][1]
    return {name: torch.stack([factor * vector[name] for factor, vector in terms]).sum(0) for name in names}
