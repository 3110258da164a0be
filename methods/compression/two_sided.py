"""Two-sided maps, layer by layer: G (out, in) ↦ C G Aᵀ (r_out, r_in), by its factors alone: d ↦ C d, a ↦ A a.

The layers stay layers, so that a Kronecker-factored curvature of the compressed gradients is as good as one of the
gradients themselves. Blocks that are no matrices (norms) pass if they have no more than rank² numbers; else a Gaussian
projection makes rank² of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from methods.base import Problem
from methods.compression.base import require_within, vector, vectors
from methods.compression.dense_projection import DenseProjection
from methods.compression.gaussian import normal
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors
from methods.gradients.source import Source

Sides = Callable[[Block], tuple[Tensor, Tensor]]  # a layer's C (r_out, out) and A (r_in, in)


@dataclass(frozen=True, eq=False)
class TwoSided:
    """A map of its own for each block, in their order."""

    layers: tuple["Layer | Passed | DenseProjection", ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(layer.block for layer in self.layers)

    def __call__(self, found: Sequence[Factors]) -> list[Factors]:
        return [one for layer, f in zip(self.layers, found, strict=True) for one in layer([f])]


@dataclass(frozen=True, eq=False)
class Layer:
    """C `left` (r_out, out) and A `right` (r_in, in), the bias a column of `in`."""

    block: Block
    left: Tensor
    right: Tensor

    def __call__(self, found: Sequence[Factors]) -> list[Factors]:
        (f,) = found
        left, right = self.left.to(f.outputs.dtype), self.right.to(f.outputs.dtype)
        return [Factors(block=self.block, inputs=_inputs(f, right), outputs=f.outputs @ left.T, mask=f.mask)]


@dataclass(frozen=True, eq=False)
class Passed:
    """The gradient as it is, as one vector."""

    block: Block

    def __call__(self, found: Sequence[Factors]) -> list[Factors]:
        (f,) = found
        return [vectors(self.block, f.gradient().dense().flatten(1))]


def _inputs(f: Factors, right: Tensor) -> Tensor:
    """A a, (B, T, r_in); of an embedding, where a is one-hot, A's columns; 0 for ids that have none."""
    if f.block.rows is None:
        return f.inputs @ right.T
    place, known = places_of(f)
    return right.T[place] * known[..., None]


def places_of(f: Factors) -> tuple[Tensor, Tensor]:
    """The columns (B, T) of an embedding's ids, and whether they have one."""
    assert f.block.rows is not None
    rows = f.block.rows.to(f.inputs.device)
    place = torch.searchsorted(rows, f.inputs.contiguous()).clamp(max=len(rows) - 1)
    return place, rows[place] == f.inputs


def is_layer(block: Block) -> bool:
    return block.kind in ("linear", "embedding")


def require_rank(rank: int, source: Source) -> None:
    """Refuses a rank that would compress nothing."""
    largest = max(max(b.shape) for b in source.blocks)
    require_within("rank", rank, largest, "numbers of a gradient along its longest side")


def two_sided(problem: Problem, source: Source, rank: int, sides: Sides) -> TwoSided:
    """The map of a source's blocks; `sides` gives the layers' matrices."""
    return TwoSided(tuple(_map(problem, b, rank, sides) for b in source.blocks))


def _map(problem: Problem, block: Block, rank: int, sides: Sides) -> Layer | Passed | DenseProjection:
    if is_layer(block):
        left, right = (side.to(problem.device) for side in sides(block))
        shape = (len(left), len(right))
        return Layer(Block(name=block.name, kind="linear", shape=shape, parameters=(), bias=False), left, right)
    if block.size <= rank**2:
        return Passed(vector(block.name, block.size))
    return DenseProjection(vector(block.name, rank**2), normal, partial(problem.generator, "compression", "two_sided"))
