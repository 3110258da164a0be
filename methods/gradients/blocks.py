"""The parameters as blocks, one a module, and which of them a method covers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tasks.base import Examples, Task
from tasks.errors import UserError

KINDS = {nn.Linear: "linear", nn.Embedding: "embedding", nn.LayerNorm: "norm"}


@dataclass(frozen=True, eq=False)
class Block:
    """One module's parameters as a matrix (out, in).

    linear     [W, b]: bias is the last column
    embedding  Wᵀ (width, rows): a linear layer on one-hot inputs; `rows` are the ids that occur in the data at hand,
               all other columns of a gradient are zero; the padding row is no parameter
    norm       [w; b] (2, width) of a LayerNorm
    """

    name: str
    kind: str
    shape: tuple[int, int]
    parameters: tuple[str, ...]
    bias: bool
    rows: Tensor | None = None

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


def blocks_of(model: nn.Module, modules: Sequence[str] | None = None) -> list[Block]:
    """Blocks of all modules that own parameters, or of those whose name matches one of the patterns in `modules`.

    A module of a kind that has no exact rule, or parameters shared by two modules, are refused by name, never dropped.
    """
    if isinstance(modules, str):
        modules = [modules]
    modules_of = {name: m for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    owners: dict[int, list[str]] = {}
    for name, module in modules_of.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    found: list[Block] = []
    for name, module in modules_of.items():
        if modules is not None and not any(fnmatchcase(name, pattern) for pattern in modules):
            continue
        kind = KINDS.get(type(module))
        if kind is None:
            raise UserError(
                "method.modules",
                name,
                f"is a {type(module).__name__}, which has no gradient rule",
                allowed="Linear, Embedding, LayerNorm",
            )
        for key, parameter in module.named_parameters(recurse=False):
            others = [owner for owner in owners[id(parameter)] if owner != name]
            if others:
                raise UserError(
                    "method.modules", name, f"shares its {key} with {others[0]}", hint="take modules that share nothing"
                )
        found.append(_block(name, module, kind))
    if not found:
        raise UserError("method.modules", ",".join(modules or []), "matches no module", allowed=list(modules_of))
    return found


def _block(name: str, module: nn.Module, kind: str) -> Block:
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias = getattr(module, "bias", None) is not None
    parameters = tuple(f"{name}.{key}".lstrip(".") for key in (("weight", "bias") if bias else ("weight",)))
    if kind == "linear":
        return Block(name, kind, (weight.shape[0], weight.shape[1] + bias), parameters, bias)
    if kind == "embedding":
        rows = torch.arange(len(weight))
        if module.padding_idx is not None:
            rows = rows[rows != module.padding_idx]
        return Block(name, kind, (weight.shape[1], len(rows)), parameters, False, rows)
    return Block(name, kind, (1 + bias, weight.numel()), parameters, bias)


@torch.no_grad()
def with_rows_in_use(task: Task, model: nn.Module, blocks: Sequence[Block], data: Sequence[Examples]) -> list[Block]:
    """The same blocks, embeddings cut to the rows that these examples look up: the others' gradients are zero."""
    seen: dict[str, list[Tensor]] = {b.name: [] for b in blocks if b.kind == "embedding"}
    if not seen:
        return list(blocks)

    mask: Tensor | None = None

    def note(name: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            ids = args[0]
            seen[name].append(ids[mask > 0].unique() if mask is not None and mask.shape == ids.shape else ids.unique())

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [note(name) for name in seen]
    try:
        device = next(model.parameters()).device
        for examples in data:
            for index in examples.batches(256):
                batch = examples.batch(index).to(device)
                mask = batch.inputs.get("attention_mask")
                task.outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    cut = []
    for block in blocks:
        if block.kind == "embedding" and block.rows is not None:
            used = torch.cat(seen[block.name]).unique().cpu()
            rows = block.rows[torch.isin(block.rows, used)]
            block = replace(block, rows=rows, shape=(block.shape[0], len(rows)))
        cut.append(block)
    return cut


def coverage(model: nn.Module, blocks: Sequence[Block]) -> dict[str, object]:
    """What a record says about the blocks: which, and how many of all parameters they are."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    covered = sum(sizes[name] for block in blocks for name in block.parameters)
    return {"modules": [b.name for b in blocks], "parameters": covered, "of": sum(sizes.values())}
