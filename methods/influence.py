"""Influence functions: gradients × compression × curvature × similarity. Most methods are a point in this product."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from methods.base import Method, Problem, Unsupported
from methods.compression.base import Compression
from methods.compression.low_rank_queries import Truncated, truncated
from methods.compression.none import Uncompressed
from methods.curvature.base import Curvature, Fitted
from methods.curvature.damping import Damping
from methods.curvature.identity import Identity
from methods.gradients.blocks import blocks_of, from_parameters, to_parameters, with_rows_in_use
from methods.gradients.per_example import Factors, Gradient, norms, sum_of_products
from methods.gradients.sharding import mine, share, summed
from methods.gradients.source import Source
from methods.gradients.tokens import by_token
from methods.store import require_place, stored
from tasks.base import Examples, Task
from tasks.errors import UserError

SIMILARITIES = ("dot", "cosine", "relatif", "theta_relatif")
FEW = 8  # examples at once where each of their tokens has a gradient
GRADIENT_BYTES = 2**30  # query gradients that are held at once


@dataclass(frozen=True)
class Influence(Method):
    """With K = (H + γI + λI)⁻¹ and ‖g‖²_K = gᵀ K g:

    dot            score(q, i) = −(1/N) ∇m(q)ᵀ K ∇ℓ(i)             (Koh & Liang 2017, eq. 2, for a measurement m)
    cosine         −∇m(q)ᵀ K ∇ℓ(i) / (‖∇m(q)‖_K ‖∇ℓ(i)‖_K)         (K = I: gradient cosine; K whitens: TrackStar)
    relatif        −(1/N) ∇m(q)ᵀ K ∇ℓ(i) / ‖∇ℓ(i)‖_K               (ℓ-RelatIF, Barshan et al. 2020, eq. 8)
    theta_relatif  −(1/N) ∇m(q)ᵀ K ∇ℓ(i) / ‖K ∇ℓ(i)‖               (θ-RelatIF, eq. 6)

    value(i) is an example's score for itself, ∇m = ∇ℓ (dot: −(1/N) ‖∇ℓ(i)‖²_K): large self-influence is suspicious.
    γ is the recipe's own L2 term, `modules` the patterns of the blocks that are covered (null: all). With a compression
    S, gradients are Sg throughout and H is S H Sᵀ. `precision` bf16 rounds the factors of training gradients before
    they are rotated and multiplied out (queries, covariances and eigendecompositions stay as they are).
    `query_rank` keeps so many singular values of each preconditioned query's blocks (see low_rank_queries). `store` is
    a folder that keeps compressed training gradients: with a curvature of matrix=empirical, another set of queries pays
    for its own gradients only.
    """

    curvature: Curvature
    damping: Damping
    similarity: str = "dot"
    modules: tuple[str, ...] | None = None
    compression: Compression = Uncompressed()  # noqa: RUF009
    precision: str = "float32"
    query_rank: int | None = None
    store: str | None = None

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise UserError("method.similarity", self.similarity, allowed=SIMILARITIES)
        if self.precision not in ("float32", "bf16"):
            raise UserError("method.precision", self.precision, allowed="float32, bf16")
        if self.query_rank is not None and self.query_rank < 1:
            raise UserError("method.query_rank", self.query_rank, allowed="1 or more, or null for all")
        if isinstance(self.modules, str):
            object.__setattr__(self, "modules", (self.modules,))
        elif self.modules is not None:
            object.__setattr__(self, "modules", tuple(self.modules))

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        return self.similarity == "dot" and not isinstance(self.curvature, Identity)

    def unmet(self, task: Task) -> str | None:
        if self.store is not None:
            require_place(self.store, not isinstance(self.compression, Uncompressed))
        return super().unmet(task)

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        task = problem.task
        # Rows that only queries look up meet no training gradient; a query's norm alone needs them.
        source, fitted = self._fit(
            problem, [problem.train, queries] if self.similarity == "cosine" else [problem.train]
        )
        scores = torch.zeros(len(queries), len(problem.train), dtype=torch.float64)
        size = source.size * next(source.model.parameters()).element_size()
        for rows in torch.arange(len(queries)).split(max(1, GRADIENT_BYTES // size)):
            problem.meter.gradients += len(rows)
            measured = source.collected(queries.select(rows), task.objective.measure, fitted.coordinates)
            rotated = fitted.precondition(measured, self.damping, task.recipe.l2)
            if self.similarity == "cosine":
                lengths = sum_of_products(rotated, measured).sqrt()
            # Queries leave the coordinates once: training gradients, which are more, then need not enter them.
            solved = fitted.back(rotated)
            asked: Sequence[Gradient | Truncated] = solved
            if self.query_rank is not None:
                asked = [truncated(g, self.query_rank) for g in solved]
            if source.products is not None:
                asked = [g.to(source.products) for g in asked]
            for index, found in _own(problem, source):
                found = source.rounded(found)
                product = -torch.stack([g.times(f).double().cpu() for g, f in zip(asked, found, strict=True)]).sum(0)
                if self.similarity != "dot":
                    product /= self._length(fitted, found, task.recipe.l2)
                product /= lengths[:, None] if self.similarity == "cosine" else len(problem.train)
                scores[rows[:, None], index] = product
        summed([scores])
        return scores

    def value(self, problem: Problem) -> Tensor:
        if self.similarity == "cosine":
            raise Unsupported("the cosine of a gradient with itself is 1")
        task, (source, fitted) = problem.task, self._fit(problem, [problem.train])
        values = torch.zeros(len(problem.train), dtype=torch.float64)
        for index, found in _own(problem, source):
            squared, solved = self._itself(fitted, found, task.recipe.l2)
            if self.similarity == "relatif":
                squared = squared.sqrt()
            elif self.similarity == "theta_relatif":
                squared = squared / norms(solved)
            values[index] = -squared / len(problem.train)
        summed([values])
        return values

    def offers(self, name: str) -> bool:
        return super().offers(name) and (name != "solve" or isinstance(self.compression, Uncompressed))

    def solve(self, problem: Problem, vector: dict[str, Tensor], of: Sequence[Examples] = ()) -> dict[str, Tensor]:
        if not isinstance(self.compression, Uncompressed):
            raise Unsupported("compressed gradients have no inverse curvature in the parameters' own space")
        source, fitted = self._fit(problem, [problem.train, *of])
        parameter = next(source.model.parameters())
        given = {name: v.to(parameter.device, parameter.dtype)[None] for name, v in vector.items()}
        asked = [Gradient(block, from_parameters(block, given)) for block in source.blocks]
        answer = {name: torch.zeros_like(v) for name, v in vector.items()}
        for g in fitted.solve(asked, self.damping, problem.task.recipe.l2):
            for name, part in to_parameters(g.block, g.dense()).items():
                answer[name] = part[0].to(vector[name].device, vector[name].dtype)
        return answer

    def detail(self, problem: Problem, queries: Examples, by: str) -> dict[str, Tensor]:
        """By layer: the terms of the sum over blocks, in the blocks' order. By token: ∇ℓ(i), then ∇m(q), taken apart
        into the shares of their tokens, to which the score is linear (Grosse et al. 2023, §2.4 and §5.3.2)."""
        if self.similarity != "dot":
            raise Unsupported(f"similarity={self.similarity} divides by a norm: its scores are no sums over parts")
        lengths = problem.train.lengths
        if by == "token" and lengths is None:
            raise Unsupported(f"task={problem.task.name} has no tokens")
        task, (source, fitted) = problem.task, self._fit(problem, [problem.train])

        def solved(found: Sequence[Factors]) -> list[Gradient]:
            problem.meter.gradients += len(found[0].outputs)
            measured = [Gradient(g.block, g.dense()) for g in fitted.coordinates(found)]
            return fitted.back(fitted.precondition(measured, self.damping, task.recipe.l2))

        if by == "layer":
            parts = torch.zeros(len(source.blocks), len(queries), len(problem.train), dtype=torch.float64)
            for rows, asked in source.gradients(queries, task.objective.measure):
                vectors = solved(asked)
                for index, found in source.gradients(problem.train, task.objective.loss):
                    for b, (g, f) in enumerate(zip(vectors, found, strict=True)):
                        parts[b, rows[:, None], index] = -g.times(f).double().cpu() / len(problem.train)
            return {"layers": parts}
        assert lengths is not None and queries.lengths is not None
        longest, asked_longest = int(lengths.max()), int(queries.lengths.max())
        of_train = torch.zeros(len(queries), len(problem.train), longest + 1, dtype=torch.float64)
        of_query = torch.zeros(len(queries), asked_longest + 1, len(problem.train), dtype=torch.float64)
        for rows, asked in source.gradients(queries, task.objective.measure, FEW):
            vectors, width = solved(asked), int(queries.lengths[rows].max())
            shares = solved(by_token(asked, width))
            for index, found in source.gradients(problem.train, task.objective.loss, FEW):
                n, there = len(problem.train), int(lengths[index].max())
                apart = by_token(found, there)
                product = -torch.stack([g.times(f).double().cpu() for g, f in zip(vectors, apart, strict=True)]).sum(0)
                product = product.unflatten(1, (len(index), there + 1)) / n
                of_train[rows[:, None], index, :there] = product[..., :there]
                of_train[rows[:, None], index, -1] = product[..., there]
                product = -torch.stack([g.times(f).double().cpu() for g, f in zip(shares, found, strict=True)]).sum(0)
                product = product.unflatten(0, (len(rows), width + 1)).transpose(1, 2) / n  # (Q, N, W + 1)
                of_query[rows[:, None], :width, index] = product[..., :width]
                of_query[rows[:, None], -1, index] = product[..., width]
        return {"train_tokens": of_train, "query_tokens": of_query}

    def _itself(self, fitted: Fitted, found: Sequence[Factors], l2: float) -> tuple[Tensor, list[Gradient]]:
        """‖∇ℓ(i)‖²_K (B,), and K ∇ℓ(i) in the coordinates."""
        g = fitted.coordinates(found)
        solved = fitted.precondition(g, self.damping, l2)
        shared = [
            Gradient(b.block, b.of(a.values), b.columns) if a.columns is None else a
            for a, b in zip(solved, g, strict=True)
        ]
        return sum_of_products(shared, g), solved

    def _length(self, fitted: Fitted, found: Sequence[Factors], l2: float) -> Tensor:
        """What a training gradient is divided by, (B,)."""
        squared, solved = self._itself(fitted, found, l2)
        return norms(solved) if self.similarity == "theta_relatif" else squared.sqrt()

    def _fit(self, problem: Problem, data: Sequence[Examples]) -> tuple[Source, Fitted]:
        """The curvature by the blocks that these examples reach, and where their gradients come from."""

        def made() -> tuple[Source, Fitted]:
            model = problem.model()
            if self.curvature.precision is not None:
                model = model.to(self.curvature.precision)
            blocks = with_rows_in_use(problem.task, model, blocks_of(model, self.modules), data)
            source = Source(problem.task, model, tuple(blocks))
            source = replace(source, squeeze=self.compression.fit(problem, source))
            if self.query_rank is not None and all(min(b.shape) == 1 for b in source.blocks):
                raise UserError(
                    "method.query_rank",
                    self.query_rank,
                    "has no effect: no block of these gradients is a matrix",
                    hint="take null, or a method/compression that works layer by layer",
                )
            if self.store is not None:
                source = stored(problem, source, self.store, (self.compression, self.modules))
            if self.precision == "bf16":
                source = replace(source, products=torch.bfloat16)
            return source, self.curvature.fit(problem, source)

        key = (self.curvature, self.compression, self.modules, self.precision, self.store, *(e.ids for e in data))
        return problem.fitted(key, made, keep=lambda made: made[1].standalone)


def _own(problem: Problem, source: Source) -> Iterator[tuple[Tensor, list[Factors]]]:
    """This process's share of the training gradients, by their rows in the whole; all of them where it is alone."""
    loss = problem.task.objective.loss
    if source.kept is not None:
        yield from share(source.gradients(problem.train, loss))
        return
    rows = mine(len(problem.train))
    if problem.wanted is not None:
        wanted = torch.tensor(problem.wanted, dtype=torch.long)
        rows = wanted if rows is None else rows[torch.isin(rows, wanted)]
    train = problem.train if rows is None else problem.train.select(rows)
    for index, found in source.gradients(train, loss):
        problem.meter.gradients += len(index)
        yield (index if rows is None else rows[index]), found
