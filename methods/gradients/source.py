"""Where a model's per-example gradients come from: which of its blocks are covered, and how they are compressed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors, Gradient, Scalar, gradients, output_gradients, plain, together
from tasks.base import Examples, Task

Rounded = TypeVar("Rounded", Factors, Gradient)


class Squeeze(Protocol):
    """A fixed linear map of per-example gradients, factors of the covered blocks -> factors of `blocks`."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What comes out: no modules of the model, but read like them."""

    def __call__(self, found: Sequence[Factors]) -> list[Factors]:
        """The same examples, smaller."""


@dataclass(frozen=True)
class Source:
    """Gradients of one model by `covered`, its own blocks; after `squeeze`, where there is one. `products`: see
    `rounded`. `kept` gives those of the training losses, in batches of a size, where they lie on disk."""

    task: Task
    model: nn.Module
    covered: tuple[Block, ...]
    squeeze: Squeeze | None = None
    products: torch.dtype | None = None
    kept: Callable[[int], Iterator[tuple[Tensor, list[Factors]]]] | None = None

    def rounded(self, found: Sequence[Rounded]) -> list[Rounded]:
        """Factors or gradients in the dtype of the heavy products, the model's own where `products` is None."""
        return [f if self.products is None else f.to(self.products) for f in found]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks that gradients have when they leave here."""
        return self.covered if self.squeeze is None else self.squeeze.blocks

    @property
    def size(self) -> int:
        """Numbers in one example's gradient."""
        return sum(block.size for block in self.blocks)

    def gradients(
        self, examples: Examples, of: Scalar, batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, list[Factors]]]:
        """Batch after batch: the row indices and each block's factors of the gradients of `of(outputs, targets)`."""
        if self.kept is not None and self.made(examples, of) == 0:
            yield from self.kept(batch_size or together(self.blocks))
            return
        size = {} if batch_size is None else {"batch_size": batch_size}
        for index, found in gradients(self.task, self.model, examples, self.covered, of, **size):
            yield index, self._squeezed(found)

    def made(self, examples: Examples, of: Scalar) -> int:
        """How many gradients it takes to give these: none where they are kept."""
        kept = self.kept is not None and examples is self.task.train and of == self.task.objective.loss
        return 0 if kept else len(examples)

    def columns(self, examples: Examples) -> Iterator[tuple[Tensor, list[list[Factors]]]]:
        """The Gauss–Newton root: for each column r of S, S Sᵀ = ∂²ℓ/∂outputs², the factors of Jᵀ S[:, :, r]."""
        for index, found in output_gradients(self.task, self.model, examples, self.covered):
            yield index, [self._squeezed(column) for column in found]

    def collected(
        self,
        examples: Examples,
        of: Scalar,
        coordinates: Callable[[Sequence[Factors]], Sequence[Gradient]] = plain,
    ) -> list[Gradient]:
        """The gradients of all examples at once, with all columns."""
        parameter = next(self.model.parameters())
        full = [
            torch.zeros(len(examples), *b.shape, dtype=parameter.dtype, device=parameter.device) for b in self.blocks
        ]
        for index, found in self.gradients(examples, of):
            for matrix, g in zip(full, coordinates(found), strict=True):
                matrix[index] = g.dense()
        return [Gradient(b, matrix) for b, matrix in zip(self.blocks, full, strict=True)]

    def _squeezed(self, found: list[Factors]) -> list[Factors]:
        return found if self.squeeze is None else self.squeeze(found)
