"""Representer points: the last layer, solved to its optimum, says exactly what each example adds to each logit."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.base import Problem
from methods.representation import Representation
from tasks.base import Examples, Objective, Task
from tasks.errors import require

TOLERANCE = 1e-10  # of the gradient's norm
STEPS, HALVINGS, PRODUCTS = 100, 30, 1000  # at most


@dataclass(frozen=True)
class Representer(Representation):
    """score(q, i) = Σ_c ∂m(q)/∂z_c α_ic h_iᵀ h_q, α_i = −(1/(2λN)) ∂ℓ_i/∂z    (Yeh et al. 2018, theorem 3.1, RPS-L2)

    z = W h, h the features at `layer` and a constant 1 behind them, so that the bias is regularised too; W (C, d + 1)
    is the minimum of (1/N) Σ_i ℓ_i + λ‖W‖², where W = Σ_i α_i h_iᵀ: the logits of q are Σ_i α_i h_iᵀ h_q, to the last.
    W is not the explained model's last layer but one fitted anew on its features, whatever the model was trained with:
    what is scored is m of that head. `l2` is λ, in nats per squared weight.
    """

    l2: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.l2 > 0, "method.l2", self.l2, "above 0: without it the optimum is not a sum over examples")

    def unmet(self, task: Task) -> str | None:
        if task.train.targets.ndim != 1:
            return f"needs one target an example, which task={task.name} does not have"
        return super().unmet(task)

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        head, alphas = self.refitted(problem)
        asked = with_one(self.of(problem, queries))
        logits = (asked @ head.T).requires_grad_()
        (wanted,) = torch.autograd.grad(problem.task.objective.measure(logits, real(queries.targets)).sum(), logits)
        return (wanted @ alphas.T) * (asked @ with_one(self.of_train(problem)).T)

    def refitted(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """W (C, d + 1) and α (N, C), made once."""

        def made() -> tuple[Tensor, Tensor]:
            objective, train, model = problem.task.objective, problem.train, problem.model()
            with torch.no_grad():
                outputs = problem.task.outputs(model, train.batch([0]).to(problem.device)).shape[-1]
            h, targets = with_one(self.of_train(problem)), real(train.targets)
            head = refit(objective, h, targets, outputs, self.l2)
            slopes = gradient(objective, h @ head.T, targets)
            return head, -slopes / (2 * self.l2 * len(train))

        return problem.once((self, "head"), made)


def with_one(features: Tensor) -> Tensor:
    return nn.functional.pad(features, (0, 1), value=1.0)


def real(targets: Tensor) -> Tensor:
    return targets.double() if targets.is_floating_point() else targets


@torch.enable_grad()
def gradient(objective: Objective, logits: Tensor, targets: Tensor) -> Tensor:
    """∂ℓ_i/∂z, (N, C)."""
    logits = logits.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(objective.loss(logits, targets).sum(), logits)
    return slopes


def refit(objective: Objective, h: Tensor, targets: Tensor, outputs: int, l2: float) -> Tensor:
    """argmin over W (C, d) of (1/N) Σ_i ℓ(W h_i, y_i) + λ‖W‖², to ‖gradient‖ <= TOLERANCE.

    Newton's method with the Gauss-Newton matrix (for a loss of the logits alone, the Hessian), each step by conjugate
    gradients, whose preconditioner is (1/N) Σ h hᵀ + 2λI on every output. Raises if it does not get there.
    """
    n = len(h)
    factor = torch.linalg.cholesky(h.T @ h / n + 2 * l2 * torch.eye(h.shape[1], dtype=h.dtype))

    def value(head: Tensor) -> Tensor:
        return objective.loss(h @ head.T, targets).mean() + l2 * head.square().sum()

    def precondition(right: Tensor) -> Tensor:
        return torch.cholesky_solve(right.T, factor).T

    head = h.new_zeros(outputs, h.shape[1])
    size = torch.inf
    for _ in range(STEPS):
        logits = h @ head.T
        slope = gradient(objective, logits, targets).T @ h / n + 2 * l2 * head
        size = slope.norm().item()
        if size <= TOLERANCE:
            return head
        root = objective.hessian_root(logits)  # (N, C, R)

        def curved(v: Tensor, root: Tensor = root) -> Tensor:
            inner = torch.einsum("ncr,nc->nr", root, h @ v.T)
            return torch.einsum("ncr,nr->nc", root, inner).T @ h / n + 2 * l2 * v

        step = conjugate_gradients(curved, precondition, slope, min(0.1, size**0.5) * size)
        before, descent, length = value(head), (slope * step).sum(), 1.0
        rounding = 1e-12 * before.abs()  # near the optimum the decrease drowns in it
        for _ in range(HALVINGS):
            if value(head - length * step) <= before - 1e-4 * length * descent + rounding:
                break
            length /= 2
        head = head - length * step
    raise ArithmeticError(f"the last layer has no optimum after {STEPS} steps: gradient norm {size:.1e}")


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], right: Tensor, tolerance: float
) -> Tensor:
    """x with ‖A x − b‖ <= tolerance, or where PRODUCTS products lead."""
    x, residual = torch.zeros_like(right), right
    z = direction = precondition(residual)
    along = (residual * z).sum()
    for _ in range(PRODUCTS):
        if residual.norm() <= tolerance:
            break
        image = product(direction)
        length = along / (direction * image).sum()
        x, residual = x + length * direction, residual - length * image
        z, before = precondition(residual), along
        along = (residual * z).sum()
        direction = z + along / before * direction
    return x
