"""LoGra with principal sides: C and A are the leading eigenvectors of what they compress (Choe et al. 2024).

Rows of A are the r_in = min(rank, in) leading eigenvectors of Σ a aᵀ, rows of C the r_out leading ones of Σ d dᵀ:
uncentred, over the unpadded positions of the training set, gradients of the loss at the training labels. Orthonormal
and not random: inner products are exact within the kept subspaces, and what lies outside is lost. Of an embedding's
one-hot inputs Σ a aᵀ is diagonal, each token's count: the most frequent tokens are kept and all others lost.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from methods.base import Problem
from methods.compression.base import require_positive
from methods.compression.two_sided import TwoSided, is_layer, places_of, require_rank, two_sided
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors
from methods.gradients.source import Source


@dataclass(frozen=True)
class LoGraPCA:
    """Each layer becomes `rank` × `rank` numbers."""

    rank: int

    def __post_init__(self) -> None:
        require_positive("rank", self.rank)

    def fit(self, problem: Problem, source: Source) -> TwoSided:
        require_rank(self.rank, source)
        moments = {b.name: _Moments(b) for b in source.blocks if is_layer(b)}
        for index, found in source.gradients(problem.train, problem.task.objective.loss):
            problem.meter.gradients += len(index)
            for f in found:
                if is_layer(f.block):
                    moments[f.block.name].add(f)
        return two_sided(problem, source, self.rank, lambda b: moments[b.name].sides(self.rank))


class _Moments:
    """Σ d dᵀ (out, out) and Σ a aᵀ (in, in), of an embedding its diagonal (in,); float64."""

    def __init__(self, block: Block) -> None:
        out, into = block.shape
        self.outputs = torch.zeros(out, out, dtype=torch.float64)
        self.inputs = torch.zeros((into, into) if block.rows is None else into, dtype=torch.float64)

    def add(self, f: Factors) -> None:
        keep = f.mask > 0
        d = f.outputs[keep]
        self.outputs += (d.T @ d).double().cpu()
        if f.block.rows is None:
            a = f.inputs[keep]
            self.inputs += (a.T @ a).double().cpu()
        else:
            place, known = places_of(f)
            self.inputs += place[keep & known].bincount(minlength=len(self.inputs)).double().cpu()

    def sides(self, rank: int) -> tuple[Tensor, Tensor]:
        """C (r_out, out) and A (r_in, in)."""
        return _leading(self.outputs, rank), _leading(self.inputs, rank)


def _leading(moment: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the `rank` largest eigenvalues of a symmetric matrix, or of a diagonal, in rows."""
    if moment.ndim == 2:
        return torch.linalg.eigh(moment)[1].T.flip(0)[:rank]
    largest = moment.argsort(descending=True, stable=True)[:rank]
    return one_hot(largest, len(moment)).to(moment.dtype)
