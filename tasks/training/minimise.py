"""Convex tasks: the optimum itself, of many weightings of the data at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from tasks.base import Task

MEMORY = 10  # pairs that L-BFGS keeps
ITERATIONS = 500
HALVINGS = 20  # of a full step: a shorter one is lost in rounding


def minimise(task: Task, weights: Tensor, counts: Tensor, chunk: int = 250) -> tuple[dict[str, Tensor], Tensor]:
    """argmin over θ of (1/nₘ) Σᵢ wₘᵢ ℓᵢ(θ) + ½γ‖θ‖² for each row m of `weights` (M, N), to ‖gradient‖ <= tolerance.

    The optimum is unique, so where one starts is nobody's business: all start at the optimum of the whole data and go
    by L-BFGS whose first metric is the inverse Hessian there (Nocedal & Wright 2006, alg. 7.4), with Armijo
    backtracking, each model its own. `counts` (M,) are the denominators nₘ.
    Returns stacked parameters (M, ...) and the final objectives (M,). Raises if a model does not converge.
    """
    model = task.initial(0)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    shapes = [dict(model.named_parameters())[n].shape for n in names]
    sizes = [s.numel() for s in shapes]
    batch = task.train.batch()
    gamma = task.recipe.l2

    def unflatten(theta: Tensor) -> dict[str, Tensor]:
        parts = theta.split(sizes, dim=-1)
        return {n: v.reshape(*theta.shape[:-1], *s) for n, v, s in zip(names, parts, shapes, strict=True)}

    def objective(theta: Tensor, w: Tensor, n: Tensor) -> Tensor:
        outputs = functional_call(model, unflatten(theta), (), batch.inputs)
        return (w * task.objective.loss(outputs, batch.targets)).sum() / n + 0.5 * gamma * theta.square().sum()

    ones = torch.ones(1, len(batch), dtype=task.dtype)
    total = torch.tensor([float(len(batch))], dtype=task.dtype)

    def value_and_gradient(theta: Tensor, w: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        theta = theta.detach().requires_grad_()
        values = vmap(objective)(theta, w, n)
        (gradients,) = torch.autograd.grad(values.sum(), theta)
        return values.detach(), gradients

    def metric(theta: Tensor) -> Tensor:
        # Reverse over reverse: forward-mode levels are shared by all threads of a process.
        return torch.linalg.cholesky(jacrev(grad(objective))(theta, ones[0], total[0]))

    def solve(start: Tensor, factor: Tensor, w: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        function = lambda theta, rows: value_and_gradient(theta, w[rows], n[rows])  # noqa: E731
        at, tolerance = start.expand(len(w), -1).clone(), task.recipe.tolerance
        found, value, gradient = lbfgs(function, at, factor, tolerance, iterations=ITERATIONS)
        if not (worst := gradient.max().item()) <= tolerance:
            raise ArithmeticError(
                f"no optimum after {ITERATIONS} iterations: gradient norm {worst:.1e} > {task.recipe.tolerance:.0e}"
            )
        return found, value

    origin = torch.zeros(sum(sizes), dtype=task.dtype)
    start = solve(origin, metric(origin), ones, total)[0][0]
    factor = metric(start)
    counts = counts.to(task.dtype)
    found = [
        solve(start, factor, w, n)
        for w, n in zip(weights.to(task.dtype).split(chunk), counts.split(chunk), strict=True)
    ]
    return unflatten(torch.cat([theta for theta, _ in found])), torch.cat([value for _, value in found])


def lbfgs(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    theta: Tensor,
    factor: Tensor,
    tolerance: float | Tensor,
    slack: float = 0.0,
    iterations: int = ITERATIONS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batched L-BFGS over `theta` (M, P): `function(theta[rows], rows)` gives values (R,) and gradients (R, P).

    `factor` (P, P): Cholesky factor of the first metric. `tolerance`: gradient norm at which a model stops, one for all
    or (M,). `slack`: by how much a value may rise because of rounding.
    A model whose line search fails starts its memory anew; failing again it stops, as at a kink of a ReLU network.
    Returns the last theta, values (M,) and gradient norms (M,): above the tolerance where it did not get there.
    """
    models, parameters = theta.shape
    everyone = torch.arange(models)
    value, gradient = function(theta, everyone)
    pairs_s = theta.new_zeros(models, MEMORY, parameters)
    pairs_y = theta.new_zeros(models, MEMORY, parameters)
    rho = theta.new_zeros(models, MEMORY)  # 1 / (sᵀy); 0 marks an empty slot
    failures = torch.zeros(models)  # of line searches, one after the other
    for iteration in range(iterations):
        active = everyone[(gradient.norm(dim=1) > tolerance) & (failures < 2)]
        if not len(active):
            break
        order = [(iteration - 1 - k) % MEMORY for k in range(MEMORY)]  # newest first
        g = gradient[active]
        q = g.clone()
        alphas = {}
        for k in order:
            alphas[k] = rho[active, k] * (pairs_s[active, k] * q).sum(1)
            q -= alphas[k][:, None] * pairs_y[active, k]
        q = torch.cholesky_solve(q.T, factor).T
        for k in reversed(order):
            beta = rho[active, k] * (pairs_y[active, k] * q).sum(1)
            q += (alphas[k] - beta)[:, None] * pairs_s[active, k]
        slope = (g * q).sum(1)
        size = torch.ones_like(slope)
        old_theta, old_value = theta[active], value[active]
        rounding = 1e-12 * old_value.abs() + slack  # near the optimum the decrease drowns in it
        new_value, new_gradient = function(old_theta - size[:, None] * q, active)
        for _ in range(HALVINGS):
            bad = ~(new_value <= old_value - 1e-4 * size * slope + rounding)  # no number is no decrease
            if not bad.any():
                break
            size = torch.where(bad, size / 2, size)
            again_value, again_gradient = function((old_theta - size[:, None] * q)[bad], active[bad])
            new_value[bad], new_gradient[bad] = again_value, again_gradient
        bad = ~(new_value <= old_value - 1e-4 * size * slope + rounding) | (size < 2.0**-HALVINGS * 1.5)
        failures[active] = torch.where(bad, failures[active] + 1, 0.0)
        new_value, size = torch.where(bad, old_value, new_value), torch.where(bad, 0.0, size)
        new_gradient = torch.where(bad[:, None], g, new_gradient)
        new_theta = old_theta - size[:, None] * q
        s, y = new_theta - old_theta, new_gradient - g
        curvature = (s * y).sum(1)
        slot = iteration % MEMORY
        pairs_s[active, slot], pairs_y[active, slot] = s, y
        rho[active[bad]] = 0.0
        rho[active, slot] = torch.where(curvature > 0, 1 / curvature, torch.zeros_like(curvature))
        theta[active], value[active], gradient[active] = new_theta, new_value, new_gradient
    return theta, value, gradient.norm(dim=1)
