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

BATCH = 32


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

    def gradient(self) -> "Gradient":
        """Σ_t d_t a_tᵀ; of an embedding, only the columns that this batch looks up."""
        if self.block.kind == "linear":
            return Gradient(self.block, self.outputs.transpose(1, 2) @ self.inputs)
        if self.block.kind == "norm":
            parts = [(self.outputs * self.inputs).sum(1)]
            if self.block.bias:
                parts.append(self.outputs.sum(1))
            return Gradient(self.block, torch.stack(parts, 1))
        assert self.block.rows is not None
        rows = self.block.rows.to(self.inputs.device)
        ids, place = self.inputs.unique(return_inverse=True)  # place (B, T)
        summed = self.outputs.new_zeros(len(self.outputs), len(ids), self.block.shape[0])
        summed.scatter_add_(1, place[..., None].expand(-1, -1, self.block.shape[0]), self.outputs)
        known = torch.isin(ids, rows)  # the padding row is no parameter, rows not in use have no column
        return Gradient(self.block, summed[:, known].transpose(1, 2), torch.searchsorted(rows, ids[known]))


@dataclass(frozen=True)
class Gradient:
    """Gradients of B examples by one block: `values` (B, out, k) in the given `columns` (k,), zero in all others; None:
    all columns, k = in."""

    block: Block
    values: Tensor
    columns: Tensor | None = None

    def dense(self) -> Tensor:
        """(B, out, in)."""
        if self.columns is None:
            return self.values
        full = self.values.new_zeros(len(self.values), *self.block.shape)
        full[..., self.columns] = self.values
        return full

    def of(self, matrix: Tensor) -> Tensor:
        """The columns of a (..., out, in) matrix that these gradients are non-zero in."""
        return matrix if self.columns is None else matrix[..., self.columns.to(matrix.device)]


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
        def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            if len(output) == 1 < len(batch):
                # Computed once for all examples (positions): each example needs a gradient of its own.
                output = output.expand(len(batch), *output.shape[1:])
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            (given,) = (*args, *kwargs.values())
            tape.uses.setdefault(name, []).append((given.detach().clone(), output, output._version))
            return output

        return note

    handles = [model.get_submodule(b.name).register_forward_hook(hook(b.name), with_kwargs=True) for b in blocks]
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
    if len(x) == 1 < size:
        x = x.expand(size, *x.shape[1:])
    if len(x) != size or len(d) != size:
        raise RuntimeError(f"{block.name}: its first axis has {len(x)} rows, not one for each of {size} examples")
    if block.kind == "embedding":
        x = x.reshape(size, -1)
    elif block.kind == "norm":
        x = layer_norm(x, module.normalized_shape, None, None, module.eps)  # type: ignore[arg-type]
        x, d = x.reshape(size, -1, block.shape[1]), d.reshape(size, -1, block.shape[1])
    else:
        x = x.reshape(size, -1, x.shape[-1])
        if block.bias:
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
            found = factors(tape, model, blocks, total, None)
        yield index, found


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
            found = [factors(tape, model, blocks, outputs, root[..., r]) for r in range(root.shape[-1])]
        yield index, found


def plain(found: Sequence[Factors]) -> list[Gradient]:
    """The gradients as they are, block by block."""
    return [f.gradient() for f in found]


def flat(found: Sequence[Gradient]) -> Tensor:
    """All blocks one after the other, (B, P)."""
    return torch.cat([g.dense().flatten(1) for g in found], 1)


def inner(left: Sequence[Gradient], right: Sequence[Gradient]) -> Tensor:
    """⟨l_q, r_i⟩ over all blocks, (Q, B); `left` has all columns."""
    return torch.stack(
        [r.of(l.dense()).flatten(1) @ r.values.flatten(1).T for l, r in zip(left, right, strict=True)]
    ).sum(0)


def sum_of_products(left: Sequence[Gradient], right: Sequence[Gradient]) -> Tensor:
    """⟨l_i, r_i⟩ over all blocks, (B,); both in the same columns."""
    return torch.stack([(l.values * r.values).flatten(1).sum(1) for l, r in zip(left, right, strict=True)]).sum(0)


def norms(found: Sequence[Gradient]) -> Tensor:
    """‖g_i‖ over all blocks, (B,)."""
    return sum_of_products(found, found).sqrt()
