"""Per-example gradients by block, from what goes into a module and what its output owes to the loss.

One forward pass, one backward pass down to the module outputs only: no parameter's summed gradient is ever formed.
Modules without a rule of their own are run once more, one example at a time, to differentiate ⟨module(x_b), d_b⟩.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import layer_norm, one_hot, pad, rms_norm, unfold

from methods.base import require_eval
from methods.gradients.blocks import Block, refusal
from tasks.base import Batch, Examples, Task

BATCH = 128  # examples at once at the most
FEWEST = 8
BYTES = 2**27  # of their gradients in float32
SAME = 1e-3  # of its largest number: what a module's output may change by when it is run again, even in half precision


@dataclass(frozen=True)
class Factors:
    """A block's gradients of B examples: G_b = Σ_t d_bt a_btᵀ, (B, out, in).

    `inputs` a: linear (B, T, in) with the 1 of the bias, of a Conv2d the patches under its T output positions;
    embedding ids (B, T). `outputs` d (B, T, out): derivative by the module's output. `mask` (B, T): positions that are
    no padding. Uses of a module, and of all modules that share its parameters, stand one after the other along T, so
    that sums over T add them up. An embedding that is the output layer too: as an embedding a is one-hot; as the output
    layer, whose weight is the block transposed, a is the derivative by its output and d its input.
    whole: a = 1 (B, 1, 1), d the gradient itself (B, 1, size), so that d aᵀ is exact for whatever reads factors.
    """

    block: Block
    inputs: Tensor
    outputs: Tensor
    mask: Tensor

    def split(self, rows: int) -> "list[Factors]":
        """The same, `rows` examples at a time."""
        parts = zip(self.inputs.split(rows), self.outputs.split(rows), self.mask.split(rows), strict=True)
        return [Factors(self.block, *part) for part in parts]

    def to(self, dtype: torch.dtype) -> "Factors":
        """The same in another precision; ids stay ids."""
        inputs = self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs
        return replace(self, inputs=inputs, outputs=self.outputs.to(dtype))

    def gradient(self) -> "Gradient":
        """Σ_t d_t a_tᵀ; of an embedding, only the columns that this batch looks up."""
        if self.block.kind != "embedding":
            return Gradient(self.block, self.outputs.transpose(1, 2) @ self.inputs)
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

    def to(self, dtype: torch.dtype) -> "Gradient":
        """The same in another precision."""
        return replace(self, values=self.values.to(dtype))

    def times(self, f: Factors) -> Tensor:
        """⟨self_q, G_i⟩ with the gradients of a batch of factors, (Q, B)."""
        right = f.gradient()
        return right.of(self.dense()).flatten(1) @ right.values.flatten(1).T

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
    """What hooks saw in one forward pass; `closed` when it is over and modules are run again."""

    batch: Batch
    uses: dict[str, list[tuple[Tensor, Tensor, int]]] = field(default_factory=dict)  # input, output, version
    closed: bool = False


@contextmanager
def recording(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> Iterator[Tape]:
    """Hooks that note each block's inputs and outputs; they are gone afterwards, also after an exception."""
    tape = Tape(batch)

    def hook(name: str) -> Callable:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if tape.closed:
                return output
            given = (*args, *kwargs.values())
            if len(given) != 1 or not all(isinstance(t, Tensor) and t.ndim for t in (*given, output)):
                raise refusal(name, f"is a {type(module).__name__}, which does not map one tensor to one tensor")
            if len(output) == 1 < len(batch):
                # Computed once for all examples (positions): each example needs a gradient of its own.
                output = output.expand(len(batch), *output.shape[1:])
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            tape.uses.setdefault(name, []).append((given[0].detach().clone(), output, output._version))
            return output

        return note

    names = [name for block in blocks for name in block.modules]
    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def factors(
    tape: Tape, model: nn.Module, blocks: Sequence[Block], of: Tensor, cotangent: Tensor | None
) -> list[Factors]:
    """Factors of d⟨of, cotangent⟩/d(block), example by example; `of` may be asked again with another cotangent."""
    tape.closed = True
    uses = [(name, *use) for block in blocks for name in block.modules for use in tape.uses.get(name, [])]
    for name, _, output, version in uses:
        if output._version != version:
            raise RuntimeError(f"{name}: its output was changed in place, its gradient would be wrong")
    deltas = torch.autograd.grad(
        of, [output for _, _, output, _ in uses], cotangent, retain_graph=True, allow_unused=True
    )
    found = []
    for block in blocks:
        parts = []
        for name in block.modules:
            its = [(x, y.detach(), d) for (user, x, y, _), d in zip(uses, deltas, strict=True) if user == name]
            if not its:
                raise RuntimeError(f"{name} took no part in the forward pass")
            module = model.get_submodule(name)
            parts += [_use(block, name, module, x, y, torch.zeros_like(y) if d is None else d, tape) for x, y, d in its]
        inputs, outputs, mask = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        if block.kind == "whole":  # its uses are one gradient
            inputs, outputs, mask = inputs[:, :1], outputs.sum(1, keepdim=True), mask[:, :1]
        if not (inputs.sum().isfinite() and outputs.sum().isfinite()):  # what is not finite stays so in a sum
            raise ArithmeticError(f"{block.name}: its gradients are not finite")
        found.append(Factors(block, inputs, outputs, mask))
    return found


