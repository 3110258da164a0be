"""What a compression is: a fixed linear map of per-example gradients, read by any curvature as if they were these."""

from typing import Protocol

from torch import Tensor

from methods.base import Problem
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors
from methods.gradients.source import Source, Squeeze
from tasks.errors import UserError, require


class Compression(Protocol):
    """Which map S. A random one is unbiased in the inner product, E⟨Sx, Sy⟩ = ⟨x, y⟩, by a scale of its own.

    Its random numbers are drawn on the CPU in float32, from generators that are named by the run's seed, the
    compression and the block: the map is the same for training examples and queries, for any batches and any device.
    """

    def fit(self, problem: Problem, source: Source) -> Squeeze | None:
        """S for the blocks of an uncompressed source; None leaves gradients as they are."""


def require_positive(key: str, number: int) -> None:
    """Refuses method.compression.`key` below 1."""
    require(number >= 1, f"method.compression.{key}", number, "1 or more")


def require_within(key: str, number: int, available: int, what: str = "numbers of a gradient") -> None:
    """Refuses method.compression.`key` that would make a gradient larger than it is."""
    if number > available:
        raise UserError(
            f"method.compression.{key}",
            number,
            f"is above the {available} {what}",
            hint=f"take method.compression.{key}={available} or less, or method/compression=none",
        )


def vector(name: str, size: int) -> Block:
    """A block of `size` numbers without structure."""
    return Block(name=name, kind="whole", shape=(size, 1), parameters=(), bias=False)


def vectors(block: Block, values: Tensor) -> Factors:
    """Gradients `values` (B, size) by such a block."""
    ones = values.new_ones(len(values), 1)
    return Factors(block=block, inputs=ones[:, None], outputs=values[:, None], mask=ones)
