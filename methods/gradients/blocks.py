"""The parameters as blocks, one a module, and which of them a method covers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from inspect import signature
from math import prod

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tasks.base import Examples, Task
from tasks.errors import UserError

WHOLE_LIMIT = 4096  # numbers in a block that is treated as one dense vector
TABLE_LIMIT = 4096  # rows of an embedding that is the output layer too: its uses are dense
NAMED = 8  # modules in a message


@dataclass(frozen=True, eq=False)
class Block:
    """One module's parameters as a matrix (out, in); of modules that share them, the parameters of all.

    linear     [W, b] of Linear, HF's Conv1D and Conv2d (in = c_in · k1 · k2): bias is the last column;
               of an embedding that is the output layer too Wᵀ (width, rows), all rows
    embedding  Wᵀ (width, rows): a linear layer on one-hot inputs; `rows` are the ids that occur in the data at hand,
               all other columns of a gradient are zero; the padding row is no parameter
    whole      (size, 1): the parameters of any other module, flattened one after the other

    `parameters` and their `shapes` are named after the first of the `modules`; `transposed`: the stored weight is Wᵀ.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    parameters: tuple[str, ...]
    bias: bool
    rows: Tensor | None = None
    modules: tuple[str, ...] = ()
    shapes: tuple[torch.Size, ...] = ()
    transposed: bool = False

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


def _kind(module: nn.Module) -> str:
    """linear | embedding | whole. What a subclass or a parametrisation does is not known: they are whole."""
    if list(_own(module)) not in (["weight"], ["weight", "bias"]):
        return "whole"
    if type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1) or _is_conv1d(module):
        return "linear"
    return "embedding" if type(module) is nn.Embedding else "whole"


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is (in, out); told by name, so that transformers need not be imported."""
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def blocks_of(model: nn.Module, modules: Sequence[str] | None = None) -> list[Block]:
    """Blocks of all modules that own parameters, or of those whose name matches one of the patterns in `modules`.

    Modules that share their parameters are one block. What has no exact rule is refused by name, never dropped.
    """
    if isinstance(modules, str):
        modules = [modules]
    owned = {name: _own(module) for name, module in model.named_modules() if _own(module)}
    chosen = [n for n in owned if modules is None or any(fnmatchcase(n, pattern) for pattern in modules)]
    if not chosen:
        names = list(owned)
        if len(names) > NAMED:  # the first ones, and the last, which is the head of most models
            names[NAMED - 1 : -1] = [f"{len(names) - NAMED} more"]
        asked, hint = ",".join(modules or []) or "[]", "patterns with * are possible, null takes all"
        raise UserError("method.modules", asked, "matches no module", allowed=names, hint=hint)
    found = []
    for name in chosen:
        mine = {id(p): key for key, p in owned[name].items()}
        tied = {n: [mine[id(p)] for p in own.values() if id(p) in mine] for n, own in owned.items()}
        names = [n for n, keys in tied.items() if keys]  # this module and all that share a parameter with it
        for other in names:
            if other not in chosen:
                problem = f"shares its {tied[other][0]} with {other}"
                raise UserError("method.modules", name, problem, hint="take all modules that share it, or none")
        if name == names[0]:
            found.append(_block(model, names))
    return found


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _block(model: nn.Module, names: Sequence[str]) -> Block:
    """The block of one module, or of several that share all their parameters."""
    name, modules = names[0], [model.get_submodule(n) for n in names]
    module, own = modules[0], _own(modules[0])
    for other, its in zip(names, modules, strict=True):
        odd = {(key, id(p)) for key, p in own.items()} ^ {(key, id(p)) for key, p in _own(its).items()}
        if odd:
            raise refusal(f"{name},{other}", f"share parameters, but not their {min(odd)[0]}")
    shapes, parameters = tuple(p.shape for p in own.values()), tuple(f"{name}.{key}".lstrip(".") for key in own)

    def block(kind: str, shape: tuple[int, int], rows: Tensor | None = None, transposed: bool = False) -> Block:
        bias = kind == "linear" and "bias" in own
        shape = (shape[0], shape[1] + bias)
        return Block(name, kind, shape, parameters, bias, rows, tuple(names), shapes, transposed)

    if {type(m) for m in modules} == {nn.Embedding, nn.Linear} and list(own) == ["weight"]:
        rows, width = shapes[0]
        if rows > TABLE_LIMIT:
            raise refusal(",".join(names), f"share a weight of {rows} rows, more than {TABLE_LIMIT}")
        return block("linear", (width, rows), transposed=True)
    if len({(type(m), _kind(m), getattr(m, "padding_idx", None)) for m in modules}) > 1:
        raise refusal(",".join(names), f"share their {next(iter(own))}, but use it in different ways")
    kind = _kind(module)
    if kind == "embedding":
        known = torch.tensor([r for r in range(shapes[0][0]) if r != module.padding_idx], dtype=torch.long)
        return block(kind, (shapes[0][1], len(known)), known, transposed=True)
    if kind == "linear":
        out, *entering = reversed(shapes[0]) if _is_conv1d(module) else shapes[0]
        return block(kind, (out, prod(entering)), transposed=_is_conv1d(module))
    size = sum(shape.numel() for shape in shapes)
    if not _takes_one_tensor(module):
        raise refusal(name, f"is a {type(module).__name__}, which has no gradient rule: its input is not one tensor")
    if size > WHOLE_LIMIT:
        raise refusal(name, f"is a {type(module).__name__} of {size} numbers: without a rule {WHOLE_LIMIT} at most")
    return block(kind, (size, 1))


def refusal(name: str, problem: str) -> UserError:
    """Of one module, or of several, separated by commas, that share parameters."""
    return UserError("method.modules", name, problem, hint="leave it out: list all others in method.modules=[...]")


def _takes_one_tensor(module: nn.Module) -> bool:
    """As far as its signature tells. A container has no forward of its own, hence none that takes anything."""
    given = signature(module.forward).parameters.values()
    return sum(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in given) == 1


def to_parameters(block: Block, matrix: Tensor) -> dict[str, Tensor]:
    """A block's (..., out, in) as its parameters, {name: (..., *shape)}; rows that the block leaves out are zero."""
    lead = matrix.shape[:-2]
    if block.kind == "whole":
        parts = matrix[..., 0].split([shape.numel() for shape in block.shapes], -1)
    else:
        weight = matrix[..., : block.shape[1] - block.bias]
        if block.rows is not None:
            full = weight.new_zeros(*weight.shape[:-1], block.shapes[0][0])
            full[..., block.rows.to(full.device)] = weight
            weight = full
        parts = (weight.mT if block.transposed else weight, matrix[..., -1])
    named = zip(block.parameters, parts, block.shapes, strict=False)  # the last column is no bias where there is none
    return {name: part.reshape(*lead, *shape) for name, part, shape in named}


