"""H ≈ U diag(μ) Uᵀ with few orthonormal columns U (P, r), fitted once, any damping after.

subspace     U diag(1/(μ + δ)) Uᵀ v: what is outside of U is dropped (Schioppa et al. 2022, §4.1)
complemented (1/δ) [v − U diag(μ/(μ + δ)) Uᵀ v]: outside of U the curvature is 0 (Woodbury)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.curvature.base import InPlace, positive, unflat
from methods.curvature.damping import Damping
from methods.gradients.blocks import Block
from methods.gradients.per_example import Gradient, flat

VANISHED = 1e-6  # share of a float32 product that is its rounding, about


@dataclass(frozen=True)
class LowRank(InPlace):
    """`vectors` Uᵀ (r, P), `values` μ (r,), float64; `trace` of H for relative damping."""

    name: str
    blocks: tuple[Block, ...]
    vectors: Tensor
    values: Tensor
    trace: float
    complemented: bool
    standalone: ClassVar[bool] = True

    def precondition(self, rotated: Sequence[Gradient], damping: Damping, l2: float) -> list[Gradient]:
        v = flat(rotated)
        size, u = v.shape[1], self.vectors.to(v.device, v.dtype)
        delta = l2 + damping.strengths({"all": self.trace}, {"all": size})["all"]
        smallest = min(self.values.min().item(), 0.0 if self.complemented else torch.inf)
        positive(delta, smallest, self.values.abs().max().item(), self.name)
        within = v @ u.T  # (R, r)
        values = self.values.to(v.device, v.dtype)
        if self.complemented:
            return unflat(self.blocks, (v - (within * (values / (values + delta))) @ u) / delta)
        return unflat(self.blocks, (within / (values + delta)) @ u)


def orthonormal(rows: Tensor, against: Tensor | None = None) -> Tensor:
    """An orthonormal basis, in rows and in float64, of what the rows span outside of `against` (itself orthonormal);
    directions of which less than `VANISHED` is left, rounding that is, are left out."""
    rows = rows.double()
    for _ in range(2):  # twice is enough (Giraud et al. 2005)
        before = rows.norm(dim=1)
        if against is not None and len(against):
            rows = rows - (rows @ against.T) @ against
        rows = rows[rows.norm(dim=1) > VANISHED * before]
        if not len(rows):
            return rows
        rows = rows / rows.norm(dim=1, keepdim=True)
        q, r = torch.linalg.qr(rows.T)
        rows = q.T[r.diagonal().abs() > VANISHED]
    return rows


def ritz(times: Callable[[Tensor], Tensor], basis: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh–Ritz: eigenvalues (r,) upwards and their vectors in rows (r, P) of H within a basis in rows."""
    small = basis @ times(basis).double().T
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    return values, rotation.T @ basis
