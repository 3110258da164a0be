"""Small float64 problems, and what plain autograd says about them: the oracles share no code with `methods`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from methods.base import Problem
from methods.curvature.base import Fitted
from methods.curvature.damping import Damping
from methods.gradients.blocks import Block
from methods.gradients.per_example import Factors, flat
from tasks.base import Checkpoint, Examples, Objective, Recipe, Task, Trajectory
from tasks.models.encoder import build_bert
from tasks.models.mlp import Perceptron
from tasks.objectives.classification import Classification

Named = dict[str, Tensor]  # by parameter or by module
Scalar = Callable[[Tensor, Tensor], Tensor]

GAMMA = 0.01
RECIPE = Recipe(
    optimizer="sgd",
    lr=0.1,
    epochs=2,
    batch_size=4,
    weight_decay=GAMMA,
    decay="l2",
    schedule="linear",
    warmup=0.0,
    momentum=0.0,
    betas=(0.9, 0.999),
    eps=1e-8,
    clip=None,
    bucket=1,
    checkpoints=3,
    tolerance=1e-11,
)


# Models


class Biased(nn.Module):
    """x (B, in) -> (B, out); layer k has a bias where `biases[k]`; tanh between the layers."""

    def __init__(self, widths: Sequence[int], biases: Sequence[bool]) -> None:
        super().__init__()
        shapes = zip(widths, widths[1:], biases, strict=False)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b, bias in shapes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        return self.layers[-1](x)


class Twice(nn.Module):
    """first, second (B, 3) ids -> (B, C): embedding, linear and norm are each used twice in one forward pass."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4, bias=False)
        self.head = nn.Linear(4, classes)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a = self.norm(self.mix(self.table(first)))
        b = self.norm(self.mix(self.table(second).tanh() + a))
        return self.head((a * b).mean(1))


class Positioned(nn.Module):
    """x (B, T, in) -> (B, C); the positions' vectors, the same for all examples, pass a linear layer of their own."""

    def __init__(self, length: int, features: int, classes: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(length, features)
        self.project = nn.Linear(features, features)
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1])[None]  # (1, T)
        return self.head((x * self.project(self.positions(ids))).tanh().sum(1))


def randomised(build: Callable[[], nn.Module]) -> nn.Module:
    """All parameters normal with deviation 0.6, so that none sits at a special value such as 0 or 1."""
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.6)
    return model


# Tasks


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(name: str, rows: int, features: int, classes: int, seed: int) -> Examples:
    x = torch.randn(rows, features, generator=draw(seed), dtype=torch.float64)
    y = torch.randint(classes, (rows,), generator=draw(seed + 100))
    return Examples(tuple(f"{name}{i}" for i in range(rows)), {"x": x}, y)