def _use(
    block: Block, name: str, module: nn.Module, x: Tensor, y: Tensor, d: Tensor, tape: Tape
) -> tuple[Tensor, Tensor, Tensor]:
    """One use of a module, x -> y, as (inputs, outputs, mask), each (B, T, ...)."""
    size = len(tape.batch)
    if len(x) == 1 < size:
        x = x.expand(size, *x.shape[1:])
    if len(x) != size or len(d) != size:
        raise RuntimeError(f"{name}: its first axis has {len(x)} rows, not one for each of {size} examples")
    if block.kind == "whole":
        own = {key for key, _ in module.named_parameters(recurse=False)}  # others, where it is pruned, say
        closed = type(module) in NORMS and own <= {"weight", "bias"}
        d = (_normalised(module, x, d) if closed else _replayed(name, module, x, y, d))[:, None]
        x = d.new_ones(size, 1, 1)
    elif type(module) is nn.Conv2d:
        x, d = _patches(name, module, x), d.flatten(2).mT
    elif type(module) is nn.Embedding:
        x = x.reshape(size, -1)
        if block.kind == "linear":
            x = one_hot(x, block.shape[1]).to(d.dtype)
            if module.padding_idx is not None:  # no parameter here, but one of the output layer
                x[..., module.padding_idx] = 0
    else:
        x = x.reshape(size, -1, x.shape[-1])
    d = d.reshape(size, -1, d.shape[-1])
    if block.bias:
        x = pad(x, (0, 1), value=1.0)
    if type(module) is nn.Linear and block.transposed:
        x, d = d, x
    mask = tape.batch.inputs.get("attention_mask")
    if mask is None or mask.shape != x.shape[:2]:
        mask = torch.ones(x.shape[:2], device=x.device)
    return x, d, mask.to(d.dtype)


