"""Low-rank queries: the preconditioned query is compressed, not the training gradient (Grosse et al. 2023, §3.2.2).

    V_q = (H + δI)⁻¹ ∇m_q of a block ≈ Σ_{k<=r} σ_k u_k w_kᵀ (its largest singular values)
    ⟨V_q, G_i⟩ ≈ Σ_t Σ_k σ_k (u_kᵀ d_t) (w_kᵀ a_t),    G_i = Σ_t d_t a_tᵀ never formed, V_q never kept
It pays where r T is small against min(out, in). A raw query gradient has rank T at most, a preconditioned one need not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors, Gradient, wide


@dataclass(frozen=True)
class Truncated:
    """Q matrices of one block as `left` (Q, r, out), singular values included, times `right` (Q, r, in)."""

    block: Block
    left: Tensor
    right: Tensor

    def times(self, f: Factors) -> Tensor:
        """⟨V_q, G_i⟩, (Q, B)."""
        d = torch.einsum("bto,qro->qbtr", f.outputs, self.left)
        a = torch.einsum("bti,qri->qbtr", f.inputs, self.right)
        return (d * a).sum((2, 3), dtype=wide(d.dtype))

    def to(self, dtype: torch.dtype) -> "Truncated":
        """The same in another precision."""
        return Truncated(self.block, self.left.to(dtype), self.right.to(dtype))


def truncated(query: Gradient, rank: int) -> Gradient | Truncated:
    """Rank `rank` of each query's matrix; blocks of lower rank anyway, and embeddings, whose inputs are ids, stay."""
    if query.block.kind == "embedding" or min(query.block.shape) <= rank:
        return query
    u, s, wt = torch.linalg.svd(query.values, full_matrices=False)
    left = (u[..., :rank] * s[:, None, :rank]).transpose(1, 2)
    return Truncated(query.block, left.contiguous(), wt[:, :rank].contiguous())
