"""Softmax cross-entropy over C classes, measured by the margin."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid


@dataclass(frozen=True)
class Classification:
    """Outputs are logits z (B, C), targets class indices y (B,).

    loss     ℓ = −log softmax(z)_y
    measure  m = z_y − logsumexp(z_c, c ≠ y), the margin (Park et al. 2023, TRAK, eq. 8): not log(p/(1−p)) from p, which
             loses its digits as p → 1. p = σ(m), so ℓ = softplus(−m).
    ∂²ℓ/∂z²  = diag(p) − p pᵀ, whose null vector is 1: it has a root with C − 1 columns.
    """

    classes: int
    name: str = "classification"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        chosen = (
            torch.arange(outputs.shape[-1], device=outputs.device) == targets[..., None]
        )  # as one_hot, under vmap too
        others = outputs.masked_fill(chosen, -torch.inf).logsumexp(-1)
        return outputs.gather(-1, targets[..., None])[..., 0] - others

    def loss_of_measurement(self, m: Tensor) -> Tensor:
        return -logsigmoid(m)  # F.softplus is linear beyond 20

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.measure(outputs, targets)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.sigmoid(-self.measure(outputs, targets))  # 1 − p

    def hessian_root(self, outputs: Tensor) -> Tensor:
        p = outputs.double().softmax(-1)
        values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[..., :, None] * p[..., None, :])
        root = vectors * values.clamp_min(0).sqrt()[..., None, :]
        return root[..., 1:].to(outputs.dtype)  # eigh sorts upwards: column 0 is the null vector

    def hessian_times(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        p = outputs.softmax(-1)
        return p * (u - (p * u).sum(-1, keepdim=True))

    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        below = outputs.double().softmax(-1).cumsum(-1) <= uniforms[..., None]
        return below.sum(-1).clamp(max=outputs.shape[-1] - 1)  # the last sum may round to less than 1

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(-1) == targets

    def fitness(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"accuracy": self.correct(outputs, targets).double().mean().item()}
