"""Influence functions: gradients × curvature × similarity. Most methods are a point in this product."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.base import Method, Problem, Unsupported
from methods.curvature.base import Blocked, Curvature, Fitted
from methods.curvature.damping import Damping
from methods.curvature.identity import Identity
from methods.gradients.blocks import Block, blocks_of, with_rows_in_use
from methods.gradients.per_example import Factors, gradients
from tasks.base import Examples
from tasks.errors import UserError

GRADIENT_BYTES = 2**30  # query gradients that are held at once


@dataclass(frozen=True)
class Influence(Method):
    """dot     score(q, i) = −(1/N) ∇m(q)ᵀ (H + γI + λI)⁻¹ ∇ℓ(i)        (Koh & Liang 2017, eq. 2, for a measurement m)
    cosine  the same product over the norms of ∇m(q) and ∇ℓ(i); identity curvature only

    value(i) = −(1/N) ∇ℓ(i)ᵀ (H + γI + λI)⁻¹ ∇ℓ(i): a large self-influence is suspicious.
    γ is the recipe's own L2 term, `modules` the patterns of the blocks that are covered (null: all).
    """

    curvature: Curvature
    damping: Damping
    similarity: str = "dot"
    modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.similarity not in ("dot", "cosine"):
            raise UserError("method.similarity", self.similarity, allowed="dot, cosine")
        if self.similarity == "cosine" and not isinstance(self.curvature, Identity):
            raise UserError("method.similarity", "cosine", "goes with identity curvature only", hint="take dot")
        if isinstance(self.modules, str):
            object.__setattr__(self, "modules", (self.modules,))
        elif self.modules is not None:
            object.__setattr__(self, "modules", tuple(self.modules))

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        return not isinstance(self.curvature, Identity)

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        model = self._model(problem)
        # Rows that only queries look up meet no training gradient; a query's norm alone needs them.
        data = [problem.train] if self.similarity == "dot" else [problem.train, queries]
        blocks = with_rows_in_use(problem.task, model, blocks_of(model, self.modules), data)
        fitted = self._fitted(problem, model, blocks)
        scores = torch.empty(len(queries), len(problem.train), dtype=torch.float64)
        size = sum(b.size for b in blocks) * next(model.parameters()).element_size()
        for rows in torch.arange(len(queries)).split(max(1, GRADIENT_BYTES // size)):
            part, lengths = self._queries(problem, model, blocks, queries.select(rows))
            part = fitted.solve(part, self.damping, problem.task.recipe.l2)
            for index, found in gradients(problem.task, model, problem.train, blocks, problem.task.objective.loss):
                problem.meter.gradients += len(index)
                dense = blocked(found)
                product = -inner(part, dense).double().cpu() / len(problem.train)
                if self.similarity == "cosine":
                    product *= len(problem.train) / (lengths[:, None] * norms(dense).double().cpu())
                scores[rows[:, None], index] = product
        return scores

    def value(self, problem: Problem) -> Tensor:
        if self.similarity == "cosine":
            raise Unsupported("the cosine of a gradient with itself is 1")
        model = self._model(problem)
        blocks = with_rows_in_use(problem.task, model, blocks_of(model, self.modules), [problem.train])
        fitted = self._fitted(problem, model, blocks)
        values = torch.empty(len(problem.train), dtype=torch.float64)
        for index, found in gradients(problem.task, model, problem.train, blocks, problem.task.objective.loss):
            problem.meter.gradients += len(index)
            dense = blocked(found)
            solved = fitted.solve(dense, self.damping, problem.task.recipe.l2)
            values[index] = -sum_of_products(solved, dense).double().cpu() / len(problem.train)
        return values

    def _model(self, problem: Problem) -> nn.Module:
        model = problem.model()
        return model if self.curvature.precision is None else model.to(self.curvature.precision)

    def _fitted(self, problem: Problem, model: nn.Module, blocks: Sequence[Block]) -> Fitted:
        rows = tuple((b.name, b.shape, None if b.rows is None else tuple(b.rows.tolist())) for b in blocks)
        return problem.once((self.curvature, rows), lambda: self.curvature.fit(problem, model, blocks))

    def _queries(
        self, problem: Problem, model: nn.Module, blocks: Sequence[Block], queries: Examples
    ) -> tuple[Blocked, Tensor]:
        """∇m of the queries by block, and their norms."""
        dtype = next(model.parameters()).dtype
        found_all = {b.name: torch.empty(len(queries), *b.shape, dtype=dtype, device=problem.device) for b in blocks}
        for index, found in gradients(problem.task, model, queries, blocks, problem.task.objective.measure):
            problem.meter.gradients += len(index)
            for f in found:
                found_all[f.block.name][index] = f.dense()
        return found_all, norms(found_all).double().cpu()


def inner(left: Blocked, right: Blocked) -> Tensor:
    """⟨l_q, r_i⟩ over all blocks, (Q, B)."""
    return torch.stack([left[name].flatten(1) @ right[name].flatten(1).T for name in left]).sum(0)


def sum_of_products(left: Blocked, right: Blocked) -> Tensor:
    """⟨l_i, r_i⟩ over all blocks, (B,)."""
    return torch.stack([(left[name] * right[name]).flatten(1).sum(1) for name in left]).sum(0)


def norms(gradient: Blocked) -> Tensor:
    """‖g_i‖ over all blocks, (B,)."""
    return sum_of_products(gradient, gradient).sqrt()


def blocked(found: Sequence[Factors]) -> Blocked:
    """Dense gradients by block name."""
    return {f.block.name: f.dense() for f in found}
