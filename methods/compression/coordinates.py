"""A block's gradient (out, in) as one vector, column after column: number i·out + o is G[o, i]."""

import torch
from torch import Tensor

from methods.gradients.per_example import Factors


def numbers(f: Factors) -> tuple[Tensor, Tensor]:
    """The numbers (B, n) that may be non-zero and their places (n,), ascending."""
    g = f.gradient()
    rows, columns = g.block.shape
    kept = torch.arange(columns, device=g.values.device) if g.columns is None else g.columns
    places = kept[:, None] * rows + torch.arange(rows, device=kept.device)
    return g.values.transpose(1, 2).flatten(1), places.flatten()


def numbers_at(f: Factors, places: Tensor) -> Tensor:
    """The numbers at ascending places (n > 0,), (B, n). Of a linear block no others are computed: O(B T n)."""
    if f.block.kind == "linear":
        i, o = places // f.block.shape[0], places % f.block.shape[0]
        total = f.outputs.new_zeros(len(f.outputs), len(places))
        for t in range(f.outputs.shape[1]):
            total.addcmul_(f.outputs[:, t, o], f.inputs[:, t, i])
        return total
    values, known = numbers(f)
    at = torch.searchsorted(places, known).clamp(max=len(places) - 1)
    kept = places[at] == known
    found = values.new_zeros(len(values), len(places))
    found[:, at[kept]] = values[:, kept]
    return found
