"""Gradients apart by token: each token's share of an example's gradient as an example of its own.

A block that is used once a position (B, T, ...) has a share for each of the batch's W tokens; of one that is used
several times, or shares its table, the shares are summed over uses. What has no positions of its own (norms, whose
uses are one gradient; layers behind the pooling) is the share of no token: it stands last, at W. The W + 1 shares sum
to the example's gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from methods.gradients.per_example import Factors


def by_token(found: Sequence[Factors], width: int) -> list[Factors]:
    """Factors of B · (W + 1) examples, those of an example one after the other."""
    return [_shares(f, width) for f in found]


def _shares(f: Factors, width: int) -> Factors:
    uses, rest = divmod(f.inputs.shape[1], width)
    if f.block.kind == "whole" or rest:  # all of it is the last share
        return Factors(f.block, *(_last(t, width) for t in (f.inputs, f.outputs, f.mask)))

    def fold(t: Tensor) -> Tensor:
        """(B, uses · W, ...) -> (B · (W + 1), uses, ...), nothing in the last share."""
        shares = t.unflatten(1, (uses, width)).transpose(1, 2)
        return torch.cat([shares, torch.zeros_like(shares[:, :1])], 1).flatten(0, 1)

    return Factors(f.block, fold(f.inputs), fold(f.outputs), fold(f.mask))


def _last(t: Tensor, width: int) -> Tensor:
    """(B, T, ...) -> (B · (W + 1), T, ...), zero but for the last share."""
    none = torch.zeros_like(t[:, None]).expand(-1, width, *t.shape[1:])
    return torch.cat([none, t[:, None]], 1).flatten(0, 1)
