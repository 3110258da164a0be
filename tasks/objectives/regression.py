"""Squared error of one real target, measured by its negative."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Regression:
    """Outputs f (B, 1), targets y (B,) real.

    loss     ℓ = ½(f − y)², the negative log-likelihood of N(f, 1) without its constant
    measure  m = −ℓ
    ∂²ℓ/∂f²  = 1
    """

    name: str = "regression"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs[..., 0] - targets).square()

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self.loss(outputs, targets)

    def loss_of_measurement(self, m: Tensor) -> Tensor:
        return -m

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[..., 0]

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return targets - outputs[..., 0]

    def hessian_root(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs)[..., None]

    def hessian_times(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        return u

    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        edge = torch.finfo(uniforms.dtype).eps  # 0 and 1 are infinitely far
        return outputs[..., 0] + torch.special.ndtri(uniforms.clamp(edge, 1 - edge))

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError("a real number is near or far, not right or wrong")

    def fitness(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """r2 = 1 − SSE/SST, undefined (NaN or −∞) where the targets are all one; rmse in units of the targets."""
        targets = targets.double()
        errors = (outputs[..., 0].double() - targets).square()
        spread = (targets - targets.mean()).square().sum()
        return {"r2": (1 - errors.sum() / spread).item(), "rmse": errors.mean().sqrt().item()}
