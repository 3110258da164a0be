"""H times many vectors at once, from the data and never as a matrix.

ggn, empirical   H V = (1/n) Σ_i Σ_r s_ir (s_irᵀ V): the columns of a batch are made once for all vectors, and kept from
                 product to product where all of them fit in KEPT bytes
ggn              H V = (1/n) Σ_i J_iᵀ (∂²ℓ_i/∂outputs²) J_i V, without columns (Schraudolph 2002, §3): where they are
                 not kept and an example has more of them than there are vectors; where the objective has no root
hessian          H V = ∇_θ ⟨∇_θ (1/n) Σ_i ℓ_i, V⟩: one gradient, then one batched backward pass through it
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from methods.base import Problem, Unsupported, require_eval
from methods.curvature.root import columns, has_columns, rank, require_matrix
from methods.gradients.blocks import from_parameters, to_parameters
from methods.gradients.per_example import BATCH, flat, plain
from methods.gradients.source import Source
from tasks.errors import UserError

Product = Callable[[Tensor, Tensor | None], Tensor]  # (vectors (R, P), rows or None for all) -> (R, P)
MATRICES = ("hessian", "ggn", "empirical")
KEPT = 2**30  # bytes of columns that are not made anew for every product
TOGETHER = 32  # vectors in one batched backward pass
SPREAD = 2**26  # bytes of what one batched pass has at the model's output


def product_of(problem: Problem, source: Source, matrix: str) -> Product:
    """Mean over the given rows of the training set, or over all of it; L2 and damping aside."""
    require_matrix(matrix, MATRICES)
    if matrix == "hessian" and source.squeeze is not None:
        raise UserError(
            "method.curvature.matrix", "hessian", "is not the square of gradients: they cannot be compressed",
            hint="take ggn or empirical, or compression none",
        )  # fmt: skip

    rooted = matrix == "hessian" or has_columns(problem, source, matrix)
    if not rooted and source.squeeze is not None:
        raise Unsupported(f"task={problem.task.name} offers products with matrix=ggn, not with compressed gradients")
    kept = _kept(problem, source, matrix) if rooted and matrix != "hessian" else None

    def product(vectors: Tensor, rows: Tensor | None = None) -> Tensor:
        if kept is not None:
            some = kept if rows is None else kept[rows]
            s = some.flatten(0, 1)  # (n · R, P)
            return (vectors @ s.T) @ s / len(some)
        if matrix == "hessian":
            multiply = _hessian
        elif not rooted or (source.squeeze is None and rank(problem, source, matrix) > len(vectors)):
            multiply = _gauss_newton
        else:
            multiply = _rooted
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
    leaves, tangent = _leaves(source), _by_parameter(source, vectors)
    total = torch.zeros_like(vectors)
    for index in examples.batches(TOGETHER):
        problem.meter.gradients += len(index) * (1 + len(vectors))
        batch = examples.batch(index).to(vectors.device, vectors.dtype)
        with torch.enable_grad():
            outputs = functional_call(source.model, leaves, (), batch.inputs)
            gradient = torch.autograd.grad(
                problem.task.objective.loss(outputs, batch.targets).sum(), list(leaves.values()), create_graph=True
            )
        for some in torch.arange(len(vectors)).split(TOGETHER):
            second = torch.autograd.grad(
                gradient, list(leaves.values()), [tangent[name][some] for name in leaves], retain_graph=True,
                is_grads_batched=True, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            total[some] += _together(source, dict(zip(leaves, second, strict=True)))
    return total


def _gauss_newton(problem: Problem, source: Source, matrix: str, rows: Tensor | None, vectors: Tensor) -> Tensor:
    """J V by two backward passes: Jᵀu is linear in u, and its transpose is J. Any model that stands double
    differentiation will do."""
    require_eval(source.model)
    examples = problem.train if rows is None else problem.train.select(rows)
    leaves, tangent = _leaves(source), _by_parameter(source, vectors)
    total = torch.zeros_like(vectors)
    for index in examples.batches(BATCH):
        problem.meter.gradients += len(index) * (1 + 2 * len(vectors))
        batch = examples.batch(index).to(vectors.device, vectors.dtype)
        with torch.enable_grad():
            outputs = functional_call(source.model, leaves, (), batch.inputs)
            u = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(outputs, list(leaves.values()), u, create_graph=True, allow_unused=True)
        moved = {name: g for name, g in zip(leaves, pulled, strict=True) if g is not None and g.requires_grad}
        at = outputs.detach()
        few = max(1, min(TOGETHER, SPREAD // (at.numel() * at.element_size())))
        for some in torch.arange(len(vectors)).split(few):
            (pushed,) = torch.autograd.grad(
                list(moved.values()), u, [tangent[name][some] for name in moved], retain_graph=True,
                is_grads_batched=True,
            )  # fmt: skip
            curved = problem.task.objective.hessian_times(at, batch.targets, pushed)  # (R, B, ...)
            back = torch.autograd.grad(
                outputs, list(leaves.values()), curved, retain_graph=True,
                is_grads_batched=True, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            total[some] += _together(source, dict(zip(leaves, back, strict=True)))
    return total


def _leaves(source: Source) -> dict[str, Tensor]:
    """The covered parameters, to be differentiated by."""
    names = sorted({name for block in source.blocks for name in block.parameters})
    return {name: source.model.get_parameter(name).detach().requires_grad_() for name in names}


def _by_parameter(source: Source, vectors: Tensor) -> dict[str, Tensor]:
    """Vectors (R, P) over all blocks as {parameter: (R, ...)}."""
    found: dict[str, Tensor] = {}
    for block, part in zip(source.blocks, vectors.split([b.size for b in source.blocks], 1), strict=True):
        found |= to_parameters(block, part.reshape(-1, *block.shape))
    return found


def _together(source: Source, named: dict[str, Tensor]) -> Tensor:
    """The inverse, (R, P)."""
    return torch.cat([from_parameters(b, named).flatten(1) for b in source.blocks], 1)
