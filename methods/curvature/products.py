"""H times many vectors at once, from the data and never as a matrix.

ggn, empirical   H V = (1/n) Σ_i Σ_r s_ir (s_irᵀ V): the columns of a batch are made once for all vectors, and kept from
                 product to product where all of them fit in KEPT bytes
hessian          H V = ∇_θ ⟨∇_θ (1/n) Σ_i ℓ_i, V⟩: one gradient, then one batched backward pass through it
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from methods.base import Problem, require_eval
from methods.curvature.root import columns, rank, require_matrix
from methods.gradients.blocks import from_parameters, to_parameters
from methods.gradients.per_example import flat, plain
from methods.gradients.source import Source
from tasks.errors import UserError

Product = Callable[[Tensor, Tensor | None], Tensor]  # (vectors (R, P), rows or None for all) -> (R, P)
MATRICES = ("hessian", "ggn", "empirical")
KEPT = 2**30  # bytes of columns that are not made anew for every product
TOGETHER = 32  # vectors in one batched backward pass


def product_of(problem: Problem, source: Source, matrix: str) -> Product:
    """Mean over the given rows of the training set, or over all of it; L2 and damping aside."""
    require_matrix(matrix, MATRICES)
    if matrix == "hessian" and source.squeeze is not None:
        raise UserError(
            "method.curvature.matrix", "hessian", "is not the square of gradients: they cannot be compressed",
            hint="take ggn or empirical, or compression none",
        )  # fmt: skip

    kept = None if matrix == "hessian" else _kept(problem, source, matrix)

    def product(vectors: Tensor, rows: Tensor | None = None) -> Tensor:
        if kept is not None:
            some = kept if rows is None else kept[rows]
            s = some.flatten(0, 1)  # (n · R, P)
            return (vectors @ s.T) @ s / len(some)
        multiply = _hessian if matrix == "hessian" else _rooted
        return multiply(problem, source, matrix, rows, vectors) / (len(problem.train) if rows is None else len(rows))

    return product


def _kept(problem: Problem, source: Source, matrix: str) -> Tensor | None:
    """All columns (N, R, P), or None where they are too many."""
    parameter, n = next(source.model.parameters()), len(problem.train)
    columns_of_one = rank(problem, source, matrix)
    if n * columns_of_one * source.size * parameter.element_size() > KEPT:
        return None

    def made() -> Tensor:
        whole = torch.empty(n, columns_of_one, source.size, dtype=parameter.dtype, device=parameter.device)
        for index, found in columns(problem, source, matrix):
            whole[index] = torch.stack([flat(plain(column)) for column in found], 1)
        return whole

    return problem.once(("root", source.blocks, matrix), made)


def _rooted(problem: Problem, source: Source, matrix: str, rows: Tensor | None, vectors: Tensor) -> Tensor:
    total = torch.zeros_like(vectors)
    for _, found in columns(problem, source, matrix, rows=rows):
        for column in found:
            s = flat(plain(column))  # (B, P)
            total.addmm_(vectors @ s.T, s)
    return total


def _hessian(problem: Problem, source: Source, matrix: str, rows: Tensor | None, vectors: Tensor) -> Tensor:
    require_eval(source.model)
    examples = problem.train if rows is None else problem.train.select(rows)
    names = sorted({name for block in source.blocks for name in block.parameters})
    leaves = {name: source.model.get_parameter(name).detach().requires_grad_() for name in names}
    parts = vectors.split([b.size for b in source.blocks], 1)
    tangent: dict[str, Tensor] = {}
    for block, part in zip(source.blocks, parts, strict=True):
        tangent |= to_parameters(block, part.reshape(-1, *block.shape))
    total = torch.zeros_like(vectors)
    first = leaves[names[0]]
    for index in examples.batches(TOGETHER):
        problem.meter.gradients += len(index) * (1 + len(vectors))
        batch = examples.batch(index).to(first.device, first.dtype)
        with torch.enable_grad():
            outputs = functional_call(source.model, leaves, (), batch.inputs)
            gradient = torch.autograd.grad(
                problem.task.objective.loss(outputs, batch.targets).sum(), list(leaves.values()), create_graph=True
            )
        for some in torch.arange(len(vectors)).split(TOGETHER):
            second = torch.autograd.grad(
                gradient, list(leaves.values()), [tangent[name][some] for name in names], retain_graph=True,
                is_grads_batched=True, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            named = dict(zip(names, second, strict=True))
            total[some] += torch.cat([from_parameters(b, named).flatten(1) for b in source.blocks], 1)
    return total