def _patches(name: str, module: nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution's kernel sees at each output position, (B, T, c_in · k1 · k2)."""
    if x.ndim != 4:
        raise RuntimeError(f"{name}: its input has {x.ndim} axes, not (examples, channels, height, width)")
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = pad(x, module._reversed_padding_repeated_twice, mode=mode)
    return unfold(x, module.kernel_size, module.dilation, 0, module.stride).mT


NORMS: dict[type, Callable[[Any, Tensor], Tensor]] = {
    nn.LayerNorm: lambda module, x: layer_norm(x, module.normalized_shape, None, None, module.eps),
    nn.RMSNorm: lambda module, x: rms_norm(x, module.normalized_shape, None, module.eps),
}


def _normalised(module: nn.Module, x: Tensor, d: Tensor) -> Tensor:
    """[Σ_t d_t ∘ x̂_t; Σ_t d_t] of w ∘ x̂ + b, (B, size)."""
    width = module.weight.numel()  # type: ignore[operator]
    x, d = NORMS[type(module)](module, x).reshape(len(x), -1, width), d.reshape(len(x), -1, width)
    parts = {"weight": (d * x).sum(1), "bias": d.sum(1)}
    return torch.cat([parts[key] for key, _ in module.named_parameters(recurse=False)], 1)


def _replayed(name: str, module: nn.Module, x: Tensor, y: Tensor, d: Tensor) -> Tensor:
    """∇_θ ⟨module(θ, x_b), d_b⟩ by the module's own parameters, (B, size)."""

    def product(own: dict[str, Tensor], x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        output = functional_call(module, own, (x[None],))[0]
        return (output * d).sum(), output

    own = {key: p.detach() for key, p in module.named_parameters(recurse=False)}
    try:
        with torch.no_grad():  # functional gradients are taken nevertheless
            found, again = vmap(grad(product, has_aux=True), in_dims=(None, 0, 0))(own, x, d)
    except RuntimeError as error:
        raise refusal(name, f"is a {type(module).__name__}, which cannot be run one example at a time") from error
    if (again - y).abs().max() > SAME * y.abs().max():
        raise refusal(name, f"is a {type(module).__name__}, whose output is another one when an example is alone")
    return torch.cat([found[key].reshape(len(x), -1) for key in own], 1)


Scalar = Callable[[Tensor, Tensor], Tensor]


def together(blocks: Sequence[Block]) -> int:
    """Examples in a batch: enough for matrix products to pay, few enough for their gradients to fit in `BYTES`."""
    return max(FEWEST, min(BATCH, BYTES // (4 * sum(b.size for b in blocks))))


def gradients(
    task: Task, model: nn.Module, examples: Examples, blocks: Sequence[Block], of: Scalar, batch_size: int | None = None
) -> Iterator[tuple[Tensor, list[Factors]]]:
    """Batch after batch (rows of like length together): the row indices and each block's factors.

    `of(outputs, targets) -> (B,)` is what is differentiated: `task.objective.loss`, `.measure`, or any other.
    """
    require_eval(model)
    parameter = next(model.parameters())
    for index in examples.batches(batch_size or together(blocks)):
        batch = examples.batch(index).to(parameter.device, parameter.dtype)
        with torch.enable_grad(), recording(model, blocks, batch) as tape:
            total = of(task.outputs(model, batch), batch.targets).sum()
            found = factors(tape, model, blocks, total, None)
        yield index, found


def output_gradients(
    task: Task, model: nn.Module, examples: Examples, blocks: Sequence[Block], batch_size: int | None = None
) -> Iterator[tuple[Tensor, list[list[Factors]]]]:
    """The GGN's root by columns: for each r of S (B, O, R), S Sᵀ = ∂²ℓ/∂outputs², the factors of Jᵀ S[:, :, r]."""
    require_eval(model)
    parameter = next(model.parameters())
    for index in examples.batches(batch_size or together(blocks)):
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


def inner(left: Sequence[Gradient], right: Iterable[Gradient]) -> Tensor:
    """⟨l_q, r_i⟩ over all blocks, (Q, B); `left` has all columns. `right` is read block by block."""
    parts = [r.of(l.dense()).flatten(1) @ r.values.flatten(1).T for l, r in zip(left, right, strict=True)]
    return torch.stack(parts).sum(0, dtype=wide(parts[0].dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of many numbers of a dtype are kept in."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def sum_of_products(left: Sequence[Gradient], right: Sequence[Gradient]) -> Tensor:
    """⟨l_i, r_i⟩ over all blocks, (B,), float64 on the CPU; both in the same columns. A square may be too small for the
    dtype of a gradient that is not, so each l_i is divided by its largest entry first."""
    largest = torch.stack([g.values.abs().flatten(1).amax(1) for g in left if g.values.shape[2]]).amax(0)
    scale = torch.where(largest > 0, largest, 1.0)
    parts = [((l.values / scale[:, None, None]) * r.values).flatten(1).sum(1) for l, r in zip(left, right, strict=True)]
    return torch.stack(parts).sum(0).cpu().double() * scale.cpu().double()


def norms(found: Sequence[Gradient]) -> Tensor:
    """‖g_i‖ over all blocks, (B,), float64 on the CPU."""
    return sum_of_products(found, found).sqrt()
