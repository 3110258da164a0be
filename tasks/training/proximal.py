"""The proximal Bregman response: what curvature methods approximate, by optimisation around the explained model.

    θ(i) = argmin_θ (1/N) Σ_j D(h_j(θ), h_j(θs)) − (1/N) ℓ_i(θ) + ½δ‖θ − θs‖²,        δ = γ + λ
    D(h, h') = ℓ(h) − ℓ(h') − ⟨∂ℓ/∂h', h − h'⟩, the Bregman divergence of the loss in the outputs h
    response(q, i) = m_q(θs) − m_q(θ(i))

(Grosse et al. 2023, after Bae et al. 2022, If influence functions are the answer; the explained model need not be an
optimum.) To first order it is −(1/N) ∇m_qᵀ (G + δI)⁻¹ ∇ℓ_i, the score of the exact Gauss–Newton matrix G at damping λ.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from tasks.base import Batch, Task
from tasks.training.minimise import lbfgs

ROWS = 50  # examples whose responses are found as one batch
RELATIVE = 1e-5  # gradient norm, of that at θs, at which a response is found
OfOutputs = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> (B,)
ITERATIONS = 60  # a smooth problem takes about 20 from the first-order prediction
ROUNDING = 1e-14  # of an objective that is a sum of differences near 0


@dataclass(frozen=True)
class Response:
    """Of M examples on Q queries. `linear`: the first-order prediction; `gradient`: norm at the end, of that at θs."""

    response: Tensor  # (M, Q)
    linear: Tensor  # (M, Q)
    gradient: Tensor  # (M,)


def proximal_response(task: Task, parameters: dict[str, Tensor], rows: list[int], damping: float) -> Response:
    """Responses of the queries to the removal of each of `rows`, by batched L-BFGS in the metric G + δI, in float64."""
    model = task.initial(0).double()
    shapes = {name: value.shape for name, value in parameters.items()}
    centre = torch.cat([value.double().flatten() for value in parameters.values()])  # θs, (P,)
    data, queries = task.train.batch().to("cpu", torch.float64), task.splits["query"].batch().to("cpu", torch.float64)
    n, delta, objective = len(data), task.recipe.l2 + damping, task.objective

    def outputs(theta: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
        return functional_call(model, named, (), inputs)

    def gradients(function: OfOutputs, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """∂function/∂θ at θs of each example, (B, P)."""

        def one(theta: Tensor, x: dict[str, Tensor], y: Tensor) -> Tensor:
            return function(outputs(theta, {k: v[None] for k, v in x.items()}), y[None])[0]

        found: Tensor = vmap(grad(one), (None, 0, 0))(centre, inputs, targets)
        return found

    reference = outputs(centre, data.inputs).detach().requires_grad_()
    losses_there = objective.loss(reference, data.targets)
    (slopes,) = torch.autograd.grad(losses_there.sum(), reference)  # ∂ℓ/∂h at θs
    reference, losses_there = reference.detach(), losses_there.detach()
    factor = torch.linalg.cholesky(
        _ggn(task, outputs, centre, data, reference) + delta * torch.eye(len(centre)).double()
    )

    def proximal(theta: Tensor, left_out: Tensor) -> Tensor:
        h = outputs(theta, data.inputs)
        losses = objective.loss(h, data.targets)
        divergence = losses - losses_there - (slopes * (h - reference)).sum(-1)
        return (divergence - left_out * losses).sum() / n + 0.5 * delta * (theta - centre).square().sum()

    measured = gradients(objective.measure, queries.inputs, queries.targets)  # (Q, P)
    before = objective.measure(outputs(centre, queries.inputs), queries.targets)
    parts = []
    for chosen in torch.tensor(rows).split(ROWS):
        inputs = {k: v[chosen] for k, v in data.inputs.items()}
        at = gradients(objective.loss, inputs, data.targets[chosen]) / n  # (M, P)
        step = torch.cholesky_solve(at.T, factor).T
        left_out = torch.zeros(len(chosen), n, dtype=torch.float64)
        left_out[torch.arange(len(chosen)), chosen] = 1.0

        def function(theta: Tensor, active: Tensor, left_out: Tensor = left_out) -> tuple[Tensor, Tensor]:
            theta = theta.detach().requires_grad_()
            values = vmap(proximal)(theta, left_out[active])
            (gradient,) = torch.autograd.grad(values.sum(), theta)
            return values.detach(), gradient

        size = at.norm(dim=1)
        theta, _, gradient = lbfgs(function, centre + step, factor, RELATIVE * size, ROUNDING, ITERATIONS)
        after = torch.stack([objective.measure(outputs(t, queries.inputs), queries.targets) for t in theta])
        parts.append(Response((before - after).detach(), -(step @ measured.T), gradient / size))
    return Response(
        torch.cat([p.response for p in parts]),
        torch.cat([p.linear for p in parts]),
        torch.cat([p.gradient for p in parts]),
    )


def _ggn(
    task: Task,
    outputs: Callable[[Tensor, dict[str, Tensor]], Tensor],
    centre: Tensor,
    data: Batch,
    reference: Tensor,
    chunk: int = 50,
) -> Tensor:
    """G = (1/N) Σ_j J_jᵀ (∂²ℓ/∂h²) J_j, (P, P), by plain autograd."""
    found = torch.zeros(len(centre), len(centre), dtype=torch.float64)
    roots = task.objective.hessian_root(reference)  # (N, C, R)
    for index in torch.arange(len(reference)).split(chunk):
        inputs = {k: v[index] for k, v in data.inputs.items()}
        jacobian = jacrev(outputs)(centre, inputs)  # (B, C, P)
        columns = torch.einsum("bcr,bcp->brp", roots[index], jacobian).flatten(0, 1)
        found.addmm_(columns.T, columns)
    return found / len(reference)
