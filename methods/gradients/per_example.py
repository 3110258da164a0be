"""Per-example gradients by block, from what goes into a module and what its output owes to the loss.

One forward pass, one backward pass down to the module outputs only: no parameter's summed gradient is ever formed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from methods.base import require_eval
from methods.gradients.blocks import Block
from tasks.base import Batch, Examples, Task

BATCH = 64


@dataclass(frozen=True)
class Factors:
    """A block's gradients of B examples: G_b = Σ_t d_bt a_btᵀ, (B, out, in).

    `inputs` a: linear (B, T, in) with the 1 of the bias; embedding ids (B, T); norm the normalised input (B, T, width).
    `outputs` d (B, T, out): derivative by the module's output. `mask` (B, T): positions that are no padding.
    A module that is used k times has its uses one after the other along T, so that sums over T add them up.
    """

    block: Block
    inputs: Tensor
    outputs: Tensor
    mask: Tensor

    def dense(self) -> Tensor:
        """G, (B, out, in)."""
        if self.block.kind == "linear":
            return self.outputs.transpose(1, 2) @ self.inputs
        if self.block.kind == "norm":
            parts = [(self.outputs * self.inputs).sum(1)]
            if self.block.bias:
                parts.append(self.outputs.sum(1))
            return torch.stack(parts, 1)
        gradient = self.outputs.new_zeros(len(self.outputs), self.block.shape[1] + 1, self.block.shape[0])
        index = self.columns()[..., None].expand(-1, -1, self.block.shape[0])
        gradient.scatter_add_(1, index, self.outputs)
        return gradient[:, :-1].transpose(1, 2)

    def columns(self) -> Tensor:
        """Of an embedding: the column of each position's id, (B, T); ids outside `rows` get one past the last."""
        rows = self.block.rows
        assert rows is not None
        rows = rows.to(self.inputs.device)
        at = torch.searchsorted(rows, self.inputs).clamp_max(max(len(rows) - 1, 0))
        known = rows[at] == self.inputs if len(rows) else torch.zeros_like(self.inputs, dtype=torch.bool)
        return torch.where(known, at, len(rows))


@dataclass
class Tape:
    """What hooks saw in one forward pass."""

    batch: Batch
    uses: dict[str, list[tuple[Tensor, Tensor, int]]] = field(default_factory=dict)  # input, output, version


@contextmanager
def recording(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> Iterator[Tape]:
    """Hooks that note each block's inputs and outputs; they are gone afterwards, also after an exception."""
    tape = Tape(batch)

    def hook(name: str) -> Callable:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if isinstance(module, nn.Embedding) and len(output) == 1 < len(batch):
                # Looked up once for all examples (positions): each example needs a gradient of its own.
                output = output.expand(len(batch), *output.shape[1:])
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            tape.uses.setdefault(name, []).append((inputs[0].detach().clone(), output, output._version))
            return output

        return note

    handles = [model.get_submodule(b.name).register_forward_hook(hook(b.name)) for b in blocks]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def factors(
    tape: Tape, model: nn.Module, blocks: Sequence[Block], of: Tensor, cotangent: Tensor | None
) -> list[Factors]:
    """Factors of d⟨of, cotangent⟩/d(block), example by example; `of` may be asked again with another cotangent."""
    uses = [(block, use) for block in blocks for use in tape.uses.get(block.name, [])]
    for block, (_, output, version) in uses:
        if output._version != version:
            raise RuntimeError(f"{block.name}: its output was changed in place, its gradient would be wrong")
    outputs = [output for _, (_, output, _) in uses]
    grads = torch.autograd.grad(of, outputs, cotangent, retain_graph=True, allow_unused=True)
    found = []
    for block in blocks:
        parts = [
            _use(block, model.get_submodule(block.name), x, torch.zeros_like(y) if d is None else d, tape.batch)
            for (owner, (x, y, _)), d in zip(uses, grads, strict=True)
            if owner is block
        ]
        if not parts:
            raise RuntimeError(f"{block.name} took no part in the forward pass")
        inputs, deltas, masks = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        found.append(Factors(block, inputs, deltas, masks))
    return found


def _use(block: Block, module: nn.Module, x: Tensor, d: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """One use of a module as (inputs, outputs, mask), each (B, T, ...)."""
    size = len(batch)
    if block.kind == "embedding":
        x = x.expand(size, *x.shape[1:]).reshape(size, -1)
    else:
        if block.kind == "norm":
            x = layer_norm(x, module.normalized_shape, None, None, module.eps)  # type: ignore[arg-type]
        x = x.reshape(size, -1, x.shape[-1])
        if block.kind == "linear" and block.bias:
            x = pad(x, (0, 1), value=1.0)
    d = d.reshape(size, -1, d.shape[-1])
    mask = batch.inputs.get("attention_mask")
    if mask is None or mask.shape != x.shape[:2]:
        mask = torch.ones(x.shape[:2], device=x.device)
    return x, d, mask.to(d.dtype)


Scalar = Callable[[Tensor, Tensor], Tensor]


def gradients(
    task: Task, model: nn.Module, examples: Examples, blocks: Sequence[Block], of: Scalar, batch_size: int = BATCH
) -> Iterator[tuple[Tensor, list[Factors]]]:
    """Batch after batch (rows of like length together): the row indices and each block's factors.

    `of(outputs, targets) -> (B,)` is what is differentiated: `task.objective.loss`, `.measure`, or any other.
    """
    require_eval(model)
    parameter = next(model.parameters())
    for index in examples.batches(batch_size):
        batch = examples.batch(index).to(parameter.device, parameter.dtype)
        with torch.enable_grad(), recording(model, blocks, batch) as tape:
            total = of(task.outputs(model, batch), batch.targets).sum()
            yield index, factors(tape, model, blocks, total, None)


def output_gradients(
    task: Task, model: nn.Module, examples: Examples, blocks: Sequence[Block], batch_size: int = BATCH
) -> Iterator[tuple[Tensor, list[list[Factors]]]]:
    """The GGN's root by columns: for each r of S (B, O, R), S Sᵀ = ∂²ℓ/∂outputs², the factors of Jᵀ S[:, :, r]."""
    require_eval(model)
    parameter = next(model.parameters())
    for index in examples.batches(batch_size):
        batch = examples.batch(index).to(parameter.device, parameter.dtype)
        with torch.enable_grad(), recording(model, blocks, batch) as tape:
            outputs = task.outputs(model, batch)
            root = task.objective.hessian_root(outputs.detach())
            yield index, [factors(tape, model, blocks, outputs, root[..., r]) for r in range(root.shape[-1])]


def flat(found: Sequence[Factors]) -> Tensor:
    """All blocks one after the other, (B, P)."""
    return torch.cat([f.dense().reshape(len(f.outputs), -1) for f in found], 1)
