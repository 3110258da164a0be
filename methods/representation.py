"""What a model makes of an example on the way to its answer: the vector at one of its modules, and who is near whom."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.base import Method, Problem, require_eval
from tasks.base import Examples, Task
from tasks.errors import UserError

INPUT = "input"  # as a layer: the vectors that the model is given
POOLINGS = ("first", "last", "mean")
SIGNS = ("label", "none")
GRID = 1e-9  # of a query's mean squared distance: what differs by less is as near
CHUNK = 256
NAMED = 8  # modules in a message


@dataclass(frozen=True)
class Representation(Method):
    """A method that compares examples by h(x) (d,), what the explained model makes of them at `layer`.

    `layer`: a module's name, whose output it is; null: what goes into the last linear layer; `input`: the vector x
    itself. Where it has tokens, (T, d), `pooling` takes the first, the last, or the mean of those that are no padding.
    Of a pair of answers h is that of the first − that of the second: what their rewards' difference is made of.
    """

    layer: str | None
    pooling: str

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise UserError("method.pooling", self.pooling, allowed=POOLINGS)

    def unmet(self, task: Task) -> str | None:
        if (lacking := super().unmet(task)) is not None:
            return lacking
        if self.layer == INPUT:
            require_vectors(task.train)
        elif self.layer is not None:
            find(task.initial(0), self.layer)
        return None

    def of(self, problem: Problem, examples: Examples) -> Tensor:
        """h (n, d), float64. The input alone needs no training."""
        if self.layer == INPUT:
            vectors = require_vectors(examples).double()
            return (vectors[:, 0] - vectors[:, 1] if problem.task.pairs else vectors).flatten(1)
        return features(problem, problem.model(), examples, self.layer, self.pooling)

    def of_train(self, problem: Problem) -> Tensor:
        """h (N, d) of the training rows, made once."""
        return problem.once(("features", self.layer, self.pooling), lambda: self.of(problem, problem.train))


@dataclass(frozen=True)
class Similarity(Representation):
    """score(q, i) = ± s(q, i) of a similarity s of features. `sign` label: + where the labels agree, − where they do
    not; none: s itself, which does not say whether an example helped or harmed."""

    sign: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sign not in SIGNS:
            raise UserError("method.sign", self.sign, allowed=SIGNS)

    @property
    def signed(self) -> bool:  # type: ignore[override]
        return self.sign == "label"

    def unmet(self, task: Task) -> str | None:
        targets = task.train.targets
        if self.sign == "label" and (targets.is_floating_point() or targets.ndim != 1):
            return f"needs class labels, which task={task.name} does not have; take method.sign=none"
        return super().unmet(task)

    def similarities(self, problem: Problem, queries: Examples) -> Tensor:
        """s (Q, N)."""
        raise NotImplementedError

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        found = self.similarities(problem, queries)
        return by_label(found, queries, problem.train) if self.sign == "label" else found


def by_label(similarities: Tensor, queries: Examples, train: Examples) -> Tensor:
    """(Q, N): + where the labels agree, − where they do not."""
    return torch.where(queries.targets[:, None] == train.targets[None, :], similarities, -similarities)


@torch.no_grad()
def features(problem: Problem, model: nn.Module, examples: Examples, layer: str | None, pooling: str) -> Tensor:
    """h (n, d) of each example at a module, float64, on the CPU; see `Representation`.

    Tokens are told from other axes by what there is: (B, T, d) has them, (B, d) and pictures (B, c, h, w) do not, and
    the latter are one vector. A module that is run several times counts as it is run last.
    Of pairs of answers the module has seen (B, 2, ...) or, pair after pair, (2B, ...).
    """
    require_eval(model)
    name, watched = f"what goes into the last linear layer of {type(model).__name__}", list(linears(model))
    if layer is not None:
        name, watched = layer, [find(model, layer)]
    elif not watched:
        raise UserError("method.layer", "null", "is the last linear layer, and there is none", allowed=names_of(model))
    last: list[object] = []

    def keep(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        last[:] = [output if layer is not None else next(iter((*args, *kwargs.values())))]

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in watched]
    found: list[tuple[Tensor, Tensor]] = []
    try:
        for index in examples.batches(CHUNK):
            batch = examples.batch(index).to(problem.device)
            last.clear()
            problem.task.outputs(model, batch)
            if not last:
                raise UserError("method.layer", name, "is not run when the model is", allowed=names_of(model))
            output, mask = first_tensor(last[0]), batch.inputs.get("attention_mask")
            if problem.task.pairs:
                vectors = first_less_second(output, mask, len(batch), pooling, name)
            else:
                vectors = pooled(output, mask, len(batch), pooling, name)
            found.append((index, vectors.to("cpu", torch.float64, copy=True)))
    finally:
        for handle in handles:
            handle.remove()
    together = torch.empty(len(examples), found[0][1].shape[1], dtype=torch.float64)
    for index, vectors in found:
        together[index] = vectors
    return together


def pooled(output: Tensor | None, mask: Tensor | None, rows: int, pooling: str, name: str) -> Tensor:
    """(B, T, d) -> (B, d) over the tokens of `mask` (B, T), over all T where there is none; else (B, ...) -> (B, d)."""
    if output is None or output.ndim == 0 or len(output) != rows:
        given = "no tensor" if output is None else f"a tensor {tuple(output.shape)}"
        raise UserError("method.layer", name, f"gives {given} for {rows} examples", allowed="a vector an example")
    if output.ndim != 3:
        return output.reshape(rows, -1)
    if mask is None:
        mask = torch.ones(output.shape[:2], device=output.device)
    if mask.shape != output.shape[:2]:
        problem = f"has {output.shape[1]} places where the examples have {mask.shape[1]} tokens"
        raise UserError("method.layer", name, problem, hint="take another layer")
    real = mask.to(output.dtype)
    if pooling == "mean":
        return (output * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if pooling == "first":
        where = place.masked_fill(mask == 0, mask.shape[1]).amin(1)
    else:
        where = place.masked_fill(mask == 0, -1).amax(1)
    return output[torch.arange(rows, device=output.device), where]


def first_less_second(output: Tensor | None, mask: Tensor | None, rows: int, pooling: str, name: str) -> Tensor:
    """(B, 2, ...) or (2B, ...) -> (B, d), `pooled` of the first answers − that of the second; `mask` (B, 2, T)."""
    if output is not None and output.shape[:2] == (rows, 2):
        output = output.flatten(0, 1)
    apart = None if mask is None or mask.ndim != 3 else mask.flatten(0, 1)
    both = pooled(output, apart, 2 * rows, pooling, name)
    return both[0::2] - both[1::2]


def first_tensor(output: object) -> Tensor | None:
    """A module's output, or the first of several."""
    if isinstance(output, dict):
        output = next(iter(output.values()))
    elif isinstance(output, tuple | list):
        output = output[0]
    return output if isinstance(output, Tensor) else None