def tokens(name: str, lengths: Sequence[int], classes: int, seed: int, low: int, high: int, width: int = 8) -> Examples:
    """Ids in [low, high), a row of each length, padded with 0."""
    rows = len(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(low, high, (rows, width), generator=draw(seed)) * mask
    y = torch.randint(classes, (rows,), generator=draw(seed + 100))
    return Examples(tuple(f"{name}{i}" for i in range(rows)), {"input_ids": ids, "attention_mask": mask}, y)


def task_of(
    train: Examples, query: Examples, build: Callable[[], nn.Module], objective: Objective, **changes: Any
) -> Task:
    """`changes` are of the recipe."""
    return Task(
        name="small",
        splits={"train": train, "val": query, "query": query, "test": query},
        build=build,
        objective=objective,
        recipe=replace(RECIPE, **changes),
        model="small",
        source="generated",
        floor={},
        identity={"version": 1},
        dtype=torch.float64,
    )


def vector_task(
    widths: Sequence[int],
    biases: Sequence[bool] | None = None,
    rows: int = 12,
    queries: int = 5,
    seed: int = 0,
    **changes: Any,
) -> Task:
    """Features widths[0], classes widths[-1]."""
    biases = [True] * (len(widths) - 1) if biases is None else biases
    train = vectors("train", rows, widths[0], widths[-1], seed)
    query = vectors("query", queries, widths[0], widths[-1], seed + 1)
    build = partial(randomised, partial(Biased, widths, biases))
    return task_of(train, query, build, Classification(widths[-1]), **changes)


def logistic(rows: int = 12) -> Task:
    """12 parameters."""
    return vector_task([3, 3], rows=rows)


def without_bias() -> Task:
    """Two classes, 22 parameters; the first layer has no bias."""
    return vector_task([3, 4, 2], [False, True])


def three_classes() -> Task:
    """35 parameters, more than there are columns in the root of its GGN."""
    return vector_task([4, 4, 3], [True, True])


def bert() -> Task:
    """Sequences of 2 to 7 tokens, padded and masked; ids 9 to 11 occur in queries only. 256 parameters."""
    train = tokens("train", [7, 3, 5, 2, 7, 4, 6, 3, 5, 6, 4, 2], 2, 3, 1, 9)
    query = tokens("query", [4, 6, 3, 5], 2, 4, 5, 12)
    build = partial(randomised, partial(build_bert, 1, 4, 1, 6, 8, 0.0, 0.02, 12, 2))
    return task_of(train, query, build, Classification(2))


def shared() -> Task:
    """Every module but the head is used twice. 63 parameters."""
    splits = []
    for name, rows, seed in (("train", 12, 5), ("query", 4, 6)):
        first = torch.randint(0, 6, (rows, 3), generator=draw(seed))
        second = torch.randint(0, 6, (rows, 3), generator=draw(seed + 10))
        y = torch.randint(3, (rows,), generator=draw(seed + 20))
        splits.append(Examples(tuple(f"{name}{i}" for i in range(rows)), {"first": first, "second": second}, y))
    return task_of(splits[0], splits[1], partial(randomised, partial(Twice, 3)), Classification(3))


def single() -> Task:
    """One training example."""
    return vector_task([3, 4, 3], rows=1)


def identical() -> Task:
    """Six times the same training example."""
    task = vector_task([3, 4, 3], rows=1)
    row = task.train
    train = Examples(tuple("abcdef"), {"x": row.inputs["x"].repeat(6, 1)}, row.targets.repeat(6))
    return replace(task, splits={**task.splits, "train": train})


CASES: dict[str, Callable[[], Task]] = {
    "logistic": logistic,
    "without_bias": without_bias,
    "three_classes": three_classes,
    "bert": bert,
    "shared": shared,
    "single": single,
    "identical": identical,
}


def perceptron(features: int, classes: int, zero: bool = False) -> nn.Module:
    """The project's own softmax regression; `zero`: uniform logits."""
    model = Perceptron([features, classes])
    if zero:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
    return model


# Problems


def problem_of(task: Task, seed: int = 0) -> Problem:
    """θ0 is explained, as if nothing had been trained: the formulas hold at any θ."""
    start = parameters(task.initial(0))
    return Problem(task, seed, lambda k: Trajectory(k, start, (Checkpoint(1, start, 1.0),), 0.0, 0.0))


def parameters(model: nn.Module) -> Named:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def explained(problem: Problem) -> nn.Module:
    """The explained model, its parameters free."""
    return problem.model().requires_grad_(True)


# Oracles: one example at a time, without padding


def alone(examples: Examples, i: int) -> tuple[Named, Tensor]:
    """Inputs and target of one example, its padding cut off."""
    inputs = {k: v[i : i + 1] for k, v in examples.inputs.items()}
    if "attention_mask" in inputs:
        length = int(inputs["attention_mask"].sum())
        inputs = {k: v[:, :length] for k, v in inputs.items()}
    return inputs, examples.targets[i : i + 1]


def per_example(model: nn.Module, examples: Examples, of: Scalar) -> list[Named]:
    """∇of(outputs, target) of each example by parameter."""
    named = dict(model.named_parameters())
    found = []
    for i in range(len(examples)):
        inputs, target = alone(examples, i)
        grads = torch.autograd.grad(of(model(**inputs), target).sum(), list(named.values()), allow_unused=True)
        found.append(
            {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}
        )
    return found


def logit(c: int) -> Scalar:
    """The c-th output, to be differentiated as if it were a loss."""
    return lambda outputs, targets: outputs[:, c]


def stacked(gradients: Sequence[Named]) -> Tensor:
    """(B, P), parameters in the model's order."""
    return torch.stack([torch.cat([g.flatten() for g in one.values()]) for one in gradients])


def ggn(model: nn.Module, examples: Examples) -> Tensor:
    """(1/N) Σ J_iᵀ (diag p − p pᵀ) J_i, (P, P)."""
    named = parameters(model)
    total = torch.zeros(())
    for i in range(len(examples)):
        inputs, _ = alone(examples, i)

        def logits(theta: Named, inputs: Named = inputs) -> Tensor:
            return functional_call(model, theta, (), inputs)[0]

        jacobian = torch.cat([j.flatten(1) for j in jacrev(logits)(named).values()], 1)  # (C, P)
        p = logits(named).softmax(0)
        total = total + jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
    return total / len(examples)


def exact_scores(problem: Problem, queries: Examples, delta: float, matrix: Tensor | None = None) -> Tensor:
    """−(1/N) ∇mᵀ (G + δI)⁻¹ ∇ℓ with the GGN or another `matrix` (P, P), in the model's order."""
    model, objective = explained(problem), problem.task.objective
    m = stacked(per_example(model, queries, objective.measure))
    g = stacked(per_example(model, problem.train, objective.loss))
    matrix = ggn(model, problem.train) if matrix is None else matrix
    return (
        -m @ torch.linalg.solve(matrix + delta * torch.eye(len(matrix), dtype=torch.float64), g.T) / len(problem.train)
    )


def blocked(model: nn.Module, gradients: Sequence[Named], bias_last: bool = True) -> Named:
    """By module as (B, out, in): [W, b]; of an embedding Wᵀ without the padding row; of a norm (size, 1): w, then b."""
    found = {}
    for name, module in model.named_modules():
        if not dict(module.named_parameters(recurse=False)):
            continue
        w = torch.stack([g[f"{name}.weight"] for g in gradients])
        b = torch.stack([g[f"{name}.bias"] for g in gradients]) if getattr(module, "bias", None) is not None else None
        if isinstance(module, nn.Linear):
            parts = [w] if b is None else [w, b[:, :, None]]
            found[name] = torch.cat(parts if bias_last else parts[::-1], 2)
        elif isinstance(module, nn.Embedding):
            rows = [r for r in range(len(module.weight)) if r != module.padding_idx]
            found[name] = w[:, rows].transpose(1, 2)
        else:
            found[name] = torch.cat([w.flatten(1)] if b is None else [w.flatten(1), b.flatten(1)], 1)[:, :, None]
    return found


def captured(model: nn.Module, inputs: Named, target: Tensor, of: Scalar) -> dict[str, tuple[Tensor, Tensor]]:
    """What enters each linear layer (with its 1) or embedding, and d of/d(its output), (T, ·), all uses of one
    example one below the other."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(name: str) -> Callable:
        def note(module: nn.Module, entering: tuple[Tensor, ...], output: Tensor) -> Tensor:
            probe = torch.zeros_like(output, requires_grad=True)
            seen.setdefault(name, []).append((entering[0].detach(), probe))
            return output + probe

        return note

    kinds = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    handles = [module.register_forward_hook(hook(name)) for name, module in kinds.items()]
    value = of(model(**inputs), target).sum()
    for handle in handles:
        handle.remove()
    probes = [probe for uses in seen.values() for _, probe in uses]
    deltas = iter(torch.autograd.grad(value, probes))
    found = {}
    for name, uses in seen.items():
        rows = []
        for a, _ in uses:
            module = kinds[name]
            if isinstance(module, nn.Linear):
                a = a.reshape(-1, a.shape[-1])
                a = a if module.bias is None else torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
            rows.append(a if isinstance(module, nn.Linear) else a.reshape(-1))
        ds = [next(deltas) for _ in uses]
        found[name] = torch.cat(rows), torch.cat([d.reshape(-1, d.shape[-1]) for d in ds])
    return found


def labels(problem: Problem, fisher: str, use: str) -> Tensor:
    """The labels of one pass over the training set: the training labels, or the same draws that EK-FAC makes."""
    if fisher == "empirical":
        return problem.train.targets
    rng, model, found = problem.generator("fisher", use), explained(problem), problem.train.targets.clone()
    uniforms = torch.rand(found.shape, generator=rng, dtype=torch.float64)
    for i in range(len(found)):
        outputs = problem.task.outputs(model, problem.train.batch([i]))
        found[i] = problem.task.objective.sample(outputs.detach(), uniforms[i : i + 1])[0]
    return found


def ekfac(
    problem: Problem,
    fisher: str,
    uses: tuple[str, str] = ("factors", "eigenvalues"),
    transposed: bool = False,
    padded: bool = False,
) -> Named:
    """EK-FAC written out: Q diag Λ Qᵀ of each block, Q = U_S ⊗ U_A, as a dense matrix over vec(G), rows first.

    Two wrong ones for contrast: `transposed` takes the eigenvectors from rows; `padded` counts padding in A.
    """
    model, objective, train = explained(problem), problem.task.objective, problem.train
    first = replace(train, targets=labels(problem, fisher, uses[0]))
    second = replace(train, targets=labels(problem, fisher, uses[1]))
    a: dict[str, list[Tensor]] = {}
    d: dict[str, list[Tensor]] = {}
    for i in range(len(train)):
        inputs, target = alone(first, i)
        if padded:
            inputs = {k: v[i : i + 1] for k, v in first.inputs.items()}
        for name, (entering, delta) in captured(model, inputs, target, objective.loss).items():
            a.setdefault(name, []).append(entering)
            d.setdefault(name, []).append(delta)
    early = blocked(model, per_example(model, first, objective.loss))
    late = blocked(model, per_example(model, second, objective.loss))
    found = {}
    for name, g in late.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.LayerNorm):
            u = torch.linalg.eigh(early[name].flatten(1).T @ early[name].flatten(1))[1]
            q = u.T if transposed else u
        else:
            right = torch.eye(g.shape[2], dtype=g.dtype)
            if isinstance(module, nn.Linear):
                rows = torch.cat(a[name])
                right = torch.linalg.eigh(rows.T @ rows / len(rows))[1]
            deltas = torch.cat(d[name])
            left = torch.linalg.eigh(deltas.T @ deltas / len(deltas))[1]
            if transposed:
                left, right = left.T, right.T
            q = torch.kron(left.contiguous(), right.contiguous())
        values = (g.flatten(1) @ q).square().mean(0)
        found[name] = q @ values.diag() @ q.T
    return found


def block_scores(problem: Problem, queries: Examples, matrices: Named, deltas: dict[str, float]) -> Tensor:
    """−(1/N) Σ_b ∇mᵀ (H_b + δ_b I)⁻¹ ∇ℓ."""
    model, objective = explained(problem), problem.task.objective
    m = blocked(model, per_example(model, queries, objective.measure))
    g = blocked(model, per_example(model, problem.train, objective.loss))
    total = torch.zeros(len(queries), len(problem.train), dtype=torch.float64)
    for name, h in matrices.items():
        damped = h + deltas[name] * torch.eye(len(h), dtype=torch.float64)
        total -= m[name].flatten(1) @ torch.linalg.solve(damped, g[name].flatten(1).T) / len(problem.train)
    return total


# A fitted curvature as a matrix


def as_factors(block: Block, gradient: Tensor) -> Factors:
    """Factors whose gradient is the given (B, out, in)."""
    rows, (out, columns) = len(gradient), block.shape
    if block.kind == "linear":  # Σ_t e_t (row t)ᵀ
        inputs, outputs = gradient, torch.eye(out, dtype=gradient.dtype).expand(rows, -1, -1)
    elif block.kind == "embedding":
        assert block.rows is not None
        inputs, outputs = block.rows.expand(rows, -1), gradient.transpose(1, 2)
    else:
        inputs, outputs = torch.ones(rows, 1, columns, dtype=gradient.dtype), gradient.transpose(1, 2)
    return Factors(block, inputs, outputs, torch.ones(inputs.shape[:2], dtype=gradient.dtype))


def unit_vectors(blocks: Sequence[Block]) -> list[Factors]:
    """The identity (P, P) over all blocks, one after the other, as factors."""
    sizes = [b.size for b in blocks]
    parts = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
    return [as_factors(b, part.reshape(-1, *b.shape)) for b, part in zip(blocks, parts, strict=True)]


def inverse(fitted: Fitted, blocks: Sequence[Block], damping: Damping, l2: float) -> Tensor:
    """(H + γI + λI)⁻¹ (P, P), by the contract eᵢᵀ (H + δI)⁻¹ eⱼ = ⟨Uᵀeᵢ, precondition(Uᵀeⱼ)⟩."""
    rotated = fitted.coordinates(unit_vectors(blocks))
    return flat(rotated) @ flat(fitted.precondition(rotated, damping, l2)).T


# Comparisons


def error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation, in units of the largest expected number."""
    assert found.shape == expected.shape
    assert expected.numel() and torch.isfinite(found).all() and torch.isfinite(expected).all()
    scale = expected.abs().max().item()
    assert scale > 0, "nothing but zeros is compared"
    return (found.double() - expected.double()).abs().max().item() / scale


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    return error(found, expected) <= tolerance


def far(found: Tensor, expected: Tensor) -> bool:
    """Clearly another answer: what a negative control must give."""
    return error(found, expected) > 1e-2