def from_parameters(block: Block, named: dict[str, Tensor]) -> Tensor:
    """The inverse, {name: (..., *shape)} -> (..., out, in); it drops the rows that the block leaves out."""
    shapes = zip(block.parameters, block.shapes, strict=True)
    parts = [named[name].flatten(named[name].ndim - len(s)) for name, s in shapes]
    if block.kind == "whole":
        return torch.cat(parts, -1)[..., None]
    weight = parts[0].unflatten(-1, (block.shapes[0][0], -1))
    weight = weight.mT if block.transposed else weight
    if block.rows is not None:
        weight = weight[..., block.rows.to(weight.device)]
    return torch.cat([weight, parts[1][..., None]], -1) if block.bias else weight


@torch.no_grad()
def with_rows_in_use(task: Task, model: nn.Module, blocks: Sequence[Block], data: Sequence[Examples]) -> list[Block]:
    """The same blocks, embeddings cut to the rows that these examples look up: the others' gradients are zero."""
    seen: dict[str, list[Tensor]] = {b.name: [] for b in blocks if b.kind == "embedding"}
    if not seen:
        return list(blocks)

    mask: Tensor | None = None

    def note(name: str, module: str) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            (ids,) = (*args, *kwargs.values())
            seen[name].append(ids[mask > 0].unique() if mask is not None and mask.shape == ids.shape else ids.unique())

        return model.get_submodule(module).register_forward_hook(hook, with_kwargs=True)

    handles = [note(b.name, module) for b in blocks if b.name in seen for module in b.modules]
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
