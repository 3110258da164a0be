"""Next-token cross-entropy summed over the scored tokens, measured by the log-likelihood of all of them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

NO_TARGET = -100  # where nothing is scored


@dataclass(frozen=True)
class LanguageModel:
    """Outputs are logits z (B, T, V), z_t what is said of target t; targets ids y (B, T' >= T), NO_TARGET where nothing
    is scored: batches cut their inputs to the longest row, targets are cut here.

    loss     ℓ = −Σ_t log softmax(z_t)_{y_t}, in nats, over the scored t
    measure  m = −ℓ, the log-likelihood log p(y | x)
    ∂²ℓ/∂z²  block-diagonal: diag(p_t) − p_t p_tᵀ of each scored t, 0 of all others. Its root would have T · (V − 1)
             columns an example: it is not offered, products with it are.
    """

    vocabulary: int
    name: str = "language_model"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = _cut(targets, outputs)
        return cross_entropy(outputs.movedim(-1, 1), targets, ignore_index=NO_TARGET, reduction="none").sum(-1)

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self.loss(outputs, targets)

    def loss_of_measurement(self, m: Tensor) -> Tensor:
        return -m

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.measure(outputs, targets)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.ones_like(self.measure(outputs, targets))  # ℓ = −m

    def hessian_root(self, outputs: Tensor) -> Tensor:
        raise NotImplementedError("a token's every class would be a column")

    def hessian_times(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        p = outputs.softmax(-1)
        scored = (_cut(targets, outputs) != NO_TARGET)[..., None]
        return scored * p * (u - (p * u).sum(-1, keepdim=True))

    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        uniforms = _cut(uniforms, outputs)
        below = outputs.double().softmax(-1).cumsum(-1) <= uniforms[..., None]
        drawn = below.sum(-1).clamp(max=outputs.shape[-1] - 1)  # the last sum may round to less than 1
        return drawn.masked_fill(uniforms.isnan(), NO_TARGET)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = _cut(targets, outputs)
        return ((outputs.argmax(-1) == targets) | (targets == NO_TARGET)).all(-1)

    def fitness(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """accuracy: share of examples whose every scored token is greedily right; token_accuracy and loss_per_token
        (nats): of an example its mean over scored tokens. All three are means over examples."""
        targets = _cut(targets, outputs)
        scored = targets != NO_TARGET
        tokens = scored.sum(-1).clamp_min(1).double()
        right = ((outputs.argmax(-1) == targets) & scored).sum(-1) / tokens
        return {
            "accuracy": self.correct(outputs, targets).double().mean().item(),
            "token_accuracy": right.mean().item(),
            "loss_per_token": (self.loss(outputs, targets).double() / tokens).mean().item(),
        }


def _cut(targets: Tensor, outputs: Tensor) -> Tensor:
    """Of (..., T') the T positions that the outputs (..., T, V) have."""
    return targets[..., : outputs.shape[-2]]