def linears(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, nn.Linear))


def find(model: nn.Module, layer: str) -> nn.Module:
    """The module of this name."""
    modules = dict(model.named_modules())
    if not layer or layer not in modules:
        raise UserError("method.layer", layer, "is no module", allowed=[*names_of(model), INPUT, "null"])
    return modules[layer]


def names_of(model: nn.Module) -> list[str]:
    """Of the modules, the first ones and the last if there are many."""
    names = [name for name, _ in model.named_modules() if name]
    if len(names) > NAMED:
        names[NAMED - 1 : -1] = [f"{len(names) - NAMED} more"]
    return names


def require_vectors(examples: Examples) -> Tensor:
    """x (n, ...)."""
    if "x" not in examples.inputs:
        hint = "take a module's name, or null for what goes into the last linear layer"
        raise UserError("method.layer", INPUT, "is no vector in this task", hint=hint)
    return examples.inputs["x"]


def nearest(queries: Tensor, train: Tensor, ids: Sequence[str], own: Tensor | None = None) -> Iterator[Tensor]:
    """Rows of `train` (N, d) from the nearest to each of `queries` (Q, d) to the farthest: (B, N) for some queries
    after the other. `own` (Q,): the row that is the query itself, which comes last.

    As near, up to rounding, are rows in the order of their `ids`: the order in which they stand means nothing.
    """
    by_id, distances = _steps(queries, train, ids, own)
    for steps in distances:
        yield by_id[steps.argsort(dim=1, stable=True)]


def neighbours(queries: Tensor, train: Tensor, ids: Sequence[str], k: int, own: Tensor | None = None) -> Tensor:
    """The first k of `nearest`, in any order, (Q, k): without sorting all N, and without holding them."""
    by_id, distances = _steps(queries, train, ids, own)
    found = []
    for steps in distances:
        values, first = steps.topk(min(k + 1, steps.shape[1]), largest=False)
        chosen = first[:, :k].clone()
        edge = values[:, k - 1 : k]
        for row in (values[:, -1:] == edge)[:, 0].nonzero()[:, 0].tolist() if values.shape[1] > k else ():
            sure = (steps[row] < edge[row]).nonzero()[:, 0]
            tied = (steps[row] == edge[row]).nonzero()[:, 0]  # by their ids
            chosen[row] = torch.cat([sure, tied[: k - len(sure)]])
        found.append(by_id[chosen])
    return torch.cat(found)


def _steps(queries: Tensor, train: Tensor, ids: Sequence[str], own: Tensor | None) -> tuple[Tensor, Iterator[Tensor]]:
    """The rows in the order of their ids, (N,), and the squared distances to them in steps of `GRID`, (B, N) for some
    queries after the other."""
    by_id = torch.tensor(sorted(range(len(ids)), key=lambda i: ids[i]), dtype=torch.long)
    place = by_id.argsort()
    centre = train.mean(0)
    keys = train[by_id] - centre
    lengths = keys.square().sum(1)

    def distances() -> Iterator[Tensor]:
        for start in range(0, len(queries), CHUNK):
            asked = queries[start : start + CHUNK] - centre
            found = torch.addmm(lengths[None], asked, keys.T, alpha=-2).add_(asked.square().sum(1)[:, None])
            step = GRID * found.mean(1, keepdim=True)
            steps = found.div_(step.clamp_min(torch.finfo(torch.float64).tiny)).round_()
            if own is not None:
                steps[torch.arange(len(asked)), place[own[start : start + CHUNK]]] = torch.inf
            yield steps

    return by_id, distances()
