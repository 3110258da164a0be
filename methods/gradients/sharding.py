"""Training examples divided among the processes of torchrun: each makes its own gradients, sums are added up.

Without torchrun there is one process, and nothing here does anything. What a method does not divide, every process
does alike, from the same seeds, so that all of them hold the same numbers.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that reports and writes."""
    return processes() == 1 or dist.get_rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that torchrun started know each other (gloo, so that no GPU is needed)."""
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def mine(n: int) -> Tensor | None:
    """This process's rows of n, every so many-th; None: all."""
    return None if processes() == 1 else torch.arange(dist.get_rank(), n, processes())


def share(stream: Iterable[T]) -> Iterator[T]:
    """This process's items of a stream that every process has."""
    own = dist.get_rank() if processes() > 1 else 0
    yield from (item for k, item in enumerate(stream) if k % processes() == own)


def summed(parts: Sequence[Tensor]) -> None:
    """Adds up each tensor over the processes, in place, in one all-reduce."""
    if processes() == 1:
        return
    flat = torch.cat([p.flatten().double().cpu() for p in parts])
    dist.all_reduce(flat)
    for part, found in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
        part.copy_(found.view(part.shape))
